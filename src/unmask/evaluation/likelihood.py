"""Likelihoods of whole documents: the exact NLL of the AR mode and the NELBO of the diffusion mode.

The NELBO bounds -log p(x) of the sampler that reveals a block's tokens one at a time in random order. A
threshold sampler draws from another distribution; its outputs have no likelihood here. Masks are always uniform:
a position-dependent mask gives no bound.

Notation: a *window* is a stretch of a document no longer than the context, scored as a document of its own;
its first token is given. Natural logarithms; totals per document.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.corruption import Corruption, mask_exact, segments
from unmask.core.network import DiffusionConfig, Network, run_rows
from unmask.core.noise import uniforms
from unmask.core.objectives import predictable, row_nll, token_nll
from unmask.core.scoring import ar_pass
from unmask.data.pieces import LONG, long_ids_and_bytes
from unmask.data.plain_text import encode
from unmask.data.token_bytes import bytes_of_tokens
from unmask.evaluation.clean import noisy_nll, read_clean
from unmask.limits import MOST_SAMPLES, check_whole, whole_numbers

Progress = Callable[[int], None]
"""Called with the number of windows that were just scored."""


@dataclass(frozen=True)
class LikelihoodOutput:
    """nats: total of the document. num_tokens, num_bytes: of its predicted part. standard_error: of `nats`,
    from the masks drawn (None for exact figures and for a single sample)."""

    nats: float
    num_tokens: int
    num_bytes: int
    standard_error: float | None = None


@dataclass(frozen=True)
class Document:
    """Token ids of one document (length,), and the UTF-8 bytes of the text that each token spells.

    loss_mask: (length,) bool, False on tokens that are given (a prompt) and so never corrupted nor scored;
    None gives only the first token of each window.
    """

    ids: Tensor
    num_bytes: Tensor
    loss_mask: Tensor | None = None


def documents_of(
    tokenizer: Any, texts: Sequence[str], mask_token_id: int | None, numbers: Sequence[int] | None = None
) -> list[Document]:
    """Exactly tokenizer(text) of each text, with the UTF-8 bytes that each token spells.

    numbers: of the texts in a larger set, from 0, one for each. Raises ValueError for no texts, for numbers that do not
    fit them, and for a text that holds the mask token, which has probability 0.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one document")
    if numbers is not None:
        _check_numbers(numbers, len(texts))
    documents = []
    for i, (ids, num_bytes) in enumerate(_ids_and_bytes(tokenizer, texts)):
        if mask_token_id in ids:
            raise ValueError(
                f"document {(i if numbers is None else numbers[i]) + 1} holds the mask token "
                f"{tokenizer.mask_token!r} as a word of its own, "
                "which has probability 0: take it out, or convert with a mask token of its own"
            )
        documents.append(Document(torch.from_numpy(ids.astype("int64")), torch.from_numpy(num_bytes.astype("int64"))))
    return documents


def _check_numbers(numbers: Sequence[int], num_texts: int) -> None:
    if not isinstance(numbers, list | tuple | range):
        raise TypeError(f"numbers {numbers!r} must be a list of whole numbers")
    for number in whole_numbers("numbers", numbers):
        check_whole("numbers", number, least=0)
    if len(numbers) != num_texts:
        raise ValueError(f"numbers {list(numbers)} must be one for each text, of which there are {num_texts}")


