"""Runs whose parameters are spread over the ranks (FSDP2): what their ranks must do together.

Each pass gathers the parameters of a layer from all ranks, so every rank has to make every pass that one of them makes.
Training does: a step has as many micro-batches on each rank. Whatever else calls the model runs `in_step`. Knows torch
and Accelerate.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import accelerate
import torch
import torch.distributed as dist
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from unmask.training import ranks

T = TypeVar("T")


def is_sharded(model: Any) -> bool:
    """Whether the parameters of a model are spread over ranks."""
    return isinstance(model, FSDPModule)


def shard(accelerator: accelerate.Accelerator, model: Any) -> None:
    """Spread a model over the ranks, with the weights of the main process; those of others may be on the meta device.

    No process but the main one ever holds more than its part of the weights and one parameter. Buffers stay as they
    are on each rank: state dicts lack some, such as rotary frequencies.
    """
    weights = _taken_off(model)
    fsdp2_prepare_model(accelerator, model)
    kept_on_cpu = isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy)
    parts: dict[int, nn.Parameter] = {}
    state = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in parts:  # else it is tied
            part = _part_of(parameter, weights.pop(name, None), accelerator.device)
            parts[id(parameter)] = nn.Parameter(part.cpu() if kept_on_cpu else part, parameter.requires_grad)
        state[name] = parts[id(parameter)]
    model.load_state_dict(state, strict=False, assign=True)


def _taken_off(model: Any) -> dict[str, torch.Tensor]:
    """Put all parameters on the meta device; returns those of the main process by name, and none on others."""
    is_main = dist.get_rank() == 0
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if is_main}
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in empty:
                without = torch.empty_like(parameter, device="meta")
                empty[id(parameter)] = nn.Parameter(without, parameter.requires_grad)
            module.register_parameter(name, empty[id(parameter)])
    return weights


def _part_of(parameter: Any, weight: torch.Tensor | None, device: torch.device) -> DTensor:
    """This rank's part of the main process's weight; parameter: says how it is spread. weight: None on other ranks."""
    if weight is None:
        weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    weight = weight.to(device, parameter.dtype).contiguous()
    dist.broadcast(weight, 0)
    mesh, placements = parameter.device_mesh, parameter.placements
    part = distribute_tensor(weight, mesh, placements, src_data_rank=None).to_local().clone()
    return DTensor.from_local(part, mesh, placements, shape=weight.shape, stride=weight.stride())


def whole(value: Any) -> Any:
    """A tensor that is spread over the ranks as each rank's own, and anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@contextmanager
def in_step(model: Any) -> Iterator[None]:
    """Within the context ranks may call a sharded model as often as each needs to.

    A rank that leaves the context early, also by an error, keeps the others company by passes over one token.
    """
    if not is_sharded(model):
        yield
        return
    device = _device(model)
    _reshard(model)

    def any_runs(mine: bool) -> bool:
        runs = torch.tensor(int(mine), device=device)
        dist.all_reduce(runs, dist.ReduceOp.MAX)
        return bool(runs)

    handle = model.register_forward_pre_hook(lambda *_: (any_runs(True), None)[1], prepend=True)
    try:
        yield
    finally:
        handle.remove()
        while any_runs(False):
            _run_once(model)
        _reshard(model)


def run_first(model: Any) -> None:
    """Run a model that was just sharded: its first pass makes the tensors of all later ones, and must not be one in
    inference mode, which makes tensors that nothing else may write to."""
    _run_once(model)
    _reshard(model)


def _run_once(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=_device(model)), use_cache=False)


def _device(model: Any) -> torch.device:
    found: torch.device = next(model.parameters()).device
    return found


def _reshard(model: Any) -> None:
    """Give up what a pass without gradients left gathered, so that each parameter is this rank's part of it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def spread(model: Any, number: int, work: Callable[[Sequence[int]], Sequence[T]]) -> list[T]:
    """`ranks.spread` of work that calls `model`, which may be sharded."""

    def in_company(items: Sequence[int]) -> Sequence[T]:
        with in_step(model):
            return work(items)

    return ranks.spread(number, in_company)


def by_main(model: Any, work: Callable[[], T]) -> T:
    """What `work`, which calls `model`, returns on the main process; the same on all."""
    return spread(model, 1, lambda items: [work() for _ in items])[0]


def assemble(*parts: Any) -> None:
    """Make sharded modules ordinary ones again, whole on the CPU of the main process.

    On other ranks the parameters are left on the meta device, since all copies together may exceed a machine's memory.
    """
    gathered: dict[int, nn.Parameter] = {}
    for part in parts:
        _reshard(part)
        for module in part.modules():
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                if isinstance(parameter, DTensor) and id(parameter) not in gathered:
                    gathered[id(parameter)] = _gathered(parameter)
                module.register_parameter(name, gathered.get(id(parameter), parameter))
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.cpu()
        for module in part.modules():
            _forget_sharding(module)
    gc.collect()  # what FSDP2 kept of the shards refers to itself


def _gathered(parameter: Any) -> nn.Parameter:
    tensor = parameter.full_tensor().detach()
    tensor = tensor.cpu() if dist.get_rank() == 0 else tensor.to("meta")
    return nn.Parameter(tensor, parameter.requires_grad)


def _forget_sharding(module: Any) -> None:
    """Take what `fully_shard` put on a module off it: its class, hooks and marks; torch has no function for that."""
    if is_sharded(module):
        state = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        del _module_state_mapping[module]
        module.__class__ = next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))
    for hooks in (module._load_state_dict_post_hooks, module._load_state_dict_pre_hooks, module._state_dict_pre_hooks):
        for number, hook in list(hooks.items()):
            if getattr(hook, "hook", hook).__module__.startswith("torch.distributed.fsdp"):
                del hooks[number]
    for name in (STATE_KEY, REGISTRY_KEY, "_is_fsdp_managed_module", "_fsdp_use_orig_params"):
        vars(module).pop(name, None)
