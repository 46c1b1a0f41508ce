"""What differs between a CPU and an accelerator: whether the host runs ahead of it, and the memory it took.

Of any accelerator that torch knows (CUDA, ROCm, XPU, backends of others), not of one kind. Knows no tensors.
"""

from __future__ import annotations

import resource
import sys

import torch


def runs_ahead(device: torch.device) -> bool:
    """Whether the host goes on while `device` still computes, so that reading a value is a wait for it.

    Not on Apple's GPUs: their copies read the host's memory after it may be gone, so each is waited for.
    """
    return device.type not in ("cpu", "meta", "mps")


def peak_memory(device: torch.device) -> int | None:
    """Bytes that were used at most so far: of the device's memory, or on a CPU of the process's; None if not known."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    counted = getattr(torch.get_device_module(device), "max_memory_allocated", None)
    return None if counted is None else int(counted(device))


def synchronize(device: torch.device) -> None:
    """Wait for all that the device was asked to do."""
    if device.type not in ("cpu", "meta"):
        torch.get_device_module(device).synchronize()
