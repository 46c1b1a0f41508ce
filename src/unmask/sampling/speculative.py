"""Self-speculation: draft a block in one diffusion forward, verify it in one causal forward, same weights and cache.

A cycle of a row, with `last` the newest verified token, not cached yet:
  draft    [last | k masks] -> the AR distribution of the next position (exact: `last` is an ordinary causal row) and
           a draft distribution for each masked position; the keys of `last` stay cached
  verify   the k drafts, causally -> the AR distribution after each; the keys of the accepted drafts stay cached
The row gains the accepted drafts and one token more. The output has the distribution of AR decoding for any drafter,
which decides only how many tokens a cycle gains: an untrained drafter is slow, never wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.decoding import draft, verify
from unmask.core.network import DiffusionConfig, Network
from unmask.core.transfer import to_device
from unmask.sampling.acceptance import Acceptance, Coupled, Noise
from unmask.sampling.request import Request, SampledTokens
from unmask.sampling.scheduler import AutoregressiveRows
from unmask.sampling.tokens import truncate

# --- draft lengths


def adapted_length(length: int, gained: int, longest: int) -> int:
    """Next cycle's draft length: one more than the last cycle gained, or twice the last one if nothing was refused."""
    return min(longest, 2 * length if gained > length else max(2, gained + 1))


# --- the sampler


@torch.inference_mode()
def sample_speculative(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    request: Request,
    *,
    draft_length: int | None = None,
    adaptive: bool = False,
    acceptance: Acceptance | None = None,
    anchor: bool = True,
) -> SampledTokens:
    """Continue ragged `prompts` (each at least one token) with AR decoding's own output.

    draft_length: masks per draft, the block size by default; with `adaptive` it is the longest, and each row's drafts
    follow `adapted_length`. acceptance: `Coupled()` by default; at temperature 0 all rules are the greedy one.
    anchor: take the first token of a cycle from the AR row of the draft forward instead of the drafter, so that a
    cycle gains at least two tokens; off only to measure that.
    """
    length = config.block_size if draft_length is None else draft_length
    assert length is not None
    state = _Speculation(network, config, prompts, request, length, adaptive, acceptance or Coupled())
    while state.admit():
        cycle = state.draft(anchor)
        if anchor:
            state.take_anchors(cycle)
        state.verify(cycle)
        state.retire(cycle)
    return state.sampled()


class _Drafts(NamedTuple):
    """Of some slots, on the device. tokens: (slots, k) the drafts. logits: (slots, k, vocabulary) of the distributions
    that they were drawn from. noise: of the same shape, what they were drawn with, None at temperature 0. ar_logits:
    (slots, vocabulary) of the first position.
    """

    tokens: Tensor
    logits: Tensor
    noise: Tensor | None
    ar_logits: Tensor

    def of_slots(self, slots: Tensor) -> _Drafts:
        noise = None if self.noise is None else self.noise[slots]
        return _Drafts(self.tokens[slots], self.logits[slots], noise, self.ar_logits[slots])


@dataclass
class _Cycle:
    """One draft and its verification, of all slots, on the host.

    lengths: drafts of each slot. position, tokens: of the drafts, (slots, longest) and a list for each slot. gained:
    new tokens of each slot in this cycle. ended: whether the row of each slot has ended.
    """

    lengths: list[int]
    position: Tensor
    tokens: list[list[int]]
    drafts: _Drafts
    gained: list[int]
    ended: list[bool]


