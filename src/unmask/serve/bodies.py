"""What clients send, as OpenAI's interface has it, with the options of the library's decoders beside it.

Every field is read or refused: one that is not here is an error, and so is a value of one that only OpenAI's own
models have.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from unmask.limits import LARGEST

Count = Annotated[int, Field(ge=1, le=LARGEST)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Nothing = Literal[None, False, 0]
"""What turns an option off that is not supported."""


class Body(BaseModel):
    """A body without unknown fields; a number in a text is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Decoding(Body):
    """Fields of every body that asks for new text. Those of the decoder are the library's own, see `lm.generate`."""

    model: str
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Count | None = None
    mode: str | None = None
    block_size: Count | None = None
    max_denoising_steps: Count | None = None
    confidence_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    window: Count | None = None
    draft_length: Count | Literal["auto"] | None = None
    cycle: str | None = None
    guidance_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None

    def decoder_options(self) -> dict[str, Any]:
        """Keywords of `DiffusionLM.decoder`."""
        return {name: getattr(self, name) for name in DECODER_OPTIONS}

    def sampling_options(self) -> dict[str, Any]:
        """Keywords of a `Request`, of those that were given."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


DECODER_OPTIONS = (
    "mode", "block_size", "max_denoising_steps", "confidence_threshold", "window", "draft_length", "cycle",
    "guidance_scale",
)  # fmt: skip


class StreamOptions(Body):
    """include_usage: one more piece at the end, without choices, has the usage of the whole."""

    include_usage: bool | None = None
    include_obfuscation: Literal[None, False] = None


class NamedSchema(BaseModel):
    """A JSON schema, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class PlainText(Body):
    type: Literal["text"]


class AnyJson(Body):
    type: Literal["json_object"]


class SchemaJson(Body):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class RegexText(Body):
    """The library's own: the text matches a regular expression."""

    type: Literal["regex"]
    regex: str


class LarkText(Body):
    """The library's own: the text is derived from the rule `start` of a Lark grammar."""

    type: Literal["lark"]
    lark: str


ResponseFormat = Annotated[PlainText | AnyJson | SchemaJson | RegexText | LarkText, Field(discriminator="type")]


class Generation(Decoding):
    """Fields of chat and of completions. commits: the pieces of a stream say which tokens were committed where."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    commits: bool | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Nothing = None
    frequency_penalty: Nothing = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    refusal: Literal[None] = None

    def as_dict(self) -> dict[str, str]:
        """The message as chat templates read it."""
        content = self.content or ""
        return {"role": self.role, "content": content if isinstance(content, str) else "".join(p.text for p in content)}


class ChatBody(Generation):
    """A body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class CompletionBody(Generation):
    """A body of /v1/completions. prompt: text, token ids, or a list of either. suffix: the text after a gap."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], Field(min_length=0)]
    suffix: str | None = None
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Count | None = None


class InfillBody(Decoding):
    """A body of /infill: prefix, suffix and num_tokens, or text with gaps, "Tom had <gap:8> dog.", or its pieces."""

    prefix: str | None = None
    suffix: str | None = None
    num_tokens: Count | list[Count] | None = None
    text: str | None = None
    pieces: list[str | Count | list[Count]] | None = None
    attention: str | None = None
    num_samples: Count | None = None


class EmbeddingBody(Body):
    """A body of /v1/embeddings. pattern: which tokens see each other, see `lm.embed`."""

    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] | None = None
    pattern: str | None = None
    user: str | None = None
