"""A key-value cache for rows that stand at different places, and attention on top of it.

One buffer a layer, (slots, columns, heads, dim): a row that is being decoded has a slot, and its token at
position p stands in column p. So rows advance by different amounts, are retracted by not counting columns, and
leave or join without touching the others; writing is a copy in place, and the buffer grows in steps of `GRAIN`
columns. A pass may hold several rows of one slot: all of them write before any of them reads, layer by layer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from unmask.core.transfer import to_device
from unmask.hf.fast.chunked import CHUNK, chunked_attention

GRAIN = 256
"""Columns by which the buffers grow."""

SLOTS = "unmask_slots"
"""Name of the attention below in transformers' table."""

Part = tuple[int, int, Tensor | None]
"""Rows begin..end of a pass and the slots they belong to, None for all slots in order."""


@dataclass
class CacheIndex:
    """Slots and columns of one pass: flat (slot, column) of each token, the parts of its rows, the columns it reads."""

    target: Tensor
    parts: list[Part]
    columns: int
    additive: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Additive form of each boolean mask, keyed by address; the mask is stored too so the address stays valid."""
    written: bool = False
    """Whether a layer has written keys and values; not set by compiled passes, which follow a pass that does."""


@dataclass
class SlotMemory:
    """What the layers of a cache share, and the layers themselves: all that outlives the cache.

    room, capacity: slots and columns that have memory, or will have with the first pass; more are added when needed.
    slots: those in use. gathers: hand the model the keys of each row instead of those of each slot, for attention that
    knows no slots. index: that of the present pass. whole: a pass has gone through all layers.
    """

    room: int = 0
    capacity: int = 0
    slots: int = 0
    gathers: bool = True
    index: CacheIndex | None = None
    whole: bool = False
    layers: list[Any] = field(default_factory=list)

    def holds(self, slots: int, columns: int) -> bool:
        """Whether there is memory for so many."""
        return self.room >= slots and self.capacity >= columns

    def clear(self) -> None:
        """Forget everything: what is masked out weighs 0, but 0 times what is not finite is not 0."""
        for layer in self.layers:
            layer.keys.zero_(), layer.values.zero_()


class SlotCache(Cache):
    """transformers' cache interface over slots; `locate` comes before each pass."""

    def __init__(self, memory: SlotMemory | None = None) -> None:
        self.memory = memory = memory or SlotMemory()
        super().__init__(layer_class_to_replicate=functools.partial(_SlotLayer, memory))
        self.layers = memory.layers

    def locate(
        self, rows: Sequence[int] | None, column: Tensor, columns: int, slots: int, device: torch.device
    ) -> CacheIndex:
        """Say which slots and columns the next pass writes and reads.

        rows: slot of each row of the pass, None for row i in slot i. column: (rows, length) on the host, -1 for
        tokens that nothing will read. columns: how many of them the pass sees. device: the model's.
        """
        memory = self.memory
        if columns > memory.capacity:
            memory.capacity = round_columns(columns)
        slot = torch.arange(slots) if rows is None else torch.tensor(rows)
        target = to_device(flat_target(slot, column, memory.capacity), device)
        place = CacheIndex(target, _parts(rows, slots, device), columns)
        memory.slots, memory.index = slots, place
        return place

    def keep_slots(self, keep: Tensor) -> None:
        """Keep these slots, in this order."""
        for layer in self.layers:
            layer.keep_slots(keep)

    @property
    def is_compileable(self) -> bool:
        return False


