"""Mixtures: each corpus gives its share, nothing is lost, and a run goes on anywhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import STORIES
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.data import corpus
from unmask.data.corpus import Corpus, Document
from unmask.data.mixture import mixed
from unmask.data.packing import Packer, PackState
from unmask.data.sources import find_parts, in_memory, split_weight

RUN: dict[str, Any] = {"max_length": 32, "block_size": 4, "batch_size": 4, "log_every": 1, "save_every": 2,
                       "show_progress": False}  # fmt: skip


def corpora(*lengths: list[int]) -> list[Corpus]:
    """Corpora whose documents hold their own number, from 1 on through all of them."""
    number, made = 0, []
    for each in lengths:
        documents = []
        for length in each:
            number += 1
            documents.append(Document(np.full(length, number, dtype=np.int32)))
        made.append(Corpus.of(documents, f"corpus {len(made)}"))
    return made


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(LENGTHS, min_size=2, max_size=4), weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4),
       epoch=st.integers(0, 2), computed=st.booleans())  # fmt: skip
def test_an_epoch_holds_every_document_at_least_once(
    lengths: list[list[int]], weights: list[float], epoch: int, computed: bool
) -> None:
    mixture = mixed(corpora(*lengths), weights[: len(lengths)])
    with pytest.MonkeyPatch.context() as patch:
        if computed:
            patch.setattr(corpus, "_SHUFFLED", 0)
        seen = [d.ids for (d,) in mixture.stream(3, epoch, 0)]
        half = len(seen) // 2
        assert [d.ids.tolist() for (d,) in mixture.stream(3, epoch, half)] == [ids.tolist() for ids in seen[half:]]
    drawn, number = Counter(int(ids[0]) for ids in seen), 0
    for each, count, passes in zip(lengths, mixture.counts, mixture.passes, strict=True):
        of_corpus = [drawn[number + i + 1] for i in range(len(each))]
        number += len(each)
        assert sum(of_corpus) == count
        assert set(of_corpus) <= {int(passes), int(np.ceil(passes))}
        assert min(of_corpus) >= 1
    assert 1 in mixture.passes
    if epoch == 0:
        assert sum(len(ids) for ids in seen) == mixture.num_tokens


def test_shares_are_of_tokens() -> None:
    long, short = [50] * 40, [5] * 400
    mixture = mixed(corpora(long, short), [3, 1])
    assert mixture.passes == (3, 1)
    tokens = [0, 0]
    for (document,) in mixture.stream(0, 0, 0):
        tokens[int(document.ids[0] > 40)] += len(document.ids)
    assert tokens == [6000, 2000]
    first = [0, 0]  # as at the end, so at the beginning
    for (document,), _ in zip(mixture.stream(0, 0, 0), range(200), strict=False):
        first[int(document.ids[0] > 40)] += len(document.ids)
    assert 0.6 < first[0] / sum(first) < 0.9
    assert mixed(corpora(long, short)).passes == (1, 1)
    assert mixed(corpora(long, short)).num_tokens == 4000
    assert mixture.fingerprint != mixed(corpora(long, short), [1, 1]).fingerprint
    assert mixture.fingerprint == mixed(corpora(long, short), [6, 2]).fingerprint


def test_what_an_epoch_reads_once_more_is_another_part_each_time() -> None:
    mixture = mixed(corpora([1] * 30, [1] * 30), [3, 2])
    extra = []
    for epoch in range(6):
        drawn = Counter(int(d.ids[0]) for (d,) in mixture.stream(0, epoch, 0))
        extra.append({number for number, count in drawn.items() if count == 2})
    assert all(len(each) == 15 for each in extra)
    assert len(set.union(*extra)) == 30


@pytest.mark.parametrize("steps", range(7))
def test_a_mixture_goes_on_where_another_stopped(steps: int) -> None:
    mixture = mixed(corpora([3, 11, 7], [1, 30, 5, 2]), [2, 1])
    straight = Packer(mixture, 8, seed=3)
    for _ in range(steps):
        straight.batch(2)
    resumed = Packer(mixture, 8, seed=3, state=PackState(**vars(straight.state)))
    for _ in range(12):
        assert torch.equal(resumed.batch(2).x0, straight.batch(2).x0)


def test_held_out_documents_come_from_every_corpus() -> None:
    mixture = mixed(corpora([4] * 200, [2] * 300), [1, 3])
    first, last = mixture.split(8)
    assert [int(last[i][0]) for i in range(len(last))] == [199, 200, *range(495, 501)]
    assert [len(each) for each in first.corpora] == [198, 294]
    seen = {int(d.ids[0]) for (d,) in first.stream(0, 0, 0)}
    assert seen == set(range(1, 199)) | set(range(201, 495))
    filled = first.filled_up(6, 9)
    assert {len(d.ids) for (d,) in filled.stream(0, 0, 0)} == {6}
    assert sum(len(d.ids) for (d,) in filled.stream(0, 0, 0)) == filled.num_tokens


# --- names


def test_a_weight_follows_the_last_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert split_weight("a.jsonl:3") == ("a.jsonl", 3.0)
    assert split_weight(Path("x/b.parquet:0.25")) == ("x/b.parquet", 0.25)
    assert split_weight("a b.txt:1e-2") == ("a b.txt", 0.01)
    for name in ("a.jsonl", "owner/name", r"C:\data\a.jsonl", "C:/data/a.jsonl", "C:a.txt"):
        assert split_weight(name) == (name, None)
    assert split_weight(r"C:\data\a.jsonl:2") == (r"C:\data\a.jsonl", 2.0)
    Path("odd.txt:3").touch()
    assert split_weight("odd.txt:3") == ("odd.txt:3", None)
    assert in_memory(["a.jsonl:3", "b c.jsonl.gz:1"]) is None  # names, not texts
    assert in_memory(["it was 5:3", "b"]) is not None
    Path("a.txt").touch()
    Path("b.txt").touch()
    (whole,) = find_parts(["a.txt", "b.txt"]) or []
    assert (whole.sources, whole.weight) == ((Path("a.txt"), Path("b.txt")), None)
    assert [(part.sources, part.weight) for part in find_parts(["a.txt:3", "b.txt:1"]) or []] == [
        ((Path("a.txt"),), 3.0), ((Path("b.txt"),), 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.txt:0", "b.txt:1"], r"'a.txt:0' has the weight 0: give a number above 0"),
        (["a.txt:-1", "b.txt:1"], r"'a.txt:-1' has the weight -1"),
        (["a.txt:nan", "b.txt:1"], r"'a.txt:nan' has the weight nan"),
        (["a.txt:inf", "b.txt:1"], r"'a.txt:inf' has the weight inf"),
        (["a.txt:much", "b.txt:1"], r"'a.txt:much' has the weight 'much'"),
        (["a.txt:3"], r"'a.txt:3' has a weight and stands alone: leave out :3"),
        (["a.txt:3", "b.txt"], r"'b.txt' has no weight, and others have: write b.txt:1"),
        (["a.txt:3", "c.txt:1"], r"data file 'c.txt' does not exist"),
        (["a.txt:3", "owner/name"], r"'owner/name' has no weight, and others have: write owner/name:1"),
        (["owner/name:2"], r"'owner/name:2' has a weight and stands alone: leave out :2"),
    ],
)
def test_a_weight_that_is_none_is_named(
    names: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("a")
    Path("b.txt").write_text("b")
    with pytest.raises(ValueError, match=message):
        find_parts(names)


# --- runs


def test_a_mixture_is_trained_on_to_its_end_and_goes_on(
    tokenizer_and_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(STORIES[:20]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES[20:]))
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "Who?", "completion": " The cat."}) + "\n")
    unmask.prepare(tmp_path / "b.jsonl", tokenizer_and_model, tmp_path / "b", show_progress=False)
    data = [f"{tmp_path / 'a.txt'}:1", f"{tmp_path / 'b'}:3", f"{tmp_path / 'q.jsonl'}:0.1"]
    unmask.adapt(tokenizer_and_model, data, "ar", tmp_path / "run", **RUN | {"show_progress": True})
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    said = capsys.readouterr().err
    assert run["finished"]
    assert run["data"]["sources"] == data
    assert "24.4% of the tokens" in said
    assert "rows of 32 are filled to" in said
    capsys.readouterr()
    longer = RUN | {"max_tokens": run["tokens"] + 300, "resume": True}
    unmask.adapt(tokenizer_and_model, data, "ar", tmp_path / "run", **longer)
    other = [data[0].replace(":1", ":2"), *data[1:]]
    with pytest.raises(ValueError, match="holds a different run: its data is"):
        unmask.adapt(tokenizer_and_model, other, "ar", tmp_path / "run", **longer)


def test_prepared_data_beside_text_are_each_read_once(tokenizer_and_model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(STORIES[:20]))
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(STORIES[20:]))
    record = unmask.prepare(tmp_path / "b.txt", tokenizer_and_model, tmp_path / "b", show_progress=False)
    options = RUN | {"eval_documents": 0}
    unmask.adapt(tokenizer_and_model, [tmp_path / "a.txt", tmp_path / "b"], "ar", tmp_path / "run", **options)
    unmask.adapt(tokenizer_and_model, [tmp_path / "a.txt", tmp_path / "b.txt"], "ar", tmp_path / "text", **options)
    tokens = [json.loads((tmp_path / name / "run.json").read_text())["tokens"] for name in ("run", "text")]
    assert tokens[0] == tokens[1] > record["num_tokens"]


def test_a_set_of_the_hub_in_a_mixture_is_prepared_once(
    tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub's own loader, on a data set that lies on this disk under another name."""
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"body": text}) + "\n" for text in STORIES[20:]]
    (tmp_path / "set" / "train.jsonl").write_text("".join(lines))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in STORIES[:20]))
    opened, asked = datasets.load_dataset, []

    def load(name: str, **more: Any) -> Any:
        asked.append((name, more["split"]))
        return opened(str(tmp_path / "set"), **more)

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = RUN | {"text_column": "body", "split": "train", "eval_documents": 0}
    weighted = ["owner/set:3", f"{tmp_path / 'a.jsonl'}:1"]
    unmask.adapt(tokenizer_and_model, weighted, "ar", tmp_path / "hub", **options | {"show_progress": True})
    said = capsys.readouterr().err
    assert asked == [("owner/set", "train")]
    assert "  owner/set: 75.0% of the tokens" in said
    assert "owner/set" in (tmp_path / "hub" / "README.md").read_text().split("---")[1]
    # rows are those of the same text in files, which a later run finds prepared
    assert len(list(tmp_path.glob("prepared-*"))) == 1
    files = [f"{tmp_path / 'set' / 'train.jsonl'}:3", weighted[1]]
    del options["split"]
    unmask.adapt(tokenizer_and_model, files, "ar", tmp_path / "files", **options)
    metrics = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("hub", "files")]
    assert metrics[0] == metrics[1]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("prepared-*/*")}
    unmask.adapt(tokenizer_and_model, ["owner/set", str(tmp_path / "a.jsonl")], "ar", tmp_path / "once", **options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("prepared-*/*")} == before
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: opened(str(tmp_path / "none"), split="train"))
    with pytest.raises(ValueError, match="data 'owner/none' is no file here and cannot be opened on the hub"):
        unmask.adapt(tokenizer_and_model, ["owner/none:1", weighted[1]], "ar", tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


def test_a_split_of_the_hub_is_evaluated_on(
    tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on a stream, with figures of the first documents of another split; without one it says what is missing."""
    for split, texts in {"train": STORIES[20:], "validation": STORIES[:20], "test": STORIES[3:6]}.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{split}.jsonl").write_text("".join(lines))
    opened = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _name, **more: opened(str(tmp_path / "set"), **more))
    options = RUN | {"max_tokens": 300, "eval_documents": 3}
    figures = {}
    named = {name: str(tmp_path / "set" / f"{name}.jsonl") for name in ("test", "validation")}
    for name, evaluated in ({"hub": "owner/set:test", "unnamed": "owner/set"} | named).items():
        unmask.adapt(tokenizer_and_model, "owner/set", "ar", tmp_path / name, **options, eval_data=evaluated)
        figures[name] = json.loads((tmp_path / name / "run.json").read_text())["evaluation"]
    assert figures["hub"] == figures["test"] != figures["validation"] == figures["unnamed"]
    unmask.adapt(tokenizer_and_model, "owner/set", "ar", tmp_path / "none", **options | {"show_progress": True})
    assert "nothing is held out of a stream; eval_data=FILE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be opened on the hub: ValueError: Bad split: none"):
        unmask.adapt(tokenizer_and_model, "owner/set", "ar", tmp_path / "bad", **options, eval_data="owner/set:none")
