"""Every case of tests/test_ranks.py with DDP and FSDP2 on 2 and 4 processes, and runs that are killed at random.

    python tests/processes [matrix | kills] [--cases NAME ...] [--kills N] [--seed S]

Prints a line for each case and exits 1 if one is not the run of one process. The matrix takes minutes, 50 kills an hour
on two cores; for the night.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent
sys.path.insert(0, str(TESTS))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from conftest import STORIES, write_parent  # noqa: E402
from ranks import run_case  # noqa: E402
from test_ranks import CASES, CUT, assert_same_run, command_of, full, on_ranks  # noqa: E402


def matrix(work: Path, names: list[str]) -> int:
    """The cases on 2 and 4 processes of each kind; how many differ from one process."""
    wrong = 0
    cases = {name: CASES[name] | {"batch_size": 8} for name in names}
    for name, case in cases.items():
        run_case(full(case, work / "parent", work / "stories.txt", work / "1" / name))
    for kind in ("ddp", "fsdp2"):
        for ranks in (2, 4):
            folder = work / f"{kind} {ranks}"
            folder.mkdir()
            told = on_ranks(ranks, {name: full(case, work / "parent", work / "stories.txt", folder / name)
                                    for name, case in cases.items()}, folder / "told", kind)  # fmt: skip
            for name in cases:
                fault = told[name] if ": " in told[name] else difference(folder / name, work / "1" / name)
                wrong += fault is not None
                print(f"{kind} x{ranks}  {name:16} {fault or 'as one process'}", flush=True)
    return wrong


def difference(folder: Path, reference: Path) -> str | None:
    """In what a run is not its reference."""
    try:
        assert_same_run(folder, reference, rel=1e-6)
    except (AssertionError, OSError) as error:
        return f"differs: {' '.join(str(error).split())[:200]}"
    return None


def kills(work: Path, number: int, seed: int) -> int:
    """A run on two processes that is killed `number` times and resumed, of either kind; 0 if it is that of one."""
    chance = random.Random(seed)
    case = full(CASES["efficient-dlm"] | CUT | {"save_every": 1, "max_tokens": 200 * max(40, number)},
                work / "parent", work / "stories.txt", work / "killed")  # fmt: skip
    run_case(case | {"output_dir": str(work / "whole")})
    done = 0
    while done < number:
        kind = chance.choice(("ddp", "fsdp2"))
        process = start(work, case, kind)
        before = newest(work / "killed")
        while process.poll() is None and newest(work / "killed") <= before:
            time.sleep(0.05)
        time.sleep(chance.random())
        if process.poll() is not None:
            break
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(chance.choice(workers)), signal.SIGKILL)  # then the launcher ends the other one
        process.wait()
        done += 1
        print(f"kill {done} ({kind}) after checkpoint {newest(work / 'killed')}", flush=True)
    if start(work, case, "ddp").wait() != 0:
        print("the last launch failed")
        return 1
    fault = difference(work / "killed", work / "whole")
    print(f"after {done} kills: {fault or 'as one process that was never interrupted'}")
    return fault is not None


def start(work: Path, case: dict[str, Any], kind: str) -> subprocess.Popen[bytes]:
    """Two processes that go on with the run."""
    (work / "cases.json").write_text(json.dumps({"run": case | {"resume": True}}))
    command = command_of(2, [str(TESTS / "ranks.py"), str(work / "cases.json"), str(work / "told"), kind])
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("matrix", "kills"), help="both by default")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    work, wrong = Path(tempfile.mkdtemp()), 0
    write_parent(work / "parent")
    (work / "stories.txt").write_text("<|endoftext|>".join(STORIES))
    if asked.what != "kills":
        wrong += matrix(work, asked.cases)
    if asked.what != "matrix":
        wrong += kills(work, asked.kills, asked.seed)
    shutil.rmtree(work)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
