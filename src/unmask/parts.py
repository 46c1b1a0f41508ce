"""Measurements in parts, each by a process of its own (a Slurm array, Ray), and the parts put together again.

Part 2 of 8 is the folder OUTPUT/part-2-of-8: run.json says what is measured, of what, and whether the part is finished;
rows.jsonl holds what was found. What all parts must have in common is compared before they are put together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.plain_json import to_json
from unmask.run_folder import RunFolder

_NAME = re.compile(r"part-(\d+)-of-(\d+)")
_OF_ONE_PART = ("part", "finished", "num_rows", "model", "parent", "costs", "written")
"""Keys of run.json in which parts may differ; models are compared by their fingerprints, wherever they lie."""

MOST_PARTS = 100_000


@dataclass(frozen=True)
class Shard:
    """Part `number`, from 1, of `of`."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "2/8"; ValueError for what is no part."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        number, of = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= of <= MOST_PARTS:
            raise ValueError(f"--shard {text!r} must be a part of all, from 1/N to N/N with N up to {MOST_PARTS:,}")
        return cls(number, of)

    def takes(self, index: int) -> bool:
        """Whether item `index`, from 0, of the whole is in this part."""
        return index % self.of == self.number - 1

    @property
    def folder_name(self) -> str:
        return f"part-{self.number}-of-{self.of}"

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Whole:
    """All parts. record: run.json of the first. parts: (run.json, rows) of each, in order. place: their folder."""

    record: dict[str, Any]
    place: Path
    parts: list[tuple[dict[str, Any], list[dict[str, Any]]]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for _, rows in self.parts for row in rows]


def write_part(
    output: Path, shard: Shard, record: Mapping[str, Any], measure: Callable[[RunFolder], Mapping[str, Any] | None]
) -> RunFolder:
    """Measure a part into its folder, unless an earlier call has finished it.

    record: what is measured; one that differs from that of an earlier call is refused. measure: writes the rows of the
    folder, where those of an interrupted call may be, and may return more entries for the record.
    """
    folder = _folder_of(output / shard.folder_name)
    with folder.claimed():
        before = folder.read()
        record = {**json.loads(to_json(dict(record))), "part": str(shard)}
        if before is not None:
            folder.refuse_another("another part", before, _common(record) | {"part": str(shard)})
            if before.get("finished"):
                return folder
        folder.write(record | {"finished": False})
        found = measure(folder)
        folder.sync_rows()
        folder.write(record | dict(found or {}) | {"finished": True, "num_rows": len(folder.read_rows())})
    return folder


def read_parts(folders: Sequence[Path]) -> Whole:
    """All parts in `folders`, each an output folder or a part itself.

    Raises ValueError if one is missing, unfinished, there twice or of something else, and names it.
    """
    found = _found(folders)
    (first, record), *rest = found.items()
    of = Shard.parse(record["part"]).of
    by_number = {Shard.parse(record["part"]).number: first}
    for path, other in rest:
        shard = Shard.parse(other["part"])
        if shard.of != of:
            raise ValueError(f"{str(first)!r} is one of {of} parts and {str(path)!r} one of {shard.of}: leave one out")
        if shard.number in by_number:
            raise ValueError(f"part {shard} is there twice, {str(by_number[shard.number])!r} and {str(path)!r}")
        by_number[shard.number] = path
        _refuse_different(first, record, path, other)
    where = ", ".join(repr(str(folder)) for folder in folders)
    missing = [f"{number}/{of}" for number in range(1, of + 1) if number not in by_number]
    if missing:
        named = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise ValueError(f"part {named} is missing in {where}: run it with --shard {missing[0]}")
    for path in (by_number[number] for number in sorted(by_number)):
        if not found[path]["finished"]:
            raise ValueError(f"part {str(path)!r} is not finished: run --shard {found[path]['part']} again")
    ordered = [by_number[number] for number in sorted(by_number)]
    parts = [(found[path], _rows_of(path, found[path])) for path in ordered]
    return Whole(parts[0][0], ordered[0].parent, parts)


def _found(folders: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    """Each part and its run.json."""
    found = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"folder {str(folder)!r} does not exist: give the --output of the parts")
        inside = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
        paths = [folder] if _NAME.fullmatch(folder.resolve().name) else inside
        if not paths:
            raise ValueError(f"folder {str(folder)!r} holds no parts: give the --output of runs with --shard")
        for path in sorted(paths):
            record = _folder_of(path).read()
            if record is None:
                raise ValueError(f"part {str(path)!r} holds no run.json: run it again")
            if Shard.parse(record["part"]).folder_name != path.resolve().name:
                raise ValueError(f"{str(path)!r} holds part {record['part']}: give each part's folder its own name")
            found[path] = record
    return found


def _rows_of(path: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = _folder_of(path).read_rows()
    if len(rows) != record["num_rows"]:
        raise ValueError(
            f"part {str(path)!r} holds {len(rows)} of its {record['num_rows']} rows: remove it, and run --shard "
            f"{record['part']} again"
        )
    return rows


def _refuse_different(first: Path, record: Mapping[str, Any], path: Path, other: Mapping[str, Any]) -> None:
    ours, theirs = _common(record), _common(other)
    for key in dict.fromkeys([*ours, *theirs]):
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"parts {str(first)!r} and {str(path)!r} are of different measurements: {key} is "
                f"{_short(ours.get(key))} and {_short(theirs.get(key))}; run one of them again"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _common(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in _OF_ONE_PART}


def _folder_of(path: Path) -> RunFolder:
    return RunFolder(path, "run.json", "rows.jsonl", ("measured", "part", "finished"))
