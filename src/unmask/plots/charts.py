"""Lines with bands of seeds, bars with error bars, heat maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from unmask.plots.labels import Label, Points, loneliest, place_labels
from unmask.plots.style import COLOURS, INK, look, name_axes, new_figure, short_count

Row = Mapping[str, Any]


def curves(
    rows: Sequence[Row],
    path: str | Path,
    *,
    x: str,
    y: str,
    by: str | None = None,
    x_label: str | None = None,
    y_label: str | None = None,
    title: str = "",
    log_x: bool = False,
) -> tuple[Path, Path]:
    """y against x, a line for each value of column `by`; rows at the same x (seeds) give mean and standard error.

    Each line has its name beside it, where it covers nothing.
    """
    check_rows(rows, (x, y, *([by] if by else [])))
    named = groups(rows, by)
    lines: list[Points] = []
    with new_figure(path, 6.4, 3.8) as (figure, paths):
        axes = figure.subplots()
        for i, line in enumerate(named.values()):
            values = {place: [row[y] for row in seeds] for place, seeds in groups(line, x).items()}
            places = sorted(values)
            middle = [mean(values[place]) for place in places]
            error = [_standard_error(values[place]) for place in places]
            axes.plot(places, middle, **look(i))
            lines.append(list(zip(places, middle, strict=True)))
            if any(error):
                low, high = ([m + sign * e for m, e in zip(middle, error, strict=True)] for sign in (-1, 1))
                axes.fill_between(places, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.18, linewidth=0)
        name_axes(axes, x_label or x, y_label or y, title)
        if log_x:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        axes.margins(0.06)
        figure.draw_without_rendering()  # now the axes have their place
        figure.set_layout_engine("none")
        axes.autoscale(False)
        if by is not None:
            names = [Label(*lines[i][loneliest(i, lines)], str(name), look(i)["color"]) for i, name in enumerate(named)]
            place_labels(axes, names, lines, 8)
    return paths


def bars(
    rows: Sequence[Row], path: str | Path, *, by: str, y: str, y_label: str | None = None, title: str = ""
) -> tuple[Path, Path]:
    """Mean of y for each value of column `by`, in order of appearance, with the standard error over its rows."""
    check_rows(rows, (by, y))
    named = groups(rows, by)
    with new_figure(path, width=1.2 + 0.8 * len(named)) as (figure, paths):
        axes = figure.subplots()
        values = [[row[y] for row in group] for group in named.values()]
        errors = [_standard_error(group) for group in values]
        axes.bar(range(len(named)), [mean(group) for group in values], width=0.65, color=COLOURS[0], alpha=0.85,
                 yerr=errors if any(errors) else None, capsize=3, ecolor=INK)  # fmt: skip
        for i, group in enumerate(values):
            axes.annotate(f"{mean(group):.3g}", (i, mean(group) + errors[i]), xytext=(0, 3), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
        axes.set_xticks(range(len(named)), [_short(name) for name in named],
                        rotation=30 if len(named) > 4 else 0, ha="right" if len(named) > 4 else "center")  # fmt: skip
        axes.grid(axis="x", visible=False)
        name_axes(axes, "", y_label or y, title)
    return paths


def heat_map(
    rows: Sequence[Row],
    path: str | Path,
    *,
    x: str,
    y: str,
    value: str,
    x_label: str | None = None,
    y_label: str | None = None,
    value_label: str | None = None,
    title: str = "",
    digits: int = 3,
) -> tuple[Path, Path]:
    """Column `value` over columns x and y, means over rows at the same place, each written into its cell."""
    check_rows(rows, (x, y, value))
    across, down = (ordered(row[name] for row in rows) for name in (x, y))
    cells = {place: mean(row[value] for row in cell) for place, cell in _cells(rows, x, y).items()}
    grid = [[cells.get((a, b), math.nan) for a in across] for b in down]
    low, high = min(cells.values()), max(cells.values())
    with new_figure(path, width=2.2 + 0.62 * len(across), height=1.4 + 0.4 * len(down)) as (figure, paths):
        axes = figure.subplots()
        image = axes.imshow(grid, cmap="cividis", aspect="auto", vmin=low, vmax=high)
        for j, line in enumerate(grid):
            for i, cell in enumerate(line):
                if not math.isnan(cell):
                    dark = high > low and (cell - low) / (high - low) < 0.55
                    axes.text(i, j, f"{cell:.{digits}g}", ha="center", va="center", fontsize=8,
                              color="white" if dark else "black")  # fmt: skip
        words = [_short(a) for a in across]
        long = max(map(len, words)) > 7
        axes.set_xticks(range(len(across)), words, rotation=40 if long else 0, ha="right" if long else "center",
                        rotation_mode="anchor" if long else "default")  # fmt: skip
        axes.set_yticks(range(len(down)), [_short(b) for b in down])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        name_axes(axes, x if x_label is None else x_label, y if y_label is None else y_label, title)
        bar = figure.colorbar(image, ax=axes, label=value_label or value)
        bar.outline.set_visible(False)
    return paths


# --- the parts


def check_rows(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Raise ValueError for no rows, and for a column that none has."""
    if not rows:
        raise ValueError("rows is empty: there is nothing to draw")
    for column in columns:
        if not any(column in row for row in rows):
            raise ValueError(f"column {column!r} is in no row: use one of {', '.join(map(str, rows[0]))}")


def groups(rows: Sequence[Row], by: str | None) -> dict[Any, list[Row]]:
    """The rows of each value of a column, all together without one."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(None if by is None else row[by], []).append(row)
    return found


def _cells(rows: Sequence[Row], x: str, y: str) -> dict[tuple[Any, Any], list[Row]]:
    cells: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        cells.setdefault((row[x], row[y]), []).append(row)
    return cells


def ordered(values: Any) -> list[Any]:
    """Different values: numbers sorted, anything else in order of appearance."""
    different = list(dict.fromkeys(values))
    return sorted(different) if all(isinstance(value, int | float) for value in different) else different


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
