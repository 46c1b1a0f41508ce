"""The slot cache against passes without a cache, whatever share of the slots a pass takes and in which order."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import transformers as tf
from conftest import _SIZES, MASK, SUPPORTED, block_config, network, random_tokens, tiny_model
from decode import sample_autoregressive, sample_blocks

from unmask import hf
from unmask.core.attention import Layout, bidirectional, block_causal, causal, window
from unmask.core.decoding import begin, denoise
from unmask.core.scoring import score_distilled
from unmask.hf import probes
from unmask.hf.fast import kv_cache as slots
from unmask.requirements import is_before
from unmask.sampling import Confidence

LENGTHS = (9, 3, 14)
NAMES = ["llama", "gpt2", "gpt_neox", "gemma3", "mistral_window", "qwen3"]


def alone(net, text: torch.Tensor) -> torch.Tensor:
    return net(text[None], Layout.of(torch.arange(len(text))[None]), causal)[0]


def attentive(name: str, implementation: str) -> hf.HFNetwork:
    model = tiny_model(SUPPORTED[name](), torch.float64)
    model.set_attn_implementation(implementation)
    return hf.as_network(model, MASK)


@pytest.mark.parametrize(
    ("name", "implementation"), [*((n, "sdpa") for n in NAMES), ("llama", "eager"), ("gemma2", "eager")]
)
@pytest.mark.parametrize("rows", [None, [0, 1, 2], [2], [1, 0], [0, 1, 2, 1], [2, 0, 1]])
@torch.no_grad()
def test_rows_on_ragged_slots_equal_whole_texts(name: str, implementation: str, rows: list[int] | None) -> None:
    """A row continues its slot; two rows of one slot, one after the other, see each other in the same pass."""
    net = attentive(name, implementation)
    relative = 1e-10 if implementation == "sdpa" else 1e-5  # eager attention takes its softmax in float32
    prompts = [random_tokens(n, seed=n) for n in LENGTHS]
    past = begin(net, causal, prompts)
    slot = list(range(3)) if rows is None else rows
    more = random_tokens(len(slot), 4, seed=5)
    position = torch.tensor([LENGTHS[s] + 4 * slot[:i].count(s) for i, s in enumerate(slot)])[:, None] + torch.arange(4)
    past.columns = int(position.max()) + 1
    got = net(more, Layout.of(position), causal, past=past.for_rows(rows))
    written: dict[int, torch.Tensor] = dict(enumerate(prompts))
    for i, s in enumerate(slot):
        written[s] = torch.cat([written[s], more[i]])
        expected = alone(net, written[s])[-4:]
        assert (got[i] - expected)[:, :MASK].abs().max() < relative * expected[:, :MASK].abs().max()


def indexed() -> tf.PreTrainedConfig:
    """Sparse attention, whose indexer chooses 4 keys and keeps numbers of its own for each token."""
    if is_before(tf.__version__, "5.17"):
        pytest.skip("before transformers 5.17 DeepSeek V3.2 is missing, or adds boolean masks to scores and is refused")
    return tf.DeepseekV32Config(
        **_SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        moe_intermediate_size=16, index_topk=4, index_n_heads=32, index_head_dim=16)  # fmt: skip


ODD = {
    "keys in the order of memory": lambda: tf.GPTNeoXJapaneseConfig(**_SIZES, intermediate_multiple_size=2),
    "numbers beside the keys": indexed,
}


@pytest.mark.parametrize("name", ODD)
@torch.no_grad()
def test_models_that_want_more_of_a_cache_are_served(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "GRAIN", 3)
    net = hf.as_network(tiny_model(ODD[name]()), MASK)
    text = random_tokens(1, 16)[0]
    whole = alone(net, text)
    past = begin(net, causal, [text[:7], text[:2], text[:9]])
    past.keep_slots(torch.tensor([0, 2]))
    for rows, position in ((None, [[7], [9]]), ([1], [[9]]), ([0, 1, 1], [[7], [9], [10]])):
        past.columns = 16 if rows else 12
        got = net(text[torch.tensor(position)], Layout.of(torch.tensor(position)), causal, past=past.for_rows(rows))
        for row, (p,) in enumerate(position):
            assert (got[row, 0] - whole[p])[:MASK].abs().max() < 1e-5 * whole[p, :MASK].abs().max()


@pytest.mark.parametrize("clean", ["block_causal", "causal"])
@torch.no_grad()
def test_finished_blocks_in_chunks_equal_finished_blocks_cached(clean: str) -> None:
    """An active block narrower than the finished ones splits them into rows of its width."""
    for shift in (False, True):
        net, config = network(), block_config(8, clean=clean, shift=shift)
        text, width = random_tokens(3, 24, seed=2), 3
        before = begin(net, config.pattern, text[:, :8], keep_logits=shift)
        xt, wanted = torch.full((3, width), MASK), torch.ones(3, width, dtype=torch.bool)
        starts = torch.tensor([[16], [8], [16]])
        before.columns = 24
        got = denoise(net, config, before, xt, Layout.of(starts + torch.arange(width)), wanted,
                      ([0, 2], text[[0, 2], 8:16]))  # fmt: skip
        assert before.lengths.tolist() == [16, 8, 16]
        for i, start in enumerate(starts[:, 0].tolist()):
            past = begin(net, config.pattern, text[i : i + 1, :start], keep_logits=shift)
            past.columns = start + width
            layout = Layout.of(start + torch.arange(width)[None])
            expected = denoise(net, config, past, xt[:1], layout, wanted[:1])
            assert (got.view(3, width, -1)[i] - expected)[:, :MASK].abs().max() < 1e-10
            again = denoise(net, config, before, xt, Layout.of(starts + torch.arange(width)), wanted)
            assert (again.view(3, width, -1)[i] - expected)[:, :MASK].abs().max() < 1e-10


@torch.no_grad()
def test_columns_that_nobody_has_written_change_nothing() -> None:
    """On a GPU a pass reaches further than its tokens: the mask hides the rest."""
    net, config, text = network(), block_config(4), random_tokens(3, 12)
    wanted = torch.ones(3, 4, dtype=torch.bool)
    got = []
    for columns in (12, 64):
        past = begin(net, config.pattern, text[:, :8])
        past.columns = columns
        got.append(denoise(net, config, past, text[:, 8:], Layout.of(torch.arange(8, 12).expand(3, 4)), wanted))
    assert (got[0] - got[1])[:, :MASK].abs().max() < 1e-12


def test_growing_buffers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net, config, prompts = network(), block_config(4), [random_tokens(n, seed=n) for n in (1, 6, 11)]
    blocks = sample_blocks(net, config, prompts, max_new_tokens=40, select=Confidence(2))
    ar = sample_autoregressive(net, prompts, max_new_tokens=40)
    monkeypatch.setattr(slots, "GRAIN", 3)
    assert sample_blocks(net, config, prompts, max_new_tokens=40, select=Confidence(2)).new_tokens == blocks.new_tokens
    assert sample_autoregressive(net, prompts, max_new_tokens=40).new_tokens == ar.new_tokens


@torch.no_grad()
def test_long_prompts_go_through_chunked_attention() -> None:
    net = network(tiny_model(SUPPORTED["llama"](), torch.float32))
    prompts = [random_tokens(300, seed=1), random_tokens(270, seed=2), random_tokens(5, seed=3)]
    past = begin(net, causal, prompts)
    last = random_tokens(3, 1, seed=4)
    past.columns = 301
    got = net(last, Layout.of(past.lengths[:, None]), causal, past=replace(past, rows=None))[:, 0]
    for i, prompt in enumerate(prompts):
        expected = alone(net, torch.cat([prompt, last[i]]))[-1]
        assert (got[i] - expected)[:MASK].abs().max() < 1e-5 * expected[:MASK].abs().max()


def test_no_mask_is_built_where_everything_is_seen() -> None:
    net, config = network(), block_config(4)
    seen: list[int] = []
    original = net.make_masks

    def watch(*arguments):
        seen.append(original(*arguments).numel())
        return original(*arguments)

    net.make_masks = watch
    sample_blocks(net, config, [random_tokens(4, seed=i) for i in range(3)], max_new_tokens=8, select=Confidence(2))
    # After the prefill: two forwards that share theirs, the one that commits, one more.
    assert seen[1:] == [1, 3 * 2 * 4 * 12, 1]


def test_forwards_of_a_block_share_their_mask() -> None:
    net, built = network(), []
    original = net.make_masks
    net.make_masks = lambda *arguments: built.append(1) or original(*arguments)
    out = sample_blocks(net, block_config(8), [random_tokens(n, seed=n) for n in (3, 9)], max_new_tokens=21,
                        select=Confidence(1))  # fmt: skip
    assert out.num_forwards.tolist() == [21, 21]
    # The second row's prefill; each block entered by a row with the block it left and without; the last one's end.
    assert len(built) <= 1 + 2 * (3 + 3) + 1


@torch.no_grad()
def test_a_pass_elsewhere_gets_a_mask_of_its_own() -> None:
    """The same layout on other lengths, in other slots, or after the cache has grown, is another one."""
    net, texts = network(), [random_tokens(6, seed=1), random_tokens(3, seed=2)]
    more = random_tokens(1, 2, seed=3)
    for text in (texts[0], texts[1], texts[0]):
        past = begin(net, causal, [text])
        past.columns = 8
        got = net(more, Layout.of(torch.tensor([[6, 7]])), causal, past=past)[0]
        whole = torch.cat([text, more[0]])
        position = torch.cat([torch.arange(len(text)), torch.tensor([6, 7])])
        expected = net(whole[None], Layout.of(position[None]), causal)[0, -2:]
        assert (got - expected)[:, :MASK].abs().max() < 1e-10
    past = begin(net, causal, texts)
    past.columns = 10
    for slot in (0, 1, 0):
        got = net(more, Layout.of(torch.tensor([[6, 7]])), causal, past=past.for_rows([slot]))[0]
        whole = torch.cat([texts[slot], more[0]])
        position = torch.cat([torch.arange(len(texts[slot])), torch.tensor([6, 7])])
        expected = net(whole[None], Layout.of(position[None]), causal)[0, -2:]
        assert (got - expected)[:, :MASK].abs().max() < 1e-10


@torch.no_grad()
def test_a_mask_is_told_by_itself_and_not_by_its_address() -> None:
    """Many patterns in turn at one index: a freed mask leaves memory in which another one is made."""
    net, texts = network(), [random_tokens(6, seed=1), random_tokens(4, seed=2)]
    layout, more = Layout.of(torch.arange(4, 8).repeat(2, 1)), random_tokens(2, 4, seed=3)
    past = begin(net, causal, texts)
    past.columns = 10
    patterns = [causal, bidirectional, *map(window, (2, 3, 5)), *map(block_causal, (2, 3))]
    for pattern in patterns * 3:
        again = begin(fresh := network(net.model), causal, texts)
        again.columns = 10
        expected = fresh(more, layout, pattern, past=again)
        assert torch.equal(net(more, layout, pattern, past=past), expected)


def test_keys_and_values_go_with_their_cache() -> None:
    """Without a circle that only Python's collector would break, many requests later."""
    net = network()
    gc.collect()
    gc.disable()
    try:
        past = begin(net, causal, [random_tokens(5)])
        kept = weakref.ref(past.cache), *(weakref.ref(layer) for layer in past.cache.layers)
        keys = weakref.ref(past.cache.layers[0].keys)
        del past
        assert keys() is None
        assert [ref() for ref in kept] == [None] * len(kept)
        sample_autoregressive(net, [random_tokens(5)], max_new_tokens=3)
        assert not [x for x in gc.get_objects() if type(x) is slots.SlotCache]
    finally:
        gc.enable()


def test_a_cache_that_a_model_cannot_use_is_refused_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole pass needs none."""
    monkeypatch.delattr(slots._SlotLayer, "update_indexer")
    probes._probe_cache.cache_clear()
    net = hf.as_network(tiny_model(indexed()), MASK)
    probes._probe_cache.cache_clear()
    tokens, layout = random_tokens(1, 8), Layout.of(torch.arange(8)[None])
    assert net(tokens, layout, causal).shape == (1, 8, MASK + 1)
    with pytest.raises(hf.UnsupportedModelError, match=r"DeepseekV32ForCausalLM cannot be decoded.*update_indexer"):
        sample_autoregressive(net, [tokens[0]], max_new_tokens=2)
    with pytest.raises(hf.UnsupportedModelError, match="cache of its clean text"):
        score_distilled(net, block_config(4, clean="causal"), tokens, tokens, layout, layout.position > 0)
