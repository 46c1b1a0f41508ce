"""Drafters whose noisy rows read random tokens instead of masks: training, decoding, saving (Uno 2609.04010)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, SUPPORTED, VOCABULARY, block_config, random_tokens, tiny_model

import unmask
from unmask import hf
from unmask.core.attention import Layout
from unmask.core.batch import Batch
from unmask.core.corruption import Corruption
from unmask.core.corruption import random_tokens as noise_tokens
from unmask.core.decoding import begin, denoise, speculate
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.network import DiffusionConfig
from unmask.core.noise import integers
from unmask.core.objectives import distill_loss, predictable
from unmask.core.scoring import noisy_ids, score
from unmask.recipe import load_recipe
from unmask.resolve import resolve
from unmask.sampling import Coupled, Rejection, Request, Speculative, sample_autoregressive
from unmask.training.step import step_loss

RUN: dict[str, Any] = {"show_progress": False, "max_tokens": 3000, "max_length": 64, "block_size": 4, "batch_size": 4,
                       "noise": "uniform"}  # fmt: skip
SHAPES = [(False, "bidirectional"), (False, "causal"), (True, "bidirectional"), (True, "causal")]


def uniform_config(shift: bool = True, noisy: str = "causal", block_size: int = 4) -> DiffusionConfig:
    config = block_config(block_size, shift=shift, clean="causal")
    return replace(config, noisy_attention=noisy, mask_token_id=VOCABULARY, noise_tokens=VOCABULARY)


def gated(name: str = "llama") -> tuple[hf.HFNetwork, Drafter]:
    """A drafter without mask embeddings whose adapters do something."""
    model = tiny_model(SUPPORTED[name](), torch.float64)
    drafter = Drafter(model, VOCABULARY, DrafterConfig(4, 4.0, mask_rows=0))
    torch.manual_seed(1)
    for up in drafter.up.values():
        torch.nn.init.normal_(up, std=0.3)
    return hf.as_network(model, VOCABULARY, gate=drafter.rows), drafter


def by_hand(position: torch.Tensor) -> torch.Tensor:
    return integers([("noise token", VOCABULARY)], 64, VOCABULARY)[0][position]


@pytest.mark.parametrize(("shift", "noisy"), SHAPES)
@torch.no_grad()
def test_every_pass_reads_the_tokens_of_its_positions_as_if_they_stood_in_the_text(shift: bool, noisy: str) -> None:
    """Scoring, denoising and drafting against a pass whose text has these tokens and whose config has no noise."""
    net, _ = gated()
    config, x0, layout = uniform_config(shift, noisy), random_tokens(2, 12), Layout.of(torch.arange(12).expand(2, 12))
    plain = replace(config, noise_tokens=0)
    wanted = (layout.position >= 8 + int(shift)) & (layout.position < 12)
    masked = layout.position >= 8
    xt = x0.masked_fill(masked, VOCABULARY)
    hand = torch.where(masked, by_hand(layout.position), x0)
    assert torch.equal(noisy_ids(config, xt, layout), hand)
    expected = score(net, plain, hand, x0, layout, wanted)
    assert (score(net, config, xt, x0, layout, wanted) - expected).abs().max() < 1e-10
    block, within = layout.subset(..., slice(8, 12)), wanted[:, 8:]
    past = begin(net, config.pattern, x0[:, :8], keep_logits=shift)
    past.columns = 12
    assert (denoise(net, config, past, xt[:, 8:], block, within) - expected).abs().max() < 1e-10
    past = begin(net, config.pattern, x0[:, :7])
    past.columns = 12
    passed = speculate(net, config, past, x0[:, 7:8], layout.subset(..., slice(7, 8)), 3)
    drafts = passed.drafts(torch.zeros(2, dtype=torch.long))
    expected = expected.unflatten(0, (2, -1))[:, 0 if shift else 1 :]
    assert (drafts - expected).abs().max() < 1e-10


def test_noise_of_a_position_stays_the_same_in_longer_texts_and_covers_the_vocabulary() -> None:
    config = uniform_config()
    position = torch.arange(4000)[None]
    whole = noisy_ids(config, torch.full((1, 4000), VOCABULARY), Layout.of(position))
    part = noisy_ids(config, torch.full((1, 9), VOCABULARY), Layout.of(position[:, 30:39]))
    assert torch.equal(part, whole[:, 30:39])
    counts = torch.bincount(whole[0], minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    assert (counts - 4000 / VOCABULARY).abs().max() < 6 * (4000 / VOCABULARY) ** 0.5


def test_a_training_step_reads_fresh_tokens_whatever_the_split_of_its_rows() -> None:
    net, drafter = gated()
    config = uniform_config()
    settings = resolve(load_recipe("drafter", noise="uniform", shift=True, noisy_attention="causal", block_size=4,
                                   max_length=16, batch_size=4), 1000, 128)  # fmt: skip
    batch = Batch(random_tokens(4, 16), Layout.of(torch.arange(16).expand(4, 16)))
    whole = step_loss(net, settings, config, batch, 3, torch.arange(4))
    halves = [step_loss(net, settings, config, batch.rows(i, i + 2), 3, torch.arange(i, i + 2)) for i in (0, 2)]
    assert sum(half.sum.item() for half in halves) == pytest.approx(whole.sum.item(), rel=1e-10)
    tokens = noise_tokens(settings.seed, 3, torch.arange(4), 16, VOCABULARY)
    masked = predictable(batch.layout)
    hand = distill_loss(net, replace(config, noise_tokens=0), batch.x0, batch.layout,
                        Corruption(masked, masked.float(), tokens), "kl+tv")  # fmt: skip
    assert torch.equal(Corruption(masked, masked.float(), tokens).excluding(masked).noise, tokens)
    assert hand.sum.item() == pytest.approx(whole.sum.item(), rel=1e-10)
    whole.sum.backward()
    assert all(p.grad is not None for p in drafter.up.values())
    assert step_loss(net, settings, config, batch, 4, torch.arange(4)).sum.item() != pytest.approx(whole.sum.item())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(("shift", "noisy"), [SHAPES[0], SHAPES[3]])
def test_speculation_from_random_tokens_writes_what_ar_decoding_does(name: str, shift: bool, noisy: str) -> None:
    net, drafter = gated(name)
    prompts = [random_tokens(n, seed=n) for n in (1, 6, 11)]
    off = hf.as_network(net.model, VOCABULARY)
    for temperature, acceptance in ((0.0, None), (0.0, Rejection()), (1.0, Coupled())):
        request = Request(max_new_tokens=21, temperature=temperature, seed=5, context_length=64)
        expected = sample_autoregressive(off, prompts, request).new_tokens
        for cycle in ("one", "two"):
            decoder = Speculative(cycle=cycle, acceptance=acceptance)
            assert decoder(net, uniform_config(shift, noisy), prompts, request).new_tokens == expected
    drafter.detach()


def test_a_run_keeps_its_noise_and_no_mask_embedding(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    lm = unmask.adapt(tokenizer_and_model, stories, "drafter", folder, shift=True, noisy_attention="causal", **RUN)
    size = lm.model.get_input_embeddings().weight.shape[0]
    assert not any("mask" in name for name, _ in lm.drafter.named_parameters())
    assert lm.diffusion.noise_tokens == size
    assert json.loads((folder / "run.json").read_text())["settings"]["noise"] == "uniform"
    again, prompt = unmask.load(folder), STORIES[3][:30]
    assert again.diffusion == lm.diffusion
    cycles = {"max_new_tokens": 40, "cycle": "two"}  # not those that this moment's clock chooses
    out, parent = again.generate(prompt, **cycles), unmask.load(tokenizer_and_model)
    assert out.texts == parent.generate(prompt, max_new_tokens=40).texts
    assert out.cycle_gains.tolist() == lm.generate(prompt, **cycles).cycle_gains.tolist()
    assert again.nelbo(STORIES[0], seed=1)[0].nats == lm.nelbo(STORIES[0], seed=1)[0].nats
    losses = [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()
              if "loss" in json.loads(row)]  # fmt: skip
    assert losses[-1] < losses[0]
    config = json.loads((folder / "config.json").read_text())
    for wrong, message in (
        (size + 1, "more than the"),
        (0, "as its tokenizer and drafter have them"),
        (-1, "must be 0, or a number"),
    ):
        config["diffusion"]["noise_tokens"] = wrong
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            unmask.load(folder)


def test_noise_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="noise='uniform' needs objective='distill'"):
        load_recipe("tri-mode", noise="uniform")
    with pytest.raises(ValueError, match="mask_per_place=true needs noise='mask'"):
        load_recipe("drafter", noise="uniform", mask_per_place=True)
    assert not load_recipe("drafter", noise="uniform").mask_per_place
    with pytest.raises(ValueError, match=r"noise_tokens 5 must be 0, or .* with two_stream attention"):
        replace(block_config(attention="bidirectional", clean=None), noise_tokens=5)
