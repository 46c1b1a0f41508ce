"""What a checkpoint folder holds: the model, its mask token, what its configuration says of diffusion, a drafter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import logging as hf_logging

from unmask.denoiser import DiffusionConfig
from unmask.drafter import Drafter, DrafterConfig
from unmask.finite import check_weights
from unmask.hf.probes import first_line
from unmask.plain_json import to_json
from unmask.run_folder import ordinary_permissions

MASK_TOKEN = "<|mask|>"
SDAR_MASK_TOKEN = "<|MASK|>"
"""Qwen3 bases get SDAR's mask token at its id 151669, the one that SGLang and LMDeploy know."""


# --- the mask token


def add_mask_token(model: Any, tokenizer: Any, *, token: str | None = None, like: str | None = None) -> int:
    """Give the model a mask token and return its id; embeddings grow only when no row is free.

    token: its text; one that the vocabulary already has is reused with its embedding (unless `like` is
    given). like: initialise the row as this token's instead of the mean of all rows.
    """
    vocabulary = tokenizer.get_vocab()
    if like is not None and like not in vocabulary:
        raise ValueError(f"mask_init {like!r} is no token of this vocabulary: give an existing token or leave it out")
    if token is None:
        sdar = model.config.get_text_config().model_type in ("qwen3", "qwen3_moe")
        token = tokenizer.mask_token or (SDAR_MASK_TOKEN if sdar else MASK_TOKEN)
    reused = token in vocabulary
    tokenizer.add_special_tokens({"mask_token": token})
    mask_token_id: int = tokenizer.mask_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if mask_token_id >= rows:
        with _quiet():
            model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    if not reused or like is not None:
        used = len(vocabulary)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                weight = embedding.weight
                row = weight[vocabulary[like]] if like is not None else weight[:used].float().mean(0)
                weight[mask_token_id] = row.to(weight.dtype)
                if getattr(embedding, "bias", None) is not None:
                    bias = embedding.bias
                    bias[mask_token_id] = bias[vocabulary[like]] if like is not None else bias[:used].mean()
    return mask_token_id


@contextmanager
def _quiet() -> Iterator[None]:
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


# --- folders


def load_pretrained(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
) -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer of a folder or hub id."""
    path = Path(name)
    if not path.exists() and (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise ValueError(f"model folder {str(name)!r} does not exist: give an existing folder or a hub id")
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"model folder {str(name)!r} holds no config.json: give the folder of an HF checkpoint")
    options = {
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization_config,
        "dtype": dtype,
    }
    try:
        config = AutoConfig.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, **{k: v for k, v in options.items() if v is not None}
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {str(name)!r} cannot be loaded: {first_line(error)}") from error
    if device_map is None and quantization_config is None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
    check_weights(model, f"model {str(name)!r}")
    return model.eval(), tokenizer


def without_dropout(model: Any) -> None:
    """Set every dropout rate to 0, so that a training step is a function of its data and noise."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """`generation_config.eos_token_id`, else the tokenizer's end token, else none."""
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    ids = generation.eos_token_id if generation is not None else None
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def read_diffusion(model: Any) -> DiffusionConfig | None:
    """The `diffusion` object of the model's config; None for an untouched AR model."""
    raw = getattr(model.config, "diffusion", None)
    if raw is None:
        return None
    known = {f.name for f in fields(DiffusionConfig)}
    missing = {f.name for f in fields(DiffusionConfig) if f.default is MISSING} - set(raw)
    if missing:
        raise ValueError(f"config.json's diffusion object lacks {sorted(missing)}: it was written by something else")
    return DiffusionConfig(**{k: v for k, v in raw.items() if k in known})


def write_diffusion(model: Any, diffusion: DiffusionConfig | None) -> None:
    """Put the `diffusion` object into the model's config."""
    if diffusion is not None:
        model.config.diffusion = asdict(diffusion)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or hub id."""
    return AutoTokenizer.from_pretrained(name)


def save_pretrained(folder: str | Path, model: Any, tokenizer: Any, diffusion: DiffusionConfig | None) -> None:
    """Write an ordinary HF folder; a converted one has `diffusion` in its config.json."""
    write_diffusion(model, diffusion)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ordinary_permissions(folder)


# --- drafter folders: adapters and a mask row beside a base that stays where it is

DRAFTER_WEIGHTS = "drafter.safetensors"


@dataclass(frozen=True)
class Base:
    """The frozen model that a drafter belongs to: path or hub id, and the hash of its weights."""

    name: str
    fingerprint: str


def fingerprint(model: Any) -> str:
    """Hash of a model's parameter names, shapes and a few values of each, whatever precision it is loaded in."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def add_drafter(model: Any, tokenizer: Any, config: DrafterConfig, *, token: str | None = None) -> Drafter:
    """Hook a new drafter on `model`; the mask token is the tokenizer's alone, the base gets no row for it."""
    tokenizer.add_special_tokens({"mask_token": token or tokenizer.mask_token or MASK_TOKEN})
    return Drafter(model, tokenizer.mask_token_id, config).to(model.device)


def save_drafter(folder: str | Path, drafter: Drafter, tokenizer: Any, diffusion: DiffusionConfig, base: Base) -> None:
    """Write a folder that `load_drafter` reads and that stock transformers refuses: there is no model in it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    save_file(weights, folder / DRAFTER_WEIGHTS, metadata={"format": "pt"})
    described = asdict(diffusion) | {"base": asdict(base), "lora": asdict(drafter.config)}
    (folder / "config.json").write_text(to_json({"model_type": "unmask-drafter", "diffusion": described}, indent=2))
    tokenizer.save_pretrained(folder)
    ordinary_permissions(folder)


def read_base(name: str | Path) -> Base | None:
    """The base that a drafter folder names; None for any other folder or hub id."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return None
    base = (json.loads(path.read_text()).get("diffusion") or {}).get("base")
    return None if base is None else Base(**base)


def load_drafter(name: str | Path, base: Base, **options: Any) -> tuple[Any, Any, DiffusionConfig, Drafter]:
    """Base with its drafter hooked on, tokenizer and config of a drafter folder; `options` load the base."""
    folder = Path(name)
    described = json.loads((folder / "config.json").read_text())["diffusion"]
    try:
        model, _ = load_pretrained(base.name, **options)
    except ValueError as error:
        raise ValueError(
            f"drafter {str(name)!r} needs its base {base.name!r}, which does not load: set diffusion.base.name in its "
            f"config.json to where the base is ({error})"
        ) from error
    found = fingerprint(model)
    if found != base.fingerprint:
        raise ValueError(
            f"drafter {str(name)!r} was trained on another model than {base.name!r}: its base has fingerprint "
            f"{base.fingerprint}, this one {found}; give the original base"
        )
    with _quiet():  # it would warn that the folder's model type is unknown, which is meant
        tokenizer = AutoTokenizer.from_pretrained(folder)
    drafter = add_drafter(model, tokenizer, DrafterConfig(**described["lora"]))
    drafter.load_state_dict(load_file(folder / DRAFTER_WEIGHTS))
    check_weights(drafter, f"drafter {str(name)!r}")
    known = {f.name for f in fields(DiffusionConfig)}
    return model, tokenizer, DiffusionConfig(**{k: v for k, v in described.items() if k in known}), drafter.eval()
