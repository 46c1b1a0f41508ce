"""The stability rule, and the earlier forwards that samplers hand to a rule that looks back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import block_config, network, random_tokens
from torch import Tensor

from unmask.sampling import Candidates, Canvas, Stability, sample_bidirectional, sample_blocks
from unmask.sampling.commit import commit_best


def candidates(p: list[float], masked: list[bool], previous: Candidates | None = None) -> Candidates:
    """Two tokens; p is the first one's probability at each place."""
    flags = torch.tensor([masked])
    law = torch.tensor([[x, 1 - x] for x in p], dtype=torch.float64)[flags[0]]
    confidence = torch.zeros(1, len(p), dtype=torch.float64).masked_scatter(flags, law.amax(-1))
    return Candidates(flags, confidence, law.log(), torch.zeros_like(confidence), previous=previous)


def test_divergence_by_hand() -> None:
    first = candidates([0.5, 0.9, 0.2], [True, True, True])
    assert first.divergence.tolist() == [[torch.inf] * 3]
    second = candidates([0.5, 0.0, 0.4], [True, False, True], first)
    assert second.divergence[0, :2].tolist() == [0, 0]
    kl = 0.4 * torch.tensor(0.4 / 0.2).log() + 0.6 * torch.tensor(0.6 / 0.8).log()
    assert float(second.divergence[0, 2]) == pytest.approx(float(kl), abs=1e-7)


def test_divergence_with_a_forbidden_token_is_finite() -> None:
    first, second = candidates([1.0], [True]), None
    second = candidates([1.0], [True], first)
    assert float(second.divergence) == 0


def test_commits_what_is_sure_and_still() -> None:
    everything = [True] * 4
    one = candidates([0.95, 0.99, 0.6, 0.95], everything)
    two = candidates([0.95, 0.92, 0.6, 0.95], everything, one)
    three = candidates([0.95, 0.92, 0.6, 0.97], everything, two)
    none = torch.zeros(1, dtype=torch.long)

    def committed(rule: Stability, step: Candidates, at_least: Tensor = none) -> list[int]:
        return rule(step, at_least)[0].nonzero()[:, 0].tolist()

    assert committed(Stability(), one) == [1]  # no forward before: the most confident one alone
    assert committed(Stability(num_steps=1), two) == [0, 3]  # 1 moved by 0.04 nats, 2 is not sure
    assert committed(Stability(num_steps=2), two) == [0]  # one forward back is not enough
    assert committed(Stability(), three) == [0, 3]
    assert committed(Stability(max_divergence=0.001), three) == [0]
    assert committed(Stability(0.5, 1.0), three) == [0, 1, 2, 3]
    assert committed(Stability(), three, torch.tensor([3])) == [0, 1, 3]  # stable ones first, then the sure ones


@dataclass
class Recorder:
    """Commits the most confident place, and keeps each forward's full laws to compare `divergence` with."""

    looks_back: int = 2
    before: dict[tuple[int, ...], Any] = field(default_factory=dict)
    checked: int = 0
    depths: set[int] = field(default_factory=set)

    def __call__(self, now: Candidates, at_least: Tensor) -> Tensor:
        log_p = torch.zeros(*now.masked.shape, now.logits.shape[-1], dtype=torch.float64)
        log_p[now.masked] = now.logits.double().log_softmax(-1).clamp_min(-1e300)
        names = [tuple(row) for row in now.priority.tolist()]  # rows are told apart by their fixed priorities
        for i, name in enumerate(names):
            for j in now.masked[i].nonzero()[:, 0].tolist():
                if name in self.before:
                    old = self.before[name][j]
                    kl = (log_p[i, j].exp() * (log_p[i, j] - old)).sum()
                    assert float(now.divergence[i, j]) == pytest.approx(float(kl), abs=1e-12)
                    self.checked += 1
                else:
                    assert torch.isinf(now.divergence[i, j])
        self.before |= dict(zip(names, log_p, strict=True))
        depth, step = 0, now.previous
        while step is not None:
            depth, step = depth + 1, step.previous
        self.depths.add(depth)
        return commit_best(now.confidence, now.masked, torch.ones_like(at_least), at_least)


@pytest.mark.parametrize("looks_back", [1, 2])
def test_block_sampler_hands_over_the_forwards_of_the_same_block(looks_back: int) -> None:
    recorder = Recorder(looks_back)
    prompts = [random_tokens(n, seed=n) for n in (3, 4, 9)]
    sample_blocks(network(), block_config(4), prompts, max_new_tokens=9, select=recorder)
    assert recorder.checked > 20
    assert recorder.depths == set(range(looks_back + 1))


def test_canvas_sampler_hands_over_the_forwards_of_the_rows_that_are_left() -> None:
    recorder = Recorder()
    canvases = [Canvas.around(random_tokens(3, seed=n), n) for n in (2, 5, 8)]
    sample_bidirectional(
        network(), block_config(attention="bidirectional", clean=None, block_size=None), canvases, select=recorder
    )
    assert recorder.checked == (1 + 4 * 5 // 2 + 7 * 8 // 2)  # places seen again: 1; 4+3+2+1; 7+6+...+1
    assert recorder.depths == {0, 1, 2}


@pytest.mark.parametrize("rule", [Stability(0.01, 10.0, 1), Stability(0.015, 0.3, 2)])
def test_batched_rows_equal_each_alone(rule: Stability) -> None:
    net, config = network(), block_config(4)
    prompts = [random_tokens(n, seed=n) for n in (1, 6, 11)]
    together = sample_blocks(net, config, prompts, max_new_tokens=13, select=rule)
    for i, prompt in enumerate(prompts):
        alone = sample_blocks(net, config, [prompt], max_new_tokens=13, select=rule)
        assert alone.new_tokens[0] == together.new_tokens[i]
        assert alone.num_forwards[0] == together.num_forwards[i] < 13
