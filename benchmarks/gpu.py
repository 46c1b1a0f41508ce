"""The whole set for one GPU: training steps, decoding, and how near they come to what the device can do.

    python benchmarks/gpu.py [results/gpu]                              (H200, bf16)
    python benchmarks/gpu.py rows --device cpu --shape tiny --decode-shape tiny --length 256   (a rehearsal)

Writes rows.jsonl and README.md, a table, into the folder, row by row. After a share of --minutes no new case begins
(compiling takes most of the time), and the table says what was left out.
Arithmetic is counted as needed (`needed_flops`) and set against the rate of one large matrix product.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from unmask.hf.layers import compile_layers
from unmask.lab import bench_train as bench
from unmask.lab.bench_decode import DecodeCase, throughput, weight_bound
from unmask.version import __version__

LENGTH, BLOCK = 4096, 16


def needed_flops(config: Any, kind: str, block_size: int, rows: int, length: int) -> float:
    """Floating-point operations that a step needs: those of matrix products, forward and twice that backward.

    Counted are the pairs that the pattern allows, the head on half of the tokens (as many as are masked on
    average) for diffusion and on all of them for "ar", and of the last layer the rows that reach the head.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = config.head_dim * config.num_attention_heads
    keys = hidden * 2 * config.head_dim * config.num_key_value_heads
    rest = hidden * width * 2 + 3 * hidden * config.intermediate_size
    before = (length + block_size) / 2  # keys that a token of a block sees on average, its own block included
    streams, pairs, read = {
        "ar": (1, (length + 1) / 2, 1.0),
        "bidirectional": (1, length, 0.5),
        "two_stream": (2, before, 0.5),
    }[kind]
    whole = (layers - 1) * streams * (keys + rest + 2 * width * pairs)
    last = streams * keys + read * (rest + 2 * width * pairs)
    return 6.0 * rows * length * (whole + last + read * hidden * config.vocab_size)


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of one large square matrix product, the best of a few."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / min(bench.clocks(lambda: a @ b)[torch.cuda.is_available()] for _ in range(8))


def training(shape: str, length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Steps beside AR's, with the share of the matrix-product rate that the needed arithmetic reaches.

    First with the model's layers as they are, then with compiled ones, on both sides.
    """
    model = bench.make_model(shape)
    device = model.device.type
    rate = matmul_rate(device, model.dtype, 8192 if device == "cuda" else 1024)
    yield {"case": "matmul", "value": rate / 1e12, "unit": "TFLOP/s"}
    rows = max(1, 8192 // length) if device == "cuda" else 1
    for compiled in (False, True):
        if compiled:
            compile_layers(model)
        for kind in ("two_stream", "bidirectional") if compiled else ("two_stream", "bidirectional", "drafter"):
            steps = bench.train_steps(model, kind, BLOCK, rows, length)
            ours, baseline, ratio, _ = bench.measure(steps["diffusion"], steps["ar"], rounds)
            row = {"case": f"{kind}_{length}", "value": ours, "baseline": baseline, "ratio": ratio,
                   "unit": "s per step", "compiled": compiled, "tokens_per_second": rows * length / ours}  # fmt: skip
            for name, which, seconds in (("share_of_matmul", kind, ours), ("ar_share_of_matmul", "ar", baseline)):
                if which != "drafter":
                    needed = needed_flops(model.config, which, BLOCK, rows, length)
                    row[name] = needed / seconds / rate
            if device == "cuda":
                row["peak_gib"] = {which: _peak(step) for which, step in steps.items()}
            yield row


def _peak(step: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**30


def decoding(shape: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One denoising forward beside reading the weights, then batches of 1, 8 and 64 beside `generate()` and our AR.

    Compiled where launching kernels takes longer than running them; a batch of 64 computes long enough.
    """
    model = bench.make_model(shape)
    for compiled in (False, True):
        yield _row(weight_bound(model, compiled))
    for batch, compiled in ((1, True), (8, True), (64, False), (1, False)):
        for case in throughput(model, rounds, (batch,), compiled=compiled):
            yield _row(case)


def _row(case: DecodeCase) -> dict[str, Any]:
    return asdict(case) | {"compiled": case.settings["compiled"]}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| case | compiled | ours | AR | ratio | unit | share of matmul rate (AR's) |", "|---" * 7 + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['case']} | | failed: {row['error']} | | | | |")
            continue
        numbers = [f"{row[key]:.4g}" if row.get(key) is not None else "" for key in ("value", "baseline", "ratio")]
        share = f"{row['share_of_matmul']:.2f} ({row['ar_share_of_matmul']:.2f})" if "share_of_matmul" in row else ""
        compiled = "yes" if row.get("compiled") else ""
        lines.append(f"| {row['case']} | {compiled} | {' | '.join(numbers)} | {row.get('unit', '')} | {share} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/gpu"))
    parser.add_argument("--shape", default="0.6b", help="of the training steps")
    parser.add_argument("--decode-shape", default="4b")
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("train", "decode"))
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no case begins; a third for training")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: run with --device cpu --shape tiny --decode-shape tiny --length 256")
    if options.device == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, one thread"
    options.folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "train": lambda: training(options.shape, options.length, options.rounds),
        "decode": lambda: decoding(options.decode_shape, options.rounds),
    }
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        seconds = time.perf_counter() - began
        (options.folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (options.folder / "README.md").write_text(f"# {name}\n\n{table(rows)}\n\nMeasured in {seconds:.0f} s.\n")
        print(f"{seconds:6.0f} s  {row}", flush=True)

    for part, cases in parts.items():
        if options.only not in (None, part):
            continue
        until = began + 60 * options.minutes * (1 / 3 if (part, options.only) == ("train", None) else 1)
        try:
            for row in cases():
                keep(row | {"part": part, "device": name, "torch": torch.__version__, "unmask": __version__})
                if time.perf_counter() > until:
                    keep({"case": part, "error": f"no time for cases after {rows[-1]['case']}"})
                    break
        except Exception as error:  # the other half is worth having
            keep({"case": part, "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
