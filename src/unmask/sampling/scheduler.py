"""Continuous batching: a row that ends frees its slot of the cache, and the next prompt takes it.

When no prompt is left, the batch shrinks. Rows never wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.core.attention import causal
from unmask.core.decoding import prefill
from unmask.core.network import Network, SlotCacheState
from unmask.core.transfer import to_device
from unmask.sampling.request import Request


class Scheduler:
    """Which row is in which slot of the cache.

    rows: of each slot, -1 for a free one. waiting: rows without a slot yet. past: the cached part of the rows in the
    slots, empty for a row that was just admitted. columns: of the cache, as many as the longest row will need.
    """

    def __init__(self, network: Network, num_rows: int, batch_size: int | None, columns: int) -> None:
        slots = min(num_rows, batch_size or num_rows)
        self.waiting = deque(range(num_rows))
        self.rows: list[int] = [-1] * slots
        self.past = SlotCacheState.empty(network, slots, columns)

    def release(self, slot: int) -> None:
        """Free the slot of a row that has ended."""
        self.rows[slot] = -1

    def admit(self) -> tuple[list[int], Tensor | None]:
        """Put waiting rows into free slots, and drop the slots that stay free.

        Returns the slots of the new rows, and the old numbers (n,) of the slots that were kept, None if all were.
        """
        new = []
        for slot, row in enumerate(self.rows):
            if row < 0 and self.waiting:
                self.rows[slot] = self.waiting.popleft()
                new.append(slot)
        if -1 not in self.rows:
            return new, None
        taken = [slot for slot, row in enumerate(self.rows) if row >= 0]
        self.rows = [self.rows[slot] for slot in taken]
        kept_slots = torch.tensor(taken, dtype=torch.long)
        if taken:
            self.past.keep_slots(kept_slots)
        return [taken.index(slot) for slot in new], kept_slots


class AutoregressiveRows:
    """Rows that grow by verified tokens from left to right: the state of AR and speculative decoding.

    new_tokens: of each row. limits: of each row, in tokens. last: (slots, 1), the newest token of each slot's row,
    which is not cached yet. room: columns of the cache beyond the last wanted token, for drafts.
    """

    def __init__(self, network: Network, prompts: Sequence[Tensor], request: Request, room: int = 0) -> None:
        self.network, self.prompts, self.request = network, prompts, request
        self.new_tokens: list[list[int]] = [[] for _ in prompts]
        self.limits = [request.limit(len(prompt)) for prompt in prompts]
        columns = max(map(self.end, range(len(prompts)))) + room
        self.scheduler = Scheduler(network, len(prompts), request.batch_size, columns)
        self.last = torch.zeros(len(self.scheduler.rows), 1, dtype=torch.long, device=network.device)

    def admit_rows(self) -> tuple[list[int], Tensor | None]:
        """`Scheduler.admit`, with the new rows' prompts prefilled up to their last tokens."""
        new, kept_slots = self.scheduler.admit()
        if kept_slots is not None:
            self.last = self.last[to_device(kept_slots, self.last.device)]
        if new:
            prompts = [self.prompts[self.scheduler.rows[slot]] for slot in new]
            prefill(self.network, causal, self.scheduler.past, new, [prompt[:-1] for prompt in prompts])
            newest = torch.stack([prompt[-1].cpu() for prompt in prompts])
            self.last[to_device(torch.tensor(new), self.last.device), 0] = to_device(newest, self.last.device)
        return new, kept_slots

    def end(self, row: int) -> int:
        """The position after the last wanted token of the row."""
        return len(self.prompts[row]) + self.limits[row]

    def add(self, row: int, tokens: Sequence[int]) -> bool:
        """Add tokens up to the one that ends the row, and pass them to the callback. Returns whether the row ended."""
        new, before = self.new_tokens[row], len(self.new_tokens[row])
        kept = None
        for token in tokens:
            new.append(token)
            kept = self._kept(row, new)
            if kept is not None:
                del new[kept:]
                break
        if self.request.callback is not None and len(new) > before:
            first = len(self.prompts[row])
            self.request.callback(row, list(range(first + before, first + len(new))), new[before:])
        return kept is not None

    def _kept(self, row: int, new: list[int]) -> int | None:
        """How many tokens the row keeps if its newest token ends it, else None."""
        if new[-1] in self.request.end_token_ids:
            return len(new)
        kept = None if self.request.stop is None else self.request.stop(row, new)
        return len(new) if kept is None and len(new) == self.limits[row] else kept

    @property
    def num_prefill_forwards(self) -> Tensor:
        """(rows,) int64: a prompt of one token needs no prefill."""
        return torch.tensor([int(len(prompt) > 1) for prompt in self.prompts])
