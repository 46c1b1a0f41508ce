"""The processes of one run: how they find each other, and what they add up.

Every process holds the whole model and runs its share of a step's rows. Gradients are summed here, after a step's
last backward pass, instead of by a wrapper around the model: a rank may then lack some of them, or all, and a step
may run the model as often as it likes. Knows torch and Accelerate's process state; nothing of models or data.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import timedelta

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(days=2)
"""How long ranks wait for the main one, which evaluates and writes alone; a dead one ends the others anyway."""
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_AT_ONCE = 2**24
"""Gradient values that travel together."""


def join() -> accelerate.PartialState:
    """The state of this process among those that a launcher (torchrun, accelerate, mpirun) started; alone without one.

    Where there is no GPU the processes talk over gloo: Accelerate itself would leave each of them alone.
    """
    launched = any(int(os.environ.get(name) or 1) > 1 for name in _SIZES)
    here = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = launched and (here is None or here.type == "mps")
    on_cpu = on_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return accelerate.PartialState(cpu=on_cpu, **({"timeout": _PATIENCE} if launched else {}))


def leave() -> None:
    """Take leave of the other processes: a command's last act."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_weights(model: torch.nn.Module) -> None:
    """Give every rank the first one's parameters and buffers."""
    if not several():
        return
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of all ranks, in place on each; a parameter that none has one for stays without."""
    learning = [p for p in parameters if p.requires_grad]
    if not several() or not learning:
        return
    there = torch.tensor([p.grad is not None for p in learning], dtype=torch.uint8, device=learning[0].device)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    gradients = []
    for parameter, somewhere in zip(learning, there.tolist(), strict=True):
        if somewhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for group in _groups(gradients):
        if len(group) == 1 and group[0].is_contiguous():
            dist.all_reduce(group[0])
            continue
        flat = torch.cat([gradient.flatten() for gradient in group])
        dist.all_reduce(flat)
        for gradient, summed in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def several() -> bool:
    """Whether this process has others beside it."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _groups(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type, up to `_AT_ONCE` values or one tensor."""
    group: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in group) + tensor.numel() > _AT_ONCE
        if group and (full or tensor.dtype != group[0].dtype or tensor.device != group[0].device):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group
