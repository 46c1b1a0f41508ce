"""Attention patterns: which query attends to which key, as predicates on layouts.

Knows token positions, documents and streams. Knows no model, no tensor of scores and no cache.

Notation: a `Layout` holds the position, document and stream of each token of a pass; a `Pattern` maps the
layouts of queries and keys, broadcast against each other, to True where the query attends to the key.
A predicate reads positions and never indices, so the same one serves packed rows, repeated position ids,
left padding, and queries on top of a cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.weak import WeakIdKeyDictionary

from unmask.core.transfer import to_device

PADDING = -1
"""Document id of padding, a document of its own: padding attends to padding, real tokens never do."""


class Layout(NamedTuple):
    """Position, document and stream of the tokens of a pass; three tensors of one (broadcastable) shape.

    position: int64, index inside the token's document. document: int64, `PADDING` for padding.
    noisy: bool, True in the corrupted stream of a two-stream pass.
    """

    position: Tensor
    document: Tensor
    noisy: Tensor

    @classmethod
    def of(cls, position: Tensor, document: Tensor | None = None, noisy: bool = False) -> Layout:
        """One stream: `position` (batch, length), and `document`, by default 0 everywhere."""
        document = torch.zeros_like(position) if document is None else document
        return cls(position, document, torch.full_like(position, noisy, dtype=torch.bool))

    @property
    def real(self) -> Tensor:
        """True where a token is not padding."""
        return self.document != PADDING

    def subset(self, *index: Any) -> Layout:
        """The same indexing applied to all three tensors."""
        return Layout(*(field[index] for field in self))

    def concat(self, other: Layout) -> Layout:
        """This layout followed by `other` along the last dimension."""
        return Layout(*(torch.cat(pair, dim=-1) for pair in zip(self, other, strict=True)))

    def is_same(self, other: Layout) -> bool:
        """Whether both are the same three tensors: the same layout again, for which a mask may be known."""
        return all(a is b for a, b in zip(self, other, strict=True))

    def to(self, device: torch.device) -> Layout:
        """The layout on `device`; the same tensors again give the same tensors there."""
        if self.position.device == device:
            return self
        return self.cached(device, lambda: Layout(*(to_device(field, device) for field in self)))

    def cached(self, key: Any, make: Callable[[], Layout]) -> Layout:
        """`make()`, called once for this layout and `key`: masks are kept by the identity of a layout's tensors."""
        made = _made.setdefault(self.position, {})
        known = made.get(key)
        if known is None or known[0] is not self.document or known[1] is not self.noisy:
            with torch.inference_mode(False):  # a later pass may learn
                made[key] = known = self.document, self.noisy, make()
        layout: Layout = known[2]
        return layout


_made: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Results of `Layout.cached`, by the position tensor of the layout that they were made from."""


Pattern = Callable[[Layout, Layout], Tensor]
"""(query layout, key layout), broadcastable -> bool tensor, True = the query attends to the key.

