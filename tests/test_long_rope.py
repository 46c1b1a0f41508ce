"""Rotary factors that change with the length of a text: each text has those of its own, whatever shares its pass."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from conftest import _GQA, MASK, block_config, random_tokens, tiny_model
from decode import sample_autoregressive, sample_blocks, sample_speculative

import unmask
from unmask import hf
from unmask.core.attention import PADDING, Layout, causal
from unmask.core.scoring import score, score_distilled, score_joint
from unmask.hf.long_rope import rotary_modules
from unmask.hf.replicas import replicate

FIRST = 24
_FACTORS = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 3.0, 6.0, 12.0], "original_max_position_embeddings": FIRST}  # fmt: skip
MODELS = {
    "phi3": lambda: tf.Phi3Config(**_GQA, original_max_position_embeddings=FIRST, rope_parameters=dict(_FACTORS)),
    "phimoe": lambda: tf.PhimoeConfig(
        **_GQA, num_local_experts=4, num_experts_per_tok=2, original_max_position_embeddings=FIRST,
        rope_parameters=_FACTORS | {"short_mscale": 1.1, "long_mscale": 1.3}),
    "llama": lambda: tf.LlamaConfig(**_GQA, rope_parameters=dict(_FACTORS)),
}  # fmt: skip


def long_network(name: str = "phi3", mask: int | None = MASK) -> hf.HFNetwork:
    return hf.as_network(tiny_model(MODELS[name](), torch.float32 if name == "phimoe" else torch.float64), mask)


def stock(net: hf.HFNetwork, text: torch.Tensor) -> torch.Tensor:
    return net.model(input_ids=text[None], use_cache=False).logits[0]


def assert_close(net: hf.HFNetwork, got: torch.Tensor, expected: torch.Tensor) -> None:
    relative = 1e-5 if net.model.dtype == torch.float32 else 1e-10
    assert (got - expected)[:, :MASK].abs().max() <= relative * expected[:, :MASK].abs().max()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_texts_of_a_pass_equal_stock_passes_over_each_alone(name: str) -> None:
    """Batch-mates, packed documents and padding on both sides of the change, in one pass."""
    net = long_network(name)
    cuts = ([40], [FIRST, 16], [FIRST + 1, 15], [10, 30])
    position = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in (*cuts[:3], [40])])
    document = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in cuts])
    document[3, 10:] = PADDING  # its positions run on past the change
    tokens = random_tokens(4, 40)
    got = net(tokens, Layout.of(position, document), causal)
    for row, cut in enumerate(cuts):
        for d in range(len(cut) if row < 3 else 1):
            at = document[row] == d
            assert_close(net, got[row][at], stock(net, tokens[row][at]))


@torch.no_grad()
def test_the_factors_differ_at_all() -> None:
    net, text = long_network(), random_tokens(1, FIRST + 1)[0]
    assert (stock(net, text)[:FIRST] - stock(net, text[:FIRST])).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["phi3", "phimoe"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_ar_text_is_stock_generates(name: str, batch_size: int | None) -> None:
    """Prompts that begin before, at and past the change; slots that are used again."""
    net = long_network(name, None)
    prompts = [random_tokens(1, n, seed=n)[0] for n in (9, FIRST - 1, FIRST, FIRST + 1, FIRST + 9)]
    got = sample_autoregressive(net, prompts, max_new_tokens=26, batch_size=batch_size).new_tokens
    for prompt, new in zip(prompts, got, strict=True):
        text = net.model.generate(prompt[None], max_new_tokens=26, do_sample=False, eos_token_id=None,
                                  attention_mask=torch.ones_like(prompt[None]))  # fmt: skip
        assert new == text[0, len(prompt) :].tolist()


@pytest.mark.parametrize("cycle", ["one", "two"])
@pytest.mark.parametrize("draft", [2, 5])
def test_speculative_text_is_the_ar_text(draft: int, cycle: str) -> None:
    net, config = long_network(), block_config(8, clean="causal")
    prompts = [random_tokens(1, n, seed=n)[0] for n in (3, 17, FIRST - 2, FIRST, FIRST + 4)]
    expected = sample_autoregressive(net, prompts, max_new_tokens=30).new_tokens
    got = sample_speculative(net, config, prompts, max_new_tokens=30, draft_length=draft, cycle=cycle)
    assert got.new_tokens == expected


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("clean", ["causal", "block_causal"])
def test_blocks_of_a_row_do_not_depend_on_its_batch(clean: str, shift: bool) -> None:
    net, config = long_network(), block_config(4, clean=clean, shift=shift)
    prompts = [random_tokens(1, n, seed=n)[0] for n in (3, 14, FIRST - 2, FIRST + 8)]
    together = sample_blocks(net, config, prompts, max_new_tokens=24).new_tokens
    alone = [sample_blocks(net, config, [prompt], max_new_tokens=24).new_tokens[0] for prompt in prompts]
    assert together == alone


@torch.no_grad()
def test_a_clean_pass_and_noisy_passes_on_it_share_the_factors_of_their_text() -> None:
    net, config = long_network(), block_config(8, clean="causal")
    x0, layout = random_tokens(3, 32), Layout.of(torch.arange(32).expand(3, 32))
    layout.document[1, FIRST:], layout.document[2, FIRST + 1 :] = PADDING, PADDING
    masked = layout.real & (layout.position > 0) & (random_tokens(3, 32, seed=4) % 2 == 0)
    xt = x0.masked_fill(masked, MASK)
    one, ar = score_joint(net, config, xt, x0, layout, masked, masked)
    apart, ar_apart = score_distilled(net, config, xt, x0, layout, masked)
    assert_close(net, apart, one)
    assert_close(net, ar_apart, ar)
    alone = []
    for i, n in enumerate((32, FIRST, FIRST + 1)):
        at = slice(i, i + 1), slice(0, n)
        alone.append(score(net, config, xt[at], x0[at], layout.subset(*at), masked[at]))
    assert_close(net, one, torch.cat(alone))


def test_copies_for_threads_write_factors_of_their_own() -> None:
    """Each pass writes its factors to a buffer of the model: threads on texts of both kinds would race."""
    net = long_network()
    twin = replicate(net)
    for mine, its in zip(rotary_modules(net.model), rotary_modules(twin.model), strict=True):
        assert mine.inv_freq.data_ptr() != its.inv_freq.data_ptr()


def test_factors_of_code_that_is_not_transformers_are_refused() -> None:
    model = tiny_model(MODELS["phi3"]())
    hf.probe(model)
    del model.model.rotary_emb.rope_type
    with pytest.raises(unmask.UnsupportedModelError, match=r"'longrope'.*longest row of a pass"):
        hf.probe(model)
