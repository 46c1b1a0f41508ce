"""A key-value cache for rows of different lengths, and attention on top of it.

One buffer for each layer, (slots, columns, heads, dim): a row that is being decoded has a slot, whose column p holds
its token at position p. So rows advance by different amounts, are cut back by counting fewer columns, and leave or
join without touching the others; writing is a copy in place, and the buffer grows in steps of `GRAIN` columns. A pass
may hold several rows of one slot: in each layer all of them write before any of them reads.

Slow twin: one pass over the whole text of each row, without a cache; compared in tests/test_slots.py
(`test_rows_on_ragged_slots_equal_whole_texts`).
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
"""Name of `slot_attention` among transformers' attention functions."""

Part = tuple[int, int, Tensor | None]
"""Rows begin .. end - 1 of a pass and their slots, None for all slots in order, each as many times in a row as fit."""


@dataclass
class CacheIndex:
    """What a pass writes and reads of a cache.

    target: (tokens,), where each token is written, an index into the flattened (slots, columns). parts: the slots of
    its rows. columns: how many it reads.
    """

    target: Tensor
    parts: list[Part]
    columns: int
    additive: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Additive form of each boolean mask, keyed by address; the mask is stored too so the address stays valid."""
    written: bool = False
    """Whether a layer has written keys and values; compiled passes, which follow an uncompiled one, do not set it."""


@dataclass
class SlotMemory:
    """What the layers of a cache share. It does not hold them: a circle would keep the keys until Python looks for it.

    room, capacity: slots and columns that have memory, or will have with the first pass; more are added when needed.
    slots: those in use. gathers: give the model the keys of each row instead of those of each slot, for attention that
    knows no slots. index: that of the present pass. whole: a pass has gone through all layers.
    """

    room: int = 0
    capacity: int = 0
    slots: int = 0
    gathers: bool = True
    index: CacheIndex | None = None
    whole: bool = False

    def holds(self, slots: int, columns: int) -> bool:
        """Whether there is memory for this many slots and columns."""
        return self.room >= slots and self.capacity >= columns


class SlotCache(Cache):
    """transformers' cache interface over slots; `locate` comes before each pass.

    layers: those that an earlier cache has left, with their `memory`, to be used again.
    """

    def __init__(self, memory: SlotMemory | None = None, layers: list[Any] | None = None) -> None:
        self.memory = memory = memory or SlotMemory()
        super().__init__(layer_class_to_replicate=functools.partial(_SlotLayer, memory))
        self.layers = [] if layers is None else layers

    def locate(
        self, rows: Sequence[int] | None, column: Tensor, columns: int, slots: int, device: torch.device
    ) -> CacheIndex:
        """The index of the next pass, also kept in `memory`.

        rows: slot of each row of the pass, None for row i in slot i. column: (rows, length) on the host, -1 for
        tokens that nothing will read. columns: how many the pass reads. device: the model's.
        """
        memory = self.memory
        if columns > memory.capacity:
            memory.capacity = round_columns(columns)
        slot = torch.arange(slots) if rows is None else torch.tensor(rows)
        target = to_device(flat_target(slot, column, memory.capacity), device)
        memory.slots, memory.index = slots, CacheIndex(target, _parts(rows, slots, device), columns)
        return memory.index

    def keep_slots(self, keep: Tensor) -> None:
        """Keep these slots, in this order; one that is named twice becomes two."""
        for layer in self.layers:
            layer.keep_slots(keep)

    def clear(self) -> None:
        """Set all keys and values to 0: masked ones have weight 0, but 0 times NaN or infinity is NaN."""
        for layer in self.layers:
            for buffer in layer.buffers():
                buffer.zero_()

    @property
    def is_compileable(self) -> bool:
        return False


def round_columns(columns: int) -> int:
    """The number of columns rounded up to a multiple of `GRAIN`."""
    return -(-columns // GRAIN) * GRAIN


def flat_target(slot: Tensor, column: Tensor, capacity: int) -> Tensor:
    """`CacheIndex.target` of tokens in slot (rows,) and column (rows, length), -1 for tokens that nothing reads."""
    column = torch.where(column < 0, capacity, column)  # a spare column that is never read
    return (slot[:, None] * (capacity + 1) + column).flatten()


def _parts(rows: Sequence[int] | None, slots: int, device: torch.device) -> list[Part]:
    """Runs of rows that are all slots in order, which need no copy of the keys; then the other rows.

    A pass with branches has every slot as many times, one after the other: their rows become queries of one.
    """
    if rows is None or list(rows) == [slot for slot in range(slots) for _ in range(len(rows) // slots)]:
        return [(0, slots if rows is None else len(rows), None)]
    parts: list[Part] = []
    every, begin = list(range(slots)), 0
    while begin < len(rows) and list(rows[begin : begin + slots]) == every:
        parts.append((begin, begin + slots, None))
        begin += slots
    if begin < len(rows):
        parts.append((begin, len(rows), to_device(torch.tensor(list(rows[begin:])), device)))
    return parts


def _kept(buffer: Tensor, keep: Tensor) -> Tensor:
    """The buffer with these slots: the same one, so that addresses do not change, unless they need more room."""
    kept = buffer[to_device(keep, buffer.device)]
    if len(keep) > len(buffer):
        return kept
    buffer[: len(keep)] = kept
    return buffer


class _SlotLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, memory: SlotMemory) -> None:
        super().__init__()
        self.memory = memory
        self.indexed: Tensor | None = None
        """What the indexer of sparse attention keeps (DeepSeek V3.2), if the layer has one."""

    def buffers(self) -> list[Tensor]:
        """Those that have memory, each (slots, columns, heads, dim)."""
        of_layer = [self.keys, self.values] if self.is_initialized else []
        return of_layer if self.indexed is None else [*of_layer, self.indexed]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._grown(None, key_states), self._grown(None, value_states)
        self.is_initialized = True

    def _grown(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        """A buffer for what is like `new` (rows, heads, length, dim), or the one there is with columns for all tokens.

        It is marked for CUDA graphs to write to where the cache has its memory from the start.
        """
        slots, columns = max(self.memory.room, self.memory.slots), self.memory.capacity + 1
        with torch.inference_mode(False), torch.no_grad():  # the memory may outlive the mode
            if buffer is None:
                buffer = new.new_zeros(slots, columns, new.shape[1], new.shape[3])
            else:
                buffer = torch.nn.functional.pad(buffer, (0, 0, 0, 0, 0, columns - buffer.shape[1]))
        if self.memory.room:
            torch._dynamo.mark_static_address(buffer, guard=False)
        return buffer

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values (rows, heads, length, dim); return those that it reads."""
        memory = self.memory
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.shape[1] <= memory.capacity:
            self.keys, self.values = self._grown(self.keys, key_states), self._grown(self.values, value_states)
        assert memory.index is not None
        if not torch.compiler.is_compiling():
            memory.index.written = True
        index, gathers = memory.index, memory.gathers
        return self._put(self.keys, key_states, index, gathers), self._put(self.values, value_states, index, gathers)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Write what the indexer keeps of a pass, (rows, length, dim); return that of each row's slot, whole."""
        new, memory = indexer_key_states[:, None], self.memory
        if self.indexed is None or self.indexed.shape[1] <= memory.capacity:
            self.indexed = self._grown(self.indexed, new)
        assert memory.index is not None
        return self._put(self.indexed, new, memory.index, gathers=True)[:, 0]

    def _put(self, buffer: Tensor, new: Tensor, index: CacheIndex, gathers: bool) -> Tensor:
        new = new.detach() if new.requires_grad else new
        buffer.flatten(0, 1).index_copy_(0, index.target, new.transpose(1, 2).flatten(0, 1))
        seen = buffer[: self.memory.slots, : index.columns].transpose(1, 2)
        if not gathers:
            return seen
        # A copy even of all slots in order: some models read keys in the order of memory that their own would have.
        return torch.cat(
            [
                seen.repeat_interleave((end - begin) // len(seen), 0) if slots is None else seen[slots]
                for begin, end, slots in index.parts
            ]
        )

    def keep_slots(self, keep: Tensor) -> None:
        """Keep these slots, in this order; one that is named twice becomes two."""
        if self.is_initialized:
            self.keys, self.values = _kept(self.keys, keep), _kept(self.values, keep)
        if self.indexed is not None:
            self.indexed = _kept(self.indexed, keep)

    def get_seq_length(self) -> int:
        index = self.memory.index
        return index.columns if self.is_initialized and index is not None else 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


# --- attention


@contextmanager
def using_slots(config: Any, memory: SlotMemory, *, direct: bool) -> Iterator[None]:
    """Within the context models of this configuration attend to the slots of `memory`.

    direct: by `slot_attention`; else by their own attention, to keys gathered for each row. The memory is put on the
    configuration because attention functions can read that, and compilers cannot follow a context variable.
    """
    before = config._attn_implementation
    memory.gathers, config.unmask_slots = not direct, memory
    if direct:
        config._attn_implementation = SLOTS
    try:
        yield
    finally:
        config._attn_implementation = before
        del config.unmask_slots


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

    attention_mask: bool (rows, 1, length, columns), or a single True where every query attends to all keys. Its
    signature is that of transformers' attention functions.
    """
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported in decoding: set it to 0")
    index: CacheIndex = module.config.unmask_slots.index
    out = []
    for begin, end, slots in index.parts:
        q, mask = query[begin:end], attention_mask[begin:end] if attention_mask.numel() > 1 else None
        k, v = (key, value) if slots is None else (key[slots], value[slots])
        branches = len(q) // len(k)
        if branches > 1:
            q, mask = _folded(q, branches), None if mask is None else mask.reshape(len(k), 1, -1, mask.shape[-1])
        long = q.device.type == "cpu" and q.shape[2] >= 2 * CHUNK and not torch.compiler.is_compiling()
        if long and mask is not None:
            part = chunked_attention(q, k, v, mask, scaling)
        else:
            part = _grouped(q, k, v, None if mask is None else _additive(mask, begin, q, k, index), scaling)
        out.append(_unfolded(part, branches) if branches > 1 else part)
    joined = out[0] if len(out) == 1 else torch.cat(out)
    return joined.transpose(1, 2).contiguous(), None


def _folded(q: Tensor, branches: int) -> Tensor:
    """(slots * branches, heads, length, dim) as queries of the slots, (slots, heads, branches * length, dim)."""
    return q.unflatten(0, (-1, branches)).transpose(1, 2).flatten(2, 3)


def _unfolded(out: Tensor, branches: int) -> Tensor:
    """The inverse of `_folded`."""
    return out.unflatten(2, (branches, -1)).transpose(1, 2).flatten(0, 1)


def _grouped(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None, scaling: float | None) -> Tensor:
    """Attention where query heads that share a key head become queries of that head: keys need no copies."""
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return scaled_dot_product_attention(folded, k, v, attn_mask=added, scale=scaling).reshape(*q.shape[:3], v.shape[3])


def _additive(mask: Tensor, begin: int, q: Tensor, k: Tensor, index: CacheIndex) -> Tensor:
    """The mask as `_grouped` adds it to scores, made once for all layers of a pass."""

    def added() -> Tensor:
        hidden = torch.finfo(q.dtype).min  # finite: rows of padding must not become NaN
        zeros = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        return zeros.masked_fill_(~mask, hidden).repeat(1, 1, q.shape[1] // k.shape[1], 1)

    if torch.compiler.is_compiling():  # compilers find by themselves what is equal in all layers
        return added()
    key = begin, q.dtype, mask.data_ptr()
    if key not in index.additive:
        index.additive[key] = mask, added()
    return index.additive[key][1]


AttentionInterface.register(SLOTS, slot_attention)
