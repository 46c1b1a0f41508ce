"""Self-speculation: the tokens that a diffusion pass drafts are verified by the same weights, on the same cache.

A pass of a row, with `last` the newest verified token, not cached yet, and drafts for the positions after it:
  [last, drafts]  causally -> the AR distribution after each: how many drafts are accepted, and the token after them
  [masks]         behind some of these tokens -> drafts of what comes after the next token
A cycle of two forwards alternates: masks behind `last` alone, then nothing but verification. (With `adapt_anchor` the
first of them is a pass of noisy rows alone, `last` among them, which verifies nothing.) A cycle of one forward has
masks behind `last` and behind every draft, so that the next drafts are there whichever is the last one accepted. The
output has the distribution of AR decoding for any drafter, which decides only how many tokens a cycle gains: an
untrained drafter is slow, never wrong.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.decoding import draft_adapted, spare_masks, speculate
from unmask.core.network import DiffusionConfig, Network
from unmask.core.transfer import to_device
from unmask.sampling.acceptance import Acceptance, Coupled, Noise
from unmask.sampling.constraint import restrict
from unmask.sampling.cycles import Cycle, Pace
from unmask.sampling.request import Asked, Request, SampledTokens
from unmask.sampling.scheduler import AutoregressiveRows, decode_all
from unmask.sampling.tokens import truncate_by_row


@torch.inference_mode()
def sample_speculative(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    request: Request,
    *,
    pace: Pace | None = None,
    acceptance: Acceptance | None = None,
) -> SampledTokens:
    """Continue ragged `prompts` (each at least one token) with AR decoding's own output.

    pace: which cycles; by default those of two forwards that draft a block. acceptance: `Coupled()` by default; at
    temperature 0 all rules are the greedy one.
    """
    if pace is None:
        assert config.block_size is not None
        pace = Pace(Cycle(2, config.block_size))
    state = DraftedRows(network, config, request, len(prompts), pace, acceptance or Coupled())
    for row, prompt in enumerate(prompts):
        state.put(row, prompt)
    return decode_all(state, len(prompts), request.batch_size)


class _Drafts(NamedTuple):
    """Of some slots, on the device. tokens: (slots, k). logits: (slots, k, vocabulary) of the distributions that they
    were drawn from. noise: of the same shape, what they were drawn with, None at temperature 0.
    """

    tokens: Tensor
    logits: Tensor
    noise: Tensor | None

    def of_slots(self, slots: Tensor) -> _Drafts:
        noise = None if self.noise is None else self.noise[slots]
        return _Drafts(self.tokens[slots], self.logits[slots], noise)

    def first(self, count: int) -> _Drafts:
        """The first drafts of every slot."""
        noise = None if self.noise is None else self.noise[:, :count]
        return _Drafts(self.tokens[:, :count], self.logits[:, :count], noise)


class DraftedRows(AutoregressiveRows):
    """Rows that grow by verified drafts; a cycle is one or two calls of `advance`, then `retire`.

    drafts: of all slots, for the positions after `last`; counts: how many of them are a slot's. lengths: of each slot,
    the longest draft that it makes. gained: tokens of each slot in this cycle. gains: those of each row's cycles.
    num_inputs: of each row, see `SampledTokens`. allowed_behind: of a row with a constraint and drafts, what is allowed
    behind its newest token, and behind each draft.
    """

    def __init__(
        self,
        network: Network,
        config: DiffusionConfig,
        request: Asked,
        num_rows: int,
        pace: Pace,
        acceptance: Acceptance,
    ) -> None:
        super().__init__(network, request, num_rows, room=pace.longest * (pace.longest + 1))
        self.config, self.pace, self.acceptance = config, pace, acceptance
        self.drafts: _Drafts | None = None
        self.gains: list[list[int]] = [[] for _ in range(num_rows)]
        self.allowed_behind: dict[int, list[Tensor | None]] = {}
        self.num_forwards, self.num_inputs = torch.zeros(2, num_rows, dtype=torch.long)

    def put(self, row: int, prompt: Tensor) -> None:
        super().put(row, prompt)
        self.gains[row] = []
        self.allowed_behind.pop(row, None)
        self.num_forwards[row] = self.num_inputs[row] = 0

    def open_slots(self, most: int) -> None:
        super().open_slots(most)
        slots = len(self.scheduler.rows)
        self.counts, self.gained, self.lengths = [0] * slots, [0] * slots, [self.pace.first_length] * slots

    def step(self) -> bool:
        """One cycle of all rows in slots; False when no row is left."""
        if not self.admit():
            return False
        cycle = self.pace.choose(len(self.scheduler.rows))
        if self.config.adapt_anchor:
            self.draft(cycle.length)
        else:
            self.advance(cycle.length)
        if cycle.forwards == 2 or self.config.adapt_anchor:
            self.advance(1)
        self.retire()
        return True

    def admit(self) -> bool:
        """Prefill waiting rows into free slots; False when no row is left."""
        new, kept_slots = self.admit_rows()
        if kept_slots is not None:
            kept = kept_slots.tolist()
            self.counts, self.lengths = [self.counts[slot] for slot in kept], [self.lengths[slot] for slot in kept]
            if self.drafts is not None:
                self.drafts = self.drafts.of_slots(to_device(kept_slots, self.network.device))
        for slot in new:
            self.counts[slot], self.lengths[slot] = 0, self.pace.first_length
        if new and self.drafts is not None and self.drafts.noise is not None:  # drafts of rows that have left
            rows = self._rows(new)
            start, count = self.scheduler.past.lengths[new, None] + 1, self.drafts.tokens.shape[1]
            noise = Noise(self.request.seed, rows, start + torch.arange(count))
            at = to_device(torch.tensor(new), self.network.device)
            self.drafts.noise[at] = noise.tokens(self.drafts.noise.shape[-1], self.network.device)
        self.gained = [0] * len(self.scheduler.rows)
        for slot in new:  # what a constraint forces from the start
            self.gained[slot] = len(self.new_tokens[self.scheduler.rows[slot]])
        return bool(self.scheduler.rows)

    def draft(self, length: int) -> None:
        """One forward of adapted rows alone, at the beginning of a cycle: drafts up to this length, `last` included."""
        slots = range(len(self.scheduler.rows))
        wanted = torch.tensor(self.lengths).clamp_max(length) - 1
        if not int(wanted.max()):
            return
        rows, past, began = self._rows(list(slots)), self.scheduler.past, time.perf_counter()
        backlog, known = self.take_backlog()
        start = past.lengths + known + 1
        past.set_columns(int((start + wanted).max()) + 1)
        q = draft_adapted(self.network, self.config, past, self.last, Layout.of(start[:, None] - 1), wanted,
                          end=self.request.context_length, backlog=backlog)  # fmt: skip
        past.lengths += known
        self.counts = wanted.tolist()
        self.drafts = self._draw(q, list(slots), rows, start)
        self.num_forwards[rows] += 1
        self.num_inputs[rows] += wanted + spare_masks(self.config) + known
        inputs = len(rows) * int(wanted.max() + spare_masks(self.config)) + int(known.sum())
        self.pace.learn_cost(inputs, True, time.perf_counter() - began)

    def advance(self, length: int) -> None:
        """One forward of the rows that go on: verify their drafts, and draft up to this length, the AR token first.

        A row that ends gives up its slot, which stays free until `admit`.
        """
        slots = [slot for slot, row in enumerate(self.scheduler.rows) if row >= 0]
        if not slots:
            return
        backlog, known = self.take_backlog()
        rows, past, drafts, last, known = (
            self._rows(slots), self.scheduler.past, self.drafts, self.last, known[slots]
        )  # fmt: skip
        if len(slots) < len(self.scheduler.rows):
            some = to_device(torch.tensor(slots), self.network.device)
            past, drafts, last = past.for_rows(slots), drafts and drafts.of_slots(some), last[some]
        start = past.lengths[slots] + known + 1  # the first unverified position
        # The last wanted token needs no verifying: the one before it gives it.
        rest = torch.tensor([self.end(row) for row in rows.tolist()]) - start - 1
        counts = torch.tensor(self.counts)[slots].minimum(rest)
        drafts = drafts and drafts.first(int(counts.max()))
        wanted = torch.tensor(self.lengths)[slots].clamp_max(length) - 1
        began, width = time.perf_counter(), int(counts.max())
        tokens = last if drafts is None else torch.cat([last, drafts.tokens], dim=1)
        position = start[:, None] + torch.arange(width + 1)  # of what the pass verifies or adds
        real = torch.arange(width + 1) <= counts[:, None]
        layout = Layout.of(torch.where(real, position - 1, start[:, None] - 1), torch.where(real, 0, PADDING))
        past.set_columns(int((start + counts).max()) + (int(wanted.max()) + 1 if width == 0 else 0))
        passed = speculate(
            self.network, self.config, past, tokens, layout, wanted, end=self.request.context_length, backlog=backlog
        )
        accepted, next_token = self._accept(drafts, passed.ar_logits, real[:, 1:], rows, position)
        decided = torch.cat([accepted[:, None], next_token[:, None], tokens[:, 1:]], dim=1).cpu()
        past.lengths[slots] += decided[:, 0] + 1 + known
        self.last[to_device(torch.tensor(slots), self.last.device)] = next_token[:, None]
        if self.request.observer is not None:
            for row, of_row, n in zip(rows.tolist(), passed.ar_logits, decided[:, 0].tolist(), strict=True):
                self.request.observer(row, of_row[: n + 1])
        self._record(slots, wanted, decided)
        self.drafts = None
        if int(wanted.max()):
            self.drafts = self._draw(passed.drafts(decided[:, 0]), slots, rows, start + decided[:, 0] + 1)
        inputs = (counts + 1) * (1 + (wanted + spare_masks(self.config)) * (wanted > 0)) + known
        self.num_inputs[rows] += inputs
        self.pace.learn_cost(len(slots) * int(inputs.max()), bool(wanted.any()), time.perf_counter() - began)
        self.pace.learn_drafts(counts.tolist(), decided[:, 0].tolist())

    def _accept(
        self, drafts: _Drafts | None, p: Tensor, drafted: Tensor, rows: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The acceptance rule; p: AR logits (slots, k + 1, vocabulary), from those of the first draft on."""
        count, noise = position.shape[1] - 1, None
        p = restrict(p.flatten(0, 1), self._allowed_behind(rows.tolist(), count)).view(p.shape)
        tokens, q = (p.new_zeros(len(p), 0).long(), p[:, :0]) if drafts is None else (drafts.tokens, drafts.logits)
        if self._samples(rows):
            p = self._truncate(p, rows)
            noise = Noise(self.request.seed, rows, position, None if drafts is None else drafts.noise)
        assert tokens.shape[1] == count
        return self.acceptance(tokens, q, p, to_device(drafted, self.network.device), noise)

    def _draw(self, q: Tensor, slots: list[int], rows: Tensor, start: Tensor) -> _Drafts:
        """Drafts from their logits (slots, k, vocabulary), for the positions from `start` on."""
        if self.states:
            return self._draw_allowed(q, slots, rows, start)
        noise = None
        if self._samples(rows):
            q = self._truncate(q, rows)
            position = start[:, None] + torch.arange(q.shape[1])
            noise = Noise(self.request.seed, rows, position).tokens(q.shape[-1], q.device)
        return _Drafts((q if noise is None else q + noise).argmax(-1), q, noise)

    def _draw_allowed(self, q: Tensor, slots: list[int], rows: Tensor, start: Tensor) -> _Drafts:
        """`_draw` where constraints hold: each draft is one of what is allowed behind those before it.

        Those for positions of forced tokens are left out. Sets how many drafts each slot has, up to an end token.
        """
        k, device = q.shape[1], q.device
        skipped = torch.tensor([len(self.backlog.get(row, ())) for row in rows.tolist()])
        index = (torch.arange(k) + skipped[:, None]).clamp_max(k - 1)
        q = q.gather(1, to_device(index, device)[..., None].expand(q.shape))
        q = q.double() if self._samples(rows) else q
        counts = (torch.tensor(self.counts)[slots] - skipped).clamp_min(0).tolist()
        states = [self.states.get(row) for row in rows.tolist()]
        masks = [[None if state is None else state.allowed()] for state in states]
        noise = None
        if self._samples(rows):
            position = (start + skipped)[:, None] + torch.arange(k)
            noise = Noise(self.request.seed, rows, position).tokens(q.shape[-1], device)
        drawn, made = [], [0] * len(rows)
        for j in range(k):
            q[:, j] = restrict(q[:, j], [mask[-1] for mask in masks])
            if noise is not None:
                q[:, j] = self._truncate(q[:, j], rows)
            drawn.append((q[:, j] if noise is None else q[:, j] + noise[:, j]).argmax(-1))
            for i, token in enumerate(drawn[-1].tolist()):
                state = states[i]
                if made[i] < j or j >= counts[i] or (state is not None and state.ended):
                    continue
                made[i] += 1
                if state is not None:
                    state.accept(token)
                    masks[i].append(None if state.ended else state.allowed())
        for slot, row, state, n, allowed in zip(slots, rows.tolist(), states, made, masks, strict=True):
            self.counts[slot] = n
            if state is not None:
                state.undo(n)
                self.allowed_behind[row] = allowed
        return _Drafts(torch.stack(drawn, dim=1), q, noise)

    def _record(self, slots: list[int], wanted: Tensor, decided: Tensor) -> None:
        """Add the accepted drafts and the token after them to each row; a row that ends gives up its slot."""
        self.num_forwards[self._rows(slots)] += 1
        for slot, drafted, (n, token, *drafts) in zip(slots, wanted.tolist(), decided.tolist(), strict=True):
            row = self.scheduler.rows[slot]
            before = len(self.new_tokens[row])
            ended = self.add(row, [*drafts[:n], token])
            self.gained[slot] += len(self.new_tokens[row]) - before
            self.counts[slot] = drafted
            if ended:
                self.gains[row].append(self.gained[slot])
                self.scheduler.release(slot)

    def retire(self) -> None:
        """Record what each row gained in this cycle, and set its next draft's length."""
        for slot, row in enumerate(self.scheduler.rows):
            if row >= 0:
                self.gains[row].append(self.gained[slot])
                self.lengths[slot] = self.pace.next_length(self.lengths[slot], self.gained[slot])

    def sampled(self, rows: Sequence[int]) -> SampledTokens:
        """The new tokens of rows that have ended."""
        chosen, new_tokens = list(rows), [self.new_tokens[row] for row in rows]
        # A row without cycles was forced from the first token to the last.
        gains = [self.gains[row] or [len(new)] for row, new in zip(chosen, new_tokens, strict=True)]
        widest = max((gain for of_row in gains for gain in of_row), default=0)
        histogram = torch.stack([torch.bincount(torch.tensor(of_row), minlength=widest + 1) for of_row in gains])
        forced = None if self.request.constraint is None else self.num_forced[chosen]
        return SampledTokens(
            new_tokens, self.num_forwards[chosen], self.num_prefill_forwards[chosen], histogram,
            self.num_inputs[chosen], forced,
        )  # fmt: skip

    def _allowed_behind(self, rows: list[int], count: int) -> list[Tensor | None]:
        """What each row's constraint allows behind its newest token and each of `count` drafts, row after row."""
        masks = [self.allowed_behind.pop(row, [self.allowed(row)]) for row in rows]
        return [mask[j] if j < len(mask) else None for mask in masks for j in range(count + 1)]

    def _rows(self, slots: list[int]) -> Tensor:
        """The row in each of these slots."""
        return torch.tensor([self.scheduler.rows[slot] for slot in slots])

    def _samples(self, rows: Tensor) -> bool:
        """Whether any of the rows is drawn and not greedy."""
        return any(self.request.sampling(row).temperature > 0 for row in rows.tolist())

    def _truncate(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Logits of the distributions to draw from, of shape (rows, ..., vocabulary)."""
        flat = logits.flatten(0, -2)
        each = len(flat) // len(rows)
        how = [self.request.sampling(row) for row in rows.tolist() for _ in range(each)]
        return truncate_by_row(flat, how).view(logits.shape)
