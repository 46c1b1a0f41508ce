"""Prepared data: written once and whole, the same rows as from the text, nothing in memory that grows with them."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import STORIES
from transformers import AutoTokenizer

import unmask
from unmask import cli
from unmask.data import corpus, documents, prepared, workers
from unmask.data.corpus import Corpus, Document, Writer, order, shuffled
from unmask.data.documents import Encoder, load_corpus
from unmask.data.packing import Packer, PackState
from unmask.data.readers import Faults, Records
from unmask.run_folder import whole_folder

RUN: dict[str, Any] = {"max_length": 32, "block_size": 4, "batch_size": 4, "eval_documents": 2, "log_every": 1,
                       "save_every": 4, "show_progress": False}  # fmt: skip
QUIZ = [{"prompt": f"Who ran to the {place}?", "completion": f" The {animal}."}
        for place in ("garden", "sun") for animal in ("cat", "dog", "mouse")]  # fmt: skip


@pytest.fixture
def tokenizer(tokenizer_and_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_and_model)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": r} if isinstance(r, str) else r) + "\n" for r in records))
    return path


def assert_equal(ours: Corpus, theirs: Corpus) -> None:
    assert ours.fingerprint == theirs.fingerprint
    assert np.array_equal(ours.offsets, theirs.offsets)
    assert np.array_equal(ours.tokens, theirs.tokens)
    assert (ours.loss_mask is None) == (theirs.loss_mask is None)
    assert ours.loss_mask is None or np.array_equal(ours.loss_mask, theirs.loss_mask)


# --- the order of an epoch


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (3, 2)])
def test_the_order_of_an_epoch_is_that_of_older_runs(size: int, seed: int, epoch: int) -> None:
    expected = np.random.default_rng([seed, epoch]).permutation(size).tolist()
    assert list(order(size, seed, epoch)) == expected
    assert list(order(size, seed, epoch, size // 2)) == expected[size // 2 :]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 40_000])
def test_an_order_without_an_array_holds_every_number_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_SHUFFLED", 0)
    found = list(order(size, 1, 0))
    assert sorted(found) == list(range(size))
    assert list(order(size, 1, 0, size // 3)) == found[size // 3 :]
    if size > 60:
        assert found != list(order(size, 1, 1)) != list(order(size, 2, 1))
        assert abs(np.corrcoef(found, np.arange(size))[0, 1]) < 4 / size**0.5
        assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 4 / size**0.5


def test_places_of_a_huge_order_are_computed_alone() -> None:
    place = shuffled(10**12, ("a",))
    numbers = np.arange(10**12 - 1000, 10**12)
    assert len(set(place(numbers).tolist())) == 1000
    assert place(numbers[7:8]) == place(numbers)[7]
    assert 0 <= place(numbers).min() < place(numbers).max() < 10**12


# --- what is written


@pytest.mark.parametrize("records", [STORIES, QUIZ, [*STORIES[:5], *QUIZ, *STORIES[5:9]]])
def test_a_prepared_corpus_is_that_of_memory(records: list[Any], tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", records)
    expected = load_corpus([file], tokenizer, end_token_id=1)
    encoder = Encoder(tokenizer, 1, Faults())
    said: list[str] = []
    for _ in "ab":  # written, then found
        found = prepared.cached(tmp_path, [file], encoder, "text", note=said.append)
        assert found is not None
        assert_equal(found, expected)
    (place,) = tmp_path.glob("prepared-*")
    assert said == [f"the tokens are kept in {str(place)!r} for later runs: remove it when none needs them"]
    for ours, theirs in zip(found.split(3), expected.split(3), strict=True):
        assert_equal(ours, theirs)
    assert found.tokens_per_row(32) == expected.tokens_per_row(32)
    assert found.longest() == max(len(expected[i]) for i in range(len(expected)))
    packers = [Packer(source, 32, seed=1) for source in (found, expected)]
    for _ in range(20):
        ours, theirs = (packer.batch(3) for packer in packers)
        assert torch.equal(ours.x0, theirs.x0)


def test_what_decides_tokens_makes_a_folder_of_its_own(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", STORIES)

    def folders(encoder: Encoder, column: str = "text") -> int:
        prepared.cached(tmp_path, [file], encoder, column)
        return len(list(tmp_path.glob("prepared-*")))

    assert folders(Encoder(tokenizer, 1, Faults())) == 1
    assert folders(Encoder(tokenizer, 1, Faults(), max_length=8)) == 1  # of examples alone, and nothing is left out
    assert folders(Encoder(tokenizer, None, Faults())) == 2
    assert folders(Encoder(tokenizer, 1, Faults(skip=True), max_length=8)) == 3
    assert folders(Encoder(tokenizer, 1, Faults(skip=True), max_length=9)) == 4
    file.write_text(file.read_text() + json.dumps({"text": "more"}) + "\n")
    assert folders(Encoder(tokenizer, 1, Faults())) == 5
    assert prepared.cached(tmp_path, [Records(STORIES)], Encoder(tokenizer, 1, Faults()), "text") is None
    assert not list(tmp_path.glob("*.partial"))


def test_a_mask_token_makes_no_other_tokenizer_and_any_other_change_does(tokenizer_and_model: Path) -> None:
    def fresh() -> Any:
        return AutoTokenizer.from_pretrained(tokenizer_and_model)

    plain, masked, more, chat = fresh(), fresh(), fresh(), fresh()
    masked.add_special_tokens({"mask_token": "<m>"})
    more.add_tokens(["cat"])
    chat.chat_template = "{{ messages }}"
    of = prepared.tokenizer_fingerprint
    assert of(plain) == of(fresh()) == of(masked)
    plain(STORIES[:3], truncation=True, max_length=4)
    assert of(plain) == of(fresh())
    assert len({of(plain), of(more), of(chat)}) == 3


def test_an_error_leaves_nothing_behind(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\nbroken\n')
    with pytest.raises(ValueError, match=r"a.jsonl', line 2: is not JSON"):
        prepared.prepare(tmp_path / "out", [file], Encoder(tokenizer, 1, Faults()), "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def _writes(folder: Path, results: Any) -> None:
    with whole_folder(folder) as partial:
        results.put(partial is not None)
        if partial is not None:
            (partial / "a").write_text("whole")


def test_of_several_writers_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "left").touch()  # by a killed process
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_writes, args=(tmp_path / "x", results)) for _ in range(6)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=30) for _ in processes) == [False] * 5 + [True]
    for process in processes:
        process.join()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]


# --- several processes


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_write_what_one_writes(
    processes: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts, examples, what is left out and what is said of it; a batch that is too long to be sent too."""
    monkeypatch.setattr(documents, "BATCH", 7)
    monkeypatch.setattr(workers, "LONG", 100)
    long = {"prompt": "Who?", "completion": " The cat and the dog" * 20}
    records = [*STORIES[:30], *QUIZ, {"body": 1}, long, " ".join(STORIES * 2), long, *STORIES[30:], {"text": 5}]
    file = write(tmp_path / "a.jsonl", records)
    said: dict[int, list[str]] = {1: [], processes: []}
    for number, lines in said.items():
        encoder = Encoder(tokenizer, 1, Faults(True, lines.append), max_length=60)
        prepared.prepare(tmp_path / f"{number}", [file], encoder, "text", processes=number)
    assert_equal(*(prepared.open_prepared(tmp_path / f"{number}") for number in said))
    one, several = (prepared.read_record(tmp_path / f"{number}") for number in said)
    assert one == several
    assert one["left_out"] == 4
    assert said[1] == said[processes] != []


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([*STORIES[:40], {"body": 1}, *STORIES], r"line 41: has no text column"),
        ([*STORIES[:20], {"prompt": "Who?", "completion": "</s>"}, {"body": 1}, *STORIES], r"line 22: has no text"),
        ([], r"holds no documents"),
    ],
)
def test_the_first_fault_is_raised_by_several_processes_too(
    records: list[Any], message: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "BATCH", 7)
    file = write(tmp_path / "a.jsonl", records)
    for number in (1, 2):
        with pytest.raises(ValueError, match=message):
            prepared.prepare(tmp_path / "out", [file], Encoder(tokenizer, 1, Faults()), "text", processes=number)
    assert not multiprocessing.active_children()


