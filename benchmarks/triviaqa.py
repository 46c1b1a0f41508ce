"""TriviaQA without context: the answer's number of tokens is given, and ten more.

    python benchmarks/triviaqa.py MODEL triviaqa_sm_sub.jsonl --output results/NAME [--max-questions 2000] [--released]

Protocol of DiffuLLaMA (2410.17891, section 4.2 and B.3): the first 2,000 questions, each continued by as many tokens as
its answer has plus 10, in as many denoising steps (`--mode ar`: the same number of tokens). "contained" is the paper's
figure: a normalised answer or alias stands in the normalised text. "exact" asks for equality, "f1" is the largest F1
of words over answer and aliases (its second figure). Normalised: lower case, without punctuation and articles.
--released commits as the authors' sampler does, ranking committed tokens too; by default the surest token a forward.
The temperature of the paper's run is not known: 1 here, as for LAMBADA. Lines: `context, answer, aliases`. The authors'
script loads SQuAD with its passages instead; questions that do not fit the context are left out and counted.
"""

import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from known_length import answer_tokens, continuations, parse, write

MORE_TOKENS = 10
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalised(text: str) -> str:
    """Lower case, punctuation as spaces, without articles, single spaces (TriviaQA's official evaluation)."""
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def f1(text: str, gold: str) -> float:
    """Harmonic mean of precision and recall of the words of two normalised texts."""
    words, wanted = text.split(), gold.split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def scores(text: str, golds: Sequence[str]) -> dict[str, float]:
    """The figures of one answer; golds that are empty once normalised (such as "The") count for nothing."""
    said = normalised(text)
    wanted = [gold for gold in map(normalised, golds) if gold]
    return {
        "contained": float(any(gold in said for gold in wanted)),
        "exact": float(said in wanted),
        "f1": max((f1(said, gold) for gold in wanted), default=0.0),
    }


def main() -> None:
    options = parse(__doc__, "--max-questions", 2000)
    tokenizer = options.lm.tokenizer
    groups: dict[int, list[tuple[str, Any]]] = defaultdict(list)
    left_out = 0
    for number, line in enumerate(options.file.read_text().splitlines()[: options.max_questions]):
        row = json.loads(line)
        length = answer_tokens(tokenizer, row["context"], row["answer"]) + MORE_TOKENS
        if len(tokenizer(row["context"])["input_ids"]) + length > options.context:
            left_out += 1
        else:
            groups[length].append((row["context"], (number, row)))
    found = [
        {"question": number, "answer": row["answer"], "tokens": length, "text": text,
         **scores(text, [row["answer"], *row["aliases"]])}
        for length, (number, row), text in continuations(options, groups)
    ]  # fmt: skip
    found.sort(key=lambda row: row["question"])
    figures = {name: sum(row[name] for row in found) / max(1, len(found)) for name in ("contained", "exact", "f1")}
    write(options, found, {**figures, "questions": len(found), "left_out": left_out})


if __name__ == "__main__":
    main()
