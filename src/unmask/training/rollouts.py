"""Training text that the model writes itself (`--data self`): continuations of the beginnings of documents.

A drafter has to predict what its base writes, not what the corpus says. At temperature 0 that continuation is a
function of the prefix, so even parallel drafts can be right throughout (I-DLM 2604.11035 and dParallel 2509.26488
train on regenerated text). A diffusion student decodes from states of its own trajectories: text that it wrote, with
the tokens that were still masked (OPDLM 2606.06712). Every rollout is made once, in batches, and kept on disk.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.core.batch import Batch
from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import Key, integer
from unmask.data.corpus import Corpus, Document
from unmask.data.packing import Packer, PackState
from unmask.evaluation.held_out import Spread, alone
from unmask.resolve import Resolved
from unmask.sampling import Confidence, Request, sample_autoregressive, sample_blocks
from unmask.training import ranks
from unmask.training.batches import TrainingData

LONGEST_PROMPT = 32
_BATCH = 64
"""Documents that are written at a time."""


def roll_out(
    network: Network,
    prompts: Corpus,
    folder: Path,
    *,
    author: str,
    num_tokens: int,
    max_length: int,
    temperature: float,
    end_token_ids: Sequence[int] = (),
    seed: int = 0,
    first: int = 0,
    student: DiffusionConfig | None = None,
    num_steps: int | None = None,
    learn_end: bool = True,
    progress: Callable[[int], None] | None = None,
    spread: Spread = alone,
) -> Corpus:
    """Documents of up to `max_length` tokens, about `num_tokens` in all, kept in `folder`.

    Document i continues the first 1 to 32 tokens (drawn from the seed) of document first + i of `prompts`, modulo their
    number. author: fingerprint of the model; the file's name is a hash of everything that decides its content.
    student: decode blocks by diffusion with this config; learnt are then the tokens that were still masked at one step
    of each block, drawn among the steps that it took. num_steps: the student's forwards of a block, in which it commits
    its surest tokens; None leaves the pace to `Threshold()`. learn_end: False keeps the end token that a text ends with
    in the text and out of the loss (OPDLM). progress: called with the number of tokens of each batch.
    spread: who writes which of the next batches.
    """
    decisive = repr((author, prompts.fingerprint, num_tokens, max_length, temperature, tuple(end_token_ids), seed))
    if student is not None or first:
        decisive += repr((first, student))
    if num_steps is not None or not learn_end:
        decisive += repr((num_steps, learn_end))
    file = folder / f"rollouts-{hashlib.sha256(decisive.encode()).hexdigest()[:16]}.npz"
    if ranks.everywhere(file.is_file()):
        return _load(file)
    key: Key = ("rollout", seed, first)

    def write(number: int) -> list[Document]:
        """The batch that begins with document `number`."""
        request = Request(
            max_new_tokens=max_length, context_length=max_length, temperature=temperature,
            seed=integer(2**31, (*key, "text", number)), end_token_ids=end_token_ids,
        )  # fmt: skip
        beginnings = [_beginning(prompts, first, number + i, max_length, key) for i in range(_BATCH)]
        if student is None:
            batch = _continued(network, beginnings, request)
        else:
            batch = _denoised(network, student, beginnings, request, num_steps, (*key, "step", number))
        return batch if learn_end else [_without_end(document, end_token_ids) for document in batch]

    documents = _written(write, num_tokens, spread, progress)
    with ranks.main_alone() as is_main:
        if is_main:
            _save(file, Corpus.of(documents, fingerprint=""))
    return _load(file)


def _written(
    write: Callable[[int], list[Document]], num_tokens: int, spread: Spread, progress: Callable[[int], None] | None
) -> list[Document]:
    """Batches of documents until there are `num_tokens`, each rank writing one of the next ones at a time.

    write: (number of its first document) -> a batch. As many documents as one process writes.
    """
    documents: list[Document] = []
    written = 0
    while written < num_tokens:
        first = len(documents)
        starts = [first + rank * _BATCH for rank in range(ranks.number())]

        def batches(items: Sequence[int], starts: Sequence[int] = starts) -> list[list[Document]]:
            return [write(starts[item]) for item in items]

        for batch in spread(len(starts), batches):
            if written < num_tokens:
                documents += batch
                size = sum(len(document.ids) for document in batch)
                written += size
                if progress is not None:
                    progress(size)
    return documents


def rewritten_text(data: TrainingData, settings: Resolved, model: Any, write: Callable[[int], Corpus]) -> TrainingData:
    """`data` with rows of the text `write(step)`, which `model` writes while it learns.

    It is written at step 0 and, with self_every, again at every self_every-th step. A run that resumes between two of
    these steps calls `write` with the earlier one, which must return the same text again.
    """

    def batches(step: int, place: PackState) -> Iterator[tuple[Batch, PackState]]:
        every = settings.self_every
        while True:
            first = 0 if every is None else step - step % every
            model.eval()
            text = write(first)
            model.train()
            state = PackState() if step == first else place
            packer = Packer(text, settings.max_length, seed=settings.seed, state=state)
            num_steps = None if every is None else first + every - step
            for batch in itertools.islice(packer.batches(settings.batch_size), num_steps):
                yield batch
                step += 1

    return replace(data, batches=batches)


def _beginning(prompts: Corpus, first: int, number: int, max_length: int, key: Key) -> Tensor:
    """The tokens that document `number` starts with, (length,) int64."""
    length = 1 + integer(min(LONGEST_PROMPT, max_length - 1), (*key, "length", number))
    return torch.from_numpy(prompts[(first + number) % len(prompts)][:length].astype("int64"))


def _continued(network: Network, beginnings: list[Tensor], request: Request) -> list[Document]:
    """Documents as the AR model writes them, learnt whole."""
    new_tokens = sample_autoregressive(network, beginnings, request).new_tokens
    return [Document(_joined(*pair)) for pair in zip(beginnings, new_tokens, strict=True)]


def _denoised(
    network: Network,
    student: DiffusionConfig,
    beginnings: list[Tensor],
    request: Request,
    num_steps: int | None,
    key: Key,
) -> list[Document]:
    """Documents as the student writes them; learnt is what was still masked at one step of each block."""
    assert student.block_size is not None
    steps = _CommitSteps(len(beginnings), request.max_new_tokens)
    new_tokens = sample_blocks(
        network, student, beginnings, replace(request, callback=steps), max_denoising_steps=num_steps,
        select=None if num_steps is None else Confidence(),
    ).new_tokens  # fmt: skip
    documents = []
    for row, pair in enumerate(zip(beginnings, new_tokens, strict=True)):
        ids = _joined(*pair)
        documents.append(Document(ids, steps.still_masked(row, len(ids), student.block_size, key)))
    return documents


def _without_end(document: Document, end_token_ids: Sequence[int]) -> Document:
    """The document with the end token that it ends with out of its loss."""
    if document.ids[-1] not in end_token_ids:
        return document
    learnt = np.ones(len(document.ids), dtype=bool) if document.loss_mask is None else document.loss_mask.copy()
    learnt[-1] = False
    return document._replace(loss_mask=learnt)


def _joined(beginning: Tensor, new_tokens: Sequence[int]) -> np.ndarray:
    return np.concatenate([beginning.numpy(), new_tokens]).astype(np.int32)


class _CommitSteps:
    """A sampler's callback that records at which step of its row each position was committed.

    of: (rows, length) int64, from 1; 0 on prompts and on what was never committed.
    """

    def __init__(self, rows: int, length: int) -> None:
        self._steps = [0] * rows
        self.of = np.zeros((rows, length), dtype=np.int64)

    def __call__(self, row: int, positions: list[int], _tokens: list[int]) -> None:
        self._steps[row] += 1
        self.of[row, positions] = self._steps[row]

    def still_masked(self, row: int, length: int, block_size: int, key: Key) -> np.ndarray:
        """True on the positions of a row that were masked before one step of their block, drawn among its steps."""
        committed = self.of[row, :length]
        masked = np.zeros(length, dtype=bool)
        for start in range(0, length, block_size):
            block = slice(start, start + block_size)
            steps = np.unique(committed[block][committed[block] > 0])
            if len(steps):
                masked[block] = committed[block] >= steps[integer(len(steps), (*key, row, start))]
        return masked


def _save(file: Path, corpus: Corpus) -> None:
    """Write a corpus whole or not at all."""
    arrays: dict[str, Any] = {"tokens": corpus.tokens, "offsets": corpus.offsets}
    if corpus.loss_mask is not None:
        arrays["given"] = ~corpus.loss_mask
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(file)


def _load(file: Path) -> Corpus:
    """A corpus from its file, under a digest of its content."""
    with np.load(file) as saved:
        tokens, offsets, given = saved["tokens"], saved["offsets"], saved.get("given")
    content = tokens.tobytes() + offsets.tobytes() + (b"" if given is None else given.tobytes())
    fingerprint = hashlib.sha256(content).hexdigest()[:16]
    return Corpus(tokens, offsets, fingerprint, None if given is None else ~given)
