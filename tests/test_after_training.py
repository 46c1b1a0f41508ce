"""What `adapt` returns is a stock model: it decodes with its cache as one that is loaded from the folder does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, VOCABULARY

import unmask
from unmask.core.attention import Layout, causal
from unmask.core.network import GrowingCache

RUN = {"max_tokens": 500, "max_length": 32, "block_size": 4, "batch_size": 4, "log_every": 1, "eval_every": 1,
       "eval_documents": 2, "save_every": 2, "show_progress": False}  # fmt: skip

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"mixed_precision": "bf16"},
    "bf16 ar": {"mixed_precision": "bf16", "recipe": "ar"},
    "bf16 drafter": {"mixed_precision": "bf16", "recipe": "drafter"},
    "bf16 joint": {"mixed_precision": "bf16", "recipe": "tri-mode-published", "teacher": "parent"},
    "bf16 lora": {"mixed_precision": "bf16", "lora_rank": 2},
    "bf16 checkpointing": {"mixed_precision": "bf16", "gradient_checkpointing": True},
    "checkpointing": {"gradient_checkpointing": True},
    "fp16": {"mixed_precision": "fp16"},
    "fp16 drafter": {"mixed_precision": "fp16", "recipe": "drafter"},
    "lora": {"lora_rank": 2},
    "drafter": {"recipe": "drafter"},
}


def cached_logits(lm: unmask.DiffusionLM) -> torch.Tensor:
    """Logits of a second half after a cached first one."""
    ids = torch.arange(3, 19)[None] % VOCABULARY
    past = GrowingCache(lm.network.new_cache(), _layout(0, 0))
    with torch.no_grad():
        lm.network(ids[:, :8], _layout(0, 8), causal, past=past)
        past.layout = _layout(0, 8)
        assert past.cache.get_seq_length() == 8
        return lm.network(ids[:, 8:], _layout(8, 16), causal, past=past)


def _layout(start: int, stop: int) -> Layout:
    position = torch.arange(start, stop)[None]
    return Layout.of(position, torch.zeros_like(position))


@pytest.mark.parametrize("way", WAYS)
def test_a_trained_model_decodes_as_a_loaded_one(
    way: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    if WAYS[way].get("mixed_precision") == "fp16" and not torch.cuda.is_available():
        pytest.skip("fp16 needs a GPU")
    lm = unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "run", **(
        {"recipe": "efficient-dlm", "eval_data": str(stories)} | RUN | WAYS[way]))  # fmt: skip
    fresh = unmask.load(tmp_path / "run")
    assert "forward" not in vars(lm.model)
    assert not lm.model.training
    assert lm.model.dtype == fresh.model.dtype == torch.float32
    ours, theirs = cached_logits(lm), cached_logits(fresh)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    modes = ("ar",) if lm.diffusion is None else ("ar", "diffusion") if lm.diffusion.serves_ar else ("diffusion",)
    for mode in modes:
        outputs = [each.generate(STORIES[0][:30], mode=mode, max_new_tokens=12) for each in (lm, fresh)]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    stock = [each.model(torch.arange(3, 9, device=each.network.device)[None]) for each in (lm, fresh)]
    assert stock[0].past_key_values is not None
    assert stock[0].past_key_values.get_seq_length() == stock[1].past_key_values.get_seq_length() == 6
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["finished"]
    assert run["evaluation"]


def test_precisions_may_follow_each_other_in_one_process(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    lm = unmask.load(tokenizer_and_model)
    losses = []
    for name, precision in (("no", "no"), ("bf16", "bf16"), ("no again", "no"), ("bf16 again", "bf16")):
        unmask.adapt(unmask.load(tokenizer_and_model), stories, "ar", tmp_path / name, mixed_precision=precision, **RUN)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert losses[0] == losses[2] != losses[1] == losses[3]
    # and on one model, which the first training must not have wrapped for good
    unmask.adapt(lm, stories, "ar", tmp_path / "first", mixed_precision="bf16", **RUN)
    lm = unmask.adapt(lm, stories, "ar", tmp_path / "second", mixed_precision="no", **RUN)
    assert torch.equal(cached_logits(lm), cached_logits(unmask.load(tmp_path / "second")))


@pytest.mark.parametrize("way", ["plain", "bf16 checkpointing", "bf16 drafter"])
def test_a_training_that_fails_leaves_the_model_stock(
    way: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = unmask.load(tokenizer_and_model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unmask.training.loop.save_checkpoint", fail)
    with pytest.raises(KeyboardInterrupt):
        unmask.adapt(lm, stories, output_dir=tmp_path / "run", **({"recipe": "ar"} | RUN | WAYS[way]))
    assert "forward" not in vars(lm.model)
    assert not any(module.training for module in lm.model.modules())
    assert not lm.model.is_gradient_checkpointing
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert lm.model(torch.arange(3, 9, device=lm.network.device)[None]).past_key_values.get_seq_length() == 6


def test_a_precision_that_the_machine_lacks_is_refused_before_anything_is_written(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(ValueError, match="mixed_precision='fp16' needs a GPU"):
        unmask.adapt(tokenizer_and_model, stories, "ar", tmp_path / "run", mixed_precision="fp16", **RUN)
    assert not (tmp_path / "run").exists()
