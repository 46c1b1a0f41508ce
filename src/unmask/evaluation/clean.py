"""The clean half of a two-stream pass, run once for many masks: it makes a bound cheap, most of all a continuation's.

`scoring.score` runs [noisy | clean] whole for each mask. The clean stream never sees the noisy one, so here it
runs once, and each mask costs only the blocks that it can touch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.network import DiffusionConfig, GrowingCache, Network, run
from unmask.core.scoring import noisy_pass


@dataclass
class CleanRead:
    """What `read_clean` keeps.

    columns, layout: (batch, width) of the noisy tokens, whole blocks from the first wanted one on.
    first: (batch, length) bool, positions that clean rows score (with the shift, a block's first), by `first_logits`.
    """

    past: GrowingCache
    columns: Tensor
    layout: Layout
    first: Tensor
    first_logits: Tensor


def read_clean(network: Network, config: DiffusionConfig, x0: Tensor, layout: Layout, wanted: Tensor) -> CleanRead:
    """Run x0 once and keep its keys, so that `score_noisy` can score `wanted` positions under one mask after another.

    The clean stream never sees the noisy one, so it is the same for all of them. Rows hold documents one after the
    other; what follows a row's wanted positions in their block is run too.
    """
    if config.attention != "two_stream" or config.block_size is None:
        raise ValueError(f"{config.attention} attention has no clean stream: use score")
    (batch, length), device = x0.shape, x0.device
    column = torch.arange(length, device=device)
    begins = column - layout.position % config.block_size  # where the block of each column begins
    start = torch.where(wanted, begins, length).amin(1)
    stop = torch.where(wanted, begins + config.block_size, 0).amax(1).clamp_max(length)
    columns = start[:, None] + torch.arange(max(1, int((stop - start).max())), device=device)
    inside = columns < stop[:, None]
    columns = columns.clamp_max(length - 1)
    noisy = layout.subset(torch.arange(batch, device=device)[:, None], columns)
    first = wanted & (layout.position % config.block_size == 0) if config.shift else torch.zeros_like(wanted)
    row = torch.arange(batch * length, device=device).view(batch, length)
    past = GrowingCache(network.new_cache(), layout.subset(..., slice(0, 0)))
    first_logits = network(x0, layout, config.pattern, rows=row[first] - 1, past=past)
    past.layout = layout
    noisy = noisy._replace(document=torch.where(inside, noisy.document, PADDING))
    return CleanRead(past, columns, noisy, first, first_logits)


def score_noisy(network: Network, config: DiffusionConfig, clean: CleanRead, xt: Tensor, wanted: Tensor) -> Tensor:
    """`score` at `wanted`, a part of what `clean` was read for, at the cost of the noisy blocks alone."""
    columns = clean.columns
    noisy_wanted = (wanted & ~clean.first).gather(1, columns) & clean.layout.real
    logits = run(network, noisy_pass(config, xt.gather(1, columns), clean.layout, noisy_wanted), clean.past)
    clean.past.cache.crop(-columns.shape[1])
    if not bool(clean.first.any()):
        return logits
    out = logits.new_empty(int(wanted.sum()), logits.shape[-1])
    first = clean.first[wanted]
    out[first], out[~first] = clean.first_logits[wanted[clean.first]], logits
    return out
