"""A run's folder: one writer at a time, files that are whole or absent, checkpoints that are what was written."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None  # type: ignore[assignment]

Given = ParamSpec("Given")
Made = TypeVar("Made")

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
