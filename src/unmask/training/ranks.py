"""The processes of one run: their process group, equal weights at the start, the sum of their gradients, shared work.

Every process holds the whole model (unless it is `sharded`) and runs its share of a step's rows. Gradients are summed
here after the last backward pass of a step, not by a wrapper around the model: so a rank may lack some or all of them,
and a step may run the model any number of times. Knows torch and Accelerate's process state; nothing of models or data.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor

from unmask.hf import present_device

T = TypeVar("T")

_TIMEOUT = timedelta(days=2)
"""How long ranks wait for the main one, which evaluates and writes alone; if it dies, the launcher ends the others."""
_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
SEEN_AFTER = 60.0
"""Seconds until a network file system shows a new file on every machine."""
_BUCKET = 2**24
"""Gradient values that one all-reduce sums."""


def join() -> accelerate.PartialState:
    """Join the processes that a launcher (torchrun, accelerate, mpirun) started; without one the process is alone.

    Without a GPU the processes communicate over gloo; Accelerate by itself would not connect them.
    """
    launched = any(int(os.environ.get(name) or 1) > 1 for name in _WORLD_SIZES)
    device = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = launched and (device is None or device.type == "mps")
    on_cpu = on_cpu or _is_on("ACCELERATE_USE_CPU")
    return accelerate.PartialState(cpu=on_cpu, **({"timeout": _TIMEOUT} if launched else {}))


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The CUDA capability of a GPU; None for any other device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def asked_to_shard() -> bool:
    """Whether Accelerate's launcher was asked to spread parameters over the processes (FSDP)."""
    return _is_on("ACCELERATE_USE_FSDP")


