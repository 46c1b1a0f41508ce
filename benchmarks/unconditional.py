"""Quality and latency of unconditional text against T and length (DiffuLLaMA 2410.17891, Figures 3-5, Table 10).

    python benchmarks/unconditional.py MODEL PARENT --output results/unconditional [--lengths 64,128]

For each length and number of steps: the parent's exact NLL of the samples (nats per token, the judge), the mean
entropy of a sample's own unigrams (falls where text repeats), the share of distinct bigrams, forwards, and seconds
for one batch beside those of the AR parent sampling as many tokens with its cache in the same run. A low NLL with
a low entropy is repetition, not quality. Text runs on over end tokens, as in the paper. The judge must share the
tokenizer. Rows go to rows.jsonl.
"""

import argparse
import itertools
import json
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch


def unigram_entropy(tokens: list[int]) -> float:
    return -sum(n / len(tokens) * math.log(n / len(tokens)) for n in Counter(tokens).values())


def distinct_bigrams(tokens: list[int]) -> float:
    pairs = list(itertools.pairwise(tokens))
    return len(set(pairs)) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Folder of a converted checkpoint.")
    parser.add_argument("parent", help="Folder of its AR parent: judge and baseline.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", default="64,128")
    parser.add_argument("--steps", default="8,16,32,64")
    parser.add_argument(
        "--rule", choices=["ancestral", "confidence", "entropy", "margin", "remask"], default="ancestral"
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import unmask
    from unmask.evaluation.likelihood import Document, nll, summarise
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

    lm, parent = unmask.load(options.model), unmask.load(options.parent)
    if lm.diffusion is None:
        parser.error(f"{options.model} is no converted checkpoint")
    rule = {
        "ancestral": Ancestral(),
        "confidence": Confidence(),
        "entropy": Entropy(),
        "margin": Margin(),
        "remask": None,
    }[options.rule]
    begin = lm.begin_token()
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(options).items() if k != "output"}

    def measure(sample: Callable[[int, int], SampledTokens], judge: unmask.DiffusionLM) -> dict[str, float]:
        """`sample(batch, seed)` until there are enough samples."""
        texts: list[list[int]] = []
        forwards, seconds, batches = 0, 0.0, 0
        while len(texts) < options.samples:
            began = time.perf_counter()
            got = sample(min(options.batch, options.samples - len(texts)), options.seed + batches)
            seconds, batches = seconds + time.perf_counter() - began, batches + 1
            texts += got.new_tokens
            forwards += int(got.num_forwards.sum())
        documents = [Document(torch.cat([begin, torch.tensor(t)]), torch.zeros(len(t) + 1)) for t in texts]
        judged = summarise(nll(judge.network, documents, context_length=judge.network.context_length))
        return {
            "judge_nll": judged.nats_per_token,
            "unigram_entropy": sum(map(unigram_entropy, texts)) / len(texts),
            "distinct_2": sum(map(distinct_bigrams, texts)) / len(texts),
            "forwards": forwards / len(texts),
            "seconds_per_batch": seconds / batches,
        }

    with (options.output / "rows.jsonl").open("a") as file:

        def write(row: dict[str, object]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(json.dumps({k: v for k, v in row.items() if k != "settings"}), flush=True)

        draw = {"temperature": options.temperature, "top_p": options.top_p}
        for length in (int(n) for n in options.lengths.split(",")):

            def with_ar(batch: int, seed: int, n: int = length) -> SampledTokens:
                return sample_autoregressive(parent.network, [begin] * batch, Request(n, seed=seed, **draw))

            baseline = measure(with_ar, parent)
            write({"length": length, "steps": None, "rule": "ar", **baseline, "time_ratio": 1.0, "settings": settings})
            for steps in (int(n) for n in options.steps.split(",")):

                def with_diffusion(batch: int, seed: int, n: int = length, steps: int = steps) -> SampledTokens:
                    prompts = [begin] * batch
                    if lm.diffusion.attention == "bidirectional":
                        remask = Remask() if options.rule == "remask" else None
                        return sample_canvases(
                            lm.network, lm.diffusion, prompts, Request(n, seed=seed, **draw),
                            max_denoising_steps=steps, select=rule, remask=remask,
                        )  # fmt: skip
                    return sample_blocks(lm.network, lm.diffusion, prompts, Request(n, seed=seed, **draw), select=rule,
                                         max_denoising_steps=steps)  # fmt: skip

                if steps > length and options.rule != "remask":
                    continue
                found = measure(with_diffusion, parent)
                ratio = found["seconds_per_batch"] / baseline["seconds_per_batch"]
                write({"length": length, "steps": steps, "rule": options.rule, **found, "time_ratio": ratio,
                       "settings": settings})  # fmt: skip


if __name__ == "__main__":
    main()
