"""Whole-canvas sampling: every forward sees the full text, on both sides of what is filled in.

One forward a step and no cache: bidirectional attention changes every key with every commit. Continuation, infilling
and unconditional text differ only in which tokens of a `Canvas` are fixed. The first token of a canvas is fixed, as
no document's first token is predicted in training: the begin token, if the text has no other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import gumbels, uniform
from unmask.core.scoring import score
from unmask.core.transfer import to_device
from unmask.sampling.commit import (
    Ancestral,
    Candidates,
    ConfidenceAmongAll,
    Selector,
    Threshold,
    token_confidence,
)
from unmask.sampling.guidance import guide
from unmask.sampling.remask import Remask
from unmask.sampling.request import Asked, Request, SampledTokens
from unmask.sampling.tokens import choose_by_row, logit_index, row_key

_UNCHANGED, _REMASKED = -1, -2
"""Instead of a token: the position stays as it is, or is masked again."""

Kept = Callable[[int, list[int]], int | None]
"""`Request.kept`: (row, its new tokens) -> how many of them stay if one of them ends it, else None."""


@dataclass(frozen=True)
class Canvas:
    """tokens: (length,) int64. fixed: (length,) bool, False where a token is to be filled in, an open position.

    whole: every open position is filled: no token ends the row early, as with several gaps.
    """

    tokens: Tensor
    fixed: Tensor
    whole: bool = False

    @classmethod
    def around(cls, prefix: Tensor, num_tokens: int, suffix: Tensor | None = None) -> Canvas:
        """`num_tokens` open positions between a prefix and a suffix."""
        suffix = prefix[:0] if suffix is None else suffix
        fixed = torch.ones(len(prefix) + num_tokens + len(suffix), dtype=torch.bool)
        fixed[len(prefix) : len(prefix) + num_tokens] = False
        return cls(torch.cat([prefix, prefix.new_zeros(num_tokens), suffix]), fixed)

    @classmethod
    def of_pieces(cls, pieces: Sequence[Tensor], lengths: Sequence[int]) -> Canvas:
        """Pieces of text with open positions between them: lengths[i], at least 1, behind pieces[i]."""
        gaps = [(piece, piece.new_zeros(n)) for piece, n in zip(pieces, [*lengths, 0], strict=True)]
        fixed = [torch.arange(len(piece) + len(gap)) < len(piece) for piece, gap in gaps]
        return cls(torch.cat([part for pair in gaps for part in pair]), torch.cat(fixed), whole=len(lengths) > 1)

    @property
    def prompt(self) -> Tensor:
        """The tokens before the first open position."""
        return self.tokens[: int(self.fixed.long().argmin())]


@torch.inference_mode()
def sample_bidirectional(
    network: Network,
    config: DiffusionConfig,
    canvases: Sequence[Canvas],
    request: Request,
    *,
    max_denoising_steps: int | Sequence[int] | None = None,
    select: Selector | None = None,
    remask: Remask | None = None,
    guidance_scale: float = 1.0,
    row_numbers: Sequence[int] | None = None,
) -> SampledTokens:
    """Fill the open positions of ragged canvases; new_tokens are those of the open positions, in order.

    max_denoising_steps: T, the number of forwards of all rows, or (without remask) of each. Step s commits at least
    ceil(remaining / (T - s)) tokens, so that at most floor(N (T - s) / T) of N stay masked after s steps (DiffuLLaMA
    2410.17891, section 4.2 of its code); `Ancestral` reveals by chance instead. Without T the rule sets the pace.
    `ConfidenceAmongAll` has the logits of committed positions computed as well.
    select: the commit rule, `Threshold()` by default. remask: tokens are revealed as `Ancestral` does, corrected for
    those that are masked again, which are drawn with new noise later; a row then ends at its last step only, and a
    position reaches `callback` at each of its commits. guidance_scale other than 1: every forward runs a second time
    with the fixed tokens masked, all but the first, and counts 2. row_numbers: the rows' numbers for noise and
    callback, 0, 1, ... by default.

    A row ends early at an end token or where `stop` says so, once everything before it is committed, unless its canvas
    is to be filled whole. Fixed tokens never change. Noise takes 8 bytes x open positions x vocabulary of memory at
    temperature > 0.
    """
    return last_of(
        canvas_steps(
            network, config, canvases, request, max_denoising_steps=max_denoising_steps, select=select, remask=remask,
            guidance_scale=guidance_scale, row_numbers=row_numbers,
        )
    )  # fmt: skip


Steps = Generator[None, None, SampledTokens]
"""Yields after each forward, and returns what was sampled."""


def last_of(steps: Steps) -> SampledTokens:
    """What the steps return, once all are made."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            sampled: SampledTokens = end.value
            return sampled


