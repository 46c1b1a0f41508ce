"""Attention that skips hidden pairs, for devices without FlexAttention's backward pass.

With a dense mask scaled-dot-product attention computes every hidden pair. Here queries are cut into tiles, and each
tile gets only the keys that some query of it attends to: for a two-stream pass that is about the arithmetic of two
causal passes, forward and backward, and less where documents are packed. Tiles run on torch's own CPU kernel, in one
autograd node: gradients are written in place, and keys are saved once for all tiles and all heads that share them.
Keys of a cache without a graph get no gradient. Knows tensors only.

Slow twin: `torch.nn.functional.scaled_dot_product_attention` with the dense mask; compared in tests/test_attention.py
(`test_chunked_attention_matches_dense_with_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.weak import WeakIdKeyDictionary

CHUNK = 64
"""Queries of a tile: smaller tiles skip more hidden pairs, larger ones need fewer calls."""
_ROUND_TO = 32

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tile:
    """Queries `queries` of batch rows `rows` against the keys in `spans` of batch rows `key_rows`.

    bias: 0 where a query attends to a key and -inf elsewhere, None where it attends to all of them.
    """

    rows: slice
    queries: slice
    key_rows: slice
    spans: Spans
    bias: Tensor | None


_tiles: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Tiles of each living mask, by precision: all layers of a pass share one mask and so one set of tiles."""


def chunked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over the allowed pairs, equal to the dense computation up to rounding.

    q: (batch, heads, queries, dim). k, v: (batch, key heads, keys, dim), key heads dividing heads.
    allowed: bool (batch or 1, 1, queries, keys). Returns the shape of q; a query without keys, which is padding, gets
    something finite.
    """
    q, k, v = _same_precision(q, k, v)
    planned = _tiles.setdefault(allowed, {})
    if q.dtype not in planned:
        planned[q.dtype] = plan(allowed, q.dtype)
    out: Tensor = _Tiled.apply(q, k, v, planned[q.dtype], scale, min(_cached_keys(k), _cached_keys(v)))
    return out


def picked_attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, rows: Tensor, scale: float | None = None
) -> Tensor:
    """`chunked_attention` of some queries: q (1, heads, len(rows), dim), `rows` flat indices into (batch, queries)."""
    q, k, v = _same_precision(q, k, v)
    out: Tensor = _Tiled.apply(q, k, v, plan_rows(allowed, rows, q.dtype), scale, min(_cached_keys(k), _cached_keys(v)))
    return out


def _same_precision(*tensors: Tensor) -> list[Tensor]:
    """All in autocast's precision, where that is on, as for torch's own attention; else in that of the first."""
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensors[0].dtype
    return [x.to(dtype) for x in tensors]


def _cached_keys(keys: Tensor) -> int:
    """The number of leading keys without a graph: a cache's, to which `torch.cat` appended those of the pass.

    It is read from the graph. 0 in half precision, where torch's kernel rounds less than `_query_gradient`.
    """
    joined: Any = keys.grad_fn
    if keys.dtype not in (torch.float32, torch.float64) or joined is None or joined.name() != "CatBackward0":
        return 0
    (first, _), *others = joined.next_functions
    if first is not None or len(others) != 1:
        return 0
    ((node, output),) = others
    batch, heads, own, dim = node._input_metadata[output].shape
    return keys.shape[2] - own if keys.shape == (batch, heads, keys.shape[2], dim) else 0


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile], scale: float | None, cached: int
    ) -> Tensor:
        out = _like(q)
        sums = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
        for tile in tiles:
            part, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _queries(q, tile), _keys(k, tile), _keys(v, tile), attn_mask=tile.bias, scale=scale
            )
            _queries(out, tile).copy_(part)
            sums[tile.rows, :, tile.queries] = total
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.tiles, ctx.scale, ctx.cached = tiles, scale, cached
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        grad_q, grad_k, grad_v = _like(q), torch.zeros_like(k), torch.zeros_like(v)
        for whole in ctx.tiles:
            cached, tile = _cut(whole, ctx.cached)
            part = _queries(grad_q, whole)
            if tile.spans:
                parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *(_queries(grad, tile), _queries(q, tile), _keys(k, tile), _keys(v, tile), _queries(out, tile)),
                    *(sums[tile.rows, :, tile.queries], 0.0, False),
                    attn_mask=tile.bias,
                    scale=ctx.scale,
                )
                part.copy_(parts[0])
                for full, piece in ((grad_k, parts[1]), (grad_v, parts[2])):
                    offset = 0
                    for begin, end in tile.spans:
                        full[tile.key_rows, :, begin:end] += piece[:, :, offset : offset + end - begin]
                        offset += end - begin
            else:
                part.zero_()
            if cached.spans:
                part += _query_gradient(grad, q, k, v, out, sums, cached, ctx.scale)
        return grad_q, grad_k, grad_v, None, None, None


def _query_gradient(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, tile: Tile, scale: float | None
) -> Tensor:
    """The gradient of a tile's queries from keys that need no gradient: 3 of the 5 products."""
    q, grad, keys, values = _queries(q, tile), _queries(grad, tile), _keys(k, tile), _keys(v, tile)
    shape, pairs = q.shape, len(q) * keys.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    delta = (grad * _queries(out, tile)).sum(-1, keepdim=True)

    def by_key_head(x: Tensor) -> Tensor:  # heads that share keys become queries of one
        return x.reshape(pairs, -1, x.shape[-1])

    keys, values = by_key_head(keys), by_key_head(values)
    scores = (by_key_head(q * scale) @ keys.mT).view(*shape[:3], -1)
    if tile.bias is not None:
        scores += tile.bias
    p = scores.sub_(sums[tile.rows, :, tile.queries, None]).exp_()
    slope = (by_key_head(grad) @ values.mT).view_as(p).sub_(delta).mul_(p)
    return (by_key_head(slope) @ keys).mul_(scale).view(shape)


