"""Watching a sampler: what each forward committed, how sure it was, and what it would have put elsewhere.

A `Trace` goes between a sampler and its commit rule, and between a sampler and its callback; no sampler knows of it:

    trace = Trace(Threshold(0.9))
    lm.generate(prompt, select=trace.select, callback=trace.callback)
    trace.steps
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from unmask.sampling.commit import Candidates, Selector, Threshold
from unmask.sampling.request import Callback


class Guess(NamedTuple):
    """A token at an absolute position. confidence: its probability at temperature 1, None outside diffusion mode."""

    position: int
    token: int
    confidence: float | None


@dataclass(frozen=True)
class Step:
    """A row's commits of one forward. number: of the forward, from 1 (AR: of the token; speculation: of the cycle).

    guesses: the likeliest token of every position of the active block that stays masked.
    """

    row: int
    number: int
    commits: list[Guess]
    guesses: list[Guess]


class Trace:
    """Records the steps of one call of a sampler in which each forward calls the rule, then the callback of each row.

    The samplers of `sampling` do so for the rows that committed something, in the order of the batch. then: told
    of each step as it happens. callback: another one to pass commits on to.
    """

    def __init__(
        self,
        select: Selector | None = None,
        then: Callable[[Step], None] | None = None,
        callback: Callback | None = None,
    ) -> None:
        self.steps: list[Step] = []
        self.select = _Watched(select or Threshold())
        self._then, self._callback = then, callback
        self._counts: dict[int, int] = {}

    def callback(self, row: int, positions: list[int], tokens: list[int]) -> None:
        """The `callback` of a sampler."""
        self._counts[row] = self._counts.get(row, 0) + 1
        waiting = self.select.waiting
        if waiting:
            columns, confidence, others = waiting.popleft()
            start = positions[0] - columns[0]
            commits = [Guess(*at) for at in zip(positions, tokens, confidence, strict=True)]
            guesses = [Guess(start + column, token, sure) for column, token, sure in others]
            step = Step(row, self.select.num_forwards, commits, guesses)
        else:
            step = Step(row, self._counts[row], [Guess(*at, None) for at in zip(positions, tokens, strict=True)], [])
        self.steps.append(step)
        if self._then is not None:
            self._then(step)
        if self._callback is not None:
            self._callback(row, positions, tokens)


class _Watched:
    """A commit rule that keeps, for each row that commits, what the callback will not be told."""

    def __init__(self, select: Selector) -> None:
        self.rule, self.num_forwards = select, 0
        self.waiting: deque[tuple[list[int], list[float], list[tuple[int, int, float]]]] = deque()

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        commit = self.rule(candidates, at_least)
        self.num_forwards += 1
        best = candidates.logits.double().softmax(-1).max(-1)
        owner = candidates.masked.nonzero().tolist()
        likeliest = list(zip(owner, best.indices.tolist(), best.values.tolist(), strict=True))
        for i in commit.any(-1).nonzero()[:, 0].tolist():
            columns = commit[i].nonzero()[:, 0].tolist()
            others = [(j, token, p) for (row, j), token, p in likeliest if row == i and not commit[i, j]]
            self.waiting.append((columns, candidates.confidence[i][commit[i]].tolist(), others))
        return commit
