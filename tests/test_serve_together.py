"""Requests that are served together: each answer is its own, clients come and go, limits hold."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
import torch
import uvicorn
from serving import running
from test_chat import TEMPLATE

import unmask
from unmask.cli.serve import _stop_at_once
from unmask.sampling import Request
from unmask.serve.app import create_app
from unmask.serve.engine import Engine, Job, Work
from unmask.serve.errors import StoppingError
from unmask.serve.options import ServeOptions

PROMPTS = ["Once there was a cat", "The dog was very", "Once", "A little bird who liked to sing in the"]


def wait_until_idle(address: str) -> None:
    """No row decodes or waits."""
    waits = 0
    while (state := httpx.get(f"{address}/health").json())["running"] + state["waiting"]:
        time.sleep(0.05)
        waits += 1
        assert waits < 100


@pytest.fixture(scope="module")
def lm(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> unmask.DiffusionLM:
    """All three modes, in float64."""
    folder = tmp_path_factory.mktemp("serve") / "tri"
    lm = unmask.adapt(tokenizer_and_model, stories, "tri-mode", folder, show_progress=False, max_tokens=2000,
                      max_length=64, block_size=4, batch_size=4)  # fmt: skip
    lm.tokenizer.chat_template = TEMPLATE
    return lm.to(dtype=torch.float64)


@pytest.fixture(scope="module")
def address(lm: unmask.DiffusionLM) -> Iterator[str]:
    with running(lm, max_rows=6, max_queue=64) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def question(i: int) -> dict[str, Any]:
    """A body of any mode and settings."""
    chance = random.Random(i)
    mode = chance.choice(["ar", "diffusion", "speculative"])
    more = {"ar": [{}], "diffusion": [{}, {"confidence_threshold": 0.3}], "speculative": [{}, {"draft_length": 3}]}
    return {
        "prompt": chance.choice(PROMPTS), "max_tokens": chance.randint(1, 24), "seed": i, "n": chance.choice([1, 1, 2]),
        "stop": chance.choice([None, "a", ["ly", " w"]]), "mode": mode, **chance.choice(more[mode]),
        **chance.choice([{}, {"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.7}, {"temperature": 1, "top_k": 9}]),
    }  # fmt: skip


def alone(lm: unmask.DiffusionLM, asked: dict[str, Any]) -> Any:
    """The same, of the library."""
    given = {{"max_tokens": "max_new_tokens", "stop": "stop_strings"}.get(name, name): value
             for name, value in asked.items() if name not in ("prompt", "n")}  # fmt: skip
    return lm.generate([asked["prompt"]] * asked["n"], **given)


def test_mixed_requests_get_their_own_answers_while_clients_leave(lm, address: str) -> None:
    async def ask(i: int, client: httpx.AsyncClient) -> tuple[int, list[str] | None]:
        await asyncio.sleep(random.Random(i).random())
        body = {"model": "tiny", **question(i)}
        if i % 5 == 4:  # goes away
            try:
                async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
                    async for _ in answer.aiter_lines():
                        break
            except httpx.HTTPError:
                pass
            return i, None
        if i % 2:
            answer = await client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            return i, [choice["text"] for choice in answer.json()["choices"]]
        texts = [""] * body["n"]
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
        return i, texts

    async def all_of_them() -> list[tuple[int, list[str] | None]]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:
            return await asyncio.gather(*(ask(i, client) for i in range(40)))

    for i, texts in asyncio.run(all_of_them()):
        if texts is not None:
            assert texts == alone(lm, question(i)).texts, question(i)
    wait_until_idle(address)


def test_a_full_queue_and_a_deadline_are_errors(lm) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Once", "extra_body": {"mode": "ar"}}
    with (
        running(lm, max_rows=1, max_queue=1) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.APIStatusError) as late:
            client.completions.create(model="tiny", prompt="Once", extra_body={"timeout": 0.001, "mode": "ar"})
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        with pytest.raises(openai.RateLimitError) as full:
            client.completions.create(**ask, n=3)
        assert full.value.code == "queue_full"
        wait_until_idle(address)  # the late row has its place until its next step
        assert client.completions.create(**ask, max_tokens=2, n=2).choices


def test_what_is_not_answered_when_the_server_stops_says_so(lm) -> None:
    """Rows that decode and wait, and calls that run and wait, each end once, and none is taken afterwards."""
    engine, ended = Engine(lm, max_queue=9, max_rows=1), list[tuple[str, Any]]()
    begun, prompt = threading.Event(), lm.prompt_ids("Once")[0]

    def row() -> Work:
        heard = Request(max_new_tokens=400, seed=0, callback=lambda *_: time.sleep(0.02))
        return Work(prompt, lm.decoder("ar"), heard, lm.diffusion)

    def call(check: Any) -> None:
        begun.set()
        while True:
            check()
            time.sleep(0.01)

    works = {"decodes": row(), "waits": row(), "runs": call, "waits to run": call}
    jobs = [Job(work, partial(lambda name, result: ended.append((name, result)), name)) for name, work in works.items()]
    engine.submit(jobs)
    assert begun.wait(10)
    while engine.num_running < 1:
        time.sleep(0.01)
    engine.close()
    assert sorted(name for name, _ in ended) == sorted(works)
    assert all(isinstance(result, StoppingError) and result.status == 503 for _, result in ended)
    with pytest.raises(StoppingError):
        engine.submit(jobs[:1])
    engine.close()  # again, as the end of the application does


def test_ctrl_c_ends_a_running_stream(lm, capsys: pytest.CaptureFixture[str]) -> None:
    """The first one says that it does, and uvicorn's own part follows."""
    application = create_app(lm, ServeOptions("m"))
    server = uvicorn.Server(uvicorn.Config(application))
    engine = application.state.server.engine
    _stop_at_once(server, engine.close)
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit
    assert not server.force_exit
    assert capsys.readouterr().err == "stopping: answers that are not complete end here\n"
    for thread in engine._threads:
        thread.join(10)
        assert not thread.is_alive()
    level = logging.getLogger("uvicorn.error").level
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit
    assert not logging.getLogger("uvicorn.error").isEnabledFor(logging.CRITICAL)
    logging.getLogger("uvicorn.error").setLevel(level)


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_logprobs_are_those_of_the_model(lm, client, mode: str) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 10, "extra_body": {"mode": mode}}
    answer = client.completions.create(**asked, logprobs=2)
    choice = answer.choices[0]
    assert "".join(choice.logprobs.tokens) == choice.text
    prompt = lm.prompt_ids(PROMPTS[0])[0]
    out = lm.generate(PROMPTS[0], "ar", 10)
    n = int(out.num_new_tokens[0])
    ids = out.sequences[:, : len(prompt) + n]
    with torch.no_grad():
        logits = lm.model(ids).logits[0, len(prompt) - 1 : -1].clone()
    logits[:, lm.diffusion.mask_token_id] = -math.inf
    expected = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
    assert choice.logprobs.token_logprobs == pytest.approx(expected.tolist()[: len(choice.logprobs.tokens)], abs=1e-6)
    assert all(1 <= len(top) <= 2 for top in choice.logprobs.top_logprobs)  # half characters look alike
    pieces = list(client.completions.create(**asked, logprobs=2, stream=True))
    streamed = [p for piece in pieces for c in piece.choices if c.logprobs for p in c.logprobs.token_logprobs]
    assert streamed == pytest.approx(choice.logprobs.token_logprobs)  # cycles may differ, and so last bits
    offsets = [p for piece in pieces for c in piece.choices if c.logprobs for p in c.logprobs.text_offset]
    assert offsets == choice.logprobs.text_offset
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=6,
                                          logprobs=True, top_logprobs=3, extra_body={"mode": mode})  # fmt: skip
    content = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == chat.choices[0].message.content
    assert all(entry.top_logprobs[0].logprob == pytest.approx(entry.logprob) for entry in content)


