"""The figures that `unmask frontier` leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from unmask import plots
from unmask.lab.frontier import FrontierRow
from unmask.model_name import locate
from unmask.progress import note
from unmask.run_folder import writing


def draw_frontier(folder: Path, model: str, parent: str, rows: Sequence[FrontierRow]) -> None:
    """Draw the rows of a model and its parent; a note says why where that is not possible."""
    title, plain = _title(model, parent), [asdict(row) for row in rows]
    try:
        with writing(folder):
            plots.frontier(plain, folder / "frontier", title=title)
            plots.frontier_details(plain, folder / "frontier-details", title=title)
    except ValueError as error:
        note(f"no figure: {error}")


def _title(model: str, parent: str) -> str:
    """What was measured, in words: the parent's name, and the recipe where the model's folder records one."""
    try:
        record = Path(locate(model)) / "run.json"
    except ValueError:  # parts may be put together where the model is not
        record = Path()
    recipe = json.loads(record.read_text()).get("settings", {}).get("recipe") if record.is_file() else None
    name = Path(parent).name
    return f"{name}, converted with {recipe}" if recipe else f"{Path(model).name}, made from {name}"
