"""Compiled decoding passes against the same passes without compilation: equal tokens, compiled
for a small number of shapes, on memory that stays in place."""

from __future__ import annotations

import gc
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, random_tokens, tiny_model
from decode import sample_autoregressive, sample_blocks, sample_speculative
from torch._dynamo.utils import counters

from unmask import hf
from unmask.core.attention import Layout, causal
from unmask.core.decoding import begin
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.hf.fast.graphs import CompiledPasses
from unmask.hf.layers import layers_of
from unmask.sampling import Confidence, Threshold

EAGER = {"backend": "eager"}
"""Traced like any compiled pass, but run by torch's own kernels; the last test compiles in earnest."""


@pytest.fixture(autouse=True)
def nothing_compiled(request: pytest.FixtureRequest) -> None:
    """What was compiled before is forgotten, but for the tests of one pair."""
    if "llama_pair" not in request.fixturenames:
        torch._dynamo.reset()
    counters.clear()


def pair(name: str = "llama", implementation: str = "sdpa") -> tuple[hf.HFNetwork, hf.HFNetwork]:
    """The same model twice, the second with compiled passes."""
    plain, compiled = (tiny_model(SUPPORTED[name](), torch.float64) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    for model in (plain, compiled):
        model.set_attn_implementation(implementation)
    networks = hf.as_network(plain, MASK), hf.as_network(compiled, MASK)
    networks[1].compile(**EAGER)
    return networks


@pytest.fixture(scope="module")
def llama_pair() -> tuple[hf.HFNetwork, hf.HFNetwork]:
    """One pair for the tests that only compare, which stand one after the other: its shapes are compiled once."""
    torch._dynamo.reset()
    return pair()


PROMPTS = [random_tokens(n, seed=n) for n in (3, 9, 14, 6, 1)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2", "gemma3"])
def test_ragged_blocks_equal_those_decoded_plainly(name: str) -> None:
    plain, compiled = pair(name, "eager" if name == "gemma2" else "sdpa")
    options = {"max_new_tokens": 14, "select": Threshold(0.05)}
    want, got = (sample_blocks(net, block_config(4), PROMPTS[:2], **options) for net in (plain, compiled))
    assert got.new_tokens == want.new_tokens
    assert got.num_forwards.tolist() == want.num_forwards.tolist()
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("shift", [False, True])
def test_a_shifted_guided_windowed_queue_equals_the_plain_one(
    shift: bool, llama_pair: tuple[hf.HFNetwork, hf.HFNetwork]
) -> None:
    plain, compiled = llama_pair
    common = {"max_new_tokens": 10, "temperature": 1.0, "seed": 3, "batch_size": 2}
    for options in ({"guidance_scale": 2.0}, {"select": Confidence(2)} | ({} if shift else {"window": 2})):
        want, got = (sample_blocks(net, block_config(4, shift=shift), PROMPTS[:3], **common, **options)
                     for net in (plain, compiled))  # fmt: skip
        assert got.new_tokens == want.new_tokens


@pytest.mark.parametrize("own", [{}, {"draft_length": "auto"}, {"cycle": "one"}])
def test_speculation_and_ar_equal_the_plain_ones(own: dict, llama_pair: tuple[hf.HFNetwork, hf.HFNetwork]) -> None:
    plain, compiled = llama_pair
    options = {"max_new_tokens": 16, "end_token_ids": (5, 9), "batch_size": 2}
    config = block_config(6, clean="causal")
    want, got = (sample_speculative(net, config, PROMPTS, **own, **options) for net in (plain, compiled))
    assert (got.new_tokens, got.num_forwards.tolist()) == (want.new_tokens, want.num_forwards.tolist())
    want, got = (sample_autoregressive(net, PROMPTS, **options) for net in (plain, compiled))
    assert got.new_tokens == want.new_tokens


def test_rows_that_leave_and_longer_texts_need_few_shapes() -> None:
    """Rows end one after the other and texts grow; the shapes are those of 4, 2 and 1 slots."""
    _, compiled = pair()
    prompts = [random_tokens(n, seed=n) for n in (4, 12, 24, 40)]
    sample_autoregressive(compiled, prompts, max_new_tokens=80, context_length=90)
    assert counters["stats"]["unique_graphs"] <= 2 * 3
    before = counters["stats"]["unique_graphs"]
    gc.collect()
    sample_autoregressive(compiled, [random_tokens(30, seed=5)] * 3, max_new_tokens=50)
    assert counters["stats"]["unique_graphs"] == before


def test_memory_is_used_again_and_does_not_move() -> None:
    _, compiled = pair()
    assert isinstance(compiled.compiled, CompiledPasses)

    def decode(n: int) -> None:
        sample_blocks(compiled, block_config(4), PROMPTS[:n], max_new_tokens=8)
        gc.collect()  # compilation keeps what it has seen until then

    decode(4)
    ((memory, layers),) = compiled.compiled._free
    address = [layer.keys.data_ptr() for layer in layers]
    for n in (4, 3):
        decode(n)
        assert compiled.compiled._free == [(memory, layers)]
        assert [layer.keys.data_ptr() for layer in layers] == address
    decode(5)  # what is larger serves for what was smaller
    assert [memory.room for memory, _ in compiled.compiled._free] == [8]


def test_memory_that_would_not_do_is_not_used_again() -> None:
    """Other weights, another precision, numbers that are not finite, a pass that failed half-way."""
    _, compiled = pair()
    assert isinstance(compiled.compiled, CompiledPasses)

    def decode(prompts: list[torch.Tensor]) -> list[list[int]]:
        got, plain = (sample_autoregressive(net, prompts, max_new_tokens=4).new_tokens
                      for net in (compiled, hf.as_network(compiled.model, MASK)))  # fmt: skip
        gc.collect()
        assert got == plain
        return got

    weights = {name: value.clone() for name, value in compiled.model.state_dict().items()}
    before = decode(PROMPTS[1:3])
    for parameter in compiled.model.parameters():
        parameter.data.fill_(torch.nan)
    decode(PROMPTS[1:3])
    compiled.model.load_state_dict(weights)
    assert decode(PROMPTS[1:3]) == before
    for layer, broken in ((0, False), (1, True), (1, False)):
        attention = compiled.model.model.layers[layer].self_attn
        attention.forward = (lambda **_: 1 / 0) if broken else type(attention).forward.__get__(attention)
        if broken:
            compiled.compiled._free.clear()
            with pytest.raises(ZeroDivisionError):
                sample_autoregressive(compiled, PROMPTS[1:3], max_new_tokens=4)
            gc.collect()
            assert not compiled.compiled._free
    decode([PROMPTS[4]])
    compiled.model.float()
    decode(PROMPTS[1:3])
    with torch.no_grad():
        past = begin(compiled, causal, PROMPTS[1:3])
        past.set_columns(12)
        assert compiled(torch.full((2, 1), 5), Layout.of(past.lengths[:, None]), causal, past=past).isfinite().any()


def test_an_interrupted_pass_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    _, compiled = pair()
    assert isinstance(compiled.compiled, CompiledPasses)
    ids = random_tokens(1, 20)
    before = compiled.model(ids).logits
    where, _ = compiled.compiled._compiled

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compiled.compiled, "_compiled", (where, interrupted))
        with pytest.raises(KeyboardInterrupt):
            sample_autoregressive(compiled, PROMPTS[1:3], max_new_tokens=4)
    assert torch.equal(compiled.model(ids).logits, before)
    assert torch.equal(pickle.loads(pickle.dumps(compiled.model))(ids).logits, before)
    assert not hasattr(compiled.config, "unmask_slots")


def test_layers_compiled_for_training_decode_as_they_are() -> None:
    plain, trained = pair()
    trained.compiled = None
    for layer in layers_of(trained.model):
        layer.compile(**EAGER)
    want, got = (sample_blocks(net, block_config(4), PROMPTS[:2], max_new_tokens=6) for net in (plain, trained))
    assert got.new_tokens == want.new_tokens
    assert counters["stats"]["unique_graphs"] == 0
    assert all(layer._compiled_call_impl is not None for layer in layers_of(trained.model))


def test_what_takes_no_fixed_shape_runs_as_it_is() -> None:
    _, compiled = pair()
    assert isinstance(compiled.compiled, CompiledPasses)
    past = begin(compiled, causal, PROMPTS[:3])
    assert counters["stats"]["unique_graphs"] == 0  # prefills come in every length
    assert compiled.compiled.takes(past)
    assert compiled.compiled.takes(past.for_rows([0, 1, 2, 1]))
    assert not compiled.compiled.takes(past.for_rows([1, 2]))
    past.columns = 1000
    assert not compiled.compiled.takes(past)


@pytest.mark.parametrize("mode", ["speculative", "diffusion"])
def test_a_drafter_acts_on_the_same_rows(mode: str) -> None:
    """Drafts are a suffix of every row; active blocks beside finished ones are some of the rows."""
    networks = pair()
    for net in networks:
        drafter = Drafter(net.model, MASK + 1, DrafterConfig(4, mask_rows=2)).double()
        for seed, up in enumerate(drafter.up.values()):
            torch.nn.init.normal_(up, std=0.3, generator=torch.Generator().manual_seed(seed))
        net.gate, net.mask_token_id = drafter.rows, MASK + 1
    config = replace(block_config(4, clean="causal"), mask_token_id=MASK + 1, mask_rows=2)
    sample = sample_speculative if mode == "speculative" else sample_blocks
    want, got = (sample(net, config, PROMPTS[:3], max_new_tokens=14) for net in networks)
    assert (got.new_tokens, got.num_forwards.tolist()) == (want.new_tokens, want.num_forwards.tolist())


def test_compiled_by_inductor_too() -> None:
    plain, compiled = pair()
    compiled.compile()
    options = {"max_new_tokens": 10, "select": Confidence(2)}
    want, got = (sample_blocks(net, block_config(4), PROMPTS[:1], **options) for net in (plain, compiled))
    assert got.new_tokens == want.new_tokens
