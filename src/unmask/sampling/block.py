"""Block diffusion sampling on a KV cache (Efficient-DLM 2512.14067, section 7).

Block by block: the finished prefix is in the cache, the active block is denoised on top of it, a commit rule makes
positions final, and the next block's first forward also caches the finished block. Each row has an active block of its
own and moves on when that block is finished; a forward serves all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.decoding import denoise, extend, prefill
from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import uniform
from unmask.core.transfer import to_device
from unmask.sampling.canvas import Canvas
from unmask.sampling.commit import Candidates, Selector, Threshold, token_confidence
from unmask.sampling.guidance import GuidedNetwork
from unmask.sampling.request import Asked, Request, SampledTokens, first_end
from unmask.sampling.scheduler import Scheduler, decode_all
from unmask.sampling.tokens import choose_by_row, choose_tokens, logit_index, row_key, token_noise


@torch.inference_mode()
def sample_blocks(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    request: Request,
    *,
    canvases: Sequence[Canvas] | None = None,
    select: Selector | None = None,
    max_denoising_steps: int | None = None,
    guidance_scale: float = 1.0,
    window: int | None = None,
) -> SampledTokens:
    """Continue ragged `prompts` (each at least one token) in blocks on absolute positions [k*B, (k+1)*B).

    A prompt that ends inside a block leaves its tail fixed in that block. Blocks are whole: positions past
    the last wanted token stay masked and are never committed; only the context length cuts a block. A row's
    forwards and tokens are those that it would have alone.
    canvases: infilling, a canvas a row that begins with its prompt; a block sees the fixed tokens inside it and none
    after it, and blocks without open positions are read between two forwards, which counts as a prefill.
    select: the commit rule, `Threshold()` by default. max_denoising_steps: of a block.
    guidance_scale other than 1: every pass, the prefill too, runs a second time with the prompt masked.
    window: in each forward a block ends at its window-th masked position, or later if max_denoising_steps asks for
    more commits: the network sees a shorter block, and the masks after it cost nothing.
    """
    if config.attention == "bidirectional" or config.block_size is None:
        raise ValueError("a bidirectional checkpoint has no blocks to decode one by one")
    if window is not None and canvases is not None:
        raise ValueError(f"window {window} would hide the suffix inside the block: leave it out when infilling")
    batch = BlockRows(
        network, config, request, len(prompts), select=select, max_denoising_steps=max_denoising_steps,
        guidance_scale=guidance_scale, window=window,
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        batch.put(row, prompt, None if canvases is None else canvases[row])
    return decode_all(batch, len(prompts), request.batch_size)


class BlockRows:
    """The text of all rows, and the active block of each slot.

    On the host, (slots, width): text int64, position int64, masked bool. On the device, (slots, width): xt int64, the
    block's tokens; before int64, the finished block that is not cached yet; priority float64 uniforms. starts, cached:
    of each slot, the block's first position, and how much of the row is cached. steps: (slots,) forwards so far.
    canvas: (rows, columns) on the host, every row from its own position 0. The options are those of `sample_blocks`.
    """

    def __init__(
        self,
        network: Network,
        config: DiffusionConfig,
        request: Asked,
        num_rows: int,
        *,
        select: Selector | None = None,
        max_denoising_steps: int | None = None,
        guidance_scale: float = 1.0,
        window: int | None = None,
    ) -> None:
        assert config.block_size is not None
        self.select, self.max_denoising_steps, self.window = select or Threshold(), max_denoising_steps, window
        self.guided = None
        if guidance_scale != 1:
            network = self.guided = GuidedNetwork(network, config.mask_token_id, guidance_scale)
        self.network, self.config, self.request = network, config, request
        self.width, self.device = config.block_size, network.device
        self.prompts: list[Tensor] = [torch.zeros(0, dtype=torch.long)] * num_rows
        self.lengths, self.ends, self.num_new = [0] * num_rows, [0] * num_rows, [0] * num_rows
        self.whole = [False] * num_rows
        self.canvas, self.open = torch.zeros(num_rows, 0, dtype=torch.long), torch.zeros(num_rows, 0, dtype=torch.bool)
        self.num_forwards, self.num_reads = torch.zeros(2, num_rows, dtype=torch.long)
        self.waiting: deque[int] = deque()

    def put(self, row: int, prompt: Tensor, canvas: Canvas | None = None) -> None:
        """Give a row, which has none or has ended, a new text, to be filled in when a slot is free."""
        canvas = canvas or Canvas.around(prompt, self.request.limit(len(prompt), row))
        n, fixed, mask = len(canvas.tokens), canvas.fixed.cpu(), self.config.mask_token_id
        more = max(0, n + self.width - self.canvas.shape[1])
        self.canvas = torch.nn.functional.pad(self.canvas, (0, more), value=mask)
        self.open = torch.nn.functional.pad(self.open, (0, more))
        self.canvas[row], self.open[row] = mask, False
        self.canvas[row, :n], self.open[row, :n] = torch.where(fixed, canvas.tokens.cpu(), mask), ~fixed
        length = len(prompt)
        self.prompts[row], self.lengths[row], self.whole[row] = prompt, length, canvas.whole
        self.ends[row] = max([length, *(self.open[row].nonzero()[:, 0] + 1).tolist()])
        self.num_new[row] = self.ends[row] - length
        self.num_forwards[row] = self.num_reads[row] = 0
        if self.num_new[row] > 0:
            self.waiting.append(row)

    def open_slots(self, most: int) -> None:
        """Begin with a slot for each row that waits; most: rows that decode at a time."""
        self.scheduler = Scheduler(self.network, self.waiting, most, max(self.ends) + self.width)
        slots, width = len(self.scheduler.rows), self.width
        self.starts, self.cached = [0] * slots, [0] * slots
        self.text, self.position = torch.zeros(2, slots, width, dtype=torch.long)
        self.masked = torch.zeros(slots, width, dtype=torch.bool)
        self.steps = torch.zeros(slots, dtype=torch.long)
        self.drawn = torch.zeros(slots, width, dtype=torch.float64)
        self.xt = self.before = torch.zeros(slots, width, dtype=torch.long, device=self.device)
        self.priority = torch.zeros(slots, width, dtype=torch.float64, device=self.device)
        self.noise: Tensor | None = None
        self.entered: list[int] = []  # slots whose block is not on the device yet
        self.stale: list[int] = []  # slots whose noise is that of another block
        self.layout, self.moved = Layout.of(self.position), True

    def step(self) -> bool:
        """One forward of all rows in slots; False when no row is left."""
        if not self.admit():
            return False
        at_least, progress = self.pace(self.max_denoising_steps)
        masked = self.visible(self.window, at_least)
        logits = self.denoise(masked)
        candidates, tokens = self.propose(logits, masked, progress)
        chosen = self.select(candidates, to_device(at_least, self.device))
        committed = self.commit(chosen, candidates.masked, logits, tokens)
        self.report(committed, masked, logits)
        self.retire()
        return True

    def drop(self, row: int) -> None:
        """End a row that is not wanted any more."""
        slot = self.scheduler.drop(row)
        if slot is not None:
            self.starts[slot] = self.cached[slot]  # nothing of it is read on

    def admit(self) -> bool:
        """Prefill waiting rows into free slots, and bring all blocks that were begun to the device.

        False when no row is left.
        """
        new, kept_slots = self.scheduler.admit()
        if kept_slots is not None:
            self._keep(kept_slots)
        rows = self.scheduler.rows
        if not rows:
            return False
        if self.guided is not None:
            self.guided.prompt_lengths = torch.tensor([self.lengths[row] for row in rows])
        self._read_on([slot for slot, start in enumerate(self.starts) if start > self.cached[slot] + self.width])
        if new:
            whole = [self.lengths[rows[slot]] // self.width * self.width for slot in new]
            cached = [self.prompts[rows[slot]][:n] for slot, n in zip(new, whole, strict=True)]
            prefill(self.network, self.config.pattern, self.scheduler.past, new, cached, keep_logits=self.config.shift)
            for slot, start in zip(new, whole, strict=True):
                self._begin(slot, start)
                self.cached[slot] = start
        self.moved = kept_slots is not None or bool(self.entered)
        self._upload()
        return True

    def pace(self, max_denoising_steps: int | None) -> tuple[Tensor, Tensor | None]:
        """How many positions each block must commit (slots,), and its share of the steps (slots, 1) or None."""
        remaining = self.masked.sum(-1)
        if max_denoising_steps is None:
            return torch.zeros_like(remaining), None
        at_least = -(-remaining // (max_denoising_steps - self.steps).clamp_min(1))
        return at_least, to_device(((self.steps + 1) / max_denoising_steps)[:, None], self.device)

    def visible(self, window: int | None, at_least: Tensor) -> Tensor:
        """The masked positions (slots, width) that the next forward sees; sets `layout` to that of all it sees."""
        if window is None and not self.moved:
            return self.masked
        masked, columns = self.masked, self.width
        seen = self.position < (self.request.context_length or self.canvas.shape[1])
        if window is not None:
            near = (masked.cumsum(-1) - masked.long()) < at_least.clamp_min(window)[:, None]
            columns, masked, seen = int(near.sum(-1).max()), masked & near, seen & near
        seen = seen[:, :columns]
        self.layout = Layout.of(self.position[:, :columns].where(seen, 0), torch.where(seen, 0, PADDING))
        return masked

    def denoise(self, masked: Tensor) -> Tensor:
        """Logits (masked.sum(), vocabulary) of the masked positions; finished blocks are cached by the same forward."""
        past, columns = self.scheduler.past, self.layout.position.shape[1]
        past.set_columns(max(self.starts) + columns)
        uncached = [slot for slot, start in enumerate(self.starts) if self.cached[slot] < start]
        finished = (uncached, self.before[to_device(torch.tensor(uncached), self.device)]) if uncached else None
        seen = self.xt[:, :columns]
        logits = denoise(self.network, self.config, past, seen, self.layout, masked[:, :columns], finished)
        self.cached = list(self.starts)
        self.num_forwards[self.scheduler.rows] += 1 if self.guided is None else 2
        return logits

    def propose(self, logits: Tensor, masked: Tensor, progress: Tensor | None) -> tuple[Candidates, Tensor | None]:
        """What the commit rule chooses from, and the token of each masked position.

        No tokens on a CPU at temperature 0: an argmax over the vocabulary takes a tenth of the time of a small model's
        head, and `commit` computes it for the committed positions alone.
        """
        on_device, tokens = to_device(masked, self.device), None
        how = [self.request.sampling(row) for row in self.scheduler.rows]
        sampled = any(of_row.temperature > 0 for of_row in how)
        if sampled:
            index = to_device(masked.flatten().nonzero()[:, 0], self.device)
            noise = self._noise(logits.shape[-1]).flatten(0, 1)[index]
            tokens = choose_by_row(logits, [how[slot] for slot in masked.nonzero()[:, 0].tolist()], noise)
        elif self.device.type != "cpu":
            tokens = choose_tokens(logits)
        confidence = token_confidence(logits, on_device, tokens if sampled else None)
        return Candidates(on_device, confidence, logits, self.priority, progress), tokens

    def commit(self, commit: Tensor, masked: Tensor, logits: Tensor, tokens: Tensor | None) -> Tensor:
        """Write the tokens of `commit` (slots, width) bool into the blocks; the same on the host."""
        if tokens is None:
            self.xt = self.xt.masked_scatter(commit, choose_tokens(logits[commit[masked]]))
        else:
            self.xt = torch.where(commit, self.xt.masked_scatter(masked, tokens), self.xt)
        waiting = to_device(self.masked, self.device) & ~commit
        self.text = torch.where(waiting, -1, self.xt).cpu()  # the one wait for the device
        committed, self.masked = self.masked & (self.text >= 0), self.text < 0
        self.steps += 1
        return committed

    def report(self, committed: Tensor, masked: Tensor, logits: Tensor) -> None:
        """Pass the commits of each row, and the logits they were chosen from, to the callback and the observer.

        committed, masked: (slots, width) bool on the host; logits: of the masked positions.
        """
        callback, observer = self.request.callback, self.request.observer
        if callback is None and observer is None:
            return
        index = logit_index(masked)
        for slot in committed.any(-1).nonzero()[:, 0].tolist():
            column, row = committed[slot].nonzero()[:, 0], self.scheduler.rows[slot]
            if observer is not None:
                observer(row, logits[to_device(index[slot][column], self.device)])
            if callback is not None:
                callback(row, (column + self.starts[slot]).tolist(), self.text[slot][column].tolist())

    def retire(self) -> None:
        """Release rows that have ended, and begin the next block of those whose block is finished."""
        done = ~self.masked.any(-1)
        ended = torch.zeros_like(done)
        for slot, row in enumerate(self.scheduler.rows):
            if self.request.stop is not None or self.request.ends(row):
                kept = self._kept(slot, row)
                if kept is not None:
                    self.num_new[row], ended[slot] = kept, True
        for slot in (done | ended).nonzero()[:, 0].tolist():
            row, start = self.scheduler.rows[slot], self.starts[slot]
            self.canvas[row, start : start + self.width] = self.text[slot]
            if bool(ended[slot]) or start + self.width >= self.ends[row]:
                self.scheduler.release(slot)
            else:
                ahead = int(self.open[row, start + self.width :].long().argmax()) // self.width
                self._begin(slot, start + (1 + ahead) * self.width)

    def sampled(self, rows: Sequence[int]) -> SampledTokens:
        """The new tokens of rows that have ended."""
        kept = [slice(self.lengths[row], self.lengths[row] + self.num_new[row]) for row in rows]
        new_tokens = [self.canvas[row, part][self.open[row, part]].tolist()
                      for row, part in zip(rows, kept, strict=True)]  # fmt: skip
        chosen = list(rows)
        prefills = torch.tensor([int(self.lengths[row] >= self.width) for row in chosen]) + self.num_reads[chosen]
        return SampledTokens(new_tokens, self.num_forwards[chosen], prefills * (1 if self.guided is None else 2))

    def _read_on(self, slots: list[int]) -> None:
        """Cache finished blocks together with the fixed ones behind them, up to the active block."""
        if not slots:
            return
        rows = [self.scheduler.rows[slot] for slot in slots]
        texts = [self.canvas[row, self.cached[slot] : self.starts[slot]] for slot, row in zip(slots, rows, strict=True)]
        past, pattern = self.scheduler.past, self.config.pattern
        extend(self.network, pattern, past, slots, texts, keep_logits=self.config.shift)
        self.num_reads[rows] += 1
        for slot in slots:
            self.cached[slot] = self.starts[slot]

    def _begin(self, slot: int, start: int) -> None:
        """Make [start, start + width) of the slot's row its active block."""
        row = self.scheduler.rows[slot]
        self.starts[slot], self.steps[slot] = start, 0
        self.text[slot] = self.canvas[row, start : start + self.width]
        self.masked[slot] = self.open[row, start : start + self.width]
        self.drawn[slot] = uniform(self.width, key=("order", *row_key(self.request.seed, row), start))
        self.entered.append(slot)
        self.stale.append(slot)

    def _upload(self) -> None:
        """Bring the blocks that were begun to the device; a slot's finished block stays until it is cached."""
        if not self.entered:
            return
        entered = torch.zeros(len(self.starts), 1, dtype=torch.bool)
        entered[self.entered] = True
        self.entered = []
        new, text = to_device(entered, self.device), to_device(self.text, self.device)
        self.before, self.xt = torch.where(new, self.xt, self.before), torch.where(new, text, self.xt)
        self.priority = to_device(self.drawn, self.device)
        self.position = torch.tensor(self.starts)[:, None] + torch.arange(self.width)

    def _noise(self, vocabulary: int) -> Tensor:
        """Gumbel noise (slots, width, vocabulary) of the blocks, drawn once for each."""
        rows = self.scheduler.rows
        if self.noise is None:
            size = len(rows), self.width, vocabulary
            self.noise = torch.zeros(size, dtype=torch.float64, device=self.device)
        if self.stale:
            stale_rows, position = torch.tensor([rows[slot] for slot in self.stale]), self.position[self.stale]
            noise = token_noise(vocabulary, self.request.seed, stale_rows, position, device=self.device)
            self.noise.index_copy_(0, to_device(torch.tensor(self.stale), self.noise.device), noise)
            self.stale = []
        return self.noise

    def _kept(self, slot: int, row: int) -> int | None:
        """How many new tokens the row keeps if it ends in its active block, else None.

        Only a token before which everything is committed can end a row.
        """
        if self.whole[row]:
            return None
        start, length, text = self.starts[slot], self.lengths[row], self.text[slot]
        waiting = self.masked[slot].nonzero()[:, 0]
        known = min(start + (int(waiting[0]) if len(waiting) else self.width), self.ends[row])
        new = text[max(length - start, 0) : known - start].tolist()
        kept = first_end(new, self.request.ends(row))
        if self.request.stop is not None and new:
            stopped = self.request.stop(row, [*self.canvas[row, length:start].tolist(), *new[:kept]])
            if stopped is not None:
                return stopped
        return None if kept is None else max(start - length, 0) + kept

    def _keep(self, slots: Tensor) -> None:
        """Drop all slots but these; one that stands there again makes room for a new row."""
        new_slot = {slot: i for i, slot in reversed(list(enumerate(slots.tolist())))}
        self.starts, self.cached = ([values[slot] for slot in slots.tolist()] for values in (self.starts, self.cached))
        self.entered, self.stale = ([new_slot[slot] for slot in marked if slot in new_slot]
                                    for marked in (self.entered, self.stale))  # fmt: skip
        self.text, self.masked, self.drawn = self.text[slots], self.masked[slots], self.drawn[slots]
        self.steps, self.position = self.steps[slots], self.position[slots]
        on_device = to_device(slots, self.device)
        self.noise = None if self.noise is None else self.noise[on_device]
        self.xt, self.before, self.priority = self.xt[on_device], self.before[on_device], self.priority[on_device]
