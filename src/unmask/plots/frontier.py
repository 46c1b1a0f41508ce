"""The figures of `unmask frontier`: one panel to read at a glance, and all that was measured as small multiples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unmask.plots.charts import Row, check_rows, ordered
from unmask.plots.labels import Label, place_labels
from unmask.plots.style import GREY, INK, look, name_axes, new_figure, of_powers
from unmask.plots.trade_off import Line, trade_off

_COLUMNS = ("mode", "tokens_per_forward", "parent_nll", "unigram_entropy", "distinct_2")
_NLL, _ACCURACY = ("parent_nll", "parent's NLL (nats per token)"), ("accuracy", "accuracy")


def frontier(rows: Sequence[Row], path: str | Path, *, title: str = "") -> tuple[Path, Path]:
    """Quality against speed, both beside the AR parent's: at the smallest batch that was timed.

    rows: those of `unmask frontier`. Speed is tokens per second over the parent's, or tokens per forward where nothing
    was timed. Quality is the accuracy where rows have one, else the parent's NLL of the text.
    """
    check_rows(rows, _COLUMNS)
    timed = [row for row in rows if row.get("speed_over_ar") is not None]
    batch = min((row["batch_size"] for row in timed), default=None)
    shown = [row for row in timed if row["batch_size"] == batch] if timed else _untimed(rows)
    speed = "speed_over_ar" if timed else "tokens_per_forward"
    column, label = _quality(rows)
    several = _several_block_sizes(rows)
    points = [line for name, line in _lines(shown, speed, column, several).items() if name != _PARENT]
    parents = [(row[speed], row[column]) for row in shown if row["mode"] == "ar" and row.get(column) is not None]
    real = [row[column] for row in rows if row["mode"] == "data" and row.get(column) is not None]
    return trade_off(
        [Line(_kind(line[0]), [(row[speed], row[column]) for row in line], [_word(row) for row in line],
              _blocks(line[0], several)) for line in points],
        path,
        parent=parents[0] if parents else None,
        x_label=f"tokens per second / those of the AR parent, batch {batch}" if timed else "tokens per forward",
        y_label=label, title=title, less_is_better=column == "parent_nll",
        levels={"real text": real[0]} if real else None, percent=column == "accuracy",
    )  # fmt: skip


def frontier_details(rows: Sequence[Row], path: str | Path, *, title: str = "") -> tuple[Path, Path]:
    """Small multiples: quality, entropy and bigrams against tokens per forward; quality against speed, by batch size.

    rows: those of `unmask frontier`. One line a rule and block size, its points labelled with the rule's value.
    """
    check_rows(rows, _COLUMNS)
    quality = _quality(rows)
    beside = _NLL if quality == _ACCURACY else ("distinct_2", "distinct bigrams (share)")
    timed = [row for row in rows if row.get("speed_over_ar") is not None]
    batches = ordered(row["batch_size"] for row in timed)
    columns = max(3, len(batches))
    with new_figure(path, width=3.1 * columns, height=5.8 if batches else 3.1) as (figure, paths):
        grid = figure.subplots(2 if batches else 1, columns, squeeze=False)
        looks, drawn, several = _looks(rows), [], _several_block_sizes(rows)
        for axes, (column, label) in zip(
            grid[0], (quality, ("unigram_entropy", "entropy of a text's tokens (nats)"), beside), strict=False
        ):
            for row in rows:
                if row["mode"] == "data" and row.get(column) is not None:
                    axes.axhline(row[column], color=GREY, linestyle=":", linewidth=1.2, label="real text")
            # distinct-n falls with the number of texts, so a row of fewer of them has no place beside the others
            texts = max(row.get("num_texts") or 0 for row in rows)
            shown = [row for row in _untimed(rows) if column != "distinct_2" or (row.get("num_texts") or 0) == texts]
            drawn.append((axes, _panel(axes, looks, shown, "tokens_per_forward", column, several)))
            name_axes(axes, "tokens per forward", label)
        for axes, batch in zip(grid[-1], batches, strict=False):
            of_batch = [row for row in timed if row["batch_size"] == batch]
            drawn.append((axes, _panel(axes, looks, of_batch, "speed_over_ar", quality[0], several)))
            name_axes(axes, "tokens per second / those of the AR parent", quality[1], f"batch {batch}")
        for axes in figure.axes:
            axes.set_visible(bool(axes.get_xlabel()))
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.suptitle(title, fontsize=10)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, labels in drawn:
            axes.autoscale(False)
            place_labels(
                axes, labels, [line.get_xydata().tolist() for line in axes.lines if line.get_label() in looks], 6.5
            )
    return paths


# --- the parts

_PARENT = "AR parent"


def _quality(rows: Sequence[Row]) -> tuple[str, str]:
    """Column and name of what a text is judged by."""
    return _ACCURACY if any(row.get("accuracy") is not None for row in rows) else _NLL


def _lines(rows: Sequence[Row], x: str, y: str, several: bool) -> dict[str, list[Row]]:
    """System -> its rows that have both figures, in the order of the rule's value. several: as in `_system`."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["mode"] != "data" and row.get(x) is not None and row.get(y) is not None:
            lines.setdefault(_system(row, several), []).append(row)
    return {
        name: sorted(line, key=lambda row: (row.get("value") is None, row.get("value") or 0))
        for name, line in lines.items()
    }


