"""Decoding passes compiled for a few fixed shapes; on a GPU each of them is replayed as a CUDA graph.

A pass on slots is a function of tensors: tokens, where they stand, how much of each slot is cached, which rows are
scored. Slots, rows, tokens and scored rows are filled up to one of a few numbers with padding, and a pass reaches
every column of a cache that never moves, so few shapes are ever compiled. Prefills, and passes over only some of the
slots, run as they are.
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
from unmask.hf.fast.kv_cache import CacheIndex, Part, SlotCache, SlotMemory, flat_target, round_columns, using_index
from unmask.hf.layers import plain_layers

_SHAPES = 256
"""Shapes to compile before going on without; torch's own limit is 8."""
_WIDTH = 8
"""Tokens of a row are filled up to a multiple of this, where there is more than one."""


class CompiledPasses:
    """What an `hf.HFNetwork` does with a pass on slots, compiled: equal logits, up to rounding.

    options: of torch.compile; by default a CUDA graph is recorded on a GPU.
    """

    def __init__(self, network: Any, **options: Any) -> None:
        self.network, self._options = network, options
        self._rows: Tensor | None = None
        self._free: list[SlotMemory] = []
        self._kind: Any = None  # what that memory was made for
        self._patterns: dict[Pattern, Pattern | dict[str, Pattern]] = {}  # the same functions again, so no new shapes
        self._shapes = torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES)

    @functools.cached_property
    def _compiled(self) -> tuple[Any, Any]:
        on_gpu = self.network.device.type == "cuda"
        options = self._options or ({"mode": "reduce-overhead"} if on_gpu else {})
        where = torch.compile(self._place, dynamic=False, **options)
        return where, torch.compile(self._run, dynamic=False, **options)

    def new_slots(self, slots: int, columns: int) -> SlotCache:
        """A cache that never moves, in memory that another one has left where that is large enough."""
        kind = self.network.device, self.network.model.dtype
        if kind != self._kind:
            self._kind, self._free = kind, []
        large = [memory for memory in self._free if memory.holds(slots, columns)]
        memory = min(large, key=lambda m: m.room * m.capacity, default=None)
        if memory is None:
            memory = SlotMemory(_power_of_two(slots), round_columns(columns))
            self._free[:] = [m for m in self._free if not memory.holds(m.room, m.capacity)]  # it serves for those
        else:
            self._free.remove(memory)
            memory.clear()
        cache = SlotCache(memory)
        weakref.finalize(cache, _give_back, memory, self._free)
        return cache

    def takes(self, past: SlotCacheState) -> bool:
        """Whether a pass is over all slots in order, and perhaps over some of them once more."""
        slots, rows, memory = len(past.lengths), past.rows, past.cache.memory
        if not memory.whole or not memory.holds(slots, past.columns):
            return False
        return rows is None or (len(rows) > slots and list(rows[:slots]) == list(range(slots)))

    def __call__(
        self, input_ids: Tensor, layout: Layout, pattern: Pattern, rows: Tensor | None, past: SlotCacheState
    ) -> Tensor:
        """Logits (len(rows), vocabulary) of a pass that it takes; without rows (batch, length, vocabulary)."""
        network, memory, slots = self.network, past.cache.memory, len(past.lengths)
        (batch, length), again = input_ids.shape, [] if past.rows is None else list(past.rows[slots:])
        room, everyone = min(memory.room, _power_of_two(slots)), again == list(range(slots))
        more = room if everyone else _power_of_two(len(again))  # everyone needs no copy of the keys
        width = length if length == 1 else -(-length // _WIDTH) * _WIDTH
        if (room + more, width) != (batch, length):
            input_ids, layout = _filled_up(input_ids, layout, slots, room, more, width)
            if rows is not None:
                row = rows // length
                rows = torch.where(row < slots, row, row + room - slots) * width + rows % length
        scored = None if rows is None else len(rows)
        if rows is not None:
            rows = pad(rows, (0, _scored(len(rows), (room + more) * width) - len(rows)))
        slot = torch.tensor([*range(room), *(range(room) if everyone else again + [0] * (more - len(again)))])
        gate = nullcontext() if network.gate is None else network.gate(layout.noisy)
        patterns = self._patterns.setdefault(pattern, network.patterns(pattern))
        where, forward = self._compiled
        slot, lengths, input_ids = (
            to_device(x, network.device) for x in (slot, pad(past.lengths, (0, room - slots)), input_ids)
        )
        layout, rows = layout.to(network.device), None if rows is None else to_device(rows, network.device)

        with self._shapes, network.slot_attention(memory), plain_layers(network.model), gate, self._reading(rows):
            torch.compiler.cudagraph_mark_step_begin()
            target, attention_mask = where(layout, slot, lengths, patterns, memory.capacity)
            parts: list[Part] = [(0, room, None)]
            if more:
                parts.append((room, room + more, None if everyone else slot[room:]))
            memory.slots, memory.index = room, CacheIndex(target, parts, memory.capacity)
            with using_index(network.config, memory.index):
                logits: Tensor = forward(input_ids, layout.position, attention_mask, past.cache)
        if scored is not None:
            return logits[:scored].clone()  # a graph's output is overwritten when it runs again
        kept = torch.tensor([*range(slots), *range(room, room + len(again))])
        return logits[to_device(kept, network.device), :length]

    @contextmanager
    def _reading(self, rows: Tensor | None) -> Iterator[None]:
        """Within the context the head runs on these rows only; one hook for all, since a compiler looks at it once."""
        self._rows, hook = rows, self.network.head.register_forward_pre_hook(self._pick)
        try:
            yield
        finally:
            self._rows = None
            hook.remove()

    def _place(
        self, layout: Layout, slot: Tensor, lengths: Tensor, patterns: Pattern | dict[str, Pattern], capacity: int
    ) -> tuple[Tensor, Any]:
        column = torch.where(layout.real, layout.position, -1)
        kv = slot_keys(layout, slot, lengths, capacity)
        return flat_target(slot, column, capacity), self.network.form(patterns, layout, kv)

    def _run(self, input_ids: Tensor, position: Tensor, attention_mask: Any, cache: SlotCache) -> Tensor:
        out = self.network.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position,
                                 use_cache=True, **{self.network.cache_keyword: cache})  # fmt: skip
        logits: Tensor = out.logits
        return logits

    def _pick(self, _head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self._rows is None else (args[0].flatten(0, 1)[self._rows],)


def _give_back(memory: SlotMemory, free: list[SlotMemory]) -> None:
    """Half-made memory, of a pass that failed, is of no use."""
    if memory.whole:
        free.append(memory)


def _filled_up(
    input_ids: Tensor, layout: Layout, slots: int, room: int, more: int, width: int
) -> tuple[Tensor, Layout]:
    """(room + more, width): the slots' rows, then the others, each filled up with padding that repeats the last."""
    batch, length = input_ids.shape
    source = [*range(slots), *[-1] * (room - slots), *range(slots, batch), *[-1] * (more - batch + slots)]
    row, column = torch.tensor(source)[:, None], torch.arange(width)
    index = row.clamp_min(0), column.clamp_max(length - 1)
    layout = layout.subset(*index)
    filler = (row < 0) | (column >= length)
    there = tuple(to_device(x, input_ids.device) for x in index)
    return input_ids[there], layout._replace(document=layout.document.masked_fill(filler, PADDING))


def _power_of_two(n: int) -> int:
    """The smallest that is not below n; 0 for none."""
    return 0 if n == 0 else 1 << (n - 1).bit_length()


def _scored(rows: int, whole: int) -> int:
    """Up to a quarter of all rows, a half, ...; all of few."""
    grain = max(64, -(-whole // 4))
    return min(whole, -(-rows // grain) * grain)
