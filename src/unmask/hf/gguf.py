"""GGUF files as models: transformers reads the weights, dequantised, and the tokenizer; what they were converted to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from unmask.requirements import is_before


def source_of(place: Path | str) -> tuple[Path | str, dict[str, str]]:
    """What `from_pretrained` reads of a located model: a folder or hub id, and the option for a file in the folder."""
    is_file = isinstance(place, Path) and place.is_file()
    if is_file and is_before(transformers.__version__, "5.6"):
        raise ValueError(
            f"model file {str(place)!r} needs transformers 5.6 or later, and {transformers.__version__} is installed, "
            'which reads the tokenizers of GGUF files wrongly: pip install --upgrade "transformers>=5.6"'
        )
    return (Path(place).parent, {"gguf_file": Path(place).name}) if is_file else (place, {})


def dequantising(file: Path | str, quantization_config: Any = None) -> Any:
    """The quantization_config for the weights of a file, without which transformers loads what it cannot save."""
    if quantization_config is not None:
        raise ValueError(
            f"model file {str(file)!r} is quantised already, and quantization_config={quantization_config!r} would do "
            "it again: leave it out"
        )
    try:
        from transformers import GgufConfig
    except ImportError:  # before 5.2x weights are always dequantised
        return None
    return GgufConfig(dequantize=True)


def take_conversion(model: Any, tokenizer: Any, file: Path) -> None:
    """Give a model what `unmask export` wrote of its conversion: the `diffusion` object, and the mask token.

    A drafter's base stays an AR model, and so does a file of other programs.
    """
    import gguf

    fields = gguf.GGUFReader(file).fields
    found = {key.removeprefix("diffusion."): field.contents() for key, field in fields.items()
             if key.startswith("diffusion.")}  # fmt: skip
    if "recipe" not in found or found.get("adapt_anchor"):
        return
    mask = fields["tokenizer.ggml.mask_token_id"].contents()
    optional = {"clean_attention": None, "block_size": None}
    model.config.diffusion = optional | {"shift": found.pop("shift_logits"), "mask_token_id": mask} | found
    tokenizer.add_special_tokens({"mask_token": fields["tokenizer.ggml.tokens"].contents(mask)})
