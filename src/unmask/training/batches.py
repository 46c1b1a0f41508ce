"""The batch of each optimiser step, and how many tokens and steps a run has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unmask.core.batch import Batch
from unmask.data.corpus import Corpus
from unmask.data.mixture import Mixture
from unmask.data.packing import Packer, PackState
from unmask.data.streams import RecordStream
from unmask.resolve import Resolved
from unmask.training.ranks import of_main_process


@dataclass(frozen=True)
class TrainingData:
    """What a run reads.

    batches: (step, place in the data) -> the batch of that step and of each one after it, with the place after each
    batch. A batch holds the rows of all ranks. num_tokens: the run ends once it has seen them. num_steps: about as many
    steps as that takes, for schedules. tokens_per_row: the mean, where it is known.
    """

    batches: Callable[[int, PackState], Iterator[tuple[Batch, PackState]]]
    num_tokens: int
    num_steps: int
    tokens_per_row: float | None = None


def packed_documents(
    settings: Resolved, source: Corpus | Mixture | RecordStream, *, to_write: int | None = None
) -> TrainingData:
    """Rows packed from the documents of `source`, until max_tokens are seen, or one pass without max_tokens.

    The main process reads a stream for all.

    to_write: tokens of that pass where the rows will be of text that the model has yet to write, see `rewritten_text`.
    """

    def batches(_step: int, place: PackState) -> Iterator[tuple[Batch, PackState]]:
        epochs = None if settings.max_tokens is not None else 1
        packer = Packer(source, settings.max_length, seed=settings.seed, epochs=epochs, state=place)
        made = packer.batches(settings.batch_size)
        return of_main_process(made) if isinstance(source, RecordStream) else made

    num_tokens = to_write if settings.max_tokens is None else settings.max_tokens
    if num_tokens is None:
        if not isinstance(source, Corpus | Mixture):
            raise ValueError("a streamed data set has no known end: give --max-tokens")
        num_tokens = source.num_tokens
    per_row: float | None = None
    if isinstance(source, Corpus | Mixture) and to_write is None:
        per_row = source.tokens_per_row(settings.max_length)
    num_steps = math.ceil(num_tokens / ((per_row or settings.max_length) * settings.batch_size))
    return TrainingData(batches, num_tokens, num_steps, per_row)
