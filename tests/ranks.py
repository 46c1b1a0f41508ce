"""Runs cases on one of several processes: `torchrun ... ranks.py CASES RESULTS [KIND]`; `test_ranks` launches it.

CASES: JSON, name -> arguments of `unmask.adapt`. Each rank writes RESULTS/rank-<n>.json: how many there are, and for
each case a hash of the weights it ended with, or the error. KIND: "ddp" (every rank holds the model, the default) or
"fsdp2" (parameters are sharded).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate.utils import DistributedType
from transformers.utils import logging as hf_logging

import unmask
from unmask.training import loop
from unmask.training.ranks import join, leave

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


def run_case(case: dict[str, Any]) -> unmask.DiffusionLM:
    """Adapt a model held in float64, so that what is left of a difference is one."""
    case = dict(case)
    fault = case.pop("fault", None)
    if fault is not None and fault["rank"] == join().process_index:
        break_down(fault["kind"], Path(case["output_dir"]))
    lm = unmask.load(case.pop("model"), dtype=torch.float64)
    return unmask.adapt(lm, show_progress=False, **case)


def break_down(kind: str, folder: Path) -> None:
    """Have this process get SIGTERM after two rows of metrics, or sleep in a step."""
    if kind == "sleep":
        plain = loop.step_loss

        def slow(*given: Any, **named: Any) -> Any:
            time.sleep(8 if (folder / "metrics.jsonl").is_file() else 0)
            return plain(*given, **named)

        loop.step_loss = slow
        return

    def kill() -> None:
        rows = folder / "metrics.jsonl"
        while not rows.is_file() or rows.read_text().count("\n") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill, daemon=True).start()


def weights_of(lm: unmask.DiffusionLM) -> dict[str, torch.Tensor]:
    """All that a run may have changed."""
    drafter = {} if lm.drafter is None else lm.drafter.state_dict(prefix="drafter.")
    return lm.model.state_dict() | drafter


WITH_MAIN = "the main process has the weights"


def digest(lm: unmask.DiffusionLM) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(weights_of(lm).items()):
        if tensor.is_meta:
            return WITH_MAIN
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
         "FSDP_CPU_RAM_EFFICIENT_LOADING": "false", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}  # fmt: skip
"""What `accelerate launch` sets for FSDP2."""


def shard() -> None:
    """Have Accelerate shard parameters on CPUs too, which it does from its multi-GPU type only."""
    for name, value in FSDP2.items():
        os.environ.setdefault(name, value)
    join()._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def main(cases: Path, results: Path, kind: str = "ddp") -> None:
    torch.set_num_threads(1)
    ranks = join()
    if kind == "fsdp2":
        shard()
    told: dict[str, Any] = {"ranks": ranks.num_processes, "main": ranks.is_main_process}
    for name, case in json.loads(cases.read_text()).items():
        try:
            told[name] = digest(run_case(case))
        except (ValueError, SystemExit) as error:  # any other ends the launch
            told[name] = f"{type(error).__name__}: {error}"
    results.mkdir(exist_ok=True)
    (results / f"rank-{ranks.process_index}.json").write_text(json.dumps(told))
    ranks.wait_for_everyone()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