def _looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """System -> how its line looks: a colour and marker for each mode or rule, a line style for each block size."""
    made = [row for row in rows if row["mode"] != "data"]
    kinds = [kind for kind in dict.fromkeys(_kind(row) for row in made) if kind != _PARENT]
    blocks = ordered(row["block_size"] for row in made if row.get("block_size") is not None)
    looks: dict[str, dict[str, Any]] = {}
    for row in made:
        if _kind(row) == _PARENT:
            looks[_PARENT] = {"color": INK, "marker": "*", "markersize": 9}
            continue
        block = blocks.index(row["block_size"]) if row.get("block_size") in blocks else 0
        style = look(kinds.index(_kind(row))) | {"linestyle": ("-", "--", ":", "-.")[block % 4]}
        looks[_system(row, len(blocks) > 1)] = style | ({"markerfacecolor": "none"} if block else {})
    return looks


def _panel(
    axes: Any, looks: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], x: str, y: str, several: bool
) -> list[Label]:
    """Draw the systems, and return the labels of their points."""
    lines = _lines(rows, x, y, several)
    labels = []
    for name in sorted(lines, key=list(looks).index):
        axes.plot([row[x] for row in lines[name]], [row[y] for row in lines[name]], label=name, **looks[name])
        labels += [
            Label(row[x], row[y], word, looks[name]["color"], needed=False)
            for row in lines[name]
            if (word := _word(row))
        ]
    values = [row[x] for line in lines.values() for row in line]
    of_powers(axes.xaxis, values)
    axes.axvline(1, color=GREY, linewidth=0.6)
    if y == "parent_nll":  # up is better, as for all other figures
        axes.invert_yaxis()
    return labels


def _word(row: Row) -> str:
    return "" if row.get("value") is None else f"{row['value']:g}"


def _kind(row: Row) -> str:
    """The rule of a frontier row in words, or its mode."""
    rule = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(row.get("rule"))).lower()
    names = {"ar": _PARENT, "prompt_lookup": "AR with prompt lookup", "speculative": "speculation", "diffusion": rule}
    return names.get(row["mode"], str(row["mode"]))


def _system(row: Row, several: bool) -> str:
    """Name of the line that a frontier row belongs to."""
    return ", ".join(word for word in (_kind(row), _blocks(row, several)) if word)


def _blocks(row: Row, several: bool) -> str:
    """The size of a row's blocks in words; several: rows differ in it, and only then is it said."""
    return f"blocks of {row['block_size']}" if row.get("block_size") and several else ""


def _several_block_sizes(rows: Sequence[Row]) -> bool:
    return len({row["block_size"] for row in rows if row.get("block_size")}) > 1


def _untimed(rows: Sequence[Row]) -> list[Row]:
    """One row of each text: tokens per forward and quality are the same at every batch size."""
    return list({(_kind(row), row.get("block_size"), row.get("value")): row for row in reversed(rows)}.values())[::-1]
