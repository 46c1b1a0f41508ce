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
    """The prompts, run once, each in a slot of its own, of which `columns` will be reached if that is known."""
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
    """Run `prompts`, possibly empty, into these slots; with `keep_logits` their last logits stay for what follows."""
    slots, lengths = torch.tensor(list(rows)), torch.tensor([len(prompt) for prompt in prompts])
    if lengths.any():
        ids = pad_sequence([prompt.cpu() for prompt in prompts], batch_first=True)
        # What fills up a shorter prompt stands behind it, where no prompt looks, and is not counted as cached.
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
    """Logits of the wanted positions of the active blocks xt (slots, width) on top of the cached prefixes.

    xt and the finished tokens are on the network's device, `layout` and `wanted` on the host.

    A block sees itself and its prefix whole, and is not kept in the cache. `finished` holds the clean tokens
    (n, block) that stand between cache and active block in these n slots: they run in the same forward, as rows
    of their own which the active rows see, and stay, which is exactly the two forwards done apart.
    """
    slots, width = xt.shape
    if config.attention == "two_stream":
        xt, layout = masks_by_place(config, xt, layout), all_noisy(layout)
    rows: list[int] | None = None
    if finished is not None:
        behind, tokens = finished
        late, size = torch.tensor(list(behind)), tokens.shape[1]
        chunks = -(-size // width)  # rows as wide as the active ones, so that nothing is padded for them
        place = past.lengths[late, None] + torch.arange(chunks * width)
        inside = (torch.arange(chunks * width) < size).expand_as(place)
        clean = Layout.of(torch.where(inside, place, 0), torch.where(inside, 0, PADDING))
        cut = [x.unflatten(1, (chunks, width)).transpose(0, 1).flatten(0, 1) for x in
               (pad(tokens, (0, chunks * width - size)), *clean)]  # fmt: skip
        xt = torch.cat([xt, cut[0]])
        layout = Layout(*(torch.cat(pair) for pair in zip(layout, cut[1:], strict=True)))
        rows = [*range(slots), *list(behind) * chunks]
    index = torch.arange(slots * width).view(slots, width) - int(config.shift)
    if not config.shift:
        scoring = index[wanted]
    else:  # a block's first position is scored by the row before it, in this forward and in those after it
        scoring = index[:, 1:][wanted[:, 1:]]
        if finished is not None:
            first = slots + (chunks - 1) * len(behind)
            boundary = (first + torch.arange(len(behind))) * width + (size - 1) % width
            scoring = torch.cat([boundary, scoring])
    logits = network(xt, layout, config.pattern, rows=scoring, past=past.for_rows(rows))
    if finished is not None:
        past.lengths[late] += size
    if not config.shift:
        return logits
    if finished is not None:
        if past.next_logits is None:
            past.next_logits = logits.new_zeros(slots, logits.shape[-1])
        past.next_logits[to_device(late, logits.device)], logits = logits[: len(behind)], logits[len(behind) :]
    if past.next_logits is None:  # nothing stands before the blocks: their first positions are never wanted
        return logits
    out = logits.new_empty(int(wanted.sum()), logits.shape[-1])
    first_place = torch.zeros_like(wanted)
    first_place[:, 0] = True
    is_first = first_place[wanted]
    begins, rest, slot = (to_device(x.nonzero()[:, 0], out.device) for x in (is_first, ~is_first, wanted[:, 0]))
    out[begins], out[rest] = past.next_logits[slot], logits
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

    The clean row is the AR model and its keys stay in the cache; the masks stand at `layout` (batch, k), from
    the first unverified position on, wherever that is in its block, and leave nothing. Returns the AR logits
    of the first unverified position (batch, vocab), exact, and the draft logits (batch, k, vocab). The first of
    them are the AR logits again with `anchor`, else the first mask's, a row that nobody needs otherwise.
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
    """AR logits of what follows each of the tokens (batch, k, vocab).

    All of them are in the cache then, and none of them counts: those accepted are added to `past.lengths`.
    """
    return network(tokens, layout, causal, past=past)
