"""Continuous batching: a row that ends frees its slot of the cache, and the next prompt takes it.

When no prompt is left, the batch shrinks. Rows never wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from unmask.core.attention import causal
from unmask.core.decoding import prefill
from unmask.core.network import Network, SlotCacheState
from unmask.core.transfer import to_device
from unmask.sampling.constraint import ConstraintState, constraint_of, forced_token
from unmask.sampling.request import Asked, SampledTokens


class Scheduler:
    """Which row is in which slot of the cache.

    rows: of each slot, -1 for a free one. waiting: rows without a slot yet. most: rows that decode at a time. past: the
    cached part of the rows in the slots, empty for a row that was just admitted. columns: of the cache, as many as the
    longest row will need.
    """

    def __init__(self, network: Network, waiting: deque[int], most: int, columns: int) -> None:
        self.waiting, self.most = waiting, most
        self.rows: list[int] = [-1] * min(len(waiting), most)
        self.past = SlotCacheState.empty(network, len(self.rows), columns)

    def release(self, slot: int) -> None:
        """Free the slot of a row that has ended."""
        self.rows[slot] = -1

    @property
    def room(self) -> int:
        """How many of the waiting rows `admit` has a slot for."""
        return self.rows.count(-1) + (self.most - len(self.rows) if self.rows else 0)

    def drop(self, row: int) -> int | None:
        """Take a row out; its slot, None if it has none."""
        if row in self.waiting:
            self.waiting.remove(row)
        if row not in self.rows:
            return None
        slot = self.rows.index(row)
        self.release(slot)
        return slot

    def admit(self) -> tuple[list[int], Tensor | None]:
        """Put waiting rows into free slots, and drop the slots that stay free; rows that came later get new ones.

        Returns the slots of the new rows, and the old numbers (n,) of the slots that there are now, None if nothing
        changed. A slot that was added has the number of another one, and holds nothing yet.
        """
        new, added = [], min(len(self.waiting) - self.rows.count(-1), self.most - len(self.rows))
        grown = None
        if added > 0 and self.rows:
            grown = torch.tensor([*range(len(self.rows)), *[0] * added])
            self.rows += [-1] * added
            self.past.keep_slots(grown)
        for slot, row in enumerate(self.rows):
            if row < 0 and self.waiting:
                self.rows[slot] = self.waiting.popleft()
                new.append(slot)
        if -1 not in self.rows:
            return new, grown
        taken = [slot for slot, row in enumerate(self.rows) if row >= 0]
        self.rows = [self.rows[slot] for slot in taken]
        kept_slots = torch.tensor(taken, dtype=torch.long)
        if taken:
            self.past.keep_slots(kept_slots)
        return [taken.index(slot) for slot in new], kept_slots


class Rows(Protocol):
    """Rows that wait for slots, decode and end."""

    def open_slots(self, most: int) -> None:
        """Begin; most: rows that decode at a time."""

    def step(self) -> bool:
        """One forward, or a cycle of them; False when no row is left."""

    def sampled(self, rows: Sequence[int]) -> SampledTokens:
        """What these rows have become."""


def decode_all(rows: Rows, num_rows: int, batch_size: int | None) -> SampledTokens:
    """Decode the rows 0 .. num_rows - 1, which all wait, to their ends; batch_size: how many at a time, else all."""
    rows.open_slots(batch_size or num_rows)
    while rows.step():
        pass
    return rows.sampled(range(num_rows))


class AutoregressiveRows:
    """Rows that grow by verified tokens from left to right: the state of AR and speculative decoding.

    new_tokens: of each row. limits: of each row, in tokens. last: (slots, 1), the newest token of each slot's row,
    which is not cached yet. room: columns of the cache beyond the last wanted token, for drafts. states: of the rows
    with a constraint. backlog: of a row, tokens before its newest one that are not cached either, since they needed no
    forward; num_forced: how many of its tokens needed none.
    """

    def __init__(self, network: Network, request: Asked, num_rows: int, room: int = 0) -> None:
        self.network, self.request, self.spare_columns = network, request, room
        self.prompts: list[Tensor] = [torch.zeros(0, dtype=torch.long)] * num_rows
        self.new_tokens: list[list[int]] = [[] for _ in range(num_rows)]
        self.limits = [0] * num_rows
        self.waiting: deque[int] = deque()
        self.states: dict[int, ConstraintState] = {}
        self.backlog: dict[int, list[int]] = {}
        self.num_forced, self.num_prefill_forwards = torch.zeros(2, num_rows, dtype=torch.long)

    def put(self, row: int, prompt: Tensor) -> None:
        """Give a row, which has none or has ended, a new text, to be continued when a slot is free."""
        self.prompts[row], self.new_tokens[row] = prompt, []
        self.limits[row] = self.request.limit(len(prompt), row)
        self.num_forced[row] = self.num_prefill_forwards[row] = 0
        self.waiting.append(row)

    def open_slots(self, most: int) -> None:
        """Begin with a slot for each row that waits; most: rows that decode at a time."""
        columns = max(map(self.end, range(len(self.prompts)))) + self.spare_columns
        self.scheduler = Scheduler(self.network, self.waiting, most, columns)
        self.last = torch.zeros(len(self.scheduler.rows), 1, dtype=torch.long, device=self.network.device)

    def drop(self, row: int) -> None:
        """End a row that is not wanted any more."""
        self.scheduler.drop(row)
        self.states.pop(row, None)
        self.backlog.pop(row, None)

    def admit_rows(self) -> tuple[list[int], Tensor | None]:
        """`Scheduler.admit`, with the new rows' prompts prefilled up to their last tokens.

        Tokens that a constraint forces from the start are prefilled with the prompt.
        """
        self._begin_rows()
        new, kept_slots = self.scheduler.admit()
        if kept_slots is not None:
            self.last = self.last[to_device(kept_slots, self.last.device)]
        if new:
            rows = [self.scheduler.rows[slot] for slot in new]
            prompts = [torch.cat([self.prompts[row].cpu(), torch.tensor(self.new_tokens[row]).long()]) for row in rows]
            self.num_prefill_forwards[rows] = torch.tensor([int(len(prompt) > 1) for prompt in prompts])
            prefill(self.network, causal, self.scheduler.past, new, [prompt[:-1] for prompt in prompts])
            newest = torch.stack([prompt[-1] for prompt in prompts])
            self.last[to_device(torch.tensor(new), self.last.device), 0] = to_device(newest, self.last.device)
        return new, kept_slots

    def end(self, row: int) -> int:
        """The position after the last wanted token of the row."""
        return len(self.prompts[row]) + self.limits[row]

    def add(self, row: int, tokens: Sequence[int]) -> bool:
        """Add tokens, and those that a constraint forces behind them, up to the one that ends the row, and pass them to
        the callback. Returns whether the row ended."""
        new, before = self.new_tokens[row], len(self.new_tokens[row])
        kept = None
        for token in self._with_forced(row, tokens):
            new.append(token)
            kept = self._kept(row, new)
            if kept is not None:
                del new[kept:]
                self.states.pop(row, None)
                break
        forced = max(0, len(new) - before - len(tokens))
        self.num_forced[row] += forced
        if forced and tokens and kept is None:
            self.backlog[row] = new[-forced - 1 : -1]
        if self.request.callback is not None and len(new) > before:
            first = len(self.prompts[row])
            self.request.callback(row, list(range(first + before, first + len(new))), new[before:])
        return kept is not None

    def _kept(self, row: int, new: list[int]) -> int | None:
        """How many tokens the row keeps if its newest token ends it, else None."""
        if new[-1] in self.request.ends(row) or (row in self.states and self.states[row].ended):
            return len(new)
        kept = None if self.request.stop is None else self.request.stop(row, new)
        return len(new) if kept is None and len(new) == self.limits[row] else kept

    def _with_forced(self, row: int, tokens: Sequence[int]) -> Iterator[int]:
        """Tokens, and those that the row's constraint forces behind them; each is accepted when it is asked for."""
        state = self.states.get(row)
        if state is None:
            yield from tokens
            return
        for token in tokens:
            state.accept(token)
            yield token
        while (forced := forced_token(state)) is not None:
            state.accept(forced)
            yield forced

    def allowed(self, row: int) -> Tensor | None:
        """(vocabulary,) bool: what the row's constraint allows next; None without one."""
        return self.states[row].allowed() if row in self.states else None

    def _begin_rows(self) -> None:
        """Begin the constraints of the rows that are admitted next; rows that end by forced tokens need no slot."""
        if self.request.constraint is None:
            return
        waiting, begun = self.scheduler.waiting, list[int]()
        while waiting and len(begun) < self.scheduler.room:
            row = waiting.popleft()
            constraint = constraint_of(self.request.constraint, row)
            if constraint is not None:
                self.states[row] = constraint.begin()
            if constraint is None or not self.add(row, []):
                begun.append(row)
        waiting.extendleft(reversed(begun))

    def take_backlog(self) -> tuple[dict[int, list[int]], Tensor]:
        """The backlog of each slot that has one, which the next forward writes, and how many tokens of every slot.

        `last` becomes the newest token of these slots.
        """
        backlog = {}
        for slot, row in enumerate(self.scheduler.rows):
            if row in self.backlog:
                backlog[slot] = self.backlog.pop(row)
                self.last[slot, 0] = self.new_tokens[row][-1]
        return backlog, torch.tensor([len(backlog.get(slot, ())) for slot in range(len(self.scheduler.rows))])