def _ids_and_bytes(tokenizer: Any, texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids of each text, and the bytes that each token spells."""
    has_offsets = bool(tokenizer.is_fast)
    short = [text for text in texts if len(text) <= LONG]
    encoded = encode(tokenizer, short, return_offsets_mapping=has_offsets) if short else {"input_ids": []}
    rows, offsets = encoded["input_ids"], encoded.get("offset_mapping")
    found = zip(rows, bytes_of_tokens(tokenizer, short, rows, offsets), strict=True)
    for text in texts:
        if len(text) > LONG:
            yield long_ids_and_bytes(tokenizer, text)
        else:
            ids, num_bytes = next(found)
            yield np.asarray(ids, dtype=np.int32), np.asarray(num_bytes, dtype=np.int32)


def num_windows(documents: Sequence[Document], context_length: int | None) -> int:
    """How many windows are scored."""
    return sum(1 if context_length is None else -(-len(d.ids) // context_length) for d in documents)


@dataclass(frozen=True)
class LikelihoodSummary:
    """Means over documents, weighted by tokens: nats per predicted token and bits per byte."""

    nats_per_token: float
    bits_per_byte: float
    standard_error: float | None
    num_documents: int
    num_tokens: int


def summarise(outputs: Sequence[LikelihoodOutput]) -> LikelihoodSummary:
    """Totals of all documents divided once."""
    nats = math.fsum(o.nats for o in outputs)
    tokens, num_bytes = sum(o.num_tokens for o in outputs), sum(o.num_bytes for o in outputs)
    errors = [o.standard_error for o in outputs]
    spread = None
    if outputs and all(e is not None for e in errors):
        spread = math.sqrt(math.fsum(e * e for e in errors if e is not None)) / max(1, tokens)
    return LikelihoodSummary(
        nats / max(1, tokens), nats / math.log(2) / max(1, num_bytes), spread, len(outputs), tokens
    )


@torch.inference_mode()
def nll(
    network: Network,
    documents: Sequence[Document],
    *,
    context_length: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[LikelihoodOutput]:
    """Exact: -sum_i log p(x_i | x_<i) under the causal pattern, next-token rows."""
    totals = [0.0] * len(documents)
    for windows, x0, layout, loss_mask in batches(documents, context_length, batch_tokens, network.device):
        wanted = predictable(layout, loss_mask)
        values = run_rows(network, ar_pass(x0, layout, wanted), functools.partial(_exact_nll, x0[wanted]))
        for (owner, _), value in zip(windows, row_sums(values, wanted), strict=True):
            totals[owner] += value
        if progress is not None:
            progress(len(windows))
    check_finite(totals)
    return [_output(total, d, context_length) for total, d in zip(totals, documents, strict=True)]


def _exact_nll(target: Tensor, logits: Tensor, part: slice) -> Tensor:
    return row_nll(target)(logits.double(), part)


@torch.inference_mode()
def nelbo(
    network: Network,
    config: DiffusionConfig,
    documents: Sequence[Document],
    *,
    num_samples: int = 8,
    exact: bool = False,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    context_length: int | None = None,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> list[LikelihoodOutput]:
    """sum_b E_k E_{|M|=k} [n/k sum_{i in M} -log p(x_i | x_b without M, x_<b)], k uniform on 1..n.

    Monte Carlo: `num_samples` masks per block, k stratified over them; the standard error treats samples as
    independent, so it is an upper estimate. numbers: of each document, in the keys of its masks; its place in the list
    unless given. exact=True sums over all masks of blocks of up to 4 tokens
    with weight 1 / (k C(n, k)): no variance.
    """
    check_estimator(config, num_samples, exact)
    if config.block_size is not None and context_length is not None and config.block_size > context_length:
        raise ValueError(f"block_size {config.block_size} exceeds the model's context of {context_length}: use less")
    draws = 2 ** (config.segment_size or 0) - 1 if exact else num_samples
    totals = torch.zeros(len(documents), draws, dtype=torch.float64)
    number_of = range(len(documents)) if numbers is None else numbers
    for windows, x0, layout, loss_mask in batches(documents, context_length, batch_tokens, network.device):
        segment, maskable = segments(layout, config.segment_size), predictable(layout, loss_mask)
        masks = (
            _all_masks(segment, maskable, draws)
            if exact
            else _drawn_masks(segment, maskable, [(number_of[i], start) for i, start in windows], num_samples, seed)
        )
        clean = read_clean(network, config, x0, layout, maskable) if config.attention == "two_stream" else None
        for draw, corruption in enumerate(masks):
            if clean is None:
                losses = token_nll(network, config, x0, layout, corruption)
            else:
                losses = noisy_nll(network, config, clean, x0, corruption)
            values = corruption.weight[corruption.masked].double() * losses
            for (owner, _), value in zip(windows, row_sums(values, corruption.masked), strict=True):
                totals[owner, draw] += value
        if progress is not None:
            progress(len(windows))
    check_finite(totals.sum(1).tolist())
    if exact:
        return [_output(float(t), d, context_length) for t, d in zip(totals.sum(1), documents, strict=True)]
    errors: list[float | None] = [None] * len(documents)
    if num_samples > 1:
        errors = (totals.std(dim=1) / math.sqrt(num_samples)).tolist()
    return [_output(float(t), d, context_length, e) for t, d, e in zip(totals.mean(1), documents, errors, strict=True)]


def check_finite(totals: Sequence[float]) -> None:
    """Raise ValueError for a document whose likelihood is 0, as where it predicts the mask token."""
    for number, total in enumerate(totals, 1):
        if not math.isfinite(total):
            raise ValueError(
                f"document {number} has a likelihood of 0 or none at all: {total} nats; does it hold the mask token? "
                "Take that out, or convert with a mask token of its own"
            )


def check_estimator(config: DiffusionConfig, num_samples: int, exact: bool) -> None:
    """Raise on what `nelbo` cannot do."""
    if exact and (config.segment_size is None or config.segment_size > 4):
        raise ValueError(
            f"exact NELBO enumerates all masks of a block and needs clean context and block_size <= 4, "
            f"got {config.attention} attention with block_size {config.block_size}"
        )
    check_whole("num_samples", num_samples, most=MOST_SAMPLES, why=": each is a forward")


def continuation_nelbo(
    network: Network,
    config: DiffusionConfig,
    texts: Sequence[Tensor],
    num_given: Sequence[int],
    *,
    num_samples: int = 8,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> list[LikelihoodOutput]:
    """The NELBO of each text after its first `num_given` tokens, given those; bytes are not counted."""
    documents = [
        Document(text, torch.zeros_like(text), torch.arange(len(text)) >= given)
        for text, given in zip(texts, num_given, strict=True)
    ]
    return nelbo(network, config, documents, num_samples=num_samples, seed=seed, batch_tokens=batch_tokens)


def _all_masks(segment: Tensor, maskable: Tensor, draws: int) -> Iterator[Corruption]:
    """Mask number m = 1 .. 2^B - 1 of every segment at once: bit i is its i-th maskable token."""
    num_before = maskable.long().cumsum(-1) - maskable.long()  # maskable tokens of the row before each
    first_of_segment = num_before.new_full(num_before.shape, num_before.shape[-1])
    first_of_segment.scatter_reduce_(-1, segment, num_before, "amin")
    ordinal = num_before - first_of_segment.gather(-1, segment)
    n = torch.zeros_like(segment).scatter_add_(-1, segment, maskable.long()).gather(-1, segment)
    for m in range(1, draws + 1):
        k = m.bit_count()
        masked = maskable & ((m >> ordinal) & 1).bool() & (m < 2**n)
        subsets = torch.exp(torch.lgamma(n + 1.0) - math.lgamma(k + 1) - torch.lgamma((n - k).clamp_min(0) + 1.0))
        yield Corruption(masked, torch.where(masked, 1 / (k * subsets.round()), 0.0))


def _drawn_masks(
    segment: Tensor, maskable: Tensor, windows: Sequence[tuple[int, int]], num_samples: int, seed: int
) -> Iterator[Corruption]:
    """`num_samples` masks per segment, t stratified over the samples under a random rotation."""
    length = segment.shape[-1]

    def draws(name: str, *key: int) -> Tensor:
        return uniforms([(name, seed, *window, *key) for window in windows], length)

    rotation = draws("nelbo rotation") * num_samples
    for draw in range(num_samples):
        within = draws("nelbo level", draw)
        t = ((draw + rotation.long()) % num_samples + 1 - within) / num_samples
        noise = draws("nelbo mask", draw)
        yield mask_exact(t.to(segment.device), noise.to(segment.device), segment, maskable)


def batches(
    documents: Sequence[Document], context_length: int | None, batch_tokens: int, device: torch.device
) -> Iterator[tuple[list[tuple[int, int]], Tensor, Layout, Tensor]]:
    """((document, start) of the rows, x0, layout, loss mask), windows of like length together, longest first."""
    windows = [
        ((owner, start), document.ids[start : start + (context_length or len(document.ids))])
        for owner, document in enumerate(documents)
        for start in range(0, len(document.ids), context_length or max(1, len(document.ids)))
    ]
    windows.sort(key=lambda item: -len(item[1]))
    while windows:
        width = len(windows[0][1])
        take = max(1, batch_tokens // max(1, width))
        batch, windows = windows[:take], windows[take:]
        x0 = torch.zeros(len(batch), width, dtype=torch.long)
        document = torch.full_like(x0, PADDING)
        loss_mask = torch.ones_like(x0, dtype=torch.bool)
        for row, ((owner, start), ids) in enumerate(batch):
            x0[row, : len(ids)] = ids
            document[row, : len(ids)] = 0
            of_document = documents[owner].loss_mask
            if of_document is not None:
                loss_mask[row, : len(ids)] = of_document[start : start + len(ids)]
        position = torch.arange(width, device=device).expand(len(batch), width)
        layout = Layout.of(position, document.to(device))
        yield [window for window, _ in batch], x0.to(device), layout, loss_mask.to(device)


def row_sums(values: Tensor, where: Tensor) -> list[float]:
    """Sums of `values` (where.sum(),) over each row of `where`."""
    rows = where.nonzero()[:, 0]
    sums = torch.zeros(where.shape[0], dtype=torch.float64, device=where.device)
    return sums.index_add_(0, rows, values.double()).tolist()


def _output(
    nats: float, document: Document, context_length: int | None, standard_error: float | None = None
) -> LikelihoodOutput:
    predicted = torch.ones_like(document.ids, dtype=torch.bool)
    predicted[:: context_length or max(1, len(document.ids))] = False
    if document.loss_mask is not None:
        predicted &= document.loss_mask
    return LikelihoodOutput(nats, int(predicted.sum()), int(document.num_bytes[predicted].sum()), standard_error)
