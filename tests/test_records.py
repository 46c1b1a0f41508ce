"""Records and files as people have them: every format is read, whatever is broken is named, and no reader differs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import STORIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import unmask
from unmask.data.documents import Encoder, load_corpus
from unmask.data.packing import Packer, PackState
from unmask.data.readers import Faults, Place, Records, read, read_documents, read_examples
from unmask.data.records import read_record
from unmask.data.sources import in_memory
from unmask.data.streams import RecordStream, from_datasets
from unmask.data.supervised import Completion, Conversation, Instruction, encode_example

ASK, ANSWER = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Tom."}
AGAIN = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
SYSTEM = {"role": "system", "content": "Be short."}
CHAT = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_and_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_and_model)


# --- formats


FORMATS: list[tuple[dict[str, Any], Any]] = [
    ({"prompt": [ASK], "completion": [ANSWER]}, Conversation([ASK, ANSWER], 1)),
    ({"prompt": [ASK, ANSWER, AGAIN[0]], "completion": [AGAIN[1]]}, Conversation([ASK, ANSWER, *AGAIN], 3)),
    ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Tom."}]},
     Conversation([ASK, ANSWER])),
    ({"conversations": [ASK, ANSWER], "id": 3}, Conversation([ASK, ANSWER])),
    ({"system": "Be short.", "conversations": [{"from": "user", "value": "Who?"}, {"from": "model", "value": "Tom."}]},
     Conversation([SYSTEM, ASK, ANSWER])),
    ({"instruction": "Who?", "input": "", "output": "Tom."}, Instruction("Who?", "", "Tom.")),
    ({"instruction": "Who?", "output": "Tom."}, Instruction("Who?", "", "Tom.")),
    ({"instruction": "Where?", "input": "", "output": "Here.", "system": "Be short.", "history": [["Who?", "Tom."]]},
     Conversation([SYSTEM, ASK, ANSWER, *AGAIN])),
    ({"text": None, "messages": [ASK, ANSWER]}, Conversation([ASK, ANSWER])),
    ({"prompt": None, "completion": None, "text": "a"}, "a"),
    ({"text": "a", "output": "no instruction, so a column like any other"}, "a"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "example"), FORMATS)
def test_a_format_is_the_same_example_from_every_reader(record: dict[str, Any], example: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    for source in (tmp_path / "a.jsonl", tmp_path / "a.parquet", Records([record])):
        assert [one.example for one in read(source, "text", Faults())] == [example]


def test_an_instruction_is_a_chat_where_there_is_a_template_and_alpacas_prompt_otherwise(tokenizer: Any) -> None:
    example = Instruction("Add.", "1 and 2", "3")
    ((ids, mask),) = encode_example(tokenizer, example, None)
    learnt = [i for i, keep in zip(ids, mask, strict=True) if keep]
    assert tokenizer.decode(ids).endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3")
    assert tokenizer.decode(learnt) == "3"
    tokenizer.chat_template = CHAT
    ((ids, _),) = encode_example(tokenizer, example, None)
    assert tokenizer.decode(ids) == "user: Add.\n\n1 and 2\nassistant: 3\n"


def test_answers_in_a_prompt_of_messages_are_not_learnt(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    ((ids, mask),) = encode_example(tokenizer, Conversation([ASK, ANSWER, *AGAIN], 3), None)
    assert tokenizer.decode([i for i, keep in zip(ids, mask, strict=True) if keep]) == "Here.\n"
    given = load_corpus([Records([FORMATS[1][0]])], tokenizer)
    whole = load_corpus([Records([{"messages": [ASK, ANSWER, *AGAIN]}])], tokenizer)
    assert given.fingerprint != whole.fingerprint


BAD: list[tuple[dict[str, Any], str]] = [
    ({"text": None}, "holds null in column 'text'"),
    ({"text": None, "messages": None}, "holds null in column 'text'"),
    ({"prompt": "a", "completion": None}, "holds null in column 'completion'"),
    ({"prompt": None, "completion": "a"}, "holds null in column 'prompt'"),
    ({"messages": None}, "holds null in column 'messages'"),
    ({"text": True}, "holds a truth value in column 'text'"),
    ({"text": ["a"]}, "holds a list in column 'text'"),
    ({"text": {"a": "b"}}, "holds an object in column 'text'"),
    ({"prompt": "a", "completion": [ANSWER]}, "holds text in column 'prompt' and a list in 'completion'"),
    ({"prompt": [ASK], "completion": [ASK]}, "without one of the role 'assistant'"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "a message from 'narrator': known are human"),
    ({"conversations": "Who?"}, "holds text in column 'conversations'"),
    ({"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]}, "no list of objects"),
    ({"instruction": "Who?", "output": None}, "holds null in column 'output'"),
    ({"instruction": "Who?", "output": " "}, "has an empty output"),
    ({"instruction": "Who?", "input": 3, "output": "a"}, "holds a number in column 'input'"),
    ({"instruction": "Who?", "output": "a", "history": ["b"]}, "history that is no list of pairs"),
    ({"text": "a", "conversations": [ASK, ANSWER]}, "has both 'text' and 'conversations'"),
    ({"text": "a", "instruction": "b", "output": "c"}, "has both 'text' and 'output'"),
    ({"messages": [ASK, ANSWER], "tools": [{"name": "f"}]}, "holds 'tools', which are not read"),
    ({"messages": [ASK | {"more": json.loads("[" * 90 + "]" * 90)}, ANSWER]}, "nests deeper than 64"),
    ({"text": "a\ud83db"}, r"lone surrogate '\ud83d' at character 2 of 'a\ud83db'"),
    ({"prompt": "a", "completion": "\udc00"}, r"lone surrogate '\udc00' at character 1"),
    ({"messages": [ASK, ANSWER | {"name": "x\ud800"}]}, r"lone surrogate '\ud800' at character 2"),
]


@pytest.mark.parametrize(("record", "problem"), BAD)
def test_what_is_wrong_with_a_record_is_said_alike_by_every_reader(
    record: dict[str, Any], problem: str, tmp_path: Path, tokenizer: Any
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n\n" + json.dumps(record) + "\n" + '{"text": "fine"}\n')
    with pytest.raises(ValueError, match=rf"a.jsonl', line 3: {'.*' + re.escape(problem)}.*skip_invalid=true"):
        list(read_examples(path))
    records = [{"text": "good"}, record, {"text": "fine"}]
    with pytest.raises(ValueError, match=f"data, record 2: .*{re.escape(problem)}"):
        load_corpus([Records(records)], tokenizer)
    with pytest.raises(ValueError, match=f"shuffled record . {{.*: .*{re.escape(problem)}"):
        list(stream_of(records, tokenizer).stream(0, 0, 0))
    for source in (path, Records(records)):
        assert [one.example for one in read(source, "text", Faults(skip=True))] == ["good", "fine"]
    kept = [d for documents in stream_of(records, tokenizer, skip=True).stream(0, 0, 0) for d in documents]
    assert sorted(tokenizer.decode(d.ids) for d in kept) == ["fine", "good"]


def stream_of(records: list[dict[str, Any]], tokenizer: Any, skip: bool = False, **limits: Any) -> RecordStream:
    data = datasets.IterableDataset.from_generator(lambda: iter(records))
    return RecordStream(data, "stream", Encoder(tokenizer, None, Faults(skip), **limits), text_column="text",
                        fingerprint="")  # fmt: skip


# --- bytes


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("before", [b"", MARK, b" \r\n", MARK + b"\r\n"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_marks_line_ends_and_empty_lines_change_no_document(before: bytes, end: bytes, tmp_path: Path) -> None:
    lines = [b'{"text": "one"}', b"", b'{"text": "  "}', MARK + b'{"text": "\xef\xbb\xbftwo "}', b"  "]
    (tmp_path / "a.jsonl").write_bytes(before + end.join(lines))
    (tmp_path / "a.txt").write_bytes(before + b"<|endoftext|>".join([b"one", b"", end + MARK + b"two" + end, MARK]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["\ufeffone", "", " \ufeff", "two"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        assert list(read_documents(tmp_path / name)) == ["one", "two"]
    assert [r.example for r in read(Records(["\ufeffone", "", "two\r\n"]), "text", Faults())] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "problem", "kept"),
    [
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: is JSON that nests too deeply", []),
        ("a.jsonl", b'{"text": "a"}\n{"n": ' + b"1" * 5000 + b"}", "line 2: is JSON that cannot be read", ["a"]),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "line 1: is UTF-16 or UTF-32", []),
        ("a.txt", "ab".encode("utf-16"), "line 1: is UTF-16 or UTF-32", []),
        ("a.txt", b"a\n<|endoftext|>\n\nb\n\xff", "line 5: is not UTF-8", ["a"]),
    ],
)
def test_bytes_that_are_no_record_are_named(
    name: str, content: bytes, problem: str, kept: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}', {problem}"):
        list(read_examples(tmp_path / name))
    assert list(read_examples(tmp_path / name, skip_invalid=True)) == kept


def test_a_broken_row_of_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"a", b"\xff\xfe", b"b", None], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    with pytest.raises(ValueError, match=r"a.parquet', row 2: holds a value that cannot be read"):
        list(read_examples(path))
    assert list(read_examples(path, skip_invalid=True)) == ["a", "b"]
    damaged = bytearray(path.read_bytes())
    damaged[4:40] = bytes(36)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a.parquet' is not parquet, or is damaged"):
        list(read_examples(path))


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]),
                                                               inner, max_size=3), max_leaves=6)  # fmt: skip
NAMES = st.sampled_from(["text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output",
                         "system", "history", "tools", "other"])  # fmt: skip
RECORDS = st.dictionaries(NAMES, VALUES | st.just([ASK, ANSWER]), max_size=4)
LINES = st.one_of(
    RECORDS.map(lambda record: json.dumps(record).encode()),
    RECORDS.map(lambda record: json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.text(max_size=10).flatmap(lambda text: st.sampled_from(["utf-8", "utf-16", "utf-32"]).map(
        lambda name: text.encode(name, "surrogatepass"))),
    st.binary(max_size=12), st.just(b"<|endoftext|>"), st.just(MARK), st.just(b'{"a":' * 3000),
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(lines=st.lists(LINES, max_size=4), end=st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n"]))
def test_no_file_breaks_a_reader(lines: list[bytes], end: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every byte sequence is documents, or an error that names file and line."""
    folder = tmp_path_factory.getbasetemp()
    for name in ("fuzz.jsonl", "fuzz.txt"):
        (folder / name).write_bytes(end.join(lines))
        kept = list(read_examples(folder / name, skip_invalid=True))
        for example in kept:
            assert not isinstance(example, str) or example.encode().strip()
        try:
            assert list(read_examples(folder / name)) == kept
        except ValueError as error:
            assert re.match(rf"data file '.*{name}', line \d+: ", str(error))  # noqa: PT017


