"""The curve of a training run, with the parent's figure across."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.plots.charts import Row, check_rows
from unmask.plots.labels import Label, Points, place_labels
from unmask.plots.style import COLOURS, GREY, INK, name_axes, new_figure, short_count

_HELD_OUT = {"nll": ("held-out text, AR mode", COLOURS[0], "o"), "nelbo": ("held-out text, bound", COLOURS[1], "s")}
"""Column of metrics.jsonl -> its words, colour and marker."""


def training_curve(
    rows: Sequence[Row], path: str | Path, *, parent_nll: float | None = None, in_nats: bool = True, title: str = ""
) -> tuple[Path, Path]:
    """Loss and held-out figures over training tokens.

    rows: those of metrics.jsonl. parent_nll: nats per token of the parent on the held-out text, a dashed line. in_nats:
    the loss is in nats per token too; one that is not, such as the distance of a drafter, has a panel of its own.
    """
    check_rows(rows, ("tokens", "loss"))
    loss = [(row["tokens"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = {
        column: [(row["tokens"], row[column]) for row in rows if row.get(column) is not None] for column in _HELD_OUT
    }
    apart = not in_nats and any(held_out.values())
    with new_figure(path, 6.4, 5.6 if apart else 3.8) as (figure, paths):
        panels = figure.subplots(2 if apart else 1, sharex=True, squeeze=False)[:, 0]
        labels: list[Label] = []
        panels[-1].plot(*zip(*loss, strict=True), color=GREY, linewidth=0.8)
        of_loss = Label(*loss[2 * len(loss) // 3], "training loss", GREY)
        for column, points in held_out.items():
            if points:
                words, colour, marker = _HELD_OUT[column]
                panels[0].plot(*zip(*points, strict=True), color=colour, marker=marker, label=words)
                labels.append(Label(*points[len(points) // 2], f"{words}: {points[-1][1]:.3f}", colour))
        if parent_nll is not None and (in_nats or apart):
            panels[0].axhline(parent_nll, color=INK, linestyle=(0, (4, 3)), linewidth=1.0)
            labels.append(Label(loss[len(loss) // 2][0], parent_nll, f"AR parent: {parent_nll:.3f}", INK))
        unit = "nats per token" if in_nats else "distance to the teacher"
        name_axes(panels[-1], "training tokens", f"loss, {unit}" if apart or not any(held_out.values()) else unit)
        if apart:
            name_axes(panels[0], "", "nats per token")
        panels[0].set_title(title, loc="left")
        panels[-1].xaxis.set_major_formatter(lambda value, _: short_count(value))
        panels[0].margins(y=0.08)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        plain: list[Points] = [] if parent_nll is None else [[(x, parent_nll) for x in panels[0].get_xlim()]]
        _write(panels, labels, of_loss, list(held_out.values()), loss, plain)
    return paths


def _write(
    panels: Any, labels: list[Label], of_loss: Label, held_out: Sequence[Points], loss: Points, plain: Sequence[Points]
) -> None:
    """The names of the lines, each in its panel."""
    if len(panels) > 1:
        place_labels(panels[1], [of_loss], [], 8, plain=[loss])
        place_labels(panels[0], labels, held_out, 8, plain=plain)
    else:
        place_labels(panels[0], [*labels, of_loss], held_out, 8, plain=[loss, *plain])
