"""What checkpoints set, where a class's default configuration makes no model or hides a part of it."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0}
                                                for kind in ("full_attention", "sliding_attention")}},
    "deepseek_v2": {"num_experts_per_tok": 6, "q_lora_rank": None},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2},
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp_text": {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 2048,
                       "indexer_compress_ratio": 4,
                       "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
SETTINGS["qwen4_exp"] = {"text_config": SETTINGS["qwen4_exp_text"]}
"""What checkpoints set of the classes whose default configuration makes no model, or an untypical one."""

NO_TEXT = {
    "gemma4_assistant": "drafts from the hidden states of another model, not from tokens alone",
    "gemma4_unified_assistant": "drafts from the hidden states of another model, not from tokens alone",
    "musicgen": "writes codes of sounds, in several books, not text",
    "musicgen_melody": "writes codes of sounds, in several books, not text",
}
"""Classes that are no model of text alone."""

_YARN = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 10000.0,
         "original_max_position_embeddings": 4096}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
           "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2, groups of experts": ("deepseek_v2", {
        "num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
        "n_routed_experts": 160, "rope_parameters": _YARN, "first_k_dense_replace": 1}),
    "deepseek_v3, yarn": ("deepseek_v3", {"rope_parameters": _YARN}),
    "deepseek_v3, no q_lora_rank": ("deepseek_v3", {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v32, yarn": ("deepseek_v32", {"rope_parameters": _YARN}),
    "doge, texts longer than its choice of keys": ("doge", {"keep_window_size": 512}),
    "falcon, one key head": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "falcon, grouped key heads": ("falcon", {"num_kv_heads": 8, "new_decoder_architecture": True,
                                             "num_attention_heads": 128, "hidden_size": 8192}),
    "falcon, alibi": ("falcon", {"alibi": True, "num_attention_heads": 32, "hidden_size": 2048}),
    "gemma3_text, scaled": ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "gemma3n_text, E2B": ("gemma3n_text", {
        "num_hidden_layers": 30, "num_kv_shared_layers": 10, "intermediate_size": [8192] * 30,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 6}),
    "gemma4_text, experts": ("gemma4_text", {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8,
                                             "moe_intermediate_size": 704, "hidden_size_per_layer_input": 0}),
    "gemma4_text, keys are values": ("gemma4_text", {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}),
    "gemma4_text, shared keys": ("gemma4_text", {"num_kv_shared_layers": 10}),
    "llama, llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama4_text, Scout": ("llama4_text", {"rope_parameters": _LLAMA3, "max_position_embeddings": 10485760}),
    "llama4_text, Maverick": ("llama4_text", {"use_qk_norm": False, "num_local_experts": 128,
                                              "interleave_moe_layer_step": 2}),
    "llama4_text, no temperature": ("llama4_text", {"attn_temperature_tuning": False}),
    "ministral3, unscaled": ("ministral3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1,
        "original_max_position_embeddings": 16384}}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, window in half its layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 4096,
                                                   "max_window_layers": 16}),
    "qwen3, yarn": ("qwen3", {"rope_parameters": _YARN}),
    "nemotron_h, attention alone": ("nemotron_h", {"layers_block_type": ["full_attention", "mlp"] * 4}),
    "granitemoehybrid, attention alone": ("granitemoehybrid", {"layer_types": ["attention"] * 32}),
    "bert, decoder": ("bert", {"is_decoder": True}),
    "opt, narrow embeddings": ("opt", {"word_embed_proj_dim": 512, "do_layer_norm_before": False,
                                       "hidden_size": 1024}),
}  # fmt: skip
"""Further rows: checkpoints that use other parts of a class than its default configuration."""
