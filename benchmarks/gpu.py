"""What `adapt` and `generate` do on one GPU: training steps, decoding, embeddings, in rows and a report.

    PYTHONPATH=src python benchmarks/gpu.py RESULTS                    (needs torch and transformers, nothing else)
    PYTHONPATH=src python benchmarks/gpu.py RESULTS --device cpu       (a rehearsal on a tiny model)

Each row goes to RESULTS/rows.jsonl as it is done, and RESULTS/report.md is written anew. After --seconds the run ends
in the middle of a case; the same command again goes on with the cases that have no row, then with those that failed.
Cases run in a process of their own: one that fails, crashes or hangs costs its row alone, which then has the error.
All weights are random, and so is the text: docs/performance.md says what the rows mean.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gpu_cases import CASES, Case, listed
from gpu_report import report

Row = dict[str, Any]


def main() -> None:
    options = _options()
    if options.worker:
        from gpu_worker import work

        work(options)
        return
    found = [case for case in listed(options.device) if options.only in case.name]
    if options.list:
        print("\n".join(case.name for case in found))
        return
    if not found:
        raise SystemExit(f"--only {options.only!r} is in no case's name: --list prints the names")
    rows = Rows(options.folder)
    until = time.monotonic() + options.seconds
    while (waiting := rows.waiting(found)) and time.monotonic() < until:
        if not run(waiting, rows, until, options):
            break
    failed = sum("error" in row for row in rows.by_name.values())
    left = [case.name for case in found if case.name not in rows.by_name]
    then = f"; the same command again goes on with the {len(left)} that are left" if left else ""
    print(f"{len(rows.by_name)} rows, {failed} of them failed: {options.folder / 'report.md'}{then}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "folder", type=Path, metavar="RESULTS", help="of rows.jsonl and report.md; goes on where it was"
    )
    parser.add_argument("--seconds", type=float, default=500, help="after which the run ends")
    parser.add_argument("--case-seconds", type=float, default=6, help="of a case, after which no round begins")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", default="", help="run the cases whose name holds this, such as train/1b")
    parser.add_argument("--new", type=int, help="new tokens of a text; 128, 12 on a CPU")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.new = options.new or (128 if options.device == "cuda" else 12)
    if options.new < 1 or options.seconds <= 0 or options.case_seconds <= 0:
        raise SystemExit(f"--new {options.new}, --seconds {options.seconds:g} and --case-seconds "
                         f"{options.case_seconds:g} must be above 0")  # fmt: skip
    return options


class Rows:
    """The rows of a folder, the newest of each case; those of another machine or version are refused."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "rows.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.by_name: dict[str, Row] = {}
        for row in filter(None, map(_read, lines)):
            if "made" not in row:
                raise SystemExit(f"{self.path} holds rows of another kind ({row}): give another folder")
            self.by_name[row["case"]] = row
        self.tried: set[str] = set()
        self._write()

    def begin(self, made: Row) -> None:
        """Raise SystemExit if a row was made otherwise."""
        for row in self.by_name.values():
            for what, value in made.items():
                if row["made"].get(what) != value:
                    raise SystemExit(
                        f"{self.path} holds rows with {what} {row['made'].get(what)!r}, and here it is {value!r}: give "
                        "another folder"
                    )

    def waiting(self, cases: list[Case]) -> list[Case]:
        """Cases without a row, then those that failed in an earlier run."""
        again = [case for case in cases if "error" in self.by_name.get(case.name, {}) and case.name not in self.tried]
        return [case for case in cases if case.name not in self.by_name] + again

    def add(self, row: Row) -> None:
        self.by_name[row["case"]] = row
        self.tried.add(row["case"])
        self._write()

    def _write(self) -> None:
        order = {case.name: place for place, case in enumerate(CASES)}
        rows = sorted(self.by_name.values(), key=lambda row: order.get(row["case"], len(order)))
        for path, text in (
            (self.path, "".join(json.dumps(row) + "\n" for row in rows)),
            (self.folder / "report.md", report(rows)),
        ):
            partial = path.with_suffix(".partial")
            partial.write_text(text)
            partial.replace(path)


def _read(line: str) -> Row | None:
    """A row; None for a line that was cut."""
    try:
        row: Row = json.loads(line)
        return row
    except ValueError:
        return None


def run(cases: list[Case], rows: Rows, until: float, options: argparse.Namespace) -> bool:
    """Run cases in one process until it ends; whether another one may go on.

    The process says which case it begins and how long that may take. One that takes longer is killed.
    """
    process = subprocess.Popen(
        [sys.executable, __file__, *sys.argv[1:], "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    said = _lines(process)
    made: Row = {}
    before = len(rows.tried)
    inside, deadline, began = "", until, time.monotonic()
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps({"until": until, "cases": [case.name for case in cases]}))
        process.stdin.close()
        while True:
            try:
                line = said.get(timeout=max(0.0, min(deadline, until) - time.monotonic()))
            except queue.Empty:
                if deadline >= until:  # the whole run's: the case goes again next time
                    return False
                error = f"took longer than {deadline - began:.0f} s and was stopped"
                rows.add({"case": inside, "error": error, "made": made})
                return True
            if line is None:
                break
            if "made" in line:
                made = line["made"]
                rows.begin(made)
            elif "begin" in line:
                inside, began = line["begin"], time.monotonic()
                deadline = began + line["seconds"]
            else:
                rows.add(line["row"] | {"made": made})
                inside, deadline = "", until
                print(f"{time.monotonic() - until + options.seconds:6.0f} s  {_short(line['row'])}", flush=True)
    finally:
        process.kill()
        process.wait()
    if inside:
        rows.add({"case": inside, "error": f"its process ended with status {process.returncode}", "made": made})
    elif len(rows.tried) == before:
        raise SystemExit(process.returncode or 1)  # it has said why
    return True


def _lines(process: subprocess.Popen[str]) -> queue.Queue[Row | None]:
    """What a process says, line by line, None at its end; a thread reads it, so that one may wait for a while."""
    said: queue.Queue[Row | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            row = _read(line)
            if row is not None:
                said.put(row)
        process.wait()
        said.put(None)

    threading.Thread(target=read, daemon=True).start()
    return said


def _short(row: Row) -> str:
    kept = {name: value for name, value in row.items() if name not in ("case", "made") and value is not None}
    return row["case"] + "  " + ", ".join(f"{name} {_figure(value)}" for name, value in kept.items())


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
