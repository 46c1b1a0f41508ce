"""Infill the middle sentence of real stories, scored by ROUGE, beside the AR parent that sees the prefix only.

    python benchmarks/infill_stories.py MODEL PARENT TEST.txt --output results/infill-stories [--number 200]

The protocol of DiffuLLaMA (2410.17891, section 4.2, B.3): the true number of tokens is given, T = 32 (or the
number of tokens where that is smaller), greedy; the AR parent continues the prefix for as many tokens.
Two controls: the same model without the suffix, and the middle sentence of another story, which is chance level.
ROUGE-1/2/L are F-measures without stemming. With --lengths, the length is also chosen among those by the bound.
Rows go to rows.jsonl, one a system with its mean scores, and samples.jsonl, one a story.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import unmask
from unmask.data.readers import read_documents
from unmask.sampling import Confidence, Request, sample_autoregressive


@dataclass(frozen=True)
class Case:
    """A story with its middle sentence taken out. num_tokens: of the middle."""

    before: str
    middle: str
    after: str
    num_tokens: int


Written = list[tuple[str, int]]
"""A middle and its forwards for each story."""


def split_story(text: str) -> tuple[str, str, str] | None:
    """(before, middle sentence, after) of a story of at least five sentences, white space between them dropped."""
    sentences = [s for s in re.split(r"(?<=[.!?])[\"”']?\s+", " ".join(text.split())) if s]
    if len(sentences) < 5:
        return None
    middle = len(sentences) // 2
    return " ".join(sentences[:middle]), sentences[middle], " ".join(sentences[middle + 1 :])


def read_cases(lm: unmask.DiffusionLM, stories: Path, number: int) -> list[Case]:
    """The first stories that have five sentences and fit the context."""
    context = lm.network.context_length or 10**9
    word_start = lm.tokenizer.convert_ids_to_tokens(lm.tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    space = "" if word_start.startswith("▁") else " "  # SentencePiece puts the space there by itself

    def length(text: str) -> int:
        return len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    cases = []
    for text in read_documents(stories):
        parts = split_story(text)
        if parts is None or sum(map(length, parts)) + 4 > context:
            continue
        before, middle, after = parts
        if length(middle) and before:
            cases.append(Case(before, middle, space + after, length(space + middle)))
        if len(cases) == number:
            break
    return cases


def diffusion(
    lm: unmask.DiffusionLM, cases: Sequence[Case], options: argparse.Namespace, suffixes: bool,
    lengths: list[int] | None = None,
) -> Written:  # fmt: skip
    written = []
    for case in cases:
        steps = min(options.steps, max(lengths or [case.num_tokens]))
        out = lm.infill(case.before, case.after if suffixes else "", lengths or case.num_tokens, select=Confidence(),
                        max_denoising_steps=steps, attention=options.attention, seed=0)  # fmt: skip
        written.append((out.texts[0], int(out.num_forwards[0])))
    return written


def autoregressive(parent: unmask.DiffusionLM, cases: Sequence[Case], context_length: int | None) -> Written:
    written = []
    for case in cases:
        prompt = torch.tensor(parent.tokenizer(case.before)["input_ids"])
        request = Request(max_new_tokens=case.num_tokens, context_length=context_length)
        out = sample_autoregressive(parent.network, [prompt], request)
        written.append((parent.new_text(prompt, out.new_tokens[0]), case.num_tokens))
    return written


def another_story(cases: Sequence[Case]) -> Written:
    return [(cases[i - 1].middle, 0) for i in range(len(cases))]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a converted checkpoint.")
    parser.add_argument("parent", help="Folder of its AR parent.")
    parser.add_argument("stories")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--attention", choices=["bidirectional"], help="For block-wise models: see the whole suffix.")
    parser.add_argument("--lengths", help="Candidate lengths, as 6,10,14: choose among them by the bound as well.")
    return parser.parse_args()


def main() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    options = parse()
    torch.set_num_threads(1)
    lm, parent = unmask.load(options.model), unmask.load(options.parent)
    cases = read_cases(lm, Path(options.stories), options.number)
    systems: dict[str, Callable[[], Written]] = {
        "diffusion, both sides": partial(diffusion, lm, cases, options, True),
        "diffusion, prefix only": partial(diffusion, lm, cases, options, False),
        "AR parent, prefix only": partial(autoregressive, parent, cases, lm.network.context_length),
        "middle of another story": partial(another_story, cases),
    }
    if options.lengths:
        lengths = [int(n) for n in options.lengths.split(",")]
        systems["diffusion, both sides, length by the bound"] = partial(diffusion, lm, cases, options, True, lengths)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(options).items() if k != "output"}
    with (options.output / "rows.jsonl").open("a") as rows, (options.output / "samples.jsonl").open("a") as samples:
        for name, write in systems.items():
            began = time.perf_counter()
            written = write()
            scores = [scorer.score(case.middle, text) for case, (text, _) in zip(cases, written, strict=True)]
            row: dict[str, Any] = {
                "system": name,
                "stories": len(cases),
                **{k: round(100 * sum(s[k].fmeasure for s in scores) / len(scores), 2) for k in scores[0]},
                "forwards": sum(n for _, n in written) / len(written),
                "seconds": round(time.perf_counter() - began, 1),
                "settings": settings,
            }
            rows.write(json.dumps(row) + "\n")
            rows.flush()
            for case, (text, _) in list(zip(cases, written, strict=True))[:20]:
                samples.write(json.dumps({"system": name, "truth": case.middle, "written": text}) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