class Killed:
    """A tokenizer whose process is killed."""

    def __call__(self, *_arguments: Any, **_options: Any) -> Any:
        os._exit(9)


def test_a_killed_process_is_said(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", STORIES)
    writer = Writer.in_memory()
    with pytest.raises(ValueError, match="one of 2 processes that tokenise was killed"):
        documents.encode_sources([file], Encoder(Killed(), 1, Faults()), "text", writer, encode=workers.in_processes(2))


@pytest.mark.parametrize("number", [0, -1, 5000])
def test_a_number_of_processes_that_cannot_be_is_named(number: int, tokenizer_and_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"num_processes {number} must be at"):
        unmask.prepare(STORIES, tokenizer_and_model, tmp_path / "p", num_processes=number)


def _in_a_pool(number: int) -> str:
    assert workers.default_processes() == 1
    try:
        workers.check_processes(number)
    except ValueError as error:
        return str(error)
    return ""


def test_a_worker_of_a_pool_tokenises_alone() -> None:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert "num_processes=2: this system, or this worker of a pool" in pool.apply(_in_a_pool, (2,))
        assert pool.apply(_in_a_pool, (1,)) == ""


# --- what is read


def test_a_damaged_folder_is_named(tokenizer: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", QUIZ)
    place = tmp_path / "p"
    prepared.prepare(place, [file], Encoder(tokenizer, 1, Faults()), "text")
    tokens = (place / "tokens.bin").read_bytes()
    (place / "tokens.bin").write_bytes(tokens[:-4])
    with pytest.raises(ValueError, match=rf"p' are damaged: tokens.bin has {len(tokens) - 4} bytes, not {len(tokens)}"):
        prepared.open_prepared(place)
    (place / "tokens.bin").unlink()
    with pytest.raises(ValueError, match=r"tokens\.bin has None bytes"):
        prepared.open_prepared(place)
    record = json.loads((place / "prepared.json").read_text())
    (place / "prepared.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(ValueError, match="have format 99, and this version reads 1"):
        prepared.open_prepared(place)
    (place / "prepared.json").write_text("{")
    with pytest.raises(ValueError, match=r"prepared.json' is damaged"):
        prepared.open_prepared(place)


def test_a_mapped_corpus_keeps_no_pages(tmp_path: Path) -> None:
    """Reading all of 64 MB leaves the process as large as before."""
    with ExitStack() as opened:
        files = [opened.enter_context((tmp_path / f"{name}.bin").open("wb")) for name in ("tokens", "offsets", "marks")]
        writer = Writer(*files)
        for _ in range(16):
            writer.add([Document(np.ones(1000, dtype=np.int32))] * 1000)
    record = {"format": 1, "num_tokens": 16_000_000, "num_documents": 16_000, "has_marks": False, "fingerprint": "x",
              "made_of": {}}  # fmt: skip
    (tmp_path / "prepared.json").write_text(json.dumps(record))
    packer = Packer(prepared.open_prepared(tmp_path), 1000, seed=0, epochs=1)
    before, most = _mapped(), 0
    while packer.batch(64) is not None:
        most = max(most, _mapped())
    assert most - before < 8e6


def _mapped() -> int:
    """Bytes of files that this process maps."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


# --- runs


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_prepared_data_is_the_run_on_the_text(
    tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.jsonl", [*STORIES, *QUIZ])
    record = unmask.prepare(file, tokenizer_and_model, tmp_path / "p", show_progress=False)
    assert record["num_documents"] == len(STORIES) + len(QUIZ)
    assert unmask.prepare(file, tokenizer_and_model, tmp_path / "p", show_progress=False) == record
    unmask.adapt(tokenizer_and_model, file, "ar", tmp_path / "runs" / "text", **RUN)
    assert not list((tmp_path / "runs").glob("prepared-*"))  # little text stays in memory
    unmask.adapt(tokenizer_and_model, tmp_path / "p", "ar", tmp_path / "runs" / "prepared", **RUN)
    monkeypatch.setattr(prepared, "SMALL", 0)
    unmask.adapt(tokenizer_and_model, file, "ar", tmp_path / "runs" / "cached", **RUN)
    monkeypatch.setattr("unmask.data.prepared.encode_sources", None)
    unmask.adapt(tokenizer_and_model, file, "ar", tmp_path / "runs" / "again", **RUN)
    assert len(list((tmp_path / "runs").glob("prepared-*"))) == 1
    expected = rows_of(tmp_path / "runs" / "text")
    for name in ("prepared", "cached", "again"):
        assert rows_of(tmp_path / "runs" / name) == expected
        run, text = (json.loads((tmp_path / "runs" / n / "run.json").read_text()) for n in (name, "text"))
        assert run["data"]["fingerprint"] == text["data"]["fingerprint"]
    # a run that began on the text goes on with the prepared data
    unmask.adapt(tokenizer_and_model, tmp_path / "p", "ar", tmp_path / "runs" / "text", resume=True, **RUN)


@pytest.mark.parametrize("kind", ["set", "stream", "texts", "splits"])
def test_whatever_adapt_reads_is_prepared(kind: str, tokenizer_and_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": story} for story in STORIES])
    data = {"set": rows, "stream": rows.to_iterable_dataset(), "texts": STORIES,
            "splits": datasets.DatasetDict({"train": rows})}[kind]  # fmt: skip
    options = {"split": "train"} if kind == "splits" else {}
    unmask.prepare(data, tokenizer_and_model, tmp_path / "p", show_progress=False, **options)
    assert_equal(prepared.open_prepared(tmp_path / "p"), load_corpus([Records(STORIES)], tokenizer, end_token_id=1))


def test_a_set_of_the_hub_is_read_to_its_end(
    tokenizer_and_model: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own loader, on a data set that lies on this disk under another name."""
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", STORIES)
    opened = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _name, **more: opened(str(tmp_path / "set"), **more))
    record = unmask.prepare("owner/set", tokenizer_and_model, tmp_path / "p", show_progress=False)
    assert_equal(prepared.open_prepared(tmp_path / "p"), load_corpus([Records(STORIES)], tokenizer, end_token_id=1))
    assert unmask.prepare("owner/set", tokenizer_and_model, tmp_path / "p", show_progress=False) == record
    with pytest.raises(ValueError, match="p' holds other prepared data"):
        unmask.prepare("owner/other", tokenizer_and_model, tmp_path / "p", show_progress=False)


def test_prepared_data_of_another_model_are_refused(tokenizer_and_model: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", STORIES)
    unmask.prepare(file, tokenizer_and_model, tmp_path / "p", show_progress=False)
    lm = unmask.load(tokenizer_and_model)
    with pytest.raises(ValueError, match=r"p' were made with end token 1, not 0: .* its end_token"):
        unmask.adapt(lm, tmp_path / "p", "ar", tmp_path / "r", end_token="<s>", **RUN)
    with pytest.raises(ValueError, match=r"skip_invalid=true needs data that are not prepared yet"):
        unmask.adapt(lm, tmp_path / "p", "ar", tmp_path / "r", skip_invalid=True, **RUN)
    with pytest.raises(ValueError, match=r"text_column='body' needs data with columns"):
        unmask.adapt(lm, tmp_path / "p", "ar", tmp_path / "r", text_column="body", **RUN)
    lm.tokenizer.add_tokens(["cat"])
    with pytest.raises(ValueError, match=r"p' were made with another tokenizer"):
        unmask.adapt(lm, tmp_path / "p", "ar", tmp_path / "r", **RUN)
    with pytest.raises(ValueError, match=r"p' holds prepared data, where text is needed"):
        unmask.adapt(tokenizer_and_model, file, "ar", tmp_path / "r", **RUN, eval_data=str(tmp_path / "p"))


def test_examples_longer_than_a_row_are_named_by_whoever_has_rows(tokenizer_and_model: Path, tmp_path: Path) -> None:
    long = {"prompt": "Who?", "completion": " The cat and the dog" * 20}
    file = write(tmp_path / "a.jsonl", [*STORIES, *QUIZ, long])
    record = unmask.prepare(file, tokenizer_and_model, tmp_path / "p", show_progress=False)
    with pytest.raises(ValueError, match=rf"a.jsonl', line {len(STORIES) + 7}: .* \d+ tokens: raise max_length=32"):
        unmask.adapt(tokenizer_and_model, tmp_path / "p", "ar", tmp_path / "r", **RUN)
    fewer = unmask.prepare(file, tokenizer_and_model, tmp_path / "q", show_progress=False, max_length=32,
                           skip_invalid=True)  # fmt: skip
    assert (fewer["left_out"], fewer["num_documents"]) == (1, record["num_documents"] - 1)
    unmask.adapt(tokenizer_and_model, tmp_path / "q", "ar", tmp_path / "r", **RUN)
    with pytest.raises(ValueError, match=r"q' holds other prepared data"):
        unmask.prepare(file, tokenizer_and_model, tmp_path / "q", show_progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "data file 'missing.txt' does not exist"),
        (["max_length=9"], "no data in 'max_length=9'"),
        (["a.jsonl", "max_length=9"], "max_length=9 needs skip_invalid=true"),
        (["a.jsonl", "batch_size=9"], "batch_size=9 is read by `adapt` alone"),
        (["a.jsonl", "split=test"], "split='test' needs a data set with splits"),
        (["a.jsonl", "end_token=<none>"], "end_token '<none>' is no token"),
        (["a.jsonl", "text_column=body"], "no text column 'body'"),
    ],
)
def test_the_command_says_what_is_wrong(
    arguments: list[str], message: str, tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", STORIES)
    command = ["unmask", "prepare", *arguments, "--model", str(tokenizer_and_model), "--output", "out"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_the_command_prepares(
    tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    file = write(tmp_path / "texts" / "a.jsonl", STORIES)
    command = ["unmask", "prepare", str(file.parent), "--model", str(tokenizer_and_model), "--output",
               str(tmp_path / "out"), "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        cli.main()
    shown = json.loads(capsys.readouterr().out)
    found = prepared.open_prepared(tmp_path / "out")
    assert shown == {"output": str(tmp_path / "out"), "num_documents": len(STORIES), "num_tokens": found.num_tokens,
                     "num_bytes": sum(len(s.encode()) for s in STORIES), "left_out": 0}  # fmt: skip
    assert_equal(found, load_corpus([file], AutoTokenizer.from_pretrained(tokenizer_and_model), end_token_id=1))
    state = PackState(0, 3, 2)
    assert Packer(found, 16, seed=0, state=state).batch(1) is not None
