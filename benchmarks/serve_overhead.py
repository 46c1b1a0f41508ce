"""What a token costs more through `unmask serve` than through `lm.generate`, alone and in a batch of 16.

    python benchmarks/serve_overhead.py runs/q --output results/serve

The server runs in a thread of this process, on the same model; both ways take turns. Rows: mode, batch, whether the
answer was streamed, milliseconds per new token of a row both ways (medians over rounds), and their ratio.
"""

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

import unmask

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from serving import running


def seconds_of_generate(lm: unmask.DiffusionLM, prompts: list[str], options: dict[str, Any]) -> float:
    """Of one call for all prompts."""
    began = time.perf_counter()
    lm.generate(prompts, options["mode"], options["max_tokens"])
    return time.perf_counter() - began


def seconds_of_server(
    client: httpx.Client, prompts: list[str], options: dict[str, Any], pool: ThreadPoolExecutor
) -> float:
    """Of one request for each prompt, at the same time."""

    def ask(prompt: str) -> None:
        body = {"model": "tiny", "prompt": prompt, **options}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for _ in answer.iter_bytes():
                pass

    began = time.perf_counter()
    list(pool.map(ask, prompts))
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    lm = unmask.load(args.model)
    modes = ["ar"] + (["diffusion"] if lm.diffusion else [])
    rows = []
    with running(lm) as address, httpx.Client(base_url=address, timeout=600) as client, ThreadPoolExecutor(16) as pool:
        for mode in modes:
            for batch in (1, 16):
                prompts = [args.prompt] * batch
                tokens = int(lm.generate(prompts[:1], mode, args.tokens).num_new_tokens[0])
                for stream in (False, True):
                    options = {"mode": mode, "max_tokens": args.tokens, "stream": stream}
                    here, there = list[float](), list[float]()
                    for _ in range(args.rounds):
                        here.append(seconds_of_generate(lm, prompts, options))
                        there.append(seconds_of_server(client, prompts, options, pool))
                    alone, served = (1000 * statistics.median(times) / tokens for times in (here, there))
                    rows.append({
                        "what": "overhead", "version": unmask.__version__, "model": Path(args.model).name, "mode": mode,
                        "batch": batch, "stream": stream, "tokens": tokens, "generate_ms": round(alone, 3),
                        "served_ms": round(served, 3), "more_ms": round(served - alone, 3),
                        "ratio": round(served / alone, 3),
                    })  # fmt: skip
                    print(json.dumps(rows[-1]))
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        with (args.output / "rows.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
