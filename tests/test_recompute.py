"""Results made again in the backward pass: the same gradients, less memory, nothing left behind."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, random_tokens, tiny_model
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from unmask import hf
from unmask.core.attention import Layout
from unmask.core.corruption import mask_exact, segments
from unmask.core.objectives import diffusion_loss, predictable
from unmask.hf.fast.recompute import _Kept, _Made, _pack, recomputing


@pytest.mark.parametrize("name", SUPPORTED)
def test_gradients_are_those_of_kept_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SUPPORTED[name]()
    config.max_position_embeddings = config.n_positions = 160
    network = hf.as_network(tiny_model(config), MASK)
    x0, layout = random_tokens(2, 144), Layout.of(torch.arange(144).expand(2, -1))
    noise, t = torch.rand(2, 2, 144, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = mask_exact(t, noise, segments(layout, 8), predictable(layout))
    results = []
    for context in (recomputing, nullcontext):
        monkeypatch.setattr(hf.network, "recomputing", context)
        loss = diffusion_loss(network, block_config(8), x0, layout, drawn).sum
        results.append(torch.autograd.grad(loss, list(network.model.parameters()), allow_unused=True))
    for made, kept in zip(*results, strict=True):
        assert kept is None or torch.equal(made, kept)


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [silu, gelu, lambda x: gelu(x, approximate="tanh"), lambda x: x * x]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_map_keeps_neither_its_activation_nor_its_product(activation: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, up, down = (torch.randn(n, 6, generator=generator, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6))

    def run() -> Tensor:
        inside = activation(linear(x[None], up))
        product = inside * linear(x[None], up)
        assert isinstance(_pack(inside), _Made)
        assert isinstance(_pack(product.view(-1, 6)), _Made)
        assert all(isinstance(_pack(other), _Kept) for other in (x, linear(x, up), 2 * x, x.detach() * x))
        return linear(product, down).square().sum()

    kept = torch.autograd.grad(run(), (x, up, down))
    with recomputing():
        made = torch.autograd.grad(run(), (x, up, down))
    for a, b in zip(made, kept, strict=True):
        assert torch.equal(a, b)


def test_a_graph_that_nobody_differentiates_is_freed() -> None:
    x = torch.rand(4, requires_grad=True)
    with recomputing():
        y = x.rsqrt()  # keeps its own result
    left = torch._C._WeakTensorRef(y)
    del y
    assert left.expired()


def test_a_kept_tensor_that_was_changed_is_refused() -> None:
    x, y = (torch.rand(4, requires_grad=True) for _ in "xy")
    with recomputing():
        kept = x + 1
        out = (kept * y).sum()
    kept.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with recomputing():
        product = x * y
        out = (product * y).sum()
    with torch.no_grad():
        product.add_(1)
    assert torch.autograd.grad(out, x)[0].equal(y * y)  # made again, it is what it was
