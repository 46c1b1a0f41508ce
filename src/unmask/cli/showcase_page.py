"""The page of `unmask demo`: tables, texts, two figures and the replay, in one file without scripts of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from unmask.cli.showcase import WAYS, speed_over

if TYPE_CHECKING:
    from unmask.cli.showcase import Answer, Score, Shown

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d1d1f; --soft: #6b6b70; --line: #d9d9de; --paper: #fff; --one: #0b6bcb; --two: #c2410c;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #a0a0a8; --line: #3a3a40; --paper: #17171a; --one: #6cb4ff; --two: #ff9a62; }
}
body {
  font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
}
h2 { margin-top: 2.5rem; }
p.note, figcaption { color: var(--soft); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.wide td:first-child { min-width: 9rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.pair div { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; white-space: pre-wrap; }
.wide { overflow-x: auto; }
figure { margin: 1rem 0; overflow-x: auto; }
svg { width: 100%; min-width: 26rem; max-width: 35rem; height: auto; }
iframe { width: 100%; height: 34rem; border: 1px solid var(--line); border-radius: .5rem; }
"""


def write_page(path: Path, shown: Shown) -> Path:
    """All that was shown; the replay is a page beside this one."""
    parts = ["<h1>unmask: what a conversion does</h1>"]
    if shown.answers:
        parts.append(
            "<h2>A chat model and its drafter</h2><p>SmolLM2-135M-Instruct, greedy, on this machine: transformers' own "
            "<code>generate()</code>, and AR decoding and speculation here.</p>"
        )
        parts.append(_chat_table(shown.answers))
        for some in _by_prompt(shown.answers):
            same = "the same text" if some[0].text == some[-1].text else "another text: a near tie that rounding broke"
            parts.append(f"<h3>{escape(some[0].prompt)}</h3><p class=note>{same}</p><div class=pair>")
            parts += [f"<div><b>{a.way}</b>, {a.seconds:.1f} s\n{escape(a.text)}</div>" for a in some]
            parts.append("</div>")
    parts.append("<h2>A small model with known answers</h2>")
    parts.append(_score_table(shown.scores) + _figure(shown.scores))
    parts.append(
        f"<p>A gap, both sides in view: <code>reverse c n h b d k &gt; k d <b>{escape(shown.gap)}</b> n c</code></p>"
    )
    parts.append(f'<h2>An answer, denoised</h2><iframe src="{escape(shown.replay.name)}" title="replay"></iframe>')
    parts.append(
        "<h2>A conversion of a minute</h2>" + _score_table([*shown.before, *shown.after]) + _curve(shown.losses)
    )
    body = "\n".join(parts)
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    )
    path.write_text(
        f"{head}<title>unmask demo</title><style>{_STYLE}</style></head><body>{body}</body></html>\n", "utf-8"
    )
    return path


def _by_prompt(answers: Sequence[Answer]) -> list[Sequence[Answer]]:
    return [answers[i : i + len(WAYS)] for i in range(0, len(answers), len(WAYS))]


def _chat_table(answers: Sequence[Answer]) -> str:
    head = ["prompt", *WAYS, "tokens per forward", f"speed over {WAYS[0]}"]
    rows = [
        [
            some[0].prompt,
            *(f"{a.seconds:.1f} s" for a in some),
            f"{some[-1].tokens / some[-1].forwards:.2f}",
            f"{speed_over(some[-1], some[0]):.2f}x",
        ]
        for some in _by_prompt(answers)
    ]
    return _table(head, rows)


def _score_table(scores: Sequence[Score]) -> str:
    rows = [
        [
            s.way,
            f"{s.right} of {s.problems}",
            f"{s.tokens / s.forwards:.2f}",
            f"{s.seconds:.2f} s",
            f"{scores[0].seconds / s.seconds:.2f}x",
        ]
        for s in scores
    ]
    return _table(["way", "right", "tokens per forward", "time", "speed over the first"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["", *[" class=number"] * (len(cells) - 1)]
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    return f"<div class=wide><table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table></div>"


_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 240, 56, 40


def _figure(scores: Sequence[Score]) -> str:
    """Accuracy over tokens per forward, a point for each way."""
    points = [(s.tokens / s.forwards, 100 * s.right / s.problems, s.way) for s in scores]
    right = max(x for x, _, _ in points) * 1.25
    low = 10 * (min(y for _, y, _ in points) // 10) - 10
    marks = []
    for x, y, way in points:
        at_x, at_y = _place(x / right, (y - low) / (105 - low))
        marks.append(f'<circle cx="{at_x:.0f}" cy="{at_y:.0f}" r="6" fill="var(--one)"/>')
        marks.append(
            f'<text x="{at_x + 10:.0f}" y="{at_y + 20:.0f}" fill="var(--ink)" font-size="13">{escape(way)}</text>'
        )
    ticks = [(x / right, f"{x}") for x in range(1, int(right) + 1)]
    return _axes(
        "".join(marks),
        "tokens per forward",
        "percent right",
        ticks,
        [((y - low) / (105 - low), str(int(y))) for y in (low, 100)],
    )


def _curve(losses: Sequence[tuple[int, float]]) -> str:
    """The training loss over tokens."""
    if len(losses) < 2:
        return ""
    most, top = losses[-1][0], max(loss for _, loss in losses)
    line = " ".join("{:.1f},{:.1f}".format(*_place(n / most, loss / top)) for n, loss in losses)
    drawn = f'<polyline points="{line}" fill="none" stroke="var(--two)" stroke-width="2"/>'
    return _axes(
        drawn,
        "tokens",
        "loss (nats per token)",
        [(0.5, f"{most // 2:,}"), (1.0, f"{most:,}")],
        [(0.0, "0"), (1.0, f"{top:.1f}")],
    )


def _place(x: float, y: float) -> tuple[float, float]:
    """Shares of the axes as places in the drawing."""
    return _LEFT + x * (_WIDTH - _LEFT - 50), (_HEIGHT - _BOTTOM) - y * (_HEIGHT - _BOTTOM - 15)


def _axes(
    drawn: str, x: str, y: str, x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]
) -> str:
    (left, bottom), (right, top) = _place(0, 0), _place(1, 1)
    text = [
        f'<text x="{_place(at, 0)[0]:.0f}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
        for at, label in x_ticks
    ]
    text += [
        f'<text x="{left - 6}" y="{_place(0, at)[1] + 4:.0f}" text-anchor="end">{label}</text>' for at, label in y_ticks
    ]
    lines = f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="var(--line)"/>'
    labels = "".join(text) + f'<text x="{right}" y="{bottom + 34}" text-anchor="end">{x}</text>'
    inside = f'<g fill="var(--soft)" font-size="12">{labels}</g>{lines}{drawn}'
    picture = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img">{inside}</svg>'
    return f"<figure>{picture}<figcaption>{y} over {x}</figcaption></figure>"
