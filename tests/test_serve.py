"""`unmask serve`, as the official `openai` client sees it: answers are those of the library, errors are OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from serving import running
from test_chat import TEMPLATE

import unmask
from unmask.cli.serve import _listening
from unmask.progress import Note

PROMPTS = ["Once there was a cat", "The dog was very", "", "Once"]


@pytest.fixture(scope="module")
def lm(converted: Path) -> unmask.DiffusionLM:
    lm = unmask.load(converted)
    lm.tokenizer.chat_template = TEMPLATE
    return lm


@pytest.fixture(scope="module")
def address(lm: unmask.DiffusionLM) -> Iterator[str]:
    with running(lm, max_new_tokens=64, max_body=20_000, max_choices=8, max_queue=8) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def streamed(pieces: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """Texts and finish reasons of a stream by choice, and its usage."""
    texts: dict[int, str] = {}
    reasons, usage = {}, None
    for piece in pieces:
        for choice in piece.choices:
            new = choice.text if hasattr(choice, "text") else choice.delta.content
            texts[choice.index] = texts.get(choice.index, "") + (new or "")
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
        usage = piece.usage or usage
    return texts, reasons, usage


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_p": 0.8}])
def test_completions_are_those_of_generate_streamed_or_not(lm, client, mode: str, options: dict[str, float]) -> None:
    for prompt in PROMPTS:
        out = lm.generate([prompt] * 2, mode, 12, seed=5, stop_strings=["ly"], **options)
        asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "seed": 5, "n": 2, "stop": "ly",
                                 "extra_body": {"mode": mode}, **options}  # fmt: skip
        whole = client.completions.create(**asked)
        assert [choice.text for choice in whole.choices] == out.texts
        pieces = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        texts, reasons, usage = streamed(pieces)
        assert [texts[i] for i in range(2)] == out.texts
        assert [reasons[i] for i in range(2)] == [choice.finish_reason for choice in whole.choices]
        assert usage == whole.usage
        assert usage.completion_tokens == int(out.num_new_tokens.sum())
        assert usage.prompt_tokens == len(lm.prompt_ids(prompt)[0])
        assert usage.unmask["num_forwards"] == int(out.num_forwards.sum())
        assert usage.unmask["num_prefill_forwards"] == int(out.num_prefill_forwards.sum())


def test_chats_are_those_of_generate_streamed_or_not(lm, client) -> None:
    messages: list[Any] = [{"role": "user", "content": "A cat?"}]
    out = lm.generate(messages, max_new_tokens=12)
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=12)
    assert answer.choices[0].message.content == out.texts[0]
    assert answer.choices[0].message.role == "assistant"
    pieces = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stream=True)
    assert streamed(pieces)[0] == {0: out.texts[0]}
    parts = [{"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat?"}]}]
    again = client.chat.completions.create(model="tiny", messages=parts, max_tokens=12)
    assert again.choices[0].message.content == out.texts[0]


def test_prompts_may_be_several_and_token_ids(lm, client) -> None:
    out = lm.generate(PROMPTS[:2], max_new_tokens=8)
    ids = [row.tolist() for row in lm.prompt_ids(PROMPTS[:2])]
    for prompt in (PROMPTS[:2], ids):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=8)
        assert [choice.text for choice in answer.choices] == out.texts
    echoed = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=8, echo=True)
    assert echoed.choices[0].text == PROMPTS[0] + out.texts[0]


def test_a_stream_reports_the_commits(lm, client) -> None:
    pieces = list(client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=8, stream=True,
                                            extra_body={"commits": True}))  # fmt: skip
    commits = [c for piece in pieces for choice in piece.choices for c in getattr(choice, "commits", None) or []]
    out = lm.generate(PROMPTS[0], max_new_tokens=8)
    first = len(lm.prompt_ids(PROMPTS[0])[0])
    known = {commit["position"] - first: commit["token"] for commit in commits}
    new = out.sequences[0, first:].tolist()
    assert [known[i] for i in range(len(new))] == new


def test_the_texts_of_commits_and_scores_have_their_spaces(shared: Path) -> None:
    lm = unmask.load(shared / "models/stories260k")  # SentencePiece: the text of a token alone has no space before it
    plain: dict[str, Any] = {"model": "tiny", "prompt": "Once upon", "max_tokens": 12}
    body = plain | {"stream": True, "commits": True}
    with running(lm) as address:
        pieces = httpx.post(f"{address}/v1/completions", json=body, timeout=60).text.splitlines()
        scored = httpx.post(f"{address}/v1/completions", json=plain | {"logprobs": 2}, timeout=60).json()["choices"][0]
    choices = [json.loads(piece[6:])["choices"][0] for piece in pieces if piece.startswith("data: {")]
    texts = [commit["text"] for choice in choices for commit in choice.get("commits") or []]
    expected = lm.generate("Once upon", max_new_tokens=12).texts[0]
    assert "".join(texts) == expected
    assert "".join(scored["logprobs"]["tokens"]) == expected
    tops = scored["logprobs"]["top_logprobs"]
    assert all(token in top for token, top in zip(scored["logprobs"]["tokens"], tops, strict=True))


def test_gaps_are_filled_as_infill_does(lm, address: str, client) -> None:
    out = lm.infill("Once there", " was happy.", 6, seed=3)
    answer = client.completions.create(model="tiny", prompt="Once there", suffix=" was happy.", max_tokens=6, seed=3)
    assert answer.choices[0].text == out.texts[0]
    assert answer.usage.completion_tokens == 6
    pieces = client.completions.create(model="tiny", prompt="Once there", suffix=" was happy.", max_tokens=6, seed=3,
                                       stream=True)  # fmt: skip
    assert streamed(pieces)[0] == {0: out.texts[0]}
    text = "Once <gap:3> was <gap:2> happy."
    answered = httpx.post(f"{address}/infill", json={"model": "tiny", "text": text, "seed": 3}).json()
    expected = lm.infill(text, seed=3)
    assert answered["choices"][0] == {"index": 0, "fills": expected.fills[0], "text": expected.filled[0]}
    assert answered["usage"]["unmask"]["num_forwards"] == int(expected.num_forwards[0])


def test_text_that_a_gap_does_not_see_is_said(lm, address: str) -> None:
    whole = {"model": "tiny", "prefix": "Once there", "suffix": " was a happy little cat in the wood.", "num_tokens": 2}
    with pytest.warns(Note, match="not seen") as warned:
        lm.infill(whole["prefix"], whole["suffix"], 2)
    notes = httpx.post(f"{address}/infill", json=whole).json()["usage"]["unmask"]["notes"]
    assert notes == [str(warned[0].message)]
    seen = httpx.post(f"{address}/infill", json=whole | {"attention": "bidirectional"}).json()
    assert seen["usage"]["unmask"]["notes"] == []


def test_embeddings_are_those_of_embed(lm, client) -> None:
    vectors = lm.embed(PROMPTS[:2])
    for encoding in ("float", "base64", None):
        more = {} if encoding is None else {"encoding_format": encoding}
        answer = client.embeddings.create(model="tiny", input=PROMPTS[:2], **more)
        if encoding != "base64":
            torch.testing.assert_close(torch.tensor([entry.embedding for entry in answer.data]), vectors)
    assert answer.usage.prompt_tokens == sum(len(row) for row in lm.prompt_ids(PROMPTS[:2]))


BAD: list[tuple[str, dict[str, Any], int, str]] = [
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "'other'"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "model": "other"}, 404, "'other'"),
    ("/v1/embeddings", {"input": "a", "model": "other"}, 404, "'other'"),
    ("/infill", {"text": "a <gap:2>", "model": "other"}, 404, "'other'"),
    ("/v1/completions", {"prompt": "a", "colour": 3}, 400, "colour"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 65}, 400, "max_tokens 65"),
    ("/v1/completions", {"prompt": "a", "max_tokens": "7"}, 400, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "-1"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400, "top_p"),
    ("/v1/completions", {"prompt": "a", "n": 9}, 400, "n 9"),
    ("/v1/completions", {"prompt": "a", "mode": "speculative"}, 400, "speculative"),
    ("/v1/completions", {"prompt": "a", "mode": "odd"}, 400, "'odd'"),
    ("/v1/completions", {"prompt": "a", "mode": "ar", "block_size": 4}, 400, "block_size"),
    ("/v1/completions", {"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ("/v1/completions", {"prompt": "a", "logit_bias": {"5": 1}}, 400, "logit_bias"),
    ("/v1/completions", {"prompt": "a", "stop": ["x", ""]}, 400, "stop"),
    ("/v1/completions", {"prompt": [7, 100_000]}, 400, "100000"),
    ("/v1/completions", {"prompt": []}, 400, "empty"),
    ("/v1/completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("/v1/completions", {"prompt": "a", "commits": True}, 400, "commits"),
    ("/v1/completions", {"prompt": "word " * 200}, 400, "context"),
    ("/v1/completions", {}, 400, "prompt"),
    ("/v1/completions", {"prompt": "word " * 20_000}, 413, "20000"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": []}, 400, "tools"),
    ("/v1/embeddings", {"input": []}, 400, "empty"),
    ("/v1/embeddings", {"input": "a", "pattern": "odd"}, 400, "'odd'"),
    ("/infill", {"text": "no mark"}, 400, "no gap"),
    ("/infill", {"prefix": "a"}, 400, "suffix"),
    ("/infill", {"prefix": "a", "suffix": "b", "num_tokens": 500}, 400, "500"),
    ("/infill", {"text": "a <gap:2>", "suffix": "b"}, 400, "suffix"),
]


@pytest.mark.parametrize(("path", "body", "status", "named"), BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_one_clear_error(
    address: str, path: str, body: dict[str, Any], status: int, named: str, stream: bool
) -> None:
    more = {"stream": True} if stream and "completions" in path and "stream_options" not in body else {}
    if more and "commits" in body:
        return
    answer = httpx.post(address + path, json={"model": "tiny", **body, **more})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert named in error["message"]
    assert "\n" not in error["message"]


def test_other_faults_are_errors_too(address: str) -> None:
    for method, path, content, status in [
        ("GET", "/v1/odd", b"", 404), ("GET", "/v1/completions", b"", 405), ("GET", "/v1/models/odd", b"", 404),
        ("POST", "/v1/completions", b"{", 400), ("POST", "/v1/completions", b'{"seed": 1' + b"0" * 5000 + b"}", 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "\\ud800"}', 400),
        ("POST", "/v1/completions", b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
    ]:  # fmt: skip
        answer = httpx.request(method, address + path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, (path, answer.text)
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_models_health_and_metrics(address: str, client) -> None:
    card = client.models.list().data[0]
    assert (card.id, client.models.retrieve("tiny").id) == ("tiny", "tiny")
    assert card.modes == ["diffusion", "ar"]
    assert httpx.get(f"{address}/health").json()["status"] == "ok"
    metrics = httpx.get(f"{address}/metrics").text
    assert "unmask_tokens_total" in metrics
    assert httpx.get(f"{address}/openapi.json").status_code == 200


def test_a_taken_port_is_bad_input() -> None:
    with _listening("127.0.0.1", 0) as first, pytest.raises(ValueError, match="--port"):
        _listening("127.0.0.1", first.getsockname()[1])
    with pytest.raises(ValueError, match="odd"):
        _listening("odd.invalid", 0)


def test_an_api_key_is_asked_for(lm) -> None:
    with running(lm, api_key="secret") as address:
        assert httpx.get(f"{address}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": "secret"}):
            answer = httpx.get(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=f"{address}/v1", api_key="secret") as client:
            assert client.models.list().data[0].id == "tiny"
