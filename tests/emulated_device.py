"""An accelerator for tests, "emu": its values are right, it raises where a GPU would, and counts what waits for it.

    with Emulated() as device:
        model.to("emu")
        ...
    device.waits  # {"src/file.py:12 aten.item": 3, ...}

A tensor on it wraps a tensor of the CPU, which nobody else sees. Every operation goes through `Emulated._run`: all its
tensors must be on one device (0-dimensional ones of the host may join), and what the host can only know once the device
has computed counts as a wait. There are two of them, "emu:0" and "emu:1". A backend stays in its process for good, so
what uses it runs in a process of its own: see test_emulated_device.py.
"""

from __future__ import annotations

import collections
import sys
import threading
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "emu"
aten = torch.ops.aten


class _Backend(_DummyBackendModule):
    """What torch asks of `torch.emu`."""

    def device_count(self) -> int:
        return 2

    def device(self, _index: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, _device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, _device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, _device: Any = None) -> None:
        Emulated.current.finish()

    class Event:
        """What was queued before `record` is done after `synchronize`."""

        def record(self) -> None:
            self.queued = list(Emulated.current.unfinished)

        def synchronize(self) -> None:
            Emulated.current.finish(self.queued)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())

_INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index,
             aten._unsafe_index_put}  # fmt: skip
_SIZED_BY_VALUES = {aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.unique_dim,
                    aten.bincount}  # fmt: skip
_PINNING = {aten.is_pinned, aten.pin_memory, aten._pin_memory}
_READ = {aten._local_scalar_dense, aten.equal, aten.is_nonzero}