A factory of patterns returns the same object for the same arguments: masks are kept by the identity of a pattern."""


def causal(q: Layout, kv: Layout) -> Tensor:
    """A token sees itself and everything before it."""
    return kv.position <= q.position


def bidirectional(q: Layout, kv: Layout) -> Tensor:
    """Everything sees everything."""
    return (q.position == q.position) & (kv.position == kv.position)


@functools.cache
def block_causal(block_size: int) -> Pattern:
    """Causal across blocks [k*B, (k+1)*B), bidirectional inside one (Efficient-DLM 2512.14067, Fig. 2c)."""

    def pattern(q: Layout, kv: Layout) -> Tensor:
        return kv.position // block_size <= q.position // block_size

    return pattern


_NEVER = torch.iinfo(torch.int32).max
"""A position past all others."""


@functools.cache
def two_stream(block_size: int, clean: str = "block_causal", noisy: str = "bidirectional") -> Pattern:
    """[noisy | clean] in one pass (Efficient-DLM 2512.14067, Fig. 2d; Nemotron-Labs 2607.05722).

    noisy -> noisy: the same block (`noisy="causal"`: up to the query, I-DLM 2604.11035, Uno 2609.04010).
    noisy -> clean: strictly earlier blocks. clean -> noisy: never.
    clean -> clean: same or earlier block (`clean="block_causal"`), or strictly causal (`clean="causal"`),
    in which case the clean half is exactly the AR model.
    """
    if clean not in ("block_causal", "causal"):
        raise ValueError(f"clean attention {clean!r} is unknown: use 'block_causal' or 'causal'")
    noisy_to_noisy = _inside_block(noisy)

    def pattern(q: Layout, kv: Layout) -> Tensor:
        q_block, kv_block = q.position // block_size, kv.position // block_size
        # Work per token is cheap beside work per pair, of which two comparisons are left.
        clean_end = q.position + 1 if clean == "causal" else (q_block + 1) * block_size
        end = torch.where(q.noisy, q_block * block_size, clean_end)  # the first clean position that is hidden
        to_clean = torch.where(kv.noisy, _NEVER, kv.position) < end
        in_block = torch.where(kv.noisy, kv_block, -1) == torch.where(q.noisy, q_block, -2)
        if noisy_to_noisy is not bidirectional:
            in_block = in_block & noisy_to_noisy(q, kv)
        return to_clean | in_block

    return pattern


def annealed(opened: Tensor) -> Pattern:
    """Causal, plus the future positions that `opened` opens (DiffuLLaMA 2410.17891, section 3.3).

    opened: (length, length) bool, indexed [query position, key position] inside a document; entries on and
    below the diagonal change nothing. One matrix serves all rows, documents, heads and layers.
    """

    def pattern(q: Layout, kv: Layout) -> Tensor:
        return (kv.position <= q.position) | opened[q.position, kv.position]

    return pattern


@functools.cache
def drafting(noisy: str = "bidirectional") -> Pattern:
    """One noisy block that starts anywhere, after its clean tokens.

    clean -> clean: causal, the AR model. noisy -> clean: all. noisy -> noisy: all, or up to the query.
    The same as `two_stream(B, "causal", noisy)` for a block that starts at a multiple of B.
    """
    noisy_to_noisy = _inside_block(noisy)

    def pattern(q: Layout, kv: Layout) -> Tensor:
        return (~kv.noisy & causal(q, kv)) | (kv.noisy & q.noisy & noisy_to_noisy(q, kv))

    return pattern


def _inside_block(noisy: str) -> Pattern:
    if noisy not in ("bidirectional", "causal"):
        raise ValueError(f"noisy attention {noisy!r} is unknown: use 'bidirectional' or 'causal'")
    return causal if noisy == "causal" else bidirectional


def same_document(q: Layout, kv: Layout) -> Tensor:
    """Packed documents never see each other, and nothing sees padding but padding."""
    return q.document == kv.document


@functools.cache
def window(size: int) -> Pattern:
    """A sliding window of `size` tokens, measured on positions in both directions."""

    def pattern(q: Layout, kv: Layout) -> Tensor:
        return (q.position - kv.position).abs() < size

    return pattern


@functools.cache
def chunk(size: int) -> Pattern:
    """The chunk [k*C, (k+1)*C) of positions that a token lies in (Llama 4's chunked attention)."""

    def pattern(q: Layout, kv: Layout) -> Tensor:
        return q.position // size == kv.position // size

    return pattern


def intersect(*patterns: Pattern) -> Pattern:
    """True where every pattern is."""

    def pattern(q: Layout, kv: Layout) -> Tensor:
        allowed = patterns[0](q, kv)
        for other in patterns[1:]:
            allowed = allowed & other(q, kv)
        return allowed

    return pattern


def dense(pattern: Pattern, q: Layout, kv: Layout) -> Tensor:
    """The pattern as a bool tensor (batch, queries, keys), True = attend."""
    q, kv = (Layout(x.position.int(), x.document.int(), x.noisy) for x in (q, kv))  # half the memory traffic
    return pattern(q.subset(..., slice(None), None), kv.subset(..., None, slice(None)))


def block_mask(pattern: Pattern, q: Layout, kv: Layout, *, compiled: bool | None = None) -> BlockMask:
    """The pattern as FlexAttention's BlockMask, for (batch, queries) against (batch, keys).

    compiled: by default on a GPU. The pairs of tokens are then never in memory, and a new layout compiles nothing: the
    first one of a pattern does, and the first of other lengths.
    """

    def mask_mod(b: Tensor, _h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return pattern(q.subset(b, q_idx), kv.subset(b, kv_idx))

    (batch, queries), keys = q.position.shape, kv.position.shape[1]
    device = q.position.device
    create = _compiled() if compiled or (compiled is None and device.type == "cuda") else create_block_mask
    with torch._dynamo.config.patch(recompile_limit=_KINDS):
        return create(mask_mod, batch, None, queries, keys, device=str(device))


_KINDS = 64
"""Patterns and kinds of lengths for which `create_block_mask` is compiled, at most; beyond them it runs as it is."""


@functools.cache
def _compiled() -> Callable[..., BlockMask]:
    """`create_block_mask`, compiled at its first call."""
    compiled: Callable[..., BlockMask] = torch.compile(create_block_mask)
    return compiled
