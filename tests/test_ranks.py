"""Runs on two and three real processes: each is the run of one process, and leaves what that leaves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES
from ranks import WITH_MAIN, run_case, weights_of

import unmask

RUN = {"max_tokens": 1500, "max_length": 32, "block_size": 4, "batch_size": 6, "log_every": 1, "eval_every": 2,
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
    "lora": {"recipe": "efficient-dlm", "lora_rank": 2},
    "adapter": {"recipe": "efficient-dlm", "lora_rank": 2, "lora_merge": False},
    "teacher": {"recipe": "tri-mode-published", "teacher": "parent"},
    "own text": {"recipe": "drafter", "data": "self", "max_tokens": 700, "max_length": 24},
    "own states": {"recipe": "tri-mode-published", "teacher": "parent", "distance": "kl", "data": "self", **SELF},
    "padding": {"recipe": "efficient-dlm", "data": "few", **ONE_PASS},
    "padding, ar": {"recipe": "ar", "data": "few", **ONE_PASS},
    "padding, drafter": {"recipe": "drafter", "data": "few", **ONE_PASS},
}  # fmt: skip
THREE = ("ar", "efficient-dlm", "drafter", "tri-mode", "padding", "padding, ar")
"""Cases that three processes run as well."""

SHARDED = ("ar", "bd3lm", "diffullama", "efficient-dlm", "fast-dllm-v2", "tri-mode", "drafter", "mask pairs",
           "micro-batches", "checkpointing", "lora", "adapter", "teacher", "own states",
           "padding, drafter")  # fmt: skip
"""Cases that two processes with sharded parameters (FSDP2) run as well."""


def full(case: dict[str, Any], parent: Path, stories: Path, folder: Path) -> dict[str, Any]:
    """A case with all its arguments."""
    few = stories.with_name("few.txt")
    few.write_text("<|endoftext|>".join(STORIES[:6]))
    case = {"data": "stories", "model": str(parent), "output_dir": str(folder), "eval_data": str(few)} | RUN | case
    if case["data"] == "self":
        case["self_prompts"] = str(stories)
    case["data"] = {"stories": str(stories), "few": str(few)}.get(case["data"], case["data"])
    return {name: value for name, value in case.items() if value is not None}


def command_of(ranks: int, command: list[str]) -> list[str]:
    """What runs a Python command on so many processes."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launcher, "--master_port", str(port), *command]


def launch(ranks: int, command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a Python command on so many processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command_of(ranks, command), capture_output=True, text=True, timeout=240, env=environment)
    assert not check or done.returncode == 0, done.stderr[-20_000:]
    return done