def canvas_steps(
    network: Network,
    config: DiffusionConfig,
    canvases: Sequence[Canvas],
    request: Asked,
    *,
    max_denoising_steps: int | Sequence[int] | None = None,
    select: Selector | None = None,
    remask: Remask | None = None,
    guidance_scale: float = 1.0,
    row_numbers: Sequence[int] | None = None,
    kept: Kept | None = None,
) -> Steps:
    """`sample_bidirectional`, a forward at a time; kept: `Request.kept` of the request by default."""
    numbers = range(len(canvases)) if row_numbers is None else row_numbers
    batch = _Batch(network, config, canvases, request, numbers, guidance_scale, kept or request.kept)
    budgets = _budgets(batch.masked, max_denoising_steps, select, remask)
    select = select or Threshold()
    rank_all = isinstance(select, ConfidenceAmongAll)
    while len(batch.rows):
        proposal = batch.propose(rank_all)
        last = batch.step + 1 == max_denoising_steps
        if remask is None:
            changes = batch.commit_by_rule(proposal, select, budgets)
        else:
            assert budgets is not None
            changes = batch.commit_and_remask(proposal, remask, int(budgets[0]))
        committed = batch.apply(changes)
        batch.report(committed, proposal)
        if remask is None or last:
            batch.end_rows(committed.any(-1) | last)
        if remask is None:
            batch.retire()
        elif last:
            break
        yield
    return batch.sampled()


class _Proposal(NamedTuple):
    """Of the masked positions of the rows, in their order: logits (n, vocabulary), a token each, and its confidence.

    masked: (rows, length) bool on the device. place: (rows, length) int64 on the host, `logit_index` of them.
    confidence: (rows, length) float64, 0 elsewhere. ranked: (rows, length) bool on the device, all open positions,
    which then have a confidence too; None if the masked ones alone have.
    """

    masked: Tensor
    place: Tensor
    logits: Tensor
    tokens: Tensor
    confidence: Tensor
    ranked: Tensor | None


