"""Figures of a model while it learns: held-out documents, always with the same masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from unmask.core.network import DiffusionConfig, Network
from unmask.data.corpus import Corpus, Document
from unmask.evaluation import likelihood
from unmask.settings import Settings

Spread = Callable[[int, Callable[[Sequence[int]], Any]], list[Any]]
"""(number of documents, (numbers of some) -> an output for each) -> the outputs of all, see `training.ranks.spread`."""


def alone(number: int, work: Callable[[Sequence[int]], Any]) -> list[Any]:
    """All of the work in this process."""
    return list(work(range(number)))


def held_out_document(document: Document, end_token_id: int | None) -> likelihood.Document:
    """A document of a corpus as the likelihood wants it, without its bytes, which are not asked for.

    A text without its end token. A supervised example whole, since where an answer ends is part of it.
    """
    ids, loss_mask = document
    if loss_mask is None and end_token_id is not None:
        ids = ids[:-1]
    tokens = torch.from_numpy(ids.astype("int64"))
    mask = None if loss_mask is None else torch.from_numpy(loss_mask)
    return likelihood.Document(tokens, torch.zeros_like(tokens), mask)


def held_out_documents(corpus: Corpus, end_token_id: int | None) -> list[likelihood.Document]:
    """`held_out_document` of each document of a corpus."""
    return [held_out_document(corpus.document(i), end_token_id) for i in range(len(corpus))]


def held_out_nll(
    network: Network,
    mask_token_id: int | None,
    documents: Sequence[likelihood.Document],
    context_length: int | None,
    spread: Spread = alone,
) -> float:
    """Nats per predicted token in AR mode; mask_token_id: what is not predicted, see `_without_masks`."""
    if mask_token_id is not None:
        documents = [_without_masks(document, mask_token_id) for document in documents]

    def measure(numbers: Sequence[int]) -> list[likelihood.LikelihoodOutput]:
        return likelihood.nll(network, [documents[n] for n in numbers], context_length=context_length)

    return likelihood.summarise(spread(len(documents), measure)).nats_per_token


def evaluator(
    network: Network,
    config: DiffusionConfig | None,
    settings: Settings,
    documents: Sequence[likelihood.Document],
    context_length: int | None,
    spread: Spread = alone,
) -> Callable[[], dict[str, float]]:
    """A function that measures the network: nats per predicted token, by name; with `spread` on all ranks together.

    An AR model (no config) has the NLL; a converted one the NELBO and, under the joint objective, which is to keep
    the AR model what it was, the NLL too.
    """
    if config is not None:
        documents = [_without_masks(document, config.mask_token_id) for document in documents]

    def nll() -> float:
        return held_out_nll(network, None, documents, context_length, spread)

    def measure(numbers: Sequence[int]) -> list[likelihood.LikelihoodOutput]:
        assert config is not None
        chosen = [documents[n] for n in numbers]
        return likelihood.nelbo(network, config, chosen, num_samples=settings.eval_samples, numbers=numbers,
                                context_length=context_length)  # fmt: skip

    def evaluate() -> dict[str, float]:
        if config is None:
            return {"nll": nll()}
        summary = likelihood.summarise(spread(len(documents), measure))
        figures = {"nelbo": summary.nats_per_token, "nelbo_standard_error": summary.standard_error or 0.0}
        return figures | ({"nll": nll()} if settings.objective == "joint" else {})

    return evaluate


def _without_masks(document: likelihood.Document, mask_token_id: int) -> likelihood.Document:
    """The document without a loss on a reused mask token, which has probability 0: as training has it."""
    natural = document.ids == mask_token_id
    if not bool(natural.any()):
        return document
    return replace(document, loss_mask=~natural if document.loss_mask is None else document.loss_mask & ~natural)
