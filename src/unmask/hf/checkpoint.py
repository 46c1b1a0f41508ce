"""A checkpoint folder: the model, its mask token, the `diffusion` object of its configuration, a drafter."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.utils import logging as hf_logging

from unmask.core.drafter import Drafter, DrafterConfig, is_linear_map
from unmask.core.finite import check_weights, plain_parts
from unmask.core.network import DiffusionConfig
from unmask.core.noise import Key, uniform
from unmask.hf.devices import check_device_map, present_device
from unmask.hf.drafters import MASK_TOKEN, add_drafter, own_mask_token
from unmask.hf.folders import BUILDING, check_folder, first_line, parse, read_object, read_tensors
from unmask.hf.gguf import dequantising, source_of, take_conversion
from unmask.hf.quantised import has_adapters, named_quantisation, quantisation_of, settle
from unmask.hf.special_tokens import check_mask_token
from unmask.model_name import CONFIG, DRAFTER_WEIGHTS, permanent_name
from unmask.plain_json import to_json
from unmask.run_folder import check_folder_can_be_written, ordinary_permissions

SDAR_MASK_TOKEN = "<|MASK|>"
"""Qwen3 bases get SDAR's mask token, at the id 151669 that SGLang and LMDeploy expect."""


# --- the mask token


def add_mask_token(
    model: Any, tokenizer: Any, *, token: str | None = None, like: str | None = None, noise: Key | None = None
) -> int:
    """Give the model a mask token and return its id; embeddings grow only when no row is free.

    token: its text; one that the vocabulary already has is reused with its embedding, unless `like` is set.
    like: initialise the row as this token's instead of the mean of all rows. noise: key of normal noise of variance
    1 / width that is added to the row, as LLaMA-Factory does (DiffuLLaMA 2410.17891, its code for gpt2-medium).
    """
    vocabulary = tokenizer.get_vocab()
    if like is not None and like not in vocabulary:
        raise ValueError(f"mask_init {like!r} is no token of this vocabulary: give an existing token or leave it out")
    token = token or _own_mask_token(model, tokenizer)
    check_mask_token(model, tokenizer, token)
    reused = token in vocabulary
    if reused and like is None and noise is not None:
        raise ValueError(
            f"mask_init_noise=true: mask token {token!r} is in the vocabulary and keeps its embedding: leave "
            "mask_init_noise out, or give what it begins with, mask_init=TOKEN"
        )
    tokenizer.add_special_tokens({"mask_token": token})
    mask_token_id: int = tokenizer.mask_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if mask_token_id >= rows:
        with _quiet():
            model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    _is_no_padding(model, mask_token_id)
    if not reused or like is not None:
        used = len(vocabulary)
        for number, embedding in enumerate((model.get_input_embeddings(), model.get_output_embeddings())):
            with torch.no_grad():
                weight = embedding.weight
                row = weight[vocabulary[like]] if like is not None else weight[:used].float().mean(0)
                if noise is not None:
                    row = row + _normal(len(row), (*noise, number)).to(row.device) / len(row) ** 0.5
                weight[mask_token_id] = row.to(weight.dtype)
                if getattr(embedding, "bias", None) is not None:
                    bias = embedding.bias
                    bias[mask_token_id] = bias[vocabulary[like]] if like is not None else bias[:used].mean()
    return mask_token_id


def _own_mask_token(model: Any, tokenizer: Any) -> str:
    """The text of the mask token where none is asked for."""
    sdar = model.config.get_text_config().model_type in ("qwen3", "qwen3_moe")
    return tokenizer.mask_token or (SDAR_MASK_TOKEN if sdar else MASK_TOKEN)


def reused_mask_token(model: Any, tokenizer: Any, token: str | None, drafter: DrafterConfig | None) -> int | None:
    """The token of the vocabulary that would become the mask token of a conversion, None if that would be a new one.

    token: the text that is asked for. drafter: of a drafter's masks, None for a conversion of the whole model.
    """
    chosen = token or (_own_mask_token(model, tokenizer) if drafter is None else own_mask_token(tokenizer, drafter))
    return tokenizer.get_vocab().get(chosen)


