"""A model's shape and weights as llama.cpp has them: names, keys, orders of rows.

One entry of `FAMILIES` for each class of transformers whose arithmetic llama.cpp has too; what it would leave out is
refused. Its names of tensors are those of the package `gguf`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import gguf
import torch
from torch import Tensor


@dataclass(frozen=True)
class Family:
    """arch: llama.cpp's name. canvas: its name for whole-canvas models. interleaved: the rows of query and key maps lie
    in rotary pairs there, not in halves. biases: maps that may have one. norm_shift: added to the weights of norms.
    window: every how many layers one sees everything, 0 where all do. keys: writes more keys; ValueError for a setting
    that llama.cpp has none for.
    """

    arch: str
    canvas: str | None = None
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    norm_shift: float = 0.0
    window: int = 0
    keys: Callable[[Any, Any], None] = lambda _writer, _config: None


def _gemma2(writer: Any, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _is("query_pre_attn_scalar", config.query_pre_attn_scalar, config.head_dim)


def _gemma3(writer: Any, config: Any) -> None:
    _is("query_pre_attn_scalar", config.query_pre_attn_scalar, config.head_dim)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        _is(name, getattr(config, name, None), None)
    local = config.rope_parameters.get("sliding_attention", {})
    _is("rope_parameters.sliding_attention.rope_type", local.get("rope_type", "default"), "default")
    writer.add_rope_freq_base_swa(local.get("rope_theta", 10_000.0))


def _granite(writer: Any, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _smollm3(_writer: Any, config: Any) -> None:
    expected = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    _is("no_rope_layers", list(config.no_rope_layers), expected)


def _is(name: str, value: Any, expected: Any) -> None:
    if value != expected:
        raise ValueError(f"{name} {value!r} is {expected!r} in llama.cpp, which has no key for it: use --format hf")


_QKV = ("attn_q", "attn_k", "attn_v")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "llada", interleaved=True, biases=(*_QKV, "attn_output", *_MLP)),
    "mistral": Family("llama", "llada", interleaved=True),
    "qwen2": Family("qwen2", "dream", biases=_QKV),
    "qwen3": Family("qwen3"),
    "gemma2": Family("gemma2", norm_shift=1.0, window=2, keys=_gemma2),
    "gemma3_text": Family("gemma3", norm_shift=1.0, window=6, keys=_gemma3),
    "olmo2": Family("olmo2"),
    "granite": Family("granite", interleaved=True, keys=_granite),
    "smollm3": Family("smollm3", interleaved=True, keys=_smollm3),
}
"""By transformers' model_type."""


def family_of(model: Any) -> Family:
    """The family of a model; ValueError for one whose arithmetic llama.cpp does not have."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(
            f"model type {kind!r} cannot be exported as GGUF: known are {', '.join(FAMILIES)}; use --format hf"
        )
    return FAMILIES[kind]


def add_keys(writer: Any, family: Family, config: Any) -> None:
    """Write the keys of the model's shape."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    _add_activation(family, config)
    _add_windows(writer, family, config)
    _add_rope(writer, config)
    family.keys(writer, config)


def _add_activation(family: Family, config: Any) -> None:
    expected = ("gelu_pytorch_tanh",) if family.norm_shift else ("silu", "swish")
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    if name not in expected:
        raise ValueError(f"activation {name!r} is {expected[0]!r} in llama.cpp's {family.arch}: use --format hf")


def _add_windows(writer: Any, family: Family, config: Any) -> None:
    """Windows of attention, which only some families of llama.cpp have, in some layers."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    if family.window:
        expected = ["sliding_attention" if (i + 1) % family.window else "full_attention" for i in range(layers)]
        _is("layer_types", list(kinds), expected)
        writer.add_sliding_window(window)
    elif (
        window
        and window < config.max_position_embeddings
        and ("sliding_attention" in kinds or config.model_type == "mistral")
    ):
        raise ValueError(f"sliding_window {window}: llama.cpp's {family.arch} attends to everything: use --format hf")


def _add_rope(writer: Any, config: Any) -> None:
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind not in ("default", "llama3"):
        raise ValueError(f"rope_type {kind!r} cannot be exported as GGUF: known are default, linear and llama3")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} cannot be exported as GGUF")


def _rope(config: Any) -> dict[str, Any]:
    """The rotation of layers that see everything."""
    rope = config.rope_parameters
    return dict(rope.get("full_attention", rope))


# --- weights


def tensors_of(model: Any, family: Family, arch: str, more_rows: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name of each weight, and the weight in llama.cpp's order.

    more_rows: (rows, hidden) embeddings after those of the model.
    """
    config = model.config
    for name, weight in model.named_parameters():
        found = name_of(name, model, arch)
        if found.endswith(".bias") and found.split(".")[-2] not in family.biases:
            raise ValueError(f"bias {name!r} cannot be exported as GGUF: llama.cpp's {arch} has none; use --format hf")
        yield found, _ordered(found, weight.detach(), family, config, more_rows)
    if _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(model)


def name_of(weight: str, model: Any, arch: str) -> str:
    """llama.cpp's name of a weight; ValueError where its class has none such."""
    found = _names(arch, model.config.num_hidden_layers).get_name(weight, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"weight {weight!r} cannot be exported as GGUF: llama.cpp's {arch} has none such")
    return str(found)


@cache
def _names(arch: str, layers: int) -> Any:
    return gguf.get_tensor_name_map(next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), layers)


def _ordered(name: str, weight: Tensor, family: Family, config: Any, more_rows: Tensor | None) -> Tensor:
    if name.endswith("norm.weight") and family.norm_shift:
        return weight.float() + family.norm_shift
    if more_rows is not None and name in ("token_embd.weight", "output.weight"):
        more = more_rows if name == "token_embd.weight" else torch.zeros_like(more_rows)
        return torch.cat([weight, more.to(weight)])
    return interleaved(name, weight, family, config)


def interleaved(name: str, weight: Tensor, family: Family, config: Any) -> Tensor:
    """The rows of a query or key map: a head's two halves of rotary pairs become pairs side by side, where they do."""
    if not family.interleaved or not ("attn_q." in name or "attn_k." in name):
        return weight
    heads = config.num_attention_heads if "attn_q." in name else config.num_key_value_heads
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def _llama3_factors(model: Any) -> Tensor:
    """What divides the frequencies of the rotation (Llama 3.1), as the ratio of plain ones to the model's."""
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    used = rotary.inv_freq.float()
    base = float(_rope(model.config)["rope_theta"])
    plain = 1.0 / base ** (torch.arange(0, 2 * len(used), 2, device=used.device).double() / (2 * len(used)))
    return (plain / used.double()).float()
