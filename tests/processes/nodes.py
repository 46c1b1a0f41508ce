"""Two launchers, as of two machines, that share a folder: they agree on the newest whole checkpoint.

The second machine is killed while it writes its part of a checkpoint, and a part that it wrote before is cut off. Then
both start again: they must pass over both checkpoints, and end as the run of one process. Without a common folder the
run is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from ranks import CASES, free_port, logged
from reference import Table

SCRIPT = str(Path(__file__).parent.parent / "ranks.py")


def nodes(table: Table, _asked: argparse.Namespace) -> None:
    case = CASES["efficient-dlm"] | {"batch_size": 8, "max_tokens": 2000, "save_every": 1, "keep_checkpoints": 9}
    reference, folder = table.alone("efficient-dlm, nodes", case), table.folder / "nodes"
    row = {"what": "nodes", "case": "efficient-dlm", "kind": "fsdp2", "ranks": 4}
    run = table.case(case, folder) | {"resume": True, "kind": "fsdp2"}
    machines = [_machine(node, run, table.folder / "launch 1") for node in (0, 1)]
    last = logged(reference)[-1]["step"]
    while not any(folder.glob("checkpoint-[3-9].partial/pytorch_model_fsdp_0/__[23]_0.distcp")):
        if any(machine.poll() is not None for machine in machines):
            raise SystemExit(f"the run ended before it was killed: {_said(table.folder / 'launch 1')}")
        time.sleep(0.001)
    _kill(machines[1])
    for machine in machines:
        machine.wait(300)
    whole = max(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-[0-9]"))
    part = folder / f"checkpoint-{whole}" / "pytorch_model_fsdp_0" / "__2_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])
    machines = [_machine(node, run, table.folder / "launch 2") for node in (0, 1)]
    codes = [machine.wait(900) for machine in machines]
    said = _said(table.folder / "launch 2")
    row |= {"killed while saving": whole + 1, "cut off": whole, "of steps": last}
    if codes != [0, 0] or said.count(f"checkpoint-{whole} is damaged") != 1:
        row["fault"] = f"{codes}: {said[-500:]}"
    table.add(row, folder, reference)
    _refused(table, case)


def _refused(table: Table, case: dict[str, Any]) -> None:
    """Machines whose folders of the same name are not the same."""
    run = table.case(case, Path("run")) | {"kind": "fsdp2"}
    homes = [table.folder / f"home {node}" for node in (0, 1)]
    for home in homes:
        home.mkdir()
    machines = [_machine(node, run, table.folder / "launch 3", home) for node, home in enumerate(homes)]
    codes = [machine.wait(900) for machine in machines]
    said = [json.loads(path.read_text())["run"] for path in (table.folder / "launch 3").glob("rank-*.json")]
    row: dict[str, Any] = {"what": "nodes", "case": "no common folder", "kind": "fsdp2", "ranks": 4}
    if len(said) != 4 or not all("is not the same folder for all processes" in each for each in said):
        row["fault"] = f"{codes}: {said}"
    table.add(row)


def _machine(node: int, run: dict[str, Any], launch: Path, home: Path | None = None) -> subprocess.Popen[bytes]:
    """A launcher of two ranks, as on one of two machines."""
    launch.mkdir(exist_ok=True)
    (launch / "cases.json").write_text(json.dumps({"run": run}))
    if node == 0:
        (launch / "port").write_text(str(free_port()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
               "--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", (launch / "port").read_text(),
               SCRIPT, str(launch)]  # fmt: skip
    with (launch / f"said-{node}.txt").open("wb") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, cwd=home, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _kill(machine: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and its ranks, as a machine that loses its power."""
    for process in (*psutil.Process(machine.pid).children(recursive=True), machine):
        process.kill()


def _said(launch: Path) -> str:
    return "".join(path.read_text() for path in sorted(launch.glob("said-*.txt")))
