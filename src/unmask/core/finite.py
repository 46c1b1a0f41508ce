"""Figures that must be finite: a training step's loss and gradient, and a model's weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from unmask.core.transfer import to_host

_CHECKED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StepWatch:
    """Decides on the device whether a step may change the weights, and counts skipped steps on the host.

    A step that is not finite is skipped on the device, so that the host need not wait for it: the host reads the
    figures of a step while the next one runs, and all that are left in `settle`. allowed: steps that may be skipped
    before a ValueError ends the run. skipped: steps skipped so far. norm, stopping: of the last step that was read.
    """

    def __init__(self, allowed: int = 0, skipped: int = 0) -> None:
        self.allowed, self.skipped = allowed, skipped
        self.norm, self.stopping = 0.0, False
        self._pending: list[tuple[int, float, Tensor, Any]] = []

    def look(
        self,
        step: int,
        learning_rate: float,
        loss: Tensor,
        norm: Tensor | None,
        *,
        scaled: bool = False,
        stop: Tensor | None = None,
    ) -> Tensor:
        """0-dimensional bool on the device of `loss`: whether the step's loss and gradient norm are finite.

        norm: None where it is not known. scaled: a gradient scaler itself skips steps whose gradient overflows. stop:
        above 0 where a process was asked to stop; all processes read it after the same step.
        """
        stop = torch.zeros_like(loss) if stop is None else stop
        figures = torch.stack([loss.double(), (loss if norm is None or scaled else norm).double(), stop.double()])
        self._pending.append((step, learning_rate, *to_host(figures)))
        return figures.isfinite().all()

    def settle(self, *, but_last: bool = False) -> None:
        """Read the figures of all steps so far (`but_last`: without the last); raises ValueError past `allowed`."""
        while len(self._pending) > int(but_last):
            step, learning_rate, host, event = self._pending.pop(0)
            if event is not None:
                event.synchronize()
            loss, norm, stop = host.tolist()
            self.norm, self.stopping = norm, self.stopping or stop > 0
            if math.isfinite(loss) and math.isfinite(norm):
                continue
            self.skipped += 1
            if self.skipped > self.allowed:
                what = f"a loss of {loss}" if not math.isfinite(loss) else f"a gradient norm of {norm}"
                raise ValueError(
                    f"step {step} has {what} at learning rate {learning_rate:.3g}: the run stopped before it changed "
                    "the weights, and checkpoints before it are kept; lower learning_rate, or let max_nonfinite_steps "
                    f"(now {self.allowed}) be skipped"
                )


def bad_weight(model: Any) -> str | None:
    """Name of the first parameter or buffer of a torch module that holds NaN or infinity, None if there is none.

    Each device is waited for once, whatever the number of weights.
    """
    finite: dict[torch.device, dict[tuple[int, str], Tensor]] = {}
    tensors = [*model.named_parameters(), *_saved_buffers(model)]
    for number, (name, tensor) in enumerate(tensors):
        for part in plain_parts(tensor.detach()):
            if part.dtype in _CHECKED and part.device.type != "meta" and part.numel():
                low, high = torch.aminmax(part)  # NaN stays NaN, and no copy of the weights is made
                those, ours = finite.setdefault(part.device, {}), low.isfinite() & high.isfinite()
                those[number, name] = ours & those.get((number, name), ours)
    bad = [
        place
        for those in finite.values()
        for place, is_finite in zip(those, torch.stack([*those.values()]).tolist(), strict=True)
        if not is_finite
    ]
    return min(bad)[1] if bad else None


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The ordinary tensors that a tensor consists of: itself, or those inside a packed one (torchao's weights).

    Of a tensor that is spread over ranks (FSDP2), this rank's part.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    inner = [getattr(tensor, name) for name in names]
    return [part for value in inner if isinstance(value, Tensor) for part in plain_parts(value)]


def _saved_buffers(model: Any) -> list[tuple[str, Tensor]]:
    """Buffers in the state dict: masks of infinities are buffers too, but are not saved."""
    kept = set(model.state_dict(keep_vars=True))
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def check_weights(model: Any, what: str) -> None:
    """Raise ValueError naming a parameter of `model` that is not finite; what: its name in messages."""
    name = bad_weight(model)
    if name is not None:
        raise ValueError(
            f"{what} holds weights that are not finite (NaN or infinity), first in {name!r}: use a checkpoint from "
            "before its training failed"
        )


class FiniteWeights:
    """Checks weights once, and again only after they have changed."""

    def __init__(self) -> None:
        self._checked: Any = None

    def check(self, parts: dict[str, Any]) -> None:
        """Raise ValueError for a part whose weights are not finite; parts: module or None by name."""
        version = self._version(parts)
        if version is None or version != self._checked:
            for what, part in parts.items():
                if part is not None:
                    check_weights(part, what)
            self._checked = version

    def trust(self, parts: dict[str, Any]) -> None:
        """Take the present weights to be finite."""
        self._checked = self._version(parts)

    @staticmethod
    def _version(parts: dict[str, Any]) -> Any:
        """A value that changes whenever a weight does; None where torch does not count changes."""
        found = [_versions(part) for part in parts.values() if part is not None]
        return None if None in found else found


def _versions(model: Any) -> tuple[tuple[int, int], ...] | None:
    """A value that changes whenever a parameter does; None where torch does not count changes."""
    try:
        parts = [part for parameter in model.parameters() for part in plain_parts(parameter)]
        return tuple((part.data_ptr(), part._version) for part in parts)
    except RuntimeError:  # made in inference mode
        return None
