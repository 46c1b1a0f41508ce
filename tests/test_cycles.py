"""Which cycles a measured pace chooses, on a clock and a drafter of known speed and skill."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from unmask.sampling.cycles import Costs, Cycle, Experience, MeasuredPace, experience_of

LONGEST = 8
ADAPTERS = 0.2
"""What a forward with masks takes longer."""


def write(pace: MeasuredPace, cost: Callable[[int], float], skill: float, tokens: int) -> tuple[float, Counter[Cycle]]:
    """Seconds for so many tokens, each draft accepted with probability `skill`, and the cycles that were made."""
    draw, seconds, made, cycles = random.Random(0), 0.0, 0, Counter[Cycle]()
    while made < tokens:
        cycle = pace.choose(1)
        cycles[cycle] += 1
        for inputs, masks in cycle.inputs(pace.spare_masks):
            took = cost(inputs) + (ADAPTERS if masks else 0.0)
            seconds += took
            pace.learn_cost(inputs, masks, took)
        drafts = cycle.length - 1
        accepted = next((i for i in range(drafts) if draw.random() > skill), drafts)
        pace.learn_drafts([drafts], [accepted])
        made += cycle.forwards + accepted
    return seconds, cycles


def best(cost: Callable[[int], float], skill: float) -> float:
    """Tokens a second of the best of all cycles."""
    pace = MeasuredPace(LONGEST, Experience())

    def speed(cycle: Cycle) -> float:
        accepted = sum(skill**i for i in range(1, cycle.length))
        return cycle.gain(accepted) / sum(cost(n) + (ADAPTERS if masks else 0.0) for n, masks in cycle.inputs(1))

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
    pace = MeasuredPace(LONGEST, Experience())
    write(pace, cost, skill, 500)
    seconds, cycles = write(pace, cost, skill, 4000)
    assert seconds < 1.05 * 4000 * cost(1)
    assert cycles[Cycle(1, 1)] > 0.9 * sum(cycles.values())


@pytest.mark.parametrize("skill", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("cost", [flat, gentle])
def test_drafts_that_pay_are_made_in_about_the_best_cycle(cost: Callable[[int], float], skill: float) -> None:
    pace = MeasuredPace(LONGEST, Experience())
    write(pace, cost, skill, 500)
    seconds, _ = write(pace, cost, skill, 4000)
    assert 4000 / seconds > 0.9 * best(cost, skill)


def test_a_drafter_that_becomes_good_is_tried_again() -> None:
    pace = MeasuredPace(LONGEST, Experience())
    write(pace, gentle, 0.0, 1000)
    write(pace, gentle, 0.9, 1000)
    seconds, _ = write(pace, gentle, 0.9, 2000)
    assert 2000 / seconds > 0.85 * best(gentle, 0.9)


def test_the_next_call_knows_what_the_last_one_saw() -> None:
    seen = Experience()
    first, _ = write(MeasuredPace(LONGEST, seen), steep, 0.1, 64)
    pace = MeasuredPace(LONGEST, seen)
    assert pace.tried[0] > 0
    second, cycles = write(pace, steep, 0.1, 64)
    assert second < first
    assert second < 1.05 * 64 * steep(1)
    assert cycles[Cycle(1, 1)] > 0.9 * sum(cycles.values())


def test_packed_weights_have_costs_of_their_own() -> None:
    class Part:
        """Something that a weak reference can point to."""

    network = Part()
    network.model, network.packed = Part(), None  # type: ignore[attr-defined]
    plain = experience_of(network)
    network.packed = Part()  # type: ignore[attr-defined]
    assert experience_of(network) is not plain
    assert experience_of(network) is experience_of(network)
    network.packed = None  # type: ignore[attr-defined]
    assert experience_of(network) is plain


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
