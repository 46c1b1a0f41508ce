"""What every decoder is asked, and what it returns."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from unmask.limits import check_function, check_seed, check_whole
from unmask.plain_numbers import plain_fields
from unmask.sampling.constraint import Constraint, Constraints, constraint_of
from unmask.sampling.tokens import Sampling, Seed, check_sampling

REQUEST_OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "stop_strings", "seed", "callback", "constraint")
"""What every decoder is asked, by the names that `generate` has for it."""

Stop = Callable[[int, list[int]], int | None]
"""(row, its new tokens so far, from the first) -> how many of them to keep if the row ends there, else None."""

Callback = Callable[[int, list[int], list[int]], None]
"""(row, absolute positions, tokens) at each commit."""

Observer = Callable[[int, Tensor], None]
"""(row, logits (n, vocabulary) of the tokens that are committed next), before the callback of that commit.

They are the network's own, before temperature, top-p, top-k and constraints. A row that ends drops its last ones, and a
token that a constraint forces has none.
"""


@dataclass(frozen=True)
class Request:
    """How much to write, how to draw tokens, and where a row ends; the same for every decoder.

    max_new_tokens: of a row. temperature: 0 is greedy. top_p, top_k: sample from the smallest set of tokens with that
    mass, from that many tokens. seed: the noise of a token is a function of (seed, row, position); a list has one
    for each row. end_token_ids: a row ends with any of them. stop: ends a row by its tokens. callback: called at
    each commit. batch_size: rows that decode at a time, all unless given; the next prompt takes the place of one that
    ends. context_length: positions of the model, None without a limit. constraint: what the new text of every row must
    obey, or a list of one for each row. observer: called before each commit whose tokens the network has scored. Raises
    ValueError for a value out of range.
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
    observer: Observer | None = None

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

    def sampling(self, row: int) -> Sampling:  # noqa: ARG002
        """How the tokens of a row are drawn."""
        return Sampling(self.temperature, self.top_p, self.top_k)

    def ends(self, row: int) -> Sequence[int]:  # noqa: ARG002
        """The end tokens of a row."""
        return self.end_token_ids

    def limit(self, prompt_length: int, row: int = 0) -> int:  # noqa: ARG002
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


class RowRequests:
    """What a batch reads like one `Request`, where rows come and go, each with a request of its own.

    num_rows: that the batch has at a time. Of a row's request the seed is a pair (seed, number), as in a list of seeds.
    """

    batch_size = None

    def __init__(self, num_rows: int) -> None:
        self.context_length: int | None = None
        self._of = [Request(1)] * num_rows
        self.seed: list[tuple[int, int]] = [(0, 0)] * num_rows
        self.constraint: list[Constraint | None] = [None] * num_rows

    def put(self, row: int, request: Request) -> None:
        """Give a row its request."""
        seed = request.seed[0] if isinstance(request.seed, Sequence) else request.seed
        self._of[row], self.context_length = request, request.context_length
        self.seed[row] = seed if isinstance(seed, tuple) else (seed, 0)
        self.constraint[row] = constraint_of(request.constraint, 0)

    def end(self, row: int) -> None:
        """End a row at its next tokens, and say nothing of them."""
        self._of[row] = Request(1, stop=lambda _, new: len(new))

    @property
    def stop(self) -> Stop | None:
        """Of all rows; None if none has one."""
        return self._stop if any(request.stop is not None for request in self._of) else None

    @property
    def callback(self) -> Callback | None:
        """Of all rows; None if none has one."""
        return self._callback if any(request.callback is not None for request in self._of) else None

    @property
    def observer(self) -> Observer | None:
        """Of all rows; None if none has one."""
        return self._observer if any(request.observer is not None for request in self._of) else None

    def sampling(self, row: int) -> Sampling:
        return self._of[row].sampling(0)

    def ends(self, row: int) -> Sequence[int]:
        return self._of[row].end_token_ids

    def limit(self, prompt_length: int, row: int = 0) -> int:
        return self._of[row].limit(prompt_length)

    def kept(self, row: int, new_tokens: list[int]) -> int | None:
        return self._of[row].kept(0, new_tokens)

    def _stop(self, row: int, new_tokens: list[int]) -> int | None:
        stop = self._of[row].stop
        return None if stop is None else stop(0, new_tokens)

    def _callback(self, row: int, positions: list[int], tokens: list[int]) -> None:
        callback = self._of[row].callback
        if callback is not None:
            callback(0, positions, tokens)

    def _observer(self, row: int, logits: Tensor) -> None:
        observer = self._of[row].observer
        if observer is not None:
            observer(0, logits)


Asked = Request | RowRequests
"""What a batch is asked: the same of every row, or something else of each."""


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

    def of_row(self, row: int) -> SampledTokens:
        """That row alone."""
        counts = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "new_tokens"}
        alone: dict[str, Any] = {name: None if count is None else count[[row]] for name, count in counts.items()}
        return SampledTokens([self.new_tokens[row]], **alone)


def first_end(tokens: Sequence[int], end_token_ids: Sequence[int]) -> int | None:
    """Length up to and with the first end token, or None."""
    return next((i + 1 for i, token in enumerate(tokens) if token in end_token_ids), None)


def given_or_new(seed: int | None) -> int:
    """The seed as a plain number, or one that nobody chose; TypeError for what is no whole number."""
    check_seed(seed)
    return secrets.randbits(31) if seed is None else int(seed)
