"""From the host to a device, without waiting for the device.

What decides where things stand (layouts, places, targets, weights) is made on the host, where its values can be read;
a device gets it where it is used. Knows tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, where a copy from the host is only ordered; x itself if it is there already."""
    if x.device.type != "cpu" or device.type in ("cpu", "mps"):  # mps would read memory that may be gone by then
        return x.to(device)
    if device.type == "cuda":
        x = x.contiguous().pin_memory()  # else the driver waits; an expanded tensor cannot be pinned
    return x.to(device, non_blocking=True)
