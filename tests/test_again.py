"""Layers that run again in the backward pass: the same gradients as if all had been kept, and less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import MASK, SUPPORTED, random_tokens, tiny_model
from torch.autograd.graph import saved_tensors_hooks

from unmask import hf
from unmask.core.attention import Layout, causal
from unmask.core.batch import Batch
from unmask.core.corruption import mask_complementary, segments
from unmask.core.drafter import DrafterConfig
from unmask.core.network import DiffusionConfig
from unmask.core.objectives import Diffusion, Distill, Joint, NextToken, Objective, predictable
from unmask.hf.layers import layers_of, runs_again

MODELS = ("llama", "gpt2", "mistral_window", "gemma3")
OBJECTIVES: dict[str, Objective] = {
    "next token": NextToken(),
    "masks apart": Diffusion(share_clean=False),
    "masks on one clean pass": Diffusion(),
    "joint, on one clean pass": Joint(0.3),
    "drafter": Distill("kl+tv"),
    "drafter, to the first error": Distill("first-error"),
}
LENGTH = 40


def gradients(name: str, objective: str, again: bool) -> tuple[float, list[torch.Tensor], int]:
    """Loss, gradients of all that learns, and the bytes that a pass keeps for its backward pass."""
    config = SUPPORTED[name]()
    model = tiny_model(config, torch.float64).train()
    hf.without_dropout(model)  # as in every run
    drafter = None
    if objective.startswith("drafter"):
        drafter = hf.drafter_on(model.requires_grad_(False), MASK, DrafterConfig(2, 4.0)).double()
        generator = torch.Generator().manual_seed(0)
        for p in drafter.up.values():
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    network = hf.as_network(model, MASK, gate=None if drafter is None else drafter.rows)
    if again:
        hf.checkpoint_layers(model)
    shape = DiffusionConfig(MASK, "two_stream", "causal", 4, False, "test", "0")
    position = torch.arange(LENGTH) % 28
    document = torch.arange(LENGTH) // 28
    layout = Layout.of(position[None].repeat(2, 1), document[None].repeat(2, 1))
    x0 = torch.stack([random_tokens(LENGTH, seed=n) for n in (1, 2)])
    t, noise = torch.rand(2, 2, LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = mask_complementary(t, noise, segments(layout, 4), predictable(layout))
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmask.hf.network.recomputing", lambda: saved_tensors_hooks(pack, lambda tensor: tensor))
        loss = OBJECTIVES[objective](network, shape, Batch(x0, layout, None), list(drawn))
    loss.sum.backward()
    learns = [p for p in (drafter or model).parameters() if p.requires_grad]
    assert "forward" not in vars(layers_of(model)[0])
    return float(loss.sum.detach()), [p.grad for p in learns if p.grad is not None], kept


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_kept_layers(name: str, objective: str) -> None:
    loss, expected, kept = gradients(name, objective, again=False)
    found, again, less = gradients(name, objective, again=True)
    assert found == pytest.approx(loss, rel=1e-12)
    assert len(again) == len(expected) > 4
    for ours, theirs in zip(again, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert less < kept / 2


def test_layers_run_again_only_where_gradients_are_wanted() -> None:
    model = tiny_model(SUPPORTED["llama"]())
    hf.checkpoint_layers(model)
    assert runs_again(model)
    with torch.no_grad():
        assert not runs_again(model)
    hf.checkpoint_layers(model, on=False)
    assert not runs_again(model)


def test_a_forward_of_a_hook_is_put_back() -> None:
    model = tiny_model(SUPPORTED["llama"]()).train()
    hf.checkpoint_layers(model)
    layer, seen = layers_of(model)[0], []
    plain = layer.forward

    def own(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return plain(*args, **kwargs)

    layer.forward = own
    ids = random_tokens(6)[None]
    hf.as_network(model)(ids, Layout.of(torch.arange(6)[None]), causal).sum().backward()
    assert layer.forward is own
    assert len(seen) == 2  # and again


def test_a_model_without_layers_is_refused() -> None:
    model = tiny_model(SUPPORTED["llama"]())
    del model.model.layers
    with pytest.raises(ValueError, match="gradient_checkpointing=true: LlamaForCausalLM has no list of layers"):
        hf.checkpoint_layers(model)
