"""Cached passes: prefill, denoise a block, draft and verify. The token shift is resolved as in `scoring`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from unmask.core.attention import PADDING, Layout, Pattern, causal, drafting
from unmask.core.network import DiffusionConfig, Network, SlotCacheState
from unmask.core.scoring import all_noisy, check_serves_ar, masks_by_place
from unmask.core.transfer import to_device


def begin(
    network: Network, pattern: Pattern, prompts: Sequence[Tensor], *, columns: int = 0, keep_logits: bool = False
) -> SlotCacheState:
    """The state after one pass over the prompts, a slot each; columns: how many will be used, if that is known."""
    past = SlotCacheState.empty(network, len(prompts), max(columns, *map(len, prompts)))
    prefill(network, pattern, past, range(len(prompts)), prompts, keep_logits=keep_logits)
    return past


def prefill(
    network: Network,
    pattern: Pattern,
    past: SlotCacheState,
    rows: Sequence[int],
    prompts: Sequence[Tensor],
    *,
    keep_logits: bool = False,
) -> None:
    """Write `prompts`, possibly empty, to these slots; with `keep_logits` keep their last logits in `next_logits`."""
    slots, lengths = torch.tensor(list(rows)), torch.tensor([len(prompt) for prompt in prompts])
    if lengths.any():
        ids = pad_sequence([prompt.cpu() for prompt in prompts], batch_first=True)
        # Right padding: causal rows never attend to it and `lengths` excludes it.
        layout = Layout.of(torch.arange(ids.shape[1]).expand_as(ids))
        past.set_columns(max(past.columns, ids.shape[1]))
        last = torch.arange(len(lengths)) * ids.shape[1] + lengths - 1
        wanted = last.clamp_min(0) if keep_logits else last[:0]
        logits = network(ids, layout, pattern, rows=wanted, past=replace(past, rows=rows, columns=ids.shape[1]))
        if keep_logits:
            if past.next_logits is None:
                past.next_logits = logits.new_zeros(len(past.lengths), logits.shape[-1])
            past.next_logits[to_device(slots, logits.device)] = logits
    past.lengths[slots] = lengths


def denoise(
    network: Network,
    config: DiffusionConfig,
    past: SlotCacheState,
    xt: Tensor,
    layout: Layout,
    wanted: Tensor,
    finished: tuple[Sequence[int], Tensor] | None = None,
) -> Tensor:
    """Logits (wanted.sum(), vocab) of the wanted positions of the active blocks xt (slots, width) on their prefixes.

    xt and the finished tokens are on the network's device, `layout` and `wanted` on the host. A block attends to itself
    and its whole prefix, and is not kept in the cache. finished: slots whose last block is not cached yet, and the
    clean tokens (n, block) of those blocks. They run in the same forward, as rows that the active rows attend to, and
    stay cached, which is exactly two forwards in one.
    """
    slots, width = xt.shape
    if config.attention == "two_stream":
        xt, layout = masks_by_place(config, xt, layout), all_noisy(layout)
    rows = None
    if finished is not None:
        clean, clean_layout = _finished_rows(past, *finished, width)
        xt, layout = torch.cat([xt, clean]), _stacked(layout, clean_layout)
        rows = [*range(slots), *list(finished[0]) * (len(clean) // len(finished[0]))]
    row = torch.arange(slots * width).view(slots, width)
    if not config.shift:
        scoring = row[wanted]
    else:  # row i - 1 scores position i; a block's first position is scored by a clean row, kept in next_logits
        scoring = row[:, :-1][wanted[:, 1:]]
        if finished is not None:
            scoring = torch.cat([_last_clean_rows(slots, width, *finished), scoring])
    logits = network(xt, layout, config.pattern, rows=scoring, past=past.for_rows(rows))
    if finished is not None:
        cached = torch.tensor(list(finished[0]))
        past.lengths[cached] += finished[1].shape[1]
        if config.shift:
            logits = _keep_next(past, cached, logits)
    return _with_first_positions(past, logits, wanted) if config.shift else logits


def _finished_rows(past: SlotCacheState, slots: Sequence[int], tokens: Tensor, width: int) -> tuple[Tensor, Layout]:
    """Finished blocks (n, block) as rows (chunks * n, width), so wide that active rows need no padding."""
    size = tokens.shape[1]
    chunks = -(-size // width)
    column = torch.arange(chunks * width)
    position = past.lengths[torch.tensor(list(slots)), None] + column
    inside = (column < size).expand_as(position)
    layout = Layout.of(torch.where(inside, position, 0), torch.where(inside, 0, PADDING))
    padded = pad(tokens, (0, chunks * width - size))
    ids, *parts = (x.unflatten(1, (chunks, width)).transpose(0, 1).flatten(0, 1) for x in (padded, *layout))
    return ids, Layout(*parts)


def _stacked(layout: Layout, below: Layout) -> Layout:
    """The batch rows of both layouts."""
    return Layout(*(torch.cat(pair) for pair in zip(layout, below, strict=True)))


def _last_clean_rows(slots: int, width: int, finished: Sequence[int], tokens: Tensor) -> Tensor:
    """Flat rows of the last token of each finished block, (n,), in a pass of `denoise`."""
    size, n = tokens.shape[1], len(finished)
    first = slots + (-(-size // width) - 1) * n
    return (first + torch.arange(n)) * width + (size - 1) % width


def _keep_next(past: SlotCacheState, slots: Tensor, logits: Tensor) -> Tensor:
    """Move the first logits, of the last clean rows, to `past.next_logits`; returns the others."""
    if past.next_logits is None:
        past.next_logits = logits.new_zeros(len(past.lengths), logits.shape[-1])
    past.next_logits[to_device(slots, logits.device)] = logits[: len(slots)]
    return logits[len(slots) :]


def _with_first_positions(past: SlotCacheState, logits: Tensor, wanted: Tensor) -> Tensor:
    """The logits of all wanted positions; those of a block's first position are taken from `past.next_logits`."""
    if past.next_logits is None:  # a block at position 0: its first position is never wanted
        return logits
    out = logits.new_empty(int(wanted.sum()), logits.shape[-1])
    is_first = torch.zeros_like(wanted)
    is_first[:, 0] = True
    is_first = is_first[wanted]
    first, rest, slot = (to_device(x.nonzero()[:, 0], out.device) for x in (is_first, ~is_first, wanted[:, 0]))
    out[first], out[rest] = past.next_logits[slot], logits
    return out


