"""Drafters whose whole draft forward is adapted, the last verified token's row among it (`adapt_anchor`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES, SUPPORTED, VOCABULARY, block_config, random_tokens, tiny_model
from transformers import DynamicCache

import unmask
from unmask import hf
from unmask.core.attention import Layout
from unmask.core.batch import Batch
from unmask.core.corruption import Corruption
from unmask.core.decoding import begin, draft_adapted
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.network import DiffusionConfig
from unmask.core.objectives import distill_loss, predictable
from unmask.core.scoring import noisy_ids, score
from unmask.recipe import load_recipe
from unmask.resolve import resolve
from unmask.sampling import Coupled, Rejection, Request, Speculative, sample_autoregressive
from unmask.sampling.cycles import Costs, Cycle, Experience, MeasuredPace
from unmask.training.step import step_loss

SHAPES = [(False, "bidirectional"), (False, "causal"), (True, "bidirectional"), (True, "causal")]


def anchored(shift: bool, noisy: str, noise_tokens: int, mask_rows: int = 1) -> DiffusionConfig:
    config = replace(block_config(4, shift=shift, clean="causal"), noisy_attention=noisy, mask_token_id=VOCABULARY)
    return replace(config, noise_tokens=noise_tokens, mask_rows=mask_rows, adapt_anchor=True)


def gated(name: str = "llama", mask_rows: int = 0) -> tuple[hf.HFNetwork, Drafter]:
    model = tiny_model(SUPPORTED[name](), torch.float64)
    drafter = Drafter(model, VOCABULARY, DrafterConfig(4, 4.0, mask_rows=mask_rows))
    torch.manual_seed(1)
    for up in drafter.up.values():
        torch.nn.init.normal_(up, std=0.3)
    if mask_rows:
        torch.nn.init.normal_(drafter.masks)
    return hf.as_network(model, VOCABULARY, gate=drafter.rows), drafter


@pytest.mark.parametrize("mask_rows", [0, 1, 4])
@pytest.mark.parametrize(("shift", "noisy"), SHAPES)
@torch.no_grad()
def test_a_draft_forward_is_the_training_pass_over_an_aligned_block(shift: bool, noisy: str, mask_rows: int) -> None:
    """The training pass over [noisy | clean], where the block's first token is not masked, is the slow twin."""
    net, _ = gated(mask_rows=mask_rows)
    config = anchored(shift, noisy, 0 if mask_rows else VOCABULARY, max(1, mask_rows))
    x0, layout = random_tokens(2, 12), Layout.of(torch.arange(12).expand(2, 12))
    wanted = layout.position >= 9
    expected = score(net, config, x0.masked_fill(wanted, VOCABULARY), x0, layout, wanted).unflatten(0, (2, -1))
    past = begin(net, config.pattern, x0[:, :8])
    past.columns = 14
    last = layout.subset(..., slice(8, 9))
    drafts = draft_adapted(net, config, past, x0[:, 8:9], last, torch.tensor([3, 3]))
    assert (drafts - expected).abs().max() < 1e-10
    assert past.lengths.tolist() == [8, 8]
    if noisy == "causal":  # fewer drafts are the first ones, also beside a slot that makes more of them
        ragged = draft_adapted(net, config, past, x0[:, 8:9], last, torch.tensor([1, 3]))
        assert (ragged[1] - expected[1]).abs().max() < 1e-10
        assert (ragged[0, :1] - expected[0, :1]).abs().max() < 1e-10


@torch.no_grad()
def test_an_engine_that_switches_its_adapter_for_each_call_drafts_the_same() -> None:
    """Stock passes: the base's over the prefix, then one of the merged model, causal, over [last, random tokens]."""
    net, drafter = gated()
    config, ids = anchored(True, "causal", VOCABULARY), random_tokens(1, 9)
    past = begin(net, config.pattern, ids[:, :8])
    past.columns = 14
    layout = Layout.of(torch.tensor([[8]]))
    drafts = draft_adapted(net, config, past, ids[:, 8:], layout, torch.tensor([4]))
    base, merged = (tiny_model(SUPPORTED["llama"](), torch.float64) for _ in range(2))
    for name, module in merged.named_modules():
        key = name.replace(".", "-")
        if key in drafter.up:
            module.weight += drafter.up[key] @ drafter.down[key]
    position = torch.arange(9, 12)[None]
    noise = noisy_ids(config, torch.full((1, 3), VOCABULARY), Layout.of(position))
    cache, key = DynamicCache(), hf.network.cache_keyword(base)
    base(ids[:, :8], use_cache=True, **{key: cache})
    stock = merged(torch.cat([ids[:, 8:], noise], dim=1), use_cache=True, **{key: cache}).logits
    assert (stock - drafts).abs().max() < 1e-10


