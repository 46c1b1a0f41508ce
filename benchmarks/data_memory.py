"""Memory and time of preparing data and of a run on them, for data of four shapes.

    python benchmarks/data_memory.py MODEL TEXT.txt SCRATCH [--cases tiny,long,large,copied] [--megabytes 2000]

tiny: a million documents of a few words. long: one document of 200 MB. large: TEXT again and again, in shards, up to
--megabytes. Each is prepared in one process, with the workers that it starts, and read in another, by a run of one
step. copied: what `large` would prepare, written from the tokens of TEXT, for the run alone. SCRATCH holds text and
tokens, which are deleted. A row is appended to rows.jsonl for each: seconds, CPU seconds of all processes together
(which other programs disturb little), and by how many MB the processes grew at
their largest (`peak_mb`; `private_mb` of it are no pages of mapped files) over what was there with the model loaded
and after a first, small one of the kind. Pages that processes share are counted once (PSS).
"""

import argparse
import functools
import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

MEGABYTE = 1 << 20
RUN: dict[str, Any] = {"max_length": 128, "block_size": 4, "batch_size": 8, "eval_documents": 0, "max_tokens": 1024,
                       "show_progress": False}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--cases", default="tiny,long,large,copied")
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("results/data"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for case in options.cases.split(","):
        folder = options.scratch / case
        folder.mkdir(parents=True)
        try:
            shape = functools.partial(copied, options.model) if case == "copied" else SHAPES[case]
            size = shape(options.text, folder, options.megabytes)
            for work in (adapt,) if case == "copied" else (prepare, adapt):
                row = {"case": case, "work": work.__name__, "megabytes": size // MEGABYTE}
                row |= in_a_process(work, options.model, folder)
                with (options.output / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
        finally:
            shutil.rmtree(folder)


# --- data of three shapes; each function returns its bytes


def tiny(_text: Path, folder: Path, _megabytes: int) -> int:
    path = folder / "text.jsonl"
    with path.open("w") as file:
        for number in range(1_000_000):
            file.write(json.dumps({"text": f"Once there was a cat, number {number}."}) + "\n")
    return path.stat().st_size


def long(text: Path, folder: Path, _megabytes: int) -> int:
    path = folder / "text.txt"
    content = text.read_text().replace("<|endoftext|>", "\n")
    with path.open("w") as file:
        while file.tell() < 200 * MEGABYTE:
            file.write(content)
    return path.stat().st_size


def large(text: Path, folder: Path, megabytes: int) -> int:
    content, shard, size = text.read_bytes(), 0, 0
    while size < megabytes * MEGABYTE:
        with (folder / f"text-{shard:05}.txt").open("wb") as file:
            while file.tell() < 100 * MEGABYTE and size < megabytes * MEGABYTE:
                size += file.write(content + b"<|endoftext|>")
        shard += 1
    return size


def copied(model: str, text: Path, folder: Path, megabytes: int) -> int:
    from contextlib import ExitStack

    from unmask.data import prepared
    from unmask.data.corpus import Writer
    from unmask.data.documents import Encoder, load_corpus
    from unmask.data.readers import Faults
    from unmask.loading import load_tokenizer

    tokenizer, ends = load_tokenizer(model)
    corpus = load_corpus([text], tokenizer, end_token_id=ends[0])
    documents = [corpus.document(index) for index in range(len(corpus))]
    place = folder / "prepared"
    place.mkdir()
    copies = -(-megabytes * MEGABYTE // text.stat().st_size)
    with ExitStack() as opened:
        writer = Writer(
            *(opened.enter_context((place / f"{n}.bin").open("wb")) for n in ("tokens", "offsets", "marks"))
        )
        for _ in range(copies):
            writer.add(documents)
    origin = prepared.made_of([text], Encoder(tokenizer, ends[0], Faults()), "text")
    record = {"format": 1, "num_documents": writer.num_documents, "num_tokens": writer.num_tokens, "has_marks": False,
              "fingerprint": "copied", "longest_example": None, "made_of": origin}  # fmt: skip
    (place / "prepared.json").write_text(json.dumps(record))
    return copies * text.stat().st_size


SHAPES: dict[str, Callable[[Path, Path, int], int]] = {"tiny": tiny, "long": long, "large": large}


# --- what is measured


def prepare(model: str, folder: Path) -> dict[str, Any]:
    import unmask

    few = folder.with_name("few.txt")
    few.write_text("Once there was a cat.")
    unmask.prepare(few, model, folder.with_name("few"), show_progress=False)
    shutil.rmtree(folder.with_name("few"))
    with growth() as grown:
        record = unmask.prepare(folder, model, folder / "prepared", show_progress=False)
    return {"documents": record["num_documents"], "tokens": record["num_tokens"], **grown}


def adapt(model: str, folder: Path) -> dict[str, Any]:
    import unmask

    lm = unmask.load(model)
    unmask.adapt(lm, ["Once there was a cat."] * 500, "ar", folder / "warm", **RUN)
    with growth() as grown:
        unmask.adapt(lm, folder / "prepared", "ar", folder / "run", **RUN)
    return dict(grown)


@contextmanager
def growth():
    """A dictionary that gets the seconds within the context, and by how many MB this process grew."""
    grown: dict[str, float] = {}
    ended, most, before = threading.Event(), memory(), memory()

    def watch() -> None:
        while not ended.wait(0.2):
            for name, value in memory().items():
                most[name] = max(most[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, computed = time.perf_counter(), cpu_seconds()
    yield grown
    grown["seconds"] = round(time.perf_counter() - began, 2)
    grown["cpu_seconds"] = round(cpu_seconds() - computed, 2)
    ended.set()
    watcher.join()
    grown |= {name: round((most[name] - before[name]) / 1024, 1) for name in before}


def cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    return sum(psutil.Process().cpu_times()[:4])


def memory() -> dict[str, int]:
    """KB of this process and those that it started: all, and without pages of files."""
    total = {"peak_mb": 0, "private_mb": 0}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        lines = dict(line.split(":", 1) for line in text.splitlines()[1:])
        total["peak_mb"] += int(lines["Pss"].split()[0])
        total["private_mb"] += int(lines["Pss_Anon"].split()[0])
    return total


def in_a_process(work: Callable[[str, Path], dict[str, Any]], model: str, folder: Path) -> dict[str, Any]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, model, folder).result()


if __name__ == "__main__":
    main()
