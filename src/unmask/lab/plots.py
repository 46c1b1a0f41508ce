"""Figures of result rows, in one style: lines with seed bands, bars with error bars, heat maps, frontiers.

Rows are plain dicts as rows.jsonl holds them. Knows no torch and no model: a figure can be drawn again wherever the
rows are. Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers repeat the distinction.
Each function writes PATH.png and PATH.svg, the same bytes for the same rows, and returns both paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = Mapping[str, Any]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C3E")
MARKERS = "osD^vPX*"
_GREY = "#666666"
_STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "lines.linewidth": 1.4, "lines.markersize": 4.5,
    "legend.frameon": False, "svg.hashsalt": "unmask", "svg.fonttype": "none", "axes.edgecolor": _GREY,
    "xtick.color": _GREY, "ytick.color": _GREY, "xtick.labelcolor": "black", "ytick.labelcolor": "black",
}  # fmt: skip


def require_matplotlib() -> None:
    """Raise ValueError with the command that installs it, before anything slow."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("figures need matplotlib, which is not installed: pip install 'unmask[plots]'") from None


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
    """y against x, a line for each value of column `by`; rows at the same x (seeds) give mean and standard error."""
    _check(rows, (x, y, *([by] if by else [])))
    with _figure(path) as (figure, paths):
        axes = figure.subplots()
        for i, (name, line) in enumerate(_groups(rows, by).items()):
            values = {place: [row[y] for row in seeds] for place, seeds in _groups(line, x).items()}
            places = sorted(values)
            middle = [mean(values[place]) for place in places]
            error = [_standard_error(values[place]) for place in places]
            axes.plot(places, middle, label=str(name), **_look(i))
            if any(error):
                low, high = ([m + sign * e for m, e in zip(middle, error, strict=True)] for sign in (-1, 1))
                axes.fill_between(places, low, high, color=COLOURS[i % len(COLOURS)], alpha=0.18, linewidth=0)
        _label(axes, x_label or x, y_label or y, title)
        if log_x:
            axes.set_xscale("log")
        if by is not None:
            axes.legend()
    return paths


def bars(
    rows: Sequence[Row], path: str | Path, *, by: str, y: str, y_label: str | None = None, title: str = ""
) -> tuple[Path, Path]:
    """Mean of y for each value of column `by`, in order of appearance, with the standard error over its rows."""
    _check(rows, (by, y))
    groups = _groups(rows, by)
    with _figure(path, width=1.2 + 0.8 * len(groups)) as (figure, paths):
        axes = figure.subplots()
        values = [[row[y] for row in group] for group in groups.values()]
        errors = [_standard_error(group) for group in values]
        axes.bar(range(len(groups)), [mean(group) for group in values], width=0.65, color=COLOURS[0], alpha=0.85,
                 yerr=errors if any(errors) else None, capsize=3, ecolor="black")  # fmt: skip
        for i, group in enumerate(values):
            axes.annotate(f"{mean(group):.3g}", (i, mean(group) + errors[i]), xytext=(0, 3), textcoords="offset points",
                          ha="center", fontsize=8)  # fmt: skip
        axes.set_xticks(range(len(groups)), [_short(name) for name in groups],
                        rotation=30 if len(groups) > 4 else 0, ha="right" if len(groups) > 4 else "center")  # fmt: skip
        axes.grid(axis="x", visible=False)
        _label(axes, "", y_label or y, title)
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
    _check(rows, (x, y, value))
    across, down = (_ordered(row[name] for row in rows) for name in (x, y))
    cells = {place: mean(row[value] for row in cell) for place, cell in _cells(rows, x, y).items()}
    grid = [[cells.get((a, b), math.nan) for a in across] for b in down]
    low, high = min(cells.values()), max(cells.values())
    with _figure(path, width=2.2 + 0.62 * len(across), height=1.4 + 0.4 * len(down)) as (figure, paths):
        axes = figure.subplots()
        image = axes.imshow(grid, cmap="cividis", aspect="auto", vmin=low, vmax=high)
        for j, line in enumerate(grid):
            for i, cell in enumerate(line):
                if not math.isnan(cell):
                    dark = high > low and (cell - low) / (high - low) < 0.55
                    axes.text(i, j, f"{cell:.{digits}g}", ha="center", va="center", fontsize=8,
                              color="white" if dark else "black")  # fmt: skip
        axes.set_xticks(range(len(across)), [_short(a) for a in across])
        axes.set_yticks(range(len(down)), [_short(b) for b in down])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        _label(axes, x_label or x, y_label or y, title)
        figure.colorbar(image, ax=axes, label=value_label or value)
    return paths


