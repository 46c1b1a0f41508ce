"""Processes that spread parameters (FSDP2) load a model once: the others get its structure, and the run is the same."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import CASES, full, logged, of_kind, on_ranks, run_case

import unmask
from unmask.training.structures import _Structure

FROM_FILES = {
    "efficient-dlm": CASES["efficient-dlm"],
    "drafter": CASES["drafter"],
    "lora": CASES["lora"],
    "teacher": CASES["teacher"],
    "own text": CASES["own text"],
    "teacher in a folder": CASES["teacher"],
    "bf16 drafter": {"recipe": "drafter", "dtype": "bfloat16", "mixed_precision": "bf16"},
}


def test_a_structure_has_everything_but_the_values_of_parameters(tokenizer_and_model: Path) -> None:
    model = unmask.load(tokenizer_and_model).model
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.norm.weight.requires_grad_(False)
    file = io.BytesIO()
    _Structure(file).dump(model)
    assert len(file.getvalue()) < sum(p.numel() for p in model.parameters())
    copy = pickle.loads(file.getvalue())
    ours, theirs = dict(model.named_parameters()), dict(copy.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert theirs[name].is_meta
        assert (theirs[name].shape, theirs[name].dtype, theirs[name].requires_grad) == (
            weight.shape, weight.dtype, weight.requires_grad)  # fmt: skip
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    buffers = dict(model.named_buffers())
    assert buffers  # the rotary frequencies, which no state dict has
    assert not set(buffers) & set(model.state_dict())
    for name, buffer in copy.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert copy.config.to_dict() == model.config.to_dict()


@pytest.fixture(scope="module")
def told(work: Path, tokenizer_and_model: Path, stories: Path) -> dict[str, Any]:
    """What two processes tell of every case, which one process has run too."""
    parent = tokenizer_and_model
    cases = {name: full(case, parent, stories, work / "2" / name) | {"from_file": True}
             for name, case in FROM_FILES.items()}  # fmt: skip
    cases["teacher in a folder"] = cases["teacher in a folder"] | {"teacher": str(parent)}
    for name, case in cases.items():
        run_case(case | {"output_dir": str(work / "1" / name)})
    cases["no model"] = cases["lora"] | {"model": str(work / "nowhere"), "output_dir": str(work / "none")}
    return on_ranks(2, of_kind("fsdp2", cases), work / "two")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loaded once")


@pytest.mark.parametrize("name", FROM_FILES)
def test_the_main_process_alone_reads_the_weights(name: str, told: dict[str, Any], work: Path) -> None:
    assert ": " not in told[name], told[name]
    main, other = (json.loads((work / "2" / f"{name}-loaded-{rank}.json").read_text()) for rank in (0, 1))
    assert main["weights"] == main["buffers"] == other["buffers"] == ["cpu"]
    assert other["weights"] == ["meta"]
    assert other["reads"] == 0
    assert main["reads"] == (2 if name == "teacher in a folder" else 1)
    assert other["fingerprint"] == main["fingerprint"]


@pytest.mark.parametrize("name", FROM_FILES)
def test_the_run_is_that_of_one_process(name: str, told: dict[str, Any], work: Path) -> None:
    assert ": " not in told[name], told[name]
    rows, expected = logged(work / "2" / name), logged(work / "1" / name)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    precise = 5e-2 if name.startswith("bf16") else 1e-4  # in float32, from another order of sums
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=precise)
    runs = [json.loads((work / ranks / name / "run.json").read_text()) for ranks in ("1", "2")]
    assert runs[0]["parent"] == runs[1]["parent"]
    assert runs[0]["teacher"] == runs[1]["teacher"]
    assert runs[1]["parent_nll"] == pytest.approx(runs[0]["parent_nll"], rel=precise)
    assert runs[1]["parent_text"] == runs[0]["parent_text"]


def test_an_error_of_the_main_process_is_one_of_all(told: dict[str, Any]) -> None:
    assert told["no model"].startswith("ValueError")
    assert "nowhere" in told["no model"]