def draft(
    network: Network,
    config: DiffusionConfig,
    past: SlotCacheState,
    last: Tensor,
    last_layout: Layout,
    layout: Layout,
    *,
    anchor: bool = False,
) -> tuple[Tensor, Tensor]:
    """One forward over [last verified token, clean | masks, noisy] on top of the cached prefix.

    The clean row is the AR model and its keys stay in the cache. The masks have the positions of `layout` (batch, k),
    from the first unverified one on, wherever that is in its block, and are not cached. Returns the exact AR logits of
    the first unverified position (batch, vocab), and the draft logits (batch, k, vocab). The first of these are the AR
    logits again with `anchor`, else those of the first mask.
    """
    check_serves_ar(config)
    batch, width = layout.position.shape
    place = torch.arange(width, device=last.device).clamp_max(config.mask_rows - 1)
    masks = (config.mask_token_id + place).expand(batch, -1)
    passed = last_layout.concat(all_noisy(layout))
    read = torch.arange(width + 1)
    if config.shift:
        read = read[:-1]
    elif anchor:
        read = read[read != 1]
    rows = (torch.arange(batch)[:, None] * (width + 1) + read).flatten()
    logits = network(torch.cat([last, masks], dim=1), passed, drafting(config.noisy_attention), rows=rows, past=past)
    past.lengths += 1
    logits = logits.unflatten(0, (batch, -1))
    return logits[:, 0], logits[:, int(not config.shift and not anchor) :]


def verify(network: Network, past: SlotCacheState, tokens: Tensor, layout: Layout) -> Tensor:
    """AR logits of the token after each of `tokens` (batch, k), (batch, k, vocab).

    All tokens are written to the cache, and none is counted: the caller adds those accepted to `past.lengths`.
    """
    return network(tokens, layout, causal, past=past)