def frontier(rows: Sequence[Row], path: str | Path, *, title: str = "") -> tuple[Path, Path]:
    """Quality against tokens per forward, and against speed relative to the AR parent at each batch size.

    rows: those of `unmask frontier`. One line a rule and block size, its points labelled with the rule's value.
    Quality is the accuracy where rows have one, else the parent's NLL, always beside the text's entropy and bigrams.
    """
    _check(rows, ("mode", "tokens_per_forward", "parent_nll", "unigram_entropy", "distinct_2"))
    graded = any(row.get("accuracy") is not None for row in rows)
    quality = ("accuracy", "accuracy") if graded else ("parent_nll", "parent's NLL (nats per token)")
    beside = ("parent_nll", "parent's NLL (nats per token)") if graded else ("distinct_2", "distinct bigrams (share)")
    timed = [row for row in rows if row.get("speed_over_ar") is not None]
    batches = _ordered(row["batch_size"] for row in timed)
    columns = max(3, len(batches))
    entropy = ("unigram_entropy", "entropy of a text's tokens (nats)")
    with _figure(path, width=3.1 * columns, height=5.8 if batches else 3.1) as (figure, paths):
        grid = figure.subplots(2 if batches else 1, columns, squeeze=False)
        looks = _looks(rows)
        for axes, (column, label) in zip(grid[0], (quality, entropy, beside), strict=False):
            for row in rows:
                if row["mode"] == "data" and row.get(column) is not None:
                    axes.axhline(row[column], color=_GREY, linestyle=":", linewidth=1.2, label="real text")
            # distinct-n falls with the number of texts, so a row of fewer of them has no place beside the others
            texts = max(row.get("num_texts") or 0 for row in rows)
            shown = [row for row in _untimed(rows) if column != "distinct_2" or (row.get("num_texts") or 0) == texts]
            _systems(axes, looks, shown, "tokens_per_forward", column)
            _label(axes, "tokens per forward", label, "")
        for axes, batch in zip(grid[-1], batches, strict=False):
            _systems(axes, looks, [row for row in timed if row["batch_size"] == batch], "speed_over_ar", quality[0])
            _label(axes, "tokens per second / those of the AR parent", quality[1], f"batch {batch}")
        for axes in figure.axes:
            axes.set_visible(bool(axes.get_xlabel()))
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        figure.suptitle(title, fontsize=10)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    return paths


# --- the parts


