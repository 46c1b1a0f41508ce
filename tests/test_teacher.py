"""Where a teacher's weights are, and in which type: never a second copy in float32 beside passes in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import logged

import unmask
from unmask.recipe import load_recipe
from unmask.resolve import Resolved, resolve
from unmask.training.teacher import freeze, load_teacher


def settings_of(lm: unmask.DiffusionLM, **chosen: Any) -> Resolved:
    return resolve(load_recipe("tri-mode", **chosen), lm.model.num_parameters(), None)


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float64), ("bf16", torch.bfloat16)])
def test_the_parent_is_copied_in_the_type_of_passes(
    precision: str, dtype: torch.dtype, tokenizer_and_model: Path
) -> None:
    lm = unmask.load(tokenizer_and_model, dtype=torch.float64)
    teacher = freeze(None, lm, 5, settings_of(lm, mixed_precision=precision)).model
    assert {p.dtype for p in teacher.parameters()} == {dtype}
    assert not any(p.requires_grad for p in teacher.parameters())
    ours, theirs = dict(lm.model.named_parameters()), dict(teacher.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.requires_grad
        assert theirs[name].data_ptr() != weight.data_ptr()
        assert torch.equal(theirs[name], weight.to(dtype))
    for (name, own), other in zip(lm.model.named_buffers(), teacher.buffers(), strict=True):
        assert torch.equal(own, other), name  # the rotary frequencies stay as they are
    assert (teacher.lm_head.weight is teacher.model.embed_tokens.weight) == lm.model.config.tie_word_embeddings


@pytest.mark.parametrize(("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_folder_is_loaded_in_that_type_and_not_copied(
    precision: str, dtype: torch.dtype, tokenizer_and_model: Path
) -> None:
    lm = unmask.load(tokenizer_and_model)
    settings = settings_of(lm, mixed_precision=precision, teacher=str(tokenizer_and_model))
    other = load_teacher(lm, settings)
    assert other.model.dtype == dtype
    assert freeze(other, lm, 5, settings).model is other.model


def test_a_teacher_in_bfloat16_teaches_what_one_in_float32_does(
    tmp_path: Path, tokenizer_and_model: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: dict[str, Any] = {"recipe": "tri-mode", "max_tokens": 600, "max_length": 32, "block_size": 4, "batch_size": 6,
                           "learning_rate": 1e-3, "log_every": 1, "mixed_precision": "bf16", "show_progress": False,
                           "teacher": "parent"}  # fmt: skip
    unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "bfloat16", **run)
    monkeypatch.setattr("unmask.training.teacher._dtype_of", lambda *_: torch.float32)
    unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "float32", **run)
    losses = [[row["loss"] for row in logged(tmp_path / name)] for name in ("bfloat16", "float32")]
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
