"""LAMBADA: the last word of a passage, of which the number of tokens is given.

    python benchmarks/lambada.py MODEL test.txt --output results/NAME [--max-passages 500] [--released]

Protocol of DiffuLLaMA (2410.17891, section 4.2 and B.3): the model continues the passage without its last word by as
many tokens as that word has, at most one token a forward, sampled at temperature 1 without truncation (as the authors'
code; 0 is greedy). --released commits as their sampler does, which ranks committed tokens too. A hit is the stripped
continuation being the word, exactly; each passage counts once (the authors' first script counted hits twice). A passage
longer than the context loses words at its beginning.
"""

from collections import defaultdict
from typing import Any

from known_length import answer_tokens, continuations, parse, write


def split_passage(line: str) -> tuple[str, str]:
    """(everything before the last word, the last word)."""
    before, _, word = line.strip().rpartition(" ")
    return before, word


def is_hit(text: str, word: str) -> bool:
    """Whether the continuation, without white space around it, is the word."""
    return text.strip() == word


def shortened(tokenizer: Any, before: str, room: int) -> str:
    """The passage without as many words at its beginning as do not fit into `room` tokens."""
    while len(tokenizer(before)["input_ids"]) > room:
        before = before.partition(" ")[2]
    return before


def main() -> None:
    options = parse(__doc__, "--max-passages", None)
    tokenizer = options.lm.tokenizer
    groups: dict[int, list[tuple[str, Any]]] = defaultdict(list)
    cut = 0
    for number, line in enumerate(options.file.read_text().splitlines()[: options.max_passages]):
        before, word = split_passage(line)
        length = answer_tokens(tokenizer, before, word)
        kept = shortened(tokenizer, before, options.context - length)
        cut += kept != before
        groups[length].append((kept, (number, word)))
    found = [
        {"passage": number, "word": word, "tokens": length, "text": text, "hit": is_hit(text, word)}
        for length, (number, word), text in continuations(options, groups)
    ]
    found.sort(key=lambda row: row["passage"])
    accuracy = sum(row["hit"] for row in found) / len(found)
    write(options, found, {"accuracy": accuracy, "passages": len(found), "shortened": cut})


if __name__ == "__main__":
    main()