def _is_on(name: str) -> bool:
    """Whether a variable of Accelerate's launcher says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def set_kind() -> None:
    """Have the next Accelerator shard parameters or not as the launcher asks, whatever an earlier run did.

    Accelerate comes to FSDP from its multi-GPU type alone; this lets it do so on CPUs too.
    """
    processes = join()
    if processes.num_processes == 1:
        return
    plain = processes.device.type == "cpu" and not asked_to_shard()
    if plain or processes.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP):
        kind = DistributedType.MULTI_CPU if plain else DistributedType.MULTI_GPU
        processes._shared_state["distributed_type"] = kind


def sharding() -> bool:
    """Whether this run spreads parameters over its processes: it was asked to, and there are several."""
    return asked_to_shard() and number() > 1


def check_launcher() -> None:
    """Raise ValueError for what Accelerate's launcher was asked to do and this library does not."""
    for name, what in (("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
                       ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config")):  # fmt: skip
        if _is_on(name):
            raise ValueError(f"{name}={os.environ[name]}: {what} is not supported; use configs/ddp.yaml or fsdp2.yaml")
    if not asked_to_shard():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(f"FSDP_VERSION={os.environ.get('FSDP_VERSION')}: only FSDP2 is supported: fsdp_version: 2")
    if _is_on("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ValueError(
            "FSDP_ACTIVATION_CHECKPOINTING=true wraps the layers that this library hooks into: use the setting "
            "gradient_checkpointing=true instead"
        )
    if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ValueError(
            "FSDP_CPU_RAM_EFFICIENT_LOADING=true: this library itself has the main process alone load the model: set "
            "fsdp_cpu_ram_efficient_loading: false"
        )


_CHOSEN = "ACCELERATE_TORCH_DEVICE"


def chosen_device() -> str | None:
    """The device that runs of this process were told to train on."""
    return os.environ.get(_CHOSEN)


def use_device(device: str | None) -> None:
    """Train on this device from now on, None on the best; ValueError for one that is not there.

    Raises ValueError with several processes, whose launcher gives each its own.
    """
    if device == chosen_device():
        return
    if any(int(os.environ.get(name) or 1) > 1 for name in _WORLD_SIZES):
        raise ValueError(f"device={device!r}: this run has several processes, and their launcher gives each a device")
    if device is None:
        del os.environ[_CHOSEN]
    else:
        os.environ[_CHOSEN] = str(present_device(device))
    AcceleratorState._reset_state(reset_partial_state=True)


def leave() -> None:
    """Destroy the process group, as the last act of a command."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_weights(model: torch.nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to every rank."""
    if not _is_distributed():
        return
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


def add_gradients(parameters: Iterable[Tensor]) -> None:
    """Sum the gradients of all ranks, in place on each; a parameter without a gradient on any rank gets none."""
    learning = [p for p in parameters if p.requires_grad]
    if not _is_distributed() or not learning:
        return
    has_gradient = torch.tensor([p.grad is not None for p in learning], dtype=torch.uint8, device=learning[0].device)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX)  # on any rank
    gradients = []
    for parameter, needed in zip(learning, has_gradient.tolist(), strict=True):
        if needed:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for group in _buckets(gradients):
        if len(group) == 1 and group[0].is_contiguous():
            dist.all_reduce(group[0])
            continue
        flat = torch.cat([gradient.flatten() for gradient in group])
        dist.all_reduce(flat)
        for gradient, summed in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(summed.view_as(gradient))


@contextmanager
def agreeing() -> Iterator[None]:
    """Within the context an error of one rank becomes one of all: else the others would wait for it for ever.

    The others raise a ValueError of the same text, or a RuntimeError for an error of another type.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    if _is_distributed():
        said: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
        own = None if mine is None else (isinstance(mine, ValueError), str(mine) or type(mine).__name__)
        dist.all_gather_object(said, own)
        first = next((each for each in said if each is not None), None)
        if mine is None and first is not None:
            raise ValueError(first[1]) if first[0] else RuntimeError(f"another process failed: {first[1]}")
    if mine is not None:
        raise mine


@contextmanager
def main_alone() -> Iterator[bool]:
    """Whether this is the main process, which acts within the context; then all go on, or all raise its error."""
    with agreeing():
        yield not _is_distributed() or dist.get_rank() == 0


def check_shared(folder: Path) -> None:
    """Raise ValueError on all ranks if one does not see what the main process writes to a folder.

    Each rank writes its part of a checkpoint, so all must write to one folder.
    """
    if not _is_distributed():
        return
    mark = folder / ".seen"
    token = by_main(lambda: uuid.uuid4().hex)
    try:
        with main_alone() as is_main:
            if is_main:
                mark.write_text(token)
        with agreeing():
            until = time.monotonic() + SEEN_AFTER
            while not (mark.is_file() and mark.read_text() == token):
                if time.monotonic() > until:
                    raise ValueError(
                        f"{str(folder)!r} is not the same folder for all processes: process {dist.get_rank()} does "
                        "not see what process 0 wrote there; give a folder that all machines share"
                    )
                time.sleep(0.1)
    finally:
        if is_main:
            mark.unlink(missing_ok=True)


def number() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if _is_distributed() else 1


def everywhere(value: bool) -> bool:
    """Whether `value` is true on every rank."""
    return all(spread(number(), lambda items: [value for _ in items]))


def spread(number: int, work: Callable[[Sequence[int]], Sequence[T]]) -> list[T]:
    """What `work` returns for items 0 to number - 1, of which each rank does every n-th; the same list on all ranks.

    work: numbers of items -> a result for each.
    """
    if not _is_distributed():
        return list(work(range(number)))
    rank, size = dist.get_rank(), dist.get_world_size()
    own: Sequence[T] = []
    with agreeing():
        own = work(range(rank, number, size))
    parts: list[Sequence[T]] = [[] for _ in range(size)]
    dist.all_gather_object(parts, list(own))
    return [parts[item % size][item // size] for item in range(number)]


def by_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, which alone does it; the same on all."""
    return spread(1, lambda items: [work() for _ in items])[0]


def _is_distributed() -> bool:
    """Whether the run has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one dtype and device, together at most `_BUCKET` values, or a single larger tensor."""
    group: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in group) + tensor.numel() > _BUCKET
        if group and (full or tensor.dtype != group[0].dtype or tensor.device != group[0].device):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def of_main_process(items: Iterator[T]) -> Iterator[T]:
    """The items of the main process, on every process; the others do not ask theirs for any.

    An error of the main process is raised on all. Items go over the hosts' network, and no device waits for them.
    """
    if not _is_distributed():
        yield from items
        return
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    is_main = dist.get_rank() == 0
    while True:
        sent: list[Any] = [None, None]
        error: Exception | None = None
        if is_main:
            try:
                sent[0] = next(items, None)
            except Exception as raised:
                error, sent[1] = raised, str(raised)
        dist.broadcast_object_list(sent, 0, group=group)
        if error is not None:
            raise error
        if sent[1] is not None:
            raise ValueError(sent[1])
        if sent[0] is None:
            return
        yield sent[0]
