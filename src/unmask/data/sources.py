"""What names of data stand for: files, folders, prepared data, a hub id; or texts and records in memory."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.data.readers import COMPRESSED, SUFFIXES, Records, suffix_of
from unmask.data.records import kind
from unmask.near_names import near_path

PREPARED = "prepared.json"
"""The file that makes a folder one of prepared data."""


@dataclass(frozen=True)
class Part:
    """What makes one corpus: files and records, read one after another, or one folder of prepared data.

    sources: none for a hub id. name: as it was given. weight: its share in a mixture beside those of others; None where
    no part has one.
    """

    sources: tuple[Path | Records, ...]
    name: str
    weight: float | None = None

    @property
    def prepared(self) -> Path | None:
        """The folder of prepared data."""
        first = self.sources[0] if self.sources else None
        return first if isinstance(first, Path) and is_prepared(first) else None


def is_prepared(path: Path) -> bool:
    """Whether a folder holds prepared data."""
    return (path / PREPARED).is_file()


def in_memory(data: Any) -> Records | None:
    """Texts and records of a sequence; None for names of files, folders or a hub id.

    Strings are names if one of them looks like a file (`.txt`, `./`, or what is there), or if none has white space.
    Raises ValueError for names among texts or records.
    """
    if isinstance(data, str | Path):
        return None
    if isinstance(data, Mapping | bytes) or not isinstance(data, Iterable):
        raise ValueError(
            f"data is {kind(data)}: give files, a hub id, a set of `datasets`, or a list of texts or records"
        )
    items = list(data)
    names = [item for item in items if isinstance(item, Path) or (isinstance(item, str) and _looks_like_file(item))]
    others = [item for item in items if not isinstance(item, Path) and not _is_name(item)]
    if names and others:
        raise ValueError(
            f"data mixes {str(names[0])!r}, which names a file, with {reprlib.repr(others[0])}, which is no file here: "
            'give files alone, or texts alone, as records {"text": ...} where a text looks like a name'
        )
    return Records(items) if others else None


def _is_name(item: Any) -> bool:
    """Whether an item may name a file or a data set: a string that looks like one, or that has no white space."""
    return isinstance(item, str) and (not any(map(str.isspace, item)) or _looks_like_file(item))


def _looks_like_file(text: str) -> bool:
    if "\n" in text or len(text) > 4096:
        return False
    text = text.rpartition(":")[0] if _WEIGHT.fullmatch(text.rpartition(":")[2]) else text
    return suffix_of(Path(text)) in SUFFIXES or text.startswith(("./", "../", "/", "~/")) or _lies(text)


def _lies(name: str | Path) -> bool:
    """Whether there is a file or folder of that name; a name that no file can have has none."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def split_weight(source: str | Path) -> tuple[str, float | None]:
    """A name and the weight after its last colon; None for a name without one, and for a file whose name has a colon.

    Raises ValueError for a weight that is not above 0, or no finite number.
    """
    text = str(source)
    name, _, raw = text.rpartition(":")
    if not name or _lies(text):
        return text, None
    if not _WEIGHT.fullmatch(raw):
        if len(name) > 1 and _lies(name):  # one letter is a drive of Windows
            raise ValueError(f"data {text!r} has the weight {raw!r}: give a number above 0")
        return text, None
    weight = float(raw)
    if not 0 < weight < math.inf:
        raise ValueError(f"data {text!r} has the weight {raw}: give a number above 0")
    return name, weight


_WEIGHT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)", re.IGNORECASE)


def find_parts(sources: Sequence[str | Path]) -> list[Part] | None:
    """The parts of the data that names stand for; None if the only source is a hub id.

    Files make one part together, unless one of the names has a weight, is prepared data or a hub id: then each name
    makes one.
    """
    pairs = [split_weight(source) for source in sources]
    weighted = any(weight is not None for _, weight in pairs)
    if weighted and len(pairs) == 1:
        raise ValueError(f"data {str(sources[0])!r} has a weight and stands alone: leave out :{pairs[0][1]:g}")
    for name, weight in pairs:
        if weighted and weight is None:
            raise ValueError(f"data {name!r} has no weight, and others have: write {name}:1, or another weight")
    found = [[Path(name)] if name and is_prepared(Path(name)) else find_files([name]) for name, _ in pairs]
    if len(found) == 1 and found[0] is None:
        return None
    parts = [Part(tuple(files or ()), name, weight) for (name, weight), files in zip(pairs, found, strict=True)]
    if weighted or any(part.prepared or not part.sources for part in parts):
        return parts
    return [Part(tuple(file for part in parts for file in part.sources), ", ".join(map(str, sources)))]


def find_files(sources: Sequence[str | Path]) -> list[Path] | None:
    """The data files among files and folders, those of a folder sorted; None if the only source is a hub id."""
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if not str(source):
            raise ValueError(f"data source {str(source)!r} is empty: give a file, a folder or a hub id")
        if not _lies(path):
            if suffix_of(path) in SUFFIXES or str(source).startswith((".", "/", "~")) or str(source).count("/") > 1:
                raise ValueError(f"data file {str(source)!r} does not exist{near_path(path)}")
            if len(sources) > 1:
                raise ValueError(
                    f"data source {str(source)!r} is no file; a hub id must stand alone here: write it to a folder of "
                    "its own with `unmask prepare`"
                )
            return None
        if is_prepared(path):
            raise ValueError(f"data folder {str(source)!r} holds prepared data, where text is needed: give its files")
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if suffix_of(p) in SUFFIXES and p.is_file())
            if not found:
                raise ValueError(f"data folder {str(source)!r} holds no {', '.join(SUFFIXES)} file")
            files += found
        elif suffix_of(path) not in SUFFIXES:
            raise ValueError(
                f"data file {str(source)!r} has an unknown type: use {', '.join(SUFFIXES)}, the first two also "
                f"compressed ({', '.join(COMPRESSED)})"
            )
        else:
            files.append(path)
    return files


def local_files(sources: Sequence[str | Path], what: str) -> list[Path]:
    """`find_files`, but ValueError for a hub id; what: the name of the sources in the message."""
    files = find_files(sources)
    if files is None:
        first = str(sources[0])
        raise ValueError(
            f"{what} {first!r} is no file here: give {', '.join(SUFFIXES)} files, or a folder{near_path(first)}"
        )
    return files
