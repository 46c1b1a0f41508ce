"""The optimiser of a run: AdamW in float32, or with moments of 8 bits; a step that is not finite changes nothing."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from unmask.settings import OptimiserSettings


def make_optimizer(model: Any, settings: OptimiserSettings) -> torch.optim.Optimizer:
    """AdamW over what learns, without weight decay on vectors (norms, biases).

    adamw-8bit keeps both moments in 8 bits in blocks of 256 values (2110.02861), those of tensors below 4,096 values
    in float32.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, betas=betas, fused=True)
    check_optimizer(settings.optimizer)
    import bitsandbytes

    found: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=1.0, betas=betas)
    return found


def check_optimizer(name: str) -> None:
    """Raise ValueError for an optimiser whose package is not installed."""
    if name == "adamw-8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"optimizer={name!r} needs bitsandbytes, which is not installed: pip install 'unmask[quant]'")


def step_if(optimizer: Any, finite: Tensor, *, scaled: bool) -> None:
    """Step if `finite`, (), is True; optimizer: as Accelerate has prepared it. Gradients are dropped either way.

    torch's fused kernel reads the flag on the device. Others do not know it, so the host waits for it. scaled: a
    gradient scaler decides, which has looked at the gradients itself.
    """
    if not scaled:
        optimizer.optimizer.found_inf = (~finite).float()
    if scaled or _reads_flag(optimizer.optimizer) or bool(finite):
        optimizer.step()
    optimizer.zero_grad()


def _reads_flag(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
