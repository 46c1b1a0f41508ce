"""Who decodes now and who waits: rows take seats (slots of a cache) and leave them when they end.

Continuous batching without a scheduler: a row that ends gives its seat to the next prompt, or, when nobody
waits, the batch shrinks. Rows never wait for each other.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from unmask.core.denoiser import Network, Prefix


def check_batch_size(batch_size: int | None) -> None:
    """Raise ValueError for a batch of no rows."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1: it is how many rows decode at a time")


class Seats:
    """rows: the row in each slot. past: what of them is cached; empty for a row that has just sat down.

    columns: the cache's, as many as the longest row will need.
    """

    def __init__(self, network: Network, rows: int, batch_size: int | None, columns: int) -> None:
        check_batch_size(batch_size)
        slots = min(rows, batch_size or rows)
        self.waiting = deque(range(rows))
        self.rows: list[int] = [-1] * slots
        self.past = Prefix.empty(network, slots, columns)

    def leave(self, slot: int) -> None:
        """The row in this slot has ended."""
        self.rows[slot] = -1

    def fill(self) -> tuple[list[int], Tensor | None]:
        """Seat those who wait; the slots that are new, and the old slots that stay where some are given up (n,)."""
        new = []
        for slot, row in enumerate(self.rows):
            if row < 0 and self.waiting:
                self.rows[slot] = self.waiting.popleft()
                new.append(slot)
        if -1 not in self.rows:
            return new, None
        keep = [slot for slot, row in enumerate(self.rows) if row >= 0]
        self.rows = [self.rows[slot] for slot in keep]
        stay = torch.tensor(keep, dtype=torch.long)
        if keep:
            self.past.select(stay)
        return [keep.index(slot) for slot in new], stay
