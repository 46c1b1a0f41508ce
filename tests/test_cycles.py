"""Which cycles a measured pace chooses, on a clock and a drafter of known speed and skill."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from unmask.sampling.cycles import Costs, Cycle, MeasuredPace

LONGEST = 8


def write(pace: MeasuredPace, cost: Callable[[int], float], skill: float, tokens: int) -> tuple[float, Counter[Cycle]]:
    """Seconds for so many tokens, each draft accepted with probability `skill`, and the cycles that were made."""
    draw, seconds, made, cycles = random.Random(0), 0.0, 0, Counter[Cycle]()
    while made < tokens:
        cycle = pace.choose(1)
        cycles[cycle] += 1
        for inputs in cycle.inputs(pace.spare_masks):
            seconds += cost(inputs)
            pace.learn_cost(inputs, cost(inputs))
        drafts = cycle.length - 1
        accepted = next((i for i in range(drafts) if draw.random() > skill), drafts)
        pace.learn_drafts([drafts], [accepted])
        made += cycle.forwards + accepted
    return seconds, cycles


def best(cost: Callable[[int], float], skill: float) -> float:
    """Tokens a second of the best of all cycles."""
    pace = MeasuredPace(LONGEST, Costs())

    def speed(cycle: Cycle) -> float:
        accepted = sum(skill**i for i in range(1, cycle.length))
        return cycle.gain(accepted) / sum(map(cost, cycle.inputs(1)))

    return max(map(speed, pace.cycles))


def flat(inputs: int) -> float:  # noqa: ARG001
    return 1.0


def gentle(inputs: int) -> float:
    return 0.9 + 0.1 * inputs


def steep(inputs: int) -> float:
    return 0.2 + 0.8 * inputs


def step(inputs: int) -> float:
    return 1.0 if inputs == 1 else 2.5


@pytest.mark.parametrize("skill", [0.0, 0.3])
@pytest.mark.parametrize("cost", [steep, step])
def test_drafts_that_do_not_pay_cost_less_than_a_twentieth(cost: Callable[[int], float], skill: float) -> None:
    pace = MeasuredPace(LONGEST, Costs())
    write(pace, cost, skill, 500)
    seconds, cycles = write(pace, cost, skill, 4000)
    assert seconds < 1.05 * 4000 * cost(1)
    assert cycles[Cycle(1, 1)] > 0.9 * sum(cycles.values())


@pytest.mark.parametrize("skill", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [flat, gentle])
def test_drafts_that_pay_are_made_in_about_the_best_cycle(cost: Callable[[int], float], skill: float) -> None:
    pace = MeasuredPace(LONGEST, Costs())
    write(pace, cost, skill, 500)
    seconds, _ = write(pace, cost, skill, 4000)
    assert 4000 / seconds > 0.9 * best(cost, skill)


def test_a_drafter_that_becomes_good_is_tried_again() -> None:
    pace = MeasuredPace(LONGEST, Costs())
    write(pace, gentle, 0.0, 1000)
    write(pace, gentle, 0.9, 1000)
    seconds, _ = write(pace, gentle, 0.9, 2000)
    assert 2000 / seconds > 0.85 * best(gentle, 0.9)


def test_costs_are_kept_for_the_next_call_and_a_slow_first_forward_is_forgotten() -> None:
    costs = Costs()
    costs.learn(4, 60.0)  # a first forward that compiles
    costs.learn(4, 1.0)
    assert costs.of(4) == 1.0
    assert costs.of(5) == 1.0
    assert costs.of(3) == 0.0


def test_costs_of_sizes_not_tried_lie_on_lines_through_those_that_were() -> None:
    costs = Costs({1: 1.0, 9: 2.0})
    assert costs.of(5) == 1.5
    assert costs.of(17) == 2.5  # half the slope: it looks cheap
