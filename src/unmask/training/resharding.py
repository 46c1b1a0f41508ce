"""Checkpoints of a run whose parameters lay otherwise: whole in each process, in shards (FSDP2), or gathered from them.

Accelerate reads each form in a run of that form. For any other, the main process reads the whole and hands it out.
Knows torch and Accelerate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed.checkpoint as dcp
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from unmask.training.ranks import main_alone

_MODELS = {"whole": "model.safetensors", "shards": "pytorch_model_fsdp_0", "gathered": "pytorch_model_fsdp.bin"}
"""The form of a checkpoint by the name of its model, a file or a folder."""


def load(accelerator: accelerate.Accelerator, model: Any, optimizer: Any, checkpoint: Path) -> None:
    """Read a checkpoint of any form into the model and optimiser, as Accelerate has prepared them."""
    form = next((form for form, name in _MODELS.items() if (checkpoint / name).exists()), None)
    if form in (None, _form_of_run(accelerator)):
        accelerator.load_state(str(checkpoint))
        return
    inner = optimizer.optimizer
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}
    with main_alone() as is_main:
        if is_main:
            weights, state = _read(form, checkpoint)
            _tie(model, weights)
            if form == "whole":
                state = _by_name(model, inner, state)
    several = accelerator.num_processes > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several, cpu_offload=False)
    set_model_state_dict(model, weights, options=options)
    set_optimizer_state_dict(model, inner, state, options=options)


def _form_of_run(accelerator: accelerate.Accelerator) -> str:
    if accelerator.distributed_type != DistributedType.FSDP:
        return "whole"
    return "gathered" if "FULL" in accelerator.state.fsdp_plugin.state_dict_type.name else "shards"


def _read(form: str, checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The whole state of the model and of the optimiser, on the CPU; that of "whole" by numbers of parameters."""
    model = checkpoint / _MODELS[form]
    if form == "shards":
        return _assembled(model)["model"], _assembled(checkpoint / "optimizer_0")["optimizer"]
    state = torch.load(checkpoint / "optimizer.bin", map_location="cpu", weights_only=True)
    weights = load_file(model) if form == "whole" else torch.load(model, map_location="cpu", weights_only=True)
    return weights, state


def _assembled(folder: Path) -> dict[str, Any]:
    """All that a folder of shards holds; `dcp.load` alone would ask for tensors to read into."""
    found: dict[str, Any] = {}
    _load_state_dict(found, dcp.FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return found


def _tie(model: Any, weights: dict[str, Any]) -> None:
    """Give each name of a tied parameter its tensor, of which a safetensors file keeps one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        held = next((name for name in tied if name in weights), None)
        if held is not None:
            weights.update(dict.fromkeys(tied, weights[held]))


def _by_name(model: Any, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser by names of parameters instead of by their numbers in its groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    learning = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [group | {"params": [learning[n] for n in group["params"]]} for group in state["param_groups"]]
    return {"state": {learning[n]: values for n, values in state["state"].items()}, "param_groups": groups}