def on_ranks(ranks: int, cases: dict[str, dict[str, Any]], folder: Path, kind: str = "ddp") -> dict[str, Any]:
    """What the processes tell of the cases, after it is checked that they are several and agree.

    With FSDP2 the main process has the weights in the end.
    """
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    script = str(Path(__file__).with_name("ranks.py"))
    launch(ranks, [script, str(folder / "cases.json"), str(folder / "results"), kind])
    told = [json.loads((folder / "results" / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert [each.pop("ranks") for each in told] == [ranks] * ranks
    assert [each.pop("main") for each in told] == [True] + [False] * (ranks - 1)
    if kind == "fsdp2":
        assert all(said == WITH_MAIN or ": " in said for each in told[1:] for said in each.values())
        return told[0]
    assert all(each == told[0] for each in told)
    return told[0]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


def assert_same_run(folder: Path, reference: Path, rel: float = 1e-7) -> None:
    """Equal rows and equal weights, up to the order of float64 sums and the precision of what is on disk."""
    rows, expected = logged(folder), logged(reference)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=rel)
    ours, theirs = (weights_of(unmask.load(path, dtype=torch.float64)) for path in (folder, reference))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def single(work: Path, tokenizer_and_model: Path, stories: Path) -> Path:
    """Every case on one process."""
    for name, case in CASES.items():
        run_case(full(case, tokenizer_and_model, stories, work / "1" / name))
    return work / "1"


@pytest.fixture(scope="module")
def two(work: Path, single: Path, tokenizer_and_model: Path, stories: Path) -> dict[str, Any]:
    """What two processes tell of every case, of a resumed one, and of one that cannot be shared out."""
    cases = {name: full(case, tokenizer_and_model, stories, work / "2" / name) for name, case in CASES.items()}
    resumed = interrupted(single / "efficient-dlm", work / "resumed on two", 2)
    cases["resumed"] = cases["efficient-dlm"] | {"output_dir": str(resumed), "resume": True}
    cases["again"] = cases["ar"] | {"resume": True}
    cases["odd"] = cases["ar"] | {"output_dir": str(work / "odd"), "batch_size": 5}
    return on_ranks(2, cases, work / "two")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_run_of_one(name: str, two: dict[str, Any], work: Path, single: Path) -> None:
    assert not two[name].startswith("ValueError"), two[name]
    assert_same_run(work / "2" / name, single / name)
    run, expected = (json.loads((folder / name / "run.json").read_text()) for folder in (work / "2", single))
    assert run["finished"]
    assert run["tokens"] == expected["tokens"]
    assert run["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6)
    files = [sorted(p.name for p in (folder / name).iterdir()) for folder in (work / "2", single)]
    assert files[0] == files[1]


def test_three_processes_give_the_run_of_one(
    work: Path, single: Path, tokenizer_and_model: Path, stories: Path
) -> None:
    cases = {name: full(CASES[name], tokenizer_and_model, stories, work / "3" / name) for name in THREE}
    told = on_ranks(3, cases, work / "three")
    for name in THREE:
        assert not told[name].startswith("ValueError"), told[name]
        assert_same_run(work / "3" / name, single / name)


def test_a_run_goes_on_with_more_and_with_fewer_processes(
    two: dict[str, Any], work: Path, single: Path, tokenizer_and_model: Path, stories: Path
) -> None:
    assert_same_run(work / "resumed on two", single / "efficient-dlm")
    folder = interrupted(work / "2" / "efficient-dlm", work / "resumed on one", 2)
    assert (folder / "checkpoint-2" / "random_states_1.pkl").is_file()  # a whole checkpoint of two
    run_case(full(CASES["efficient-dlm"], tokenizer_and_model, stories, folder) | {"resume": True})
    assert_same_run(folder, single / "efficient-dlm")
    assert two["again"] == two["ar"]  # finished: loaded, not repeated


@pytest.fixture(scope="module")
def sharded(work: Path, single: Path, two: dict[str, Any], tokenizer_and_model: Path, stories: Path) -> dict[str, Any]:
    """What two processes with FSDP2 tell of some cases, and of runs that began on one process and on two."""
    assert two  # which the second of them is of
    cases = {name: full(CASES[name], tokenizer_and_model, stories, work / "sharded" / name) for name in SHARDED}
    for name, begun in (("after one", single), ("after two", work / "2")):
        folder = interrupted(begun / "efficient-dlm", work / "sharded" / name, 2)
        cases[name] = cases["efficient-dlm"] | {"output_dir": str(folder), "resume": True}
    return on_ranks(2, cases, work / "on shards", "fsdp2")


@pytest.mark.parametrize("name", [*SHARDED, "after one", "after two"])
def test_sharded_processes_give_the_run_of_one(name: str, sharded: dict[str, Any], work: Path, single: Path) -> None:
    assert not sharded[name].startswith("ValueError"), sharded[name]
    reference = single / ("efficient-dlm" if name.startswith("after") else name)
    assert_same_run(work / "sharded" / name, reference, rel=1e-6)
    run, expected = (json.loads((folder / "run.json").read_text()) for folder in (work / "sharded" / name, reference))
    assert run["finished"]
    assert run["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6)
    assert run["parent_text"] == expected["parent_text"]


@pytest.mark.usefixtures("sharded")
def test_a_sharded_run_goes_on_with_other_processes(
    work: Path, single: Path, tokenizer_and_model: Path, stories: Path
) -> None:
    begun = work / "sharded" / "efficient-dlm"
    case = full(CASES["efficient-dlm"], tokenizer_and_model, stories, work) | {"resume": True}
    assert (begun / "checkpoint-2" / "pytorch_model_fsdp_0" / ".metadata").is_file()  # in shards
    on_one = interrupted(begun, work / "shards on one", 2)
    run_case(case | {"output_dir": str(on_one)})
    assert_same_run(on_one, single / "efficient-dlm", rel=1e-6)
    on_three = interrupted(begun, work / "shards on three", 2)
    on_ranks(3, {"resumed": case | {"output_dir": str(on_three)}}, work / "three shards", "fsdp2")
    assert_same_run(on_three, single / "efficient-dlm", rel=1e-6)


def test_rows_that_cannot_be_shared_out_are_refused_before_anything_is_written(two: dict[str, Any], work: Path) -> None:
    assert "batch_size=5 is no multiple of the 2 processes" in two["odd"]
    assert not (work / "odd").exists()


def test_the_command_ends_well_on_two_processes(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    options = RUN | {"max_tokens": 500, "mixed_precision": "bf16", "save_every": 1, "eval_documents": 2}
    command = ["-m", "unmask.cli", "adapt", str(tokenizer_and_model), "--data", str(stories), "--json",
               "--output", str(tmp_path / "run"), *(f"{k}={v}" for k, v in options.items())]  # fmt: skip
    done = launch(2, command)
    assert json.loads(done.stdout)["tokens"] >= 500  # one process speaks for both
    assert done.stderr.count("learning rate, batch and length") == 1
    lm = unmask.load(tmp_path / "run")
    assert lm.generate("Once", max_new_tokens=8).num_new_tokens[0] > 0