class _Batch:
    """The text of all canvases, and the rows that are not filled in yet; a step is one call of each method.

    On the host, (batch, length): xt int64; masked bool; open bool, what was masked at the beginning; num_redraws int64,
    how often a position was masked again. rows: (n,) the batch rows that are not filled in. layout: of those rows.
    On the device, of those rows: priority (n, length) float64 uniforms; confidence (n, length), of each token when it
    was revealed (remasking only).
    """

    def __init__(
        self,
        network: Network,
        config: DiffusionConfig,
        canvases: Sequence[Canvas],
        request: Asked,
        numbers: Sequence[int],
        guidance_scale: float,
        kept: Kept,
    ) -> None:
        self.network, self.config, self.request, self.kept = network, config, request, kept
        self.numbers, self.guidance_scale, self.device = list(numbers), guidance_scale, network.device
        self.sizes = [len(canvas.tokens) for canvas in canvases]
        self.xt = torch.full((len(canvases), max(self.sizes)), config.mask_token_id)
        self.masked = torch.zeros_like(self.xt, dtype=torch.bool)
        self.all_priority = torch.zeros(self.xt.shape, dtype=torch.float64)
        for i, (canvas, n) in enumerate(zip(canvases, self.sizes, strict=True)):
            self.masked[i, :n] = ~canvas.fixed.cpu()
            self.xt[i, :n] = torch.where(self.masked[i, :n], config.mask_token_id, canvas.tokens.cpu())
            self.all_priority[i, :n] = uniform(n, key=("order", *self._key(i), 0))
        index = torch.arange(self.xt.shape[1])
        inside = index < torch.tensor(self.sizes)[:, None]
        self.all_layout = Layout.of(torch.where(inside, index, 0), torch.where(inside, 0, PADDING))
        self.prompt = inside & ~self.masked & (index > 0)  # masked in the second forward of guidance
        self.open = self.masked.clone()
        self.open_index = [row.nonzero()[:, 0] for row in self.open]
        self.whole = [canvas.whole for canvas in canvases]
        self.num_new = [len(index) for index in self.open_index]
        self.num_forwards = torch.zeros(len(canvases), dtype=torch.long)
        self.noise: Tensor | None = None
        self.noise_row = logit_index(self.open)  # of `noise`
        self.num_redraws = torch.zeros_like(self.xt)
        self.step = 0
        self._keep(self.masked.any(-1).nonzero()[:, 0])
        self.confidence = torch.zeros_like(self.priority)

    def propose(self, rank_all: bool = False) -> _Proposal | None:
        """Tokens for the masked positions by one forward, two with guidance; None if nothing is masked.

        rank_all: committed positions get a confidence too, and all have it at the sampling temperature, not at 1.
        """
        masked, xt = self.masked[self.rows], self.xt[self.rows]
        if not bool(masked.any()):
            return None
        wanted = self.open[self.rows] if rank_all else masked
        logits = score(self.network, self.config, xt, xt, self.layout, wanted)
        if self.guidance_scale != 1:
            hidden = xt.masked_fill(self.prompt[self.rows], self.config.mask_token_id)
            unconditional = score(self.network, self.config, hidden, hidden, self.layout, wanted)
            logits = guide(logits, unconditional, self.guidance_scale)
        self.num_forwards[self.rows[masked.any(-1)]] += 1 if self.guidance_scale == 1 else 2
        of_row = [self.request.sampling(self.numbers[row]) for row in self.rows.tolist()]
        how = [of_row[i] for i in wanted.nonzero()[:, 0].tolist()]
        sampled = any(kind.temperature > 0 for kind in of_row)
        noise = self._noise(wanted, logits.shape[-1]) if sampled else None
        tokens = choose_by_row(logits, how, noise)
        on_device, place = to_device(masked, self.device), logit_index(masked)
        if not rank_all:
            return _Proposal(on_device, place, logits, tokens, token_confidence(logits, on_device, tokens), None)
        ranked, still = to_device(wanted, self.device), to_device(masked[wanted].nonzero()[:, 0], self.device)
        temperature = torch.tensor([kind.temperature or 1.0 for kind in how], dtype=logits.dtype)[:, None]
        confidence = token_confidence(logits / to_device(temperature, self.device), ranked, tokens)
        return _Proposal(on_device, place, logits[still], tokens[still], confidence, ranked)

    def commit_by_rule(self, proposal: _Proposal | None, select: Selector, budgets: Tensor | None) -> Tensor:
        """The changes of a step in which a rule commits: (rows, length) on the device, a token or `_UNCHANGED`.

        budgets: (batch,) forwards of each row.
        """
        assert proposal is not None
        at_least, progress = torch.zeros_like(self.rows), None
        if budgets is not None:
            num_steps = budgets[self.rows]
            at_least = -(-self.masked[self.rows].sum(-1) // (num_steps - self.step).clamp_min(1))
            progress = _progress(num_steps, self.step + 1, self.device)
        candidates = Candidates(proposal.masked, proposal.confidence, proposal.logits, self.priority, progress,
                                proposal.ranked)  # fmt: skip
        commit = select(candidates, to_device(at_least, self.device))
        return self._revealed(proposal, commit)

    def commit_and_remask(self, proposal: _Proposal | None, remask: Remask, num_steps: int) -> Tensor:
        """The changes of a step in which chance reveals and remasks: a token, `_UNCHANGED` or `_REMASKED`."""
        generated = to_device(self.open[self.rows] & ~self.masked[self.rows], self.device)
        progress, after = self.step / num_steps, (self.step + 1) / num_steps
        reveal_rate, remask_rate = remask.rates(progress, after, generated, self.confidence)
        drawn = torch.ones(generated.shape, dtype=torch.float64)
        for k, i in enumerate(self.rows.tolist()):
            key = ("remask", *self._key(i), self.step)
            drawn[k, : self.sizes[i]] = uniform(self.sizes[i], key=key)
        chance = to_device(drawn, self.device)
        changes = self._unchanged(generated)
        if proposal is not None:
            commit = proposal.masked & (chance < reveal_rate)
            self.confidence = torch.where(commit, proposal.confidence, self.confidence)
            changes = self._revealed(proposal, commit)
        return changes.masked_fill(generated & (chance < remask_rate), _REMASKED)

    def apply(self, changes: Tensor) -> Tensor:
        """Write the changes into the text; which positions were committed, (rows, length) bool on the host."""
        read = changes.cpu()  # the one wait for the device
        committed, remasked = read >= 0, read == _REMASKED
        rows, before = self.rows, self.xt[self.rows]
        self.xt[rows] = torch.where(committed, read, before).masked_fill(remasked, self.config.mask_token_id)
        self.masked[rows] = (self.masked[rows] & ~committed) | remasked
        if bool(remasked.any()):
            self._redraw(remasked)
        self.step += 1
        return committed

    def report(self, committed: Tensor, proposal: _Proposal | None) -> None:
        """Pass the commits of each row, and what they were chosen from, to the callback and the observer."""
        callback, observer = self.request.callback, self.request.observer
        if callback is None and observer is None:
            return
        for i, row in enumerate(self.rows.tolist()):
            position = committed[i].nonzero()[:, 0].tolist()
            if not position:
                continue
            if observer is not None and proposal is not None:
                chosen = to_device(proposal.place[i][position], self.device)
                observer(self.numbers[row], proposal.logits[chosen])
            if callback is not None:
                callback(self.numbers[row], position, self.xt[row][committed[i]].tolist())

    def end_rows(self, candidates: Tensor) -> None:
        """End the candidate rows, (n,) bool, that an end token or `stop` ends before their first masked position."""
        for row in self.rows[candidates].tolist():
            index = self.open_index[row]
            still_masked = self.masked[row][index].nonzero()[:, 0]
            known = int(still_masked[0]) if len(still_masked) else len(index)
            kept = None if self.whole[row] else self.kept(self.numbers[row], self.xt[row][index[:known]].tolist())
            if kept is not None:
                self.num_new[row], self.masked[row] = kept, False

    def retire(self) -> None:
        """Drop the rows that are filled in or have ended; with none to drop, layout and masks stay the same objects."""
        unfinished = self.masked[self.rows].any(-1)
        if not bool(unfinished.all()):
            self._keep(self.rows[unfinished])

    def sampled(self) -> SampledTokens:
        """The tokens of the open positions of each canvas."""
        kept = [index[:n] for index, n in zip(self.open_index, self.num_new, strict=True)]
        new_tokens = [text[index].tolist() for text, index in zip(self.xt, kept, strict=True)]
        return SampledTokens(new_tokens, self.num_forwards, torch.zeros(len(new_tokens), dtype=torch.long))

    def _keep(self, rows: Tensor) -> None:
        self.rows, self.layout = rows, self.all_layout.subset(rows)
        self.priority = to_device(self.all_priority[rows], self.device)

    def _unchanged(self, like: Tensor) -> Tensor:
        return torch.full(like.shape, _UNCHANGED, device=self.device)

    def _revealed(self, proposal: _Proposal, commit: Tensor) -> Tensor:
        """The proposed tokens where `commit` is True."""
        unchanged = self._unchanged(commit)
        return torch.where(commit, unchanged.masked_scatter(proposal.masked, proposal.tokens), unchanged)

    def _noise(self, masked: Tensor, vocabulary: int) -> Tensor:
        """Gumbel noise (masked.sum(), vocabulary) of the masked positions of the rows; drawn once for all positions."""
        if self.noise is None:
            keys = [("token", *self._key(i), p, 0) for i, p in self.open.nonzero().tolist()]
            self.noise = gumbels(keys, vocabulary, self.device)
        return self.noise[to_device(self.noise_row[self.rows][masked], self.device)]

    def _key(self, i: int) -> tuple[int, int]:
        """(seed, row) of the random numbers of row i."""
        return row_key(self.request.seed, self.numbers[i])

    def _redraw(self, remasked: Tensor) -> None:
        """Draw new noise for the positions of the rows that were masked again."""
        self.num_redraws[self.rows] += remasked
        if self.noise is None:
            return
        for k, j in remasked.nonzero().tolist():
            i = int(self.rows[k])
            key = ("token", *self._key(i), j, int(self.num_redraws[i, j]))
            self.noise[int(self.noise_row[i, j])] = gumbels([key], self.noise.shape[-1], self.device)[0]


def _progress(budgets: Tensor, step: int, device: torch.device) -> float | Tensor:
    """`step` as a share of each row's budget: one number if it is the same for all rows, else (rows, 1)."""
    different = budgets.unique().tolist()
    return step / different[0] if len(different) == 1 else to_device((step / budgets.double())[:, None], device)


def _budgets(
    masked: Tensor, steps: int | Sequence[int] | None, select: Selector | None, remask: Remask | None
) -> Tensor | None:
    """Forwards of each row, (rows,), None without a limit. Raises ValueError for options that exclude each other."""
    if bool(masked[:, 0].any()):
        raise ValueError("a canvas begins with an open position, which is never predicted: put a begin token there")
    largest = int(masked.sum(-1).max())
    budgets = None
    if steps is not None:
        budgets = torch.tensor([steps] * len(masked) if isinstance(steps, int) else list(steps))
        if int(budgets.min()) < 1:
            raise ValueError(f"max_denoising_steps {int(budgets.min())} must be at least 1")
    if largest == 0:
        raise ValueError("num_tokens 0 leaves nothing to fill in: ask for at least one token")
    if remask is None:
        if budgets is not None and int(budgets.max()) > largest:
            raise ValueError(too_many(int(budgets.max()), largest))
        return budgets
    if budgets is None:
        raise ValueError("remask needs max_denoising_steps: remasking would never end without a number of steps")
    if not isinstance(steps, int):
        raise ValueError(f"max_denoising_steps {steps} must be one number with remask")
    if select is not None and not isinstance(select, Ancestral):
        raise ValueError(
            f"select {select} does not go with remask, which reveals by chance: leave it or use Ancestral()"
        )
    return budgets


def too_many(steps: int, tokens: int) -> str:
    return (
        f"max_denoising_steps {steps} exceeds the {tokens} tokens to fill in: a step commits at least one, "
        f"so use at most {tokens}"
    )
