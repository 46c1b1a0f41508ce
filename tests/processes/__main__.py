"""Runs on several processes beside the run of one, for the night: `python tests/processes [WHAT ...]`.

    matrix   every case with DDP and FSDP2 on 2 and 4 processes
    resume   runs that begin on some processes and go on with others, of any kind
    kills    runs whose processes are killed at random moments and resumed, --kills of them in all
    nodes    two launchers, as of two machines, with one folder, one of which is killed while it saves
    commands those of docs/processes.md

All of them by default. Prints a line for each run, with the largest difference to the run of one process, relative of
a logged figure and absolute of a weight, then a table, and exits 1 if one is not that run. --output FOLDER: rows go to
its rows.jsonl. Everything takes some ten minutes on two free cores; at most four processes run at once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from ranks import CASES  # noqa: E402


def main() -> int:
    from kills import kills
    from launchers import launchers
    from matrix import matrix, resume
    from nodes import nodes
    from reference import Table, summary

    work = {"matrix": matrix, "resume": resume, "kills": kills, "nodes": nodes, "commands": launchers}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="all by default")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="of the matrix")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    unknown = sorted(set(asked.what) - set(work))
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(work)}")
    folder = Path(tempfile.mkdtemp())
    table = Table(folder, asked.output)
    for name in asked.what or work:
        work[name](table, asked)
    print(summary(table.rows))
    shutil.rmtree(folder)
    return int(table.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
