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
from pathlib import Path
from typing import Any

import torch


def split_story(text: str) -> tuple[str, str, str] | None:
    """(before, middle sentence, after) of a story of at least five sentences, white space between them dropped."""
    sentences = [s for s in re.split(r"(?<=[.!?])[\"”']?\s+", " ".join(text.split())) if s]
    if len(sentences) < 5:
        return None
    at = len(sentences) // 2
    return " ".join(sentences[:at]), sentences[at], " ".join(sentences[at + 1 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a converted checkpoint.")
    parser.add_argument("parent", help="Folder of its AR parent.")
    parser.add_argument("stories")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--attention", choices=["bidirectional"], help="For block-wise models: see the whole suffix.")
    parser.add_argument("--lengths", help="Candidate lengths, as 6,10,14: choose among them by the bound as well.")
    options = parser.parse_args()

    from rouge_score.rouge_scorer import RougeScorer

    import unmask
    from unmask.data.documents import read_documents
    from unmask.sampling import Confidence, Request, sample_autoregressive

    torch.set_num_threads(1)
    lm, parent = unmask.load(options.model), unmask.load(options.parent)
    context = lm.network.context_length or 10**9
    word_start = lm.tokenizer.convert_ids_to_tokens(lm.tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    lead = "" if word_start.startswith("▁") else " "  # SentencePiece puts the space there by itself

    def ids(text: str, special: bool = False) -> list[int]:
        return lm.tokenizer(text, add_special_tokens=special)["input_ids"]

    cases = []
    for text in read_documents(Path(options.stories)):
        parts = split_story(text)
        if parts is None or sum(len(ids(p)) for p in parts) + 4 > context:
            continue
        before, middle, after = parts
        if ids(middle) and before:
            cases.append((before, middle, lead + after, len(ids(lead + middle))))
        if len(cases) == options.number:
            break

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])

    def diffusion(suffixes: bool, lengths: list[int] | None = None) -> list[tuple[str, int]]:
        written = []
        for before, _, after, n in cases:
            out = lm.infill(before, after if suffixes else "", lengths or n,
                            max_denoising_steps=min(options.steps, max(lengths or [n])), select=Confidence(),
                            attention=options.attention, seed=0)  # fmt: skip
            written.append((out.texts[0], int(out.num_forwards[0])))
        return written

    def ar() -> list[tuple[str, int]]:
        written = []
        for before, _, _, n in cases:
            prompt = torch.tensor(ids(before, special=True))
            new = sample_autoregressive(parent.network, [prompt], Request(max_new_tokens=n, context_length=context))
            written.append((parent.new_text(prompt, new.new_tokens[0]), n))
        return written

    systems: dict[str, Any] = {
        "diffusion, both sides": lambda: diffusion(True),
        "diffusion, prefix only": lambda: diffusion(False),
        "AR parent, prefix only": ar,
        "middle of another story": lambda: [(cases[i - 1][1], 0) for i in range(len(cases))],
    }
    if options.lengths:
        lengths = [int(n) for n in options.lengths.split(",")]
        systems["diffusion, both sides, length by the bound"] = lambda: diffusion(True, lengths)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(options).items() if k != "output"}
    with (options.output / "rows.jsonl").open("a") as rows, (options.output / "samples.jsonl").open("a") as samples:
        for name, write in systems.items():
            began = time.perf_counter()
            written = write()
            scores = [scorer.score(case[1], text) for case, (text, _) in zip(cases, written, strict=True)]
            row = {
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
                samples.write(json.dumps({"system": name, "truth": case[1], "written": text}) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