def _looks(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """System -> how its line looks: a colour and marker for each mode or rule, a line style for each block size."""
    made = [row for row in rows if row["mode"] != "data"]
    kinds = list(dict.fromkeys(_kind(row) for row in made))
    blocks = _ordered(row["block_size"] for row in made if row.get("block_size") is not None)
    looks = {}
    for row in made:
        block = blocks.index(row["block_size"]) if row.get("block_size") in blocks else 0
        look = _look(kinds.index(_kind(row))) | {"linestyle": ("-", "--", ":", "-.")[block % 4]}
        looks[_system(row)] = look | ({"markerfacecolor": "white"} if block else {})
    return looks


def _systems(axes: Any, looks: Mapping[str, Mapping[str, Any]], rows: Sequence[Row], x: str, y: str) -> None:
    groups: dict[str, list[Row]] = {name: [] for name in looks}
    for row in rows:
        if row["mode"] != "data" and row.get(x) is not None and row.get(y) is not None:
            groups[_system(row)].append(row)
    for name, line in groups.items():
        line = sorted(line, key=lambda row: (row.get("value") is None, row.get("value") or 0))
        if not line:
            continue
        axes.plot([row[x] for row in line], [row[y] for row in line], label=name, **looks[name])
        for row in _apart(line, rows, x, y):
            axes.annotate(f"{row['value']:g}", (row[x], row[y]), xytext=(3, 3), textcoords="offset points",
                          fontsize=6.5, color=_GREY)  # fmt: skip
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(2, subs=(1.0, 1.25, 1.5, 1.75) if _narrow(rows, x) else (1.0, 1.5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.axvline(1, color=_GREY, linewidth=0.6)


def _narrow(rows: Sequence[Row], x: str) -> bool:
    values = [row[x] for row in rows if row.get(x)]
    return bool(values) and max(values) < 3 * min(values)


def _apart(line: Sequence[Row], rows: Sequence[Row], x: str, y: str) -> list[Row]:
    """Those of a line's points whose labels do not fall on the one before."""
    columns = ([row[c] for row in rows if row.get(c) is not None] for c in (x, y))
    spans = [max(column) - min(column) or 1 for column in columns]
    labelled: list[Row] = []
    for row in line:
        if row.get("value") is None:
            continue
        before = labelled[-1] if labelled else None
        if before is None or any(abs(row[c] - before[c]) >= 0.08 * span for c, span in zip((x, y), spans, strict=True)):
            labelled.append(row)
    return labelled


def _kind(row: Row) -> str:
    """The rule of a frontier row, or its mode."""
    names = {"ar": "AR parent", "prompt_lookup": "AR parent, prompt lookup", "diffusion": str(row.get("rule"))}
    return names.get(row["mode"], str(row["mode"]))


def _system(row: Row) -> str:
    """Name of the line that a frontier row belongs to."""
    return _kind(row) + (f", blocks of {row['block_size']}" if row.get("block_size") else "")


def _untimed(rows: Sequence[Row]) -> list[Row]:
    """One row of each text: tokens per forward and quality are the same at every batch size."""
    return list({(_system(row), row.get("value")): row for row in reversed(rows)}.values())[::-1]


def _look(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}


def _label(axes: Any, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left")


@contextmanager
def _figure(path: str | Path, width: float = 5.0, height: float = 3.4) -> Iterator[tuple[Any, tuple[Path, Path]]]:
    """An empty figure, inches wide and high, saved as PATH.png and PATH.svg when it is drawn."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".png", ".svg") else path
    paths = stem.with_name(stem.name + ".png"), stem.with_name(stem.name + ".svg")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, paths
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(paths[0], dpi=160, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})


def _check(rows: Sequence[Row], columns: Sequence[str]) -> None:
    if not rows:
        raise ValueError("rows is empty: there is nothing to draw")
    for column in columns:
        if not any(column in row for row in rows):
            raise ValueError(f"column {column!r} is in no row: use one of {', '.join(map(str, rows[0]))}")


def _groups(rows: Sequence[Row], by: str | None) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(None if by is None else row[by], []).append(row)
    return groups


def _cells(rows: Sequence[Row], x: str, y: str) -> dict[tuple[Any, Any], list[Row]]:
    cells: dict[tuple[Any, Any], list[Row]] = {}
    for row in rows:
        cells.setdefault((row[x], row[y]), []).append(row)
    return cells


def _ordered(values: Any) -> list[Any]:
    """Different values: numbers sorted, anything else in order of appearance."""
    different = list(dict.fromkeys(values))
    return sorted(different) if all(isinstance(value, int | float) for value in different) else different


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
