"""The files of a model's folder; reading a damaged one raises a ValueError that names it.

Knows JSON and safetensors; knows no model.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from safetensors import safe_open

T = TypeVar("T")

BUILDING = threading.RLock()
"""Held while transformers builds a model: meanwhile it replaces functions of its own and of torch, for all threads."""

JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "adapter_config.json",
)  # fmt: skip


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Any error inside becomes a ValueError that names `what` was read; errors of memory are passed on."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # parsers and native code raise errors of any type
        raise ValueError(f"{what} cannot be read: {first_line(error)}") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError with the file's name if it holds none."""
    path = Path(path)
    with reading(f"file {str(path)!r}"):
        raw = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ValueError(f"file {str(path)!r} holds a JSON {type(raw).__name__}, not an object: it is another file")
    return raw


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors in a safetensors file; ValueError with the file's name if it is missing or damaged."""
    with reading(f"weights {str(path)!r}"), safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def check_folder(folder: Path) -> None:
    """Check the JSON files of a checkpoint's folder and the headers of its weights."""
    for name in JSON_FILES:
        if (folder / name).exists():
            read_object(folder / name)
    for path in sorted(folder.glob("*.safetensors")):
        with reading(f"weights {str(path)!r}"), safe_open(str(path), framework="pt"):
            pass
    for path in sorted([*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]):
        parts = read_object(path).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise ValueError(f"file {str(path)!r} has no weight_map from tensors to files: it is another file")
        for part in sorted(set(parts.values())):
            if Path(part).name != part:
                raise ValueError(f"file {str(path)!r} names weights outside its folder: {part!r}")
            if not (folder / part).is_file():
                raise ValueError(f"file {str(path)!r} names weights that are not there: {part!r}")


def parse(kind: type[T], raw: Any, where: str, *, more: bool = False) -> T:
    """A dataclass of numbers, texts and truth values from a JSON object, every type checked.

    where: the name of the object in messages. more: allow other keys. An int is accepted for a float, a bool is not
    accepted for a number, and numbers must be finite.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object, not {raw!r}")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    missing = [name for name, f in known.items() if f.default is MISSING and name not in raw]
    if missing:
        raise ValueError(f"{where} lacks {missing}: it was written by something else")
    odd = [name for name in raw if name not in known]
    if odd and not more:
        raise ValueError(f"{where} has the unknown keys {odd}: it was written by something else")
    types = get_type_hints(kind)
    values = {name: raw[name] for name in known if name in raw}
    for name, value in values.items():
        kinds = get_args(types[name]) or (types[name],)
        right = type(value) in kinds or (float in kinds and type(value) is int)
        if not right or (isinstance(value, float) and not math.isfinite(value)):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"{name} {value!r} of {where} must be {wanted}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
