"""Cached passes: prefill, denoise a block, speculate. The token shift is resolved as in `scoring`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from unmask.core.attention import PADDING, Layout, Pattern, causal, drafting
from unmask.core.network import DiffusionConfig, Network, Pass, SlotCacheState, run_deferred
from unmask.core.scoring import all_noisy, check_serves_ar, noisy_ids
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
        _write(network, pattern, replace(past, columns=ids.shape[1]), past, slots, ids, layout, lengths, keep_logits)
    past.lengths[slots] = lengths


def extend(
    network: Network,
    pattern: Pattern,
    past: SlotCacheState,
    rows: Sequence[int],
    texts: Sequence[Tensor],
    *,
    keep_logits: bool = False,
) -> None:
    """Write `texts`, of at least one token, to these slots behind what is cached there; otherwise as `prefill`.

    Under a pattern of blocks, what is cached and each text end where a block ends.
    """
    slots, lengths = torch.tensor(list(rows)), torch.tensor([len(text) for text in texts])
    ids = pad_sequence([text.cpu() for text in texts], batch_first=True)
    column = torch.arange(ids.shape[1])
    position, inside = past.lengths[slots, None] + column, column < lengths[:, None]
    layout = Layout.of(torch.where(inside, position, 0), torch.where(inside, 0, PADDING))
    past.set_columns(max(past.columns, int((past.lengths[slots] + lengths).max())))
    _write(network, pattern, past, past, slots, ids, layout, lengths, keep_logits)
    past.lengths[slots] += lengths


def _write(
    network: Network,
    pattern: Pattern,
    state: SlotCacheState,
    past: SlotCacheState,
    slots: Tensor,
    ids: Tensor,
    layout: Layout,
    lengths: Tensor,
    keep_logits: bool,
) -> None:
    """A pass over given text (rows, columns), of which row i goes to slots[i]; its last logits go to `past`."""
    last = torch.arange(len(lengths)) * ids.shape[1] + lengths - 1
    wanted = last.clamp_min(0) if keep_logits else last[:0]
    logits = network(ids, layout, pattern, rows=wanted, past=state.for_rows(slots.tolist()))
    if keep_logits:
        if past.next_logits is None:
            past.next_logits = logits.new_zeros(len(past.lengths), logits.shape[-1])
        past.next_logits[to_device(slots, logits.device)] = logits


Backlog = Mapping[int, Sequence[int]]
"""Tokens of some slots that are known and not cached: they lie between the cache and what a pass adds to it."""


def with_backlog(
    past: SlotCacheState, ids: Tensor, layout: Layout, backlog: Backlog | None
) -> tuple[Tensor, Layout, SlotCacheState]:
    """A causal pass, a row for each slot, that also writes the backlog: which is two forwards in one.

    It runs as further rows of the same width, behind the others, which attend to it. The caller adds its length to
    `past.lengths`.
    """
    if not backlog:
        return ids, layout, past
    slots = list(range(len(ids))) if past.rows is None else list(past.rows)
    known, known_layout, known_slots = _backlog_rows(past, backlog, ids.shape[1])
    ids = torch.cat([ids, to_device(known, ids.device)])
    return ids, _stacked(layout, known_layout), past.for_rows([*slots, *known_slots])


def _backlog_rows(past: SlotCacheState, backlog: Backlog, width: int) -> tuple[Tensor, Layout, list[int]]:
    """The tokens of the backlog as rows of this width, and the slot of each row."""
    parts = [
        (slot, torch.tensor(tokens[first : first + width]), int(past.lengths[slot]) + first)
        for slot, tokens in backlog.items()
        for first in range(0, len(tokens), width)
    ]
    length = torch.tensor([len(part) for _, part, _ in parts])[:, None]
    start, column = torch.tensor([start for _, _, start in parts])[:, None], torch.arange(width)
    inside = column < length
    layout = Layout.of(torch.where(inside, start + column, 0), torch.where(inside, 0, PADDING))
    ids = torch.stack([pad(part, (0, width - len(part))) for _, part, _ in parts])
    return ids, layout, [slot for slot, _, _ in parts]


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
        xt, layout = noisy_ids(config, xt, layout), all_noisy(layout)
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


class Speculation(NamedTuple):
    """What a pass of `speculate` gives. ar_logits: (batch, n, vocab) after each token.

    drafts: (number of the token (batch,), on the host) -> logits (batch, num_drafts, vocab) of the positions from the
    second one after that token on.
    """

    ar_logits: Tensor
    drafts: Callable[[Tensor], Tensor]


def speculate(
    network: Network,
    config: DiffusionConfig,
    past: SlotCacheState,
    tokens: Tensor,
    layout: Layout,
    num_drafts: int | Tensor = 0,
    *,
    end: int | None = None,
    backlog: Backlog | None = None,
) -> Speculation:
    """One forward that verifies tokens and, behind each of them, drafts what may come after the next one.

    Row j of a slot is [token j, clean | masks, noisy] on top of the cached prefix and of tokens 0 .. j - 1: whichever
    token is the last one accepted, the drafts behind it are there (TiDAR 2511.08923, Nemotron-Labs 2607.05722). The
    clean tokens are the AR model, exactly. tokens: (batch, n) on the network's device, of which padding may be the last
    ones; they are written to the cache and none is counted: the caller adds those accepted to `past.lengths`. The masks
    have the positions after their token, and are not kept. num_drafts: of each slot, (batch,), or of all; masks at
    positions from `end` on are left out. backlog: see `with_backlog`.
    """
    check_serves_ar(config)
    batch, width = layout.position.shape
    wanted = torch.as_tensor(num_drafts).expand(batch)
    most = int(wanted.max())
    if not most:
        ids, passed, state = with_backlog(past, tokens, layout, backlog)
        rows = torch.arange(batch * width) if backlog else None
        logits = network(ids, passed, causal, rows=rows, past=state)
        return Speculation(logits.view(batch, width, -1), lambda _: tokens.new_zeros(batch, 0))
    masks = _masks_behind(config, layout, wanted, end)
    num_masks = masks.position.shape[-1]
    ids = torch.cat([tokens[..., None], _mask_ids(config, masks, tokens.device)], dim=-1).flatten(0, 1)
    passed = Layout(*(torch.cat([x[..., None], y], -1).flatten(0, 1) for x, y in zip(layout, masks, strict=True)))
    first = torch.arange(batch * width).view(batch, width) * (1 + num_masks)
    # Row i - 1 scores position i with the shift; the token itself scores the next position, exactly.
    drafted = first[..., None] + torch.arange(most) + (1 if config.shift else 2)
    pattern = drafting(config.noisy_attention)
    if width == 1:  # which drafts are wanted is known: the head reads its weights once
        rows = torch.cat([first, drafted[:, 0]], dim=1)
        ids, passed, state = with_backlog(past, ids, passed, backlog)
        logits = network(ids, passed, pattern, rows=rows.flatten(), past=state).unflatten(0, (batch, 1 + most))
        return Speculation(logits[:, :1], lambda _: logits[:, 1:])
    slots, columns = _branches(past, passed, batch, width)
    if backlog:
        known, known_layout, known_slots = _backlog_rows(past, backlog, passed.position.shape[1])
        ids, passed = torch.cat([ids, to_device(known, ids.device)]), _stacked(passed, known_layout)
        slots, columns = [*slots, *known_slots], torch.cat([columns, known_layout.position])
    state = past.for_branches(slots, columns)
    ar_logits, later = run_deferred(network, Pass(ids, passed, pattern, first.flatten()), drafted.flatten(), state)

    def drafts(token: Tensor) -> Tensor:
        return later(drafted[torch.arange(batch), token].flatten()).unflatten(0, (batch, most))

    return Speculation(ar_logits.unflatten(0, (batch, width)), drafts)


def draft_adapted(
    network: Network,
    config: DiffusionConfig,
    past: SlotCacheState,
    last: Tensor,
    layout: Layout,
    num_drafts: Tensor,
    *,
    end: int | None = None,
    backlog: Backlog | None = None,
) -> Tensor:
    """Logits (batch, num_drafts, vocab) of the positions after `last` (batch, 1), from one forward of noisy rows alone.

    For a config with `adapt_anchor`: the row of `last` is adapted too, so that nothing of the pass is the AR model's
    and nothing is kept but the backlog. num_drafts: of each slot, (batch,), at least 1 for one of them. end, backlog:
    as for `speculate`.
    """
    check_serves_ar(config)
    batch, most = len(last), int(num_drafts.max())
    masks = _masks_behind(config, layout, num_drafts - 1, end)
    ids = torch.cat([last[..., None], _mask_ids(config, masks, last.device, first=1)], dim=-1)[:, 0]
    block = Layout(*(torch.cat([x[..., None], y], -1)[:, 0] for x, y in zip(all_noisy(layout), masks, strict=True)))
    read = torch.arange(most) + int(not config.shift)
    rows = torch.arange(batch)[:, None] * ids.shape[1] + read
    ids, block, state = with_backlog(past, ids, block, backlog)
    logits = network(ids, block, drafting(config.noisy_attention), rows=rows.flatten(), past=state)
    return logits.unflatten(0, (batch, most))


def _mask_ids(config: DiffusionConfig, masks: Layout, device: torch.device, first: int = 0) -> Tensor:
    """What the network reads as masks of this layout (batch, n, masks), by their places from `first` on."""
    ids = torch.full(masks.position.shape, config.mask_token_id)
    if config.noise_tokens:
        ids = noisy_ids(config, ids, masks)
    else:
        ids += (first + torch.arange(ids.shape[-1])).clamp_max(config.mask_rows - 1)
    return to_device(ids, device)


def spare_masks(config: DiffusionConfig) -> int:
    """How many masks more than drafts a block has: one, since its first position is the AR row's, or none.

    With the shift its last mask scores the position after the block, and is there for the others alone; a causal block
    does without it.
    """
    return int(not (config.shift and config.noisy_attention == "causal"))


def _masks_behind(config: DiffusionConfig, layout: Layout, num_drafts: Tensor, end: int | None) -> Layout:
    """The layout (batch, n, masks) of the masks behind each token of `layout` (batch, n)."""
    more = spare_masks(config)
    index = torch.arange(int(num_drafts.max()) + more)
    position = layout.position[..., None] + 1 + index
    real = (index < num_drafts[:, None, None] + more) & layout.real[..., None]
    if end is not None:
        real = real & (position < end)
    position = torch.where(real, position, layout.position[..., None])
    return Layout.of(position, torch.where(real, 0, PADDING), noisy=True)


def _branches(past: SlotCacheState, passed: Layout, batch: int, width: int) -> tuple[list[int], Tensor]:
    """The slot of each row of a pass whose slots have `width` rows, and the columns of its tokens."""
    slots = range(batch) if past.rows is None else past.rows
    num_masks = passed.position.shape[1] - 1
    own = past.columns + torch.arange(width * num_masks).view(width, num_masks).repeat(batch, 1)
    return [slot for slot in slots for _ in range(width)], torch.cat([passed.position[:, :1], own], dim=1)
