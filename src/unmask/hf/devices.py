"""Devices by name: whether they are there, and maps of a model to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def check_device_map(name: str | Path, device_map: Any) -> None:
    """Raise ValueError for a map that spreads a model over devices; a word such as "auto" may not."""
    devices = sorted({str(device) for device in device_map.values()}) if isinstance(device_map, dict) else []
    if len(devices) > 1:
        raise ValueError(
            f"model {str(name)!r}: device_map spreads it over {', '.join(devices)}, and masks, caches and losses lie "
            "on one device: give device=, load it smaller with dtype='bfloat16' or quantization_config='nf4', or "
            "train it on several processes with FSDP2 (docs/processes.md)"
        )


def present_device(device: str | torch.device) -> torch.device:
    """The device of a name; ValueError if this machine has none such."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such type, none here, or torch without it
        here = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise ValueError(
            f"device {str(device)!r} is not there: this machine has {', '.join([*here, 'cpu'])}"
        ) from error
    return found
