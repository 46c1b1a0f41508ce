"""The routes: OpenAI's, and those of the library's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from unmask.model import DiffusionLM
from unmask.plain_json import to_json
from unmask.progress import collect_notes
from unmask.serve import answers
from unmask.serve.answers import Heading, Row, usage_of
from unmask.serve.bodies import ChatBody, CompletionBody, EmbeddingBody, Generation, InfillBody
from unmask.serve.calls import Asked, Call, ClientGoneError, asked, check_tokens, lengths, prompt_rows
from unmask.serve.engine import Engine
from unmask.serve.errors import ANSWERS, ApiError, add_handlers, api_error
from unmask.serve.guard import Guard
from unmask.serve.metrics import Metrics
from unmask.serve.options import ServeOptions
from unmask.serve.writing import Heard, Scored, Writing
from unmask.version import __version__

PAGE = Path(__file__).with_name("page.html")
CHAT_TOKENS, TEXT_TOKENS = 512, 128
"""New tokens where a body does not say: those of `unmask chat` and of `lm.generate`."""


class Server:
    """A model, its engine, and what is counted; a method for each kind of request."""

    def __init__(self, lm: DiffusionLM, options: ServeOptions) -> None:
        self.lm, self.options = lm, options
        self.engine = Engine(lm, max_queue=options.max_queue, max_rows=options.max_rows)
        self.metrics = Metrics(self.engine)
        self.started = int(time.time())

    # --- text

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """/v1/chat/completions."""
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, f"top_logprobs {body.top_logprobs} needs logprobs: set it too", param="top_logprobs")
        scored = Scored(body.top_logprobs or 0, chat=True) if body.logprobs else None
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, f"max_tokens {body.max_tokens} and max_completion_tokens are the same: give one",
                           param="max_tokens")  # fmt: skip
        limit = body.max_completion_tokens or body.max_tokens

        def rows() -> Asked:
            prompts = self.lm.prompt_ids([message.as_dict() for message in body.messages])
            return self._asked(body, prompts, "max_completion_tokens", limit, CHAT_TOKENS, scored)

        return await self._generate(body, request, rows, Heading("chat", body.model))

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """/v1/completions."""
        scored = None if body.logprobs is None else Scored(body.logprobs, chat=False)
        if scored is not None and (body.echo or body.suffix is not None):
            raise ApiError(400, "logprobs are of new text: leave out echo and suffix", param="logprobs")
        if body.response_format is not None and body.suffix is not None:
            raise ApiError(400, "response_format goes with text that is continued: leave out suffix",
                           param="response_format")  # fmt: skip
        if body.best_of not in (None, body.n or 1):
            raise ApiError(400, f"best_of {body.best_of} must be n, {body.n or 1}: all are returned", param="best_of")
        if body.suffix is not None:
            return await self._complete_gap(body, request)

        def rows() -> Asked:
            prompts = prompt_rows(self.lm, body.prompt)
            return self._asked(body, prompts, "max_tokens", body.max_tokens, TEXT_TOKENS, scored)

        return await self._generate(body, request, rows, Heading("text", body.model), echo=bool(body.echo))

    def _asked(
        self, body: Generation, prompts: list[Any], name: str, limit: int | None, usual: int, scored: Scored | None
    ) -> Asked:
        most = self.options.max_new_tokens
        new = min(usual, most or usual) if limit is None else check_tokens(name, limit, most)
        self._check_choices(len(prompts), body.n or 1)
        return asked(self.lm, body, prompts, new, scored)

    def _check_choices(self, num_prompts: int, n: int) -> None:
        most = self.options.max_choices
        if num_prompts * n > most:
            what = f"n {n} of {num_prompts} prompts makes {num_prompts * n} choices, more than {most}: ask for fewer"
            raise ApiError(400, what, param="n" if n > 1 else "prompt")

    async def _generate(
        self, body: Generation, request: Request, rows: Callable[[], Asked], heading: Heading, *, echo: bool = False
    ) -> Response:
        self._check_model(body.model)
        stream = bool(body.stream)
        for name in ("stream_options", "commits"):
            if getattr(body, name) and not stream:
                raise ApiError(400, f"{name} is for streams: set stream, or leave it out", param=name)
        wanted = await run_in_threadpool(_or_bad_input, rows, type(body))
        call = self._call(body.timeout)
        call.rows(wanted, stream=stream, confidence=bool(body.commits))
        before = [self.lm.new_text(p[:0], p.tolist()) if echo else "" for p in wanted.prompts]
        if stream:
            pieces = self._stream(body, call, wanted, heading, before)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        ended: dict[int, Row] = {}
        writings = self._writings(wanted)
        async for event in self._until_gone(call, request):
            if isinstance(event, Heard):
                writings[event.row].heard(event)
            else:
                ended[event.row] = writings[event.row].ended(event.result)[1]
        every = [ended[row] for row in range(len(wanted.prompts))]
        usage = usage_of(lengths(wanted.prompts[:: body.n or 1]), every, wanted.mode)
        self.metrics.count(usage)
        return _json(heading.whole(every, usage, before))

    def _writings(self, wanted: Asked) -> list[Writing]:
        rows = zip(wanted.prompts, wanted.requests, wanted.stops, strict=True)
        return [Writing(self.lm, *row, wanted.scored) for row in rows]

    async def _stream(
        self, body: Generation, call: Call, wanted: Asked, heading: Heading, before: list[str]
    ) -> AsyncIterator[str]:
        """The events of a stream. Its text is that of the answer that is no stream."""
        include = body.stream_options is not None and bool(body.stream_options.include_usage)
        more = {"usage": None} if include else {}
        writings, ended, began, first = self._writings(wanted), {}, time.monotonic(), True
        try:
            for row, echoed in enumerate(before):
                if heading.kind == "chat" or echoed:
                    yield _event(heading.piece(row, echoed if heading.kind == "text" else None) | more)
            async for event in call.events():
                writing, finish = writings[event.row], None
                if isinstance(event, Heard):
                    text = writing.heard(event)
                    commits = writing.commits(event) if body.commits else None
                    if not text and commits is None:
                        continue
                else:
                    (text, ended[event.row]), commits = writing.ended(event.result), None
                    finish = ended[event.row].finish
                if first:
                    self.metrics.first.observe(time.monotonic() - began)
                    first = False
                if finish and (text or wanted.scored is not None):
                    yield _event(heading.piece(event.row, text, logprobs=writing.rest_of_scores()) | more)
                    text = ""
                scores = None if finish else writing.scores_of_shown()
                yield _event(heading.piece(event.row, text, finish, commits, scores) | more)
            usage = usage_of(lengths(wanted.prompts[:: body.n or 1]), list(ended.values()), wanted.mode)
            self.metrics.count(usage)
            if include:
                yield _event(heading.last(usage))
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.cancelled.inc()
            raise
        except Exception as error:
            yield _event(api_error(error).as_json())
        finally:
            call.cancel()

    # --- gaps

    async def _complete_gap(self, body: CompletionBody, request: Request) -> Response:
        """/v1/completions with a suffix: a gap of max_tokens tokens, in one piece if streamed."""
        self._check_model(body.model)
        if not isinstance(body.prompt, str) or body.echo:
            raise ApiError(400, "suffix goes with one prompt as text, and without echo", param="suffix")
        if body.commits:
            raise ApiError(400, "commits are not reported of gaps: leave it out", param="commits")
        number = check_tokens("max_tokens", body.max_tokens or 16, self.options.max_new_tokens)
        n = body.n or 1
        self._check_choices(1, n)
        out, usage = await self._filled(body, request, [body.prompt] * n, [body.suffix] * n, number)
        heading = Heading("text", body.model)
        rows = [Row([], text, "length" if int(new) == number else "stop", 0, 0)
                for text, new in zip(out.texts, out.num_new_tokens, strict=True)]  # fmt: skip
        if not body.stream:
            return _json(heading.whole(rows, usage, [""] * n))
        include = body.stream_options is not None and bool(body.stream_options.include_usage)
        more = {"usage": None} if include else {}
        pieces = [heading.piece(i, row.text, row.finish) | more for i, row in enumerate(rows)]
        pieces += [heading.last(usage)] if include else []
        return StreamingResponse(map(_event, [*pieces, None]), media_type="text/event-stream")

    async def infill(self, body: InfillBody, request: Request) -> Response:
        """/infill: any number of gaps."""
        self._check_model(body.model)
        given = [name for name in ("prefix", "text", "pieces") if getattr(body, name) is not None]
        if len(given) != 1:
            raise ApiError(400, f"give one of prefix (with suffix and num_tokens), text or pieces, not {given}",
                           param=given[0] if given else "text")  # fmt: skip
        if body.prefix is None and (body.suffix is not None or body.num_tokens is not None):
            raise ApiError(400, f"suffix and num_tokens go with prefix, not with {given[0]}", param="suffix")
        if body.prefix is not None and (body.suffix is None or body.num_tokens is None):
            raise ApiError(400, "prefix needs suffix and num_tokens: give all three", param="prefix")
        n = body.n or 1
        self._check_choices(1, n)
        text: Any = body.prefix if body.prefix is not None else body.text if body.text is not None else body.pieces
        suffix = None if body.suffix is None else [body.suffix] * n
        out, usage = await self._filled(
            body, request, [text] * n, suffix, body.num_tokens, attention=body.attention, num_samples=body.num_samples
        )
        heading = Heading("infill", body.model)
        choices = [answers.Filling(index=i, fills=fills, text=whole)
                   for i, (fills, whole) in enumerate(zip(out.fills, out.filled, strict=True))]  # fmt: skip
        return _json(answers.InfillAnswer(id=heading.id, created=heading.created, model=body.model, choices=choices,
                                          usage=usage))  # fmt: skip

    async def _filled(
        self, body: Any, request: Request, text: Any, suffix: Any, num_tokens: Any, **more: Any
    ) -> tuple[Any, answers.Usage]:
        """`lm.infill` in the engine, and its usage."""
        options = {name: value for name, value in body.decoder_options().items() if value is not None}

        def fill(check: Callable[[], None]) -> Any:
            with collect_notes() as notes:
                return self.lm.infill(
                    text, suffix, num_tokens, seed=body.seed, stop_strings=body.stop_strings or None,
                    callback=lambda *_: check(), **body.sampling_options(), **options, **more,
                ), notes  # fmt: skip

        out, notes = await self._called(fill, body, request)
        new = int(out.num_new_tokens.sum())
        prompt_tokens = out.sequences.shape[1] - int(out.num_new_tokens.max())  # all rows have the same text
        forwards = int(out.num_forwards.sum())
        counts = answers.Counts(
            mode="diffusion", num_forwards=forwards, num_prefill_forwards=int(out.num_prefill_forwards.sum()),
            tokens_per_forward=round(new / max(1, forwards), 4), notes=notes,
        )  # fmt: skip
        usage = answers.Usage(
            prompt_tokens=prompt_tokens, completion_tokens=new, total_tokens=prompt_tokens + new, unmask=counts
        )
        self.metrics.count(usage)
        return out, usage

    # --- vectors and the rest

    async def embed(self, body: EmbeddingBody, request: Request) -> Response:
        """/v1/embeddings."""
        self._check_model(body.model)
        texts = [body.input] if isinstance(body.input, str) else body.input
        if len(texts) > 2048:
            raise ApiError(400, f"input has {len(texts)} texts: give at most 2048", param="input")

        def vectors(_: Callable[[], None]) -> Any:
            return self.lm.embed(texts, body.pattern).numpy(), lengths(self.lm.prompt_ids(texts) if texts else [])

        rows, read = await self._called(vectors, body, request)
        data = [answers.vector(i, row, body.encoding_format) for i, row in enumerate(rows)]
        usage = {"prompt_tokens": read, "total_tokens": read}
        return _json(answers.EmbeddingAnswer(data=data, model=body.model, usage=usage))

    def card(self) -> answers.ModelCard:
        """What is known of the model."""
        modes = ["ar"]
        if self.lm.diffusion is not None:
            modes += ["diffusion"] + ["speculative"] * self.lm.diffusion.serves_ar
        modes.sort(key=lambda mode: mode != self.lm.default_mode)
        context = self.lm.network.context_length
        return answers.ModelCard(id=self.options.name, created=self.started, modes=modes, context_length=context)

    def _check_model(self, name: str) -> None:
        if name != self.options.name:
            what = f"model {name!r} is not served here: use {self.options.name!r}"
            raise ApiError(404, what, param="model", code="model_not_found")

    def _call(self, timeout: float | None) -> Call:
        return Call(self.engine, min(timeout or self.options.deadline, self.options.deadline))

    async def _called(self, function: Callable[[Callable[[], None]], Any], body: Any, request: Request) -> Any:
        """What one call of the engine returns; what the library refuses is bad input."""
        call = self._call(getattr(body, "timeout", None))
        call.call(function)
        result = None
        try:
            async for event in self._until_gone(call, request):
                result = getattr(event, "result", None)
        except Exception as error:
            raise api_error(error, list(type(body).model_fields)) from error
        return result

    async def _until_gone(self, call: Call, request: Request) -> AsyncIterator[Any]:
        """The events of a call, which is cancelled when the client goes away, or when anything else goes wrong."""
        gone = asyncio.create_task(_leave_with(request, call))
        try:
            async for event in call.events():
                yield event
        except ClientGoneError:
            self.metrics.cancelled.inc()
            raise
        except Exception as error:
            raise api_error(error) from error
        finally:
            gone.cancel()
            call.cancel()


async def _leave_with(request: Request, call: Call) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    call.leave()


def _or_bad_input(rows: Callable[[], Asked], body: type[BaseModel]) -> Asked:
    try:
        return rows()
    except Exception as error:
        raise api_error(error, list(body.model_fields)) from error


def _json(answer: BaseModel) -> JSONResponse:
    return JSONResponse(answer.model_dump())


def _event(piece: dict[str, Any] | None) -> str:
    """A server-sent event; None is the last one."""
    return f"data: {'[DONE]' if piece is None else to_json(piece, ensure_ascii=False)}\n\n"


def create_app(lm: DiffusionLM, options: ServeOptions) -> FastAPI:
    """The application; its engine starts here and ends with the application's life."""
    server = Server(lm, options)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(server.engine.close)

    app = FastAPI(title="unmask", version=__version__, lifespan=life, responses=ANSWERS)
    app.state.server = server
    add_handlers(app)
    _add_routes(app, server)
    app.add_middleware(Guard, options=options)
    return app


