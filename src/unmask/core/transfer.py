"""From the host to a device, and back, without waiting for the device.

Layouts, row indices, targets and weights are made on the host, where their values can be read; a device gets them
where it uses them. Knows tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.core.devices import runs_ahead


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, x itself if it is there already; a copy from the host is queued, not waited for."""
    if x.device.type != "cpu" or not runs_ahead(device):
        return x.to(device)
    x = x.contiguous().pin_memory()  # else the driver waits; an expanded tensor cannot be pinned
    return x.to(device, non_blocking=True)


def to_host(x: Tensor) -> tuple[Tensor, Any]:
    """x on the host, and the event to `synchronize` before it is read; None where it can be read already."""
    if not runs_ahead(x.device):
        return x, None
    host, event = x.to("cpu", non_blocking=True), torch.get_device_module(x.device).Event()
    event.record()
    return host, event
