"""Memory and time of preparing data and of a run on them, for data of three shapes.

    python benchmarks/data_memory.py MODEL TEXT.txt SCRATCH [--cases tiny,long,large] [--megabytes 2000]

tiny: a million documents of a few words. long: one document of 200 MB. large: TEXT again and again, in shards, up to
--megabytes. Each is prepared by one process, and read by another, a run of one step: SCRATCH holds text and tokens,
which are deleted. A row is appended to rows.jsonl for each process: seconds, and by how much the process grew at its
largest (`peak_mb`, of which `private_mb` are not pages of mapped files) over what it was with the model loaded and,
for a run, after a first run on a few documents.
"""

import argparse
import json
import multiprocessing
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20
RUN: dict[str, Any] = {"max_length": 128, "block_size": 4, "batch_size": 8, "eval_documents": 0, "max_tokens": 1024,
                       "show_progress": False}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--cases", default="tiny,long,large")
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("results/data"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for case in options.cases.split(","):
        folder = options.scratch / case
        folder.mkdir(parents=True)
        try:
            size = SHAPES[case](options.text, folder, options.megabytes)
            for work in (prepare, adapt):
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
        while not ended.wait(0.02):
            for name, value in memory().items():
                most[name] = max(most[name], value)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    yield grown
    grown["seconds"] = round(time.perf_counter() - began, 2)
    ended.set()
    watcher.join()
    grown |= {name: round((most[name] - before[name]) / 1024, 1) for name in before}


def memory() -> dict[str, int]:
    """KB of this process: all, and without pages of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak_mb": int(lines["VmRSS"].split()[0]), "private_mb": int(lines["RssAnon"].split()[0])}


def in_a_process(work: Callable[[str, Path], dict[str, Any]], model: str, folder: Path) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (model, folder))


if __name__ == "__main__":
    main()
