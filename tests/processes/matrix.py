"""Every case on every kind and number of processes, and runs that go on with other processes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ranks import CASES, CUT, WHOLE, interrupted, of_kind, on_ranks
from reference import Table

Processes = tuple[str, int]
"""The kind, see `ranks.become`, and how many."""

ONE: Processes = ("ddp", 1)
FULL: list[Processes] = [("fsdp2, full", 2), ("fsdp2, full", 4)]
KINDS: list[Processes] = [("ddp", 2), ("ddp", 4), ("fsdp2", 2), ("fsdp2", 4)]
AT_STEP = 2
MORE = ("drafter", "lora")
"""Cases that are resumed on fewer kinds than "efficient-dlm" is."""


def matrix(table: Table, asked: argparse.Namespace) -> None:
    cases = {name: CASES[name] | {"batch_size": 8} for name in asked.cases}
    for name, case in cases.items():
        table.alone(name, case)
    for kind, ranks in KINDS:
        folder = table.folder / f"{kind} x{ranks}"
        takes = [name for name in cases if kind == "ddp" or name not in WHOLE]
        runs = of_kind(kind, {name: table.case(cases[name], folder / name) for name in takes})
        told = told_of(ranks, runs, folder)
        for name in takes:
            row = {"what": "matrix", "case": name, "kind": kind, "ranks": ranks}
            _add(table, row, told[name], folder / name, table.alone(name, cases[name]))


def resume(table: Table, _asked: argparse.Namespace) -> None:
    """Begin on some processes, go on from step 2 on others."""
    everywhere = [ONE, ("ddp", 2), *KINDS[2:], *FULL]
    pairs = {"efficient-dlm": [(begun, then) for begun in everywhere for then in everywhere]}
    pairs |= {name: [(begun, then) for begun in (ONE, *KINDS[2:3], *FULL[:1])
                     for then in (ONE, *KINDS[3:], *FULL[1:])] for name in MORE}  # fmt: skip
    cases = {f"{name}, saved": CASES[name] | CUT | {"batch_size": 8} for name in pairs}
    for kind, ranks in everywhere[1:]:
        folder = table.folder / f"begun on {kind} x{ranks}"
        wanted = [f"{name}, saved" for name, of in pairs.items() if any((kind, ranks) == begun for begun, _ in of)]
        runs = of_kind(kind, {name: table.case(cases[name], folder / name) for name in wanted})
        told = told_of(ranks, runs, folder)
        for name in wanted:
            row = {"what": "begun", "case": name, "kind": kind, "ranks": ranks}
            _add(table, row, told[name], folder / name, table.alone(name, cases[name]))
    for kind, ranks in everywhere:
        folder = table.folder / f"resumed on {kind} x{ranks}"
        runs, rows = {}, {}
        for name, (begun, then) in ((name, pair) for name, of in pairs.items() for pair in of):
            if then != (kind, ranks):
                continue
            case, of = cases[f"{name}, saved"], table.alone(f"{name}, saved", cases[f"{name}, saved"])
            if begun != ONE:
                of = table.folder / f"begun on {begun[0]} x{begun[1]}" / f"{name}, saved"
            key = f"{name} of {begun[0]} x{begun[1]}"
            runs[key] = table.case(case, interrupted(of, folder / key, AT_STEP)) | {"resume": True}
            rows[key] = {"what": "resume", "case": name, "begun": f"{begun[0]} x{begun[1]}", "kind": kind,
                         "ranks": ranks}  # fmt: skip
        told = told_of(ranks, of_kind(kind, runs), folder)
        for key, row in rows.items():
            reference = table.folder / "alone" / f"{row['case']}, saved"
            _add(table, row, told[key], folder / key, reference)


def told_of(ranks: int, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a case -> its seconds, and its fault if there is one; a case that ends its launch is left out of the
    next, which runs those after it."""
    found: dict[str, dict[str, Any]] = {}
    left = dict(cases)
    folder.mkdir(parents=True, exist_ok=True)
    while left:
        launch = folder / f"launch of {len(left)}"
        try:
            told, fault = on_ranks(ranks, left, launch), None
        except AssertionError as error:
            told, fault = {}, " ".join(str(error).split())[-300:]
        files = [launch / f"rank-{rank}.json" for rank in range(ranks)]
        of_ranks = [json.loads(path.read_text()) if path.is_file() else {} for path in files]
        done = [name for name in left if all(name in each for each in of_ranks)]
        for name in done:
            said = told.get(name, of_ranks[0][name])
            found[name] = {"seconds": of_ranks[0]["seconds"][name]} | ({"fault": said} if ": " in said else {})
            del left[name]
        if fault is not None and left:
            name = next(iter(left))
            found[name] = {"seconds": None, "fault": fault}
            del left[name]
        elif fault is not None:  # after the last case
            found[done[-1]]["fault"] = fault
    return found


def _add(table: Table, row: dict[str, Any], told: dict[str, Any], run: Path, reference: Path) -> None:
    table.add(row | told, *(() if "fault" in told else (run, reference)))
