"""Fill the place of the cursor in an editor's buffer: the text before and after it stays, what fits is put between.

    python examples/fill_buffer.py runs/q story.txt [CURSOR]

CURSOR stands where text is missing, by default "<|>".
"""

from __future__ import annotations

import sys
from pathlib import Path

import unmask


def main(model: str, file: str, cursor: str = "<|>") -> str:
    """The whole buffer. Three lengths are tried, and the one that the model finds likeliest is kept."""
    before, found, after = Path(file).read_text().partition(cursor)
    if not found:
        raise SystemExit(f"{file} has no cursor {cursor!r}: put it where text is missing")
    lm = unmask.load(model)
    # A checkpoint that decodes in blocks sees little of what follows a gap; this one sees all of it.
    out = lm.infill([before, [4, 8, 16], after], attention="bidirectional", seed=0)
    return out.filled[0]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    print(main(*sys.argv[1:]))
