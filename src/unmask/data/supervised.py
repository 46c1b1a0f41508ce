"""Supervised examples: a prompt and a completion, which is learnt, or messages, of which the assistant's are learnt.

Knows records, a tokenizer and its chat template. Knows no file and no model.

Every example becomes token ids and a loss mask, True on the tokens that are learnt. The tokens before an answer are
exactly those that `generate` reads as the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from unmask.data.plain_text import hide_special, ids_of, rendered_ids, special_texts

PROMPT, COMPLETION, MESSAGES = "prompt", "completion", "messages"


class InvalidRecordError(ValueError):
    """A record that is no document. The message says what is wrong with it, but not its file and line."""


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages of a chat, each with role and content."""

    messages: list[dict[str, str]]


Example = str | Completion | Conversation
"""What a record holds: a text, which is learnt whole, or a supervised example."""


def read_record(record: dict[str, Any], text_column: str) -> Example:
    """The example in a record, recognised by its columns: text, or prompt and completion, or messages.

    Raises InvalidRecordError for a record without exactly one of them.
    """
    if text_column != "text" and isinstance(record.get(text_column), str):
        chosen: str = record[text_column]
        return chosen
    kinds = [name for name in (text_column, COMPLETION, MESSAGES) if record.get(name) is not None]
    if COMPLETION not in kinds and PROMPT in record and MESSAGES in kinds:
        kinds.insert(0, PROMPT)
    if len(kinds) > 1:
        raise InvalidRecordError(f"has both {kinds[0]!r} and {kinds[1]!r}, so what to learn is unclear: keep one")
    if kinds == [COMPLETION]:
        return _completion(record)
    if kinds == [MESSAGES]:
        return _conversation(record[MESSAGES])
    if isinstance(record.get(text_column), str):
        text: str = record[text_column]
        return text
    if kinds == [text_column]:
        raise InvalidRecordError(f"holds {type(record[text_column]).__name__} in column {text_column!r}, not text")
    raise InvalidRecordError(missing_column(text_column, sorted(record)))


def missing_column(text_column: str, found: list[str]) -> str:
    """The message for a record or file without a column of text."""
    return (
        f"has no text column {text_column!r}, found {found}; choose one with text_column=NAME, "
        "or give prompt and completion, or messages"
    )


def _completion(record: dict[str, Any]) -> Completion:
    for name in (PROMPT, COMPLETION):
        value = record.get(name)
        if not isinstance(value, str):
            raise InvalidRecordError(f"holds {type(value).__name__} in column {name!r}, not text")
        if not value.strip():
            raise InvalidRecordError(f"has an empty {name}: a supervised example needs both")
    return Completion(record[PROMPT], record[COMPLETION])


def _conversation(messages: Any) -> Conversation:
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        raise InvalidRecordError("holds messages that are no list of objects with a role and a content text each")
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    if not answers:
        raise InvalidRecordError("holds messages without one of the role 'assistant', so nothing is to be learnt")
    if not all(a.strip() for a in answers):
        raise InvalidRecordError("holds an empty message of the role 'assistant'")
    if messages[0]["role"] == "assistant":
        raise InvalidRecordError("begins with a message of the role 'assistant', which answers nothing")
    return Conversation(messages)


def encode_example(
    tokenizer: Any, example: Completion | Conversation, end_token_id: int | None
) -> list[tuple[list[int], list[bool]]]:
    """(ids, loss mask) of the documents that an example makes, usually one.

    The end token follows the last learnt token, unless the template wrote it there. If a template renders an earlier
    answer differently from the last one (some drop their reasoning), every answer makes a document of its own, after
    exactly the tokens that `generate` would read before it.
    """
    if isinstance(example, Completion):
        prompt = ids_of(tokenizer, example.prompt)
        spans = [(prompt, continue_ids(tokenizer, prompt, example.prompt, example.completion))]
        return [_joined(tokenizer, spans, end_token_id)]
    documents = []
    for turns in _turns(tokenizer, example.messages):
        ids: list[int] = []
        text, spans = "", []
        for before, after in turns:
            context = continue_ids(tokenizer, ids, text, before[len(text) :], rendered=True)
            answer = continue_ids(tokenizer, ids + context, before, after[len(before) :], rendered=True)
            spans.append((context, answer))
            ids, text = ids + context + answer, after
        documents.append(_joined(tokenizer, spans, end_token_id))
    return documents


def continue_ids(tokenizer: Any, ids: Sequence[int], before: str, text: str, *, rendered: bool = False) -> list[int]:
    """Tokens of `text` after `before`, whose tokens are `ids`.

    If the tokens of both texts together begin with `ids`, their rest, so that a space before a word joins the word as
    in running text; otherwise the tokens of `text` alone. rendered: a chat template wrote the texts.
    """
    whole = rendered_ids(tokenizer, before + text) if rendered else ids_of(tokenizer, before + text)
    if whole[: len(ids)] == list(ids):
        return whole[len(ids) :]
    return rendered_ids(tokenizer, text) if rendered else ids_of(tokenizer, text, add_special_tokens=False)


def _joined(
    tokenizer: Any, spans: list[tuple[list[int], list[int]]], end_token_id: int | None
) -> tuple[list[int], list[bool]]:
    """(ids, loss mask) of spans of (context, answer), ended by the end token."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    for context, answer in spans:
        ids += context + answer
        loss_mask += [False] * len(context) + [True] * len(answer)
    if end_token_id is not None and not _ends(tokenizer, spans[-1][1], end_token_id):
        ids, loss_mask = [*ids, end_token_id], [*loss_mask, True]
    return ids, loss_mask


def _ends(tokenizer: Any, ids: list[int], end_token_id: int) -> bool:
    """Whether the tokens of an answer contain its end.

    A special end token can only come from the template; one that is ordinary text may be part of the answer.
    """
    special = tokenizer.convert_ids_to_tokens(end_token_id) in special_texts(tokenizer)
    return end_token_id in ids if special else ids[-1:] == [end_token_id]


def _turns(tokenizer: Any, messages: list[dict[str, str]]) -> list[list[tuple[str, str]]]:
    """For each document, (text before an answer, text up to the end of the answer) of its answers."""

    def render(upto: int, ask: bool) -> str:
        text: str = apply_template(tokenizer, messages[:upto], tokenize=False, add_generation_prompt=ask)
        return text

    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [(render(i, True), render(i + 1, False)) for i in answers]
    for before, after in turns:
        if not after.startswith(before):
            raise InvalidRecordError(
                "makes the chat template write an answer that does not begin with its own generation prompt "
                f"({before[-40:]!r}), so where the answer starts is unclear: mend the template"
            )
    nested = all(later.startswith(earlier) for (_, earlier), (later, _) in pairwise(turns))
    return [turns] if nested else [[turn] for turn in turns]


def apply_template(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> Any:
    """The tokenizer's chat template on messages; InvalidRecordError if the template raises an error.

    Special tokens that a message spells are hidden from the template, and `rendered_ids` reads them as text.
    """
    check_template(tokenizer)
    hidden = hide_special(tokenizer, list(messages))
    try:
        return tokenizer.apply_chat_template(hidden, **options)
    except Exception as error:  # a template is a program and may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidRecordError(f"holds messages that the chat template refuses ({reason})") from error


def check_template(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer without a chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "messages need a chat template, which this tokenizer lacks: give text (or prompt and completion) instead, "
            "or save a template with the tokenizer"
        )
