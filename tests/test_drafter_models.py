"""Drafters on models whose linear maps do not all run once on each token: experts, latent keys, several embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import _GQA, _MOE, _SIZES, SUPPORTED, VOCABULARY, random_tokens, tiny_llama, tiny_model
from decode import sample_autoregressive, sample_speculative

from unmask import hf
from unmask.core.attention import Layout
from unmask.core.decoding import begin, denoise
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.network import DiffusionConfig
from unmask.core.scoring import score
from unmask.hf.drafters import gateable

_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
           "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
           "first_k_dense_replace": 1, "moe_intermediate_size": 16}  # fmt: skip
_PER_LAYER = _GQA | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 8, "sliding_window": 7,
                     "layer_types": ["sliding_attention", "full_attention"] * 2,
                     "hidden_size_per_layer_input": 8}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "deepseek_v3": lambda: tf.DeepseekV3Config(**_SIZES, **_LATENT),
    "gemma3n": lambda: tf.Gemma3nTextConfig(
        **_PER_LAYER, vocab_size_per_layer_input=90, altup_num_inputs=2, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4),
    "gemma4": lambda: tf.Gemma4TextConfig(**_PER_LAYER, vocab_size_per_layer_input=VOCABULARY, global_head_dim=8),
    "phimoe": lambda: tf.PhimoeConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2),
    "doge": lambda: tf.DogeConfig(**_GQA),
    "llama4": lambda: tf.Llama4TextConfig(**_GQA, intermediate_size_mlp=48, head_dim=8, num_local_experts=4,
                                          interleave_moe_layer_step=1, attention_chunk_size=64),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**_GQA, **_MOE, head_dim=8),
}  # fmt: skip
LEFT_OUT = {"deepseek_v3": "kv_b_proj", "phimoe": "router", "doge": "dt_proj", "llama4": "router"}


def drafted(name: str, targets: str = "all") -> tuple[hf.HFNetwork, Drafter, DiffusionConfig]:
    """A model whose drafter does something; the mask has no row of the base."""
    model = tiny_model(MODELS[name]())
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("correct_output_scale"):  # begins at 0, where per-layer embeddings change nothing
            torch.nn.init.ones_(parameter)
    drafter = hf.drafter_on(model, VOCABULARY, DrafterConfig(4, 4.0, targets))
    for index, parameter in enumerate([*drafter.up.values(), drafter.masks, *drafter.tables.values()]):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    config = DiffusionConfig(VOCABULARY, "two_stream", "causal", 4, False, "test", "0")
    return hf.HFNetwork(model, VOCABULARY, gate=drafter.rows), drafter, config


@pytest.mark.parametrize("name", MODELS)
def test_noisy_rows_alone_are_adapted_whole_and_on_a_cache(name: str) -> None:
    net, drafter, config = drafted(name)
    x0, layout = random_tokens(2, 16), Layout.of(torch.arange(16).expand(2, 16))
    wanted = layout.position >= 12
    xt = x0.masked_fill(wanted, VOCABULARY)
    both = layout._replace(noisy=torch.ones_like(layout.noisy)).concat(layout)
    whole = net(torch.cat([xt, x0], 1), both, config.pattern)
    whole.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (drafter.masks, *drafter.tables.values()))
    assert any(up.grad is not None and up.grad.abs().sum() > 0 for up in drafter.up.values())
    with torch.no_grad():
        stock = net.model(input_ids=x0, use_cache=False).logits
        assert (whole[:, 16:] - stock).abs().max() <= 1e-5 * stock.abs().max()
        expected = score(net, config, xt, x0, layout, wanted)
        past = begin(net, config.pattern, list(x0[:, :12]))
        past.columns = 16
        at = slice(None), slice(12, 16)
        got = denoise(net, config, past, xt[at], layout.subset(*at), wanted[at])
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        on = net(torch.cat([xt, x0], 1), both, config.pattern)
        drafter.detach()
        off = hf.HFNetwork(net.model)(torch.cat([xt % VOCABULARY, x0], 1), both, config.pattern)
        # Experts get noisy tokens beside clean ones, in products of other sizes: equal up to rounding.
        most = 1e-5 * off.abs().max() if any(part in name for part in ("moe", "deepseek", "llama4")) else 0.0
        assert (on[:, 16:] - off[:, 16:]).abs().max() <= most
        assert (on[:, :16] - off[:, :16]).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_speculative_text_is_the_ar_text(name: str) -> None:
    net, _, config = drafted(name)
    prompts = [random_tokens(1, n, seed=n)[0] for n in (3, 9)]
    expected = sample_autoregressive(hf.HFNetwork(net.model), prompts, max_new_tokens=12).new_tokens
    assert sample_speculative(net, config, prompts, max_new_tokens=12).new_tokens == expected


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_gated_is_left_out_and_refused_where_it_is_asked_for(name: str) -> None:
    left_out = LEFT_OUT[name]
    _, drafter, _ = drafted(name)
    assert not [key for key in drafter.up if key.endswith(left_out)]
    assert [key for key in drafter.up if key.endswith("o_proj")]
    with pytest.raises(ValueError, match=f"drafter_targets '{left_out}' does not run once on each token of a pass"):
        drafted(name, left_out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "bitnet"])
def test_ordinary_models_are_gated_everywhere(name: str) -> None:
    model = tiny_model(SUPPORTED[name]())
    plain = Drafter(model, VOCABULARY, DrafterConfig(4, 4.0))
    plain.detach()
    measured = hf.drafter_on(model, VOCABULARY, DrafterConfig(4, 4.0))
    assert plain.state_dict().keys() == measured.state_dict().keys()
    assert all(map(torch.equal, plain.state_dict().values(), measured.state_dict().values()))


def test_an_expert_that_gets_every_token_by_chance_is_left_out_with_its_kind() -> None:
    class Experts(torch.nn.Module):
        """Modules for experts, as in code of older models; the first one gets all tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.experts[0](x) + self.experts[1](x[:, :1])

    model = tiny_llama()
    model.model.layers[0].mlp = Experts().double()
    found = gateable(model)
    assert not [name for name in found.maps if "experts" in name]
    assert [name for name in found.maps if "layers.1.mlp" in name]
    assert found.tables == ()
