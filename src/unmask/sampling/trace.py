"""A record of what a sampler did: each forward's commits, their confidence, and its guesses for the other positions.

A `Trace` takes the place of the sampler's commit rule and of its callback, so samplers need no code for it:

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
    """Records the steps of one call of a sampler.

    It relies on the order of calls that every sampler of this folder keeps: in each forward first the commit rule, then
    the callback for each row that commits, in the order of the batch. on_step: called with each step as it happens.
    callback: the sampler's own one, to pass the commits on to.
    """

    def __init__(
        self,
        select: Selector | None = None,
        on_step: Callable[[Step], None] | None = None,
        callback: Callback | None = None,
    ) -> None:
        self.steps: list[Step] = []
        self.select = _RecordingRule(select or Threshold())
        self._on_step, self._callback = on_step, callback
        self._num_calls: dict[int, int] = {}

    def callback(self, row: int, positions: list[int], tokens: list[int]) -> None:
        """The `callback` of a sampler."""
        self._num_calls[row] = self._num_calls.get(row, 0) + 1
        if self.select.records:
            record = self.select.records.popleft()
            start = positions[0] - record.columns[0]
            commits = [Guess(*commit) for commit in zip(positions, tokens, record.confidence, strict=True)]
            guesses = [Guess(start + column, token, p) for column, token, p in record.others]
            step = Step(row, self.select.num_forwards, commits, guesses)
        else:
            commits = [Guess(*commit, None) for commit in zip(positions, tokens, strict=True)]
            step = Step(row, self._num_calls[row], commits, [])
        self.steps.append(step)
        if self._on_step is not None:
            self._on_step(step)
        if self._callback is not None:
            self._callback(row, positions, tokens)


class _Record(NamedTuple):
    """What a commit rule saw of one row. columns, confidence: of each commit, columns counted in the block.

    others: (column, likeliest token, its probability) of each position that stays masked.
    """

    columns: list[int]
    confidence: list[float]
    others: list[tuple[int, int, float]]


class _RecordingRule:
    """A commit rule that keeps a record for each row that commits, until the row's callback."""

    def __init__(self, rule: Selector) -> None:
        self.rule, self.num_forwards = rule, 0
        self.records: deque[_Record] = deque()

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        commit = self.rule(candidates, at_least)
        self.num_forwards += 1
        best = candidates.logits.double().softmax(-1).max(-1)
        masked = candidates.masked.nonzero().tolist()
        likeliest = list(zip(masked, best.indices.tolist(), best.values.tolist(), strict=True))
        for i in commit.any(-1).nonzero()[:, 0].tolist():
            columns = commit[i].nonzero()[:, 0].tolist()
            others = [(j, token, p) for (row, j), token, p in likeliest if row == i and not commit[i, j]]
            self.records.append(_Record(columns, candidates.confidence[i][commit[i]].tolist(), others))
        return commit
