"""The frozen AR model whose next-token distribution the joint objective keeps to."""

from __future__ import annotations

import copy
from typing import Any

import torch

from unmask import hf
from unmask.evaluation.beside import check_same_vocabulary
from unmask.loading import load
from unmask.model import DiffusionLM
from unmask.resolve import Resolved


def load_teacher(lm: DiffusionLM, settings: Resolved, *, trust_remote_code: bool = False) -> DiffusionLM:
    """The AR model in the folder that the settings name, which is not "parent", on the device of `lm`.

    Raises ValueError for a checkpoint that is no AR model any more, or has another vocabulary than `lm`.
    """
    name = str(settings.teacher)
    other = load(name, dtype=_dtype_of(lm, settings), device=lm.network.device, trust_remote_code=trust_remote_code)
    if other.diffusion is not None and not other.diffusion.serves_ar:
        raise ValueError(f"teacher={name!r} is no AR model any more: give the one it was made from")
    check_same_vocabulary(other.tokenizer, lm.tokenizer, f"teacher={name!r}", "the parent")
    return other


def freeze(teacher: DiffusionLM | None, lm: DiffusionLM, mask_token_id: int, settings: Resolved) -> hf.HFNetwork:
    """The teacher, frozen, with the vocabulary size that `lm` has after its mask token was added.

    teacher: of `load_teacher`; None copies `lm`.
    """
    model = _copied(lm.model, _dtype_of(lm, settings)) if teacher is None else teacher.model
    size = lm.model.get_input_embeddings().weight.shape[0]
    if model.get_input_embeddings().weight.shape[0] != size:
        model.resize_token_embeddings(size, mean_resizing=False)
    hf.without_dropout(model)
    return hf.as_network(model.requires_grad_(False).eval(), mask_token_id)


def _dtype_of(lm: DiffusionLM, settings: Resolved) -> torch.dtype:
    """The type of the teacher's weights: bfloat16 where passes are, whose products read them so anyway."""
    found: torch.dtype = torch.bfloat16 if settings.mixed_precision == "bf16" else lm.model.dtype
    return found


def _copied(model: Any, dtype: torch.dtype) -> Any:
    """A copy of the model with weights of this type, and no other copy of them on the way; packed ones stay packed."""
    if hf.quantisation_of(model) is not None:
        return copy.deepcopy(model)
    copies: dict[int, Any] = {id(p): torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in model.parameters()}
    return copy.deepcopy(model, copies)
