"""A corpus on disk: arrays that every process maps, under what they were made of.

A prepared folder holds `tokens.bin` (int32), `offsets.bin` (int64), where there are supervised examples `marks.bin` (a
byte a token, 1 if it is learnt), and `prepared.json`, which is written last. It is written once and whole, and may be
moved.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from unmask.data.corpus import Corpus, Writer
from unmask.data.documents import Encoder, encode_sources, in_this_process
from unmask.data.readers import COMPRESSED, Records
from unmask.data.sources import PREPARED, is_prepared
from unmask.data.workers import default_processes, in_processes
from unmask.plain_json import to_json
from unmask.run_folder import ordinary_permissions, whole_folder, write_text, writing
from unmask.version import __version__

_FILES = {"tokens": ("tokens.bin", np.int32), "offsets": ("offsets.bin", np.int64), "marks": ("marks.bin", np.bool_)}
_FORMAT = 1
SMALL = 1 << 24
"""Bytes of files up to which a run keeps its tokens in memory."""


def made_of(sources: Sequence[Path | Records], encoder: Encoder, text_column: str) -> dict[str, Any]:
    """All that decides the tokens of sources, as far as it is known without reading them.

    max_length counts where examples that exceed it are left out, and nowhere else.
    """
    files: list[list[Any]] = []
    for source in sources:
        if isinstance(source, Records):
            files.append([source.name, source.fingerprint])
        else:
            found = source.stat()
            files.append([str(source.resolve()), found.st_size, found.st_mtime_ns])
    skip = encoder.faults.skip
    return {
        "tokenizer": tokenizer_fingerprint(encoder.tokenizer),
        "end_token_id": encoder.end_token_id,
        "text_column": text_column,
        "skip_invalid": skip,
        "max_length": encoder.max_length if skip else None,
        "files": files,
    }


def is_large(sources: Sequence[Path | Records]) -> bool:
    """Whether sources are too large to keep their tokens in memory."""
    return sum(s.num_bytes if isinstance(s, Records) else _text_bytes(s) for s in sources) > SMALL


def _text_bytes(file: Path) -> int:
    """About the bytes of text in a file."""
    compressed = file.suffix in (*COMPRESSED, ".parquet")
    return file.stat().st_size * (5 if compressed else 1)


def cached(
    folder: Path,
    sources: Sequence[Path | Records],
    encoder: Encoder,
    text_column: str,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> Corpus | None:
    """The corpus of sources, prepared in a folder inside `folder` that is named after all that decides it.

    None for sources of which that is not known. note: called with a line that says where a new folder is.
    """
    if any(isinstance(source, Records) and source.fingerprint is None for source in sources):
        return None
    origin = made_of(sources, encoder, text_column)
    name = hashlib.sha256(to_json([_FORMAT, origin], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / f"prepared-{name}"
    if not is_prepared(place):
        prepare(place, sources, encoder, text_column, processes=default_processes(), progress=progress)
        if note is not None:
            note(f"the tokens are kept in {str(place)!r} for later runs: remove it when none needs them")
    check_longest(place, encoder)
    return open_prepared(place)


def prepare(
    place: Path,
    sources: Sequence[Path | Records],
    encoder: Encoder,
    text_column: str,
    *,
    model: str = "",
    processes: int = 1,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Read and tokenise sources into the folder `place`, unless another process has done so meanwhile.

    processes: how many tokenise side by side. An example above the encoder's max_length is written too, unless such are
    left out: whoever reads the corpus knows how long its rows are. Raises ValueError as `load_corpus` does, and
    for a full disk.
    """
    if not encoder.faults.skip:
        encoder = replace(encoder, max_length=None)
    with whole_folder(place) as folder, writing(place):
        if folder is None:
            return
        with ExitStack() as opened:
            files = [opened.enter_context((folder / name).open("wb")) for name, _ in _FILES.values()]
            writer = Writer(*files)
            encode = in_processes(processes) if processes > 1 else in_this_process
            found = encode_sources(sources, encoder, text_column, writer, progress=progress, encode=encode)
        if not writer.has_marks:
            (folder / _FILES["marks"][0]).unlink()
        record = {
            "format": _FORMAT,
            "version": __version__,
            "model": model,
            "num_documents": writer.num_documents,
            "num_tokens": writer.num_tokens,
            "num_bytes": found.num_bytes,
            "left_out": encoder.faults.number,
            "has_marks": writer.has_marks,
            "fingerprint": found.fingerprint,
            "longest_example": found.longest_example,
            "made_of": made_of(sources, encoder, text_column),
        }
        ordinary_permissions(folder)
        write_text(folder / PREPARED, to_json(record, indent=2) + "\n")


