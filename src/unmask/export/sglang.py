"""Format `sglang`: a block conversion of Qwen3 as an SDAR folder, for SGLang 0.5.23 and LMDeploy 0.18.

Both engines know SDAR's classes (2510.06303), which are Qwen3's: the same weights by the same names, blocks at
absolute positions, a block-causal prompt, row i predicts position i. The mask token has the id 151669 in both, and
nothing in a folder can change that. So the mask's row is moved there. Neither engine excludes the mask token from
what is chosen; its head row becomes the mean of the others, whose logit is never the largest.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from unmask.core.network import DiffusionConfig
from unmask.hf import quantisation_of
from unmask.model import DiffusionLM
from unmask.plain_json import to_json

MASK_ID = 151669
"""Of SDAR's mask token in SGLang (`dllm/config.py`) and LMDeploy (`configurations/sdar.py`)."""

THRESHOLD = 0.9
"""Confidence from which the engines commit, as `Threshold()` does here."""

_CLASSES = {"qwen3": ("sdar", "SDARForCausalLM", "Qwen3"), "qwen3_moe": ("sdar_moe", "SDARMoeForCausalLM", "Qwen3Moe")}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def export_sglang(lm: DiffusionLM, folder: Path, place: str) -> dict[str, Any]:
    """Write the model as an SDAR folder with its settings for SGLang; returns the lines that launch both engines."""
    config = lm.diffusion
    wrong = _not_served(lm)
    if wrong or config is None:
        raise ValueError(f"format 'sglang' cannot serve this model, {wrong}: {_instead(lm)}")
    assert config.block_size is not None
    _check_mask_id(lm)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    used = sorted(set(lm.tokenizer.get_vocab().values()) - {config.mask_token_id})
    rows = _write_weights(folder, config.mask_token_id, used)
    if config.mask_token_id != MASK_ID:
        _move_mask_token(folder / "tokenizer.json", lm.tokenizer.mask_token)
    _write_config(folder, lm, config, rows)
    (folder / "sglang.yaml").write_text(f"block_size: {config.block_size}\nthreshold: {THRESHOLD}\n")
    lines = launch_lines(place, config.block_size)
    (folder / "README.md").write_text(_readme(lm, config, lines))
    return lines


def launch_lines(place: str, block_size: int) -> dict[str, str]:
    """Commands that serve the folder at `place`. LMDeploy 0.18 divides by the number of steps, so that it is given."""
    quoted = shlex.quote(place)
    return {
        "sglang": f"python -m sglang.launch_server --model-path {quoted} --trust-remote-code --dllm-algorithm "
        f"LowConfidence --dllm-algorithm-config {shlex.quote(place + '/sglang.yaml')} --max-running-requests 32",
        "lmdeploy": f"lmdeploy serve api_server {quoted} --backend pytorch --trust-remote-code --dllm-block-length "
        f"{block_size} --dllm-unmasking-strategy low_confidence_dynamic --dllm-confidence-threshold {THRESHOLD} "
        f"--dllm-denoising-steps {block_size}",
    }


def _not_served(lm: DiffusionLM) -> str | None:
    """What the engines' SDAR classes lack of the model, in words; None if they are the same."""
    diffusion, config = lm.diffusion, lm.model.config
    if diffusion is None:
        return "an untouched AR model"
    if lm.drafter is not None:
        return "a drafter, whose base stays an AR model"
    if config.model_type not in _CLASSES:
        return f"of type {config.model_type!r}: SDAR's classes are Qwen3's, {' and '.join(_CLASSES)}"
    if diffusion.attention == "bidirectional" or diffusion.block_size is None:
        return "which fills whole canvases (attention='bidirectional')"
    if diffusion.clean_attention == "causal":
        return "whose clean tokens are causal (clean_attention='causal')"
    if diffusion.shift:
        return "whose row i - 1 predicts position i (shift=true)"
    if diffusion.noise_tokens or diffusion.mask_rows != 1 or diffusion.noisy_attention != "bidirectional":
        return "whose noisy rows are none of one mask token that see their whole block"
    if quantisation_of(lm.model) is not None:
        return "whose weights are packed"
    if getattr(config, "use_sliding_window", False) or config.hidden_act != "silu":
        return "with sliding windows, or another activation than silu"
    return None


def _instead(lm: DiffusionLM) -> str:
    """What to do about it."""
    diffusion = lm.diffusion
    if diffusion is not None and lm.drafter is not None:
        return "use format 'uno', or convert a Qwen3 model whole, with recipe efficient-dlm"
    if lm.model.config.model_type not in _CLASSES:
        return "use format 'hf' or 'gguf', or convert a Qwen3 model"
    if quantisation_of(lm.model) is not None:
        return "export the model that is not quantised"
    return "train one with unmask adapt MODEL --recipe efficient-dlm --data DATA --output DIR"


def _check_mask_id(lm: DiffusionLM) -> None:
    """Raise ValueError where 151669 is the id of a token, and where a tokenizer cannot have the mask token there."""
    assert lm.diffusion is not None
    if lm.diffusion.mask_token_id == MASK_ID:
        return
    taken = {token_id: token for token, token_id in lm.tokenizer.get_vocab().items()}.get(MASK_ID)
    if taken is not None:
        raise ValueError(
            f"format 'sglang' needs the id {MASK_ID} for the mask token, and here it is the token {taken!r}: convert "
            f"the parent with mask_token={taken!r}, if no text has it"
        )
    kind = json.loads(lm.tokenizer.backend_tokenizer.to_str())["model"]["type"] if lm.tokenizer.is_fast else "slow"
    if kind not in ("BPE", "WordPiece", "WordLevel"):
        raise ValueError(
            f"format 'sglang' needs the id {MASK_ID} for the mask token, and a tokenizer of type {kind} cannot "
            "leave out the ids before it: use format 'gguf'"
        )


