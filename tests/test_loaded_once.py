"""Processes that spread parameters (FSDP2) load a model once: the others get its structure, and the run is the same."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import WITH_MAIN
from test_ranks import CASES, full, launch, logged

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
def told(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_and_model: Path, stories: Path
) -> tuple[Path, list[dict[str, Any]]]:
    """Every case on one process and on two; the folder of both, and what each of the two tells."""
    work = tmp_path_factory.mktemp("loaded once")
    parent = tokenizer_and_model
    cases = {name: full(case, parent, stories, work / "2" / name) for name, case in FROM_FILES.items()}
    cases["teacher in a folder"] = cases["teacher in a folder"] | {"teacher": str(parent)}
    for name, case in cases.items():
        unmask.adapt(show_progress=False, **case | {"output_dir": str(work / "1" / name)})
    cases["no model"] = cases["lora"] | {"model": str(work / "nowhere"), "output_dir": str(work / "none")}
    (work / "cases.json").write_text(json.dumps(cases))
    launch(2, [str(Path(__file__).with_name("loading_on_ranks.py")), str(work / "cases.json")])
    return work, [json.loads((work / f"cases-rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", FROM_FILES)
def test_the_main_process_alone_reads_the_weights(name: str, told: tuple[Path, list[dict[str, Any]]]) -> None:
    work, (main, other) = told
    assert main[name]["weights"] == main[name]["buffers"] == other[name]["buffers"] == ["cpu"]
    assert other[name]["weights"] == ["meta"]
    assert other[name]["reads"] == 0
    assert main[name]["reads"] == (2 if name == "teacher in a folder" else 1)
    assert other[name]["fingerprint"] == main[name]["fingerprint"]
    assert other[name]["end"] == WITH_MAIN != main[name]["end"]
    rows, expected = logged(work / "2" / name), logged(work / "1" / name)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    precise = 2e-2 if name.startswith("bf16") else 1e-4
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted, rel=precise)
    runs = [json.loads((work / ranks / name / "run.json").read_text()) for ranks in ("1", "2")]
    assert runs[0]["parent"] == runs[1]["parent"]
    assert runs[0]["teacher"] == runs[1]["teacher"]
    assert runs[1]["parent_nll"] == pytest.approx(runs[0]["parent_nll"], rel=precise)
    assert runs[1]["parent_text"] == runs[0]["parent_text"]
    lm = unmask.load(work / "2" / name)
    reference = unmask.load(work / "1" / name)
    for (key, weight), wanted in zip(lm.model.state_dict().items(), reference.model.state_dict().values(), strict=True):
        torch.testing.assert_close(weight.float(), wanted.float(), atol=2e-3, rtol=0, msg=key)


def test_an_error_of_the_main_process_is_one_of_all(told: tuple[Path, list[dict[str, Any]]]) -> None:
    errors = [each["no model"]["error"] for each in told[1]]
    assert errors[0] == errors[1]
    assert "nowhere" in errors[0]
