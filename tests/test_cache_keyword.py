"""The key-value cache reaches a model's forward whatever name that gives it, and a model that drops it is noticed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import MASK, block_config, random_tokens, tiny_llama
from decode import sample_autoregressive, sample_blocks, sample_speculative

from unmask import hf
from unmask.hf.network import cache_keyword


def under_names(model: Any, takes: set[str], shown: set[str] | None = None) -> Any:
    """The model with a forward that takes its cache under these names, shows others perhaps, and swallows the rest."""
    plain, own = model.forward, cache_keyword(model)

    def forward(**given: Any) -> Any:
        caches = {name: given.pop(name, None) for name in ("cache", "past_key_values")}
        cache = next((caches[name] for name in takes if caches[name] is not None), None)
        return plain(**given) if cache is None else plain(**given, **{own: cache})

    kinds = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
             for name in ("input_ids", "attention_mask", *(takes if shown is None else shown))]  # fmt: skip
    forward.__signature__ = inspect.Signature([*kinds, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])  # type: ignore[attr-defined]
    model.forward = forward
    return model


DECODERS: dict[str, Callable[[hf.HFNetwork, list[torch.Tensor]], Any]] = {
    "ar": lambda network, prompts: sample_autoregressive(network, prompts, max_new_tokens=6),
    "blocks": lambda network, prompts: sample_blocks(network, block_config(), prompts, max_new_tokens=6),
    "speculative": lambda network, prompts: sample_speculative(
        network, block_config(clean="causal"), prompts, max_new_tokens=6
    ),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_one_name_alone_is_enough(name: str, decoder: str) -> None:
    prompts = [random_tokens(n, seed=n) for n in (5, 7)]
    expected = DECODERS[decoder](hf.as_network(tiny_llama(), MASK), prompts).new_tokens
    network = hf.as_network(under_names(tiny_llama(), {name}), MASK)
    assert network.cache_keyword == name
    assert DECODERS[decoder](network, prompts).new_tokens == expected


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_model_that_swallows_its_cache_is_refused(decoder: str) -> None:
    network = hf.as_network(under_names(tiny_llama(), {"cache"}, shown={"past_key_values"}), MASK)
    with pytest.raises(hf.UnsupportedModelError, match="past_key_values"):
        DECODERS[decoder](network, [random_tokens(5)])
