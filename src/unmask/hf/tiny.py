"""A tiny random model of the same configuration class: what the probes run on."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from unmask.hf.folders import BUILDING

WINDOW = 5
"""Tokens in a sliding window of a tiny model."""

_TINY: dict[str, Any] = {
    # width
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "block_ff_dim": 48,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    # experts, vocabulary, context
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 61, "vocab_size_per_layer_input": 61,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "initializer_range": 0.2,
}  # fmt: skip


def tiny_settings(config: Any) -> str:
    """The settings, as JSON, of a tiny model with one layer of each kind (at least two layers)."""
    tiny = {k: v for k, v in copy.deepcopy(config.to_dict()).items() if v is not None}
    for name in ("model_type", "transformers_version", "architectures", "quantization_config", "dtype", "diffusion",
                 "_name_or_path", "id2label", "label2id", "auto_map", "name_or_path"):  # fmt: skip
        tiny.pop(name, None)
    tiny.update({name: value for name, value in _TINY.items() if name in tiny})
    kinds = list(dict.fromkeys(tiny.get("layer_types", ())))
    layers = max(2, len(kinds))
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in tiny:
            tiny[name] = layers
    if kinds:
        tiny["layer_types"] = (kinds * layers)[:layers]
    if tiny.get("sliding_window"):
        tiny["sliding_window"] = WINDOW
    if "attention_types" in tiny:  # gpt_neo spells its layer kinds its own way
        tiny["attention_types"] = [[["global", "local"], 1]]
        tiny["attention_layers"] = ["global", "local"]
        tiny["window_size"] = WINDOW
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        tiny[name] = 0
    for name in ("no_rope_layers", "mlp_layer_types", "expert_layer_period", "full_attn_idxs"):
        if isinstance(tiny.get(name), list):
            tiny[name] = tiny[name][:layers]
    rope = tiny.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        # Scaled rotary embeddings have tables of the full head size; positions act the same without scaling.
        kept = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        tiny["rope_parameters"] = kept | {"rope_type": "default"}
    tiny.pop("rope_scaling", None)
    return json.dumps(tiny, default=str, sort_keys=True)


def tiny_model(kind: Any, settings: str, implementation: str | None, seed: int = 0) -> Any:
    """A random instance of a class of models, or of what transformers makes of a class of configurations."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if implementation is not None:  # else the class decides
        options["attn_implementation"] = implementation
    with BUILDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if issubclass(kind, PreTrainedModel):
            return kind._from_config(kind.config_class(**json.loads(settings)), **options).eval()
        return AutoModelForCausalLM.from_config(kind(**json.loads(settings)), **options).eval()


def kind_of(model: Any) -> Any:
    """The class that a tiny instance is made of: the text model's configuration, or a folder's own model class."""
    remote = type(model).__module__.startswith("transformers_modules")
    return type(model) if remote else type(model.config.get_text_config())
