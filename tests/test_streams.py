"""Streams: tokenised ahead in the background, by one process for all, and the same rows for every number of them."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import STORIES
from test_ranks import launch
from transformers import AutoTokenizer

import unmask
from unmask.data import prepared
from unmask.data.documents import Encoder
from unmask.data.packing import Packer, PackState
from unmask.data.readers import Faults
from unmask.data.streams import RecordStream, in_background

SCRIPT = """
import json, os, sys
from pathlib import Path
os.environ["HF_HUB_OFFLINE"] = "1"
from test_streams import run
from unmask.training.ranks import join, leave

model, folder = sys.argv[1], Path(sys.argv[2])
ranks = join()
told = [run(model, folder / f"{name}.jsonl", folder / f"{name} on 2") for name in ("fine", "broken")]
told.append(run(model, folder / "fine.jsonl", folder / "file on 2", streamed=False))
(folder / f"told-{ranks.process_index}.json").write_text(json.dumps(told))
ranks.wait_for_everyone()
leave()
"""


def run(model: str | Path, data: Path, output: Path, *, streamed: bool = True) -> dict[str, Any]:
    """A run on a stream, or on prepared data: records that this process tokenised, its error, threads that are left."""
    source: Any = data
    if streamed:
        source = datasets.load_dataset("json", data_files=str(data), split="train", streaming=True)
    told: dict[str, Any] = {"records": 0, "error": None}
    encode = Encoder.__call__

    def counted(self: Encoder, batch: Any) -> Any:
        told["records"] += len(batch)
        return encode(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "__call__", counted)
        patch.setattr(prepared, "SMALL", 0)
        try:
            unmask.adapt(unmask.load(model), source, "ar", output, max_length=32, block_size=4, batch_size=4,
                         eval_documents=0, log_every=1, max_tokens=700, show_progress=False)  # fmt: skip
        except ValueError as error:
            told["error"] = str(error)
    return told | {"threads": names().count("stream")}


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": r} if isinstance(r, str) else r) + "\n" for r in records))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_stream_is_read_by_one_process_for_all_and_is_the_same_for_any_number(
    tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    data = write(tmp_path / "fine.jsonl", STORIES)
    write(tmp_path / "broken.jsonl", [*STORIES[:20], {"text": 5}])
    alone = run(tokenizer_and_model, data, tmp_path / "fine on 1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    launch(2, [str(tmp_path / "run.py"), str(tokenizer_and_model), str(tmp_path)])
    main, other = (json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(2))
    assert main[0] == alone
    assert alone["records"] > 0
    assert [told["records"] for told in other] == [0, 0, 0]
    for told in (main, other):
        assert "holds a number in column 'text'" in told[1]["error"]
        assert [each["threads"] for each in told] == [0, 0, 0]
        assert told[2]["error"] is None
    assert len(list(tmp_path.glob("prepared-*"))) == 1  # written by one process and its workers, mapped by both
    run(tokenizer_and_model, data, tmp_path / "file on 1", streamed=False)
    for name in ("fine", "file"):
        ours, theirs = rows_of(tmp_path / f"{name} on 2"), rows_of(tmp_path / f"{name} on 1")
        assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
        for row, expected in zip(ours, theirs, strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


# --- in the background


@pytest.fixture
def stream(tokenizer_and_model: Path) -> RecordStream:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    data = datasets.Dataset.from_list([{"text": story} for story in STORIES]).to_iterable_dataset()
    return RecordStream(data, "stream", Encoder(tokenizer, 1, Faults()), text_column="text", fingerprint="")


def test_what_is_made_ahead_is_what_is_made_when_asked(stream: RecordStream) -> None:
    made = [d.ids.tolist() for (d,) in stream.stream(0, 0, 0)]
    assert made == [d.ids.tolist() for batch in stream._batches(0, 0, 0) for (d,) in batch]
    straight = Packer(stream, 16, seed=0)
    for _ in range(5):
        straight.batch(3)
    resumed = Packer(stream, 16, seed=0, state=PackState(**vars(straight.state)))
    for _ in range(5):
        assert resumed.batch(3).x0.equal(straight.batch(3).x0)


def test_items_come_in_order_a_few_ahead_and_errors_where_they_belong() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            taken.append(number)
            yield number
        raise KeyError("the end")

    found = in_background(items())
    assert next(found) == 0
    time.sleep(0.3)
    assert 3 < len(taken) < 10
    assert [next(found) for _ in range(99)] == list(range(1, 100))
    with pytest.raises(KeyError, match="the end"):
        next(found)
    assert "stream" not in names()


def test_whoever_stops_asking_leaves_no_thread() -> None:
    found = in_background(iter(range(10**9)))
    assert [next(found), next(found)] == [0, 1]
    assert "stream" in names()
    found.close()
    assert "stream" not in names()
    assert list(in_background(iter(()))) == []
