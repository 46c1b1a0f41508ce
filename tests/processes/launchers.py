"""The commands of docs/processes.md as they stand there, on CPUs, with two processes instead of eight.

Slurm's own commands are replaced by ones that start the tasks on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from ranks import RUN, logged
from reference import Table

import unmask

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "processes.md"
SLURM = {
    "sbatch": 'export SLURM_NNODES=${1#--nodes=} SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=here SLURM_GPUS_ON_NODE=1\n'
              'exec bash "${@:2}"',
    "srun": 'shift\n'  # --kill-on-bad-exit=1
            'for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & tasks+=($!); done\n'
            'for task in ${tasks[@]}; do wait $task || exit; done',
    "scontrol": 'echo 127.0.0.1',
}  # fmt: skip
"""Slurm's commands, as far as configs/slurm.sh calls them."""


def launchers(table: Table, _asked: argparse.Namespace) -> None:
    bin_folder = table.folder / "bin"
    bin_folder.mkdir()
    for name, script in SLURM.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (bin_folder / name).chmod(0o755)
    path = os.pathsep.join((str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]))
    run = RUN | {"max_tokens": 500, "batch_size": 8, "mixed_precision": "no"}
    parent, data = table.folder / "parent", table.folder / "stories.txt"
    reference = table.folder / "adapted"
    unmask.adapt(parent, data, None, reference, show_progress=False, **run)
    settings = _words(run)
    for number, line in enumerate(commands()):
        folder = table.folder / f"command {number}"
        command = [{"MODEL": parent, "DATA": data, "runs/a": folder}.get(word, word) for word in shlex.split(line)]
        began = time.perf_counter()
        done = subprocess.run([*map(str, command), *settings], cwd=ROOT, capture_output=True, text=True, check=False,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path})  # fmt: skip
        row = {"what": "commands", "case": line, "ranks": 2, "tolerance": 1e-4,
               "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
        if done.returncode != 0:
            row["fault"] = f"exit code {done.returncode}: {done.stderr[-1000:]}"
        elif any(folder.glob("checkpoint-*/pytorch_model_fsdp_0")) == any(word in line for word in ("ddp", "torchrun")):
            row["fault"] = f"checkpoints of another kind: {[path.name for path in folder.glob('checkpoint-*/*')]}"
        table.add(row, *(() if "fault" in row else (folder, reference)))
    longer = _words(run | {"max_tokens": 2500, "save_every": 100})
    _preempted(table, [str(parent), "--data", str(data), *longer], path)


def _preempted(table: Table, given: list[str], path: str) -> None:
    """A job of Slurm whose tasks get SIGTERM, and the same job when it is started again."""
    folder, began = table.folder / "preempted", time.perf_counter()
    command = ["sbatch", "--nodes=2", "configs/slurm.sh", *given, "--output", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    job = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    while job.poll() is None and not (folder / "metrics.jsonl").is_file():
        time.sleep(0.01)
    tasks = [task for srun in psutil.Process(job.pid).children() for task in srun.children()]
    for task in tasks:
        task.send_signal(signal.SIGTERM)
    said = job.communicate()[1]
    stopped = [path.name for path in folder.glob("checkpoint-*")]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    steps = [row["step"] for row in logged(folder)]
    row = {"what": "commands", "case": "SIGTERM to the tasks of configs/slurm.sh", "ranks": 2, "stopped at": stopped,
           "of steps": steps[-1], "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
    finished = json.loads((folder / "run.json").read_text())["finished"]
    if len(stopped) != 1 or job.returncode == 0 or again.returncode != 0 or not finished:
        row["fault"] = f"{job.returncode}, {again.returncode}: {said[-500:]} {again.stderr[-500:]}"
    elif steps != [*range(1, steps[-1] + 1)]:
        row["fault"] = f"rows of the steps {steps}"
    table.add(row)


def _words(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def commands() -> list[str]:
    """The commands of the page, for two processes."""
    lines = re.findall(r"^((?:accelerate launch|torchrun|sbatch) .*?)(?: +#.*)?$", PAGE.read_text(), re.MULTILINE)
    lines = [re.sub(r"(--config_file \S+)", r"\1 --num_processes 2", line) for line in lines]
    return [re.sub(r"--nodes=\d+", "--nodes=2", line) for line in lines]
