"""A tiny random model of the same configuration class: what the probes run on.

A tiny model has the parts of the large one, each small: a layer of each kind, few heads of the same grouping, few
experts, and windows, chunks and choices of keys that are shorter than the texts of the probes.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from unmask.hf.folders import BUILDING

WINDOW = 5
"""Tokens in a sliding window, and in a chunk, of a tiny model."""
TOP_K = 8
"""Keys that an indexer of a tiny model chooses; blocks of keys are those of `_SIZES`."""

_SIZES: dict[str, int] = {
    # width
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32,
    "emb_dim": 32, "embedding_dim": 32, "hidden_size_global": 32, "lru_width": 32,
    "input_embedding_size": 32, "output_embedding_size": 32,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "hidden_size_per_layer_input": 8,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "swa_num_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "kv_n_heads": 2, "index_n_heads": 32, "indexer_n_heads": 32,  # so many that no two keys are equally good
    "head_dim": 8, "global_head_dim": 8, "d_head": 8, "dim_head": 8, "attention_head_dim": 16, "swa_head_dim": 8,
    "kv_channels": 8, "rotary_dim": 4, "index_head_dim": 16, "indexer_head_dim": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16, "v_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_num_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_head_dim": 8,
    # states
    "mamba_num_heads": 4, "mamba_n_heads": 4, "mamba_head_dim": 16, "mamba_d_head": 16, "mamba_headdim": 16,
    "mamba_d_ssm": 64, "mamba_d_state": 8, "ssm_state_size": 8, "state_size": 8,
    "mamba_n_groups": 1, "mamba_ngroups": 1,
    "mamba_dt_rank": 4, "time_step_rank": 4, "mamba_chunk_size": 8, "n_mamba_heads": 4, "attention_hidden_size": 64,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "zero_expert_num": 2,
    "n_group": 2, "num_expert_group": 2, "topk_group": 1, "n_groups": 2,
    # vocabulary
    "vocab_size": 61, "unpadded_vocab_size": 61, "vocab_size_per_layer_input": 61, "decoder_vocab_size": 61,
    # lengths that a text of the probes exceeds
    "local_attention": 2 * WINDOW, "keep_window_size": 2 * WINDOW, "floor_scale": 2 * WINDOW,
    "log_scaling_n_floor": 2 * WINDOW, "original_max_position_embeddings": 2 * WINDOW, "rel_extent": WINDOW,
    "index_topk": TOP_K, "indexer_budget": TOP_K, "index_topk_blocks": 2, "index_block_size": 4,
    # lengths that none exceeds
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64, "model_max_length": 64,
    "max_target_positions": 64, "max_source_positions": 64,
}  # fmt: skip
"""The most that a setting of this name may be."""

_ENDINGS: tuple[tuple[str, int], ...] = (
    (r"(^|_)(window|chunk)(_size)?$|window_length$", WINDOW),
    (r"(intermediate_size(_mlp)?|intermediate_dim|ffn_dim|ffn_hidden_size|feed_forward_size|ff_dim|dim_ff)$", 48),
    (r"^(n_inner|d_inner|dff)$", 48),
    (r"_rank$|lowrank$", 16),
)  # fmt: skip
"""The same by the end of the name."""

_KEY_HEADS = {"num_key_value_heads": "num_attention_heads", "num_kv_heads": "num_attention_heads",
              "swa_num_key_value_heads": "swa_num_attention_heads"}  # fmt: skip
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
           "num_encoder_layers", "num_decoder_layers")  # fmt: skip
_LAYER_NUMBERS = ("moe_layers", "mlp_only_layers", "full_attn_idxs", "hybrid_layer_ids", "cross_attention_layers",
                  "global_attn_layers", "attn_layers_idx", "ple_layer_ids", "local_layer_ids")  # fmt: skip
"""Lists of the numbers of layers; other lists of as many entries as layers have one for each."""
_SECTIONS = ("n_input_layers", "n_recurrent_layers", "n_output_layers")
_NOT_READ = ("transformers_version", "architectures", "quantization_config", "dtype", "diffusion",
             "_name_or_path", "id2label", "label2id", "auto_map", "name_or_path")  # fmt: skip


def tiny_settings(config: Any) -> str:
    """The settings, as JSON, of a tiny model with one layer of each kind (at least two layers)."""
    given = copy.deepcopy(config.to_dict())
    tiny = _shrunk({name: value for name, value in given.items() if name != "model_type"})
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        tiny[name] = 0
    return json.dumps(tiny, default=str, sort_keys=True)


def _shrunk(given: dict[str, Any]) -> dict[str, Any]:
    """Tiny settings for those of a model, or of a part of it."""
    given = {name: value for name, value in given.items() if name not in _NOT_READ}
    tiny = {name: _shrunk_value(name, value) for name, value in _few_layers(given).items()}
    for name, heads in _KEY_HEADS.items():
        if isinstance(given.get(name), int) and isinstance(given.get(heads), int):
            tiny[name] = tiny[heads] if given[name] == given[heads] else 1 if given[name] == 1 else 2
    if "qk_rope_head_dim" in given and given.get("head_dim") != given["qk_rope_head_dim"]:  # that of queries, then
        tiny |= {"head_dim": _SIZES["qk_head_dim"]} if given.get("head_dim") else {}
    if "state_size" in given and "head_dim" in given:  # mamba2: its heads have the width of the states
        tiny["head_dim"] = 16
    if "keep_window_size" in given and given["keep_window_size"] >= given["max_position_embeddings"]:
        tiny["keep_window_size"] = tiny["max_position_embeddings"]  # no text is longer
    if "attention_types" in tiny:  # gpt_neo spells its layer kinds its own way
        tiny["attention_types"] = [[["global", "local"], 1]]
        tiny["attention_layers"] = ["global", "local"]
    if isinstance(tiny.get("rope_parameters"), dict):
        tiny["rope_parameters"] = _plain_rope(tiny["rope_parameters"])
    tiny.pop("rope_scaling", None)
    return tiny


def _shrunk_value(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        if name.endswith("config") or name.isdigit():
            return _shrunk(value)
        return {key: _shrunk_value(key, entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_shrunk_value(name.removesuffix("_per_layer"), entry) for entry in value]
    if name in ("initializer_range", "initializer_std", "init_std"):
        return 0.2  # so large that every token has an effect
    if type(value) is not int:
        return value
    if name.endswith("token_id"):
        return 0
    most = _SIZES.get(name, next((size for ending, size in _ENDINGS if re.search(ending, name)), None))
    if most is None or value == 0:
        return value
    return most if "mamba_" in name or "vocab_size" in name else min(value, most)  # probe texts need all the rows


def _few_layers(given: dict[str, Any]) -> dict[str, Any]:
    """The settings with the first layer of each kind (at least two layers), in their order."""
    counts = [given[name] for name in _DEPTHS if isinstance(given.get(name), int)]
    depth = max(counts, default=0)
    if depth < 2:
        return given
    if "n_recurrent_layers" in given:  # dory: layers that run several times, between others; each counts as two
        types = ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"]
        return given | {"num_hidden_layers": 6, "layer_types": types} | dict.fromkeys(_SECTIONS, 2)
    each = {k: v for k, v in given.items() if isinstance(v, list) and len(v) == depth and k not in _LAYER_NUMBERS}
    own = given.get("per_layer_config") or {}
    own = {int(number): value for number, value in own.items()}
    shared = given.get("num_kv_shared_layers") or 0  # the last layers, which read the keys of earlier ones
    last = range(depth - shared, depth)
    kinds = [json.dumps([*(v[i] for v in each.values()), own.get(i), i in last], default=str) for i in range(depth)]
    times = 2 if len(set(kinds)) == 1 or "layers_block_type" in given else 1
    kept = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < times]
    tiny = given | {name: len(kept) for name in _DEPTHS if isinstance(given.get(name), int)}
    tiny |= {name: [value[i] for i in kept] for name, value in each.items()}
    for name in _LAYER_NUMBERS:
        if isinstance(given.get(name), list):
            tiny[name] = [place for place, i in enumerate(kept) if i in given[name]]
    if own:
        tiny["per_layer_config"] = {str(place): own[i] for place, i in enumerate(kept) if i in own}
    if shared:
        tiny["num_kv_shared_layers"] = sum(i in last for i in kept)
    for name in ("first_k_dense_replace", "num_dense_layers"):
        if isinstance(given.get(name), int):
            tiny[name] = min(given[name], 1)
    return tiny


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings without scaling, whose tables have the full head size: positions act the same without."""
    if any(isinstance(value, dict) for value in rope.values()):  # for each kind of layers
        return {kind: _plain_rope(value) if isinstance(value, dict) else value for kind, value in rope.items()}
    plain = {name: value for name, value in rope.items() if not isinstance(value, list)}
    if rope.get("rope_type") in ("yarn", "llama3", "linear", "longrope", "dynamic", "su"):
        plain["rope_type"] = "default"
    return plain


def tiny_model(kind: Any, settings: str, implementation: str | None, seed: int = 0) -> Any:
    """A random instance of a class of models, or of what transformers makes of a class of configurations."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if implementation is not None:  # else the class decides
        options["attn_implementation"] = implementation
    with BUILDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if issubclass(kind, PreTrainedModel):
            model = kind._from_config(kind.config_class(**json.loads(settings)), **options)
        else:
            model = AutoModelForCausalLM.from_config(kind(**json.loads(settings)), **options)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.numel() and bool((weight == weight.flatten()[0]).all()):  # trained ones are no constants
                    weight += 0.1 * torch.randn_like(weight)
    return model.eval()


def kind_of(model: Any) -> Any:
    """What a tiny model is made of: the model's own class, or the configuration of its text model if it has others."""
    config, own = model.config.get_text_config(), type(model)
    remote = own.__module__.startswith("transformers_modules")
    return own if remote or getattr(own, "config_class", None) is type(config) else type(config)
