"""Tokens per forward and text quality of a block-diffusion checkpoint at several confidence thresholds.

    python benchmarks/thresholds.py CONVERTED PARENT TEST.txt --output results/NAME [--thresholds 0.3,0.5,0.7,0.9,1]

Continues the first 24 tokens of test stories by 64 tokens, greedily, beside the AR parent. Quality without a
gold answer: the parent's NLL of the new tokens, *and* their unigram entropy and share of distinct bigrams, so
that repetition cannot win; the real continuation stands beside them.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch

import unmask
from unmask.attention import PADDING, Layout
from unmask.data import read_documents
from unmask.denoiser import score_ar
from unmask.sampling import Threshold

PROMPT, NEW = 24, 64


def quality(parent: unmask.DiffusionLM, rows: list[list[int]]) -> dict[str, float]:
    """Judge the tokens after the prompt of each row: parent's NLL, unigram entropy (nats), distinct-2."""
    width = max(map(len, rows))
    x0 = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    position = torch.arange(width).expand(len(rows), width)
    real = position < torch.tensor([[len(row)] for row in rows])
    wanted = real & (position >= PROMPT)
    layout = Layout.of(position, torch.where(real, 0, PADDING))
    with torch.inference_mode():
        log_p = score_ar(parent.network, x0, layout, wanted).double().log_softmax(-1)
    nll = -float(log_p.gather(-1, x0[wanted][:, None]).mean())
    new = [row[PROMPT:] for row in rows]
    counts = torch.bincount(torch.tensor([token for row in new for token in row])).double()
    p = counts[counts > 0] / counts.sum()
    pairs = [set(itertools.pairwise(row)) for row in new]
    total = sum(max(1, len(row) - 1) for row in new)
    return {
        "parent_nll": nll,
        "unigram_entropy": float(-(p * p.log()).sum()),
        "distinct_2": sum(map(len, pairs)) / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converted")
    parser.add_argument("parent")
    parser.add_argument("test")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--thresholds", default="0.3,0.5,0.7,0.9,1.0")
    parser.add_argument("--number", type=int, default=64)
    options = parser.parse_args()

    lm, parent = unmask.load(options.converted), unmask.load(options.parent)
    texts = [parent.tokenizer(text)["input_ids"] for text in read_documents(Path(options.test))]
    stories = [ids[: PROMPT + NEW] for ids in texts if len(ids) >= PROMPT + NEW][: options.number]
    prompts = torch.tensor([ids[:PROMPT] for ids in stories])
    rows = [{"system": "the story itself", "tokens_per_forward": None, **quality(parent, stories)}]

    def add(system: str, out: unmask.SampleOutput) -> None:
        made = [row[: PROMPT + n].tolist() for row, n in zip(out.sequences, out.num_new_tokens.tolist(), strict=True)]
        speed = float(out.num_new_tokens.sum() / out.num_forwards.sum())
        rows.append({"system": system, "tokens_per_forward": speed, **quality(parent, made)})

    add("AR parent", parent.generate(prompts, max_new_tokens=NEW))
    for threshold in map(float, options.thresholds.split(",")):
        add(f"threshold {threshold}", lm.generate(prompts, max_new_tokens=NEW, select=Threshold(threshold)))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "thresholds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