def _is_no_padding(model: Any, mask_token_id: int) -> None:
    """A row that the model calls padding, but no token had, becomes an ordinary row: else it would never be trained."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx == mask_token_id:
            module.padding_idx = None
    holders: list[Any] = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
    for holder in holders:
        if getattr(holder, "pad_token_id", None) == mask_token_id:
            holder.pad_token_id = None


def _normal(size: int, key: Key) -> torch.Tensor:
    """Standard normal numbers, (size,) float64."""
    return torch.special.ndtri(uniform(size, key=key))


@contextmanager
def _quiet() -> Iterator[None]:
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


# --- folders


def read_config(place: Path | str) -> dict[str, Any]:
    """The object in config.json of a located model, unchanged; empty if it has none."""
    if isinstance(place, str):
        with _loading(place, "config.json"):
            return dict(PreTrainedConfig.get_config_dict(place)[0])
    path = place / CONFIG
    return read_object(path) if path.is_file() else {}


def load_pretrained(
    place: Path | str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer of a located model, whose weights are all there and fit.

    device_map: of transformers, to one device. quantization_config: "nf4", "int8" or one of transformers' configs;
    weights are packed while they are read.
    trust_remote_code: run Python that the folder brings along; without it, what needs it is refused.
    """
    check_device_map(place, device_map)
    source, of_file = source_of(place)
    if isinstance(place, Path) and not of_file:
        check_folder(place)
    options: dict[str, Any] = {
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": named_quantisation(quantization_config),
        "dtype": dtype,
    }
    with _loading(place, "config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **of_file)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if of_file:
        options["quantization_config"] = dequantising(place, quantization_config)
    elif device_map is None and (quantization_config or getattr(config, "quantization_config", None)) is not None:
        options["device_map"] = {"": device}  # packed weights are not moved later
    with _loading(place, "weights"), BUILDING:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **of_file,
            **{k: v for k, v in options.items() if v is not None},
        )
    check_device_map(place, getattr(model, "hf_device_map", None))
    _check_weights(place, model, info)
    _check_ids(place, model)
    tokenizer = _tokenizer(place, trust_remote_code)
    if of_file:
        with _loading(place, "keys"):
            take_conversion(model, tokenizer, Path(place))
    if quantisation_of(model) is not None:
        settle(model)
    elif device_map is None:
        model.to(present_device(device))
    check_weights(model, f"model {str(place)!r}")
    return model.eval(), tokenizer


def check_tokenizer(name: str | Path, model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives ids past the model's embedding (tokens added to it later may lie there)."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"model {str(name)!r}: its tokenizer has {tokenizer.vocab_size} tokens and its embedding {rows} rows, so "
            "tokenizer.json is of another model"
        )


@contextmanager
def _loading(name: str | Path, part: str) -> Iterator[None]:
    """Any error inside becomes a ValueError that names the model and the `part` of it that was read."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers raises errors of any type on damaged files
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model {str(name)!r} brings Python code of its own ({part}), which is not run unless asked: read it, "
                "then allow it with --trust-remote-code (trust_remote_code=True)"
            ) from error
        raise ValueError(f"model {str(name)!r} cannot be loaded: {part}: {first_line(error)}") from error


def _check_weights(name: str | Path, model: Any, info: dict[str, Any]) -> None:
    """Refuse weights of another model: transformers initialises missing ones at random and drops unexpected ones."""
    missing, mismatched = sorted(info["missing_keys"]), sorted(str(m) for m in info["mismatched_keys"])
    if missing:
        raise ValueError(f"model {str(name)!r}: its weights lack {_some(missing)}, so they are of another model than "
                         "config.json says")  # fmt: skip
    if mismatched or info.get("error_msgs"):
        raise ValueError(f"model {str(name)!r}: its weights do not fit config.json: "
                         f"{_some(mismatched or info['error_msgs'])}")  # fmt: skip
    # Towers and heads that a causal model does not use may be dropped; parts of its own layers may not.
    lists = [n for n, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    layer = re.compile("(" + "|".join(re.escape(n.split(".", 1)[-1]) for n in lists) + r")\.\d+\.") if lists else None
    harmless = ("inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")  # buffers that older versions saved
    odd = [k for k in sorted(info["unexpected_keys"])
           if layer is not None and re.match(rf"(\w+\.)?{layer.pattern}", k) and not k.endswith(harmless)]  # fmt: skip
    if odd and getattr(model.config, "quantization_config", None) is None:
        raise ValueError(f"model {str(name)!r}: its weights have {_some(odd)}, which the model of config.json has not")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _check_ids(name: str | Path, model: Any) -> None:
    """Refuse end tokens outside the vocabulary, and a context of fewer than 2 tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    config = model.config.get_text_config()
    generation = getattr(model, "generation_config", None)
    for file, holder in (("generation_config.json", generation), ("config.json", config)):
        ids = getattr(holder, "eos_token_id", None)
        for token in ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]:
            if type(token) is not int or not 0 <= token < rows:
                raise ValueError(f"model {str(name)!r}: {file}: eos_token_id {ids!r} must be ids below {rows}")
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and (type(context) is not int or context < 2):
        raise ValueError(f"model {str(name)!r}: config.json: max_position_embeddings {context!r} must be at least 2")


