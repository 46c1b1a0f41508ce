"""A run's folder: one writer at a time, files that are whole or absent, checkpoints that are what was written."""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from safetensors import SafetensorError, safe_open

from unmask.plain_json import to_json

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None  # type: ignore[assignment]

Given = ParamSpec("Given")
Made = TypeVar("Made")

MANIFEST = "files.json"
"""In a checkpoint: size and CRC-32 of each of its files."""

# --- one writer


_held: ContextVar[ExitStack | None] = ContextVar("held", default=None)


def releases_folders(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """A function that gives the folders it claimed back when it ends, however it ends."""

    @functools.wraps(function)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with ExitStack() as stack:
            token = _held.set(stack)
            try:
                return function(*args, **kwargs)
            finally:
                _held.reset(token)

    return wrapped


def claim(folder: Path) -> None:
    """Be the one writer of an existing folder until the surrounding `releases_folders` function ends.

    The lock is on the folder itself and goes with the process. Raises ValueError where another process, or another
    call in this one, has it. A file system without locks is used without one.
    """
    stack = _held.get()
    assert stack is not None, "claim is called within a function that releases folders"
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"output folder {str(folder)!r} is being written by another run: wait until it ends, or choose another"
        ) from error
    except OSError:
        return


# --- files


def write_text(path: Path, text: str) -> None:
    """Replace a file by one with this text, which is on the disk when this returns; never half of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path), partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file or the entries of a folder on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a folder on Windows
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def ordinary_permissions(folder: str | Path) -> None:
    """Give every file of a folder, itself included and not those in folders below, what the user's umask gives."""
    folder = Path(folder)
    probe = folder / f".permissions-{os.getpid()}"
    probe.touch()  # the umask cannot be read without being changed
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600 != mode:
            path.chmod(mode)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell a full disk in one line: a ValueError that names `path`, in place of the writer's own error."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        raise ValueError(
            f"the disk is full: {str(path)!r} could not be written, and what was there before stays; free some space "
            "and start again, a training run with --resume"
        ) from error


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    text = str(error)
    torchs = ("iostream error", "PytorchStreamWriter failed", "unexpected pos")  # torch's writer keeps no error number
    return any(f"os error {number})" in text or os.strerror(number) in text for number in _FULL) or any(
        known in text for known in torchs
    )


# --- checkpoints


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-<step>, oldest first; copies, half-written ones and files are none."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name)
        if match is not None and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def newest_whole(output_dir: Path, *, quiet: bool = False) -> Path | None:
    """The newest checkpoint that is as it was written; a line on stderr for each one passed over unless `quiet`."""
    for path in reversed(checkpoints(output_dir)):
        fault = damage(path)
        if fault is None:
            return path
        if not quiet:
            print(f"note: {path} is damaged ({fault}) and passed over", file=sys.stderr)
    return None


def seal(checkpoint: Path) -> None:
    """Write the manifest of a new checkpoint, give its files ordinary permissions, and have all on the disk."""
    ordinary_permissions(checkpoint)
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    write_text(checkpoint / MANIFEST, to_json({name: _sum(checkpoint / name) for name in names}))
    for path in checkpoint.rglob("*"):
        sync(path)
    sync(checkpoint)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if not isinstance(state, dict) or not {"step", "tokens", "data"} <= set(state):
            return "state.json is no training state"
        if (checkpoint / MANIFEST).is_file():
            for name, known in json.loads((checkpoint / MANIFEST).read_text()).items():
                if _sum(checkpoint / name) != known:
                    return f"{name} is not what was written"
            return None
        return _unreadable(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _sum(path: Path) -> list[int]:
    """[size in bytes, CRC-32]"""
    size = total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, total = size + len(block), zlib.crc32(block, total)
    return [size, total]


def _unreadable(checkpoint: Path) -> str | None:
    """The first file of a checkpoint without a manifest that its format says is cut or spoilt."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for kind in ("model", "optimizer"):
        if not any(kind in path.name for path in files):
            return f"its {kind} is missing"
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as opened:
                    opened.keys()
            elif path.suffix in (".bin", ".pkl", ".pt"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return f"{path.name} is not what was written"
        except (SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name}: {error}"
    return None


def put_in_place(partial: Path, final: Path, step: int, keep: int) -> None:
    """Make the whole checkpoint `partial` the one of `step`, and drop all but the newest `keep` up to it.

    Later ones belong to a past that did not happen: the run went on from before them, as they were damaged.
    """
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync(final.parent)
    found = checkpoints(final.parent)
    steps = [int(path.name.removeprefix("checkpoint-")) for path in found]
    present = [path for path, at in zip(found, steps, strict=True) if at <= step]
    for old in [path for path in found if path not in present[-keep:]]:
        shutil.rmtree(old)
