"""Documents to packed rows of one length.

A row holds pieces of documents with their document numbers and positions, so that attention can separate them. A text
longer than the rest of a row is cut there, and what follows is a document of its own; a supervised example is never
cut. An iterator continues from (epoch, document, offset) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from unmask.core.attention import PADDING, Layout
from unmask.core.batch import Batch
from unmask.data.corpus import Corpus, Document
from unmask.data.mixture import Mixture
from unmask.data.streams import RecordStream


@dataclass(frozen=True)
class PackState:
    """The place in the data where the next row begins: epoch, number of the document in it, token of the document.

    For a stream they are the number of the record, and the token of all its documents one after another.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0


class Packer:
    """Rows of `max_length` tokens from a corpus or stream, epoch after epoch, resumable at any row.

    The last row of an epoch is filled from the next epoch. After `epochs` epochs the rows end, and the last one is
    padded; so is a row whose rest is too short for the next supervised example.
    """

    def __init__(
        self,
        source: Corpus | Mixture | RecordStream,
        max_length: int,
        *,
        seed: int,
        epochs: int | None = None,
        state: PackState | None = None,
    ) -> None:
        self.source, self.max_length, self.seed, self.epochs = source, max_length, seed, epochs
        self.state = state or PackState()
        self._documents = self._walk(self.state)
        self._rest = Document(np.zeros(0, dtype=np.int64))

    def _walk(self, state: PackState) -> Iterator[tuple[PackState, Document]]:
        """The documents from `state` on, with the place of each."""
        epoch, start, offset = state.epoch, state.document, state.offset
        while self.epochs is None or epoch < self.epochs:
            empty = start == 0
            for number, documents in enumerate(self.source.stream(self.seed, epoch, start), start):
                before = 0  # tokens of the documents of this record that are done
                for document in documents:
                    seen = min(max(0, offset - before), len(document.ids))
                    yield PackState(epoch, number, before + seen), document.after(seen)
                    before += len(document.ids)
                    empty = False
                offset = 0
            if empty:
                raise ValueError("the training data holds no documents")
            epoch, start = epoch + 1, 0

    def batches(self, size: int) -> Iterator[tuple[Batch, PackState]]:
        """Each `batch` from here on, with the state after it."""
        while (batch := self.batch(size)) is not None:
            yield batch, self.state

    def batch(self, size: int) -> Batch | None:
        """The next `size` rows, None at the end of the data.

        The last batch has `size` rows as well, some of padding alone, so that every rank has rows to run.
        """
        ids = np.zeros((size, self.max_length), dtype=np.int64)
        position = np.tile(np.arange(self.max_length), (size, 1))
        document = np.full((size, self.max_length), PADDING, dtype=np.int64)
        learnt = np.ones((size, self.max_length), dtype=bool)
        row = column = number = 0
        while row < size:
            rest, loss_mask = self._rest
            if not len(rest):
                following = next(self._documents, None)
                if following is None:
                    break
                self.state, self._rest = following
                continue
            if loss_mask is not None and 0 < self.max_length - column < len(rest) <= self.max_length:
                row, column, number = row + 1, 0, 0
                continue
            take = min(len(rest), self.max_length - column)
            piece = slice(column, column + take)
            ids[row, piece], position[row, piece], document[row, piece] = rest[:take], np.arange(take), number
            if loss_mask is not None:
                learnt[row, piece] = loss_mask[:take]
            self._rest, column, number = self._rest.after(take), column + take, number + 1
            self.state = replace(self.state, offset=self.state.offset + take)
            if column == self.max_length:
                row, column, number = row + 1, 0, 0
        if row + column == 0:
            return None
        self.source.forget()
        layout = Layout.of(torch.from_numpy(position), torch.from_numpy(document))
        return Batch(torch.from_numpy(ids), layout, None if learnt.all() else torch.from_numpy(learnt))
