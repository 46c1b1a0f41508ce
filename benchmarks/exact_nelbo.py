"""Is the Monte Carlo NELBO of a real checkpoint where its interval says? The sum over all masks of a block knows.

    python benchmarks/exact_nelbo.py CHECKPOINT TEST.txt --output results/exact-nelbo [--number 24] [--seeds 10]

Blocks of 4 (a checkpoint with larger ones is read with blocks of 4). For each seed the bound of the first documents is
estimated with 2 and with 8 masks per block, and compared with the exact one: the distance of the total in standard
errors, and the share of single documents within 1.96 of theirs. One row a checkpoint and number of masks.
"""

import argparse
import json
import math
from itertools import islice
from pathlib import Path

import unmask
from unmask.data.readers import read_documents
from unmask.evaluation.likelihood import LikelihoodOutput, summarise


def compare(exact: list[LikelihoodOutput], drawn: list[LikelihoodOutput]) -> tuple[float, float]:
    """(distance of the totals in standard errors, share of documents within 1.96 standard errors of theirs)."""
    whole, estimate = summarise(exact), summarise(drawn)
    assert estimate.standard_error is not None
    inside = sum(abs(d.nats - e.nats) <= 1.96 * (d.standard_error or 0.0) for d, e in zip(drawn, exact, strict=True))
    return (estimate.nats_per_token - whole.nats_per_token) / estimate.standard_error, inside / len(exact)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("test", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name", default=None)
    parser.add_argument("--number", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    lm = unmask.load(options.checkpoint)
    texts = list(islice(read_documents(options.test), options.number))
    exact = lm.nelbo(texts, exact=True, block_size=4)
    options.output.mkdir(parents=True, exist_ok=True)
    for samples in (2, 8):
        estimates, distances, shares = [], [], []
        for seed in range(options.seeds):
            drawn = lm.nelbo(texts, num_samples=samples, block_size=4, seed=seed)
            distance, share = compare(exact, drawn)
            estimates.append(summarise(drawn).nats_per_token)
            distances.append(distance)
            shares.append(share)
        row = {
            "checkpoint": options.name or Path(options.checkpoint).name,
            "trained_block_size": lm.diffusion.block_size if lm.diffusion else None,
            "documents": len(texts),
            "samples": samples,
            "exact": summarise(exact).nats_per_token,
            "mean_estimate": sum(estimates) / len(estimates),
            "standard_error": summarise(drawn).standard_error,
            "distances_in_standard_errors": [round(d, 3) for d in distances],
            "root_mean_square_distance": math.sqrt(sum(d * d for d in distances) / len(distances)),
            "documents_inside_95": sum(shares) / len(shares),
        }
        with (options.output / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
