"""Files to documents to packed rows: nothing lost, nothing mixed, resumable anywhere."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import STORIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from unmask.core.attention import PADDING
from unmask.data.documents import Corpus, Encoder, load_corpus
from unmask.data.packing import Packer, PackState
from unmask.data.readers import Faults, read_documents
from unmask.data.sources import find_files
from unmask.data.streams import RecordStream, open_hub


def corpus(*lengths: int) -> Corpus:
    """Documents whose tokens are 1, 2, 3 ... through the whole corpus."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Corpus(np.arange(1, offsets[-1] + 1, dtype=np.int32), offsets, "test")


# --- reading


def test_the_three_formats_hold_the_same_documents(tmp_path: Path) -> None:
    texts = ["One.\nTwo.", "Ünïcode ☂", "three"]
    (tmp_path / "a.txt").write_text(" <|endoftext|>\n".join(texts) + "\n<|endoftext|>\n \n")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n\n" for t in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": [1, 2, 3]}), tmp_path / "c.parquet")
    for name in ("a.txt", "b.jsonl", "c.parquet"):
        assert list(read_documents(tmp_path / name)) == texts
    assert find_files([tmp_path]) == [tmp_path / n for n in ("a.txt", "b.jsonl", "c.parquet")]


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("parts", [1, 3])
def test_compressed_files_are_read_as_what_they_hold(suffix: str, parts: int, tmp_path: Path) -> None:
    """Also in several streams one after another, as parallel compressors and `cat` write them."""
    compress = COMPRESSIONS[suffix]
    texts = [f"Ünïcode {i} " + "long " * (i * 300) for i in range(1, 40)]
    for name, content in (
        ("a.txt", "<|endoftext|>".join(texts)),
        ("b.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts)),
    ):
        raw = content.encode()
        cuts = [len(raw) * i // parts for i in range(parts + 1)]
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(b"".join(compress(raw[a:b]) for a, b in pairwise(cuts)))
        assert list(read_documents(path)) == [t.strip() for t in texts]
    assert find_files([tmp_path]) == [tmp_path / f"{n}{suffix}" for n in ("a.txt", "b.jsonl")]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_compressed_file_is_named(suffix: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    texts = [f"{i} {np.random.default_rng(i).bytes(600).hex()}" for i in range(100)]
    content = COMPRESSIONS[suffix]("".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"not compressed at all\n" * 100)
    with pytest.raises(ValueError, match=rf"a.jsonl{suffix}' is not {suffix[1:]}, or is damaged: "):
        list(read_documents(path))
    with pytest.raises(ValueError, match="is damaged"):  # never the rest of it
        list(read_documents(path, skip_invalid=True))


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.gz", "a.tar.gz", "a.jsonl.zip"])
def test_compressed_files_of_other_kinds_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"unknown type: use .txt, .jsonl, .parquet, the first two also compressed"):
        find_files([tmp_path / name])


def test_a_text_without_separators_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["one\n\ntwo"]


def test_another_column_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert list(read_documents(tmp_path / "a.jsonl", text_column="body")) == ["x"]


BROKEN = [
    ("a.txt", b"good\nline<|endoftext|>bad \xff\xfe<|endoftext|>fine", 2, "not UTF-8", ["good\nline", "fine"]),
    ("a.jsonl", b'{"text": "good"}\n{"text": \n{"text": "fine"}\n', 2, "not JSON", ["good", "fine"]),
    ("b.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', 2, "not UTF-8", ["good"]),
    ("c.jsonl", b'{"text": "good"}\n\n{"body": "x"}\n', 3, r"no text column 'text', found \['body'\]", ["good"]),
    ("d.jsonl", b'{"text": "good"}\n[1]\n', 2, "found a list", ["good"]),
]


@pytest.mark.parametrize(("name", "content", "line", "problem", "rest"), BROKEN)
def test_broken_documents_are_named_and_the_rest_kept_only_if_asked(
    tmp_path: Path, name: str, content: bytes, line: int, problem: str, rest: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}', line {line}: .*{problem}.*skip_invalid=true"):
        list(read_documents(path))
    assert list(read_documents(path, skip_invalid=True)) == rest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "'missing.txt' does not exist"),
        ("./no/such/folder", "does not exist"),
        ("notes.pdf", "unknown type"),
        ("empty", "holds no .txt, .jsonl, .parquet"),
    ],
)
def test_sources_that_are_no_data_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.pdf").touch()
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=message):
        find_files([source])


