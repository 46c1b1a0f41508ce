"""Runs on several processes, which the tests compare with the run of one: cases, how they are started, what is equal.

`start` forks ranks from a process that has imported everything, as torchrun would start them. As a script,
`torchrun ... ranks.py FOLDER`, this file is one of the ranks: it runs the cases of FOLDER/cases.json (name ->
arguments of `unmask.adapt`) and writes FOLDER/rank-<n>.json: how many ranks there are, the seconds of each case, and
a hash of the weights that it ended with, or its error.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from conftest import STORIES
from transformers.utils import logging as hf_logging

import unmask
import unmask.conversion  # what a run imports, so that forked ranks have it
from unmask import hf
from unmask.training import loop, ranks
from unmask.training.ranks import join, leave

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

# --- cases

RUN = {"max_tokens": 900, "max_length": 32, "block_size": 4, "batch_size": 6, "log_every": 1, "eval_every": 2,
       "learning_rate": 1e-3}  # fmt: skip
CUT = {"save_every": 2, "keep_checkpoints": 9}
SELF = {"self_mode": "diffusion", "self_every": 2, "max_tokens": 700, "max_length": 24, "masking": "all",
        "random_offset": False, "self_steps": 2, "self_end": False}  # fmt: skip
ONE_PASS = {"max_tokens": None, "eval_documents": 1}

CASES: dict[str, dict[str, Any]] = {
    "ar": {"recipe": "ar"},
    "bd3lm": {"recipe": "bd3lm"},
    "diffullama": {"recipe": "diffullama", "anneal_steps": 3},
    "efficient-dlm": {"recipe": "efficient-dlm", **CUT},
    "fast-dllm-v2": {"recipe": "fast-dllm-v2"},
    "tri-mode": {"recipe": "tri-mode-published"},
    "drafter": {"recipe": "drafter"},
    "micro-batches": {"recipe": "diffullama-gpt2", "micro_batch_size": 1, "anneal_steps": 3, "mixed_precision": "no"},
    "mask pairs": {"recipe": "efficient-dlm", "complementary": True},
    "checkpointing": {"recipe": "efficient-dlm", "gradient_checkpointing": True},
    "drafter, checkpointing": {"recipe": "drafter", "gradient_checkpointing": True},
    "lora": {"recipe": "efficient-dlm", "lora_rank": 2},
    "adapter": {"recipe": "efficient-dlm", "lora_rank": 2, "lora_merge": False},
    "8-bit moments": {"recipe": "efficient-dlm", "optimizer": "adamw-8bit"},
    "first error": {"recipe": "drafter", "distance": "first-error"},
    "teacher": {"recipe": "tri-mode-published", "teacher": "parent"},
    "own text": {"recipe": "drafter", "data": "self", "max_tokens": 700, "max_length": 24},
    "own states": {"recipe": "tri-mode-published", "teacher": "parent", "distance": "kl", "data": "self", **SELF},
    "padding": {"recipe": "efficient-dlm", "data": "few", **ONE_PASS},
    "padding, ar": {"recipe": "ar", "data": "few", **ONE_PASS},
    "padding, drafter": {"recipe": "drafter", "data": "few", **ONE_PASS},
}  # fmt: skip
WHOLE = ("8-bit moments",)
"""Cases that FSDP2 refuses."""


def full(case: dict[str, Any], parent: Path, stories: Path, folder: Path) -> dict[str, Any]:
    """A case with all its arguments."""
    few = stories.with_name("few.txt")
    few.write_text("<|endoftext|>".join(STORIES[:6]))
    case = {"data": "stories", "model": str(parent), "output_dir": str(folder), "eval_data": str(few)} | RUN | case
    if case["data"] == "self":
        case["self_prompts"] = str(stories)
    case["data"] = {"stories": str(stories), "few": str(few)}.get(case["data"], case["data"])
    return {name: value for name, value in case.items() if value is not None}


def interrupted(folder: Path, to: Path, step: int) -> Path:
    """A copy of a finished run as it was when its checkpoint of this step was written."""
    shutil.copytree(folder, to)
    for path in to.iterdir():
        later = path.name.startswith("checkpoint-") and int(path.name.removeprefix("checkpoint-")) > step
        if later:
            shutil.rmtree(path)
        elif path.is_file() and path.name not in ("run.json", "metrics.jsonl"):
            path.unlink()
    run = json.loads((to / "run.json").read_text()) | {"finished": False}
    (to / "run.json").write_text(json.dumps(run))
    return to


# --- what is equal


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(lm: unmask.DiffusionLM) -> dict[str, torch.Tensor]:
    """All that a run may have changed."""
    drafter = {} if lm.drafter is None else lm.drafter.state_dict(prefix="drafter.")
    return lm.model.state_dict() | drafter


def differences(folder: Path, reference: Path) -> tuple[float, float]:
    """The largest of two runs: of a logged figure, relative, and of a weight on disk. AssertionError: other kinds."""
    rows, expected = logged(folder), logged(reference)
    steps = [[row["step"] for row in each] for each in (rows, expected)]
    assert [row.keys() for row in rows] == [row.keys() for row in expected], f"rows of {steps[0]}, not {steps[1]}"
    pairs = [(row[name], wanted[name]) for row, wanted in zip(rows, expected, strict=True) for name in row]
    figures = max(0.0 if ours == theirs else abs(ours - theirs) / max(abs(theirs), 1e-6) for ours, theirs in pairs)
    ours, theirs = (weights_of(unmask.load(path, dtype=torch.float64)) for path in (folder, reference))
    assert ours.keys() == theirs.keys(), f"other weights: {sorted(ours.keys() ^ theirs.keys())}"
    return figures, max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def assert_same_run(folder: Path, reference: Path, rel: float = 1e-7) -> None:
    """Equal rows and equal weights, up to the order of float64 sums and the precision of what is on disk."""
    figures, weights = differences(folder, reference)
    assert figures <= rel, f"{folder}: figures differ by {figures:.3g} of their value"
    assert weights <= 1e-6, f"{folder}: weights differ by {weights:.3g}"


# --- a rank


def run_case(case: dict[str, Any]) -> unmask.DiffusionLM:
    """Adapt a model held in float64, so that what is left of a difference is one.

    kind: see `become`. fault: {"rank": which, None for all, "kind": see `break_down`}. from_file: have `adapt` load the
    model, and write how to the folder's name and "-loaded-<rank>.json".
    """
    case = dict(case)
    become(case.pop("kind", "ddp"))
    fault = case.pop("fault", None)
    if fault is not None and fault["rank"] in (None, join().process_index):
        break_down(fault["kind"], Path(case["output_dir"]))
    if case.pop("from_file", False):
        with watching_loads(Path(f"{case['output_dir']}-loaded-{join().process_index}.json")):
            return unmask.adapt(show_progress=False, **case)
    lm = unmask.load(case.pop("model"), dtype=torch.float64)
    return unmask.adapt(lm, show_progress=False, **case)


@contextmanager
def watching_loads(file: Path) -> Iterator[None]:
    """Within the context write how a parent is loaded: how often weights are read, where they and buffers are then."""
    seen: dict[str, Any] = {"reads": 0}
    load_parent, read = unmask.conversion.load_parent, hf.load_pretrained

    def watched(job: Any) -> Any:
        parent = load_parent(job)
        seen["weights"] = sorted({p.device.type for p in parent.lm.model.parameters()})
        seen["buffers"] = sorted({b.device.type for b in parent.lm.model.buffers()})
        seen["fingerprint"] = parent.fingerprint
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(seen))
        return parent

    def counted(*given: Any, **named: Any) -> Any:
        seen["reads"] += 1
        return read(*given, **named)

    unmask.conversion.load_parent, hf.load_pretrained = watched, counted
    try:
        yield
    finally:
        unmask.conversion.load_parent, hf.load_pretrained = load_parent, read


_FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
          "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}  # fmt: skip
"""What `accelerate launch` sets for FSDP2."""


def become(kind: str) -> None:
    """Set what `accelerate launch` sets for a kind of processes.

    "ddp": each has the model. "fsdp2": parameters and checkpoints are in shards. "fsdp2, full": checkpoints are whole.
    """
    for name in (*_FSDP2, "FSDP_STATE_DICT_TYPE"):
        os.environ.pop(name, None)
    if kind != "ddp":
        form = {"fsdp2": "SHARDED_STATE_DICT", "fsdp2, full": "FULL_STATE_DICT"}[kind]
        os.environ.update(_FSDP2, FSDP_STATE_DICT_TYPE=form)


def break_down(kind: str, folder: Path) -> None:
    """Have this process get SIGTERM after two rows of metrics, sleep in a step, or be in a folder of its own."""
    if kind == "elsewhere":
        os.chdir(tempfile.mkdtemp())
        ranks.SEEN_AFTER = 0.5
        return
    if kind == "sleep":
        plain = loop.step_loss

        def slow(*given: Any, **named: Any) -> Any:
            time.sleep(8 if (folder / "metrics.jsonl").is_file() else 0)
            return plain(*given, **named)

        loop.step_loss = slow
        return

    def kill() -> None:
        rows = folder / "metrics.jsonl"
        while not rows.is_file() or rows.read_text().count("\n") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=kill, daemon=True).start()


WITH_MAIN = "the main process has the weights"


def digest(lm: unmask.DiffusionLM) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(weights_of(lm).items()):
        if tensor.is_meta:
            return WITH_MAIN
        found.update(name.encode() + tensor.double().numpy().tobytes())  # numpy has no bfloat16
    return found.hexdigest()


def main(folder: Path) -> None:
    """The work of a rank; errors that are no bad input end it."""
    torch.set_num_threads(1)
    process = join()
    told: dict[str, Any] = {"ranks": process.num_processes, "main": process.is_main_process, "seconds": {}}
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        began = time.perf_counter()
        try:
            told[name] = digest(run_case(case))
        except (ValueError, SystemExit) as error:
            told[name] = f"{type(error).__name__}: {error}"
        told["seconds"][name] = round(time.perf_counter() - began, 2)
        (folder / f"rank-{process.process_index}.json").write_text(json.dumps(told))
    process.wait_for_everyone()
    leave()


# --- several ranks


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def start(ranks: int, cases: dict[str, dict[str, Any]], folder: Path) -> list[BaseProcess]:
    """So many ranks that run the cases; what they say goes to folder/said-<rank>.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    for old in folder.glob("rank-*.json"):
        old.unlink()
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["ranks", "peft", "bitsandbytes"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), before)))
    forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
    port = free_port()
    processes: list[BaseProcess] = [forks.Process(target=_rank, args=(n, ranks, port, folder)) for n in range(ranks)]
    for process in processes:
        process.start()
    return processes