@settings(max_examples=80, deadline=None)
@given(records=st.lists(RECORDS, min_size=1, max_size=4))
def test_no_record_breaks_a_corpus(records: list[Any], tokenizer_and_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    tokenizer.chat_template = CHAT
    for skip in (False, True):
        try:
            corpus = load_corpus([Records(records)], tokenizer, end_token_id=1, skip_invalid=skip)
        except ValueError as error:
            assert re.match(r"data(, record \d+: | holds no documents)", str(error))  # noqa: PT017
        else:
            assert len(corpus) >= 1


# --- streams


def test_a_stream_holds_what_a_file_of_the_same_records_holds(tokenizer: Any) -> None:
    """Conversations that make several documents, texts, and records that are left out; resumable at any row."""
    tokenizer.chat_template = CHAT.replace("m.content", "(m.content if loop.last else 'said')")
    records = [{"text": None, "messages": None}, {"text": "Once there was a cat."}, {"text": " "},
               {"messages": [ASK, ANSWER, *AGAIN]}, {"text": "The end of it."}] * 3  # fmt: skip
    corpus = load_corpus([Records(records)], tokenizer, skip_invalid=True)
    stream = stream_of(records, tokenizer, skip=True)
    streamed = [d for documents in stream.stream(0, 0, 0) for d in documents]
    assert sorted(d.ids.tolist() for d in streamed) == sorted(corpus[i].tolist() for i in range(len(corpus)))
    straight = Packer(stream, 8, seed=1)
    rows = [(straight.batch(1), straight.state) for _ in range(60)]
    for at in range(0, 50, 7):
        resumed = Packer(stream, 8, seed=1, state=PackState(**vars(rows[at][1])))
        for batch, _ in rows[at + 1 : at + 8]:
            again = resumed.batch(1)
            assert batch is not None
            assert again is not None
            assert again.x0.tolist() == batch.x0.tolist()


def test_long_examples_of_a_stream_are_named(tokenizer: Any) -> None:
    records = [{"prompt": "a", "completion": "b" * 40}]
    with pytest.raises(ValueError, match=r"stream, shuffled record 1 .*makes \d+ tokens: raise max_length=8"):
        list(stream_of(records, tokenizer, max_length=8).stream(0, 0, 0))


def test_a_stream_that_breaks_is_named(tokenizer: Any) -> None:
    def broken() -> Any:
        yield {"text": "a"}
        raise RuntimeError("the connection is gone")

    data = datasets.IterableDataset.from_generator(broken)
    stream = RecordStream(data, "stream", Encoder(tokenizer, None, Faults()), text_column="text", fingerprint="")
    with pytest.raises(ValueError, match=r"stream cannot be read to its end: .*the connection is gone"):
        list(stream.stream(0, 0, 0))


# --- data in Python


RUN = {"max_length": 16, "batch_size": 2, "block_size": 4, "max_tokens": 64, "eval_documents": 0}


@pytest.mark.parametrize("kind", ["texts", "records", "generator", "Dataset", "DatasetDict", "IterableDataset"])
def test_adapt_takes_texts_records_and_data_sets(kind: str, tokenizer_and_model: Path, tmp_path: Path) -> None:
    records = [{"text": story} for story in STORIES]
    data: Any = {
        "texts": lambda: list(STORIES),
        "records": lambda: records,
        "generator": lambda: (record for record in records),
        "Dataset": lambda: datasets.Dataset.from_list(records),
        "DatasetDict": lambda: datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}),
        "IterableDataset": lambda: datasets.IterableDataset.from_generator(lambda: iter(records)),
    }[kind]()
    unmask.adapt(tokenizer_and_model, data, "ar", tmp_path / "a", show_progress=False, **RUN)  # type: ignore[arg-type]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["finished"]
    assert run["tokens"] == 64
    if kind != "IterableDataset":
        unmask.adapt(tokenizer_and_model, tmp_path / "a.jsonl", "ar", tmp_path / "b", show_progress=False, **RUN)  # type: ignore[arg-type]
        of_file = json.loads((tmp_path / "b" / "run.json").read_text())
        assert run["data"]["fingerprint"] == of_file["data"]["fingerprint"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"text": "one record"}, "data is an object: give files"),
        (7, "data is a number: give files"),
        (["stories.txt", "Once upon a time."], r"data mixes 'stories.txt', which names a file, with 'Once"),
        ([Path("stories.txt"), {"text": "a"}], "data mixes 'stories.txt'"),
    ],
)
def test_data_that_are_none_are_named(data: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        in_memory(data)


def test_names_are_names_and_texts_are_texts() -> None:
    for names in ("a.txt", Path("a"), ["a.txt"], ["owner/name"], ["./a b"], ["with space.jsonl"], ["self"], []):
        assert in_memory(names) is None
    for texts in (["Once upon a time."], ["one", "two words"], ["x\n" * 9999], [{"text": "a.txt"}]):
        assert in_memory(texts) == Records(texts)
    sets = datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "a"}])})
    with pytest.raises(ValueError, match=r"no split 'train', found \['test'\]"):
        from_datasets(sets, "train")
    assert from_datasets(sets, "test") == Records(sets["test"], "data set in memory")


def test_what_is_left_out_is_said(tokenizer: Any) -> None:
    lines: list[str] = []
    load_corpus([Records([{"text": None}] * 30 + [{"text": "a"}])], tokenizer, skip_invalid=True, note=lines.append)
    assert [line.split()[0] for line in lines] == ["1", "10"]
    assert lines[0].endswith("data, record 1: holds null in column 'text', not text")


def test_places_read_well() -> None:
    assert str(Place("data file 'a'", "line", 3)) == "data file 'a', line 3"
    assert read_record({"text": "a"}, "text") == "a"
    assert read_record({"prompt": "a", "completion": "b"}, "text") == Completion("a", "b")