def without_dropout(model: Any) -> None:
    """Set every dropout rate to 0, so that a training step is a function of its data and noise."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def read_diffusion(model: Any) -> DiffusionConfig | None:
    """The `diffusion` object of the model's config, checked; None for an untouched AR model."""
    raw = getattr(model.config, "diffusion", None)
    return None if raw is None else parse_diffusion(raw, model)


def parse_diffusion(raw: Any, model: Any, *, drafter: Drafter | None = None) -> DiffusionConfig:
    """The `diffusion` object, checked against `model`: ids in its vocabulary, blocks in its context.

    drafter: the one that has the embeddings of the masks, if the model's embedding has none.
    """
    where = "the diffusion object of config.json"
    diffusion = parse(DiffusionConfig, raw, where, more=True)
    first, number = diffusion.mask_token_id, 0 if diffusion.noise_tokens else diffusion.mask_rows
    rows = model.get_input_embeddings().weight.shape[0]
    if drafter is None and not 0 <= first <= rows - number:
        raise ValueError(f"mask_token_id {first} of {where} is outside the vocabulary of {rows} tokens")
    if drafter is not None and (first, number) != (drafter.mask_token_id, drafter.config.mask_rows):
        raise ValueError(
            f"mask_token_id {first} and mask_rows {number} of {where} are not "
            f"{drafter.mask_token_id} and {drafter.config.mask_rows}, as its tokenizer and drafter have them"
        )
    if diffusion.noise_tokens > rows:
        raise ValueError(f"noise_tokens {diffusion.noise_tokens} of {where} is more than the {rows} tokens there are")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    block = diffusion.block_size
    if block is not None and (block < 1 or (context is not None and block > context)):
        raise ValueError(f"block_size {block} of {where} must be from 1 to the context of {context} tokens")
    return diffusion


def write_diffusion(model: Any, diffusion: DiffusionConfig | None) -> None:
    """Put the `diffusion` object into the model's config."""
    if diffusion is not None:
        model.config.diffusion = asdict(diffusion)