class OnDevice(Tensor):
    """A tensor of the device. value: its values, on the CPU."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype,
            layout=value.layout, device=device,
        )  # fmt: skip
        made.value = value
        return made

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.value!r}, {self.device})"

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Which tensors share memory is asked of it."""
        return self.value.untyped_storage()

    def storage(self) -> torch.TypedStorage:
        return self.value.storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file holds the values, which whoever reads it takes to the device."""
        Emulated.current.wait("copy to the host")
        return self.value.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone()
        is_parameter = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = made = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return made

    @property
    def data(self) -> Tensor:
        plain: Tensor = Tensor.data.__get__(self)
        return plain

    @data.setter
    def data(self, new: OnDevice) -> None:
        Tensor.data.__set__(self, new)
        self.value = new.value

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        return Emulated.current._run(func, args, kwargs or {})


class Emulated(TorchDispatchMode):
    """Within the context there is the device.

    waits: how often it was waited for, by line and operation. unfinished: copies on the host that are queued, and raise
    an error where they are read.
    """

    current: Emulated

    def __init__(self) -> None:
        super().__init__()
        self.waits: collections.Counter[str] = collections.Counter()
        self.unfinished: list[Tensor] = []

    def __enter__(self) -> Emulated:
        Emulated.current = self
        self._stack = ExitStack()
        self._stack.enter_context(_Functions(self))
        # As on a GPU, `Module.to` keeps the parameters' objects.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        self._stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        self._stack.enter_context(mock.patch.object(torch._C, "_InferenceMode", _InferenceMode))
        self._stack.enter_context(mock.patch.object(threading.Thread, "run", _in_thread(self)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket in _PINNING:  # here, since a backward pass runs in a thread without function modes
            return _pin(func, args[0])
        target = _target(kwargs)
        there = target is not None and target.type == NAME
        there = there or any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)))
        return self._run(func, args, kwargs) if there else func(*args, **kwargs)

    def wait(self, what: str) -> None:
        """Count a wait at the line of this package that it is in, or else of transformers or Accelerate."""
        self.waits[f"{_line()} {what}"] += 1

    def finish(self, copies: list[Tensor] | None = None) -> None:
        """The device has made these copies on the host, by default all."""
        done = list(self.unfinished) if copies is None else copies
        self.unfinished = [x for x in self.unfinished if all(x is not y for y in done)]

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation with tensors of the device, or whose result lies there."""
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} is not emulated")
        place, target = self._place(func, args, kwargs), _target(kwargs)
        if target is not None:
            place, kwargs = target, kwargs | {"device": torch.device("cpu") if target.type == NAME else target}
        wrapped = {id(x.value): x for x in tree_leaves((args, kwargs)) if isinstance(x, OnDevice)}
        plain_args, plain_kwargs = tree_map_only(OnDevice, lambda x: x.value, (args, kwargs))
        if func is aten.histc.default:  # of integers it is for accelerators alone
            plain_args = (plain_args[0].double(), *plain_args[1:])
        with _disable_current_modes():
            out = func(*plain_args, **plain_kwargs)
            if func is aten._to_copy.default and out is plain_args[0]:
                out = out.clone()  # to another device, it is always a copy
        if place.type != NAME:
            if kwargs.get("non_blocking"):
                self.unfinished.append(out)
            return args[0] if func is aten.copy_.default else out
        # What an operation has written in place is the tensor that it was given.
        return tree_map_only(Tensor, lambda x: wrapped[id(x)] if id(x) in wrapped else OnDevice(x, place), out)

    def _place(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        """The device of the result; raises RuntimeError for tensors on several, and counts waits."""
        packet, tensors = func.overloadpacket, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if packet in (aten._to_copy, aten.copy_):
            source, to = (args[0], _target(kwargs) or args[0].device) if packet is aten._to_copy else args[1::-1]
            to = to.device if isinstance(to, Tensor) else to
            if source.device != to and (source.ndim or isinstance(source, OnDevice)):
                self._copy(source, to, kwargs.get("non_blocking", False) or args[2:] == (True,))
            return to
        if packet in _INDEXING:
            index = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            if any(isinstance(x, OnDevice) and x.dtype in (torch.bool, torch.uint8) for x in index):
                self.wait(f"{packet} by a mask")
            if any(not isinstance(x, OnDevice) and x.ndim for x in index) and isinstance(args[0], OnDevice):
                self.wait(f"{packet} by an index of the host")
            tensors = [x for x in tensors if isinstance(x, OnDevice) or all(x is not y for y in index)]
        elif packet in _READ | _SIZED_BY_VALUES or func is aten.repeat_interleave.Tensor:
            self.wait(str(packet))
        found = {x.device for x in tensors if x.ndim or isinstance(x, OnDevice)}
        if len(found) > 1:
            raise RuntimeError(f"{func} at {_line()}: tensors on {' and '.join(sorted(map(str, found)))}")
        return next(iter(found), torch.device("cpu"))

    def _copy(self, source: Tensor, to: torch.device, non_blocking: bool) -> None:
        """Count the wait of a copy, unless it is between two devices or is queued and its memory on the host pinned."""
        if to.type != NAME:
            if not non_blocking:
                self.wait("copy to the host")
        elif source.numel() and not isinstance(source, OnDevice) and not (non_blocking and hasattr(source, "pinned")):
            self.wait("copy from the host")


class _Operations(TorchDispatchMode):
    """The operations of another thread: a mode belongs to the thread that entered it."""

    def __init__(self, device: Emulated) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.device.__torch_dispatch__(func, types, args, kwargs)


def _in_thread(device: Emulated) -> Any:
    """`Thread.run` with the device: transformers makes tensors in threads."""
    run = threading.Thread.run

    def run_with_device(thread: threading.Thread) -> None:
        with _Functions(device), _Operations(device):
            run(thread)

    return run_with_device


class _InferenceMode:
    """`torch.inference_mode` without gradients and no more: tensors made in it could not be wrapped."""

    def __init__(self, mode: bool) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.before = torch.is_grad_enabled()
        torch.set_grad_enabled(self.before and not self.mode)

    def __exit__(self, *_error: Any) -> None:
        torch.set_grad_enabled(self.before)


class _Functions(TorchFunctionMode):
    """Functions of torch that do not come to a device of Python's, or come there without what they mean."""

    def __init__(self, device: Emulated) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and any(first is x for x in self.device.unfinished):
            raise RuntimeError(f"a copy is read at {_line()} before it is there: synchronize its event first")
        if func is torch.nn.functional.scaled_dot_product_attention and isinstance(first, OnDevice):
            return _attention(*args, **kwargs)
        if func is torch.tensor and _target(kwargs) is not None:
            return torch.tensor(*args, **kwargs | {"device": None}).to(kwargs["device"])
        if func is Tensor.tolist and isinstance(first, OnDevice):
            self.device.wait("tolist")
            return first.value.tolist()
        if func is Tensor.numpy and isinstance(first, OnDevice):
            raise TypeError(f"can't convert {first.device} tensor to numpy at {_line()}")
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    """torch's attention by its definition, which takes a mask of numbers."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    out: Tensor = aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, **more
    )[0]  # fmt: skip
    return out


def _pin(func: Any, x: Tensor) -> Any:
    """Memory of the host that is marked as pinned, or whether it is."""
    if func.overloadpacket is aten.is_pinned:
        return hasattr(x, "pinned")
    assert not isinstance(x, OnDevice), "memory of a device cannot be pinned"
    pinned: Any = x.clone()
    pinned.pinned = True
    return pinned


def _target(kwargs: Any) -> torch.device | None:
    """The device that an operation is told to make its result on, with its number; None without one."""
    device = kwargs.get("device")
    if device is None:
        return None
    device = torch.device(device)
    return torch.device(NAME, device.index or 0) if device.type == NAME else device


def _line() -> str:
    """file:line of the innermost call in this package, or else in what runs its models."""
    for part in ("/src/unmask/", "/site-packages/transformers/", "/site-packages/accelerate/", "/tests/"):
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if part in frame.f_code.co_filename and frame.f_code.co_filename != __file__:
                return f"{frame.f_code.co_filename.split(part)[-1]}:{frame.f_lineno}"
            frame = frame.f_back
    return "?"