def read_record(place: Path) -> dict[str, Any]:
    """The content of prepared.json; ValueError for one that is damaged or of another version."""
    try:
        record = json.loads((place / PREPARED).read_text())
        known = record["format"] == _FORMAT and isinstance(record["made_of"], dict)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(place / PREPARED)!r} is damaged ({error}): prepare the data again") from None
    if not known:
        raise ValueError(
            f"prepared data {str(place)!r} have format {record['format']!r}, and this version reads {_FORMAT}: "
            "prepare them again"
        )
    return dict(record)


def open_prepared(place: Path) -> Corpus:
    """The corpus in a prepared folder, mapped and not read; ValueError for one that is damaged."""
    record = read_record(place)
    sizes = {
        "tokens": record["num_tokens"],
        "offsets": record["num_documents"] + 1,
        "marks": record["num_tokens"] if record["has_marks"] else 0,
    }
    maps: list[mmap.mmap] = []
    arrays: dict[str, np.ndarray] = {}
    for kind, (name, dtype) in _FILES.items():
        if not sizes[kind]:
            continue
        path, wanted = place / name, sizes[kind] * np.dtype(dtype).itemsize
        size = path.stat().st_size if path.is_file() else None
        if size != wanted:
            raise ValueError(
                f"prepared data {str(place)!r} are damaged: {name} has {size} bytes, not {wanted}; remove the folder "
                "and prepare again"
            )
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        arrays[kind] = np.frombuffer(maps[-1], dtype=dtype)
    return Corpus(
        arrays["tokens"], arrays["offsets"], record["fingerprint"], arrays.get("marks"), maps=tuple(maps)
    )  # fmt: skip


def check_longest(place: Path, encoder: Encoder) -> None:
    """Raise ValueError if a supervised example exceeds the encoder's max_length."""
    longest = read_record(place)["longest_example"]
    if longest is not None and encoder.max_length is not None and longest[0] > encoder.max_length:
        raise ValueError(
            f"{longest[1]}: the example makes {longest[0]} tokens: raise max_length="
            f"{encoder.max_length}, or leave such examples out with skip_invalid=true"
        )


def open_for(place: Path, encoder: Encoder) -> Corpus:
    """The corpus in a folder that `unmask prepare` wrote; ValueError if it is not of this tokenizer and end token."""
    origin = read_record(place)["made_of"]
    for name, now, what in (
        ("tokenizer", tokenizer_fingerprint(encoder.tokenizer), "another tokenizer"),
        ("end_token_id", encoder.end_token_id, f"end token {origin['end_token_id']}, not {encoder.end_token_id}"),
    ):
        if origin[name] != now:
            raise ValueError(
                f"prepared data {str(place)!r} were made with {what}: prepare them with --model of the model to adapt"
                f"{' and its end_token' if name == 'end_token_id' else ''}"
            )
    check_longest(place, encoder)
    return open_prepared(place)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of what decides the tokens of a text or chat; a mask token, which no text spells, does not count."""
    parts: list[Any] = [type(tokenizer).__name__, tokenizer.chat_template]
    names = tokenizer.special_tokens_map
    parts.append(sorted((name, str(text)) for name, text in names.items() if name != "mask_token"))
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] != tokenizer.mask_token]
        parts.append({key: part for key, part in backend.items() if key not in ("truncation", "padding")})
    else:
        vocabulary = {t: i for t, i in tokenizer.get_vocab().items() if t != tokenizer.mask_token}
        kept = {k: repr(v) for k, v in tokenizer.init_kwargs.items() if "mask" not in k and "path" not in k}
        parts += [sorted(vocabulary.items()), sorted(kept.items())]
    return hashlib.sha256(to_json(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