def _add_routes(app: FastAPI, server: Server) -> None:
    stream = {"text/event-stream": {"schema": {"type": "string"}}}
    streamed = {"description": "The answer, or its pieces as server-sent events.", "content": stream}

    @app.post("/v1/chat/completions", responses={200: streamed | {"model": answers.ChatAnswer}})
    async def chat(body: ChatBody, request: Request) -> Response:
        return await server.chat(body, request)

    @app.post("/v1/completions", responses={200: streamed | {"model": answers.TextAnswer}})
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await server.complete(body, request)

    @app.post("/infill", responses={200: {"model": answers.InfillAnswer}})
    async def infill(body: InfillBody, request: Request) -> Response:
        return await server.infill(body, request)

    @app.post("/v1/embeddings", responses={200: {"model": answers.EmbeddingAnswer}})
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        return await server.embed(body, request)

    @app.get("/v1/models", response_model=answers.ModelList)
    async def models() -> Any:
        return answers.ModelList(data=[server.card()])

    @app.get("/v1/models/{name:path}", response_model=answers.ModelCard)
    async def model(name: str) -> Any:
        server._check_model(name)
        return server.card()

    @app.get("/health", response_model=answers.Health)
    async def health() -> Any:
        return answers.Health(model=server.options.name, waiting=server.engine.num_waiting,
                              running=server.engine.num_running)  # fmt: skip

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html")
