"""Quality against speed in one panel: each system a line with its name, the parent a marked point, "better" said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.plots.labels import Label, loneliest, place_labels
from unmask.plots.style import GREY, INK, look, name_axes, new_figure, of_powers


@dataclass(frozen=True)
class Line:
    """A system: its points (x, y) in order, and a word for each, such as its threshold.

    At one of the points "name word, note" is said, at others the word alone.
    """

    name: str
    points: Sequence[tuple[float, float]]
    words: Sequence[str]
    note: str = ""


def trade_off(
    lines: Sequence[Line],
    path: str | Path,
    *,
    parent: tuple[float, float] | None,
    x_label: str,
    y_label: str,
    title: str = "",
    less_is_better: bool = False,
    levels: Mapping[str, float] | None = None,
    percent: bool = False,
) -> tuple[Path, Path]:
    """Lines of (speed, quality); the best corner is always that on the right at the top.

    parent: the point of the AR parent. less_is_better: the quality's axis points down. levels: qualities to compare
    with, by name, drawn across. percent: the quality is a share of 1.
    """
    if not any(line.points for line in lines):
        raise ValueError("no line has a point: there is nothing to draw")
    with new_figure(path, 6.4, 4.3) as (figure, paths):
        axes = figure.subplots()
        for i, line in enumerate(lines):
            axes.plot(*zip(*line.points, strict=True), **look(i), zorder=3)
        if parent is not None:
            axes.axvline(parent[0], color=GREY, linewidth=0.7, linestyle=(0, (4, 3)))
            axes.axhline(parent[1], color=GREY, linewidth=0.7, linestyle=(0, (4, 3)))
            axes.plot(*parent, marker="*", markersize=13, color=INK, zorder=4)
        for level in (levels or {}).values():
            axes.axhline(level, color=GREY, linestyle=":", linewidth=1.2)
        speeds = [x for line in lines for x, _ in line.points] + ([parent[0]] if parent else [])
        of_powers(axes.xaxis, speeds)
        axes.margins(0.09)
        if less_is_better:
            axes.invert_yaxis()
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
        name_axes(axes, x_label, y_label, title)
        _mark_better(axes)
        figure.draw_without_rendering()  # now the axes have their place
        figure.set_layout_engine("none")
        axes.autoscale(False)
        _write_names(axes, lines, parent, levels or {})
    return paths


def _mark_better(axes: Any) -> None:
    """The word and an arrow to the best corner, above the axes."""
    axes.annotate("better", (1.0, 1.07), xytext=(0.955, 1.015), xycoords="axes fraction", textcoords="axes fraction",
                  ha="right", va="bottom", color=INK, fontweight="bold", annotation_clip=False,
                  arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 1, "shrinkB": 0})  # fmt: skip


def _write_names(
    axes: Any, lines: Sequence[Line], parent: tuple[float, float] | None, levels: Mapping[str, float]
) -> None:
    """Every name once, every other word where there is room."""
    labels, (left, right), (low, high) = [], axes.get_xlim(), axes.get_ylim()
    if parent is not None:
        labels.append(Label(*parent, "AR parent", INK, weight="bold"))
    labels += [Label(right, level, name, GREY) for name, level in levels.items()]
    for i, line in enumerate(lines):
        colour = look(i)["color"]
        named = loneliest(i, [one.points for one in lines])
        for at, ((x, y), word) in enumerate(zip(line.points, line.words, strict=True)):
            if at == named:
                full = f"{line.name} {word}".strip()
                labels.append(Label(x, y, f"{full}, {line.note}" if line.note else full, colour))
            elif word:
                labels.append(Label(x, y, word, colour, needed=False))
    across = [*levels.values(), *([] if parent is None else [parent[1]])]
    plain = [[(left, y), (right, y)] for y in across] + ([[(parent[0], low), (parent[0], high)]] if parent else [])
    place_labels(axes, labels, [line.points for line in lines], 8, plain=plain, large=[parent] if parent else [])
