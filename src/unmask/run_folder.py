"""The folder of a resumable run: a record, rows, a lock, and files that are written whole or not at all.

`adapt`, `run_frontier`, `run_study` and parts each keep one, from which an interrupted run continues.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unmask.plain_json import to_json

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class RunFolder:
    """A folder of one run: a JSON file that describes the run (the record), a JSON line for each result (the rows).

    record_file, rows_file: names of these files. keys: present in every record of this kind of run. beside: names that
    a folder may contain when a run starts in it; None allows all but rows_file.
    """

    path: Path
    record_file: str
    rows_file: str
    keys: tuple[str, ...]
    beside: Collection[str] | None = ()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within the context this call alone may write to the folder, which is created if it does not exist.

        The lock is on the folder itself and ends with the process. Raises ValueError if another process, or another
        call in this one, holds it. On a file system without locks there is none.
        """
        if self.path.exists() and not self.path.is_dir():
            raise self._holds_something_else()
        if not self.path.exists():  # one that is there may be read, whether or not it can be written
            check_can_be_written(self.path, "output folder")
        self.path.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        handle = os.open(self.path, os.O_RDONLY)
        try:
            self._lock(handle)
            yield
        finally:
            os.close(handle)

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"output folder {str(self.path)!r} is being written by another run: wait until it ends, or choose "
                "another"
            ) from error
        except OSError:  # a file system without locks
            return

    def read(self) -> dict[str, Any] | None:
        """The record of the run in this folder, None if there is none and a run may start.

        Raises ValueError for the record of another kind of run, a file that is no JSON, a folder that holds something
        else, and one that cannot be written to.
        """
        path = self.path / self.record_file
        if not path.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(map(self._is_foreign, self.path.iterdir()))):
                raise self._holds_something_else()
            check_can_be_written(self.path, "output folder")
            return None
        try:
            record = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON ({error}): choose another output folder") from error
        if not isinstance(record, dict) or not set(self.keys) <= set(record):
            raise ValueError(f"output folder {str(self.path)!r} holds another kind of run: choose another folder")
        return record

    @property
    def holds_run(self) -> bool:
        """Whether there is a record."""
        return (self.path / self.record_file).is_file()

    def write(self, record: Mapping[str, Any]) -> None:
        """Replace the record."""
        write_text(self.path / self.record_file, to_json(dict(record), indent=2) + "\n")

    def refuse_another(self, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Raise ValueError, saying that the folder holds `what`, if a key of `now` has another value in `before`."""
        for key, value in now.items():
            if before.get(key) != value:
                raise ValueError(
                    f"output folder {str(self.path)!r} holds {what}: its {key} is {before.get(key)!r}, not {value!r}; "
                    "choose another folder"
                )

    def read_rows(self) -> list[dict[str, Any]]:
        """All rows. A line that an interruption cut is removed from the file, so that rows can be appended."""
        path = self.path / self.rows_file
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        rows = [row for row in map(_row, lines) if row is not None]
        if len(rows) < len(lines) or (lines and not lines[-1].endswith("\n")):
            self.write_rows(rows)
        return rows

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace all rows."""
        write_text(self.path / self.rows_file, "".join(to_json(dict(row)) + "\n" for row in rows))

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row. A crash may cut it, which `read_rows` repairs."""
        path = self.path / self.rows_file
        with writing(path), path.open("a") as file:
            file.write(to_json(dict(row)) + "\n")

    def sync_rows(self) -> None:
        """Flush the rows to the disk."""
        if (self.path / self.rows_file).exists():
            sync(self.path / self.rows_file)

    def _is_foreign(self, path: Path) -> bool:
        """Whether a run must not start in a folder with this file."""
        if path.name == f"{self.record_file}.partial":  # of a run that was killed as it wrote its first record
            return False
        return path.name == self.rows_file or (self.beside is not None and path.name not in self.beside)

    def _holds_something_else(self) -> ValueError:
        wanted = "another folder" if self.beside is None else "an empty or new one"
        return ValueError(f"output folder {str(self.path)!r} holds something else: choose {wanted}")


def _row(line: str) -> dict[str, Any] | None:
    """The JSON object of a line; None for a line that was cut."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row if isinstance(row, dict) else None


# --- files


def check_can_be_written(path: str | Path, what: str) -> None:
    """Raise ValueError unless a file or folder of this name can be made, before the work whose result it is to hold.

    It is tried in the nearest folder that exists, where nothing is left. what: the name of the path in the message.
    """
    path = Path(path)
    try:
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        nearest = path.absolute().parent if nearest == path and not path.is_dir() else nearest
        with tempfile.TemporaryDirectory(dir=nearest, prefix=".unmask-"):
            pass
        if path.is_file() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{what} {str(path)!r} cannot be written: {reason}; choose another place") from error


def check_folder_can_be_written(folder: str | Path) -> None:
    """Raise ValueError for the name of a file, and as `check_can_be_written`."""
    if Path(folder).is_file():
        raise ValueError(f"{str(folder)!r} is a file, where a folder is to be: choose another name")
    check_can_be_written(folder, "folder")


def write_text(path: Path, text: str) -> None:
    """Replace a file. The text is on the disk when this returns; after a crash the file is the old or the new one."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within the context a name to write a file to, which gets the name `path` at the end and is removed by an error.

    It is on the disk then; after a crash the file is the old or the new one.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path):
            yield partial
            sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path | None]:
    """Within the context a new folder to write to, which gets the name `path` at the end and is removed by an error.

    Waits while another process writes the same; None if that one, or an earlier one, has made it.
    """
    check_can_be_written(path, "output folder")
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(partial):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            shutil.rmtree(partial)
            yield None
            return
        for left in partial.iterdir():  # by a process that was killed
            left.unlink()
        try:
            yield partial
            for file in partial.iterdir():
                sync(file)
            if path.exists():
                path.rmdir()
            partial.replace(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    sync(path.parent)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Within the context this call alone writes to the folder, which is created; others wait."""
    handle = None
    while handle is None:
        folder.mkdir(exist_ok=True)
        if fcntl is None:
            yield
            return
        try:
            handle = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # of a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            current = folder.stat().st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:  # renamed or removed by the one who wrote
            current = False
        if not current and handle is not None:
            os.close(handle)
            handle = None
    try:
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
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
    """Give the files directly in a folder the permissions of the user's umask; libraries write some as 0600."""
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
    """Turn the error of a full disk into a ValueError that names `path`."""
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
    # torch's writer and numpy's ("9 requested and 5 written") keep no error number
    nameless = ("iostream error", "PytorchStreamWriter failed", "unexpected pos", " requested and ")
    return any(f"os error {number})" in text or os.strerror(number) in text for number in _FULL) or any(
        known in text for known in nameless
    )