def _write_weights(folder: Path, mask_token_id: int, used: list[int]) -> int:
    """Untie the head, and move the mask's row to 151669; returns the rows that there are then.

    used: ids of other tokens. The head's row of the mask, and of rows that are new, is the mean of theirs.
    """
    index = folder / _INDEX
    described = json.loads(index.read_text()) if index.is_file() else {}
    places: dict[str, str] = described.get("weight_map") or dict.fromkeys(_names(folder / _WEIGHTS), _WEIGHTS)
    home = places[_EMBEDDING]
    files = {home: load_file(folder / home)}
    if places.setdefault(_HEAD, home) not in files:
        files[places[_HEAD]] = load_file(folder / places[_HEAD])
    embedding = files[home][_EMBEDDING]
    head = files[places[_HEAD]].get(_HEAD, embedding)
    mean = head[[token for token in used if token < len(head)]].double().mean(0).to(head.dtype)
    grown_head = _grown(head, mean)
    grown_head[[mask_token_id, MASK_ID]] = mean
    grown_embedding = _grown(embedding, torch.zeros_like(embedding[0]))
    grown_embedding[MASK_ID] = embedding[mask_token_id]
    files[home][_EMBEDDING], files[places[_HEAD]][_HEAD] = grown_embedding, grown_head
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if described:
        described["metadata"] = {"total_size": sum((folder / name).stat().st_size for name in set(places.values()))}
        index.write_text(to_json(described, indent=2))
    return len(grown_head)


def _names(path: Path) -> list[str]:
    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def _grown(weight: Tensor, row: Tensor) -> Tensor:
    """A copy of rows (n, width) that has 151669, of which new rows are `row`."""
    more = max(0, _ROWS - len(weight))
    return torch.cat([weight, row.expand(more, -1)]).contiguous()


_ROWS = -(-(MASK_ID + 1) // 128) * 128
"""The fewest that have 151669, in the multiples that engines split over devices."""


def _move_mask_token(path: Path, token: str) -> None:
    """Give the mask token the id 151669 in tokenizer.json: in the vocabulary too, which may leave out ids."""
    described = json.loads(path.read_text(encoding="utf-8"))
    for added in described["added_tokens"]:
        if added["content"] == token:
            added["id"] = MASK_ID
    described["model"]["vocab"][token] = MASK_ID
    path.write_text(to_json(described, ensure_ascii=False), encoding="utf-8")


def _write_config(folder: Path, lm: DiffusionLM, config: DiffusionConfig, rows: int) -> None:
    """config.json under SDAR's names, and the code by which transformers reads it.

    transformers 5 writes `rope_parameters` alone, and SGLang reads `rope_theta`, so that the folder has both.
    """
    path = folder / "config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    model_type, architecture, stock = _CLASSES[lm.model.config.model_type]
    code = {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModelForCausalLM": f"modeling_sdar.{architecture}"}
    described |= {
        "architectures": [architecture], "model_type": model_type, "auto_map": code, "vocab_size": rows,
        "tie_word_embeddings": False, "rope_theta": lm.model.config.rope_parameters["rope_theta"],
        "head_dim": lm.model.model.layers[0].self_attn.head_dim, "block_size": config.block_size,
        "mask_token_id": MASK_ID, "fuse_cross_entropy": False, "sliding_window": None, "use_sliding_window": False,
        "torch_dtype": described.get("dtype"), "diffusion": asdict(replace(config, mask_token_id=MASK_ID)),
    }  # fmt: skip
    if "num_local_experts" in described:
        described["num_experts"] = described["num_local_experts"]
    path.write_text(to_json(described, indent=2))
    (folder / "configuration_sdar.py").write_text(_CONFIGURATION.replace("MODEL_TYPE", model_type))
    (folder / "modeling_sdar.py").write_text(
        _MODELING.replace("ARCHITECTURE", architecture)
        .replace("STOCK", f"{stock}ForCausalLM")
        .replace("MODEL_TYPE", model_type)
        .replace("QWEN", lm.model.config.model_type)
    )


_CONFIGURATION = '''"""SDAR's configuration: Qwen3's fields, with rope_theta beside rope_parameters."""

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    model_type = "MODEL_TYPE"

    def __init__(self, rope_theta=10000.0, rope_parameters=None, **kwargs):
        self.rope_parameters = rope_parameters
        super().__init__(**kwargs)
        self.rope_theta = rope_theta  # SGLang reads this one
'''

_MODELING = '''"""SDAR's class, which is Qwen3's: how blocks are decoded is up to the engine."""

from transformers import STOCK

from .configuration_sdar import SDARConfig

try:  # transformers 5 joins the experts' weights while it loads them
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping as of_type
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping as register

    if of_type("QWEN"):
        register("MODEL_TYPE", of_type("QWEN"), overwrite=True)
except ImportError:
    pass


class ARCHITECTURE(STOCK):
    config_class = SDARConfig
'''


def _readme(lm: DiffusionLM, config: DiffusionConfig, lines: dict[str, str]) -> str:
    return f"""---
library_name: transformers
tags:
- diffusion-language-model
- block-diffusion
- sdar
- unmask
---

A block diffusion language model ({type(lm.model).__name__}, recipe {config.recipe}) as an SDAR folder. It
decodes in blocks of {config.block_size}, without a token shift, and its prompt is block-causal. As a plain causal model
it writes no sense.

SGLang (0.5.23 or newer):

```
{lines["sglang"]}
```

LMDeploy (0.18 or newer):

```
{lines["lmdeploy"]}
```

A lower threshold, in `sglang.yaml` and in `--dllm-confidence-threshold`, commits more tokens a forward. SGLang takes
the most probable token at any temperature.
"""