def test_a_training_step_leaves_the_first_token_of_each_block_as_it_is() -> None:
    net, drafter = gated(mask_rows=1)
    config = anchored(False, "bidirectional", 0)
    options = {"block_size": 4, "max_length": 16, "batch_size": 3, "mask_per_place": False, "adapt_anchor": True}
    settings = resolve(load_recipe("drafter", **options), 1000, 128)
    batch = Batch(random_tokens(3, 16), Layout.of(torch.arange(16).expand(3, 16)))
    loss = step_loss(net, settings, config, batch, 0, torch.arange(3))
    masked = predictable(batch.layout) & (batch.layout.position % 4 > 0)
    hand = distill_loss(net, config, batch.x0, batch.layout, Corruption(masked, masked.float()), "kl+tv")
    assert loss.sum.item() == pytest.approx(hand.sum.item(), rel=1e-10)
    loss.sum.backward()
    assert all(p.grad is not None for p in drafter.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize(("shift", "noisy"), [SHAPES[0], SHAPES[3]])
def test_the_text_is_that_of_ar_decoding_in_ragged_batches_and_queues(name: str, shift: bool, noisy: str) -> None:
    net, drafter = gated(name)
    prompts = [random_tokens(n, seed=n) for n in (1, 6, 11, 3)]
    off, config = hf.as_network(net.model, VOCABULARY), anchored(shift, noisy, VOCABULARY)
    for temperature, acceptance, length in ((0.0, None, 4), (0.0, Rejection(), "auto"), (1.0, Coupled(), 6)):
        request = Request(max_new_tokens=21, temperature=temperature, seed=5, context_length=30, batch_size=3)
        expected = sample_autoregressive(off, prompts, request)
        measured = Speculative(acceptance=acceptance)(net, config, prompts, request)
        assert measured.new_tokens == expected.new_tokens
        got = Speculative(draft_length=length, acceptance=acceptance)(net, config, prompts, request)
        assert got.new_tokens == expected.new_tokens
        gains = got.cycle_gains * torch.arange(got.cycle_gains.shape[1])
        assert gains.sum(-1).tolist() == [len(new) for new in got.new_tokens]
        assert got.num_forwards.tolist() == (2 * got.cycle_gains.sum(-1)).tolist()
    one = Speculative(draft_length=1)(net, config, prompts, request)  # nothing is drafted: AR decoding
    assert one.num_forwards.tolist() == [len(new) for new in one.new_tokens]
    drafter.detach()


def test_drafts_that_are_right_gain_whole_blocks(tokenizer_and_model: Path) -> None:
    """Adapters of zero, a shift and causal noise: the first draft is the AR model's own, so a cycle gains two."""
    lm = unmask.load(tokenizer_and_model, dtype=torch.float64)
    size = lm.model.get_input_embeddings().weight.shape[0]
    net = hf.as_network(lm.model, size, gate=Drafter(lm.model, size, DrafterConfig(2, 4.0, mask_rows=0)).rows)
    config = replace(anchored(True, "causal", size), mask_token_id=size, noise_tokens=size)
    request = Request(max_new_tokens=20, context_length=64)
    out = Speculative(draft_length=2)(net, config, [torch.tensor([3, 5, 8])], request)
    assert out.cycle_gains[0].tolist() == [0, 0, 10]


def test_a_run_saves_what_its_drafts_read_and_bad_requests_are_named(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    run: dict[str, Any] = {"show_progress": False, "max_tokens": 2000, "max_length": 64, "block_size": 4,
                           "batch_size": 4, "adapt_anchor": True, "noise": "uniform", "shift": True,
                           "noisy_attention": "causal"}  # fmt: skip
    unmask.adapt(tokenizer_and_model, stories, "drafter", tmp_path / "drafter", **run)
    lm = unmask.load(tmp_path / "drafter")
    assert lm.diffusion.adapt_anchor
    text = lm.generate(STORIES[0][:30], mode="ar", max_new_tokens=30).texts
    assert lm.generate(STORIES[0][:30], max_new_tokens=30).texts == text
    with pytest.raises(ValueError, match=r"cycle 'one' needs the AR model's row .* use 'two' or 'auto'"):
        lm.generate("a", cycle="one")
    with pytest.raises(ValueError, match="adapt_anchor=true needs objective='distill'"):
        load_recipe("tri-mode", adapt_anchor=True)
    with pytest.raises(ValueError, match="adapt_anchor=true with first_block_size=1 leaves nothing to draft"):
        load_recipe("drafter", adapt_anchor=True, first_block_size=1)
    with pytest.raises(ValueError, match="adapt_anchor is for drafters, whose clean half is causal"):
        replace(block_config(), adapt_anchor=True)


def test_a_measured_pace_weighs_a_draft_forward_that_gives_no_token() -> None:
    """Drafts that are never accepted: two forwards gain one token, or two where the draft forward is AR's too."""
    chosen = {}
    for apart in (True, False):
        costs = {1: 1.0, 2: 0.9}
        pace = MeasuredPace(4, Experience(Costs(dict(costs)), Costs(dict(costs))), 0, apart=apart)
        assert all(cycle.forwards == 2 for cycle in pace.cycles[1:]) == apart
        for _ in range(200):
            pace.learn_drafts([3], [0])
        pace.seconds_without_drafts = 10.0  # enough for a probe that costs 0.2 seconds, not for one of 0.8
        chosen[apart] = pace.choose(1)
    assert chosen[True] == Cycle(1, 1)
    assert chosen[False] != Cycle(1, 1)
