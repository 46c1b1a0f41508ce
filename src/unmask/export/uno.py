"""Format `uno`: a drafter as a PEFT adapter for Uno's decoding in SGLang and vLLM (2609.04010, sglang 0.5.23).

A draft is one causal forward over the last token and random tokens. The last token's row and all rows that verify are
the base's alone, the adapter acts on the rows of random tokens; row i predicts position i + 1. So the adapter needs no
embedding, and a drafter with another layout cannot be served this way.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unmask.core.drafter import Drafter, linear_maps
from unmask.core.network import DiffusionConfig
from unmask.hf.lora import ADAPTER_WEIGHTS, FOR_UNO
from unmask.loading import load, recorded_base
from unmask.model import DiffusionLM
from unmask.model_name import ADAPTER_CONFIG, locate, permanent_name
from unmask.plain_json import to_json
from unmask.version import __version__

_FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linear maps that the engines adapt; those of a group are one map there, so that all have an adapter or none."""

_SERVED = re.compile(r"model\.layers\.\d+\.(?:self_attn\.([qkvo]_proj)|mlp\.((?:gate|up|down)_proj))")

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be."""


def export_uno(lm: DiffusionLM, folder: Path, place: str) -> dict[str, Any]:
    """Write the drafter as a PEFT adapter folder, and its base beside it where no stock folder of that exists."""
    drafter, config = lm.drafter, lm.diffusion
    base = "BASE" if lm.base is None else permanent_name(lm.base.name)
    if drafter is None or config is None:
        raise ValueError(
            f"format 'uno' is for drafters, and this is {_kind(lm)}: train one on the model that is to be served, "
            f"{_adapt_line('MODEL')}"
        )
    wrong = _not_served(config)
    if wrong:
        raise ValueError(f"format 'uno' cannot serve this drafter, {wrong}: train it with {_adapt_line(base)}")
    weights = adapter_weights(drafter, lm.model, base)
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt", FOR_UNO: __version__})
    if not _is_stock(base):
        load(base, device="cpu").save_pretrained(folder / "base")
        base = str(Path(place) / "base")
    kinds = sorted({name.split(".")[-3] for name in weights})
    (folder / ADAPTER_CONFIG).write_text(to_json(_adapter_config(drafter, base, kinds), indent=2) + "\n")
    lines = launch_lines(base, place, drafter.config.rank, config)
    (folder / "README.md").write_text(_readme(base, drafter, config, lines))
    return lines


def adapter_weights(drafter: Drafter, model: Any, base: str) -> dict[str, Tensor]:
    """Tensors of a PEFT adapter file; 0 where the engines want an adapter and the drafter has none.

    Raises ValueError for adapters on maps that the engines do not adapt.
    """
    maps: dict[str, Any] = {name: module for name, module in linear_maps(model) if _SERVED.fullmatch(name)}
    adapted = {key.replace("-", "."): (drafter.down[key], drafter.up[key]) for key in drafter.down}
    odd = next((name for name in adapted if name not in maps), None)
    if odd is not None:
        endings = dict.fromkeys(".".join(name.split(".")[-2:]) for name in maps)
        known = ", ".join(kind for group in _FUSED for kind in group)
        instead = "no drafter of this base can be served"
        if endings:
            instead = f"train it with {_adapt_line(base, ' drafter_targets=' + ','.join(endings))}"
        raise ValueError(f"format 'uno' cannot serve an adapter on {odd!r}: the engines adapt {known} alone; {instead}")
    wanted = {kind for group in _FUSED for kind in group if any(_kind_of(name) in group for name in adapted)}
    rank, dtype = drafter.config.rank, next(drafter.parameters()).dtype
    tensors: dict[str, Tensor] = {}
    for name, module in maps.items():
        if _kind_of(name) not in wanted:
            continue
        empty = torch.zeros(rank, module.in_features, dtype=dtype), torch.zeros(module.out_features, rank, dtype=dtype)
        for part, tensor in zip("AB", adapted.get(name, empty), strict=True):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor.detach().cpu().contiguous()
    return tensors


def launch_lines(base: str, place: str, rank: int, config: DiffusionConfig) -> dict[str, str]:
    """Commands that serve a drafter: a draft is the last token and random tokens, a block together."""
    lora_rank = next((most for most in _VLLM_RANKS if most >= rank), rank)
    speculative = {"method": "uno", "uno_lora_path": place, "uno_mask_token_id": config.noise_tokens,
                   "num_speculative_tokens": config.block_size}  # fmt: skip
    base, place = shlex.quote(base), shlex.quote(place)
    return {
        "sglang": f"python -m sglang.launch_server --model-path {base} --speculative-algorithm UNO --uno-lora-path "
        f"{place} --speculative-num-draft-tokens {config.block_size} --attention-backend fa3",
        "vllm": f"VLLM_USE_V2_MODEL_RUNNER=1 vllm serve {base} --enable-lora --max-loras 2 --max-lora-rank {lora_rank} "
        f"--speculative-config {shlex.quote(to_json(speculative))}",
    }


def _kind_of(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _kind(lm: DiffusionLM) -> str:
    return "an untouched AR model" if lm.diffusion is None else f"a whole model of recipe {lm.diffusion.recipe!r}"


def _not_served(config: DiffusionConfig) -> str | None:
    """What the engines' layout lacks of a drafter's, in words; None if it is the same."""
    if not config.noise_tokens:
        return "whose noisy rows read a mask embedding (noise='mask')"
    if config.adapt_anchor:
        return "whose adapters act on the last token's row too (adapt_anchor=true)"
    if not config.shift:
        return "whose row i predicts position i (shift=false)"
    if config.noisy_attention != "causal":
        return f"whose noisy rows see the whole block (noisy_attention={config.noisy_attention!r})"
    return None


def _adapt_line(base: str, more: str = "") -> str:
    return (
        f"unmask adapt {base} --recipe drafter --data DATA --output DIR noise=uniform shift=true "
        f"noisy_attention=causal{more}"
    )


def _is_stock(base: str) -> bool:
    """Whether the engines can load the base from where it is: a hub id, or a folder that holds a whole model."""
    place = locate(base)
    return recorded_base(base) is None and (isinstance(place, str) or place.is_dir())


def _adapter_config(drafter: Drafter, base: str, kinds: list[str]) -> dict[str, Any]:
    scale = drafter.config.scale
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": drafter.config.rank, "lora_alpha": int(scale) if scale == int(scale) else scale, "target_modules": kinds,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip


def _readme(base: str, drafter: Drafter, config: DiffusionConfig, lines: dict[str, str]) -> str:
    return f"""---
base_model: {base}
library_name: peft
tags:
- uno
- speculative-decoding
- unmask
---

A drafter on `{base}` for Uno's speculative decoding (2609.04010): a LoRA adapter of rank {drafter.config.rank} that an
engine switches on for the rows of a draft alone. Text has the distribution of the base, whatever is drafted.

Do not load it as an ordinary adapter, and do not merge it: on all rows it is no language model.

SGLang (0.5.23 or newer, one CUDA GPU with FlashAttention 3):

```
{lines["sglang"]}
```

vLLM, where it has the method `uno` (pull request 55947; not in release 0.33.0):

```
{lines["vllm"]}
```

| | |
|---|---|
| base | `{base}` |
| block size in training: tokens of a draft forward | {config.block_size} |
| noise | uniform on token ids from 0 up to, without, {config.noise_tokens} |
"""
