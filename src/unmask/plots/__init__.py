"""Figures of result rows, in one style that reads in light and dark.

Rows are plain dicts as rows.jsonl holds them. Nothing here knows torch or a model: a figure can be drawn again wherever
the rows are. Each function writes PATH.png and PATH.svg, the same bytes for the same rows, and returns both paths.
"""

from unmask.plots.charts import bars, curves, heat_map
from unmask.plots.frontier import frontier, frontier_details
from unmask.plots.style import require_matplotlib
from unmask.plots.trade_off import Line, trade_off
from unmask.plots.training import training_curve

__all__ = [
    "Line",
    "bars",
    "curves",
    "frontier",
    "frontier_details",
    "heat_map",
    "require_matplotlib",
    "trade_off",
    "training_curve",
]
