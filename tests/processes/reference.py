"""What every part has: a parent, texts, the runs of one process, and the rows of results."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import STORIES, write_parent
from ranks import differences, full, run_case

TOLERANCE = 1e-6


class Table:
    """Rows of results, printed as they come. folder: where runs lie. output: a folder for rows.jsonl, or None."""

    def __init__(self, folder: Path, output: Path | None) -> None:
        torch.set_num_threads(1)
        self.folder, self.output, self.rows = folder, output, list[dict[str, Any]]()
        write_parent(folder / "parent")
        (folder / "stories.txt").write_text("<|endoftext|>".join(STORIES))

    def case(self, case: dict[str, Any], output_dir: Path) -> dict[str, Any]:
        """All arguments of a case."""
        return full(case, self.folder / "parent", self.folder / "stories.txt", output_dir)

    def alone(self, name: str, case: dict[str, Any]) -> Path:
        """The folder of a case on one process, run when it is first asked for."""
        folder = self.folder / "alone" / name
        if not folder.exists():
            began = time.perf_counter()
            run_case(self.case(case, folder))
            self.add({"what": "alone", "case": name, "ranks": 1, "seconds": round(time.perf_counter() - began, 2)})
        return folder

    def add(self, row: dict[str, Any], run: Path | None = None, reference: Path | None = None) -> None:
        """Add a row, with the differences of a run to its reference, which must be small; or a fault in the row."""
        if run is not None and reference is not None:
            try:
                figures, weights = differences(run, reference)
                row |= {"figures": float(f"{figures:.3g}"), "weights": float(f"{weights:.3g}")}
                if max(figures, weights) > row.get("tolerance", TOLERANCE):
                    row["fault"] = "another run"
            except (AssertionError, OSError, ValueError) as error:
                row["fault"] = " ".join(str(error).split())[:300]
        self.rows.append(row)
        first = ("what", "case", "kind", "ranks")
        words = [f"{row['what']:9}", f"{row['case']:18}", f"{row.get('kind', 'command')} x{row['ranks']:<10}"]
        print("  ".join([*words, *(f"{k} {v}" for k, v in row.items() if k not in first)]), flush=True)
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
            with (self.output / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

    @property
    def wrong(self) -> int:
        return sum("fault" in row for row in self.rows)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown, a line for each kind of run and processes."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["what"] != "alone":
            groups.setdefault((row["what"], f"{row.get('kind', 'as launched')} x{row['ranks']}"), []).append(row)
    lines = ["| what | processes | runs | wrong | kills | figures differ by | weights differ by | seconds |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (what, processes), of in groups.items():
        most = [max((row.get(name, 0.0) for row in of), default=0.0) for name in ("figures", "weights")]
        kills = sum(row.get("kills", 0) for row in of) or ""
        seconds = sum(row.get("seconds") or 0 for row in of)
        lines.append(f"| {what} | {processes} | {len(of)} | {sum('fault' in row for row in of)} | {kills} "
                     f"| {most[0]:.1g} | {most[1]:.1g} | {seconds:.0f} |")  # fmt: skip
    return "\n".join(lines)
