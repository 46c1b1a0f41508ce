"""Whether a model obeys masks and position ids, measured on a tiny instance of the same configuration class.

There is no list of supported architectures: `probe` refuses models that cannot be controlled, and `probe_fast_paths`
tries each fast path.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmask.core.attention import (
    Layout,
    Pattern,
    block_causal,
    causal,
    dense,
    two_stream,
)
from unmask.core.decoding import begin
from unmask.core.network import GrowingCache, Pass, run
from unmask.hf.fast.chunked import CHUNK
from unmask.hf.folders import first_line
from unmask.hf.long_rope import changes_unseen
from unmask.hf.masks import UnsupportedModelError, local_attention
from unmask.hf.network import FastPaths, HFNetwork
from unmask.hf.tiny import TOP_K, WINDOW, kind_of, tiny_model, tiny_settings

UNTESTED = "no tiny model of its class could be made to test it, which is a fault of this library"
"""Begins the reason to refuse a class that may be fine."""


def probe(model: Any) -> None:
    """Raise `UnsupportedModelError` unless 4-D masks and position ids control the model's attention.

    Runs on a tiny random float32 instance of the same configuration class, its windows shrunk, once per
    class and kind of layers, so that it costs nothing on a large model.
    """
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", "flex_attention"):
        raise UnsupportedModelError(
            f"{type(model).__name__} runs attention implementation {implementation!r}, which takes no 4-D mask: "
            "load it with attn_implementation='sdpa' or 'eager'"
        )
    if changes_unseen(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be converted: its rotary factors ('longrope') follow the longest row of a "
            "pass, and they are computed by code of its own, where rows cannot be told apart: load the folder without "
            "trust_remote_code, if transformers knows its class"
        )
    reason = _probe_class(
        kind_of(model),
        tiny_settings(config),
        "sdpa" if implementation == "flex_attention" else implementation,
    )
    if reason:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be converted: {reason}. {_layers(config)}"
            "A supported model attends through 4-D masks in every layer (llama, qwen, mistral, gemma, gpt2 ...)."
        )


@functools.lru_cache(maxsize=64)
def _probe_fast_paths(kind: Hashable, config: str) -> FastPaths:
    try:
        network = _as_tiny_network(tiny_model(kind, config, "sdpa"))
    except Exception:  # a model that cannot be tried takes no fast path
        return FastPaths()
    length = 2 * CHUNK
    layout = Layout.of(torch.arange(length).expand(2, length) % 40)
    tokens = torch.arange(2 * length).view(2, length) % 50 + 3
    passed = Pass(tokens, layout, causal, torch.arange(0, 2 * length, 3))
    weight = torch.ones(len(passed.rows))

    def loss(logits: Tensor, _part: slice) -> Tensor:  # not linear, so that scaled logits give another loss
        return logits.logsumexp(-1)

    def is_same(fast_paths: FastPaths) -> bool:
        network.fast_paths = fast_paths
        try:
            got = network.weighted_sum(passed, loss, weight) if fast_paths.head_sum else run(network, passed)
        except Exception:
            return False
        expected = loss(logits, slice(None)).sum() if fast_paths.head_sum else logits
        return got.shape == expected.shape and bool((got - expected).abs().max() <= 1e-5 * expected.abs().max())

    with torch.inference_mode():
        network.fast_paths = fast_paths = FastPaths()
        logits = run(network, passed)
        for name in ("chunked", "last_rows", "head_sum"):
            tried = replace(fast_paths, **{name: True})
            fast_paths = tried if is_same(tried) else fast_paths
    return fast_paths


@functools.lru_cache(maxsize=64)
def _probe_cache(kind: Hashable, config: str, implementation: str, chunked: bool) -> str | None:
    """Why passes on cached ones, in slots or growing, do not give the logits of whole texts, or None."""
    try:
        tiny = _in_float64(tiny_model(kind, config, implementation))
        network = _as_tiny_network(tiny, fast_paths=FastPaths(chunked=chunked))
        with torch.inference_mode():
            return _wrong_on_cache(network)
    except Exception as error:
        return f"its keys and values cannot be kept in a cache ({first_line(error)})"


def _wrong_on_cache(network: HFNetwork) -> str | None:
    texts, width = torch.arange(2 * 3 * WINDOW).view(2, -1) * 7 % 50 + 3, 3
    layout = Layout.of(torch.arange(texts.shape[1]).expand_as(texts))
    whole = network(texts, layout, causal)
    starts, order = (WINDOW + 3, 4), [1, 0, 1]
    past = begin(network, causal, [text[:start] for text, start in zip(texts, starts, strict=True)])
    position = torch.tensor([[4], [WINDOW + 3], [4 + width]]) + torch.arange(width)
    at = torch.tensor(order)[:, None], position
    past.columns = int(position.max()) + 1
    on_slots = network(texts[at], Layout.of(position), causal, past=past.for_rows(order)) - whole[at]

    growing = GrowingCache(network.new_cache(), layout.subset(..., slice(0, 0)))
    begun, later = slice(0, WINDOW + 3), slice(WINDOW + 3, None)
    network(texts[:, begun], layout.subset(..., begun), causal, past=growing)
    growing.layout = layout.subset(..., begun)
    grown = network(texts[:, later], layout.subset(..., later), causal, past=growing) - whole[:, later]
    gap = float(max(on_slots.abs().max(), grown.abs().max()) / whole.abs().max())
    return None if gap <= 1e-4 else f"passes on a cache differ from passes over whole texts by {gap:.1e} of the logits"


@functools.lru_cache(maxsize=64)
def _probe_positions(kind: Hashable, config: str) -> bool:
    network = _as_tiny_network(tiny_model(kind, config, "sdpa"))
    tokens, position = torch.arange(20)[None] + 3, torch.arange(20)[None]
    with torch.inference_mode():
        logits = network(tokens, Layout.of(position), causal)
        gap = (network(tokens, Layout.of(position + 7), causal) - logits).abs().max()
    return bool(gap <= 1e-4 * logits.abs().max())


@functools.lru_cache(maxsize=64)
def _probe_class(kind: Hashable, config: str, implementation: str) -> str | None:
    """Why the class is refused, or None."""
    try:
        tiny = _in_float64(tiny_model(kind, config, implementation))
    except Exception as error:
        return f"{UNTESTED} ({first_line(error)})"
    try:
        with torch.inference_mode():
            return probe_network(_as_tiny_network(tiny))
    except Exception as error:
        return f"it does not take 4-D attention masks with position ids ({first_line(error)})"


def _in_float64(model: Any) -> Any:
    """The model in float64, where deep ones keep small differences small, if its kernels know that; else as it was."""
    tokens = torch.arange(3, 3 + 3 * WINDOW)[None]
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
        try:
            twin = copy.deepcopy(model).double()
            return twin if twin(input_ids=tokens, use_cache=False).logits.dtype == torch.float64 else model
        except Exception:
            return model


def _as_tiny_network(model: Any, **options: Any) -> HFNetwork:
    return HFNetwork(model, per_layer_type=_reads_windows(model), **options)


def _reads_windows(tiny: Any) -> bool:
    """Whether the model has the windows of its settings; some classes have a setting that no layer reads."""
    if not local_attention(tiny.config.get_text_config()):
        return True
    tokens = torch.arange(3, 3 + 3 * WINDOW)[None]
    layout = Layout.of(torch.arange(tokens.shape[1])[None])
    try:
        with torch.inference_mode():
            stock = tiny(input_ids=tokens, use_cache=False).logits
            gaps = [
                (HFNetwork(tiny, per_layer_type=on)(tokens, layout, causal) - stock).abs().max() for on in (True, False)
            ]
    except Exception:  # the probe says what is wrong
        return True
    return bool(gaps[0] <= gaps[1])


@functools.lru_cache(maxsize=64)
def _probe_windows(kind: Hashable, config: str, implementation: str) -> bool:
    try:
        return _reads_windows(tiny_model(kind, config, implementation))
    except Exception:
        return True


def probe_network(network: HFNetwork) -> str | None:
    """The checks themselves; a reason to refuse the model, or None.

    1. identity: the causal pattern gives the stock logits, on more tokens than any window is wide.
    2. influence: with two streams, changing a token changes exactly the rows that can attend to it.
    3. positions: a noisy block beside the clean stream equals the same block after its clean prefix.
    """
    vocabulary, block, length = network.config.vocab_size, 4, 3 * WINDOW + 3
    tokens = torch.arange(3, 3 + 2 * length)[None] * 7 % min(11, vocabulary - 4) + 2  # some are equal, as masks are
    clean = Layout.of(torch.arange(length)[None])

    stock = network.model(input_ids=tokens[:, :length], use_cache=False).logits
    tolerance = 1e-5 * float(stock.abs().max())
    longer = network.model(input_ids=tokens, use_cache=False).logits[:, :length]
    gap = float((longer - stock).abs().max())
    if not gap <= tolerance:
        return f"its own logits change by {gap:.1e} with tokens that come later, so it is no causal model"
    gap = float((network(tokens[:, :length], clean, causal) - stock).abs().max())
    if not gap <= tolerance:
        return f"a causal mask changes its logits by {gap:.1e}, so the mask replaces more than it should"

    both = Layout.of(clean.position, noisy=True).concat(clean)
    base = network(tokens, both, two_stream(block))
    changed = tokens.repeat(2 * length, 1)
    changed.diagonal().copy_(changed.diagonal() % (vocabulary - 4) + 3)
    many = Layout(*(field.expand(2 * length, -1) for field in both))
    effect = (network(changed, many, two_stream(block)) - base).abs().amax(-1).T
    reason = _wrong_influence(network.config, effect, both, two_stream(block), tolerance)
    if reason:
        return reason

    start = length // block * block  # the last, short block
    rows = torch.cat([tokens[:, length : length + start], tokens[:, start:length]], dim=1)
    alone = network(rows, clean, block_causal(block))[:, start:]
    gap = float((alone - base[:, start:length]).abs().max())
    if not gap <= tolerance:
        return f"repeated position ids move its logits by {gap:.1e}, so positions come from somewhere else"
    return None


def _wrong_influence(config: Any, effect: Tensor, layout: Layout, pattern: Pattern, tolerance: float) -> str | None:
    """Why `effect` (rows, changed tokens) is not that of the pattern's mask in every layer, or None."""
    sees = dense(pattern, layout, layout)[0]
    reachable, before = sees, torch.zeros_like(sees)
    while not torch.equal(reachable, before):  # through any number of layers
        reachable, before = (reachable.float() @ sees.float()) > 0, reachable
    leak = effect.masked_fill(reachable, 0)
    if float(leak.max()) > tolerance:
        row, token = divmod(int(leak.argmax()), leak.shape[1])
        return (
            f"row {row} of a two-stream pass changes by {float(leak.max()):.1e} with token {token}, "
            "which the mask hides from it, so some layer moves information past the mask"
        )
    near = sees & (sees.sum(-1, keepdim=True) <= TOP_K)  # an indexer chooses among more keys
    for limit in local_attention(config).values():
        near = near & dense(limit, layout, layout)[0]
    if not bool((effect[near] > 0).all()):
        return "tokens that the mask shows have no effect, so some layer stays causal against the mask"
    return None


