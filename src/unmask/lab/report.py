"""A study's report: tables and figures with standard errors over seeds, made of study.json and rows.jsonl alone.

Knows no torch; without matplotlib it is tables alone. A *figure* is a named number of a row; the standard error is that
of the mean over seeds, not that of masks or documents, which all arms share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from unmask import plots
from unmask.plain_json import to_json
from unmask.run_folder import write_text, writing

LOWER, HIGHER = "lower is better", "higher is better"
HEADLINES = {
    "nll": "NLL (AR mode, exact)",
    "nelbo": "NELBO",
    "parent_nll": "parent's NLL of greedy text",
    "unigram_entropy": "its entropy",
    "distinct_2": "its distinct-2",
    "accuracy": "accuracy",
}
"""Figures of the first table, with their titles."""

ORDERED = {"nelbo": LOWER, "parent_nll": LOWER, "accuracy": HIGHER}

SECTIONS: tuple[tuple[str, str, str], ...] = (
    ("block_sizes", "nelbo", "NELBO by evaluation block size"),
    ("frontier", "tokens_per_forward", "Tokens per forward by threshold"),
    ("frontier", "parent_nll", "Parent's NLL of the text by threshold"),
    ("frontier", "unigram_entropy", "Entropy of the text by threshold"),
    ("frontier", "accuracy", "Accuracy by threshold"),
    ("pace", "parent_nll", "Parent's NLL of the text by tokens committed per forward"),
    ("pace", "unigram_entropy", "Entropy of the text by tokens committed per forward"),
    ("pace", "accuracy", "Accuracy by tokens committed per forward"),
    ("speculation", "tokens_per_cycle", "Tokens per cycle of self-speculation by temperature"),
    ("speculation", "tokens_per_forward", "Tokens per forward of self-speculation by temperature"),
    ("speculation", "accuracy", "Accuracy of self-speculation by temperature"),
    ("votes", "majority_accuracy", "Majority of k samples"),
    ("votes", "any_accuracy", "Any of k samples right"),
    ("drift", "mean_change", "Mean absolute change of the weights by layer"),
    ("drift", "relative_change", "Relative change of the weights by layer"),
    ("order", "mean_step", "Mean forward in which a place of the block is committed"),
    ("order", "mean_confidence", "Mean confidence at commit by place of the block"),
)
"""(measure, figure, title) of the tables over a measure's own axis."""

ALONG = (("likelihood", "nelbo"), ("likelihood", "nll"), ("quality", "parent_nll"), ("quality", "accuracy"))
"""(measure, figure) shown over the tokens trained."""


class Estimate(NamedTuple):
    """Mean over seeds, its standard error (None for one seed), and how many there were."""

    mean: float
    error: float | None
    seeds: int

    def __str__(self) -> str:
        shown = f"{self.mean:.3g}" if abs(self.mean) < 0.01 else f"{self.mean:.3f}"
        return shown if self.error is None else f"{shown} ± {self.error:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error s / sqrt(n)."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(mean(values), error, len(values))


def series(
    lines: Iterable[dict[str, Any]], measure: str, figure: str, key: Callable[[dict[str, Any], dict[str, Any]], Any]
) -> dict[str, dict[Any, Estimate]]:
    """arm -> key(line, row) -> the figure over seeds, in order of appearance."""
    values: dict[str, dict[Any, list[float]]] = {}
    for line in lines:
        if line["measure"] == measure:
            for row in line["rows"]:
                if row.get(figure) is not None:
                    values.setdefault(line["arm"], {}).setdefault(key(line, row), []).append(row[figure])
    return {arm: {at: estimate(seeds) for at, seeds in points.items()} for arm, points in values.items()}


