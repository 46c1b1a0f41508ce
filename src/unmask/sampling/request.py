"""What every decoder is asked, and what it returns."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from unmask.limits import check_function, check_seed, check_whole
from unmask.plain_numbers import plain_fields
from unmask.sampling.constraint import Constraints
from unmask.sampling.tokens import Seed, check_sampling

Stop = Callable[[int, list[int]], int | None]
"""(row, its new tokens so far, from the first) -> how many of them to keep if the row ends there, else None."""

Callback = Callable[[int, list[int], list[int]], None]
"""(row, absolute positions, tokens) at each commit."""


@dataclass(frozen=True)
class Request:
    """How much to write, how to draw tokens, and where a row ends; the same for every decoder.

    max_new_tokens: of a row. temperature: 0 is greedy. top_p, top_k: sample from the smallest set of tokens with that
    mass, from that many tokens. seed: the noise of a token is a function of (seed, row, position); a list has one
    for each row. end_token_ids: a row ends with any of them. stop: ends a row by its tokens. callback: called at
    each commit. batch_size: rows that decode at a time, all unless given; the next prompt takes the place of one that
    ends. context_length: positions of the model, None without a limit. constraint: what the new text of every row must
    obey, or a list of one for each row. Raises ValueError for a value out of range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: Seed = 0
    end_token_ids: Sequence[int] = ()
    stop: Stop | None = None
    callback: Callback | None = None
    batch_size: int | None = None
    context_length: int | None = None
    constraint: Constraints | None = None

    def __post_init__(self) -> None:
        plain_fields(self)
        check_function("callback", self.callback, "print")
        check_whole("max_new_tokens", self.max_new_tokens)
        check_whole("batch_size", self.batch_size, why=": it is how many rows decode at a time")
        check_sampling(self.temperature, self.top_p, self.top_k)
        object.__setattr__(self, "temperature", float(self.temperature))  # tensors take no integers beyond 64 bits

    def check_rows(self, rows: int) -> None:
        """Raise ValueError for a list that has not one entry for each row."""
        if isinstance(self.seed, Sequence) and len(self.seed) != rows:
            raise ValueError(f"seed has {len(self.seed)} numbers for {rows} prompts: give one for each")
        if isinstance(self.constraint, Sequence) and len(self.constraint) != rows:
            raise ValueError(
                f"constraint is a list of {len(self.constraint)} for {rows} prompts: give one for each, None for a "
                "free one"
            )

    def limit(self, prompt_length: int) -> int:
        """New tokens that a row may have: max_new_tokens, less where the context ends before."""
        if self.context_length is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self.context_length - prompt_length)

    def kept(self, row: int, new_tokens: list[int]) -> int | None:
        """How many of a row's new tokens stay if one of them ends it, up to and with that one; None if none does.

        Both an end token and `stop` may end a row; `stop` sees the tokens up to the first end token.
        """
        end = first_end(new_tokens, self.end_token_ids)
        if self.stop is None or not new_tokens:
            return end
        stopped = self.stop(row, new_tokens[:end])
        return end if stopped is None else stopped


@dataclass(frozen=True)
class SampledTokens:
    """New tokens of each row, up to and with the one that ended it, and the forwards each row needed alone.

    num_forwards: (rows,) passes after the prefill: denoising, and cache writes that no denoising pass carried.
    num_prefill_forwards: (rows,) 0 or 1, twice that with guidance. cycle_gains: speculation only, (rows, longest + 1),
    how many cycles of the row gained j tokens: its new tokens are sum_j j * cycle_gains[:, j]. num_inputs: speculation
    only, (rows,) tokens and masks that those forwards were made over: 1 a forward in AR decoding. num_forced: with a
    constraint only, (rows,) new tokens that needed no forward, since no other was allowed.
    """

    new_tokens: list[list[int]]
    num_forwards: Tensor
    num_prefill_forwards: Tensor
    cycle_gains: Tensor | None = None
    num_inputs: Tensor | None = None
    num_forced: Tensor | None = None


def first_end(tokens: Sequence[int], end_token_ids: Sequence[int]) -> int | None:
    """Length up to and with the first end token, or None."""
    return next((i + 1 for i, token in enumerate(tokens) if token in end_token_ids), None)


def given_or_new(seed: int | None) -> int:
    """The seed as a plain number, or one that nobody chose; TypeError for what is no whole number."""
    check_seed(seed)
    return secrets.randbits(31) if seed is None else int(seed)
