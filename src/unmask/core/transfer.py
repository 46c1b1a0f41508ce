"""From the host to a device, without waiting for the device.

Layouts, row indices, targets and weights are made on the host, where their values can be read; a device gets them
where it uses them. Knows tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, x itself if it is there already; a copy from the host to a GPU is queued, not waited for."""
    if x.device.type != "cpu" or device.type in ("cpu", "mps"):  # mps would read memory that may be gone by then
        return x.to(device)
    if device.type == "cuda":
        x = x.contiguous().pin_memory()  # else the driver waits; an expanded tensor cannot be pinned
    return x.to(device, non_blocking=True)
