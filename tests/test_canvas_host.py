"""Whole-canvas sampling: rows that do not depend on others, and the rates of remasking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import MASK, block_config, network, random_tokens
from decode import sample_canvases

from unmask.core.network import DiffusionConfig
from unmask.sampling import Ancestral, Remask

CONFIG = DiffusionConfig(MASK, "bidirectional", None, None, True, "test", "0")


def test_ancestral_near_the_context_does_not_depend_on_its_batch_mates() -> None:
    net = network()
    prompts = [random_tokens(n, seed=n) for n in (21, 4, 20)]
    options: dict[str, Any] = {"max_new_tokens": 10, "context_length": 24, "max_denoising_steps": 10,
                               "select": Ancestral(), "temperature": 1.0, "seed": 5}  # fmt: skip
    together = sample_canvases(net, CONFIG, prompts, **options)
    one = prompts[0]
    alone = sample_canvases(net, CONFIG, [one], **options)
    assert alone.new_tokens[0] == together.new_tokens[0]
    assert alone.num_forwards[0] == together.num_forwards[0]


def test_remasking_by_confidence_takes_back_the_limit_and_reveals_no_faster() -> None:
    rule, revealed = Remask("confidence"), torch.rand(50, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    confidence = torch.rand(50, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for progress, after in ((0.2, 0.3), (0.5, 0.6), (0.9, 1.0)):
        reveal, again = rule.rates(progress, after, revealed, confidence)
        limit = min(1.0, (1 - after) / progress)
        torch.testing.assert_close(again.sum(-1), limit * revealed.any(-1).double())
        torch.testing.assert_close(reveal, torch.full_like(reveal, (after - progress) / (1 - progress)))


def test_a_checkpoint_whose_clean_rows_are_an_ar_models_embeds_causally(tokenizer_and_model: Path) -> None:
    import unmask

    lm = unmask.load(tokenizer_and_model)
    lm.diffusion = block_config(clean="causal")
    assert lm.embedding_pattern == "causal"
    assert torch.equal(lm.embed("Once there was a cat"), lm.embed("Once there was a cat", "causal"))
    lm.diffusion = block_config()
    assert torch.equal(lm.embed("Once there was a cat"), lm.embed("Once there was a cat", "bidirectional"))
