"""`export_model`: a model as a folder that other programs serve, in one of several formats.

A format is a function in a file of its own: it writes the files of a loaded model to an empty folder, or raises
ValueError for a model that its readers could not serve, and says what to train instead.
"""

from __future__ import annotations

import inspect
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unmask.export.gguf import check_quantize, export_gguf
from unmask.export.hf import export_hf
from unmask.export.sglang import export_sglang
from unmask.export.uno import export_uno
from unmask.loading import load
from unmask.model import DiffusionLM
from unmask.run_folder import check_can_be_written, ordinary_permissions, writing

FORMATS: dict[str, Callable[..., dict[str, Any]]] = {
    "gguf": export_gguf,
    "hf": export_hf,
    "sglang": export_sglang,
    "uno": export_uno,
}
"""Functions of (model, folder to write to, its later path); one that can quantise has an argument `quantize` too.
What they return is said to the user: each value is a line, or an entry of the JSON object."""


def export_model(
    model: str | Path | DiffusionLM,
    format: str,
    output: str | Path,
    *,
    quantize: str | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write a model to the folder `output` in a format; returns what is to be known of it, as launch lines.

    model: folder, hub id or a loaded model. quantize: how weights are packed, for formats that can. base,
    trust_remote_code: of `load`. The folder is there whole or not at all. Raises ValueError for a format that is
    unknown or cannot hold the model, for a folder that holds something already, and for an option that is not read.
    """
    output = Path(output)
    writer = _writer(format, quantize)
    _check_empty(output)
    if isinstance(model, DiffusionLM):
        unread = {"base": base, "trust_remote_code": trust_remote_code or None}
        for name, value in unread.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} is for a model that is loaded here: leave it out")
        lm = model
    else:
        lm = load(model, device="cpu", base=base, trust_remote_code=trust_remote_code)
    options = {} if quantize is None else {"quantize": quantize}
    with _whole_folder(output) as folder:
        return writer(lm, folder, str(output.resolve()), **options)


def _writer(format: str, quantize: str | None) -> Callable[..., dict[str, Any]]:
    """The function of a format; ValueError for one that is unknown, or writes weights only as they are."""
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: use {' or '.join(sorted(FORMATS))}")
    able = [name for name, writer in FORMATS.items() if "quantize" in inspect.signature(writer).parameters]
    if quantize is not None and format not in able:
        instead = f", or use format {' or '.join(able)}" if able else ""
        raise ValueError(f"quantize {quantize!r} is not read by format {format!r}: leave it out{instead}")
    check_quantize(quantize)  # before a model is loaded
    return FORMATS[format]


def _check_empty(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        kind = "folder" if output.is_dir() else "file"
        raise ValueError(f"output {str(output)!r} is a {kind} with something in it: choose a new folder")
    check_can_be_written(output, "output")


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, which takes its name when all went well, and else is removed."""
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}")
        folder.mkdir()
        try:
            yield folder
            ordinary_permissions(folder)
            _check_empty(output)  # another program may have written there meanwhile
            if output.is_dir():
                output.rmdir()
            folder.rename(output)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
