"""The process in which `gpu.py` runs its cases: it says which it begins, and the row of each."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from typing import Any

import torch
import transformers
from gpu_cases import CASES, Case
from gpu_decoding import decode, forget, forward, vectors
from gpu_measure import Clock, matmul_rates
from gpu_training import train

from unmask.version import __version__

_PARTS = {"train": train, "decode": decode, "forward": forward, "embed": vectors}


def work(options: argparse.Namespace) -> None:
    """Run the cases that standard input names, until the time it names."""
    with os.fdopen(os.dup(1), "w") as said:
        os.dup2(2, 1)  # what libraries print is no row
        asked = json.load(sys.stdin)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("no GPU here: rehearse with --device cpu")
        if options.device == "cpu":
            torch.set_num_threads(1)

        def say(**line: Any) -> None:
            print(json.dumps(line), file=said, flush=True)

        say(made=_made(options))
        by_name = {case.name: case for case in CASES}
        for case in (by_name[name] for name in asked["cases"]):
            seconds = min(options.case_seconds, asked["until"] - time.monotonic())
            say(begin=case.name, seconds=max(case.limit, options.case_seconds))
            began = time.perf_counter()
            row = _row(case, Clock(seconds), options)
            say(row={"case": case.name, **row, "seconds": round(time.perf_counter() - began, 2)})
            if not _usable():
                raise SystemExit(f"{case.name} broke the GPU's context: a new process goes on")


def _made(options: argparse.Namespace) -> dict[str, Any]:
    """What two runs must have in common for their rows to stand in one table."""
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU, one thread"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__,
            "unmask": __version__, "new": options.new}  # fmt: skip


def _row(case: Case, clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a case, or its error."""
    try:
        if case.part == "device":
            return matmul_rates(options.device)
        if case.part == "train":
            forget()
        return _PARTS[case.part](case, clock, options)
    except Exception as error:  # the other cases are worth having
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _usable() -> bool:
    """Whether the GPU still answers; after some errors it never does again in this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True
