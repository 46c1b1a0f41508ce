"""`load`: from a folder or a hub id to a `DiffusionLM`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from unmask import hf
from unmask.core.finite import check_weights
from unmask.hf import lora
from unmask.hf.fast.packed import seconds_of
from unmask.model import DiffusionLM
from unmask.model_name import locate, permanent_name, text_of
from unmask.progress import warn


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> DiffusionLM:
    """Load a folder, hub id or .gguf file, converted or not; refuse a model whose attention cannot be controlled.

    An adapter's folder, also one of PEFT's own, is its base with the adapter merged into it; a drafter's is its base
    with the drafter on it; base: where that model is, if not where the folder says. device_map: of transformers, to one
    device; several are refused. quantization_config: "nf4", "int8" (extra `[quant]`), or a config of transformers; an
    adapter then stays beside the packed weights. A .gguf file (extra `[gguf]`) is dequantised. trust_remote_code: run
    Python code that the folder brings; without it such a folder is refused. Raises ValueError with the file or the
    weights that are not what they should be.
    """
    _check_dtype(dtype)
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization_config,
        "trust_remote_code": trust_remote_code,
    }
    *above, (model_name, place) = _chain(text_of(name), None if base is None else text_of(base))
    model, tokenizer = hf.load_pretrained(place, **options)
    model.config._name_or_path = model_name
    hf.probe(model)
    hf.check_tokenizer(place, model, tokenizer)
    lm = DiffusionLM(model, tokenizer, hf.read_diffusion(model))
    for at, (layer_name, layer) in reversed(list(enumerate(above))):
        under = (*above, (model_name, place))[at + 1][0]
        lm = _with(lm, layer_name, Path(layer), under, trust_remote_code)
    _warn_of_slow_precision(model)
    return lm.known_finite()


def _check_dtype(dtype: torch.dtype | str | None) -> None:
    """Raise ValueError for what is no type of weights."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype {str(dtype)!r} is no type of weights: use float32, bfloat16, float16 or float64")


def _warn_of_slow_precision(model: torch.nn.Module) -> None:
    """On a CPU half precision can be many times slower than float32 where it has no instructions for it."""
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if model.device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return
    ratio = seconds_of_product(dtype) / seconds_of_product(torch.float32)
    if ratio > 1.5:
        warn(
            f"{str(dtype).removeprefix('torch.')} is slow on this CPU: a product over {_ROWS} rows takes {ratio:.1f} "
            "times as long as in float32; load with dtype='float32'"
        )


_ROWS = 9


def seconds_of_product(dtype: torch.dtype) -> float:
    """The shortest of a few products of 9 rows with a matrix of 512 x 512, as passes of few rows have them."""
    weight = torch.ones(512, 512, dtype=dtype)
    with torch.inference_mode():
        return seconds_of(lambda x: linear(x, weight), torch.ones(_ROWS, 512, dtype=dtype))


def read_config(name: str | Path, base: str | Path | None = None) -> dict[str, Any]:
    """The object in config.json of a model, or of the one that an adapter without it stands on; empty without any."""
    chain = _chain(text_of(name), None if base is None else text_of(base))
    return next((found for _, place in chain if (found := hf.read_config(place))), {})


def load_tokenizer(
    name: str | Path, base: str | Path | None = None, trust_remote_code: bool = False
) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of a model, and its end tokens, without its weights."""
    *above, (_, place) = _chain(text_of(name), None if base is None else text_of(base))
    own = next((layer for _, layer in above if (Path(layer) / "tokenizer_config.json").is_file()), place)
    tokenizer = hf.load_tokenizer(own, trust_remote_code=trust_remote_code)
    return tokenizer, hf.end_token_ids_at(place, tokenizer, trust_remote_code=trust_remote_code)


def recorded_base(name: str | Path) -> str | None:
    """The base that the folder of a drafter or adapter names; None for any other model."""
    return _base_of(locate(name))


def _base_of(place: Path | str) -> str | None:
    drafted = hf.read_base(place)
    return lora.adapter_base(place) if drafted is None else drafted.name


def _chain(name: str, base: str | None) -> list[tuple[str, Path | str]]:
    """Names and places of a model and of those it stands on, of which the last is whole.

    base: stands in for the base that the first one names.
    """
    chain = [(name, locate(name))]
    while (recorded := _base_of(chain[-1][1])) is not None:
        (above, place), under = chain[-1], base or recorded
        kind = "drafter" if hf.read_base(place) else "adapter"
        if not under:
            raise ValueError(f"{kind} {above!r} names no base_model_name_or_path: give base=FOLDER (--base FOLDER)")
        try:
            chain.append((under, locate(under)))
        except ValueError as error:
            raise ValueError(
                f"{kind} {above!r} needs its base {under!r}, which does not load: give base=FOLDER "
                f"(--base FOLDER) ({error})"
            ) from error
        if hf.read_base(chain[-1][1]) is not None:
            raise ValueError(f"{kind} {above!r} stands on {under!r}, which is a drafter: give the drafter's own base")
        if chain[-1][1] in [place for _, place in chain[:-1]]:
            raise ValueError(f"adapter {name!r} ends at no model: its bases go round in a circle by {under!r}")
        base = None
    if base is not None:
        raise ValueError(f"base={base!r} is for a drafter's or an adapter's folder, and {name!r} is neither")
    return chain


def _with(lm: DiffusionLM, name: str, folder: Path, base: str, trust_remote_code: bool) -> DiffusionLM:
    """The drafter or adapter in a folder, on its base `lm`."""
    model, drafted = lm.model, hf.read_base(folder)
    if drafted is not None:
        drafted = replace(drafted, name=permanent_name(base))
        tokenizer, diffusion, drafter = hf.load_drafter(
            folder, drafted, model, lm.tokenizer, trust_remote_code=trust_remote_code
        )
        hf.check_tokenizer(name, model, tokenizer)
        return DiffusionLM(model, tokenizer, diffusion, drafter=drafter, base=drafted)
    lora.load_adapter(model, folder)
    model.config._name_or_path = name
    check_weights(model, f"model {name!r}")
    tokenizer = lm.tokenizer
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = hf.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    hf.check_tokenizer(name, model, tokenizer)
    return DiffusionLM(model, tokenizer, hf.read_diffusion(model))
