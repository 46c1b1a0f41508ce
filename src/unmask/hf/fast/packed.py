"""Linear maps with their weights packed for oneDNN, for passes without a graph on a CPU, in float32.

torch's own `linear` reads weights as they lie, and on some CPUs by kernels that leave half of the CPU unused. A packed
copy is read once in the order in which the kernel wants it, and maps that read the same input (query, key and value)
become one product. The copy takes as much memory as the maps; the model's own weights stay, and everything with a graph
uses them. A map whose weights have changed since it was packed is packed again.

Slow twin: the plain pass; compared in tests/test_packed.py (`test_packed_passes_equal_the_plain_ones`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Rows of the passes that are timed, once, to see for which numbers of rows packing pays."""
_HINT = 16
"""Rows that the packed order is made for."""


def packed_maps(model: nn.Module, run: Callable[[], Any]) -> PackedMaps | None:
    """The model's linear maps that the pass `run` calls, packed; None where that is not possible or does not pay."""
    weights = [module.weight for module in linear_maps(model)]
    plain = all(weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)
    if not weights or not plain or not torch.backends.mkldnn.is_available():
        return None
    with torch.no_grad():
        packed = PackedMaps(groups_of(model, run))
    return packed if packed.largest else None


def linear_maps(model: nn.Module) -> list[nn.Linear]:
    """The plain linear maps of a model, the head among them; not those that somebody else has changed."""
    return [m for m in model.modules() if type(m) is nn.Linear and "forward" not in m.__dict__]


class PackedMaps:
    """Packed copies of a model's linear maps.

    groups: maps that read the same input, in the order of their calls. largest: rows of a pass up to which it pays.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Linear]]) -> None:
        self.groups = [_Group(maps) for maps in groups]
        self._forwards = [(m, f) for group in self.groups for m, f in zip(group.maps, group.forwards, strict=True)]
        self._parameters = [m._parameters for m, _ in self._forwards]
        self.versions = _versions(self._parameters)
        self.largest = _largest_that_pays(max(self.groups, key=lambda g: g.maps[0].weight.numel() * (len(g.maps) > 1)))

    def _refresh(self) -> None:
        """Pack the weights again that have changed."""
        versions = _versions(self._parameters)
        if versions != self.versions:
            for group in self.groups:
                group.pack()
            self.versions = versions

    @property
    def num_bytes(self) -> int:
        """Memory of the copies."""
        return sum(m.weight.numel() * m.weight.element_size() for m, _ in self._forwards)

    @contextmanager
    def used(self, num_rows: int) -> Iterator[None]:
        """Within the context the maps of the model run on their packed copies, if that pays for so many rows."""
        if num_rows > self.largest or torch.is_grad_enabled():
            yield
            return
        self._refresh()
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward  # past nn.Module's slow assignment: this runs in every pass
        try:
            yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)
            for group in self.groups:
                group.input, group.outputs = None, {}


class _Group:
    """Maps that read the same input, as one product."""

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        self.maps = list(maps)
        self.sizes = [m.out_features for m in maps]
        self.outputs: dict[int, Tensor] = {}
        self.input: Tensor | None = None
        self.pack()
        self.forwards: list[Callable[[Tensor], Tensor]] = [self._forward_of(i) for i in range(len(self.maps))]

    def pack(self) -> None:
        """Copy the weights as they are now."""
        with torch.no_grad():
            weight = torch.cat([m.weight.detach() for m in self.maps])
            biases = [m.bias for m in self.maps]
            self.bias = torch.cat([b.detach() for b in biases]) if biases[0] is not None else None
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _HINT)

    def product(self, x: Tensor) -> Tensor:
        """All maps on x (..., in), (..., sum of outputs)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out

    def _forward_of(self, index: int) -> Callable[[Tensor], Tensor]:
        if len(self.maps) == 1:
            return self.product

        def forward(x: Tensor) -> Tensor:
            if self.input is not x or index not in self.outputs:
                self.outputs = dict(enumerate(self.product(x).split(self.sizes, dim=-1)))
                self.input = x
            return self.outputs.pop(index)

        return forward


def _versions(parameters: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """What tells the present weights of maps from later ones."""
    return [(p["weight"].data_ptr(), p["weight"]._version) for p in parameters]


def groups_of(model: nn.Module, run: Callable[[], Any]) -> list[list[nn.Linear]]:
    """The linear maps that a pass, `run`, calls, those with the same input tensor one after the other together."""
    calls: list[tuple[nn.Linear, Tensor]] = []

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        calls.append((module, args[0]))

    handles = [module.register_forward_pre_hook(record) for module in linear_maps(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    groups: list[list[nn.Linear]] = []
    before: Tensor | None = None
    for module, x in calls:
        if any(module in group for group in groups):
            return [[m] for m in dict.fromkeys(m for m, _ in calls)]  # a map that runs twice: no groups
        same = x is before and (module.bias is None) == (groups[-1][0].bias is None)
        groups[-1].append(module) if same else groups.append([module])
        before = x
    return groups


def _largest_that_pays(group: _Group) -> int:
    """The largest number of rows up to which the packed product is the faster one at every size; 0 for none."""
    largest = 0
    with torch.inference_mode():
        for rows in SIZES:
            x = torch.ones(rows, group.maps[0].in_features)
            plain = seconds_of(lambda x: [linear(x, m.weight, m.bias) for m in group.maps], x)
            if seconds_of(group.product, x) >= plain:
                break
            largest = rows
    return largest if largest < SIZES[-1] else 1 << 30


def seconds_of(run: Callable[[Tensor], Any], x: Tensor) -> float:
    """The shortest of a few runs."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        run(x)
        best = min(best, time.perf_counter() - began)
    return best