def last_lines(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of each run's last checkpoint, arms in the order of their first line."""
    last: dict[tuple[str, Any], int] = {}
    for line in lines:
        run = (line["arm"], line["seed"])
        last[run] = max(last.get(run, 0), line["tokens"])
    order = {arm: i for i, arm in enumerate(dict.fromkeys(line["arm"] for line in lines))}
    of_last = [line for line in lines if line["tokens"] == last[line["arm"], line["seed"]]]
    return sorted(of_last, key=lambda line: order[line["arm"]])


def write_report(output: Path) -> None:
    """OUT/report.md and OUT/figures from OUT/study.json and OUT/rows.jsonl."""
    study = json.loads((output / "study.json").read_text())
    lines = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    try:
        plots.require_matplotlib()
    except ValueError:  # an extra: the tables do without
        figures = {}
    else:
        with writing(output / "figures"):
            figures = {title: f"figures/{path.name}" for title, path in draw(lines, output / "figures").items()}
    write_text(output / "report.md", report(study, lines, figures))


def flat(lines: Iterable[dict[str, Any]], measure: str, figure: str) -> list[dict[str, Any]]:
    """Rows of one measure that hold a figure, with the arm, seed and tokens of their line."""
    return [
        {"arm": line["arm"], "seed": line["seed"], "tokens": line["tokens"], **row}
        for line in lines
        if line["measure"] == measure
        for row in line["rows"]
        if row.get(figure) is not None
    ]


def draw(lines: Sequence[dict[str, Any]], folder: Path) -> dict[str, Path]:
    """The figures that these lines allow, title -> PNG file."""
    last, figures = last_lines(lines), {}

    def add(title: str, name: str, drawer: Callable[..., tuple[Path, Path]], rows: list[Any], **axes: Any) -> None:
        if rows:
            figures[title] = drawer(rows, folder / name, **axes)[0]

    for measure, figure in ALONG:
        rows = [row for row in flat(lines, measure, figure) if row["arm"] != "parent"]
        if len({row["tokens"] for row in rows}) > 1:
            add(f"{HEADLINES[figure]} along training", f"along-{figure}", plots.curves, rows, x="tokens", y=figure,
                by="arm", x_label="training tokens", y_label=_with_unit(figure))  # fmt: skip
    for figure in ("parent_nll", "accuracy"):
        rows = flat(last, "frontier", figure)
        if figure == "accuracy" or not flat(last, "frontier", "accuracy"):
            arms, parent = _as_lines(_by_setting(rows), figure)
            add(f"{HEADLINES[figure]} against tokens per forward", f"frontier-{figure}", plots.trade_off, arms,
                parent=parent, x_label="tokens per forward", y_label=_with_unit(figure),
                less_is_better=ORDERED[figure] == LOWER, percent=figure == "accuracy")  # fmt: skip
    add("NELBO by training and evaluation block size", "block-sizes", plots.heat_map,
        flat(last, "block_sizes", "nelbo"), x="at", y="arm", value="nelbo", x_label="evaluation block size",
        y_label="", value_label="NELBO, nats per token")  # fmt: skip
    drift = [row | {"layer": f"{row['part']} {row['at']}"} for row in flat(last, "drift", "mean_change")]
    add("Mean absolute change of the weights by layer", "drift", plots.heat_map,
        sorted(drift, key=lambda row: (row["part"], row["at"])), x="layer", y="arm", value="mean_change", digits=2,
        y_label="", value_label="mean |change|")  # fmt: skip
    order = flat(last, "order", "mean_step")
    for figure, title in (
        ("mean_step", "forward in which it is committed"),
        ("mean_confidence", "confidence at commit"),
    ):
        add(f"Place in the block and {title}", f"order-{figure}", plots.curves, order, x="at", y=figure, by="arm",
            x_label="place in the block", y_label=f"mean {title}")  # fmt: skip
    return figures


def _with_unit(figure: str) -> str:
    return f"{HEADLINES[figure]}, nats per token" if figure in ("nll", "nelbo", "parent_nll") else HEADLINES[figure]


def _by_setting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds of the points of each arm and threshold: seeds differ on both axes."""
    groups: dict[tuple[str, Any], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["at"]), []).append(row)
    figures = ("tokens_per_forward", "parent_nll", "accuracy")
    return [
        {"arm": arm, "at": at, **{k: mean(row[k] for row in seeds) for k in figures if all(k in row for row in seeds)}}
        for (arm, at), seeds in groups.items()
    ]


def _as_lines(points: Sequence[dict[str, Any]], figure: str) -> tuple[list[plots.Line], tuple[float, float] | None]:
    """Each arm as a line of (tokens per forward, figure) with its thresholds as words, and the parent's point."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        arms.setdefault(point["arm"], []).append(point)
    places = {arm: [(p["tokens_per_forward"], p[figure]) for p in of_arm] for arm, of_arm in arms.items()}
    parent = places.pop("parent", [None])[0]
    words = {arm: ["" if p["at"] is None else f"{p['at']:g}" for p in arms[arm]] for arm in places}
    return [plots.Line(arm, at, words[arm]) for arm, at in places.items()], parent


def report(study: dict[str, Any], lines: Sequence[dict[str, Any]], figures: dict[str, str]) -> str:
    """The report as Markdown. figures: title -> file."""
    last = last_lines(lines)
    seeds = sorted({line["seed"] for line in lines if line["seed"] is not None})
    parts = [
        f"# Study {study['study']}",
        study["summary"],
        f"Parent `{Path(study['model']).name}`, trained on {study['data']}, measured on {study['eval']}. "
        f"{study['max_tokens']:,} tokens for every arm, seeds {', '.join(map(str, seeds))}. "
        "± is the standard error over seeds; nats are per predicted token.",
        _headlines(last),
        *(_order(last, figure, better) for figure, better in ORDERED.items()),
    ]
    for measure, figure, title in SECTIONS:
        found = series(last, measure, figure, _axis)
        if found and not (figure == "parent_nll" and any("accuracy" in r for line in last for r in line["rows"])):
            parts += [f"## {title}", table(found)]
    along = [line for line in lines if line["arm"] != "parent"]
    for measure, figure in ALONG:
        found = series(along, measure, figure, lambda line, _row: line["tokens"])
        if any(len(estimates) > 1 for estimates in found.values()):
            parts += [f"## {HEADLINES[figure]} along training, by tokens", table(found)]
    parts += [f"![{title}]({file})" for title, file in figures.items()]
    parts += ["## Arms", *(f"- `{arm}`: {_described(settings)}" for arm, settings in study["arms"].items())]
    return "\n\n".join(part for part in parts if part).replace("\n\n- ", "\n- ") + "\n"


def _axis(_line: dict[str, Any], row: dict[str, Any]) -> Any:
    at = row.get("at")
    return f"{row['part']} {at}" if "part" in row else "one by one" if at is None else at


def _headlines(last: Sequence[dict[str, Any]]) -> str:
    columns: dict[str, dict[str, Estimate]] = {}
    for figure, title in HEADLINES.items():
        for measure in ("likelihood", "quality"):
            for arm, estimates in series(last, measure, figure, lambda *_: None).items():
                columns.setdefault(arm, {})[title] = estimates[None]
    order = dict.fromkeys(line["arm"] for line in last)
    titles = [title for title in HEADLINES.values() if any(title in figures for figures in columns.values())]
    return table({arm: columns[arm] for arm in order if arm in columns}, titles)


def table(arms: dict[str, dict[Any, Estimate]], keys: list[Any] | None = None) -> str:
    """Arms down, keys across: numbers sorted, names in the order of their appearance."""
    if keys is None:
        keys = list(dict.fromkeys(key for estimates in arms.values() for key in estimates))
        if all(isinstance(key, int | float) for key in keys):
            keys.sort()
    rows = [["", *map(str, keys)], ["---"] * (len(keys) + 1)]
    rows += [[arm, *(str(estimates.get(key, "-")) for key in keys)] for arm, estimates in arms.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _order(last: Sequence[dict[str, Any]], figure: str, better: str) -> str:
    """The arms from best to worst, with > where neighbours are two standard errors of their difference apart."""
    arms: dict[str, Estimate] = {}
    for measure in ("likelihood", "quality"):
        arms |= {arm: found[None] for arm, found in series(last, measure, figure, lambda *_: None).items()}
    arms.pop("parent", None)
    if len(arms) < 2:
        return ""
    ranked = sorted(arms.items(), key=lambda item: item[1].mean, reverse=better == HIGHER)
    text = ranked[0][0]
    for (_, a), (name, b) in pairwise(ranked):
        text += (" > " if apart(a, b) else " ~ ") + name
    return (
        f"By {HEADLINES[figure]} ({better}): {text}. (`>`: the means are more than two standard errors of their "
        "difference apart; `~`: they are not, or there is one seed.)"
    )


def apart(a: Estimate, b: Estimate) -> bool:
    """Whether two means differ by more than two standard errors of their difference; never for single seeds."""
    if a.error is None or b.error is None:
        return False
    return abs(a.mean - b.mean) > 2 * math.hypot(a.error, b.error)


def _described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={to_json(value)}" for key, value in settings.items())