def _rank(number: int, ranks: int, port: int, folder: Path) -> None:
    said = os.open(folder / f"said-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # fmt: skip
    main(folder)


def finish(processes: Sequence[BaseProcess], seconds: float = 900) -> list[int | None]:
    """The exit codes of ranks that ended; as a launcher does, the others are killed when one fails or time is up."""
    until = time.monotonic() + seconds
    waiting = list(processes)
    while waiting and time.monotonic() < until:
        connection.wait([process.sentinel for process in waiting], until - time.monotonic())
        waiting = [process for process in waiting if process.is_alive()]
        if any(process.exitcode for process in processes if process not in waiting):
            until = min(until, time.monotonic() + 5)  # which is enough to say why
    codes = [process.exitcode for process in processes]
    for process in waiting:
        process.kill()
        process.join()
    return codes


def on_ranks(ranks: int, cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What the ranks tell of the cases, after it is checked that they are several and agree.

    With FSDP2 the main process has the weights in the end. AssertionError for a launch that failed, with what it said.
    """
    codes = finish(start(ranks, cases, folder))
    said = "".join(path.read_text()[-10_000:] for path in sorted(folder.glob("said-*.txt")))
    assert codes == [0] * ranks, f"{codes}: {said}"
    told = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert [each.pop("ranks") for each in told] == [ranks] * ranks
    assert [each.pop("main") for each in told] == [True] + [False] * (ranks - 1)
    for each in told:
        del each["seconds"]
    for name, case in cases.items():
        sharded = case.get("kind", "ddp") != "ddp" and ": " not in told[0][name]
        expected = WITH_MAIN if sharded else told[0][name]
        assert all(each[name] == expected for each in told[1:]), f"{name}: {[each[name] for each in told]}"
    return told[0]


def of_kind(kind: str, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cases on processes of a kind, see `become`."""
    return {name: case | {"kind": kind} for name, case in cases.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
