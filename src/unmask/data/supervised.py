"""Supervised examples: a prompt and a completion, which is learnt, or messages, of which the assistant's are learnt.

Knows a tokenizer and its chat template. Knows no file and no model.

Every example becomes token ids and a loss mask, True on the tokens that are learnt. The tokens before an answer are
exactly those that `generate` reads as the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from unmask.data.plain_text import following_ids, hide_special, open_ids, rendered_ids, special_texts


class InvalidRecordError(ValueError):
    """A record that is no document. The message says what is wrong with it, but not its file and line."""


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages of a chat, each with role and content; the first `given` of them are never learnt."""

    messages: list[dict[str, str]]
    given: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Instruction:
    """An instruction, what it is about (may be empty), and the answer, as Alpaca's data have them."""

    instruction: str
    input: str
    output: str

    def messages(self) -> list[dict[str, str]]:
        """As a chat: instruction and input are one message."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input else self.instruction
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": self.output}]

    def completion(self) -> Completion:
        """As text, under the prompt that Alpaca was trained with (github.com/tatsu-lab/stanford_alpaca)."""
        paired = ", paired with an input that provides further context" if self.input else ""
        prompt = (
            f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes "
            f"the request.\n\n### Instruction:\n{self.instruction}\n\n"
        )
        about = f"### Input:\n{self.input}\n\n" if self.input else ""
        return Completion(f"{prompt}{about}### Response:\n", self.output)


Example = str | Completion | Conversation | Instruction
"""What a record holds: a text, which is learnt whole, or a supervised example."""


def encode_example(
    tokenizer: Any, example: Completion | Conversation | Instruction, end_token_id: int | None
) -> list[tuple[list[int], list[bool]]]:
    """(ids, loss mask) of the documents that an example makes, usually one.

    The end token follows the last learnt token, unless the template wrote it there. If a template renders an earlier
    answer differently from the last one (some drop their reasoning), every answer makes a document of its own, after
    exactly the tokens that `generate` would read before it. An instruction goes through the chat template if there is
    one, and is a completion of Alpaca's prompt otherwise.
    """
    if isinstance(example, Instruction):
        example = example.completion() if tokenizer.chat_template is None else Conversation(example.messages())
    if isinstance(example, Completion):
        prompt = open_ids(tokenizer, example.prompt)
        spans = [(prompt, continue_ids(tokenizer, prompt, example.prompt, example.completion))]
        return [_joined(tokenizer, spans, end_token_id)]
    documents = []
    for turns in _turns(tokenizer, example.messages, example.given):
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
    in running text; otherwise those of `text` alone, without the space that some tokenizers put in front. rendered: a
    chat template wrote the texts.
    """
    whole = rendered_ids(tokenizer, before + text) if rendered else open_ids(tokenizer, before + text)
    if whole[: len(ids)] == list(ids):
        return whole[len(ids) :]
    return rendered_ids(tokenizer, text, follows=bool(ids)) if rendered else following_ids(tokenizer, text)


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


def _turns(tokenizer: Any, messages: list[dict[str, str]], given: int) -> list[list[tuple[str, str]]]:
    """For each document, (text before an answer, text up to the end of the answer) of its answers that are learnt."""

    def render(upto: int, ask: bool) -> str:
        return apply_template(tokenizer, messages[:upto], add_generation_prompt=ask)

    answers = [i for i, message in enumerate(messages) if i >= given and message["role"] == "assistant"]
    turns = [(render(i, True), render(i + 1, False)) for i in answers]
    for before, after in turns:
        if not after.startswith(before):
            raise InvalidRecordError(
                "makes the chat template write an answer that does not begin with its own generation prompt "
                f"({before[-40:]!r}), so where the answer starts is unclear: mend the template"
            )
    nested = all(later.startswith(earlier) for (_, earlier), (later, _) in pairwise(turns))
    return [turns] if nested else [[turn] for turn in turns]


def apply_template(tokenizer: Any, messages: Sequence[dict[str, str]], **options: Any) -> str:
    """The text that the tokenizer's chat template makes of messages; InvalidRecordError if it raises an error.

    A template without a system role, which raises an error or leaves the message out, gets the system's text at the
    head of the next message of the user. Special tokens that a message spells are hidden from the template, and
    `rendered_ids` reads them as text.
    """
    check_template(tokenizer)
    hidden: list[dict[str, Any]] = hide_special(tokenizer, list(messages))
    system = [message["content"] for message in hidden if _is_system(message)]

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # a template is a program and may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InvalidRecordError(f"holds messages that the chat template refuses ({reason})") from error
        return text

    try:
        text = render(hidden)
        if all(part.strip() in text for part in system):
            return text
    except InvalidRecordError:
        if not system:
            raise
    return render(_system_with_user(hidden))


def _is_system(message: dict[str, Any]) -> bool:
    return message.get("role") == "system" and isinstance(message.get("content"), str)


def _system_with_user(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each text of the system at the head of the next message, or as a message of the user."""
    changed: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        if _is_system(message):
            waiting.append(message["content"])
        elif waiting and message.get("role") == "user" and isinstance(message.get("content"), str):
            changed.append(message | {"content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            changed += [{"role": "user", "content": "\n\n".join(waiting)}, message] if waiting else [message]
            waiting = []
    return changed + ([{"role": "user", "content": "\n\n".join(waiting)}] if waiting else [])


def check_template(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer without a chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "messages need a chat template, which this tokenizer lacks: give text (or prompt and completion) instead, "
            "or save a template with the tokenizer"
        )
