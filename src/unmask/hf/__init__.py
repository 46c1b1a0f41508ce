"""Any Hugging Face causal language model as a `Network`, without touching its code.

A stock model is controlled by a 4-D attention mask and position ids alone (`network`). Whether it obeys them is
measured (`probes`). Its folder is read and written in `checkpoint`.
"""

import unmask.core  # noqa: F401, before transformers: it refuses libraries that are too old
from unmask.hf.checkpoint import (
    Base,
    add_mask_token,
    check_tokenizer,
    fingerprint,
    load_drafter,
    load_pretrained,
    load_tokenizer,
    read_base,
    read_config,
    read_diffusion,
    reused_mask_token,
    save_drafter,
    save_pretrained,
    without_dropout,
    write_diffusion,
)
from unmask.hf.devices import present_device
from unmask.hf.drafters import add_drafter, drafter_on, gateable
from unmask.hf.grammar import Grammar, JsonSchema, Lark, Regex, grammar_constraint
from unmask.hf.hub import push
from unmask.hf.layers import checkpoint_layers, take_checkpointing_over, takes_flex
from unmask.hf.masks import UnsupportedModelError
from unmask.hf.network import FastPaths, HFNetwork
from unmask.hf.probes import as_network, probe, probe_fast_paths, probe_network, sees_position_differences
from unmask.hf.quantised import quantisation_of
from unmask.hf.replicas import replicate
from unmask.hf.special_tokens import (
    add_end_token,
    begin_token_id,
    check_mask_token,
    end_token_id,
    end_token_ids,
    end_token_ids_at,
)

__all__ = [
    "Base",
    "FastPaths",
    "Grammar",
    "HFNetwork",
    "JsonSchema",
    "Lark",
    "Regex",
    "UnsupportedModelError",
    "add_drafter",
    "add_end_token",
    "add_mask_token",
    "as_network",
    "begin_token_id",
    "check_mask_token",
    "check_tokenizer",
    "checkpoint_layers",
    "drafter_on",
    "end_token_id",
    "end_token_ids",
    "end_token_ids_at",
    "fingerprint",
    "gateable",
    "grammar_constraint",
    "load_drafter",
    "load_pretrained",
    "load_tokenizer",
    "present_device",
    "probe",
    "probe_fast_paths",
    "probe_network",
    "push",
    "quantisation_of",
    "read_base",
    "read_config",
    "read_diffusion",
    "replicate",
    "reused_mask_token",
    "save_drafter",
    "save_pretrained",
    "sees_position_differences",
    "take_checkpointing_over",
    "takes_flex",
    "without_dropout",
    "write_diffusion",
]  # fmt: skip
