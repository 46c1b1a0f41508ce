"""The commands of docs/processes.md as they stand there, on CPUs, with two processes instead of eight.

Slurm's own commands are replaced by ones that start the tasks on this machine.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from ranks import RUN
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
    settings = [f"{name}={value}" for name, value in run.items()]
    for number, line in enumerate(commands()):
        folder = table.folder / f"command {number}"
        command = [{"MODEL": parent, "DATA": data, "runs/a": folder}.get(word, word) for word in shlex.split(line)]
        began = time.perf_counter()
        done = subprocess.run([*map(str, command), *settings], cwd=ROOT, capture_output=True, text=True, check=False,
                              env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": path})  # fmt: skip
        row = {"what": "launchers", "case": line, "ranks": 2, "tolerance": 1e-4,
               "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
        if done.returncode != 0:
            row["fault"] = f"exit code {done.returncode}: {done.stderr[-1000:]}"
        table.add(row, *(() if "fault" in row else (folder, reference)))


def commands() -> list[str]:
    """The commands of the page, for two processes."""
    lines = re.findall(r"^((?:accelerate launch|torchrun|sbatch) .*?)(?: +#.*)?$", PAGE.read_text(), re.MULTILINE)
    lines = [re.sub(r"(--config_file \S+)", r"\1 --num_processes 2", line) for line in lines]
    return [re.sub(r"--nodes=\d+", "--nodes=2", line) for line in lines]