def _layers(config: Any) -> str:
    known = {
        "conv": "a convolution, which reads its neighbours whatever the mask says",
        "linear_attention": "linear attention, which carries a state past every mask",
        "mamba": "a recurrent state, which no mask reaches",
        "indexed_attention": "attention to the keys that an indexer chooses",
        "minimax_m3_sparse": "attention to blocks of keys, which are cut by their index in the pass",
        "compressed_sparse_attention": "attention to keys of several tokens, which no mask can tell apart",
        "heavily_compressed_attention": "attention to keys of several tokens, which no mask can tell apart",
        "hybrid": "attention beside a convolution or recurrent state, which no mask reaches",
        "hybrid_sliding": "attention beside a convolution or recurrent state, which no mask reaches",
        "local": "attention through a causal buffer of its own",
    }
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ())
    fine = ("full_attention", "sliding_attention", "chunked_attention", "global", "attention", "moe", "mlp")
    odd = [f"layer type {k!r} is {known.get(k, 'not one this library knows')}" for k in kinds if k not in fine]
    if config.model_type in ("mamba", "mamba2", "falcon_mamba"):
        odd.append(f"layer type 'mamba' is {known['mamba']}")
    if config.model_type in ("bloom", "mpt"):
        odd.append("layer type 'alibi' attention takes distances from indices, not from position ids")
    return "".join(f"Its {text}. " for text in odd)


