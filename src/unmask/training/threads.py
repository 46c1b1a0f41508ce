"""The backward pass of a small model spread over the threads of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from unmask import hf
from unmask.core.batch import Batch
from unmask.core.objectives import LossOutput
from unmask.resolve import Resolved


class ThreadedBackward:
    """Threads that each run the forward and backward pass of some rows, with single-threaded kernels.

    A small model's operations are too small to be split over threads; its rows can be. Gradients are summed in the
    order of the rows, so that a run stays a function of its seed. replicate: makes a network that shares the weights
    and has gradients of its own.
    """

    def __init__(self, network: Any, replicate: Callable[[Any], Any]) -> None:
        self.networks = [network] + [replicate(network) for _ in range(torch.get_num_threads() - 1)]
        self.pool = ThreadPoolExecutor(len(self.networks), initializer=lambda: torch.set_num_threads(1))

    def run(self, loss_of: Callable[..., LossOutput], batch: Batch, rows: Tensor, scale: float) -> Tensor:
        """Add `scale` times the gradient of the rows' loss sum to the first network's model; return the sum, detached.

        loss_of: (network, batch=, rows=) -> loss. rows: (batch,) numbers in the global batch.
        """
        size = -(-len(rows) // len(self.networks))

        def work(index: int) -> Tensor:
            part = slice(index * size, (index + 1) * size)
            loss = loss_of(self.networks[index], batch=batch.rows(part.start, part.stop), rows=rows[part])
            (loss.sum * scale).backward()
            return loss.sum.detach().double()

        sums = list(self.pool.map(work, range(-(-len(rows) // size))))
        first, *others = (list(network.model.parameters()) for network in self.networks)
        for other in others:
            for parameter, copy in zip(first, other, strict=True):
                if copy.grad is not None:
                    parameter.grad = copy.grad if parameter.grad is None else parameter.grad.add_(copy.grad)
                    copy.grad = None
        return torch.stack(sums).sum()

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown()


def replication(model: Any, settings: Resolved) -> Callable[[Any], Any] | None:
    """How a small model's network is copied for the threads of a CPU; None where a copy would not be the model.

    Gated adapters hook into the one model and a teacher's head has one too, DiffuLLaMA's parity options speak of
    whole micro-batches, and a large model's operations fill all threads by themselves.
    """
    small = sum(p.numel() for p in model.parameters()) < 20e6
    hooked = settings.objective == "distill" or settings.lora_rank is not None or settings.teacher is not None
    plain = not hooked and not settings.gradient_checkpointing and not settings.compile_layers
    split = settings.loss_normaliser == "tokens" and not settings.anneal_redraw
    return hf.replicate if small and plain and split and settings.mixed_precision == "no" else None
