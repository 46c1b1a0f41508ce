"""Low-rank adaptation through PEFT: adapters on every linear layer but the head, merged when training ends.

Knows stock models and PEFT, which is imported when it is needed. Knows nothing of diffusion or training.

Adapters are put into the model in place, so that the model stays the same object. Embeddings, norms and head, which
Efficient-DLM (2512.14067, Table 1) found necessary, are trained themselves, not as copies.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

from unmask.core.noise import uniform
from unmask.hf.folders import read_object, read_tensors, reading
from unmask.run_folder import ordinary_permissions

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
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
    the seed and the layer's name. trainable: any of "embeddings", "norms", "head". Returns PEFT's tuner, for
    `merge` and `save_adapter`.
    """
    peft = require_peft()
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
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = tuner.peft_config["default"]
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).exists() else base
    config.modules_to_save = sorted({n.rpartition(".")[0] for n in whole})
    config.save_pretrained(str(folder))
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    ordinary_permissions(folder)


def adapter_base(folder: str | Path) -> str | None:
    """The base that an adapter folder names; None for any other folder or name."""
    path = Path(folder) / ADAPTER_CONFIG
    if not path.is_file():
        return None
    base = read_object(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"file {str(path)!r}: base_model_name_or_path {base!r} must be a folder or hub id")
    return base


def load_adapter(model: Any, folder: str | Path) -> None:
    """Load a folder of `save_adapter` into its base and merge it; config and generation config are the folder's."""
    peft = require_peft()
    raw = read_object(Path(folder) / "config.json")
    with reading(f"file {str(Path(folder) / ADAPTER_CONFIG)!r}"):
        config = peft.LoraConfig.from_pretrained(str(folder))
    config.modules_to_save = None  # loaded below, into the model itself
    state = {k.removeprefix(_PREFIX): v for k, v in read_tensors(Path(folder) / ADAPTER_WEIGHTS).items()}
    embedding = model.get_input_embeddings()
    name = next(n for n, module in model.named_modules() if module is embedding)
    if f"{name}.weight" not in state:
        raise ValueError(f"adapter {str(folder)!r} does not fit the model it names as its base: it lacks {name}.weight")
    rows = state[f"{name}.weight"].shape[0]
    if rows != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with reading(f"file {str(Path(folder) / ADAPTER_CONFIG)!r}"):
        tuner = peft.tuners.lora.LoraModel(model, config, "default")
    state = {k.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): v
             for k, v in state.items()}  # fmt: skip
    odd = [n for n, _ in model.named_parameters() if "lora_" in n and n not in state]
    try:
        odd += model.load_state_dict(state, strict=False).unexpected_keys
    except RuntimeError as error:  # shapes
        odd.append(str(error).splitlines()[-1].strip())
    if odd:
        raise ValueError(f"adapter {str(folder)!r} does not fit the model it names as its base: {odd[0]}")
    merge(tuner)
    if "diffusion" in raw:
        model.config.diffusion = raw["diffusion"]
    model.config._name_or_path = str(folder)
    with reading(f"file {str(Path(folder) / 'generation_config.json')!r}"):
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
