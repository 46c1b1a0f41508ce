"""Whole-canvas sampling: every forward sees the full text, given tokens on either side of what is filled in.

One forward a step and no cache: bidirectional attention changes every key with every commit. SlotCacheState
continuation, infilling and unconditional text differ only in which tokens of a `Canvas` are given. A canvas
begins with a given token, as every document does in training: the begin token where there is no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import gumbels, uniform
from unmask.core.scoring import score
from unmask.core.transfer import to_device
from unmask.sampling.commit import Ancestral, Candidates, Selector, Threshold, token_confidence
from unmask.sampling.guidance import guide
from unmask.sampling.remask import Remask
from unmask.sampling.request import Request, SampledTokens, Stop
from unmask.sampling.tokens import choose_tokens

_LEFT, _BACK = -1, -2
"""In place of a token: the place stays as it is, or its token is taken back."""


@dataclass(frozen=True)
class Canvas:
    """tokens: (length,) int64; given: (length,) bool, False where a token is to be filled in."""

    tokens: Tensor
    given: Tensor

    @classmethod
    def around(cls, prefix: Tensor, num_tokens: int, suffix: Tensor | None = None) -> Canvas:
        """`num_tokens` open places between a prefix and a suffix."""
        suffix = prefix[:0] if suffix is None else suffix
        given = torch.ones(len(prefix) + num_tokens + len(suffix), dtype=torch.bool)
        given[len(prefix) : len(prefix) + num_tokens] = False
        return cls(torch.cat([prefix, prefix.new_zeros(num_tokens), suffix]), given)


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
    """Fill the open places of ragged canvases; new_tokens are those of the open places, in order.

    T = max_denoising_steps is the number of forwards, of all rows or (without remask) of each: at step s at least
    ceil(remaining / (T - s)) tokens are committed, so that at most floor(N (T - s) / T) of N stay masked after s
    steps (DiffuLLaMA 2410.17891, section 4.2 of its code); `Ancestral` reveals by chance instead. Without it the
    rule sets the pace.
    A row ends early at an end token, or where `stop` says so, once everything before it is committed. Given
    tokens never change. A forward counts 2 with guidance, whose other branch has the given tokens masked,
    all but the first. remask: with it tokens are revealed as `Ancestral` does, corrected for what is masked
    again, under fresh noise; a row then ends at its last step only, and positions reach `callback` at each commit.
    row_numbers: the rows' numbers for noise and callback, 0, 1, ... unless given.
    Memory: with temperature > 0, 8 bytes x open places x vocabulary of noise.
    """
    numbers = range(len(canvases)) if row_numbers is None else row_numbers
    state = _Filling(network, config, canvases, request, numbers, guidance_scale)
    budgets = _budgets(state.masked, max_denoising_steps, select, remask)
    select = select or Threshold()
    while len(state.rows):
        proposal = state.propose()
        last = state.step + 1 == max_denoising_steps
        if remask is None:
            changes = state.commit_by_rule(proposal, select, budgets)
        else:
            assert budgets is not None
            changes = state.remask_by_chance(proposal, remask, int(budgets[0]))
        committed = state.apply(changes)
        state.report(committed)
        if remask is None or last:
            state.end_rows(committed.any(-1) | last)
        if remask is None:
            state.retire()
        elif last:
            break
    return state.sampled()


class _Proposal(NamedTuple):
    """Of the masked positions of the rows, in their order: logits (n, vocab), a token each, and its confidence.

    masked: (rows, length) bool on the device. confidence: (rows, length) float64, 0 elsewhere.
    """

    masked: Tensor
    logits: Tensor
    tokens: Tensor
    confidence: Tensor


class _Filling:
    """The text of all canvases, and the rows that are not filled in yet; a step is one call of each method.

    On the host, (batch, length): xt int64; masked, open bool, open what was to be filled in at the beginning; redrawn
    int64, how often a position was taken back. rows: (n,) the batch rows that still go on. layout: of those rows.
    On the device, of those rows: priority (n, length) float64 uniforms; confidence (n, length), of each token when it
    was revealed (remasking only).
    """

    def __init__(
        self,
        network: Network,
        config: DiffusionConfig,
        canvases: Sequence[Canvas],
        request: Request,
        numbers: Sequence[int],
        guidance_scale: float,
    ) -> None:
        self.network, self.config, self.request = network, config, request
        self.numbers, self.guidance_scale, self.device = list(numbers), guidance_scale, network.device
        self.sizes = [len(canvas.tokens) for canvas in canvases]
        self.xt = torch.full((len(canvases), max(self.sizes)), config.mask_token_id)
        self.masked = torch.zeros_like(self.xt, dtype=torch.bool)
        self.all_priority = torch.zeros(self.xt.shape, dtype=torch.float64)
        for i, (canvas, n) in enumerate(zip(canvases, self.sizes, strict=True)):
            self.masked[i, :n] = ~canvas.given.cpu()
            self.xt[i, :n] = torch.where(self.masked[i, :n], config.mask_token_id, canvas.tokens.cpu())
            self.all_priority[i, :n] = uniform(n, key=("order", request.seed, self.numbers[i], 0))
        index = torch.arange(self.xt.shape[1])
        inside = index < torch.tensor(self.sizes)[:, None]
        self.all_layout = Layout.of(torch.where(inside, index, 0), torch.where(inside, 0, PADDING))
        self.prompt = inside & ~self.masked & (index > 0)  # what the other branch of guidance does not see
        self.open = self.masked.clone()
        self.places = [row.nonzero()[:, 0] for row in self.open]
        self.num_new = [len(place) for place in self.places]
        self.num_forwards = torch.zeros(len(canvases), dtype=torch.long)
        self.noise: Tensor | None = None
        self.noise_row = self.open.flatten().cumsum(0).view_as(self.xt) - 1  # of `noise`, for each open position
        self.redrawn = torch.zeros_like(self.xt)
        self.step = 0
        self._keep(self.masked.any(-1).nonzero()[:, 0])
        self.confidence = torch.zeros_like(self.priority)

    def propose(self) -> _Proposal | None:
        """Tokens for the masked positions by one forward, two with guidance; None where nothing is masked."""
        request, masked, xt = self.request, self.masked[self.rows], self.xt[self.rows]
        if not bool(masked.any()):
            return None
        logits = score(self.network, self.config, xt, xt, self.layout, masked)
        if self.guidance_scale != 1:
            bare = xt.masked_fill(self.prompt[self.rows], self.config.mask_token_id)
            unconditional = score(self.network, self.config, bare, bare, self.layout, masked)
            logits = guide(logits, unconditional, self.guidance_scale)
        self.num_forwards[self.rows[masked.any(-1)]] += 1 if self.guidance_scale == 1 else 2
        noise = None
        if request.temperature > 0:
            if self.noise is None:
                keys = [("token", request.seed, self.numbers[i], p, 0) for i, p in self.open.nonzero().tolist()]
                self.noise = gumbels(keys, logits.shape[-1], self.device)
            noise = self.noise[to_device(self.noise_row[self.rows][masked], self.device)]
        tokens = choose_tokens(logits, request.temperature, request.top_p, noise, request.top_k)
        on_device = to_device(masked, self.device)
        return _Proposal(on_device, logits, tokens, token_confidence(logits, on_device, tokens))

    def commit_by_rule(self, proposal: _Proposal | None, select: Selector, budgets: Tensor | None) -> Tensor:
        """The changes of this step where a rule commits: (rows, length) on the device, a token or `_LEFT`.

        budgets: forwards of each row of the batch.
        """
        assert proposal is not None
        at_least, progress = torch.zeros_like(self.rows), None
        if budgets is not None:
            own = budgets[self.rows]
            at_least = -(-self.masked[self.rows].sum(-1) // (own - self.step).clamp_min(1))
            progress = _progress(own, self.step + 1, self.device)
        candidates = Candidates(proposal.masked, proposal.confidence, proposal.logits, self.priority, progress)
        commit = select(candidates, to_device(at_least, self.device))
        return self._revealed(proposal, commit)

    def remask_by_chance(self, proposal: _Proposal | None, remask: Remask, num_steps: int) -> Tensor:
        """The changes of this step where chance reveals tokens and takes them back: a token, `_LEFT` or `_BACK`."""
        generated = to_device(self.open[self.rows] & ~self.masked[self.rows], self.device)
        progress, after = self.step / num_steps, (self.step + 1) / num_steps
        reveal, again = remask.rates(progress, after, generated, self.confidence)
        drawn = torch.ones(generated.shape, dtype=torch.float64)
        for k, i in enumerate(self.rows.tolist()):
            key = ("remask", self.request.seed, self.numbers[i], self.step)
            drawn[k, : self.sizes[i]] = uniform(self.sizes[i], key=key)
        chance = to_device(drawn, self.device)
        changes = self._unchanged(generated)
        if proposal is not None:
            commit = proposal.masked & (chance < reveal)
            self.confidence = torch.where(commit, proposal.confidence, self.confidence)
            changes = self._revealed(proposal, commit)
        return changes.masked_fill(generated & (chance < again), _BACK)

    def apply(self, changes: Tensor) -> Tensor:
        """Write the changes into the text; which positions were committed, (rows, length) bool on the host."""
        read = changes.cpu()  # the one wait for the device
        committed, back = read >= 0, read == _BACK
        rows, before = self.rows, self.xt[self.rows]
        self.xt[rows] = torch.where(committed, read, before).masked_fill(back, self.config.mask_token_id)
        self.masked[rows] = (self.masked[rows] & ~committed) | back
        if bool(back.any()):
            self._redraw(back)
        self.step += 1
        return committed

    def report(self, committed: Tensor) -> None:
        """Give the commits of each row to the callback."""
        if self.request.callback is None:
            return
        for i, row in enumerate(self.rows.tolist()):
            position = committed[i].nonzero()[:, 0].tolist()
            if position:
                self.request.callback(self.numbers[row], position, self.xt[row][committed[i]].tolist())

    def end_rows(self, looked_at: Tensor) -> None:
        """End those of the rows (n,) bool with an end token or a stop, before which everything is committed."""
        for row in self.rows[looked_at].tolist():
            places = self.places[row]
            waiting = self.masked[row][places].nonzero()[:, 0]
            known = int(waiting[0]) if len(waiting) else len(places)
            kept = self.request.kept(row, self.xt[row][places[:known]].tolist())
            if kept is not None:
                self.num_new[row], self.masked[row] = kept, False

    def retire(self) -> None:
        """Drop the rows that are filled in or have ended; with none to drop, layout and masks stay the same ones."""
        going = self.masked[self.rows].any(-1)
        if not bool(going.all()):
            self._keep(self.rows[going])

    def sampled(self) -> SampledTokens:
        """The tokens of the open positions of each canvas."""
        new_tokens = [
            self.xt[i][place[:n]].tolist() for i, (place, n) in enumerate(zip(self.places, self.num_new, strict=True))
        ]
        return SampledTokens(new_tokens, self.num_forwards, torch.zeros(len(new_tokens), dtype=torch.long))

    def _keep(self, rows: Tensor) -> None:
        self.rows, self.layout = rows, self.all_layout.subset(rows)
        self.priority = to_device(self.all_priority[rows], self.device)

    def _unchanged(self, like: Tensor) -> Tensor:
        return torch.full(like.shape, _LEFT, device=self.device)

    def _revealed(self, proposal: _Proposal, commit: Tensor) -> Tensor:
        """The proposed tokens where `commit` is True."""
        unchanged = self._unchanged(commit)
        return torch.where(commit, unchanged.masked_scatter(proposal.masked, proposal.tokens), unchanged)

    def _redraw(self, back: Tensor) -> None:
        """New noise for the positions of the rows that were taken back."""
        self.redrawn[self.rows] += back
        if self.noise is None:
            return
        for i, j in zip(self.rows[back.nonzero()[:, 0]].tolist(), back.nonzero()[:, 1].tolist(), strict=True):
            key = ("token", self.request.seed, self.numbers[i], j, int(self.redrawn[i, j]))
            self.noise[int(self.noise_row[i, j])] = gumbels([key], self.noise.shape[-1], self.device)[0]


def sample_canvases(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    request: Request,
    *,
    canvas_size: int | None = None,
    max_denoising_steps: int | None = None,
    remask: Remask | None = None,
    **options: Any,
) -> SampledTokens:
    """Continue ragged prompts by whole canvases of `canvas_size` new tokens, one after the other.

    By default one canvas holds all max_new_tokens. A canvas sees all that stands before it and nothing beyond
    itself. max_denoising_steps is that of each canvas. `options` go to `sample_bidirectional`.
    """
    size = min(canvas_size or request.max_new_tokens, request.max_new_tokens)
    if max_denoising_steps is not None and max_denoising_steps > size and remask is None:
        raise ValueError(_too_many(max_denoising_steps, size))
    new_tokens: list[list[int]] = [[] for _ in prompts]
    num_forwards = torch.zeros(len(prompts), dtype=torch.long)
    limits = [request.limit(len(prompt)) for prompt in prompts]
    waiting = [i for i in range(len(prompts)) if limits[i] > 0]
    at_a_time = request.batch_size or max(1, len(waiting))
    for begin in range(0, len(waiting), at_a_time):
        rows = waiting[begin : begin + at_a_time]
        while rows:
            wanted = [min(size, limits[i] - len(new_tokens[i])) for i in rows]
            texts = [torch.cat([prompts[i].cpu(), torch.tensor(new_tokens[i], dtype=torch.long)]) for i in rows]
            steps: int | list[int] | None = max_denoising_steps
            if max_denoising_steps is not None and remask is None:
                steps = [min(max_denoising_steps, n) for n in wanted]  # of each: other rows have more room, or less
            filled = sample_bidirectional(
                network, config, [Canvas.around(text, n) for text, n in zip(texts, wanted, strict=True)],
                replace(request, stop=_after(new_tokens, rows, request.stop)),
                max_denoising_steps=steps, remask=remask, row_numbers=rows, **options,
            )  # fmt: skip
            num_forwards[rows] += filled.num_forwards
            going = []
            for i, n, new in zip(rows, wanted, filled.new_tokens, strict=True):
                new_tokens[i] = new_tokens[i] + new
                ended = len(new) < n or request.kept(i, new_tokens[i]) is not None
                if not ended and len(new_tokens[i]) < limits[i]:
                    going.append(i)
            rows = going
    return SampledTokens(new_tokens, num_forwards, torch.zeros(len(prompts), dtype=torch.long))


def _after(done: list[list[int]], rows: list[int], stop: Stop | None) -> Stop | None:
    """`stop` for the tokens of one canvas, which follow those of the canvases before it."""
    if stop is None:
        return None

    def stop_of_canvas(row: int, new: list[int]) -> int | None:
        before = done[rows[row]]
        kept = stop(rows[row], [*before, *new])
        return None if kept is None else max(0, kept - len(before))

    return stop_of_canvas


def _progress(budgets: Tensor, step: int, device: torch.device) -> float | Tensor:
    """Share of the budgets (rows,) that `step` forwards are: a number where it is the same for all, else (rows, 1)."""
    same = budgets.unique().tolist()
    return step / same[0] if len(same) == 1 else to_device((step / budgets.double())[:, None], device)


def _budgets(
    masked: Tensor, steps: int | Sequence[int] | None, select: Selector | None, remask: Remask | None
) -> Tensor | None:
    """Forwards of each row, (rows,), None without a limit; raises ValueError for what does not go together."""
    if bool(masked[:, 0].any()):
        raise ValueError("a canvas begins with an open place: position 0 is never predicted, give a begin token there")
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
            raise ValueError(_too_many(int(budgets.max()), largest))
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


def _too_many(steps: int, tokens: int) -> str:
    return (
        f"max_denoising_steps {steps} exceeds the {tokens} tokens to fill in: a step commits at least one, "
        f"so use at most {tokens}"
    )
