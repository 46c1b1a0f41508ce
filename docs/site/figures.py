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


def draw_tasks(path: Path) -> tuple[Path, Path]:
    """Accuracy over tokens per forward on tasks with one right answer: the parent, and each conversion a line."""
    what = {"measure": "answers", "split": "test", "family": "short"}
    rows = [row for row in rows_of("tasks/rows.jsonl") if what.items() <= row.items()]
    (parent,) = (row for row in rows if row["arm"] == "base")
    arms = {
        ("one-block", 500_000, "threshold "): "after 0.5M tokens, threshold",
        ("one-block", 1_000_000, "threshold "): "1M, threshold",
        ("one-block", 2_000_000, "threshold "): "2M, threshold",
        ("one-block", 5_000_000, "threshold "): "5M, threshold",
        ("tri-mode", 3_000_000, "drafts of "): "speculation, drafts of",
    }
    lines = []
    for (arm, tokens, decoder), name in arms.items():
        line = [row for row in rows if (row["arm"], row["tokens"], row["seed"]) == (arm, tokens, 0)
                and row["decoder"].startswith(decoder) and "one forward a cycle" not in row["decoder"]
                and row["tokens_per_forward"] >= 1]  # fmt: skip
        points = [(row["tokens_per_forward"], row["accuracy"]) for row in line]
        lines.append(plots.Line(name, points, [f"{float(row['decoder'].removeprefix(decoder)):g}" for row in line]))
    return plots.trade_off(
        lines, path, parent=(parent["tokens_per_forward"], parent["accuracy"]), percent=True,
        x_label="tokens per forward", y_label="right answers (mean of four tasks)",
        title="A model of 0.9M parameters on tasks with one right answer",
    )  # fmt: skip


def draw(folder: Path) -> None:
    """Draw all figures, each as an SVG of the folder."""
    rows, title = rows_of("frontier-stories260k/rows.jsonl"), "stories260k, converted with efficient-dlm, blocks of 8"
    figures = [
        plots.frontier(rows, folder / "measured_frontier", title=title),
        plots.frontier_details(rows, folder / "measured_frontier_details", title=title),
    ]
    run = "efficient-dlm-stories260k"
    parent_nll = json.loads((ROOT / "results" / run / "parent-test.json").read_text(encoding="utf-8"))["nll"]
    figures += [
        plots.training_curve(rows_of(f"{run}/metrics.jsonl"), folder / "measured_training", parent_nll=parent_nll,
                             title="stories260k, recipe efficient-dlm"),
        draw_tasks(folder / "measured_tasks"),
    ]  # fmt: skip
    for png, _svg in figures:
        png.unlink()


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images")
