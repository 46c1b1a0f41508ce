"""Attention that leaves out what a mask hides, for devices without FlexAttention's backward pass.

A dense mask makes scaled-dot-product attention compute every masked-out pair. Queries are taken in chunks
here and each chunk gets only the keys that some query of it sees: for a two-stream pass that is about the
arithmetic of two causal passes, forward and backward. Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

CHUNK = 128
_GRAIN = 32
_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Spans of a mask that is still alive: all layers of a pass share one mask and so one plan."""


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over the allowed pairs, equal to the dense computation up to rounding.

    q: (batch, heads, queries, dim). k, v: (batch, key heads, keys, dim), key heads dividing heads.
    allowed: bool (batch or 1, 1, queries, keys), at least one key a query. Returns the shape of q.
    """
    if allowed not in _plans:
        _plans[allowed] = _spans(allowed)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = []
    for start, spans in zip(range(0, q.shape[2], CHUNK), _plans[allowed], strict=True):
        rows = slice(start, start + CHUNK)
        keys, values, seen = (
            torch.cat([x[..., a:b, :] for a, b in spans], dim=-2) if len(spans) > 1 else x[..., slice(*spans[0]), :]
            for x in (k, v, allowed[:, :, rows].transpose(-1, -2))
        )
        out.append(
            scaled_dot_product_attention(q[:, :, rows], keys, values, attn_mask=seen.transpose(-1, -2), scale=scale)
        )
    return torch.cat(out, dim=2)


def _spans(allowed: Tensor) -> list[list[tuple[int, int]]]:
    """For each chunk of queries, the runs of keys that any of them sees, in grains of 32."""
    queries, keys = allowed.shape[-2:]
    plan = []
    for start in range(0, queries, CHUNK):
        seen = allowed[:, :, start : start + CHUNK].flatten(0, 2).any(dim=0)
        grains = torch.nn.functional.pad(seen, (0, -keys % _GRAIN)).view(-1, _GRAIN).any(dim=1).tolist()
        runs: list[tuple[int, int]] = []
        for index, used in enumerate(grains):
            if used:
                begin, end = index * _GRAIN, min((index + 1) * _GRAIN, keys)
                if runs and runs[-1][1] == begin:
                    begin = runs.pop()[0]
                runs.append((begin, end))
        plan.append(runs)
    return plan
