"""Low-rank adaptation through PEFT: adapters on every linear layer but the head, merged when training ends.

Knows stock models and PEFT, which is imported when it is needed. Knows nothing of diffusion or training.

Adapters are put into the model in place, so that the model stays the same object. Embeddings, norms and head, which
Efficient-DLM (2512.14067, Table 1) found necessary, are trained themselves, not as copies. So there are two kinds of
adapter folders: those of `save_adapter`, whose embeddings may have a row for the mask token, and PEFT's own.
"""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from unmask.core.drafter import HALF
from unmask.core.noise import uniform
from unmask.hf.folders import read_object, read_tensors, reading
from unmask.hf.quantised import check_bare, quantisation_of
from unmask.model_name import ADAPTER_CONFIG, CONFIG, permanent_name
from unmask.run_folder import ordinary_permissions
from unmask.version import __version__

ADAPTER_WEIGHTS, OLD_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
_OURS = "unmask"
"""What the metadata of adapter weights have that `save_adapter` wrote."""
FOR_UNO = "unmask-uno"
"""What those have whose adapters act on some rows alone, in the engines that they were exported for."""

_PREFIX = "base_model.model."  # PEFT's, in front of every name of an adapter file


def require_peft() -> Any:
    """The module peft, or a ValueError that says how to get it."""
    try:
        import peft
    except ImportError:
        raise ValueError("LoRA needs PEFT, which is not installed: pip install 'unmask[lora]'") from None
    return peft


def add_lora(model: Any, rank: int, alpha: float, trainable: tuple[str, ...], seed: int) -> Any:
    """Freeze the model except `trainable` and new adapters, W + (alpha / rank) B A (2106.09685, eq. 3).

    B starts at 0, so the model's function is unchanged; A is uniform within 1 / sqrt(inputs), a function of
    the seed and the layer's name. Both are float32 beside weights in half precision. trainable: any of "embeddings",
    "norms", "head". Returns PEFT's tuner, for `merge` and `save_adapter`.
    """
    peft = require_peft()
    check_bare(model)
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim > 2]
    if fused:
        raise ValueError(
            f"lora_rank={rank}: {fused[0]!r} holds several layers in one tensor (experts), which LoRA does not "
            "adapt: train the whole model, without lora_rank"
        )
    head = model.get_output_embeddings()
    targets = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=sorted(targets),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in targets.values()),
        bias="none",
    )
    tuner = peft.tuners.lora.LoraModel(model, config, "default")
    for name, parameter in model.named_parameters():
        if ".lora_" in name and parameter.dtype in HALF:
            parameter.data = parameter.data.float()
        if ".lora_A." in name and not parameter.is_meta:
            draws = 2 * uniform(*parameter.shape, key=("lora", seed, name)) - 1
            parameter.data.copy_(draws / math.sqrt(parameter.shape[1]))
    for module in _whole(model, trainable):
        module.requires_grad_(True)
    return tuner


def _whole(model: Any, trainable: tuple[str, ...]) -> list[torch.nn.Module]:
    """The modules that `trainable` names."""
    found: list[torch.nn.Module] = [model.get_output_embeddings()] if "head" in trainable else []
    for module in model.modules():
        is_norm = "norm" in type(module).__name__.lower() and not list(module.children())
        if (isinstance(module, torch.nn.Embedding) and "embeddings" in trainable) or (is_norm and "norms" in trainable):
            found.append(module)
    return found


def merge(tuner: Any) -> None:
    """Add every adapter to its layer and remove it, so that the model is a stock one again."""
    model = tuner.merge_and_unload()
    if hasattr(model, "peft_config"):  # newer versions of PEFT remove it
        del model.peft_config
    model.requires_grad_(True)


def save_adapter(folder: str | Path, tuner: Any, base: str) -> None:
    """Write the adapters and the other trained parameters as a PEFT folder of the base model `base`."""
    folder, model = Path(folder), tuner.model
    folder.mkdir(parents=True, exist_ok=True)
    # The embedding, trained or not, may have a row for the mask token, which the base does not have.
    edges = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    whole = {n: p for n, p in model.named_parameters() if "lora_" not in n and (p.requires_grad or id(p) in edges)}
    adapters = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    tensors = {_PREFIX + n: p.detach().cpu().contiguous() for n, p in (adapters | whole).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt", _OURS: __version__})
    config = tuner.peft_config["default"]
    config.base_model_name_or_path = permanent_name(base)
    config.modules_to_save = sorted({n.rpartition(".")[0] for n in whole})
    config.save_pretrained(str(folder))
    written = copy.copy(model.config)
    written.__dict__.pop("quantization_config", None)  # of how the base was loaded, not of the adapter
    written.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    ordinary_permissions(folder)


def adapter_base(place: Path | str) -> str | None:
    """The base that an adapter's folder names, "" if it names none; None for any other model."""
    path = Path(place) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    base = read_object(path).get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"file {str(path)!r}: base_model_name_or_path {base!r} must be a folder or hub id")
    return base or ""


