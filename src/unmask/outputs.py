"""What `generate` and `infill` return."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unmask.limits import check_function
from unmask.replay_page import Gap, facts_of, in_frame, replay_page
from unmask.sampling import Decoder, Guess, SampledTokens, Step
from unmask.sampling.request import Callback
from unmask.tables import number_of, tokens_in_forwards

MOST_REPLAYED = 4
"""Prompts of a call of `generate` that keep their history: with many rows, keeping it would take time."""


@dataclass(frozen=True)
class History:
    """Where the rows of a call of `generate` or `infill` committed tokens, one step after the other.

    prompts: token ids of each, or of what stands before its first gap. facts: what was asked for, in words. commits: of
    each row, the positions of each step. Infilling only: gaps, of each row; kept, which of its steps filled them, and
    not with another candidate length.
    """

    tokenizer: Any
    prompts: Sequence[Sequence[int]]
    facts: Mapping[str, str]
    commits: list[list[list[int]]]
    gaps: Sequence[Sequence[Gap]] | None = None
    kept: Sequence[slice] | None = None


def recorded(
    tokenizer: Any, prompts: Sequence[Tensor], decoder: Decoder, callback: Callback | None
) -> tuple[History | None, Callback | None]:
    """A history that is written while rows are decoded, and the callback that does it and calls the given one.

    prompts: of each row the ids of the prompt, or of what stands before its first gap.
    """
    check_function("callback", callback, "print")
    if len(prompts) > MOST_REPLAYED:
        return None, callback
    history = History(tokenizer, [prompt.tolist() for prompt in prompts], facts_of(decoder), [[] for _ in prompts])

    def keep(row: int, positions: list[int], tokens: list[int]) -> None:
        history.commits[row].append(positions)
        if callback is not None:
            callback(row, positions, tokens)

    return history, keep


@dataclass(frozen=True, repr=False)
class SampleOutput:
    """What `generate` and `infill` return, one entry a row.

    sequences: (batch, length) int64, prompt included, padded on the right. texts: the new text, without end
    token and stop string. num_new_tokens: (batch,) up to and with the end token or the token that completed a
    stop string. num_forwards: (batch,) passes after the prefill that the row needed. num_prefill_forwards:
    (batch,). Speculative mode only: cycle_gains, (batch, n), cycles of the row that gained j tokens each; num_inputs,
    (batch,), tokens and masks that the forwards were made over, which is 1 a forward in AR decoding. With a constraint
    only: num_forced, (batch,) new tokens that needed no forward, since no other was allowed. Infilling only: fills, the
    text of each gap, of which `texts` is all; filled, the whole text with its gaps filled. history: of a few rows, the
    order of commits, with which an output replays itself in a notebook.
    """

    sequences: Tensor
    texts: list[str]
    num_new_tokens: Tensor
    num_forwards: Tensor
    num_prefill_forwards: Tensor
    cycle_gains: Tensor | None = None
    num_inputs: Tensor | None = None
    num_forced: Tensor | None = None
    fills: list[list[str]] | None = None
    filled: list[str] | None = None
    history: History | None = field(default=None, compare=False)

    @property
    def tokens_per_cycle(self) -> Tensor | None:
        """(batch,) float: num_new_tokens per cycle of drafts and their verification; None outside speculative mode."""
        if self.cycle_gains is None:
            return None
        return self.num_new_tokens / self.cycle_gains.sum(-1).clamp_min(1)

    @property
    def tokens_per_forward(self) -> Tensor:
        """(batch,) float: num_new_tokens / num_forwards."""
        return self.num_new_tokens / self.num_forwards.clamp_min(1)

    def __repr__(self) -> str:
        rows = [
            f"{text!r} ({number_of(new, 'new token')} in {number_of(forwards, 'forward')})"
            for text, new, forwards in zip(
                self.texts, self.num_new_tokens.tolist(), self.num_forwards.tolist(), strict=True
            )
        ]
        return f"SampleOutput({', '.join(rows)})"

    def counts(self, row: int) -> dict[str, str]:
        """The counts of a row, in words."""
        return {
            "tokens": str(int(self.num_new_tokens[row])),
            "forwards": str(int(self.num_forwards[row])),
            "tokens per forward": f"{float(self.tokens_per_forward[row]):.2f}",
        }

    def new_tokens(self, row: int, prompt_length: int) -> list[int]:
        """The token ids that a row has after its prompt."""
        return list(self.sequences[row, prompt_length : prompt_length + int(self.num_new_tokens[row])].tolist())

    def _repr_html_(self) -> str:
        """For notebooks: the replay of each row where there is a history, else the texts."""
        if self.history is None:
            whole = self.texts if self.filled is None else self.filled
            return "".join(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>' for text in whole)
        return "".join(in_frame(self._page(self.history, row), "26em") for row in range(len(self.texts)))

    def _page(self, history: History, row: int) -> str:
        prompt, commits = history.prompts[row], history.commits[row]
        if history.kept is not None:
            commits = commits[history.kept[row]]
        gaps = [Gap(prompt, self.new_tokens(row, len(prompt)), len(prompt))]
        if history.gaps is not None:
            gaps = list(history.gaps[row])
        tokens = {gap.start + i: token for gap in gaps for i, token in enumerate(gap.new)}
        steps = [
            Step(row, number, [Guess(at, tokens[at], None) for at in positions if at in tokens], [])
            for number, positions in enumerate(commits, 1)
        ]
        facts = {**history.facts, **self.counts(row)}
        return replay_page(history.tokenizer, gaps, steps, title="", facts=facts)


def summary(output: SampleOutput) -> str:
    """The counts of the one row of an output, in a line."""
    counts = tokens_in_forwards(int(output.num_new_tokens[0]), int(output.num_forwards[0]))
    return f"{counts} ({float(output.tokens_per_forward[0]):.2f} per forward)"


def sample_output(
    sequences: Sequence[Sequence[int]], sampled: SampledTokens, texts: list[str], pad: int, **more: Any
) -> SampleOutput:
    """Rows of tokens, filled up with `pad`, and what sampling counted; more: further fields."""
    width = max(map(len, sequences))
    return SampleOutput(
        sequences=torch.tensor([[*row, *[pad] * (width - len(row))] for row in sequences]),
        texts=texts,
        num_new_tokens=torch.tensor([len(new) for new in sampled.new_tokens]),
        num_forwards=sampled.num_forwards,
        num_prefill_forwards=sampled.num_prefill_forwards,
        cycle_gains=sampled.cycle_gains,
        num_inputs=sampled.num_inputs,
        num_forced=sampled.num_forced,
        **more,
    )
