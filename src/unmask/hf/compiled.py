"""Decoding passes compiled for a few fixed shapes; on a GPU each of them is replayed as a CUDA graph.

A pass on slots is a function of tensors: tokens, where they stand, how much of each slot is cached, which rows are
scored. Slots, rows, tokens and scored rows are filled up to one of a few numbers with padding, and a pass reaches
every column of a cache that never moves, so few shapes are ever compiled. Prefills, and passes over only some of the
slots, run as they are.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from unmask.attention import PADDING, Layout, Pattern
from unmask.denoiser import Prefix, slot_keys
from unmask.slots import Part, Place, SlotCache, SlotMemory, flat_target, grained, placed
from unmask.transfer import to_device

_SHAPES = 256
"""Shapes to compile before going on without; torch's own limit is 8."""
_WIDTH = 8
"""Tokens of a row are filled up to a multiple of this, where there is more than one."""


class CompiledPasses:
    """What an `hf.HFNetwork` does with a pass on slots, compiled: equal logits, up to rounding.

    options: of torch.compile; by default a CUDA graph is recorded on a GPU.
    """

    def __init__(self, network: Any, **options: Any) -> None:
        if not options and network.device.type == "cuda":
            options = {"mode": "reduce-overhead"}
        self.network = network
        self._where = torch.compile(self._place, dynamic=False, **options)
        self._forward = torch.compile(self._run, dynamic=False, **options)
        self._rows: Tensor | None = None
        self._free: list[SlotMemory] = []
        self._patterns: dict[Pattern, Pattern | dict[str, Pattern]] = {}  # the same functions again, so no new shapes
        self.hook = network.head.register_forward_pre_hook(self._pick)

    def new_slots(self, slots: int, columns: int) -> SlotCache:
        """A cache that never moves, in memory that another one has left where that is large enough."""
        large = [m for m in self._free if m.room >= slots and m.capacity >= columns]
        memory = min(large, key=lambda m: m.room * m.capacity, default=None)
        if memory is None:
            memory = SlotMemory(_power_of_two(slots), grained(columns))
        else:
            self._free.remove(memory)
        cache = SlotCache(memory)
        weakref.finalize(cache, self._free.append, memory)
        return cache

    def takes(self, past: Prefix) -> bool:
        """Whether a pass is over all slots in order, and perhaps over some of them once more."""
        slots, rows, memory = len(past.lengths), past.rows, past.cache.memory
        if not memory.layers or memory.room < slots or memory.capacity < past.columns:
            return False
        return rows is None or (len(rows) > slots and list(rows[:slots]) == list(range(slots)))

    def __call__(
        self, input_ids: Tensor, layout: Layout, pattern: Pattern, rows: Tensor | None, past: Prefix
    ) -> Tensor:
        """Logits (len(rows), vocabulary) of a pass that it takes; without rows (batch, length, vocabulary)."""
        memory, slots, device = past.cache.memory, len(past.lengths), self.network.device
        (batch, length), again = input_ids.shape, [] if past.rows is None else list(past.rows[slots:])
        room, more = min(memory.room, _power_of_two(slots)), _power_of_two(len(again))
        everyone = again == list(range(slots))  # who needs no copy of the keys
        more = room if everyone else more
        width = length if length == 1 else -(-length // _WIDTH) * _WIDTH
        if (room + more, width) != (batch, length):
            input_ids, layout = _filled_up(input_ids, layout, slots, room, more, width)
            if rows is not None:
                row = rows // length
                rows = torch.where(row < slots, row, row + room - slots) * width + rows % length
        scored = None if rows is None else len(rows)
        if rows is not None:
            rows = pad(rows, (0, _scored(len(rows), (room + more) * width) - len(rows)))
        slot = [*range(room), *(range(room) if everyone else again + [0] * (more - len(again)))]
        gate = nullcontext() if self.network.gate is None else self.network.gate(layout.noisy)
        slots_of, lengths = (to_device(x, device) for x in (torch.tensor(slot), pad(past.lengths, (0, room - slots))))
        input_ids, layout = to_device(input_ids, device), layout.to(device)
        rows = None if rows is None else to_device(rows, device)

        patterns = self._patterns.setdefault(pattern, self.network.patterns(pattern))
        shapes = torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES)
        with shapes, self.network.slot_attention(memory), gate:
            torch.compiler.cudagraph_mark_step_begin()
            target, attention_mask = self._where(layout, slots_of, lengths, patterns, memory.capacity)
            parts: list[Part] = [(0, room, None)]
            if more:
                parts.append((room, room + more, None if everyone else slots_of[room:]))
            memory.slots, memory.now, self._rows = room, Place(target, parts, memory.capacity), rows
            with placed(self.network.config, memory.now):
                logits = self._forward(input_ids, layout.position, attention_mask, past.cache)
            self._rows = None
        if scored is not None:
            return logits[:scored].clone()  # a graph's output is overwritten when it runs again
        kept = torch.tensor([*range(slots), *range(room, room + len(again))])
        return logits[to_device(kept, device), :length]

    def _place(
        self, layout: Layout, slot: Tensor, lengths: Tensor, patterns: Pattern | dict[str, Pattern], capacity: int
    ) -> tuple[Tensor, Any]:
        column = torch.where(layout.real, layout.position, -1)
        kv = slot_keys(layout, slot, lengths, capacity)
        return flat_target(slot, column, capacity), self.network.form(patterns, layout, kv)

    def _run(self, input_ids: Tensor, position: Tensor, attention_mask: Any, cache: SlotCache) -> Tensor:
        out = self.network.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position,
                                 past_key_values=cache, use_cache=True)  # fmt: skip
        logits: Tensor = out.logits
        return logits

    def _pick(self, _head: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args if self._rows is None else (args[0].flatten(0, 1)[self._rows],)


def _filled_up(
    input_ids: Tensor, layout: Layout, slots: int, room: int, more: int, width: int
) -> tuple[Tensor, Layout]:
    """(room + more, width): the slots' rows, then the others, each filled up with padding that repeats the last."""
    batch, length = input_ids.shape
    source = [*range(slots), *[-1] * (room - slots), *range(slots, batch), *[-1] * (more - batch + slots)]
    row, column = torch.tensor(source)[:, None], torch.arange(width)
    index = row.clamp_min(0), column.clamp_max(length - 1)
    layout = layout.at(*index)
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
