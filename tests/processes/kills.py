"""Runs on two processes of which one or both are killed at random moments, also while they save, and which go on.

A run that stays on one kind of processes must end bit for bit as one on that kind that was never killed; one whose kind
changes from launch to launch, as the run of one process.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from itertools import cycle
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from ranks import CASES, finish, logged, start
from reference import TOLERANCE, Table

KINDS = ("ddp", "fsdp2", "fsdp2, full")
RUNS = (
    ("efficient-dlm", "ddp"), ("efficient-dlm", "fsdp2"), ("efficient-dlm", "any"), ("drafter", "fsdp2"),
    ("efficient-dlm", "fsdp2, full"), ("adapter", "fsdp2"), ("drafter", "any"), ("teacher", "ddp"), ("lora", "any"),
    ("drafter", "ddp"),
)  # fmt: skip
"""A case, and the kind of its processes; "any": another at each launch."""

EACH = 5
"""Kills of a run at most."""


def kills(table: Table, asked: argparse.Namespace) -> None:
    chance, done = random.Random(asked.seed), 0
    for number, (name, kind) in enumerate(cycle(RUNS)):
        if done >= asked.kills:
            return
        case = CASES[name] | {
            "max_tokens": 2000,
            "save_every": 1,
            "keep_checkpoints": 2,
            "log_every": 3 if kind == "any" else 1,
        }
        reference = table.alone(f"{name}, killed", case) if kind == "any" else _never_killed(table, name, kind, case)
        folder = table.folder / f"killed {number}"
        last = logged(reference)[-1]["step"]
        row, said = _killed(table, case, kind, folder, last, chance, min(EACH, asked.kills - done))
        done += row["kills"]
        row = {"what": "kills", "case": name, "kind": kind, "ranks": 2, "tolerance": TOLERANCE * (kind == "any")} | row
        left = [path.name for path in folder.glob("*.partial")]
        if said is None and left:
            said = f"left behind: {left}"
        table.add(row | ({} if said is None else {"fault": said}), *(() if said else (folder, reference)))


def _killed(
    table: Table, case: dict[str, Any], kind: str, folder: Path, last: int, chance: random.Random, most: int
) -> tuple[dict[str, Any], str | None]:
    """A run of `last` steps with at most so many kills, which then goes on to its end: counts, and what is wrong."""
    began, counts = time.perf_counter(), dict.fromkeys(("kills", "while saving", "no checkpoint", "last step done"), 0)
    launch = folder.with_name(f"{folder.name}, launch")
    while True:
        now = chance.choice(KINDS) if kind == "any" else kind
        processes = start(2, {"run": table.case(case, folder) | {"resume": True, "kind": now}}, launch)
        if counts["kills"] < most and _wait(processes, folder, last, chance):
            saving, newest = any(folder.glob("checkpoint-*.partial")), _newest(folder)
            for process in chance.choice((processes, processes[:1], processes[1:])):
                process.kill()
            finish(processes)
            found = (True, saving, newest == 0, newest == last)
            counts = {name: number + new for (name, number), new in zip(counts.items(), found, strict=True)}
            continue
        codes = finish(processes)
        row = counts | {"seconds": round(time.perf_counter() - began, 1)}
        return row, None if codes == [0, 0] else f"{codes}: {(launch / 'said-0.txt').read_text()[-300:]}"


def _wait(processes: Sequence[BaseProcess], folder: Path, last: int, chance: random.Random) -> bool:
    """Wait for a random moment: of the start, after a checkpoint (perhaps the last, when the model is written), or of
    writing one. False if the run ended before."""
    moment = chance.choice(("start", "after", "saving"))
    checkpoint, files = min(last, _newest(folder) + chance.randrange(6)), chance.randint(1, 6)
    checkpoint = last if chance.random() < 0.4 else checkpoint
    until = time.monotonic() + (chance.uniform(0, 5) if moment == "start" else 900)
    while time.monotonic() < until and all(process.is_alive() for process in processes):
        if moment == "after" and _newest(folder) >= checkpoint:
            moment, until = "now", time.monotonic() + chance.uniform(0, 0.5)
        if moment == "saving" and _newest(folder) >= min(checkpoint, last - 1):
            partial = next(folder.glob("checkpoint-*.partial"), None)
            if partial is not None and len(list(partial.rglob("*"))) >= files:
                break
        time.sleep(0.001)
    return all(process.is_alive() for process in processes)


def _never_killed(table: Table, name: str, kind: str, case: dict[str, Any]) -> Path:
    folder = table.folder / f"never killed, {name}, {kind}"
    if not folder.exists():
        run = table.case(case, folder) | {"kind": kind}
        codes = finish(start(2, {"run": run}, folder.with_name(f"{folder.name}, launch")))
        if codes != [0, 0]:
            raise SystemExit(f"the run that is not killed failed: {codes}")
    return folder


def _newest(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)
