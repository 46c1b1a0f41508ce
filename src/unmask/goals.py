"""Which recipe for which goal: the tokens that it was seen to need, and what a run costs.

Figures are measured (`results/`) or published; between them stand two formulas. Tokens: interpolated in the logarithms
of parameters and tokens between the smallest and the largest parent, the nearest one's beyond. Hours: a device does
the same arithmetic a second at every size, so that tokens per second fall as parameters grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Seen(NamedTuple):
    """A run that did what its recipe is for: the parent's parameters, its tokens, and what was seen where."""

    num_parameters: float
    num_tokens: float
    what: str


_TRI_MODE = (
    Seen(0.135e9, 3.8e6, "SmolLM2-135M: 2.7 tokens per cycle, results/drafter"),
    Seen(8e9, 25e9, "Ministral 3, the ablations of 2607.05722"),
)
_EFFICIENT = (
    Seen(0.87e6, 5e6, "tasks with known answers: the parent's accuracy at 6.5 tokens per forward, results/tasks"),
    Seen(1.5e9, 10e9, "1.5B parameters and more: the parent's accuracy on tasks, 2512.14067"),
)
SEEN: dict[str, tuple[Seen, ...]] = {
    "drafter": (
        Seen(0.135e9, 9.45e6, "SmolLM2-135M: 3.1 tokens per cycle, results/drafter"),
        Seen(8e9, 14.7e9, "Qwen3-8B: 6.0 tokens per cycle, 2609.04010"),
    ),
    "tri-mode": _TRI_MODE,
    "tri-mode-published": _TRI_MODE,
    "efficient-dlm": _EFFICIENT,
    "efficient-dlm-1.5b": _EFFICIENT,
    "efficient-dlm-4b": _EFFICIENT,
    "efficient-dlm-8b": _EFFICIENT,
    "fast-dllm-v2": (Seen(1.5e9, 1e9, "Qwen2.5 of 1.5B and 7B, 2509.26328"),),
    "diffullama": (Seen(7e9, 65e9, "LLaMA-2-7B, 2410.17891"),),
}
"""Recipe -> the smallest budgets seen to be enough, of a small and of a large parent; others have no such run."""


@dataclass(frozen=True)
class Goal:
    """What one wants to have, and the recipe for it.

    parent: what is left of the AR model. decodes: modes. small_rate, rate: training tokens per second on one H200 with
    parents of 0.135B (not compiled) and 0.6B parameters; None was not measured. bytes: of weights, gradients and AdamW
    a parameter of the parent, without activations. note: how `rate` comes about.
    """

    want: str
    recipe: str
    parent: str
    decodes: str
    small_rate: float | None
    rate: float
    bytes: int
    note: str


GOALS = (
    Goal("the same text, faster", "drafter", "all: it is frozen", "speculative, ar", 53_700, 23_800, 4, "measured"),
    Goal("one checkpoint for AR, diffusion and speculation", "tri-mode", "kept close by its frozen copy",
         "ar, diffusion, speculative", 45_700, 28_300, 20, "that of efficient-dlm x 0.67, their ratio at 0.1B"),
    Goal("infilling in any order", "diffullama", "lost", "diffusion, infill", None, 53_900, 16, "measured, compiled"),
    Goal("block diffusion at scale", "efficient-dlm", "lost", "diffusion", 68_300, 42_200, 16, "measured, compiled"),
)  # fmt: skip
SIZES = {"0.1B": 0.135e9, "0.6B": 0.6e9, "4B": 4e9, "8B": 8e9}
"""Column -> parameters of a parent: SmolLM2-135M, and Qwen3 of three sizes."""


def tokens_needed(recipe: str, num_parameters: float) -> float | None:
    """Training tokens that a recipe needs on a parent of this size; None where nothing was seen."""
    seen = SEEN.get(recipe)
    if seen is None:
        return None
    small, large = seen[0], seen[-1]
    if num_parameters <= small.num_parameters or num_parameters >= large.num_parameters:
        return (small if num_parameters <= small.num_parameters else large).num_tokens
    share = math.log(num_parameters / small.num_parameters) / math.log(large.num_parameters / small.num_parameters)
    return small.num_tokens * (large.num_tokens / small.num_tokens) ** share


def too_few(recipe: str, num_parameters: float, num_tokens: float) -> str | None:
    """What to know before a run with fewer tokens than its recipe was seen to need; None if they are enough."""
    needed = tokens_needed(recipe, num_parameters)
    if needed is None or num_tokens >= needed:
        return None
    seen = "; ".join(f"{short(run.num_tokens)} for {run.what}" for run in SEEN[recipe])
    return (
        f"{num_tokens:,.0f} training tokens are few: for a parent of {short(num_parameters)} parameters {recipe} needs "
        f"about {short(needed)}, going by what was seen ({seen}); docs/recipes.md says what fewer give"
    )


class Cost(NamedTuple):
    """Of a run: tokens, hours on one H200, and bytes without activations; whether tokens and hours were measured."""

    num_tokens: float
    hours: float
    num_bytes: float
    measured_tokens: bool
    measured_hours: bool


def cost(goal: Goal, num_parameters: float) -> Cost:
    """What a goal costs with a parent of one of the `SIZES`."""
    needed = tokens_needed(goal.recipe, num_parameters)
    assert needed is not None
    small, middle = SIZES["0.1B"], SIZES["0.6B"]
    known = {small: goal.small_rate, middle: goal.rate if goal.note.startswith("measured") else None}
    measured = known.get(num_parameters)
    rate = measured or goal.rate * middle / num_parameters
    seen = any(run.num_parameters == num_parameters for run in SEEN[goal.recipe])
    return Cost(needed, needed / rate / 3600, goal.bytes * num_parameters, seen, measured is not None)


def short(number: float) -> str:
    """A number in two digits with its unit, such as 9.4M or 65B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{float(f'{number / size:.2g}'):g}{unit}"
    return f"{float(f'{number:.2g}'):g}"
