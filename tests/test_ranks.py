"""Runs on two and three real processes: each is the run of one process, and leaves what that leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import CASES, RUN, WHOLE, assert_same_run, free_port, full, interrupted, of_kind, on_ranks, run_case

import unmask

THREE = ("efficient-dlm", "tri-mode", "padding", "padding, ar")
"""Cases that three processes run as well."""

SHARDED = ("ar", "bd3lm", "diffullama", "efficient-dlm", "fast-dllm-v2", "tri-mode", "drafter", "mask pairs",
           "micro-batches", "checkpointing", "drafter, checkpointing", "lora", "adapter", "first error", "teacher",
           "own states", "padding, drafter")  # fmt: skip
"""Cases that two processes with sharded parameters (FSDP2) run as well."""


def launch(ranks: int, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a Python command on so many processes that torchrun starts."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command = [*launcher, "--master_port", str(free_port()), *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-20_000:]
    return done


def cut_off(file: Path) -> None:
    """Leave out the end of a file, as a machine that loses its power may."""
    file.write_bytes(file.read_bytes()[:-100])


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
    resumed = interrupted(single / "efficient-dlm", work / "resumed on two", 4)
    cut_off(resumed / "checkpoint-4" / "model.safetensors")
    cases["resumed"] = cases["efficient-dlm"] | {"output_dir": str(resumed), "resume": True}
    cases["again"] = cases["ar"] | {"resume": True}
    cases["odd"] = cases["ar"] | {"output_dir": str(work / "odd"), "batch_size": 5}
    cases["elsewhere"] = cases["ar"] | {"output_dir": "run", "fault": {"rank": None, "kind": "elsewhere"}}
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
    said = "".join(path.read_text() for path in (work / "two").glob("said-*.txt"))
    assert said.count("checkpoint-4 is damaged") == 1  # the main process looks, for all
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
    cases |= {name: full(CASES[name], tokenizer_and_model, stories, work / "sharded" / name) for name in WHOLE}
    cases = of_kind("fsdp2", cases)
    whole = cases["efficient-dlm"] | {"output_dir": str(work / "sharded" / "whole checkpoints")}
    cases["whole checkpoints"] = whole | {"kind": "fsdp2, full"}
    return on_ranks(2, cases, work / "on shards")


@pytest.mark.parametrize("name", [*SHARDED, "after one", "after two", "whole checkpoints"])
def test_sharded_processes_give_the_run_of_one(name: str, sharded: dict[str, Any], work: Path, single: Path) -> None:
    assert not sharded[name].startswith("ValueError"), sharded[name]
    reference = single / (name if name in SHARDED else "efficient-dlm")
    assert_same_run(work / "sharded" / name, reference, rel=1e-6)
    run, expected = (json.loads((folder / "run.json").read_text()) for folder in (work / "sharded" / name, reference))
    assert run["finished"]
    assert run["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-6)
    assert run["parent_text"] == expected["parent_text"]


@pytest.mark.parametrize("name", WHOLE)
def test_what_shards_do_not_go_with_is_refused_by_every_process(name: str, sharded: dict[str, Any], work: Path) -> None:
    assert "use optimizer=adamw, or configs/ddp.yaml" in sharded[name]
    assert "\n" not in sharded[name]
    assert not (work / "sharded" / name).exists()


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
    gathered = work / "sharded" / "whole checkpoints"
    assert (gathered / "checkpoint-2" / "pytorch_model_fsdp.bin").is_file()  # whole
    cases = {}
    for name, folder, kind in (("shards in shards", begun, "fsdp2"), ("shards whole", begun, "fsdp2, full"),
                               ("whole in shards", gathered, "fsdp2"), ("whole", gathered, "fsdp2, full"),
                               ("whole without shards", gathered, "ddp")):  # fmt: skip
        to = interrupted(folder, work / "on three" / name, 2)
        cases[name] = case | {"output_dir": str(to), "kind": kind}
    told = on_ranks(3, cases, work / "resumed on three")
    for name in cases:
        assert ": " not in told[name], told[name]
        assert_same_run(work / "on three" / name, single / "efficient-dlm", rel=1e-6)


def test_rows_that_cannot_be_shared_out_are_refused_before_anything_is_written(two: dict[str, Any], work: Path) -> None:
    assert "batch_size=5 is no multiple of the 2 processes" in two["odd"]
    assert not (work / "odd").exists()


def test_processes_without_a_common_folder_are_refused(two: dict[str, Any]) -> None:
    assert "'run' is not the same folder for all processes: process 1 does not see" in two["elsewhere"]


def test_the_command_ends_well_on_two_processes(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    options = RUN | {"max_tokens": 500, "mixed_precision": "bf16", "save_every": 1, "eval_documents": 2}
    command = ["-m", "unmask.cli", "adapt", str(tokenizer_and_model), "--data", str(stories), "--json",
               "--output", str(tmp_path / "run"), *(f"{k}={v}" for k, v in options.items())]  # fmt: skip
    done = launch(2, command)
    assert json.loads(done.stdout)["tokens"] >= 500  # one process speaks for both
    assert done.stderr.count("learning rate, batch and length") == 1
    lm = unmask.load(tmp_path / "run")
    assert lm.generate("Once", max_new_tokens=8).num_new_tokens[0] > 0
