"""Whole-canvas sampling: every forward sees the full text, given tokens on either side of what is filled in.

One forward a step and no cache: bidirectional attention changes every key with every commit. SlotCacheState
continuation, infilling and unconditional text differ only in which tokens of a `Canvas` are given. A canvas
begins with a given token, as every document does in training: the begin token where there is no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from unmask.sampling.request import Request, SampledTokens, Stop, first_end
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
    device, batch = network.device, len(canvases)
    sizes = [len(canvas.tokens) for canvas in canvases]
    # What stands where is on the host, where it can be read; the device has what follows from logits.
    xt = torch.full((batch, max(sizes)), config.mask_token_id)
    masked = torch.zeros_like(xt, dtype=torch.bool)
    priority = torch.zeros(xt.shape, dtype=torch.float64)
    numbers = list(range(batch)) if row_numbers is None else list(row_numbers)
    for i, (canvas, n) in enumerate(zip(canvases, sizes, strict=True)):
        masked[i, :n] = ~canvas.given.cpu()
        xt[i, :n] = torch.where(masked[i, :n], config.mask_token_id, canvas.tokens.cpu())
        priority[i, :n] = uniform(n, key=("order", request.seed, numbers[i], 0))
    budgets = _budgets(masked, max_denoising_steps, select, remask)
    select = select or Threshold()

    index = torch.arange(xt.shape[1])
    inside = index < torch.tensor(sizes)[:, None]
    layout = Layout.of(torch.where(inside, index, 0), torch.where(inside, 0, PADDING))
    hidden = inside & ~masked & (index > 0)
    open_ = masked.clone()
    places = [row.nonzero()[:, 0] for row in open_]
    num_new = [len(place) for place in places]
    num_forwards = torch.zeros(batch, dtype=torch.long)
    noise: Tensor | None = None
    slot = open_.flatten().cumsum(0).view_as(xt) - 1  # where a place's noise stands
    draws = torch.zeros_like(xt)

    rows, step = masked.any(-1).nonzero()[:, 0], 0
    where, order = layout.subset(rows), to_device(priority[rows], device)
    confidence = torch.zeros_like(order)
    while len(rows):
        here, before = masked[rows], xt[rows]
        there = to_device(here, device)
        progress = None if budgets is None else _progress(budgets[rows], step + 1, device)
        # Of each place: the token it gets, _LEFT, or _BACK where a token is taken back.
        news = torch.full(here.shape, _LEFT, device=device)
        if bool(here.any()):
            logits = score(network, config, before, before, where, here)
            if guidance_scale != 1:
                bare = before.masked_fill(hidden[rows], config.mask_token_id)
                logits = guide(logits, score(network, config, bare, bare, where, here), guidance_scale)
            num_forwards[rows[here.any(-1)]] += 1 if guidance_scale == 1 else 2
            if request.temperature > 0 and noise is None:
                keys = [("token", request.seed, numbers[i], p, 0) for i, p in open_.nonzero().tolist()]
                noise = gumbels(keys, logits.shape[-1], device)
            chosen_noise = None if noise is None else noise[to_device(slot[rows][here], device)]
            tokens = choose_tokens(logits, request.temperature, request.top_p, chosen_noise, request.top_k)
            found = token_confidence(logits, there, tokens)
            if remask is None:
                at_least = torch.zeros_like(rows)
                if budgets is not None:
                    at_least = -(-here.sum(-1) // (budgets[rows] - step).clamp_min(1))
                candidates = Candidates(there, found, logits, order, progress)
                commit = select(candidates, to_device(at_least, device))
                news = torch.where(commit, news.masked_scatter(there, tokens), news)
        if remask is not None:
            assert budgets is not None
            assert isinstance(progress, float)
            generated = to_device(open_[rows] & ~here, device)
            reveal, again = remask.rates(step / int(budgets[0]), progress, generated, confidence)
            drawn = torch.ones(here.shape, dtype=torch.float64)
            for k, i in enumerate(rows.tolist()):
                drawn[k, : sizes[i]] = uniform(sizes[i], key=("remask", request.seed, numbers[i], step))
            chance = to_device(drawn, device)
            if bool(here.any()):
                commit = there & (chance < reveal)
                confidence = torch.where(commit, found, confidence)
                news = torch.where(commit, news.masked_scatter(there, tokens), news)
            news = news.masked_fill(generated & (chance < again), _BACK)
        read = news.cpu()  # the one wait for the device
        committed, back = read >= 0, read == _BACK
        xt[rows] = torch.where(committed, read, before).masked_fill(back, config.mask_token_id)
        masked[rows] = (here & ~committed) | back
        if bool(back.any()):
            draws[rows] += back
            if noise is not None:
                for i, j in zip(rows[back.nonzero()[:, 0]].tolist(), back.nonzero()[:, 1].tolist(), strict=True):
                    key = ("token", request.seed, numbers[i], j, int(draws[i, j]))
                    noise[int(slot[i, j])] = gumbels([key], noise.shape[-1], device)[0]
        step += 1
        last = step == max_denoising_steps

        for i, row in enumerate(rows.tolist()):
            if request.callback is not None and bool(committed[i].any()):
                request.callback(numbers[row], index[committed[i]].tolist(), xt[row][committed[i]].tolist())
            if (remask is None or last) and bool(committed[i].any() | last):
                # Only what everything before it is committed for can end a row.
                waiting = masked[row][places[row]].nonzero()[:, 0]
                known = int(waiting[0]) if len(waiting) else len(places[row])
                new = xt[row][places[row][:known]].tolist()
                kept = request.kept(row, new)
                if kept is not None:
                    num_new[row], masked[row] = kept, False
        if remask is not None:
            if last:
                break
            continue
        going = masked[rows].any(-1)
        if not bool(going.all()):  # else all that says where rows stand, masks included, stands too
            rows = rows[going]
            where, order = layout.subset(rows), to_device(priority[rows], device)

    new_tokens = [xt[i][place[:n]].tolist() for i, (place, n) in enumerate(zip(places, num_new, strict=True))]
    return SampledTokens(new_tokens, num_forwards, torch.zeros(batch, dtype=torch.long))


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
    itself. max_denoising_steps is that of each canvas. `options` go to
    `sample_bidirectional`.
    """
    size = min(canvas_size or request.max_new_tokens, request.max_new_tokens)
    if max_denoising_steps is not None and max_denoising_steps > size and remask is None:
        raise ValueError(_too_many(max_denoising_steps, size))
    batch = len(prompts)
    new_tokens: list[list[int]] = [[] for _ in prompts]
    num_forwards = torch.zeros(batch, dtype=torch.long)
    limits = [request.limit(len(prompt)) for prompt in prompts]
    waiting = [i for i in range(batch) if limits[i] > 0]
    at_a_time = max(1, len(waiting)) if request.batch_size is None else request.batch_size
    for begin in range(0, len(waiting), at_a_time):
        rows = waiting[begin : begin + at_a_time]
        while rows:
            wanted = [min(size, limits[i] - len(new_tokens[i])) for i in rows]
            canvases = [
                Canvas.around(torch.cat([prompts[i].cpu(), torch.tensor(new_tokens[i], dtype=torch.long)]), n)
                for i, n in zip(rows, wanted, strict=True)
            ]
            steps: int | list[int] | None = max_denoising_steps
            if max_denoising_steps is not None and remask is None:
                steps = [min(max_denoising_steps, n) for n in wanted]  # of each: batch-mates have more room, or less
            filled = sample_bidirectional(
                network, config, canvases, replace(request, stop=_after(new_tokens, rows, request.stop)),
                max_denoising_steps=steps, remask=remask, row_numbers=rows, **options,
            )  # fmt: skip
            num_forwards[rows] += filled.num_forwards
            going = []
            for i, n, new in zip(rows, wanted, filled.new_tokens, strict=True):
                new_tokens[i] = new_tokens[i] + new
                ended = len(new) < n or first_end(new, request.end_token_ids) is not None
                ended = ended or (request.stop is not None and request.stop(i, new_tokens[i]) is not None)
                if not ended and len(new_tokens[i]) < limits[i]:
                    going.append(i)
            rows = going
    return SampledTokens(new_tokens, num_forwards, torch.zeros(batch, dtype=torch.long))


def _after(done: list[list[int]], rows: list[int], stop: Stop | None) -> Stop | None:
    """`stop` for the tokens of one canvas, which follow those of the canvases before it."""
    if stop is None:
        return None

    def here(row: int, new: list[int]) -> int | None:
        before = done[rows[row]]
        kept = stop(rows[row], [*before, *new])
        return None if kept is None else max(0, kept - len(before))

    return here


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
