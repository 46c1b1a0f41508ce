"""Format `gguf`: files for llama.cpp and what is built on it (Ollama, LM Studio).

AR models and block conversions are written as the AR class that they are: any program decodes them token by token, and
`examples/llama_cpp.py` decodes blocks. Whole-canvas models are written as llama.cpp's own diffusion classes. A drafter
becomes a LoRA adapter beside its base, on in a pass that drafts and off in one that verifies. Keys `diffusion.*` say
what a model was converted to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unmask.core.network import DiffusionConfig
from unmask.model import DiffusionLM
from unmask.model_name import can_read_gguf
from unmask.version import __version__

QUANTISATIONS = {"q8_0": 7, "q5_1": 9, "q5_0": 8, "q4_1": 3, "q4_0": 2}
"""What the package gguf can pack weights to, and llama.cpp's number of such files."""


def export_gguf(lm: DiffusionLM, folder: Path, place: str, *, quantize: str | None = None) -> dict[str, Any]:
    """Write `model.gguf`, and for a drafter `drafter.gguf` too; returns commands that run them, and what to know.

    quantize: one of `QUANTISATIONS`, for matrices with rows of a multiple of 32 numbers; else weights keep their
    precision (float64 becomes float32). Raises ValueError for what llama.cpp would compute or tokenise otherwise.
    """
    if not can_read_gguf():
        raise ValueError("format 'gguf' needs the package that writes GGUF: pip install \"unmask[gguf]\"")
    from unmask.export.gguf_file import write_adapter, write_model
    from unmask.export.gguf_tensors import family_of
    from unmask.export.gguf_tokenizer import vocabulary_of

    check_quantize(quantize)
    if getattr(lm.model.config, "quantization_config", None) is not None:
        raise ValueError(
            "this model was loaded quantised: load it without quantization_config, and export it with --quantize"
        )
    family = family_of(lm.model)
    arch, masks = _arch(family, lm), mask_rows(lm)
    rows = lm.model.get_input_embeddings().weight.shape[0] + (0 if masks is None else len(masks))
    vocabulary = vocabulary_of(lm.tokenizer, rows, lm.end_token_ids, mask_ids(lm.diffusion))
    packed = None if quantize is None else (quantize.upper(), QUANTISATIONS[quantize])
    kept = write_model(folder / "model.gguf", lm.model, arch, vocabulary, lm.diffusion, masks, packed)
    if lm.drafter is not None:
        write_adapter(folder / "drafter.gguf", lm.model, arch, lm.drafter)
    name = str(getattr(lm.model.config, "_name_or_path", "")) if lm.base is None else lm.base.name
    notes = [*vocabulary.notes, *([f"rows of {kept} matrices are no multiple of 32 long: not packed"] if kept else [])]
    lines = _launch_lines(place, lm, arch)
    (folder / "README.md").write_text(_readme(name, _use(lm, arch), lines, notes))
    return lines | ({"notes": "; ".join(notes)} if notes else {})


def mask_ids(diffusion: DiffusionConfig | None) -> range:
    """The ids of the masks, which no text has; none of a drafter that reads random tokens."""
    if diffusion is None or diffusion.noise_tokens:
        return range(0)
    return range(diffusion.mask_token_id, diffusion.mask_token_id + diffusion.mask_rows)


def mask_rows(lm: DiffusionLM) -> Tensor | None:
    """Embeddings (rows, hidden) that a drafter adds to its base's, the first ones of ids that nothing has."""
    if lm.drafter is None or not lm.drafter.config.mask_rows:
        return None
    embedding = lm.model.get_input_embeddings()
    masks = lm.drafter.masks.detach() / getattr(embedding, "embed_scale", 1.0)  # the layer scales what the file holds
    return torch.cat([masks.new_zeros(lm.drafter.mask_token_id - len(embedding.weight), masks.shape[1]), masks])


def check_quantize(quantize: str | None) -> None:
    """Raise ValueError for a packing that cannot be written."""
    if quantize is not None and quantize not in QUANTISATIONS:
        raise ValueError(
            f"quantize {quantize!r} cannot be written here: use {', '.join(QUANTISATIONS)}; for others export without "
            "it, then run llama.cpp's own llama-quantize on the file"
        )


def _arch(family: Any, lm: DiffusionLM) -> str:
    """llama.cpp's class for the model; ValueError for one that its passes cannot serve."""
    diffusion, arch = lm.diffusion, str(family.arch)
    if diffusion is None:
        return arch
    if lm.drafter is not None:
        if not diffusion.adapt_anchor:
            raise ValueError(
                "adapt_anchor false: llama.cpp turns an adapter on for whole passes, and this drafter's have adapted "
                "rows beside the base's; train it with `unmask adapt BASE --recipe drafter adapt_anchor=true`"
            )
        return arch
    if diffusion.noise_tokens:
        raise ValueError(f"noise_tokens {diffusion.noise_tokens}: of models that read random tokens, drafters alone")
    if diffusion.attention != "bidirectional":
        window = lm.model.config.sliding_window if family.window else None
        if window is not None and diffusion.block_size is not None and diffusion.block_size > window:
            raise ValueError(f"block_size {diffusion.block_size} is wider than sliding_window {window}, which "
                             "llama.cpp applies to the past alone: convert with smaller blocks")  # fmt: skip
        return arch
    if family.canvas is None:
        raise ValueError(
            f"attention 'bidirectional' of class {arch!r} has no diffusion class in llama.cpp, which has those of "
            "llama and mistral (llada) and of qwen2 (dream): convert with blocks, as recipe efficient-dlm does"
        )
    return str(family.canvas)


def _launch_lines(place: str, lm: DiffusionLM, arch: str) -> dict[str, str]:
    """Commands by what they run."""
    model, example = f"{place}/model.gguf", "python examples/llama_cpp.py LIBRARIES"
    if arch in ("llada", "dream"):
        return {"llama.cpp": f"llama-diffusion-cli -m {model} -p PROMPT -ub LENGTH --diffusion-steps LENGTH"}
    lines = {"llama.cpp": f"llama-cli -m {model}"}
    if lm.drafter is not None:
        lines["speculative"] = f"{example} {model} PROMPT {place}/drafter.gguf"
    elif lm.diffusion is not None:
        lines["blocks"] = f"{example} {model} PROMPT"
    return lines


def _use(lm: DiffusionLM, arch: str) -> str:
    """What the files are good for."""
    if lm.drafter is not None:
        return (
            "`model.gguf` is the base, an AR model. `drafter.gguf` is an adapter for passes that draft, off in "
            "those that verify: the text is the base's own. On for all passes, it is no language model."
        )
    if lm.diffusion is None:
        return "An AR model."
    if arch in ("llada", "dream"):
        return f"A diffusion model of llama.cpp's class `{arch}`, which decodes a whole canvas."
    if lm.diffusion.serves_ar:
        return "An AR model that also decodes blocks; programs that know no blocks decode it token by token."
    return (
        "A block diffusion model in the file of an AR model. Programs that know no blocks decode it token by token, "
        "which it was not trained for."
    )


def _readme(name: str, use: str, lines: dict[str, str], notes: list[str]) -> str:
    runs = "\n".join(f"## {title}\n\n```\n{line}\n```\n" for title, line in lines.items())
    known = "".join(f"- {note}\n" for note in notes)
    return (
        f"# {Path(name).name} as GGUF\n\n{use} Written by unmask {__version__}.\n\n{runs}"
        + (f"\n## Notes\n\n{known}" if known else "")
        + "\n`examples/llama_cpp.py` of unmask's repository decodes blocks and drafts, with libllama in LIBRARIES.\n"
    )
