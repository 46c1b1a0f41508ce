"""What benchmarks share whose answers have a known number of tokens (DiffuLLaMA 2410.17891, sections 4.2 and B.3).

Options, the model, and the sampler: at most one token a forward, or with --released as the authors' sampler commits.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def parse(description: str, limit: str, most: int | None) -> argparse.Namespace:
    """The command line, with the model loaded as `lm`; limit, most: name and default of the largest number of lines."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(limit, type=int, default=most)
    parser.add_argument("--mode", choices=["ar", "diffusion"])
    parser.add_argument("--released", action="store_true", help="the authors' sampler, on a whole canvas")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()

    import torch

    import unmask

    torch.set_num_threads(1)
    options.lm = unmask.load(options.model)
    options.mode = options.mode or ("ar" if options.lm.diffusion is None else "diffusion")
    if options.mode == "ar" and options.released:
        parser.error("--released is a sampler of mode diffusion: leave it out with --mode ar")
    options.context = options.lm.network.context_length or 10**9
    return options


def answer_tokens(tokenizer: Any, before: str, answer: str) -> int:
    """How many tokens the answer has where it stands."""
    from unmask.data.supervised import continue_ids

    return len(continue_ids(tokenizer, tokenizer(before)["input_ids"], before, " " + answer))


def continuations(
    options: argparse.Namespace, groups: Mapping[int, Sequence[tuple[str, Any]]]
) -> Iterator[tuple[int, Any, str]]:
    """(length, what belongs to it, the new text) of each prompt; groups: length -> (prompt, what belongs to it)."""
    from unmask.sampling import Confidence, ConfidenceAmongAll

    lm, mode = options.lm, options.mode
    rule = ConfidenceAmongAll() if options.released else Confidence(1)
    for length, group in sorted(groups.items()):
        # The authors' sampler shares the tokens out over T = length forwards; the other takes as many by itself.
        steps = length if options.released else None
        decoder = lm.decoder(mode) if mode == "ar" else lm.decoder(mode, select=rule, max_denoising_steps=steps)
        for start in range(0, len(group), options.batch_size):
            batch = group[start : start + options.batch_size]
            out = lm.generate([prompt for prompt, _ in batch], mode=decoder, max_new_tokens=length,
                              temperature=options.temperature, seed=options.seed)  # fmt: skip
            for (_, item), text in zip(batch, out.texts, strict=True):
                yield length, item, text


def write(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> None:
    """rows.jsonl, and result.json with the figures and how they were made, which is printed too."""
    result = {**figures, "mode": options.mode, "released": options.released, "temperature": options.temperature,
              "seed": options.seed, "command": shlex.join(["python", *sys.argv])}  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (options.output / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
