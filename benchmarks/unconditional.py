"""Quality and latency of unconditional text against T and length (DiffuLLaMA 2410.17891, Figures 3-5, Table 10).

    python benchmarks/unconditional.py MODEL PARENT --output results/unconditional [--lengths 64,128]

For each length and number of steps: the parent's exact NLL of the samples (nats per token, the judge), the mean
entropy of a sample's own unigrams (falls where text repeats), the share of distinct bigrams, forwards, and seconds
for one batch beside those of the AR parent sampling as many tokens with its cache in the same run. A low NLL with
a low entropy is repetition, not quality. Text runs on over end tokens, as in the paper. The judge must share the
tokenizer. Rows go to rows.jsonl.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import unmask
from unmask.evaluation.likelihood import Document, nll, summarise
from unmask.lab.frontier import distinct, unigram_entropy
from unmask.sampling import (
    Ancestral,
    Confidence,
    Entropy,
    Margin,
    Remask,
    Request,
    SampledTokens,
    sample_autoregressive,
    sample_blocks,
    sample_canvases,
)

RULES = {"ancestral": Ancestral(), "confidence": Confidence(), "entropy": Entropy(), "margin": Margin(), "remask": None}

Sample = Callable[[int, int], SampledTokens]
"""(batch, seed) -> texts."""


def measure(sample: Sample, judge: unmask.DiffusionLM, options: argparse.Namespace) -> dict[str, float]:
    """Figures of as many texts as asked for, sampled in batches."""
    texts: list[list[int]] = []
    forwards, seconds, batches = 0, 0.0, 0
    while len(texts) < options.samples:
        began = time.perf_counter()
        out = sample(min(options.batch, options.samples - len(texts)), options.seed + batches)
        seconds, batches = seconds + time.perf_counter() - began, batches + 1
        texts += out.new_tokens
        forwards += int(out.num_forwards.sum())
    return quality(texts, judge) | {"forwards": forwards / len(texts), "seconds_per_batch": seconds / batches}


def quality(texts: Sequence[list[int]], judge: unmask.DiffusionLM) -> dict[str, float]:
    """The judge's NLL of texts after the begin token, their mean entropy, and their mean share of distinct bigrams."""
    begin = judge.begin_token()
    documents = [Document(torch.cat([begin, torch.tensor(text)]), torch.zeros(len(text) + 1)) for text in texts]
    judged = summarise(nll(judge.network, documents, context_length=judge.network.context_length))
    return {
        "judge_nll": judged.nats_per_token,
        "unigram_entropy": sum(map(unigram_entropy, texts)) / len(texts),
        "distinct_2": sum(distinct([text], 2) for text in texts) / len(texts),
    }


def ar_sample(parent: unmask.DiffusionLM, length: int, draw: dict[str, Any]) -> Sample:
    prompt = parent.begin_token()
    return lambda batch, seed: sample_autoregressive(
        parent.network, [prompt] * batch, Request(length, seed=seed, **draw)
    )


def diffusion_sample(lm: unmask.DiffusionLM, rule: str, steps: int, length: int, draw: dict[str, Any]) -> Sample:
    assert lm.diffusion is not None
    begin, config = lm.begin_token(), lm.diffusion
    decoder: dict[str, Any] = {"select": RULES[rule], "max_denoising_steps": steps}
    if config.attention != "bidirectional":
        return lambda batch, seed: sample_blocks(
            lm.network, config, [begin] * batch, Request(length, seed=seed, **draw), **decoder
        )
    remask = Remask() if rule == "remask" else None
    return lambda batch, seed: sample_canvases(
        lm.network, config, [begin] * batch, Request(length, seed=seed, **draw), remask=remask, **decoder
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a converted checkpoint.")
    parser.add_argument("parent", help="Folder of its AR parent: judge and baseline.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", default="64,128")
    parser.add_argument("--steps", default="8,16,32,64")
    parser.add_argument("--rule", choices=list(RULES), default="ancestral")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse()
    lm, parent = unmask.load(options.model), unmask.load(options.parent)
    if lm.diffusion is None:
        raise SystemExit(f"{options.model} is no converted checkpoint")
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(options).items() if k != "output"}
    draw = {"temperature": options.temperature, "top_p": options.top_p}

    def write(**row: Any) -> None:
        with (options.output / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row | {"settings": settings}) + "\n")
        print(json.dumps(row), flush=True)

    for length in (int(n) for n in options.lengths.split(",")):
        baseline = measure(ar_sample(parent, length, draw), parent, options)
        write(length=length, steps=None, rule="ar", **baseline, time_ratio=1.0)
        for steps in (int(n) for n in options.steps.split(",")):
            if steps > length and options.rule != "remask":
                continue
            figures = measure(diffusion_sample(lm, options.rule, steps, length, draw), parent, options)
            ratio = figures["seconds_per_batch"] / baseline["seconds_per_batch"]
            write(length=length, steps=steps, rule=options.rule, **figures, time_ratio=ratio)


if __name__ == "__main__":
    main()