def probe_fast_paths(model: Any) -> FastPaths:
    """The fast paths with which a tiny instance of the model's class gives the same logits."""
    config = model.config.get_text_config()
    fast_paths = _probe_fast_paths(kind_of(model), tiny_settings(config))
    if config._attn_implementation != "sdpa" or getattr(config, "attention_dropout", 0.0):
        return FastPaths(head_sum=fast_paths.head_sum)
    return fast_paths


def as_network(model: Any, mask_token_id: int | None = None, **options: Any) -> HFNetwork:
    """The model as a network that takes the fast paths of its class; options: of `HFNetwork`."""
    fast_paths, config = probe_fast_paths(model), model.config.get_text_config()
    implementation = "eager" if config._attn_implementation == "eager" else "sdpa"
    tried = kind_of(model), tiny_settings(config), implementation
    no_cache = _probe_cache(*tried, fast_paths.chunked)
    if no_cache is not None and fast_paths.chunked and _probe_cache(*tried, False) is None:
        fast_paths, no_cache = replace(fast_paths, chunked=False), None
    options = {"per_layer_type": _probe_windows(*tried)} | options
    return HFNetwork(model, mask_token_id, fast_paths=fast_paths, no_cache=no_cache, **options)


def sees_position_differences(model: Any) -> bool:
    """Whether a tiny instance ignores a shift of all positions by the same amount, as rotary models do."""
    config = model.config.get_text_config()
    return _probe_positions(kind_of(model), tiny_settings(config))
