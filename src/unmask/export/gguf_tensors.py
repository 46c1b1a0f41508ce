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
    in rotary pairs there, not in halves. biases: what may have one. norm_shift: added to the weights of norms.
    window: every how many layers one sees everything, 0 where all do. partial: a part of a head may be rotated.
    keys: writes more keys; ValueError for a setting that llama.cpp has none for.
    """

    arch: str
    canvas: str | None = None
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu", "swish")
    norm_shift: float = 0.0
    window: int = 0
    partial: bool = False
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


def _gpt2(writer: Any, config: Any) -> None:
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _is("scale_attn_weights", config.scale_attn_weights, True)
    _is("scale_attn_by_inverse_layer_idx", config.scale_attn_by_inverse_layer_idx, False)


def _mixtral(writer: Any, config: Any) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _qwen3_moe(writer: Any, config: Any) -> None:
    _mixtral(writer, config)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    _is("norm_topk_prob", config.norm_topk_prob, True)
    _is("decoder_sparse_step", config.decoder_sparse_step, 1)
    _is("mlp_only_layers", list(config.mlp_only_layers or []), [])


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
_GPT2 = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm")
_GELU = ("gelu_pytorch_tanh", "gelu_new")

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "llada", interleaved=True, biases=(*_QKV, "attn_output", *_MLP)),
    "mistral": Family("llama", "llada", interleaved=True),
    "mixtral": Family("llama", interleaved=True, keys=_mixtral),
    "qwen2": Family("qwen2", "dream", biases=_QKV),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe", keys=_qwen3_moe),
    "gemma": Family("gemma", activations=_GELU, norm_shift=1.0),
    "gemma2": Family("gemma2", activations=_GELU, norm_shift=1.0, window=2, keys=_gemma2),
    "gemma3_text": Family("gemma3", activations=_GELU, norm_shift=1.0, window=6, keys=_gemma3),
    "phi3": Family("phi3", partial=True),
    "olmo2": Family("olmo2"),
    "granite": Family("granite", interleaved=True, keys=_granite),
    "smollm3": Family("smollm3", interleaved=True, keys=_smollm3),
    "exaone4": Family("exaone4"),
    "seed_oss": Family("seed_oss", biases=_QKV),
    "arcee": Family("arcee", interleaved=True, activations=("relu2",)),
    "gpt2": Family("gpt2", biases=_GPT2, activations=_GELU, keys=_gpt2),
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
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _check_activation(family, config)
    _add_windows(writer, family, config)
    if getattr(config, "rope_parameters", None) is not None:
        _add_rope(writer, family, _rope(config), width)
    family.keys(writer, config)


def _check_activation(family: Family, config: Any) -> None:
    names = (getattr(config, key, None) for key in ("hidden_activation", "hidden_act", "activation_function"))
    name = next(name for name in names if name is not None)
    if name not in family.activations:
        raise ValueError(
            f"activation {name!r} is {family.activations[0]!r} in llama.cpp's {family.arch}: use --format hf"
        )


def _add_windows(writer: Any, family: Family, config: Any) -> None:
    """Windows of attention, which only some families of llama.cpp have, in some layers."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    uniform = getattr(config, "layer_types", None) is None  # then a window is one of all layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    if family.window:
        expected = ["sliding_attention" if (i + 1) % family.window else "full_attention" for i in range(layers)]
        _is("layer_types", list(kinds), expected)
        writer.add_sliding_window(window)
    elif window and window < config.max_position_embeddings and ("sliding_attention" in kinds or uniform):
        raise ValueError(f"sliding_window {window}: llama.cpp's {family.arch} attends to everything: use --format hf")


def _add_rope(writer: Any, family: Family, rope: dict[str, Any], width: int) -> None:
    part = rope.get("partial_rotary_factor", 1.0)
    if part != 1 and not family.partial:
        raise ValueError(f"partial_rotary_factor {part} is 1 in llama.cpp's {family.arch}: use --format hf")
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise ValueError(f"rope_type {kind!r} cannot be exported as GGUF: known are default, linear and llama3")
    writer.add_rope_dimension_count(int(width * part))
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(config: Any) -> dict[str, Any]:
    """The rotation of layers that see everything; empty where positions have embeddings."""
    rope = getattr(config, "rope_parameters", None) or {}
    return dict(rope.get("full_attention", rope))


# --- weights


def tensors_of(model: Any, family: Family, arch: str, more_rows: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name of each weight, and the weight in llama.cpp's order.

    more_rows: (rows, hidden) embeddings after those of the model.
    """
    config = model.config
    for name, weight in (part for whole in model.named_parameters() for part in _parts(model, *whole)):
        found = name_of(name, model, arch)
        if found.endswith(".bias") and found.split(".")[-2] not in family.biases:
            raise ValueError(f"bias {name!r} cannot be exported as GGUF: llama.cpp's {arch} has none; use --format hf")
        yield found, _ordered(found, weight.detach(), family, config, more_rows)
    if _rope(config).get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(model)


def _parts(model: Any, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a weight, (outputs, inputs) each, with experts before that."""
    module = model.get_submodule(name.rpartition(".")[0])
    if name.endswith("experts.gate_up_proj"):
        for kind, part in zip(("gate_proj", "up_proj"), weight.chunk(2, dim=1), strict=True):
            yield name.replace("gate_up_proj", f"{kind}.weight"), part
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", weight
    else:
        yield name, weight.T if type(module).__name__ == "Conv1D" and weight.ndim == 2 else weight


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
