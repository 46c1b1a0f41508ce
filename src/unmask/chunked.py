"""Attention that leaves out what a mask hides, for devices without FlexAttention's backward pass.

A dense mask makes scaled-dot-product attention compute every masked-out pair. Queries are taken in chunks
here and each chunk gets only the keys that some query of it sees: for a two-stream pass that is about the
arithmetic of two causal passes, forward and backward, and less where documents are packed. Knows tensors only.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

CHUNK = 128
"""Queries at a time; half as many where heads are so narrow that a key costs little."""
_NARROW, _GRAIN = 32, 32

Spans = tuple[tuple[int, int], ...]
Plan = tuple[Spans, ...]
"""For each chunk of queries, the runs of keys that it needs."""

_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Plans of a mask that is still alive: all layers of a pass share one mask and so one set of plans."""


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over the allowed pairs, equal to the dense computation up to rounding.

    q: (batch, heads, queries, dim). k, v: (batch, key heads, keys, dim), key heads dividing heads.
    allowed: bool (batch or 1, 1, queries, keys), at least one key a query. Returns the shape of q.
    """
    if allowed not in _plans:
        _plans[allowed] = _row_plans(allowed, _chunk(q))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    plans: list[tuple[slice, Plan]] = _plans[allowed]
    if len(plans) == 1:
        return _attend(q, k, v, allowed, scale, plans[0][1])
    return torch.cat([_attend(q[r], k[r], v[r], allowed[r], scale, plan) for r, plan in plans])


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None, plan: Plan) -> Tensor:
    out = []
    chunk = _chunk(q)
    for start, spans in zip(range(0, q.shape[2], chunk), plan, strict=True):
        rows = slice(start, start + chunk)
        keys, values = (_pick(x, spans, -2) for x in (k, v))
        seen = _pick(allowed[:, :, rows], spans, -1)
        out.append(scaled_dot_product_attention(q[:, :, rows], keys, values, attn_mask=seen, scale=scale))
    return torch.cat(out, dim=2)


def _chunk(q: Tensor) -> int:
    return CHUNK if q.shape[-1] >= _NARROW else CHUNK // 2


def _pick(x: Tensor, spans: Spans, dim: int) -> Tensor:
    """The spans of a dimension, one after the other; a view where there is one."""
    parts = [x.narrow(dim, begin, end - begin) for begin, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _row_plans(allowed: Tensor, chunk: int) -> list[tuple[slice, Plan]]:
    """The plan of each run of rows that share one: packed rows differ, all others are alike."""
    queries, keys = allowed.shape[-2:]
    padded = torch.nn.functional.pad(allowed[:, 0], (0, -keys % _GRAIN, 0, -queries % chunk))
    used = padded.unflatten(-1, (-1, _GRAIN)).any(-1).unflatten(1, (-1, chunk)).any(2)  # (batch, chunks, grains)
    plans = [tuple(_runs(grains, keys) for grains in row) for row in used.tolist()]
    out, start = [], 0
    for plan, same in groupby(plans):
        count = len(list(same))
        out.append((slice(start, start + count), plan))
        start += count
    return out


def _runs(grains: list[bool], keys: int) -> Spans:
    """Used grains as runs of keys."""
    runs: list[tuple[int, int]] = []
    for index, used in enumerate(grains):
        if used:
            begin, end = index * _GRAIN, min((index + 1) * _GRAIN, keys)
            if runs and runs[-1][1] == begin:
                begin = runs.pop()[0]
            runs.append((begin, end))
    return tuple(runs)