def round_columns(columns: int) -> int:
    """The number of columns rounded up to a multiple of `GRAIN`."""
    return -(-columns // GRAIN) * GRAIN


def flat_target(slot: Tensor, column: Tensor, capacity: int) -> Tensor:
    """Index into the flattened slots of each token: slot (rows,), column (rows, length), -1 for what nothing reads."""
    column = torch.where(column < 0, capacity, column)  # one column more than is ever read
    return (slot[:, None] * (capacity + 1) + column).flatten()


def _parts(rows: Sequence[int] | None, slots: int, device: torch.device) -> list[Part]:
    """Runs of rows that are all slots in order, which need no copy of the keys; and what is left."""
    if rows is None:
        return [(0, slots, None)]
    parts: list[Part] = []
    every, begin = list(range(slots)), 0
    while begin < len(rows) and list(rows[begin : begin + slots]) == every:
        parts.append((begin, begin + slots, None))
        begin += slots
    if begin < len(rows):
        parts.append((begin, len(rows), to_device(torch.tensor(list(rows[begin:])), device)))
    return parts


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, memory: SlotMemory) -> None:
        super().__init__()
        self.memory = memory

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots, columns = max(self.memory.room, self.memory.slots), self.memory.capacity + 1
        with torch.inference_mode(False), torch.no_grad():  # it may outlive the mode in which it is made
            self.keys, self.values = (
                self._standing(x.new_zeros(slots, columns, x.shape[1], x.shape[3])) for x in (key_states, value_states)
            )
        self.is_initialized = True

    def _standing(self, buffer: Tensor) -> Tensor:
        """A buffer that a CUDA graph may write to, where the cache has its memory from the start."""
        if self.memory.room:
            torch._dynamo.mark_static_address(buffer, guard=False)
        return buffer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values (rows, heads, length, dim); return those that it sees."""
        memory = self.memory
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[1] <= memory.capacity:
            more = (0, 0, 0, 0, 0, memory.capacity + 1 - self.keys.shape[1])
            with torch.inference_mode(False), torch.no_grad():
                self.keys, self.values = (
                    self._standing(torch.nn.functional.pad(x, more)) for x in (self.keys, self.values)
                )
        assert memory.index is not None
        if not torch.compiler.is_compiling():
            memory.index.written = True
        return self._put(self.keys, key_states, memory.index), self._put(self.values, value_states, memory.index)

    def _put(self, buffer: Tensor, new: Tensor, place: CacheIndex) -> Tensor:
        new = new.detach() if new.requires_grad else new
        buffer.flatten(0, 1).index_copy_(0, place.target, new.transpose(1, 2).flatten(0, 1))
        seen = buffer[: self.memory.slots, : place.columns].transpose(1, 2)
        if not self.memory.gathers or (len(place.parts) == 1 and place.parts[0][2] is None):
            return seen
        return torch.cat([seen if index is None else seen[index] for _, _, index in place.parts])

    def keep_slots(self, keep: Tensor) -> None:
        if self.is_initialized:
            for buffer in (self.keys, self.values):  # in place, so that addresses stay what they are
                buffer[: len(keep)] = buffer[to_device(keep, buffer.device)]

    def get_seq_length(self) -> int:
        now = self.memory.index
        return now.columns if self.is_initialized and now is not None else 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


# --- attention


@contextmanager
def using_index(config: Any, place: CacheIndex) -> Iterator[None]:
    """Within the context `slot_attention` in models of this configuration reads the keys of this pass's slots.

    The configuration is what the attention of a model can see of its surroundings; compilers cannot follow a
    context variable.
    """
    config.unmask_cache_index = place
    try:
        yield
    finally:
        del config.unmask_cache_index


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of rows (rows, heads, length, dim) to slots (slots, key heads, columns, dim).

    attention_mask: bool (rows, 1, length, columns), or a single True where everything is seen. Under the signature
    that transformers' models call.
    """
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported in decoding: set it to 0")
    place: CacheIndex = module.config.unmask_cache_index
    compiling = torch.compiler.is_compiling()
    long = query.device.type == "cpu" and query.shape[2] >= 2 * CHUNK and attention_mask.numel() > 1 and not compiling
    out = []
    for begin, end, index in place.parts:
        q, mask = query[begin:end], attention_mask[begin:end] if attention_mask.numel() > 1 else None
        k, v = (key, value) if index is None else (key[index], value[index])
        if long:
            assert mask is not None
            out.append(chunked_attention(q, k, v, mask, scaling))
        else:
            out.append(_grouped(q, k, v, None if mask is None else _additive(mask, begin, q, k, place), scaling))
    joined = out[0] if len(out) == 1 else torch.cat(out)
    return joined.transpose(1, 2).contiguous(), None


def _grouped(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scaling: float | None) -> Tensor:
    """The query heads that share a key head become queries of that head: keys and values need no copies."""
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return scaled_dot_product_attention(folded, k, v, attn_mask=added, scale=scaling).reshape(*q.shape[:3], v.shape[3])


def _additive(mask: Tensor, begin: int, q: Tensor, k: Tensor, place: CacheIndex) -> Tensor:
    """The mask as it is added to the scores of `_grouped`, made once for the layers of a pass."""

    def added() -> Tensor:
        hidden = torch.finfo(q.dtype).min  # finite: what padding computes must not become NaN
        zeros = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        return zeros.masked_fill_(~mask, hidden).repeat(1, 1, q.shape[1] // k.shape[1], 1)

    if torch.compiler.is_compiling():  # which finds by itself what is the same in all layers
        return added()
    key = begin, q.dtype, mask.data_ptr()
    if key not in place.additive:
        place.additive[key] = mask, added()
    return place.additive[key][1]


AttentionInterface.register(SLOTS, slot_attention)
