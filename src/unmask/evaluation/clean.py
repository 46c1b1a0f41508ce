"""The clean half of a two-stream pass, run once for many masks: it makes a bound cheap, most of all a continuation's.

`scoring.score` runs [noisy | clean] whole for each mask. The clean stream never sees the noisy one, so here it
runs once, and each mask costs only the blocks that it can touch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.corruption import Corruption
from unmask.core.network import DiffusionConfig, GrowingCache, Network, Pass, run_rows
from unmask.core.objectives import row_nll
from unmask.core.scoring import noisy_pass
from unmask.core.transfer import to_device


@dataclass
class CleanRead:
    """What `read_clean` keeps.

    columns, layout: (batch, width) of the noisy tokens, whole blocks from the first wanted one on.
    first: (batch, length) bool, positions that clean rows score (with the shift, a block's first).
    first_nll: (first.sum(),), of those.
    """

    past: GrowingCache
    columns: Tensor
    layout: Layout
    first: Tensor
    first_nll: Tensor


def read_clean(network: Network, config: DiffusionConfig, x0: Tensor, layout: Layout, wanted: Tensor) -> CleanRead:
    """Run x0 once and keep its keys, so that `noisy_nll` can score `wanted` positions under one mask after another.

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
    first_pass = Pass(x0, layout, config.pattern, row[first] - 1)
    first_nll = run_rows(network, first_pass, row_nll(x0[first]), past)
    past.layout = layout
    noisy = noisy._replace(document=torch.where(inside, noisy.document, PADDING))
    return CleanRead(past, columns, noisy, first, first_nll)


def noisy_nll(
    network: Network, config: DiffusionConfig, clean: CleanRead, x0: Tensor, corruption: Corruption
) -> Tensor:
    """`token_nll` of positions that `clean` was read for, at the cost of the noisy blocks alone."""
    columns, masked = clean.columns, corruption.masked
    xt = corruption.apply(x0, config.mask_token_id).gather(1, columns)
    noisy_wanted = (masked & ~clean.first).gather(1, columns) & clean.layout.real
    of_target = row_nll(x0.gather(1, columns)[noisy_wanted])
    noisy = run_rows(network, noisy_pass(config, xt, clean.layout, noisy_wanted), of_target, clean.past)
    clean.past.cache.crop(-columns.shape[1])
    first = to_device(clean.first[masked], noisy.device)
    out = torch.empty(len(first), dtype=torch.float64, device=noisy.device)
    out[first], out[~first] = clean.first_nll[to_device(masked[clean.first], noisy.device)].double(), noisy.double()
    return out
