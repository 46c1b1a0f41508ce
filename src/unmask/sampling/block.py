"""Block diffusion sampling on a KV cache (Efficient-DLM 2512.14067, section 7).

Block by block: the finished prefix stands in the cache, the active block is denoised on top of it, a commit
rule makes positions final, and a finished block enters the cache within the next block's first forward.
Every row is in a block of its own and moves on when that block is done; a forward serves all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.denoiser import DiffusionConfig, Network, denoise, prefill
from unmask.core.noise import uniform
from unmask.core.transfer import to_device
from unmask.sampling.commit import Candidates, Selector, Threshold, token_confidence
from unmask.sampling.guidance import GuidedNetwork
from unmask.sampling.output import Callback, SampledTokens, Stop
from unmask.sampling.scheduler import Seats
from unmask.sampling.tokens import check_sampling, choose_tokens, token_noise


@torch.inference_mode()
def sample_blocks(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    window: int | None = None,
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
    the last wanted token stay masked and are never committed; only the context length cuts a block.
    batch_size: rows at a time, all unless given; a row that ends gives its place to the next prompt. A row's
    forwards and tokens are those it would have alone.
    window: in each forward a block reaches to its window-th masked position and no further: what stands behind
    is absent, the network sees a shorter block. Those are masks, and what they cost is saved; the block size
    changes nothing. With max_denoising_steps at least as many masked positions as must be committed are there.
    `suffixes`: tokens that are to stand after the max_new_tokens of each row (infilling); a block sees those
    that fall into it and none of the later ones.
    guidance_scale other than 1: every pass, the prefill too, runs a second time with the prompt masked.
    """
    check_sampling(temperature, top_p, top_k)
    if max_denoising_steps is not None and max_denoising_steps < 1:
        raise ValueError(f"max_denoising_steps {max_denoising_steps} must be at least 1")
    if config.attention == "bidirectional" or config.block_size is None:
        raise ValueError("a bidirectional checkpoint has no blocks to decode one by one")
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1: a block without a masked position commits nothing")
    if window is not None and suffixes is not None:
        raise ValueError(f"window {window} would hide the suffix inside the block: leave it out when infilling")
    select = select or Threshold()
    device, width, passes = network.device, config.block_size, 1
    lengths = [len(prompt) for prompt in prompts]
    ends = [n + max_new_tokens if context_length is None else min(n + max_new_tokens, context_length) for n in lengths]
    canvas = _canvas(prompts, suffixes, ends, width, config.mask_token_id)
    guided = None
    if guidance_scale != 1:
        network, passes = (guided := GuidedNetwork(network, config.mask_token_id, guidance_scale)), 2
    seats = Seats(network, len(prompts), batch_size, max(ends) + width)
    blocks, past = _Blocks(len(seats.rows), width, device, seed), seats.past
    num_forwards = torch.zeros(len(prompts), dtype=torch.long)
    num_new = [end - n for end, n in zip(ends, lengths, strict=True)]
    for row, wanted in enumerate(num_new):
        if wanted < 1:
            seats.waiting.remove(row)

    while True:
        new, stay = seats.fill()
        if stay is not None:
            blocks.keep(stay)
        if not seats.rows:
            break
        if new:
            if guided is not None:
                guided.prompt_lengths = torch.tensor([lengths[row] for row in seats.rows])
            whole = [lengths[seats.rows[slot]] // width * width for slot in new]
            prefill(network, config.pattern, past, new, keep_logits=config.shift,
                    prompts=[prompts[seats.rows[slot]][:n] for slot, n in zip(new, whole, strict=True)])  # fmt: skip
            for slot, start in zip(new, whole, strict=True):
                blocks.enter(slot, seats.rows[slot], start, canvas, lengths, ends)
                blocks.cached[slot] = start
        elif guided is not None and stay is not None:
            guided.prompt_lengths = guided.prompt_lengths[stay]
        entered = blocks.upload()

        remaining = blocks.masked.sum(-1)
        at_least = torch.zeros_like(remaining)
        progress = None
        if max_denoising_steps is not None:
            at_least = -(-remaining // (max_denoising_steps - blocks.steps).clamp_min(1))
            progress = to_device(((blocks.steps + 1) / max_denoising_steps)[:, None], device)
        masked = blocks.masked
        if entered is not None or stay is not None or window is not None:  # else they stand where they stood
            reach, seen = width, blocks.position < (context_length or canvas.shape[1])
            if window is not None:
                near = (masked.cumsum(-1) - masked.long()) < at_least.clamp_min(window)[:, None]
                reach, masked, seen = int(near.sum(-1).max()), masked & near, seen & near
            shown = seen[:, :reach]
            layout = Layout.of(blocks.position[:, :reach].where(shown, 0), torch.where(shown, 0, PADDING))
        past.reach(max(blocks.starts) + reach)
        logits = denoise(network, config, past, blocks.xt[:, :reach], layout, masked[:, :reach], blocks.finished())
        blocks.cached = list(blocks.starts)
        num_forwards[seats.rows] += passes

        here, must = to_device(masked, device), to_device(at_least, device)
        tokens = None
        if temperature > 0:
            noise = blocks.noise_of(logits.shape[-1], seats.rows)
            noise = noise.flatten(0, 1)[to_device(masked.flatten().nonzero()[:, 0], network.device)]
            tokens = choose_tokens(logits, temperature, top_p, noise, top_k)
        elif device.type != "cpu":
            tokens = choose_tokens(logits)
        confidence = token_confidence(logits, here, tokens if temperature > 0 else None)
        candidates = Candidates(here, confidence, logits, blocks.priority, progress)
        commit = select(candidates, must)
        if tokens is None:  # on CPU an argmax over the vocabulary is a tenth of a small model's head: where needed
            blocks.xt = blocks.xt.masked_scatter(commit, choose_tokens(logits[commit[here]]))
        else:
            blocks.xt = torch.where(commit, blocks.xt.masked_scatter(here, tokens), blocks.xt)
        waiting = to_device(blocks.masked, device) & ~commit
        text = torch.where(waiting, -1, blocks.xt).cpu()  # the one wait for the device

        committed, blocks.masked = blocks.masked & (text >= 0), text < 0
        blocks.steps += 1
        if callback is not None:
            for slot in committed.any(-1).nonzero()[:, 0].tolist():
                which = committed[slot].nonzero()[:, 0]
                callback(seats.rows[slot], (blocks.starts[slot] + which).tolist(), text[slot][which].tolist())
        done = ~blocks.masked.any(-1)
        ended = torch.zeros_like(done)
        if stop is not None or end_token_ids:
            for slot, row in enumerate(seats.rows):
                kept = _kept(text[slot], canvas[row], blocks.starts[slot], lengths[row], ends[row], end_token_ids,
                             stop, row)  # fmt: skip
                if kept is not None:
                    num_new[row], ended[slot] = kept, True
        for slot in (done | ended).nonzero()[:, 0].tolist():
            row, start = seats.rows[slot], blocks.starts[slot]
            canvas[row, start : start + width] = text[slot]
            if bool(ended[slot]) or start + width >= ends[row]:
                seats.leave(slot)
            else:
                blocks.enter(slot, row, start + width, canvas, lengths, ends)

    new_tokens = [canvas[i, n : n + num_new[i]].tolist() for i, n in enumerate(lengths)]
    prefilled = torch.tensor([int(n >= width) * passes for n in lengths])
    return SampledTokens(new_tokens, num_forwards, prefilled)


def _canvas(
    prompts: Sequence[Tensor], suffixes: Sequence[Tensor] | None, ends: list[int], width: int, mask_token_id: int
) -> Tensor:
    """(rows, columns) on the CPU: every row from its own position 0, masks where nothing stands yet."""
    behind = [len(suffix) for suffix in suffixes] if suffixes is not None else [0]
    canvas = torch.full((len(prompts), max(ends) + max(behind) + width), mask_token_id)
    for i, prompt in enumerate(prompts):
        canvas[i, : len(prompt)] = prompt.cpu()
        if suffixes is not None:
            canvas[i, ends[i] : ends[i] + len(suffixes[i])] = suffixes[i].cpu()
    return canvas


def _kept(
    text: Tensor, canvas: Tensor, start: int, length: int, end: int, end_token_ids: Sequence[int], stop: Stop | None,
    row: int,
) -> int | None:  # fmt: skip
    """How many new tokens the row keeps if it ends here, else None; `text` is its block, -1 where masked.

    Only what everything before it is committed for can end a row.
    """
    waiting = (text < 0).nonzero()[:, 0]
    known = min(start + (int(waiting[0]) if len(waiting) else len(text)), end)
    here = text[max(length - start, 0) : known - start].tolist()
    kept = next((i + 1 for i, token in enumerate(here) if token in end_token_ids), None)
    before = max(start - length, 0)
    if stop is not None and here:
        stopped = stop(row, [*canvas[length:start].tolist(), *here[:kept]])
        if stopped is not None:
            return stopped
    return None if kept is None else before + kept


class _Blocks:
    """The active block of each slot: xt and priority on the device, the rest on the host.

    xt, position: (slots, width) int64. masked: (slots, width) bool. priority: (slots, width) float64 uniforms.
    steps: (slots,) forwards so far. cached: how much of the row is in the cache; less than the block's start
    while the block before it, `before`, is not.
    """

    def __init__(self, slots: int, width: int, device: torch.device, seed: int) -> None:
        self.width, self.device, self.seed = width, device, seed
        self.starts, self.cached = [0] * slots, [0] * slots
        self.text = torch.zeros(slots, width, dtype=torch.long)
        self.masked = torch.zeros(slots, width, dtype=torch.bool)
        self.drawn = torch.zeros(slots, width, dtype=torch.float64)
        self.steps = torch.zeros(slots, dtype=torch.long)
        self.position = self.text
        self.xt = self.before = self.text.to(device)
        self.priority = self.drawn.to(device)
        self.noise: Tensor | None = None
        self.entered: list[int] = []
        self.silent: list[int] = []  # slots whose noise is still that of another block

    def enter(self, slot: int, row: int, start: int, canvas: Tensor, lengths: list[int], ends: list[int]) -> None:
        """Make [start, start + width) of the row the slot's active block."""
        position = start + torch.arange(self.width)
        self.starts[slot], self.steps[slot] = start, 0
        self.text[slot] = canvas[row, start : start + self.width]
        self.masked[slot] = (position >= lengths[row]) & (position < ends[row])
        self.drawn[slot] = uniform(self.width, key=("order", self.seed, row, start))
        self.entered.append(slot)
        self.silent.append(slot)

    def upload(self) -> Tensor | None:
        """Bring the blocks just entered to the device; which slots they are, (slots,) bool."""
        if not self.entered:
            return None
        entered = torch.zeros(len(self.starts), dtype=torch.bool)
        entered[self.entered] = True
        self.entered = []
        new, text = to_device(entered[:, None], self.device), to_device(self.text, self.device)
        self.before, self.xt = torch.where(new, self.xt, self.before), torch.where(new, text, self.xt)
        self.priority = to_device(self.drawn, self.device)
        self.position = torch.tensor(self.starts)[:, None] + torch.arange(self.width)
        return entered

    def finished(self) -> tuple[list[int], Tensor] | None:
        """The slots whose last block is not cached yet, and that block."""
        behind = [slot for slot, start in enumerate(self.starts) if self.cached[slot] < start]
        return (behind, self.before[to_device(torch.tensor(behind), self.device)]) if behind else None

    def noise_of(self, vocabulary: int, rows: list[int]) -> Tensor:
        """Gumbel noise (slots, width, vocabulary) of the blocks, drawn once for each."""
        if self.noise is None:
            size = len(rows), self.width, vocabulary
            self.noise = torch.zeros(size, dtype=torch.float64, device=self.device)
        if self.silent:
            drawn = torch.tensor([rows[slot] for slot in self.silent]), self.position[self.silent]
            noise = token_noise(vocabulary, self.seed, *drawn, device=self.device)
            self.noise.index_copy_(0, to_device(torch.tensor(self.silent), self.noise.device), noise)
            self.silent = []
        return self.noise

    def keep(self, slots: Tensor) -> None:
        """Keep these slots."""
        number = {slot: i for i, slot in enumerate(slots.tolist())}
        self.starts, self.cached = ([values[slot] for slot in number] for values in (self.starts, self.cached))
        self.entered, self.silent = ([number[s] for s in marked if s in number]
                                     for marked in (self.entered, self.silent))  # fmt: skip
        self.text, self.masked, self.drawn = self.text[slots], self.masked[slots], self.drawn[slots]
        self.steps, self.position = self.steps[slots], self.position[slots]
        there = to_device(slots, self.device)
        self.noise = None if self.noise is None else self.noise[there]
        self.xt, self.before, self.priority = self.xt[there], self.before[there], self.priority[there]
