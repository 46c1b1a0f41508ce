"""From a body to rows of the engine, and from what the engine says to text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask.data.prompts import StopStrings
from unmask.model import DiffusionLM
from unmask.sampling import Autoregressive, Decoder, Request, SampledTokens, Speculative
from unmask.sampling.request import given_or_new
from unmask.serve.answers import Commit, Row
from unmask.serve.bodies import Decoding
from unmask.serve.engine import CancelledError, Engine, Job, QueueFullError
from unmask.serve.errors import BUSY, ApiError
from unmask.streaming import FinalText


@dataclass(frozen=True)
class Asked:
    """Rows that a body asks for, each with the decoder and what it asks of it. prompts: (length,) int64 each."""

    prompts: list[Tensor]
    decoder: Decoder
    requests: list[Request]
    stops: list[StopStrings]

    @property
    def mode(self) -> str:
        """The name of the decoder's mode."""
        return {Autoregressive: "ar", Speculative: "speculative"}.get(type(self.decoder), "diffusion")


def asked(lm: DiffusionLM, body: Decoding, prompts: list[Tensor], max_new_tokens: int, stop: list[str]) -> Asked:
    """The rows of a body: n for each prompt. Raises ValueError for what the model or its decoder refuses."""
    decoder = lm.decoder(**body.decoder_options())
    for prompt in prompts:
        context = lm.network.context_length
        if context is not None and len(prompt) >= context:
            raise ApiError(
                400, f"a prompt of {len(prompt)} tokens leaves no room in the model's context of {context}: shorten it",
                code="context_length_exceeded",
            )  # fmt: skip
    seed = given_or_new(body.seed)
    whole = Request(
        max_new_tokens=max_new_tokens, seed=seed, end_token_ids=lm.end_token_ids,
        context_length=lm.network.context_length, **body.sampling_options(),
    )  # fmt: skip
    rows = [prompt for prompt in prompts for _ in range(body.n or 1)]
    stops = [StopStrings(lambda _, new, prompt=prompt: lm.new_text(prompt, new), stop) for prompt in rows]  # type: ignore[misc]
    requests = [replace(whole, seed=[(seed, i)], stop=strings if stop else None) for i, strings in enumerate(stops)]
    return Asked(rows, decoder, requests, stops)


class Writing:
    """The text of one row while it is decoded. text_of: text of a token alone."""

    def __init__(self, lm: DiffusionLM, prompt: Tensor, request: Request, stop: StopStrings) -> None:
        self._lm, self._prompt, self._request, self._stop = lm, prompt, request, stop
        self._pieces: list[str] = []
        self._final = FinalText(
            partial(lm.new_text, prompt), len(prompt), self._pieces.append, request.end_token_ids, stop.strings
        )

    def heard(self, positions: list[int], tokens: list[int]) -> str:
        """What became final with these commits."""
        self._pieces.clear()
        self._final(0, positions, tokens)
        return "".join(self._pieces)

    def ended(self, sampled: SampledTokens) -> tuple[str, Row]:
        """What was not handed on yet, and the whole row."""
        new = sampled.new_tokens[0]
        text = self._stop.cut(self._lm.new_text(self._prompt, new))
        finish = "length" if self._request.kept(0, new) is None else "stop"
        row = Row(new, text, finish, int(sampled.num_forwards[0]), int(sampled.num_prefill_forwards[0]))  # type: ignore[arg-type]
        return self._final.rest(text), row

    def commits(self, positions: list[int], tokens: list[int], confidences: list[float] | None) -> list[Commit]:
        """The commits, with the text of each token by itself."""
        sure: list[Any] = confidences or [None] * len(tokens)
        return [Commit(position=p, token=t, text=self._lm.tokenizer.decode([t]), confidence=c)
                for p, t, c in zip(positions, tokens, sure, strict=True)]  # fmt: skip


@dataclass(frozen=True)
class Heard:
    """Commits of a row: positions in the text with its prompt, and tokens."""

    row: int
    positions: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Ended:
    """What came of a row, or of a call."""

    row: int
    result: Any


class ClientGoneError(ApiError):
    """Nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__(499, "the client has gone")


class Call:
    """Jobs of one HTTP request, and what the engine says of them, in the event loop. seconds: until the deadline."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._queue: asyncio.Queue[Heard | Ended] = asyncio.Queue()
        self._deadline, self._seconds = time.monotonic() + seconds, seconds
        self._jobs: list[Job] = []

    def rows(self, wanted: Asked, *, stream: bool) -> None:
        """Submit rows; stream: their commits are wanted. Raises ApiError where the queue is full."""
        for row, (prompt, request) in enumerate(zip(wanted.prompts, wanted.requests, strict=True)):
            job = Job(partial(self._ended, row), prompt, wanted.decoder)
            job.request = replace(request, callback=self._listener(job, row, stream))
            self._jobs.append(job)
        self._submit()

    def call(self, function: Callable[[Callable[[], None]], Any]) -> None:
        """Submit one call, which gets a function that raises once nobody waits any more."""
        self._jobs.append(Job(partial(self._ended, 0), call=function))
        self._submit()

    def leave(self) -> None:
        """The client has gone: `events` raises ClientGoneError."""
        self._queue.put_nowait(Ended(0, ClientGoneError()))

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self._jobs:
            job.cancelled.set()

    async def events(self) -> AsyncIterator[Heard | Ended]:
        """What the engine says, until all jobs have ended. Raises what a job raised, and ApiError at the deadline."""
        left = len(self._jobs)
        while left:
            try:
                async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                    event = await self._queue.get()
            except TimeoutError:
                raise ApiError(
                    504, f"the deadline of {self._seconds:g} seconds has passed: ask for less, or give a later one",
                    "timeout_error", code="deadline_exceeded",
                ) from None  # fmt: skip
            if isinstance(event, Ended):
                left -= 1
                if isinstance(event.result, BaseException):
                    raise event.result
            yield event

    def _submit(self) -> None:
        try:
            self._engine.submit(self._jobs)
        except QueueFullError:
            raise ApiError(
                429, f"{self._engine.num_waiting} rows wait and at most {self._engine.max_queue} may: try again later",
                BUSY, code="queue_full",
            ) from None  # fmt: skip

    def _post(self, event: Heard | Ended) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def _ended(self, row: int, result: Any) -> None:
        if not isinstance(result, CancelledError):
            self._post(Ended(row, result))

    def _listener(self, job: Job, row: int, stream: bool) -> Callable[[int, list[int], list[int]], None]:
        def heard(_: int, positions: list[int], tokens: list[int]) -> None:
            job.check()
            if stream:
                self._post(Heard(row, positions, tokens))

        return heard


def prompt_rows(lm: DiffusionLM, prompt: Any) -> list[Tensor]:
    """The prompts of a body: texts, token ids, or a list of either."""
    return lm.prompt_ids(prompt if prompt else [""] if isinstance(prompt, str) else prompt)


def check_tokens(name: str, number: int, most: int | None) -> int:
    """The number of tokens asked for; raises ApiError for more than the server allows."""
    if most is not None and number > most:
        raise ApiError(400, f"{name} {number} exceeds {most}, the most that this server writes: use less", param=name)
    return number


def lengths(prompts: list[Tensor]) -> int:
    """Tokens of all prompts."""
    return int(torch.tensor([len(prompt) for prompt in prompts]).sum())
