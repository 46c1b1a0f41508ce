"""The figures of what was measured, drawn from the rows in results/: `python docs/site/figures.py [FOLDER]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from unmask import plots

ROOT = Path(__file__).resolve().parents[2]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a file in results/."""
    return [json.loads(line) for line in (ROOT / "results" / name).read_text(encoding="utf-8").splitlines()]


def draw(folder: Path) -> None:
    """Draw all figures, each as an SVG of the folder."""
    rows, title = rows_of("frontier-stories260k/rows.jsonl"), "stories260k, converted with efficient-dlm, blocks of 8"
    figures = [
        plots.frontier(rows, folder / "measured_frontier", title=title),
        plots.frontier_details(rows, folder / "measured_frontier_details", title=title),
    ]
    for png, _svg in figures:
        png.unlink()


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
