"""Whole-canvas sampling: every forward sees the full text, given tokens on either side of what is filled in.

One forward a step and no cache: bidirectional attention changes every key with every commit. Prefix
continuation, infilling and unconditional text differ only in which tokens of a `Canvas` are given. A canvas
begins with a given token, as every document does in training: the begin token where there is no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unmask.attention import PADDING, Layout
from unmask.denoiser import DiffusionConfig, Network, score
from unmask.noise import gumbel, uniform
from unmask.sampling.guidance import guide
from unmask.sampling.output import Callback, SampledTokens, Stop, first_end
from unmask.sampling.remask import Remask
from unmask.sampling.seats import check_batch_size
from unmask.sampling.select import Ancestral, Candidates, Selector, Threshold, remember, token_confidence
from unmask.sampling.tokens import check_sampling, choose_tokens


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
    *,
    max_denoising_steps: int | None = None,
    select: Selector | None = None,
    remask: Remask | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    row_numbers: Sequence[int] | None = None,
    end_token_ids: Sequence[int] = (),
    stop: Stop | None = None,
    callback: Callback | None = None,
) -> SampledTokens:
    """Fill the open places of ragged canvases; new_tokens are those of the open places, in order.

    T = max_denoising_steps is the number of forwards: at step s at least ceil(remaining / (T - s)) tokens are
    committed, so that at most floor(N (T - s) / T) of N stay masked after s steps (DiffuLLaMA 2410.17891,
    section 4.2 of its code); `Ancestral` reveals by chance instead. Without it the rule sets the pace.
    A row ends early at an end token, or where `stop` says so, once everything before it is committed. Given
    tokens never change. A forward counts 2 with guidance, whose other branch has the given tokens masked,
    all but the first. remask: with it tokens are revealed as `Ancestral` does, corrected for what is masked
    again, under fresh noise; a row then ends at its last step only, and positions reach `callback` at each commit.
    row_numbers: the rows' numbers for noise and callback, 0, 1, ... unless given.
    Memory: with temperature > 0, 8 bytes x open places x vocabulary of noise.
    """
    check_sampling(temperature, top_p, top_k)
    device, batch = network.device, len(canvases)
    sizes = [len(canvas.tokens) for canvas in canvases]
    xt = torch.full((batch, max(sizes)), config.mask_token_id, device=device)
    masked = torch.zeros_like(xt, dtype=torch.bool)
    priority = torch.zeros(xt.shape, dtype=torch.float64)
    numbers = list(range(batch)) if row_numbers is None else list(row_numbers)
    for i, (canvas, n) in enumerate(zip(canvases, sizes, strict=True)):
        masked[i, :n] = ~canvas.given.to(device)
        xt[i, :n] = torch.where(masked[i, :n], config.mask_token_id, canvas.tokens.to(device))
        priority[i, :n] = uniform(n, key=("order", seed, numbers[i], 0))
    priority = priority.to(device)
    _check(masked, max_denoising_steps, select, remask)
    select = select or Threshold()

    index = torch.arange(xt.shape[1], device=device)
    inside = index < torch.tensor(sizes, device=device)[:, None]
    layout = Layout.of(torch.where(inside, index, 0), torch.where(inside, 0, PADDING))
    hidden = inside & ~masked & (index > 0)
    open_ = masked.clone()
    places = [row.nonzero()[:, 0] for row in open_]
    num_new = [len(place) for place in places]
    num_forwards = torch.zeros(batch, dtype=torch.long)
    noise: Tensor | None = None
    slot = open_.flatten().cumsum(0).view_as(xt) - 1  # where a place's noise stands
    draws = torch.zeros_like(xt)
    confidence = torch.zeros_like(priority)

    previous: Candidates | None = None
    rows, step = masked.any(-1).nonzero()[:, 0], 0
    while len(rows):
        here, before = masked[rows], xt[rows]
        progress = None if max_denoising_steps is None else (step + 1) / max_denoising_steps
        commit, back = torch.zeros_like(here), torch.zeros_like(here)
        if bool(here.any()):
            where = layout.at(rows)
            logits = score(network, config, before, before, where, here)
            if guidance_scale != 1:
                bare = before.masked_fill(hidden[rows], config.mask_token_id)
                logits = guide(logits, score(network, config, bare, bare, where, here), guidance_scale)
            num_forwards[rows[here.any(-1)].cpu()] += 1 if guidance_scale == 1 else 2
            if temperature > 0 and noise is None:
                noise = torch.stack(
                    [gumbel(logits.shape[-1], seed, numbers[i], p) for i, p in open_.nonzero().tolist()]
                )
            chosen_noise = None if noise is None else noise[slot[rows][here].cpu()]
            tokens = choose_tokens(logits, temperature, top_p, chosen_noise, top_k)
            found = token_confidence(logits, here, tokens)
            if remask is None:
                at_least = torch.zeros_like(rows)
                if max_denoising_steps is not None:
                    at_least = -(-here.sum(-1) // max(1, max_denoising_steps - step))
                candidates = Candidates(here, found, logits, priority[rows], progress, previous)
                commit = select(candidates, at_least)
                previous = remember(candidates, select)
        if remask is not None:
            assert max_denoising_steps is not None
            assert progress is not None
            generated = open_[rows] & ~here
            reveal, again = remask.rates(step / max_denoising_steps, progress, generated, confidence[rows])
            chance = torch.ones_like(reveal)
            for k, i in enumerate(rows.tolist()):
                chance[k, : sizes[i]] = uniform(sizes[i], key=("remask", seed, numbers[i], step)).to(device)
            commit, back = here & (chance < reveal), generated & (chance < again)
        if bool(commit.any()):
            confidence[rows] = torch.where(commit, found, confidence[rows])
            xt[rows] = torch.where(commit, before.masked_scatter(here, tokens), before)
        masked[rows] = (here & ~commit) | back
        if bool(back.any()):
            xt[rows] = xt[rows].masked_fill(back, config.mask_token_id)
            draws[rows] += back
            if noise is not None:
                for i, j in zip(rows[back.nonzero()[:, 0]].tolist(), back.nonzero()[:, 1].tolist(), strict=True):
                    noise[slot[i, j]] = gumbel(noise.shape[-1], seed, numbers[i], j, draw=int(draws[i, j]))
        step += 1
        last = step == max_denoising_steps

        for i, row in enumerate(rows.tolist()):
            if callback is not None and bool(commit[i].any()):
                callback(numbers[row], index[commit[i]].tolist(), xt[row][commit[i]].tolist())
            if (remask is None or last) and bool(commit[i].any() | last):
                # Only what everything before it is committed for can end a row.
                waiting = masked[row][places[row]].nonzero()[:, 0]
                known = int(waiting[0]) if len(waiting) else len(places[row])
                new = xt[row][places[row][:known]].tolist()
                kept = first_end(new, end_token_ids)
                if stop is not None and new and (stopped := stop(row, new[:kept])) is not None:
                    kept = stopped
                if kept is not None:
                    num_new[row], masked[row] = kept, False
        if remask is None:
            going = masked[rows].any(-1)
            rows = rows[going]
            previous = None if previous is None else previous.at(going)
        elif last:
            break

    new_tokens = [xt[i][place[:n]].tolist() for i, (place, n) in enumerate(zip(places, num_new, strict=True))]
    return SampledTokens(new_tokens, num_forwards, torch.zeros(batch, dtype=torch.long))


def sample_canvases(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    canvas_size: int | None = None,
    batch_size: int | None = None,
    context_length: int | None = None,
    max_denoising_steps: int | None = None,
    seed: int = 0,
    end_token_ids: Sequence[int] = (),
    stop: Stop | None = None,
    **options: Any,
) -> SampledTokens:
    """Continue ragged prompts by whole canvases of `canvas_size` new tokens, one after the other.

    By default one canvas holds all max_new_tokens. A canvas sees all that stands before it and nothing beyond
    itself. max_denoising_steps is that of each canvas. batch_size: rows at a time, all unless given. `options` go
    to `sample_bidirectional`.
    """
    check_batch_size(batch_size)
    if canvas_size is not None and canvas_size < 1:
        raise ValueError(f"block_size {canvas_size} must be at least 1: it is how many tokens are filled at once")
    size = min(canvas_size or max_new_tokens, max_new_tokens)
    if max_denoising_steps is not None and max_denoising_steps > size and options.get("remask") is None:
        raise ValueError(_too_many(max_denoising_steps, size))
    batch = len(prompts)
    new_tokens: list[list[int]] = [[] for _ in prompts]
    num_forwards = torch.zeros(batch, dtype=torch.long)
    limits = [min(max_new_tokens, (context_length or len(p) + max_new_tokens) - len(p)) for p in prompts]
    waiting = [i for i in range(batch) if limits[i] > 0]
    at_a_time = max(1, len(waiting)) if batch_size is None else batch_size
    for begin in range(0, len(waiting), at_a_time):
        rows = waiting[begin : begin + at_a_time]
        while rows:
            wanted = [min(size, limits[i] - len(new_tokens[i])) for i in rows]
            canvases = [
                Canvas.around(torch.cat([prompts[i].cpu(), torch.tensor(new_tokens[i], dtype=torch.long)]), n)
                for i, n in zip(rows, wanted, strict=True)
            ]
            steps = max_denoising_steps
            if steps is not None and options.get("remask") is None:
                steps = min(steps, max(wanted))
            filled = sample_bidirectional(
                network, config, canvases, max_denoising_steps=steps, seed=seed, row_numbers=rows,
                end_token_ids=end_token_ids, stop=_after(new_tokens, rows, stop), **options,
            )  # fmt: skip
            num_forwards[rows] += filled.num_forwards
            going = []
            for i, n, new in zip(rows, wanted, filled.new_tokens, strict=True):
                new_tokens[i] = new_tokens[i] + new
                ended = len(new) < n or first_end(new, end_token_ids) is not None
                ended = ended or (stop is not None and stop(i, new_tokens[i]) is not None)
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


def _check(masked: Tensor, steps: int | None, select: Selector | None, remask: Remask | None) -> None:
    if bool(masked[:, 0].any()):
        raise ValueError("a canvas begins with an open place: position 0 is never predicted, give a begin token there")
    if steps is not None and steps < 1:
        raise ValueError(f"max_denoising_steps {steps} must be at least 1")
    largest = int(masked.sum(-1).max())
    if largest == 0:
        raise ValueError("num_tokens 0 leaves nothing to fill in: ask for at least one token")
    if remask is None:
        if steps is not None and steps > largest:
            raise ValueError(_too_many(steps, largest))
        return
    if steps is None:
        raise ValueError("remask needs max_denoising_steps: remasking would never end without a number of steps")
    if select is not None and not isinstance(select, Ancestral):
        raise ValueError(
            f"select {select} does not go with remask, which reveals by chance: leave it or use Ancestral()"
        )


def _too_many(steps: int, tokens: int) -> str:
    return (
        f"max_denoising_steps {steps} exceeds the {tokens} tokens to fill in: a step commits at least one, "
        f"so use at most {tokens}"
    )