def test_a_hub_id_stands_alone(tmp_path: Path) -> None:
    assert find_files(["roneneldan/TinyStories"]) is None
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="hub id must stand alone"):
        find_files([tmp_path / "a.txt", "roneneldan/TinyStories"])


def test_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(ValueError, match="is not parquet"):
        list(read_documents(tmp_path / "a.parquet"))


def test_corpus_is_the_tokenizer_and_an_end_token(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    seen = []
    loaded = load_corpus([stories], tokenizer, end_token_id=1, progress=seen.append)
    assert len(loaded) == len(STORIES)
    assert sum(seen) == sum(len(s.encode()) for s in STORIES)
    for i, text in enumerate(STORIES):
        assert loaded[i].tolist() == [*tokenizer(text)["input_ids"], 1]
    kept, held_out = loaded.split(5)
    assert [d.tolist() for d in (held_out[i] for i in range(5))] == [
        loaded[len(loaded) - 5 + i].tolist() for i in range(5)
    ]
    assert len(kept) == len(loaded) - 5
    (tmp_path / "empty.txt").write_text("  <|endoftext|> \n")
    with pytest.raises(ValueError, match=r"empty.txt' holds no documents"):
        load_corpus([tmp_path / "empty.txt"], tokenizer)


# --- packing


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12), width=st.sampled_from([4, 8, 16]),
       size=st.integers(1, 4))  # fmt: skip
def test_packing_loses_nothing_and_keeps_documents_apart(lengths: list[int], width: int, size: int) -> None:
    source = corpus(*lengths)
    packer, seen, batches = Packer(source, width, seed=0, epochs=1), [], []
    while (batch := packer.batch(size)) is not None:
        batches.append(batch)
        for ids, position, document in zip(batch.x0, batch.layout.position, batch.layout.document, strict=True):
            real = document != PADDING
            seen += ids[real].tolist()
            for number in document[real].unique():
                piece = ids[document == number]
                assert torch.equal(position[document == number], torch.arange(len(piece)))
                assert torch.equal(piece, piece[0] + torch.arange(len(piece)))  # one stretch of one document
    assert sorted(seen) == list(range(1, sum(lengths) + 1))
    assert sum(b.num_tokens for b in batches) == sum(lengths)
    assert all(len(b.x0) == size for b in batches)
    real = torch.cat([b.layout.real.flatten() for b in batches])
    assert real[: sum(lengths)].all()  # padding only after everything


def test_epochs_are_shuffled_anew_and_never_end_without_a_limit() -> None:
    packer = Packer(corpus(4, 4, 4, 4, 4, 4), 4, seed=0)
    epochs = [packer.batch(6).x0[:, 0].tolist() for _ in range(3)]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert packer.state.epoch == 2


@pytest.mark.parametrize("steps", range(9))
def test_a_packer_goes_on_where_another_stopped(steps: int) -> None:
    source = corpus(3, 11, 7, 1, 30, 5)
    straight, first = (Packer(source, 8, seed=3) for _ in "ab")
    for _ in range(steps):
        straight.batch(2)
        first.batch(2)
    resumed = Packer(source, 8, seed=3, state=PackState(**vars(first.state)))
    for _ in range(12):
        expected, got = straight.batch(2), resumed.batch(2)
        assert torch.equal(got.x0, expected.x0)
        for a, b in zip(got.layout, expected.layout, strict=True):
            assert torch.equal(a, b)


def test_hub_data_is_streamed_and_resumes(tmp_path: Path, tokenizer_and_model: Path) -> None:
    """The hub's own loader, on a data set that lies on this disk."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in STORIES))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    data, encoder = open_hub(str(tmp_path / "set"), "train"), Encoder(tokenizer, 1, Faults())
    stream = RecordStream(data, "data 'set'", encoder, text_column="text", fingerprint="")
    whole = [d.ids.tolist() for (d,) in stream.stream(0, 0, 0)]
    assert sorted(whole) == sorted([*tokenizer(s)["input_ids"], 1] for s in STORIES)
    assert [d.ids.tolist() for (d,) in stream.stream(0, 0, 7)] == whole[7:]
    assert [d.ids.tolist() for (d,) in stream.stream(0, 1, 0)] != whole
    with pytest.raises(ValueError, match=r"data 'set' has no text column 'body', found \['text'\]"):
        RecordStream(data, "data 'set'", encoder, text_column="body", fingerprint="")
    with pytest.raises(ValueError, match="cannot be opened on the hub"):
        open_hub("nobody/nothing-here", "train")
