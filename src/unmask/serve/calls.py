"""From a body to rows of the engine, and from what the engine says to events of one HTTP request."""

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
from unmask.hf.grammar import Lark, Regex
from unmask.model import DiffusionLM
from unmask.sampling import Autoregressive, Blocks, Decoder, Request, Speculative, WholeCanvas
from unmask.sampling.canvases import check_steps
from unmask.sampling.constraint import Constraint, check_unconstrained
from unmask.sampling.guidance import check_guided
from unmask.sampling.request import given_or_new
from unmask.serve import bodies
from unmask.serve.bodies import Generation
from unmask.serve.engine import Engine, Job, QueueFullError, Work
from unmask.serve.errors import BUSY, ApiError
from unmask.serve.writing import Heard, Listener, Scored


@dataclass(frozen=True)
class Asked:
    """Rows that a body asks for, each with the decoder and what it asks of it. prompts: (length,) int64 each.

    scored: which log-probabilities are wanted.
    """

    prompts: list[Tensor]
    decoder: Decoder
    requests: list[Request]
    stops: list[StopStrings]
    scored: Scored | None

    @property
    def mode(self) -> str:
        """The name of the decoder's mode."""
        return {Autoregressive: "ar", Speculative: "speculative"}.get(type(self.decoder), "diffusion")


def asked(
    lm: DiffusionLM, body: Generation, prompts: list[Tensor], max_new_tokens: int, scored: Scored | None
) -> Asked:
    """The rows of a body: n for each prompt. Raises ValueError for what the model or its decoder refuses."""
    decoder = lm.decoder(**body.decoder_options())
    context = lm.network.context_length
    for prompt in prompts:
        if context is not None and len(prompt) >= context:
            raise ApiError(
                400, f"a prompt of {len(prompt)} tokens leaves no room in the model's context of {context}: shorten it",
                code="context_length_exceeded",
            )  # fmt: skip
    seed, constraint = given_or_new(body.seed), constraint_of(lm, body.response_format)
    whole = Request(
        max_new_tokens=max_new_tokens, seed=seed, end_token_ids=lm.end_token_ids, context_length=context,
        constraint=constraint, **body.sampling_options(),
    )  # fmt: skip
    _check(lm, decoder, whole, scored)
    rows = [prompt for prompt in prompts for _ in range(body.n or 1)]
    strings = body.stop_strings
    stops = [StopStrings(lambda _, new, prompt=prompt: lm.new_text(prompt, new), strings) for prompt in rows]  # type: ignore[misc]
    requests = [replace(whole, seed=[(seed, i)], stop=stop if strings else None) for i, stop in enumerate(stops)]
    return Asked(rows, decoder, requests, stops, scored)


def _check(lm: DiffusionLM, decoder: Decoder, request: Request, scored: Scored | None) -> None:
    """Raise for what would be refused once the row decodes."""
    check_guided(decoder, is_drafter=lm.drafter is not None)
    if isinstance(decoder, Blocks | WholeCanvas):
        check_unconstrained(request.constraint)
        if scored is not None:
            raise ApiError(400, "logprobs are exact in modes 'ar' and 'speculative' alone, and this is 'diffusion', "
                           "whose tokens are chosen before those to their left: set mode, or leave them out",
                           param="logprobs")  # fmt: skip
    if isinstance(decoder, WholeCanvas):
        check_steps(decoder.max_denoising_steps, decoder.block_size, request.max_new_tokens, decoder.remask)
    if scored is not None and request.constraint is not None:
        raise ApiError(400, "logprobs do not go with response_format, whose forced tokens have none: leave one out",
                       param="logprobs")  # fmt: skip


def constraint_of(lm: DiffusionLM, given: Any) -> Constraint | None:
    """What a response_format asks for; ValueError for a schema or grammar that is wrong."""
    if given is None or isinstance(given, bodies.PlainText):
        return None
    if isinstance(given, bodies.SchemaJson):
        return lm.constraint({} if given.json_schema.schema_ is None else given.json_schema.schema_)
    if isinstance(given, bodies.RegexText):
        return lm.constraint(Regex(given.regex))
    if isinstance(given, bodies.LarkText):
        return lm.constraint(Lark(given.lark))
    return lm.constraint("json_object")


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

    def rows(self, wanted: Asked, *, stream: bool, confidence: bool) -> None:
        """Submit rows; stream: their commits are wanted, with their confidence. ApiError where the queue is full."""
        top = None if not (confidence or wanted.scored) else wanted.scored.top if wanted.scored else 0
        for row, (prompt, request) in enumerate(zip(wanted.prompts, wanted.requests, strict=True)):
            if stream or wanted.scored is not None:
                listener = Listener(row, self._post, top)
                request = replace(request, callback=listener, observer=None if top is None else listener.observe)
            work = Work(prompt, wanted.decoder, request, self._engine.lm.diffusion)
            self._jobs.append(Job(work, partial(self._ended, row)))
        self._submit()

    def call(self, function: Callable[[Callable[[], None]], Any]) -> None:
        """Submit one call, which gets a function that raises once nobody waits any more."""
        self._jobs.append(Job(function, partial(self._ended, 0)))
        self._submit()

    def leave(self) -> None:
        """The client has gone: `events` raises ClientGoneError."""
        self._queue.put_nowait(Ended(0, ClientGoneError()))

    def cancel(self) -> None:
        """Nobody waits any more."""
        self._engine.cancel(self._jobs)

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
        self._post(Ended(row, result))


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