class _Speculation(AutoregressiveRows):
    """Rows that grow by verified drafts; a cycle is one call of each method, in this order.

    starts: of each slot, its row's first unverified position. lengths: of each slot, that of its next draft.
    """

    def __init__(
        self,
        network: Network,
        config: DiffusionConfig,
        prompts: Sequence[Tensor],
        request: Request,
        longest: int,
        adaptive: bool,
        acceptance: Acceptance,
    ) -> None:
        super().__init__(network, prompts, request, room=longest)
        self.config, self.longest, self.adaptive, self.acceptance = config, longest, adaptive, acceptance
        self.starts = [0] * len(self.scheduler.rows)
        self.lengths = [longest] * len(self.scheduler.rows)
        self.num_forwards = torch.zeros(len(prompts), dtype=torch.long)
        self.gains: list[list[int]] = [[] for _ in prompts]

    def admit(self) -> bool:
        """Prefill waiting rows into free slots; False when no row is left."""
        new, kept_slots = self.admit_rows()
        rows = self.scheduler.rows
        if kept_slots is not None:
            self.starts = [self.starts[slot] for slot in kept_slots.tolist()]
            self.lengths = [self.lengths[slot] for slot in kept_slots.tolist()]
        for slot in new:
            self.starts[slot] = len(self.prompts[rows[slot]])
            self.lengths[slot] = min(2, self.longest) if self.adaptive else self.longest
        return bool(rows)

    def draft(self, anchor: bool) -> _Cycle:
        """Draft every slot's next tokens in one forward."""
        rows, past = torch.tensor(self.scheduler.rows), self.scheduler.past
        lengths = list(self.lengths)
        if self.request.context_length is not None:
            rest = [self.request.context_length - start for start in self.starts]
            lengths = [min(n, room) for n, room in zip(lengths, rest, strict=True)]
        start, width = torch.tensor(self.starts), max(lengths)
        position = start[:, None] + torch.arange(width)
        past.set_columns(max(self.starts) + width)
        before, layout = Layout.of(start[:, None] - 1), _layout(position, lengths, start)
        ar_logits, q = draft(self.network, self.config, past, self.last, before, layout, anchor=anchor)
        self.num_forwards[rows] += 1
        noise = None
        if self.request.temperature > 0:
            noise = Noise(self.request.seed, rows, position).tokens(q.shape[-1], q.device)
            q = self._truncate(q)
        tokens = (q if noise is None else q + noise).argmax(-1)
        gained, ended = [0] * len(rows), [False] * len(rows)
        return _Cycle(lengths, position, tokens.cpu().tolist(), _Drafts(tokens, q, noise, ar_logits), gained, ended)

    def take_anchors(self, cycle: _Cycle) -> None:
        """Add the first draft of each slot, which is AR's own; a row that it ends has nothing left to verify."""
        for slot, row in enumerate(self.scheduler.rows):
            cycle.gained[slot], cycle.ended[slot] = 1, self.add(row, cycle.tokens[slot][:1])

    def verify(self, cycle: _Cycle) -> None:
        """Verify the drafts of the slots that go on in one forward, and add those that are accepted and one more."""
        slots = [slot for slot, ended in enumerate(cycle.ended) if not ended]
        if not slots:
            return
        rows, past, all_slots = self.scheduler.rows, self.scheduler.past, len(slots) == len(cycle.ended)
        # Nothing past the last wanted token needs verifying.
        lengths = [min(cycle.lengths[slot], self.end(rows[slot]) - self.starts[slot]) for slot in slots]
        width, on_device = max(lengths), to_device(torch.tensor(slots), self.network.device)
        position, start = cycle.position[slots, :width], torch.tensor([self.starts[slot] for slot in slots])
        layout, row_numbers = _layout(position, lengths, start), torch.tensor([rows[slot] for slot in slots])
        drafts = cycle.drafts if all_slots else cycle.drafts.of_slots(on_device)
        after = verify(self.network, past.for_rows(None if all_slots else slots), drafts.tokens[:, :width], layout)
        self.num_forwards[row_numbers] += 1
        accepted, next_token = self._accept(drafts, after, layout, row_numbers, position)
        self.last[on_device, 0] = next_token
        decided = torch.stack([accepted, next_token], dim=-1).cpu()
        past.lengths[slots] += decided[:, 0]
        for slot, (n, token) in zip(slots, decided.tolist(), strict=True):
            before = len(self.new_tokens[rows[slot]])
            cycle.ended[slot] = self.add(rows[slot], [*cycle.tokens[slot][:n], token][cycle.gained[slot] :])
            cycle.gained[slot] += len(self.new_tokens[rows[slot]]) - before
            self.starts[slot] += n + 1

    def retire(self, cycle: _Cycle) -> None:
        """Record what each row gained, set its next draft's length, and release the rows that have ended."""
        for slot, row in enumerate(self.scheduler.rows):
            self.gains[row].append(cycle.gained[slot])
            if self.adaptive:
                self.lengths[slot] = adapted_length(self.lengths[slot], cycle.gained[slot], self.longest)
            if cycle.ended[slot]:
                self.scheduler.release(slot)

    def sampled(self) -> SampledTokens:
        """The new tokens of all rows, once no row is left."""
        widest = max((gain for row in self.gains for gain in row), default=0)
        histogram = torch.stack([torch.bincount(torch.tensor(row), minlength=widest + 1) for row in self.gains])
        return SampledTokens(self.new_tokens, self.num_forwards, self.num_prefill_forwards, histogram)

    def _accept(
        self, drafts: _Drafts, after: Tensor, layout: Layout, rows: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The acceptance rule on drafts of this layout; after: AR logits (slots, k, vocabulary) after each draft."""
        width, noise = position.shape[1], None
        p = torch.cat([drafts.ar_logits[:, None], after], dim=1)
        if drafts.noise is not None:
            p = self._truncate(p)
            position = torch.cat([position, position[:, -1:] + 1], dim=1)
            noise = Noise(self.request.seed, rows, position, drafts.noise)
        drafted = to_device(layout.real, self.network.device)
        return self.acceptance(drafts.tokens[:, :width], drafts.logits[:, :width], p, drafted, noise)

    def _truncate(self, logits: Tensor) -> Tensor:
        """Logits of the distributions to draw from, of any shape (..., vocabulary)."""
        request = self.request
        flat = truncate(logits.flatten(0, -2), request.temperature, request.top_p, request.top_k)
        return flat.view(logits.shape)


def _layout(position: Tensor, lengths: Sequence[int], start: Tensor) -> Layout:
    """The layout of drafts of these lengths; padding after them, at a position that exists."""
    drafted = torch.arange(position.shape[1]) < torch.tensor(lengths)[:, None]
    return Layout.of(torch.where(drafted, position, start[:, None] - 1), torch.where(drafted, 0, PADDING))