def test_logprobs_are_refused_where_they_are_not_exact(client) -> None:
    held = {"mode": "ar", "response_format": {"type": "json_object"}}
    for more, named in [({"mode": "diffusion"}, "'diffusion'"), (held, "response_format")]:
        with pytest.raises(openai.BadRequestError, match=named):
            client.completions.create(model="tiny", prompt="Once", logprobs=1, extra_body=more)


class Cat(pydantic.BaseModel):
    mood: bool
    colour: str = pydantic.Field(pattern="^(red|grey)$")


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_answers_obey_a_schema(lm, client, mode: str) -> None:
    messages: list[Any] = [{"role": "user", "content": "A cat?"}]
    answer = client.chat.completions.parse(model="tiny", messages=messages, response_format=Cat, max_tokens=60,
                                           extra_body={"mode": mode})  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Cat)
    schema = openai.lib._pydantic.to_strict_json_schema(Cat)
    assert answer.choices[0].message.content == lm.generate(messages, mode, 60, constraint=schema).texts[0]
    assert answer.usage.model_extra["unmask"]["num_forced"] > 5
    for given, expected in [({"type": "regex", "regex": "a+b"}, "a"), ({"type": "json_object"}, "{"),
                            ({"type": "lark", "lark": 'start: "xyz"'}, "xyz"), ({"type": "text"}, "")]:  # fmt: skip
        more = {"mode": mode, "response_format": given}
        text = client.completions.create(model="tiny", prompt="Once", max_tokens=8, extra_body=more).choices[0].text
        assert text.startswith(expected)


def test_bad_schemas_are_bad_input(client) -> None:
    for given, mode in [({"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "odd"}}}, "ar"),
                        ({"type": "regex", "regex": "("}, "ar"), ({"type": "lark", "lark": "start"}, "ar"),
                        ({"type": "odd"}, "ar"), ({"type": "json_object"}, "diffusion")]:  # fmt: skip
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="tiny", prompt="a", extra_body={"mode": mode, "response_format": given})
        assert "\n" not in str(bad.value.body["message"])


def test_commits_say_how_sure_they_were(client) -> None:
    for mode in ("ar", "diffusion"):
        pieces = client.completions.create(model="tiny", prompt="Once", max_tokens=9, stream=True,
                                           extra_body={"mode": mode, "commits": True})  # fmt: skip
        commits = [c for piece in pieces for choice in piece.choices for c in choice.model_extra.get("commits") or []]
        assert len(commits) >= 9 - 4
        assert all(0 < commit["confidence"] <= 1 for commit in commits)
