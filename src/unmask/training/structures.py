"""What the main process alone makes, handed to the others without the values of its weights (FSDP2).

A model of many ranks is loaded once: the others get its structure, whose parameters are on the meta device until they
are spread over the ranks. Buffers, which no state dict may hold, come with their values. Knows torch, and processes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from unmask.training import ranks

T = TypeVar("T")


def of_main(make: Callable[[], T]) -> T:
    """What `make` returns on the main process; on others a copy of it, with parameters on the meta device.

    An error of the main process is raised on all. Processes that do not spread parameters make their own.
    """
    if not ranks.sharding():
        return make()
    made: Any = None
    file = io.BytesIO()
    with ranks.main_alone() as is_main:
        if is_main:
            made = make()
            _Structure(file, protocol=pickle.HIGHEST_PROTOCOL).dump(made)
    sent = [file.getvalue()]
    dist.broadcast_object_list(sent, 0)
    return made if is_main else pickle.loads(sent[0])


class _Structure(pickle.Pickler):
    """Writes parameters as their shapes; one that is met again, such as a tied one, is the same again."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, nn.Parameter):
            return _without_values, (value.shape, value.dtype, value.requires_grad)
        return NotImplemented


def _without_values(shape: torch.Size, dtype: torch.dtype, requires_grad: bool) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad)
