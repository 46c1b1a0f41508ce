"""The figures of the attention patterns, drawn from the predicates themselves: `python docs/site/patterns.py`.

A row is a token that attends (query), a column one that is attended to (key). Two documents of a packed row are shown
where a pattern has one stream; two streams have one document, its noisy tokens before its clean ones.
"""

from __future__ import annotations

from pathlib import Path

import torch

from unmask.core.attention import (
    Layout,
    Pattern,
    annealed,
    bidirectional,
    block_causal,
    causal,
    dense,
    drafting,
    intersect,
    same_document,
    two_stream,
)
from unmask.core.noise import bernoulli

IMAGES = Path(__file__).resolve().parents[1] / "images"
CELL, LEFT, TOP = 16, 64, 26
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1d1d1f}.no{fill:#ececef}.clean{fill:#0b6bcb}.noisy{fill:#d9822b}"
    "@media(prefers-color-scheme:dark){text{fill:#ececf0}.no{fill:#2c2c31}.clean{fill:#5aa9f5}.noisy{fill:#f0a860}}"
)


def one_stream(lengths: tuple[int, ...] = (8,)) -> Layout:
    """A row of documents of these lengths."""
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    return Layout.of(position, torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None])


def two_streams(noisy: range, clean: range) -> Layout:
    """[noisy | clean] tokens of one document, at these positions."""
    return Layout.of(torch.tensor([list(noisy)]), noisy=True).concat(Layout.of(torch.tensor([list(clean)])))


OPENED = bernoulli(8, 8, probability=0.4, key=("figure",), device=torch.device("cpu"))
FIGURES: dict[str, tuple[Pattern, Layout]] = {
    "causal": (causal, one_stream()),
    "bidirectional": (bidirectional, one_stream()),
    "annealed": (annealed(OPENED), one_stream()),
    "block_causal": (block_causal(4), one_stream()),
    "two_stream": (two_stream(4), two_streams(range(8), range(8))),
    "two_stream_causal": (two_stream(4, "causal"), two_streams(range(8), range(8))),
    "drafting": (drafting(), two_streams(range(5, 9), range(5))),
    "packed": (intersect(block_causal(4), same_document), one_stream((8, 6))),
}


def drawn(pattern: Pattern, layout: Layout) -> str:
    """The pattern as SVG; the colour of a cell is that of its key's stream."""
    allowed, (position, _document, noisy) = dense(pattern, layout, layout)[0].tolist(), (x[0].tolist() for x in layout)
    size = len(position)
    marks = []
    for row in range(size):
        y = TOP + row * CELL
        name = f"{'noisy' if noisy[row] else 'clean'} {position[row]}"
        marks.append(f'<text x="{LEFT - 6}" y="{y + 12}" text-anchor="end">{name}</text>')
        marks.append(f'<text x="{LEFT + row * CELL + 7}" y="{TOP - 8}" text-anchor="middle">{position[row]}</text>')
        for column in range(size):
            kind = ("noisy" if noisy[column] else "clean") if allowed[row][column] else "no"
            x, side = LEFT + column * CELL, CELL - 2
            marks.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{side}" height="{side}" rx="2"/>')
    width, height = LEFT + size * CELL + 4, TOP + size * CELL + 4
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *marks, "</svg>", ""])


if __name__ == "__main__":
    for name, (pattern, layout) in FIGURES.items():
        (IMAGES / f"pattern_{name}.svg").write_text(drawn(pattern, layout))
