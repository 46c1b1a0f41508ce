"""Writing GGUF files with the package gguf: keys, then weights one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from unmask.core.drafter import Drafter
from unmask.core.network import DiffusionConfig
from unmask.export.gguf_tensors import add_keys, family_of, interleaved, name_of, tensors_of
from unmask.export.gguf_tokenizer import Vocabulary

_PLAIN = {torch.float16: ("F16", 1), torch.bfloat16: ("BF16", 32)}
_FLOAT32 = ("F32", 0)
"""How a precision is stored, and llama.cpp's number of files of it."""


def write_model(
    file: Path,
    model: Any,
    arch: str,
    vocabulary: Vocabulary,
    diffusion: DiffusionConfig | None,
    masks: Tensor | None,
    packed: tuple[str, int] | None,
) -> int:
    """Write a model; returns how many of its matrices could not be packed.

    masks: embeddings after those of the model. packed: type of packed weights, and llama.cpp's number of such files.
    """
    family, embedding = family_of(model), model.get_input_embeddings().weight
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type((packed or _PLAIN.get(embedding.dtype, _FLOAT32))[1])
    add_keys(writer, family, model.config)
    if arch == family.canvas:
        writer.add_causal_attention(False)
    _add_vocabulary(writer, vocabulary)
    if diffusion is not None:
        _add_diffusion(writer, diffusion)
    return _write(writer, partial(tensors_of, model, family, arch, masks), packed and packed[0])


def write_adapter(file: Path, model: Any, arch: str, drafter: Drafter) -> None:
    """Write a drafter's maps as a LoRA adapter."""
    family, tensors = family_of(model), []
    for key, down in drafter.down.items():
        name = name_of(key.replace("-", ".") + ".weight", model, arch)
        up = interleaved(name, drafter.up[key].detach(), family, model.config)
        tensors += [(f"{name}.lora_a", down.detach()), (f"{name}.lora_b", up)]
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", drafter.config.scale)
    _write(writer, lambda: tensors, None)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, i in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(i)
    if vocabulary.masks:
        writer.add_mask_token_id(vocabulary.masks[0])
        writer.add_array("tokenizer.ggml.suppress_tokens", list(vocabulary.masks))  # samplers leave these out
    writer.add_add_bos_token(vocabulary.adds_begin)
    writer.add_add_eos_token(vocabulary.adds_end)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _add_diffusion(writer: Any, diffusion: DiffusionConfig) -> None:
    """What the model was converted to; llama.cpp itself reads `shift_logits`."""
    described = asdict(diffusion)
    described["shift_logits"] = described.pop("shift")
    adds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    for name, value in described.items():
        if value is not None:
            adds[type(value)](f"diffusion.{name}", value)


def _write(writer: Any, tensors: Callable[[], Iterable[tuple[str, Tensor]]], packed: str | None) -> int:
    """Write the file; `tensors` is asked twice, so that one weight at a time is in memory."""
    kept = 0
    for name, tensor in tensors():
        kind = _kind(tensor, packed)
        kept += packed is not None and tensor.ndim > 1 and kind.name != packed
        size = int(np.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind)))
        writer.add_tensor_info(name, tuple(tensor.shape), np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors():
        data = tensor.float().cpu().contiguous().numpy()
        writer.write_tensor_data(gguf.quants.quantize(data, _kind(tensor, packed)))
    writer.close()
    return kept


def _kind(tensor: Tensor, packed: str | None) -> Any:
    """How a tensor is stored; vectors are float32 there."""
    if tensor.ndim < 2:
        return gguf.GGMLQuantizationType.F32
    plain = _PLAIN.get(tensor.dtype, _FLOAT32)[0]
    return gguf.GGMLQuantizationType[packed if packed and tensor.shape[-1] % 32 == 0 else plain]
