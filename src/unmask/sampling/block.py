"""Block diffusion sampling on a KV cache (Efficient-DLM 2512.14067, section 7).

Block by block: the finished prefix stands in the cache, the active block is denoised on top of it, a commit
rule makes positions final, and a finished block enters the cache within the next block's first forward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.attention import PADDING, Layout
from unmask.denoiser import DiffusionConfig, Network, denoise, prefill
from unmask.noise import uniform
from unmask.sampling.guidance import GuidedNetwork
from unmask.sampling.output import Callback, SampledTokens, Stop, first_end, left_pad
from unmask.sampling.select import Candidates, Selector, Threshold, remember, token_confidence
from unmask.sampling.tokens import check_sampling, choose_tokens, token_noise


@torch.inference_mode()
def sample_blocks(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    suffixes: Sequence[Tensor] | None = None,
    context_length: int | None = None,
    max_denoising_steps: int | None = None,
    select: Selector | None = None,
    guidance_scale: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    end_token_ids: Sequence[int] = (),
    stop: Stop | None = None,
    callback: Callback | None = None,
) -> SampledTokens:
    """Continue ragged `prompts` (each at least one token) in blocks on absolute positions [k*B, (k+1)*B).

    A prompt that ends inside a block leaves its tail fixed in that block. Blocks are whole: positions past
    the last wanted token stay masked and are never committed; only the context length cuts a block. Rows
    move from block to block together and a row's forwards are those it would need alone; a row leaves the
    batch when it ends. `suffixes`: tokens that are to stand after the max_new_tokens of each row (infilling);
    a block sees those that fall into it and none of the later ones.
    guidance_scale other than 1: every pass, the prefill too, runs a second time with the prompt masked.
    """
    check_sampling(temperature, top_p, top_k)
    if max_denoising_steps is not None and max_denoising_steps < 1:
        raise ValueError(f"max_denoising_steps {max_denoising_steps} must be at least 1")
    if config.attention == "bidirectional" or config.block_size is None:
        raise ValueError("a bidirectional checkpoint has no blocks to decode one by one")
    select = select or Threshold()
    device, width, batch = network.device, config.block_size, len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends = lengths + max_new_tokens
    if context_length is not None:
        ends = ends.clamp_max(context_length)

    # canvas: every row from its own position 0, masks where nothing stands yet
    behind = [len(suffix) for suffix in suffixes] if suffixes is not None else [0]
    canvas = torch.full((batch, int(ends.max()) + max(behind) + width), config.mask_token_id, device=device)
    for i, prompt in enumerate(prompts):
        canvas[i, : len(prompt)] = prompt.to(device)
        if suffixes is not None:
            canvas[i, int(ends[i]) : int(ends[i]) + len(suffixes[i])] = suffixes[i].to(device)
    open_ = torch.arange(canvas.shape[1], device=device) >= lengths[:, None]
    starts = lengths // width * width

    passes = 1
    if guidance_scale != 1:
        network, passes = GuidedNetwork(network, lengths, config.mask_token_id, guidance_scale), 2
    ids, position, real = left_pad([p[: len(p) // width * width] for p in prompts], 0, device)
    past = prefill(network, config.pattern, ids, Layout.of(position, torch.where(real, 0, PADDING)),
                   keep_logits=config.shift)  # fmt: skip
    num_forwards = torch.zeros(batch, dtype=torch.long)
    num_new = (ends - lengths).tolist()
    rows = torch.arange(batch, device=device)
    finished: tuple[Tensor, Layout] | None = None

    while len(rows):
        position = starts[rows, None] + torch.arange(width, device=device)
        inside = position < (context_length or canvas.shape[1])
        layout = Layout.of(torch.where(inside, position, 0), torch.where(inside, 0, PADDING))
        xt = canvas[rows].gather(1, position)
        masked = open_[rows].gather(1, position) & (position < ends[rows, None])
        priority = torch.stack([uniform(width, key=("order", seed, r, s)) for r, s in
                                zip(rows.tolist(), starts[rows].tolist(), strict=True)]).to(device)  # fmt: skip
        noise = previous = None
        step, done = 0, torch.zeros(len(rows), dtype=torch.bool, device=device)
        while bool(masked.any()):
            logits = denoise(network, config, past, xt, layout, masked, finished)
            finished = None
            num_forwards[rows[masked.any(-1)].cpu()] += passes
            if temperature > 0 and noise is None:
                noise = token_noise(logits.shape[-1], seed, rows, position)
            chosen_noise = None if noise is None else noise[masked.cpu()]
            tokens = choose_tokens(logits, temperature, top_p, chosen_noise, top_k)
            progress = None if max_denoising_steps is None else (step + 1) / max_denoising_steps
            confidence = token_confidence(logits, tokens, masked)
            candidates = Candidates(masked, confidence, logits, priority, progress, previous)
            remaining = masked.sum(-1)
            at_least = torch.zeros_like(remaining)
            if max_denoising_steps is not None:
                at_least = (remaining / max(1, max_denoising_steps - step)).ceil().long()
            commit = select(candidates, at_least)
            previous = remember(candidates, select)
            xt = torch.where(commit, xt.masked_scatter(masked, tokens), xt)
            masked = masked & ~commit
            step += 1
            if callback is not None:
                for i, row in enumerate(rows.tolist()):
                    if bool(commit[i].any()):
                        callback(row, position[i][commit[i]].tolist(), xt[i][commit[i]].tolist())
            canvas[rows] = canvas[rows].scatter(1, position, xt)
            for i, row in _changed(rows, commit, done):
                # Only what everything before it is committed for can end a row.
                known = int(position[i][masked[i]].min()) if bool(masked[i].any()) else int(position[i, -1]) + 1
                new = canvas[row, lengths[row] : min(known, int(ends[row]))].tolist()
                kept = first_end(new, end_token_ids)
                if stop is not None:
                    stopped = stop(row, new[:kept])
                    kept = stopped if stopped is not None else kept
                if kept is not None:
                    num_new[row] = kept
                    done[i], masked[i] = True, False
        starts[rows] += width
        going = ~done & (starts[rows] < ends[rows])
        if bool(going.any()):
            if not past.layout.position.shape[1]:
                past.cache = network.new_cache()  # an emptied cache keeps its batch size through a selection
            past.select(going.nonzero()[:, 0])
            finished = xt[going], layout.at(going)
        rows = rows[going]

    new_tokens = [canvas[i, len(p) : len(p) + num_new[i]].tolist() for i, p in enumerate(prompts)]
    prefilled = (starts.new_tensor([len(p) for p in prompts]) >= width).long().cpu() * passes
    return SampledTokens(new_tokens, num_forwards, prefilled)


def _changed(rows: Tensor, commit: Tensor, done: Tensor) -> list[tuple[int, int]]:
    """(index, row) of the rows that committed something and have not ended."""
    return [(i, row) for i, (row, any_) in enumerate(zip(rows.tolist(), (commit.any(-1) & ~done).tolist(),
                                                         strict=True)) if any_]  # fmt: skip
