"""What a checkpoint folder holds: the model, its mask token, what its configuration says of diffusion, a drafter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.utils import logging as hf_logging

from unmask.denoiser import DiffusionConfig
from unmask.drafter import Drafter, DrafterConfig
from unmask.finite import check_weights
from unmask.hf.network import UnsupportedModelError
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


class FolderError(ValueError):
    """A folder is not what it should be; the message names it, and the file where one is to blame."""


@contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """Within the context whatever a damaged or foreign folder makes libraries raise is one `FolderError` of a line."""
    try:
        yield
    except (FolderError, UnsupportedModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = first_line(error)
        if "trust_remote_code" in str(error):
            line = "it brings Python code of its own, which runs only with trust_remote_code=True (--trust-remote-code)"
        raise FolderError(f"model {str(name)!r} cannot be loaded: {line}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `FolderError` names a file that holds none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FolderError(f"file {str(path)!r} is no readable JSON: {first_line(error)}") from error
    if not isinstance(raw, dict):
        raise FolderError(f"file {str(path)!r} holds a JSON {type(raw).__name__}, not an object")
    return raw


def read_config(name: str | Path) -> dict[str, Any]:
    """config.json of a folder or hub id, as it stands there; empty where there is none."""
    path = Path(name) / "config.json"
    if path.is_file():
        return read_json(path)
    if Path(name).exists() or is_path(name):
        return {}
    with loading(name):
        return dict(PreTrainedConfig.get_config_dict(name)[0])


def is_path(name: str | Path) -> bool:
    """Whether a name can be no hub id."""
    return str(name).startswith((".", "/", "~")) or str(name).count("/") > 1


_JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json",
               "special_tokens_map.json", "added_tokens.json", "adapter_config.json", "*.index.json")  # fmt: skip


def check_files(folder: Path) -> None:
    """Raise `FolderError` for the first JSON or safetensors file of a folder that cannot be read as one."""
    for pattern in _JSON_FILES:
        for path in sorted(folder.glob(pattern)):
            read_json(path)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as tensors:
                tensors.keys()
        except Exception as error:
            raise FolderError(f"file {str(path)!r} is no whole safetensors file: {first_line(error)}") from error


def load_pretrained(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer of a folder or hub id.

    trust_remote_code: run Python code that the folder brings. Raises `FolderError` for files that cannot be read, for
    weights that are missing, of another size or not finite.
    """
    path = Path(name)
    if not path.exists() and is_path(name):
        raise FolderError(f"model folder {str(name)!r} does not exist: give an existing folder or a hub id")
    if path.exists() and not (path / "config.json").is_file():
        raise FolderError(f"model folder {str(name)!r} holds no config.json: give the folder of an HF checkpoint")
    options = {
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization_config,
        "dtype": dtype,
    }
    trust = {"trust_remote_code": trust_remote_code}
    with loading(name):
        check_files(path)
        config = AutoConfig.from_pretrained(name, **trust)
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            output_loading_info=True,
            **trust,
            **{k: v for k, v in options.items() if v is not None},
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise FolderError(
            f"model {str(name)!r} lacks weights that its config.json asks for ({', '.join(missing[:3])}{more}): "
            "they would be random; give the weights and the configuration of one model"
        )
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


Described = TypeVar("Described")


def described(cls: type[Described], raw: Any, where: str) -> Described:
    """A flat dataclass out of a JSON object; `FolderError` names the field that is missing or of another type."""
    if not isinstance(raw, dict):
        raise FolderError(f"{where} is {raw!r}, not an object")
    given: dict[str, Any] = {}
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in raw:
            if f.default is MISSING:
                raise FolderError(f"{where} lacks {f.name!r}: it was written by something else")
            continue
        value, kinds = raw[f.name], [kind.strip() for kind in str(f.type).split("|")]
        kind = "None" if value is None else type(value).__name__
        if kind not in kinds and not (kind == "int" and "float" in kinds):
            raise FolderError(f"{where} has {f.name} = {value!r}, which must be {f.type}")
        given[f.name] = value
    try:
        return cls(**given)
    except ValueError as error:
        raise FolderError(f"{where}: {error}") from error


def read_diffusion(model: Any, raw: Any = None, vocabulary: int | None = None) -> DiffusionConfig | None:
    """The `diffusion` object of the model's config, or `raw` in its place; None for an untouched AR model.

    vocabulary: ids that a mask token may have, the model's own unless given (a drafter's has no row in its base).
    """
    raw = getattr(model.config, "diffusion", None) if raw is None else raw
    if raw is None:
        return None
    where = "config.json's object 'diffusion'"
    diffusion = described(DiffusionConfig, raw, where)
    vocabulary = vocabulary or model.get_input_embeddings().weight.shape[0]
    if not 0 <= diffusion.mask_token_id < vocabulary:
        raise FolderError(f"{where} has mask_token_id = {diffusion.mask_token_id}, outside the {vocabulary} tokens")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if diffusion.block_size is not None and context is not None and diffusion.block_size > context:
        raise FolderError(f"{where} has block_size = {diffusion.block_size}, beyond the context of {context}")
    return diffusion


def write_diffusion(model: Any, diffusion: DiffusionConfig | None) -> None:
    """Put the `diffusion` object into the model's config."""
    if diffusion is not None:
        model.config.diffusion = asdict(diffusion)


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder or hub id."""
    with loading(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)


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
    diffusion = read_json(path).get("diffusion") if path.is_file() else None
    base = diffusion.get("base") if isinstance(diffusion, dict) else None
    return None if base is None else described(Base, base, f"{str(path)!r}, diffusion.base,")


def load_drafter(name: str | Path, base: Base, **options: Any) -> tuple[Any, Any, DiffusionConfig, Drafter]:
    """Base with its drafter hooked on, tokenizer and config of a drafter folder; `options` load the base."""
    folder = Path(name)
    check_files(folder)
    raw = read_json(folder / "config.json")["diffusion"]
    shape = described(DrafterConfig, raw.get("lora"), f"{str(folder / 'config.json')!r}, diffusion.lora,")
    try:
        model, _ = load_pretrained(base.name, **options)
    except ValueError as error:
        raise FolderError(
            f"drafter {str(name)!r} needs its base {base.name!r}, which does not load: set diffusion.base.name in its "
            f"config.json to where the base is ({error})"
        ) from error
    found = fingerprint(model)
    if found != base.fingerprint:
        raise FolderError(
            f"drafter {str(name)!r} was trained on another model than {base.name!r}: its base has fingerprint "
            f"{base.fingerprint}, this one {found}; give the original base"
        )
    with _quiet():  # it would warn that the folder's model type is unknown, which is meant
        tokenizer = load_tokenizer(folder, options.get("trust_remote_code", False))
    rows = max(model.get_input_embeddings().weight.shape[0], len(tokenizer)) + 1
    diffusion = read_diffusion(model, raw, rows)
    assert diffusion is not None
    weights = folder / DRAFTER_WEIGHTS
    if not weights.is_file():
        raise FolderError(f"drafter {str(name)!r} has no file {DRAFTER_WEIGHTS!r}: its weights are missing")
    drafter = add_drafter(model, tokenizer, shape)
    try:
        drafter.load_state_dict(load_file(weights))
    except RuntimeError as error:  # names or shapes of another drafter
        reason = str(error).splitlines()[-1].strip()
        raise FolderError(
            f"file {str(weights)!r} does not fit the drafter that config.json describes: {reason}"
        ) from error
    check_weights(drafter, f"drafter {str(name)!r}")
    return model, tokenizer, diffusion, drafter.eval()