def load_adapter(model: Any, folder: Path) -> None:
    """Merge a LoRA adapter into `model`, its base; of a folder of `save_adapter`, config and generation config too.

    On a quantised base the adapter stays beside the packed weights, which could not hold it.
    """
    peft = require_peft()
    check_bare(model)
    with reading(f"file {str(folder / ADAPTER_CONFIG)!r}"):
        config = peft.PeftConfig.from_pretrained(str(folder))
    if config.peft_type != "LORA":
        raise ValueError(
            f"adapter {str(folder)!r} has peft_type {str(getattr(config.peft_type, 'value', config.peft_type))!r}: "
            "only LORA is merged into its base"
        )
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding) + ".weight"
    state, ours = _read_weights(folder, name)
    grown = [v.shape[0] for k, v in state.items() if k in (name, name.replace(".weight", ".base_layer.weight"))]
    if grown and grown[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(grown[0], mean_resizing=False)
    with reading(f"file {str(folder / ADAPTER_CONFIG)!r}"):
        odd = _merge_own(peft, model, config, state) if ours else _merge_stock(peft, model, config, state)
    if odd:
        raise ValueError(f"adapter {str(folder)!r} does not fit the model it names as its base: {odd[0]}")
    if ours:
        _take_configs(model, folder)
    model.requires_grad_(quantisation_of(model) is None).eval()


def _read_weights(folder: Path, embedding: str) -> tuple[dict[str, torch.Tensor], bool]:
    """Tensors without PEFT's prefix, and whether `save_adapter` wrote them; embedding: its name in the model."""
    if not (folder / ADAPTER_WEIGHTS).is_file() and (folder / OLD_WEIGHTS).is_file():
        with reading(f"weights {str(folder / OLD_WEIGHTS)!r}"):
            state, ours = torch.load(folder / OLD_WEIGHTS, map_location="cpu", weights_only=True), False
    else:
        state = read_tensors(folder / ADAPTER_WEIGHTS)
        with safe_open(str(folder / ADAPTER_WEIGHTS), framework="pt") as file:
            metadata = file.metadata() or {}
        if FOR_UNO in metadata:
            raise ValueError(
                f"adapter {str(folder)!r} was exported for SGLang and vLLM, which switch it on for the rows of a draft "
                "alone: load the drafter that it was exported from"
            )
        ours = _OURS in metadata
    state = {key.removeprefix(_PREFIX): tensor for key, tensor in state.items()}
    path = folder / CONFIG  # of versions that wrote no metadata
    return state, ours or (embedding in state and path.is_file() and "diffusion" in read_object(path))


def _merge_own(peft: Any, model: Any, config: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Merge an adapter of `save_adapter`; what does not fit, in words."""
    config.modules_to_save = None  # loaded below, into the model itself
    tuner = peft.tuners.lora.LoraModel(model, config, "default")
    state = {k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): v
             for k, v in state.items()}  # fmt: skip
    odd = [n for n, _ in model.named_parameters() if "lora_" in n and n not in state]
    try:
        odd += model.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:  # shapes
        odd.append(str(error).splitlines()[-1].strip())
    if not odd and quantisation_of(model) is None:
        merge(tuner)
    return odd


def _merge_stock(peft: Any, model: Any, config: Any, state: dict[str, torch.Tensor]) -> list[str]:
    """Merge an adapter that PEFT wrote, through PEFT; what does not fit, in words."""
    if quantisation_of(model) is not None and config.modules_to_save:
        return [f"it replaces {', '.join(config.modules_to_save)}, which is done on an unquantised base alone"]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied and quantisation_of(model) is None:  # an adapter of one of them must not be merged into both
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    tuned = peft.PeftModel(model, config, "default")
    try:
        found = peft.set_peft_model_state_dict(tuned, {_PREFIX + key: tensor for key, tensor in state.items()})
    except RuntimeError as error:  # shapes
        return [str(error).splitlines()[-1].strip()]
    marks = ("lora_", ".modules_to_save.default.")
    odd = [f"it lacks {key}" for key in found.missing_keys if any(mark in key for mark in marks)]
    # Of an embedding that grew, PEFT writes the trained weights once more, and the untrained ones.
    again = (".modules_to_save.", ".original_module.")
    odd += [f"{key} is none of its weights" for key in found.unexpected_keys if not any(part in key for part in again)]
    if odd or quantisation_of(model) is not None:
        return odd
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no longer tied")  # they are tied again below, if they are equal
        merge(tuned)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied:
        still = head.weight.shape == embedding.weight.shape and torch.equal(head.weight, embedding.weight)
        if still:
            head.weight = embedding.weight
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = still
    return []


def _take_configs(model: Any, folder: Path) -> None:
    raw = read_object(folder / CONFIG)
    if "diffusion" in raw:
        model.config.diffusion = raw["diffusion"]
    with reading(f"file {str(folder / 'generation_config.json')!r}"):
        model.generation_config = GenerationConfig.from_pretrained(folder)
