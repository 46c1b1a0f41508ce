"""What a run takes before it starts: memory by part, tokens a second and hours, on one device or several.

Memory follows from the sizes of the model and the settings; the numbers that a layer keeps of a token are counted from
its linear maps, and lie within a fifth of what was measured (results/gpu, tests/test_plan.py). Tokens a second are
those measured on one H200 at 0.6B parameters; a device does the same arithmetic a second at every size. What devices
lose by waiting for each other is not known here, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unmask.goals import GOALS, SIZES
from unmask.hf.sizes import Sizes
from unmask.resolve import Resolved, against_shards

FLOAT32, HALF = 4, 2
"""Bytes of a number. What learns has its weight, a gradient and two moments of AdamW, all of the same type."""
PACKED = {"nf4": 0.5, "int8": 1.0}
"""Bytes of a weight that a quantisation packs."""
RATE = 685.0
"""TFLOP/s of a large matrix product on the H200 whose tokens per second are known."""
RECOMPUTED = 4 / 3
"""Time of a step whose layers run again in the backward pass."""


@dataclass(frozen=True)
class Layout:
    """How a run lies on devices. sharded: weights, gradients and moments are split (FSDP2), not repeated (DDP).

    checkpointing: layers keep their input alone, and run again in the backward pass.
    """

    name: str
    sharded: bool
    checkpointing: bool


LAYOUTS = (
    Layout("whole on each device", False, False),
    Layout("whole, checkpointed", False, True),
    Layout("FSDP2", True, False),
    Layout("FSDP2, checkpointed", True, True),
)


class Memory(NamedTuple):
    """Bytes on each device. gathered: of layers whose weights are there whole for the moment."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    gathered: float


class Estimate(NamedTuple):
    """What a run takes in a layout. rows: those that run at once on a device, as many as fit, else 1."""

    layout: Layout
    rows: int
    memory: Memory
    total: float
    fits: bool
    tokens_per_second: float
    hours: float


def trainable(sizes: Sizes, settings: Resolved) -> int:
    """Parameters that learn: all, or those of a drafter's or LoRA's adapters."""
    rank = settings.drafter_rank if settings.objective == "distill" else settings.lora_rank
    if rank is None:
        return sizes.num_parameters
    return sum(rank * (rows + columns) for rows, columns in sizes.maps)


def passes(settings: Resolved) -> float:
    """Tokens that run for one training token: a noisy row beside its clean one counts 2."""
    return 2.0 if settings.attention == "two_stream" or settings.objective == "distill" else 1.0


def memory_of(sizes: Sizes, settings: Resolved, layout: Layout, devices: int, rows: int) -> Memory:
    """Bytes on each device, with so many rows of `max_length` at once."""
    share = devices if layout.sharded else 1
    learning = trainable(sizes, settings)
    of_weights = learns = HALF if settings.dtype == "bfloat16" else FLOAT32
    weights: float = of_weights * sizes.num_parameters
    if learning < sizes.num_parameters:
        learns = FLOAT32  # adapters
    if settings.quantize is not None:
        weights -= (of_weights - PACKED[settings.quantize]) * sum(rows * columns for rows, columns in sizes.maps)
    number = HALF if settings.mixed_precision in ("bf16", "fp16") else of_weights
    teacher = settings.teacher == "parent" and learning == sizes.num_parameters
    tokens = rows * settings.max_length * passes(settings)
    kept = sizes.num_layers * sizes.per_token
    if layout.checkpointing:
        kept = sizes.num_layers * sizes.hidden + sizes.per_token
    return Memory(
        weights / share,
        learns * learning / share,
        (2 * learns if settings.optimizer == "adamw" else 2) * learning / share,
        number * sizes.num_parameters * teacher / share,
        number * kept * tokens,
        2 * number * sizes.largest_layer if layout.sharded else 0.0,
    )


def rate_of(sizes: Sizes, settings: Resolved, tflops: float = RATE) -> float:
    """Training tokens a second of one device with this rate of matrix products, in bfloat16."""
    rates = {goal.recipe: goal.rate for goal in GOALS}
    alike = "efficient-dlm" if passes(settings) == 2 else "diffullama"  # for recipes that were not timed
    recipe = next((name for name in rates if settings.recipe.startswith(name)), alike)
    return rates[recipe] * SIZES["0.6B"] / sizes.active * tflops / RATE


def estimates(
    sizes: Sizes, settings: Resolved, devices: int, device_bytes: float, num_tokens: float, tflops: float = RATE
) -> list[Estimate]:
    """Every layout that so many devices have, and that the settings go with, the simplest first."""
    found = []
    for layout in LAYOUTS:
        if layout.sharded and (devices == 1 or against_shards(settings) is not None):
            continue
        most = max(1, min(settings.micro_batch_size, settings.batch_size // devices))
        tried = [(rows, memory_of(sizes, settings, layout, devices, rows)) for rows in range(most, 0, -1)]
        rows, memory = next(((r, m) for r, m in tried if sum(m) <= USABLE * device_bytes), tried[-1])
        rate = devices * rate_of(sizes, settings, tflops) / (RECOMPUTED if layout.checkpointing else 1.0)
        total = sum(memory)
        found.append(
            Estimate(layout, rows, memory, total, total <= USABLE * device_bytes, rate, num_tokens / rate / 3600)
        )
    return found


USABLE = 0.9
"""Share of a device's memory that a run gets: the rest is the driver's, and lost between pieces."""


def fastest(found: Sequence[Estimate]) -> Estimate | None:
    """The layout to take: the fastest that fits, of several the first; None if none does."""
    return max((e for e in found if e.fits), key=lambda e: e.tokens_per_second, default=None)
