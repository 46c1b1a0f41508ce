"""Find defaults for small parents: short runs of `efficient-dlm` on a real parent, one setting changed at a time.

    python benchmarks/small_defaults.py PARENT TRAIN.txt VALID.txt --output results/small-defaults [--tokens 1000000]

Every run is scored by the NELBO on the first 128 documents of VALID (uniform masks, 4 per block); rows go to
rows.jsonl as they come, and a run that is there already is not repeated.
"""

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

GRID: list[dict[str, object]] = [
    {},
    {"half_life": "inf"},
    {"half_life": "inf", "learning_rate": 2e-3},
    {"half_life": "inf", "learning_rate": 8e-3},
    {"half_life": "inf", "batch_size": 4},
    {"half_life": "inf", "batch_size": 16},
    {"half_life": "inf", "max_length": 256, "batch_size": 16},
    {"half_life": "inf", "complementary": True},
    {"half_life": "inf", "noise_level": "sequence"},
    {"half_life": 0.5},
    {"half_life": "inf", "beta2": 0.99},
    {"half_life": "inf", "weight_decay": 0.1},
]


def run(job: tuple[str, str, str, int, dict[str, object]]) -> dict[str, object]:
    import torch

    import unmask

    torch.set_num_threads(1)
    parent, train, valid, tokens, settings = job
    chosen = {k: float("inf") if v == "inf" else v for k, v in settings.items()}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        unmask.adapt(parent, train, "efficient-dlm", Path(folder) / "run", max_tokens=tokens, eval_every=10**9,
                     save_every=10**9, eval_data=valid, eval_documents=128, show_progress=False,
                     **({"block_size": 8} | chosen))  # fmt: skip
        record = json.loads((Path(folder) / "run" / "run.json").read_text())
    return {
        "settings": settings,
        "tokens": record["tokens"],
        **record["evaluation"],
        "seconds": round(time.perf_counter() - began, 1),
        "resolved": {k: record["settings"][k] for k in ("learning_rate", "batch_size", "max_length", "half_life")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent")
    parser.add_argument("train")
    parser.add_argument("valid")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--grid", type=json.loads, default=GRID, help="JSON list of settings instead of the built-in")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows = options.output / "rows.jsonl"
    earlier = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    finished = {json.dumps([row["settings"], row["asked"]], sort_keys=True) for row in earlier}
    missing = [s for s in options.grid if json.dumps([s, options.tokens], sort_keys=True) not in finished]
    jobs = [(options.parent, options.train, options.valid, options.tokens, settings) for settings in missing]
    with ProcessPoolExecutor(2) as pool, rows.open("a") as file:
        for row in pool.map(run, jobs):
            file.write(json.dumps(row | {"asked": options.tokens}) + "\n")
            file.flush()
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
