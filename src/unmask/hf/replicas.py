"""Networks that share their weights, for threads that run side by side."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import torch

from unmask.hf.long_rope import rotary_modules
from unmask.hf.network import HFNetwork, lock_of
from unmask.hf.temperature import layers_with_temperature


def replicate(network: HFNetwork) -> HFNetwork:
    """The same network on a copy of the model that shares its weights and buffers, but not its gradients.

    Threads can run forward and backward at the same time, each on its own copy, since each copy has its own hooks.
    """
    model = network.model
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
    changing = {id(b) for module in rotary_modules(model) for b in module.buffers()}  # written by each pass
    memo |= {id(b): b for b in model.buffers() if id(b) not in changing}
    twin = copy.copy(network)
    twin.model = twin.forward = copy.deepcopy(model, memo)
    twin._recent_masks, twin._plan, twin.compiled, twin.packed = deque(maxlen=2), None, None, None
    twin.lock, twin.with_temperature = lock_of(twin.model), layers_with_temperature(twin.model)
    twin.head, twin.config = twin.model.get_output_embeddings(), twin.model.config.get_text_config()
    return twin
