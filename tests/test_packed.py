"""Linear maps packed for oneDNN against the same model's plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import MASK, SUPPORTED, VOCABULARY, random_tokens, tiny_model
from decode import sample_autoregressive, sample_speculative
from test_speculative import causal_config
from torch import Tensor

from unmask import hf
from unmask.core.attention import Layout, causal
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.hf.fast import packed as module

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")

ALWAYS = 1 << 30


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Packing always pays; the rows of each packed product are kept here."""
    rows: list[int] = []
    product = module._Group.product

    def counted(group: module._Group, x: Tensor) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return product(group, x)

    monkeypatch.setattr(module, "_largest_that_pays", lambda _: ALWAYS)
    monkeypatch.setattr(module._Group, "product", counted)
    return rows


def pair(name: str = "llama") -> tuple[hf.HFNetwork, hf.HFNetwork]:
    """The same model twice, plain and packed."""
    model = tiny_model(SUPPORTED[name](), torch.float32)
    plain, packed = hf.as_network(model, MASK), hf.as_network(copy.deepcopy(model), MASK)
    assert packed.pack()
    return plain, packed


@pytest.mark.parametrize("name", list(SUPPORTED))
def test_packed_passes_equal_the_plain_ones(name: str, products: list[int]) -> None:
    plain, fast = pair(name)
    assert fast.packed is not None
    ids = random_tokens(2, 9)
    layout = Layout.of(torch.arange(9).expand(2, 9))
    with torch.no_grad():
        a, b = plain(ids, layout, causal), fast(ids, layout, causal)
    assert len(products) == len(fast.packed.groups)
    assert (a - b)[..., :MASK].abs().max() < 1e-4 * a[..., :MASK].abs().max()


def test_maps_that_read_the_same_input_are_one_product() -> None:
    _, fast = pair()
    assert fast.packed is not None
    layers = fast.model.config.num_hidden_layers
    assert (
        sorted(len(group.maps) for group in fast.packed.groups) == [1] * (2 * layers + 1) + [2] * layers + [3] * layers
    )


@pytest.mark.parametrize("cycle", ["one", "two"])
def test_a_drafter_on_packed_maps_writes_the_same_text(cycle: str) -> None:
    model = tiny_model(SUPPORTED["llama"](), torch.float32)
    drafter = Drafter(model, VOCABULARY, DrafterConfig(4, 4.0))
    for up in drafter.up.values():
        torch.nn.init.normal_(up, std=0.1)
    config, prompts = causal_config(), [random_tokens(n, seed=n) for n in (3, 7)]
    config = type(config)(**(vars(config) | {"mask_token_id": VOCABULARY}))
    net = hf.as_network(model, VOCABULARY, gate=drafter.rows)
    expected = sample_speculative(net, config, prompts, max_new_tokens=24, cycle=cycle)
    assert net.pack()
    got = sample_speculative(net, config, prompts, max_new_tokens=24, cycle=cycle)
    assert got.new_tokens == expected.new_tokens
    assert got.num_forwards.tolist() == expected.num_forwards.tolist()


def test_changed_weights_are_packed_again_and_the_model_stays_as_it_was() -> None:
    plain, fast = pair()
    prompts = [random_tokens(5)]
    sample_autoregressive(fast, prompts, max_new_tokens=8)
    assert not any("forward" in m.__dict__ for m in fast.model.modules())
    with torch.no_grad():
        for net in (plain, fast):
            torch.manual_seed(1)
            for p in net.model.parameters():
                p += 0.1 * torch.randn_like(p)
    assert (
        sample_autoregressive(fast, prompts, max_new_tokens=20).new_tokens
        == sample_autoregressive(plain, prompts, max_new_tokens=20).new_tokens
    )
    for net in (plain, fast):
        net.model.lm_head.weight.data = -net.model.lm_head.weight.data
    assert (
        sample_autoregressive(fast, prompts, max_new_tokens=20).new_tokens
        == sample_autoregressive(plain, prompts, max_new_tokens=20).new_tokens
    )


def test_passes_with_a_graph_and_other_precisions_are_not_packed(products: list[int]) -> None:
    _, fast = pair()
    layout = Layout.of(torch.arange(4)[None])
    fast(random_tokens(1, 4), layout, causal).sum().backward()
    assert not products
    assert hf.as_network(tiny_model(SUPPORTED["llama"](), torch.float64), MASK).pack() == 0
