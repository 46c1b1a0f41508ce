"""The look of all figures, and how they are written: a PNG on white, an SVG that follows the reader's colour scheme.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, darker where words could not be read on
white; markers repeat the distinction.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK, GREY, GRID, PAPER = "#1d1d1f", "#6b6b70", "#dcdcdf", "#fefefe"
COLOURS = ("#0072b2", "#d55e00", "#00866a", "#b8578f", "#996600", "#2b9fd9", "#77772e", "#7a5195")
MARKERS = "osD^vPX*"
_IN_DARK = {
    INK: "#ececf0", GREY: "#a0a0a8", GRID: "#34343a", PAPER: "#17171a", "#0072b2": "#4c9be8", "#d55e00": "#ff8a4a",
    "#00866a": "#2fc99a", "#b8578f": "#ee9fcb", "#996600": "#ffc04d", "#2b9fd9": "#9ad4f5", "#77772e": "#bcbc62",
    "#7a5195": "#b48fd6",
}  # fmt: skip
"""Colour of a figure -> that on a dark page."""
_STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": GRID, "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.4, "lines.markersize": 4.5,
    "legend.frameon": False, "svg.hashsalt": "unmask", "svg.fonttype": "none", "axes.edgecolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "text.color": INK,
    "axes.labelcolor": INK, "axes.titlecolor": INK, "figure.facecolor": PAPER, "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER, "text.parse_math": False,
}  # fmt: skip


def require_matplotlib() -> None:
    """Raise ValueError with the command that installs it, before anything slow."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("figures need matplotlib, which is not installed: pip install 'unmask[plots]'") from None


@contextmanager
def new_figure(path: str | Path, width: float = 5.0, height: float = 3.4) -> Iterator[tuple[Any, tuple[Path, Path]]]:
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
        paths[1].write_text(in_both_schemes(paths[1].read_text(encoding="utf-8")), encoding="utf-8")


def in_both_schemes(svg: str) -> str:
    """An SVG of matplotlib that takes other colours where the reader's scheme is dark.

    The light colours stay where they are, so a program that knows no style sheets shows the light figure.
    """
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in _IN_DARK.items()
        for what in ("fill", "stroke")
        if f"{what}: {light}" in svg
    )
    head, place, tail = svg.partition("<defs>")
    return f"{head}<style>@media (prefers-color-scheme: dark){{{rules}}}</style>\n {place}{tail}"


def look(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th line."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}


def name_axes(axes: Any, x: str, y: str, title: str = "") -> None:
    """Write what the axes show."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, loc="left")


def short_count(number: float) -> str:
    """A number of tokens as people say it: 400k, 1.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def of_powers(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis for ratios, with ticks at plain numbers; a plain one for values that lie close together."""
    from matplotlib.ticker import LogLocator, NullLocator

    spread = max(values) / min(values) if values else 4.0
    if spread >= 1.5:
        axis.axes.set_xscale("log", base=2)
        axis.set_major_locator(LogLocator(2, subs=(1.0, 1.25, 1.5, 1.75) if spread < 3 else (1.0, 1.5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:.3g}")
