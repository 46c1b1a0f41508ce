"""LAMBADA: the last word of a passage, of which the number of tokens is given.

    python benchmarks/lambada.py MODEL test.txt --output results/NAME [--max-passages 500] [--released]

Protocol of DiffuLLaMA (2410.17891, section 4.2 and B.3): the model continues the passage without its last word by as
many tokens as that word has, at most one token a forward, sampled at temperature 1 without truncation (as the authors'
code; 0 is greedy). --released commits as their sampler does, which ranks committed tokens too. A hit is the stripped
continuation being the word, exactly; each passage counts once (the authors' first script counted hits twice). A passage
longer than the context loses words at its beginning.
"""

import argparse
import json
import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any


def split_passage(line: str) -> tuple[str, str]:
    """(everything before the last word, the last word)."""
    before, _, word = line.strip().rpartition(" ")
    return before, word


def is_hit(text: str, word: str) -> bool:
    """Whether the continuation, without white space around it, is the word."""
    return text.strip() == word


def word_tokens(tokenizer: Any, before: str, word: str) -> int:
    """How many tokens the word has where it stands."""
    from unmask.data.supervised import continue_ids

    return len(continue_ids(tokenizer, tokenizer(before)["input_ids"], before, " " + word))


def shortened(tokenizer: Any, before: str, room: int) -> str:
    """The passage without as many words at its beginning as do not fit into `room` tokens."""
    while len(tokenizer(before)["input_ids"]) > room:
        before = before.partition(" ")[2]
    return before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-passages", type=int)
    parser.add_argument("--mode", choices=["ar", "diffusion"])
    parser.add_argument("--released", action="store_true", help="the authors' sampler, on a whole canvas")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()

    import torch

    import unmask
    from unmask.sampling import Confidence, ConfidenceAmongAll

    torch.set_num_threads(1)
    lm = unmask.load(options.model)
    mode = options.mode or ("ar" if lm.diffusion is None else "diffusion")
    if mode == "ar" and options.released:
        parser.error("--released is a sampler of mode diffusion: leave it out with --mode ar")
    rule = ConfidenceAmongAll() if options.released else Confidence(1)
    context = lm.network.context_length or 10**9
    groups: dict[int, list[tuple[int, str, str]]] = defaultdict(list)
    cut = 0
    for number, line in enumerate(options.file.read_text().splitlines()[: options.max_passages]):
        before, word = split_passage(line)
        length = word_tokens(lm.tokenizer, before, word)
        kept = shortened(lm.tokenizer, before, context - length)
        cut += kept != before
        groups[length].append((number, kept, word))

    found = []
    for length, group in sorted(groups.items()):
        # The authors' sampler shares the tokens out over T = length forwards; the other takes as many by itself.
        steps = length if options.released else None
        decoder = lm.decoder(mode) if mode == "ar" else lm.decoder(mode, select=rule, max_denoising_steps=steps)
        for start in range(0, len(group), options.batch_size):
            batch = group[start : start + options.batch_size]
            out = lm.generate([before for _, before, _ in batch], mode=decoder, max_new_tokens=length,
                              temperature=options.temperature, seed=options.seed)  # fmt: skip
            found += [{"passage": number, "word": word, "tokens": length, "text": text, "hit": is_hit(text, word)}
                      for (number, _, word), text in zip(batch, out.texts, strict=True)]  # fmt: skip
    found.sort(key=lambda row: row["passage"])
    result = {"accuracy": sum(row["hit"] for row in found) / len(found), "passages": len(found), "shortened": cut,
              "mode": mode, "released": options.released, "temperature": options.temperature, "seed": options.seed,
              "command": shlex.join(["python", *sys.argv])}  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
