"""What a name that nothing has was meant to be."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


def near_path(name: str | Path) -> str:
    """ "; did you mean 'runs/first'?" where a file or folder of a like name lies there, else nothing."""
    missing = Path(name).expanduser()
    rest: list[str] = []
    while not missing.parent.is_dir():
        if missing.parent == missing:
            return ""
        missing, rest = missing.parent, [missing.name, *rest]
    try:
        beside = os.listdir(missing.parent)
    except OSError:
        return ""
    for other in difflib.get_close_matches(missing.name, beside, n=3, cutoff=0.75):
        meant = missing.with_name(other).joinpath(*rest)
        if meant.exists():
            return f"; did you mean {str(meant)!r}?"
    return ""


def unknown(kind: str, name: str, known: Iterable[str], otherwise: str) -> str:
    """The message for a name that is none of those known, with the nearest; otherwise: what it says besides."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"{kind} {name!r} is unknown: " + (f"did you mean {nearest[0]!r}? " if nearest else "") + otherwise
