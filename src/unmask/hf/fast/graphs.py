"""Decoding passes compiled for a few fixed shapes; on a GPU each of them is replayed as a CUDA graph.

A pass on slots is a function of tensors: tokens, their layout, the cached length of each slot, the scored rows. Slots,
rows, tokens and scored rows are padded to one of a few numbers, and a pass reads every column of a cache that never
moves, so that few shapes are compiled. Prefills, and passes over only some of the slots, run uncompiled.

Slow twin: the same passes uncompiled; compared in tests/test_compiled.py
(`test_ragged_blocks_equal_those_decoded_plainly`).
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from unmask.core.attention import PADDING, Layout, Pattern
from unmask.core.network import SlotCacheState, slot_keys
from unmask.core.transfer import to_device
from unmask.hf.fast.kv_cache import CacheIndex, Part, SlotCache, SlotMemory, flat_target, round_columns

_SHAPES = 256
"""Shapes that are compiled; later ones run uncompiled. torch's own limit is 8."""
_WIDTH = 8
"""Rows of more than one token are padded to a multiple of this."""


class CompiledPasses:
    """The passes on slots of an `hf.HFNetwork`, compiled: equal logits, up to rounding.

    options: of torch.compile; by default a CUDA graph is recorded on a GPU.
    """

    def __init__(self, network: Any, **options: Any) -> None:
        self.network, self._options = network, options
        self._rows: Tensor | None = None
        self._free: list[tuple[SlotMemory, list[Any]]] = []  # with the layers that lie in it
        self._kind: Any = None  # device and precision of that memory
        self._patterns: dict[Pattern, Pattern | dict[str, Pattern]] = {}  # the same objects, compiled once
        self._shapes = torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES)

    @functools.cached_property
    def _compiled(self) -> tuple[Any, Any]:
        on_gpu = self.network.device.type == "cuda"
        options = self._options or ({"mode": "reduce-overhead"} if on_gpu else {})
        locate = torch.compile(self._locate, dynamic=False, **options)
        return locate, torch.compile(self._run, dynamic=False, **options)

    def new_slots(self, slots: int, columns: int) -> SlotCache:
        """A cache that never moves, in memory that an earlier cache has left if that is large enough."""
        kind = self.network.device, self.network.model.dtype
        if kind != self._kind:
            self._kind, self._free = kind, []
        large = [free for free in self._free if free[0].holds(slots, columns)]
        if large:
            free = min(large, key=lambda free: free[0].room * free[0].capacity)
            self._free[:] = [other for other in self._free if other is not free]
            cache = SlotCache(*free)
            cache.clear()
        else:
            memory = SlotMemory(_power_of_two(slots), round_columns(columns))
            # The new one replaces those that it is large enough for.
            self._free[:] = [free for free in self._free if not memory.holds(free[0].room, free[0].capacity)]
            cache = SlotCache(memory)
        weakref.finalize(cache, _give_back, cache.memory, cache.layers, self._free)
        return cache

    def takes(self, past: SlotCacheState) -> bool:
        """Whether a pass can be compiled: over all slots in order, and then perhaps over some of them again."""
        slots, rows, memory = len(past.lengths), past.rows, past.cache.memory
        if not memory.whole or not memory.holds(slots, past.columns) or past.column is not None:
            return False
        return rows is None or (len(rows) > slots and list(rows[:slots]) == list(range(slots)))

    def __call__(
        self, input_ids: Tensor, layout: Layout, pattern: Pattern, rows: Tensor | None, past: SlotCacheState
    ) -> Tensor:
        """Logits (len(rows), vocabulary) of a pass that `takes` accepts; without rows (batch, length, vocabulary)."""
        network, memory, slots = self.network, past.cache.memory, len(past.lengths)
        (batch, length), again = input_ids.shape, [] if past.rows is None else list(past.rows[slots:])
        room, all_again = min(memory.room, _power_of_two(slots)), again == list(range(slots))
        more = room if all_again else _power_of_two(len(again))  # all slots in order need no copy of the keys
        width = length if length == 1 else -(-length // _WIDTH) * _WIDTH
        if (room + more, width) != (batch, length):
            input_ids, layout = _padded(input_ids, layout, slots, room, more, width)
            if rows is not None:
                row = rows // length
                rows = torch.where(row < slots, row, row + room - slots) * width + rows % length
        scored = None if rows is None else len(rows)
        if rows is not None:
            rows = pad(rows, (0, _padded_count(len(rows), (room + more) * width) - len(rows)))
        slot = torch.tensor([*range(room), *(range(room) if all_again else again + [0] * (more - len(again)))])
        gate = nullcontext() if network.gate is None else network.gate(layout.noisy)
        patterns = self._patterns.setdefault(pattern, network.layer_patterns(pattern))
        locate, forward = self._compiled
        slot, lengths, input_ids = (
            to_device(x, network.device) for x in (slot, pad(past.lengths, (0, room - slots)), input_ids)
        )
        layout, rows = layout.to(network.device), None if rows is None else to_device(rows, network.device)

        with self._shapes, network.attending_to_slots(memory), gate, self._reading(rows):
            torch.compiler.cudagraph_mark_step_begin()
            target, attention_mask = locate(layout, slot, lengths, patterns, memory.capacity)
            parts: list[Part] = [(0, room, None)]
            if more:
                parts.append((room, room + more, None if all_again else slot[room:]))
            memory.slots, memory.index = room, CacheIndex(target, parts, memory.capacity)
            logits: Tensor = forward(input_ids, layout.position, attention_mask, past.cache)
        if scored is not None:
            return logits[:scored].clone()  # a graph's output is overwritten when it runs again
        kept = torch.tensor([*range(slots), *range(room, room + len(again))])
        return logits[to_device(kept, network.device), :length]

    @contextmanager
    def _reading(self, rows: Tensor | None) -> Iterator[None]:
        """Within the context the head runs on these rows only; always the same hook, which is compiled once."""
        self._rows, hook = rows, self.network.head.register_forward_pre_hook(self._pick)
        try:
            yield
        finally:
            self._rows = None
            hook.remove()

    def _locate(
        self, layout: Layout, slot: Tensor, lengths: Tensor, patterns: Pattern | dict[str, Pattern], capacity: int
    ) -> tuple[Tensor, Any]:
        """`CacheIndex.target` and the masks of a pass."""
        column = torch.where(layout.real, layout.position, -1)
        kv = slot_keys(layout, slot, lengths, capacity)
        return flat_target(slot, column, capacity), self.network.make_masks(patterns, layout, kv)

    def _run(self, input_ids: Tensor, position: Tensor, attention_mask: Any, cache: SlotCache) -> Tensor:
        out = self.network.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position,
                                 use_cache=True, **{self.network.cache_keyword: cache})  # fmt: skip
        logits: Tensor = out.logits
        return logits

    def _pick(self, _head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self._rows is None else (args[0].flatten(0, 1)[self._rows],)


def _give_back(memory: SlotMemory, layers: list[Any], free: list[tuple[SlotMemory, list[Any]]]) -> None:
    """Make memory free again, unless no pass has filled all its layers."""
    if memory.whole:
        free.append((memory, layers))


def _padded(input_ids: Tensor, layout: Layout, slots: int, room: int, more: int, width: int) -> tuple[Tensor, Layout]:
    """The pass as (room + more, width): the slots' rows, then the others; padding repeats tokens of the pass."""
    batch, length = input_ids.shape
    source = [*range(slots), *[-1] * (room - slots), *range(slots, batch), *[-1] * (more - batch + slots)]
    row, column = torch.tensor(source)[:, None], torch.arange(width)
    index = row.clamp_min(0), column.clamp_max(length - 1)
    layout = layout.subset(*index)
    padding = (row < 0) | (column >= length)
    on_device = tuple(to_device(x, input_ids.device) for x in index)
    return input_ids[on_device], layout._replace(document=layout.document.masked_fill(padding, PADDING))


def _power_of_two(n: int) -> int:
    """The smallest power of two from n on; 0 for 0."""
    return 0 if n == 0 else 1 << (n - 1).bit_length()


def _padded_count(scored: int, rows: int) -> int:
    """The number of scored rows, rounded up to quarters of all `rows`, but at least to multiples of 64."""
    step = max(64, -(-rows // 4))
    return min(rows, -(-scored // step) * step)
