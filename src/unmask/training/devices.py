"""Where and how a run computes: Accelerate's object, model and optimiser as it prepares them, precision, checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from unmask.resolve import Resolved, uses_tf32
from unmask.run_folder import RunFolder
from unmask.settings import OptimiserSettings, RunSettings
from unmask.training.optimizer import make_optimizer
from unmask.training.ranks import capability_of, join, set_kind, sharding, share_weights
from unmask.training.sharded import assemble, run_first, shard


def accelerator_of(settings: RunSettings, folder: RunFolder) -> accelerate.Accelerator:
    """Accelerate's object for this run; a second run in the process may have another precision."""
    AcceleratorState._reset_state()
    set_kind()
    return accelerate.Accelerator(mixed_precision=settings.mixed_precision, project_dir=str(folder.path))


SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Kinds of processes for which Accelerate's wrapper averages the gradients over ranks."""


def prepare(accelerator: accelerate.Accelerator, model: Any, settings: OptimiserSettings) -> tuple[Any, Any]:
    """Model on the device and its optimiser, prepared by Accelerate, with the model's own forward."""
    forward = model.__dict__.get("forward")
    if accelerator.distributed_type in SHARDED:
        shard(accelerator, model)
        accelerator._models.append(model)  # which `Accelerator.prepare` does, and also shards: without the weights
        wrapped, optimizer = model, accelerator.prepare_optimizer(make_optimizer(model, settings))
    else:
        made = make_optimizer(model, settings)
        wrapped, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(made)
        share_weights(model)
    # A step enters autocast itself. Accelerate's wrapper of the forward would stay on the model after the run, and
    # Accelerate's function that removes it removes the model's decorators too, which return the cache.
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
    if forward is not None:  # of a hook, on a model that is spread over devices
        model.forward = forward
    return wrapped, optimizer


@contextmanager
def in_shards(model: Any, settings: Resolved, folder: RunFolder) -> Iterator[None]:
    """Within the context the model is spread over processes that will train it so, and no device holds it whole.

    After it the main process has it whole on its CPU, and the others its structure.
    """
    if not sharding():
        yield
        return
    as_loaded = replace(settings, mixed_precision="no")
    shard(accelerator_of(as_loaded, folder), model)
    run_first(model)
    yield
    assemble(model)


def check_machine(settings: Resolved, ranks: int, device: torch.device) -> None:
    """Raise ValueError if the processes cannot share a step's rows evenly, or the device lacks the precision."""
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision='fp16' needs a GPU: use 'bf16' or 'no' on a CPU")
    if settings.batch_size % ranks:
        raise ValueError(
            f"batch_size={settings.batch_size} is no multiple of the {ranks} processes: give one that is, such as "
            f"batch_size={ranks * max(1, round(settings.batch_size / ranks))}"
        )


def syncing(accelerator: accelerate.Accelerator, model: Any, last: bool) -> Any:
    """A context in which gradients are exchanged between ranks with the last micro-batch only."""
    return nullcontext() if last else accelerator.no_sync(model)


@contextmanager
def products_of(settings: RunSettings) -> Iterator[None]:
    """Within the context products that stay float32 are in TF32 where `uses_tf32`."""
    before, device = torch.get_float32_matmul_precision(), join().device
    if uses_tf32(settings, device.type, capability_of(device)):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
