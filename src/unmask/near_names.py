"""What a name that nothing has was meant to be."""

from __future__ import annotations

import difflib
import os
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
