"""Does the token shift help, and does mask annealing hurt? Equal-token runs of `diffullama` on a small real parent.

    python benchmarks/shift_annealing.py PARENT TRAIN.txt VALID.txt --output results/diffullama-small [--tokens 500000]

{shift, no shift} x {annealed over a fifth of the steps, full attention at once} x seeds, everything else equal
(DiffuLLaMA 2410.17891, Table 3 is the same comparison in fine-tuning). Each run is scored by the NELBO on the
first 128 documents of VALID under full attention, the same masks for all. Rows go to rows.jsonl as they come; a
run that is there already is not repeated. `--summary` prints means over seeds.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any


def run(parent: str, train: str, valid: str, tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    import unmask

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        unmask.adapt(parent, train, "diffullama", Path(folder) / "run", max_tokens=tokens, max_length=256, batch_size=8,
                     eval_every=10**9, save_every=10**9, eval_data=valid, eval_documents=128, eval_samples=8,
                     show_progress=False, **settings)  # fmt: skip
        record = json.loads((Path(folder) / "run" / "run.json").read_text())
    return {
        "settings": settings,
        "tokens": record["tokens"],
        **record["evaluation"],
        "seconds": round(time.perf_counter() - began, 1),
        "versions": record["versions"],
        "resolved": {k: record["settings"][k] for k in ("learning_rate", "batch_size", "max_length")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("train")
    parser.add_argument("valid")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--summary", action="store_true", help="Only print the means of what is there.")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    anneal_steps = max(2, round(0.2 * options.tokens / (8 * 256)))
    grid: list[dict[str, Any]] = [
        {"shift": shift, "anneal_steps": steps, "seed": seed}
        for seed in range(options.seeds)
        for shift in (True, False)
        for steps in (anneal_steps, 1)
    ]
    for settings in grid:
        if options.summary or any(r["settings"] == settings and r["asked"] == options.tokens for r in rows):
            continue
        row = run(options.parent, options.train, options.valid, options.tokens, settings) | {"asked": options.tokens}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows.append(row)
        print(json.dumps(row), flush=True)
    for shift in (True, False):
        for steps in (anneal_steps, 1):
            scores = [
                r["nelbo"]
                for r in rows
                if r["asked"] == options.tokens
                and (r["settings"]["shift"], r["settings"]["anneal_steps"]) == (shift, steps)
            ]
            if scores:
                print(f"shift {shift!s:5}  anneal_steps {steps:4}  nelbo {mean(scores):.4f} (n={len(scores)})")


if __name__ == "__main__":
    main()