def load_tokenizer(place: Path | str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a located model."""
    if isinstance(place, Path):
        check_folder(place)
    return _tokenizer(place, trust_remote_code)


def _tokenizer(place: Path | str, trust_remote_code: bool) -> Any:
    with _loading(place, "tokenizer.json, tokenizer_config.json or another file of the tokenizer"):
        source, options = source_of(place)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
        if not tokenizer.get_vocab():
            raise ValueError("the vocabulary is empty")
        tokenizer("a")
    return tokenizer


def save_pretrained(folder: str | Path, model: Any, tokenizer: Any, diffusion: DiffusionConfig | None) -> None:
    """Write an ordinary HF folder; a converted one has `diffusion` in its config.json."""
    if has_adapters(model):
        raise ValueError(
            "the adapter of this quantised model lies beside packed weights, which no ordinary folder holds: keep the "
            "adapter's folder, or load that unquantised and save it"
        )
    check_folder_can_be_written(folder)
    write_diffusion(model, diffusion)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ordinary_permissions(folder)


# --- drafter folders: adapters and mask embeddings, and the name of their base


@dataclass(frozen=True)
class Base:
    """The frozen model that a drafter belongs to: hub id or full path, and the hash of its weights.

    unpacked: hash of the weights that no quantisation packs, the same however the model is loaded; None in folders of
    older versions. quantised: what the base was quantised with when the drafter learnt, None if it was not.
    """

    name: str
    fingerprint: str
    unpacked: str | None = None
    quantised: str | None = None

    @classmethod
    def of(cls, name: str, model: Any) -> Base:
        return cls(name, fingerprint(model), fingerprint(model, unpacked=True), quantisation_of(model))

    def is_model(self, model: Any) -> bool:
        """Whether this is the model, as far as can be told where one of both is quantised."""
        if self.quantised == quantisation_of(model):
            return self.fingerprint == fingerprint(model)
        return self.unpacked in (None, fingerprint(model, unpacked=True))


def fingerprint(model: Any, *, unpacked: bool = False) -> str:
    """Hash of a model's parameter names, shapes and at most 127 values of each, whatever its precision.

    unpacked: of embeddings and norms alone, which are the same whatever the model is quantised with.
    """
    packed: set[int] = set()
    if unpacked:
        packed = {id(p) for module in model.modules() if is_linear_map(module) for p in module.parameters()}
        packed -= {id(p) for p in model.get_input_embeddings().parameters()}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) in packed:
            continue
        for part in plain_parts(parameter.detach()):
            flat = part.flatten()
            sample = flat[:: max(1, flat.numel() // 64)].to(torch.bfloat16).float().cpu()
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_drafter(folder: str | Path, drafter: Drafter, tokenizer: Any, diffusion: DiffusionConfig, base: Base) -> None:
    """Write a folder for `load_drafter`, which stock transformers refuses since it holds no model."""
    folder = Path(folder)
    check_folder_can_be_written(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    save_file(weights, folder / DRAFTER_WEIGHTS, metadata={"format": "pt"})
    named = asdict(replace(base, name=permanent_name(base.name)))
    described = asdict(diffusion) | {"base": named, "lora": asdict(drafter.config)}
    (folder / "config.json").write_text(to_json({"model_type": "unmask-drafter", "diffusion": described}, indent=2))
    tokenizer.save_pretrained(folder)
    ordinary_permissions(folder)


def read_base(place: Path | str) -> Base | None:
    """The base that a drafter's folder names; None for any other model."""
    diffusion = read_object(path).get("diffusion") if (path := Path(place) / CONFIG).is_file() else None
    if not isinstance(diffusion, dict) or diffusion.get("base") is None:
        return None
    return parse(Base, diffusion["base"], f"diffusion.base of {str(path)!r}")


def load_drafter(
    folder: Path, base: Base, model: Any, tokenizer: Any, *, trust_remote_code: bool = False
) -> tuple[Any, DiffusionConfig, Drafter]:
    """Hook the drafter of a folder on `model`, its base; tokenizer and config of the folder.

    tokenizer: the base's, for a folder that has none.
    """
    described = read_object(folder / CONFIG)["diffusion"]
    shape = parse(DrafterConfig, described.get("lora"), f"diffusion.lora of {str(folder / CONFIG)!r}")
    weights = read_tensors(folder / DRAFTER_WEIGHTS)
    if not base.is_model(model):
        raise ValueError(
            f"drafter {str(folder)!r} was trained on another model than {base.name!r}: that has fingerprint "
            f"{base.fingerprint}, this one {fingerprint(model)}; give the original with base=FOLDER (--base FOLDER)"
        )
    if (folder / "tokenizer_config.json").is_file():  # else it is the base's, with a mask token added
        with _quiet():  # it would warn that the folder's model type is unknown, as intended
            tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    first = described.get("mask_token_id")
    drafter = add_drafter(model, tokenizer, shape, first=first if type(first) is int else None)
    try:
        drafter.load_state_dict(weights)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]]
        raise ValueError(
            f"weights {str(folder / DRAFTER_WEIGHTS)!r} do not fit diffusion.lora of its config.json: {reasons[0]}"
        ) from error
    check_weights(drafter, f"drafter {str(folder)!r}")
    return tokenizer, parse_diffusion(described, model, drafter=drafter), drafter.eval()
