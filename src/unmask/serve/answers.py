"""What clients get, as OpenAI's interface has it; what the library counts stands in `usage.unmask`."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from unmask.version import __version__

Finish = Literal["stop", "length"]


class Counts(BaseModel):
    """Of all choices: passes of the network after the prefill and in it, new tokens per forward, and the mode.

    num_forced: with a response_format, new tokens that needed no forward. notes: what was not as one may expect, such
    as text behind a gap that a block does not see.
    """

    mode: str | None
    num_forwards: int
    num_prefill_forwards: int
    tokens_per_forward: float
    num_forced: int | None = None
    notes: list[str] = []


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    unmask: Counts | None = None


class Commit(BaseModel):
    """A token that became final. position: in the text with its prompt. confidence: its probability, where known."""

    position: int
    token: int
    text: str
    confidence: float | None = None


class Said(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: Any = None
    finish_reason: Finish


class ChatAnswer(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: Any = None
    finish_reason: Finish


class TextAnswer(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class Filling(BaseModel):
    """fills: the text of each gap. text: the whole text."""

    index: int
    fills: list[str]
    text: str


class InfillAnswer(BaseModel):
    id: str
    object: Literal["infill"] = "infill"
    created: int
    model: str
    choices: list[Filling]
    usage: Usage


class Vector(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[Vector]
    model: str
    usage: dict[str, int]


class ModelCard(BaseModel):
    """modes: those that the checkpoint has; the first is the default."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "unmask"
    modes: list[str]
    context_length: int | None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    waiting: int
    running: int


FINGERPRINT = f"unmask-{__version__}"


@dataclass(frozen=True)
class Row:
    """A row that has ended. tokens: new ones, up to and with the one that ended it."""

    tokens: list[int]
    text: str
    finish: Finish
    num_forwards: int
    num_prefill_forwards: int
    num_forced: int | None = None
    logprobs: Any = None


def usage_of(prompt_tokens: int, rows: Sequence[Row], mode: str | None) -> Usage:
    """The usage of some rows; a prompt counts once however many choices it has."""
    new, forwards = sum(len(row.tokens) for row in rows), sum(row.num_forwards for row in rows)
    forced = [row.num_forced for row in rows if row.num_forced is not None]
    counts = Counts(
        mode=mode, num_forwards=forwards, num_prefill_forwards=sum(row.num_prefill_forwards for row in rows),
        tokens_per_forward=round(new / max(1, forwards), 4),
        num_forced=sum(forced) if forced else None,
    )  # fmt: skip
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=new, total_tokens=prompt_tokens + new, unmask=counts)


class Heading:
    """What all pieces of an answer begin with."""

    def __init__(self, kind: str, model: str) -> None:
        prefix = {"chat": "chatcmpl", "text": "cmpl"}.get(kind, kind)
        self.kind, self.model = kind, model
        self.id, self.created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())

    def whole(self, rows: Sequence[Row], usage: Usage, before: Sequence[str]) -> ChatAnswer | TextAnswer:
        """The answer that is no stream. before: text that comes before that of each row (echo)."""
        fields: dict[str, Any] = {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }
        if self.kind == "chat":
            chat = [ChatChoice(index=i, message=Said(content=row.text), finish_reason=row.finish, logprobs=row.logprobs)
                    for i, row in enumerate(rows)]  # fmt: skip
            return ChatAnswer(**fields, choices=chat, usage=usage)
        texts = [TextChoice(index=i, text=echoed + row.text, finish_reason=row.finish, logprobs=row.logprobs)
                 for i, (row, echoed) in enumerate(zip(rows, before, strict=True))]  # fmt: skip
        return TextAnswer(**fields, choices=texts, usage=usage)

    def piece(
        self,
        index: int,
        text: str | None,
        finish: Finish | None = None,
        commits: Sequence[Commit] | None = None,
        logprobs: Any = None,
    ) -> dict[str, Any]:
        """A piece of a stream; text None: the first of a chat's choice, which gives the role alone."""
        choice: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        if self.kind == "text":
            choice["text"] = text or ""
        elif text is None:
            choice["delta"] = {"role": "assistant", "content": ""}
        else:
            choice["delta"] = {"content": text} if text or finish is None else {}
        if commits is not None:
            choice["commits"] = [commit.model_dump() for commit in commits]
        return self._piece([choice])

    def last(self, usage: Usage) -> dict[str, Any]:
        """The piece that has the usage and no choices."""
        return self._piece([]) | {"usage": usage.model_dump()}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {"id": self.id, "object": name, "created": self.created, "model": self.model,
                "system_fingerprint": FINGERPRINT, "choices": choices}  # fmt: skip


def vector(index: int, values: np.ndarray, encoding: str | None) -> Vector:
    """A text's vector (hidden,) float32 as numbers, or as base64 of their bytes in the order of a PC."""
    if encoding == "base64":
        return Vector(index=index, embedding=base64.b64encode(values.astype("<f4").tobytes()).decode())
    return Vector(index=index, embedding=values.tolist())
