"""The frozen AR model whose next-token distribution the joint objective keeps to."""

from __future__ import annotations

import copy

from unmask import hf
from unmask.evaluation.beside import check_same_vocabulary
from unmask.loading import load
from unmask.model import DiffusionLM


def load_teacher(lm: DiffusionLM, name: str | None, *, trust_remote_code: bool = False) -> DiffusionLM | None:
    """The AR model in the folder `name`; None for no teacher and for "parent", which is `lm` itself.

    Raises ValueError for a checkpoint that is no AR model any more, or has another vocabulary than `lm`.
    """
    if name is None or name == "parent":
        return None
    other = load(name, dtype=lm.model.dtype, device=lm.network.device, trust_remote_code=trust_remote_code)
    if other.diffusion is not None and not other.diffusion.serves_ar:
        raise ValueError(f"teacher={name!r} is no AR model any more: give the one it was made from")
    check_same_vocabulary(other.tokenizer, lm.tokenizer, f"teacher={name!r}", "the parent")
    return other


def freeze(teacher: DiffusionLM, lm: DiffusionLM, mask_token_id: int) -> hf.HFNetwork:
    """A frozen copy of the teacher, with the vocabulary size that `lm` has after its mask token was added."""
    model = copy.deepcopy(teacher.model)
    size = lm.model.get_input_embeddings().weight.shape[0]
    if model.get_input_embeddings().weight.shape[0] != size:
        model.resize_token_embeddings(size, mean_resizing=False)
    hf.without_dropout(model)
    return hf.as_network(model.requires_grad_(False).eval(), mask_token_id)