def _cut(tile: Tile, column: int) -> tuple[Tile, Tile]:
    """The tile with its keys before `column`, and with those from it on."""
    before = tuple((begin, min(end, column)) for begin, end in tile.spans if begin < column)
    after = tuple((max(begin, column), end) for begin, end in tile.spans if end > column)
    if tile.bias is None:
        return replace(tile, spans=before), replace(tile, spans=after)
    biases = tile.bias.split([sum(end - begin for begin, end in spans) for spans in (before, after)], dim=-1)
    return replace(tile, spans=before, bias=biases[0]), replace(tile, spans=after, bias=biases[1])


def _like(q: Tensor) -> Tensor:
    """Empty, like q, but in memory ordered (batch, queries, heads, dim), as models read it next."""
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim).transpose(1, 2)


def _queries(x: Tensor, tile: Tile) -> Tensor:
    return x[tile.rows, :, tile.queries]


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """The spans of keys, one after the other; a view if there is only one."""
    parts = [x[tile.key_rows, :, begin:end] for begin, end in tile.spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


# --- which keys a tile of queries needs


def plan(allowed: Tensor, dtype: torch.dtype) -> list[Tile]:
    """Tiles of a whole mask (batch or 1, 1, queries, keys); neighbouring rows with the same mask share theirs."""
    tiles, start = [], 0
    masks = list(allowed[:, 0])
    for _, same in groupby(range(len(masks)), key=_run_number(masks)):
        count = len(list(same))
        rows = slice(start, start + count) if len(masks) > 1 else slice(None)
        tiles += _split(masks[start], 0, rows, rows, dtype)
        start += count
    return tiles


def plan_rows(allowed: Tensor, rows: Tensor, dtype: torch.dtype) -> list[Tile]:
    """Tiles of the queries `rows`, flat indices into (batch, queries), each against the keys of its batch row."""
    queries = allowed.shape[2]
    tiles, start = [], 0
    for row, same in groupby((rows // queries).tolist()):
        count = len(list(same))
        mask = allowed[row if len(allowed) > 1 else 0, 0, rows[start : start + count] % queries]
        tiles += _split(mask, start, slice(None), slice(row, row + 1), dtype)
        start += count
    return tiles


def _run_number(masks: list[Tensor]) -> Any:
    """A key for `groupby` that numbers runs of equal masks."""
    numbers = [0]
    for before, mask in pairwise(masks):
        numbers.append(numbers[-1] + (not torch.equal(before, mask)))
    return numbers.__getitem__


def _split(mask: Tensor, offset: int, rows: slice, key_rows: slice, dtype: torch.dtype) -> list[Tile]:
    """Tiles of one mask (queries, keys) whose first query is number `offset`.

    A query without keys, which is padding in a pass over slots, attends to the first one, so that it stays finite.
    """
    queries, keys = mask.shape
    padded = pad(mask, (0, -keys % _ROUND_TO, 0, -queries % CHUNK))
    grains_of = padded.unflatten(-1, (-1, _ROUND_TO)).any(-1)  # (queries, grains)
    blind = ~grains_of[:queries].any(-1)
    if bool(blind.any()):
        mask = mask.clone()
        mask[blind, 0] = grains_of[:queries][blind, 0] = True
    used = grains_of.unflatten(0, (-1, CHUNK)).any(1)  # (tiles, grains)
    tiles: list[Tile] = []
    first = offset
    for index, grains in enumerate(used.tolist()):
        spans, start = _runs(grains, keys), index * CHUNK
        seen = torch.cat([mask[start : start + CHUNK, begin:end] for begin, end in spans], dim=-1)
        bias = None
        if not bool(seen.all()):
            bias = torch.zeros(1, 1, *seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
        end = offset + start + len(seen)
        if tiles and bias is None and tiles[-1].bias is None and tiles[-1].spans == spans:
            tiles.append(replace(tiles.pop(), queries=slice(first, end)))
        else:
            first = offset + start
            tiles.append(Tile(rows, slice(first, end), key_rows, spans, bias))
    return tiles


def _runs(grains: list[bool], keys: int) -> Spans:
    """Runs of used grains, as spans of keys."""
    runs: list[tuple[int, int]] = []
    for index, used in enumerate(grains):
        if used:
            begin, end = index * _ROUND_TO, min((index + 1) * _ROUND_TO, keys)
            if runs and runs[-1][1] == begin:
                begin = runs.pop()[0]
            runs.append((begin, end))
    return tuple(runs)
