"""A record to a text or a supervised example: which columns it has decides which it is.

Knows JSON values alone: no file, no tokenizer. Besides text it reads prompt and completion or messages (TRL's names,
both as texts and as lists of messages), conversations (ShareGPT), and instruction, input, output (Alpaca).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unmask.data.plain_text import surrogate_problem
from unmask.data.supervised import Completion, Conversation, Example, Instruction, InvalidRecordError

PROMPT, COMPLETION, MESSAGES, CONVERSATIONS = "prompt", "completion", "messages", "conversations"
INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"
SYSTEM, HISTORY, TOOLS = "system", "history", "tools"
_LEARNT = (COMPLETION, MESSAGES, CONVERSATIONS, OUTPUT)
COLUMNS = (PROMPT, *_LEARNT, INSTRUCTION, INPUT, SYSTEM, HISTORY, TOOLS)
"""Columns that are read, beside that of the text."""

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
}  # fmt: skip
"""ShareGPT's names of those who speak, and those of chat templates."""

_DEEPEST = 64
"""Levels of a message at most: templates and `repr` recurse."""


def read_record(record: Mapping[str, Any], text_column: str) -> Example:
    """The example in a record, recognised by its columns; a column that holds null is one that is not there.

    Raises InvalidRecordError for a record without exactly one kind of example, and for one that is no sound text.
    """
    example = _recognised(record, text_column)
    for text in _strings(example if isinstance(example, str) else vars(example)):
        problem = surrogate_problem(text)
        if problem is not None:
            raise InvalidRecordError(f"holds {problem}")
    return example


def _recognised(record: Mapping[str, Any], text_column: str) -> Example:
    if text_column != "text" and isinstance(record.get(text_column), str):
        chosen: str = record[text_column]
        return chosen
    held = {name for name, value in record.items() if value is not None}
    kinds = [name for name in (text_column, *_LEARNT) if name in held]
    if OUTPUT in kinds and INSTRUCTION not in held and text_column != OUTPUT:
        kinds.remove(OUTPUT)
    if COMPLETION not in kinds and PROMPT in record and MESSAGES in kinds:
        kinds.insert(0, PROMPT)
    if len(kinds) > 1:
        raise InvalidRecordError(f"has both {kinds[0]!r} and {kinds[1]!r}, so what to learn is unclear: keep one")
    if kinds == [text_column]:
        return _text(record, text_column)
    if not kinds:
        raise InvalidRecordError(_nothing(record, text_column))
    if record.get(TOOLS) not in (None, "", "[]", [], {}):
        raise InvalidRecordError(f"holds {TOOLS!r}, which are not read: write them into a message of the role 'system'")
    readers = {COMPLETION: _completion, MESSAGES: _messages, CONVERSATIONS: _sharegpt, OUTPUT: _alpaca}
    return readers[kinds[0]](record)


def missing_column(text_column: str, found: Sequence[str]) -> str:
    """The message for a record or file without a column of text."""
    return (
        f"has no text column {text_column!r}, found {sorted(found)}; choose one with text_column=NAME, "
        "or give prompt and completion, or messages"
    )


def kind(value: Any) -> str:
    """What a JSON value is, in words for messages."""
    names = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text"}
    return names.get(type(value)) or (
        "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list | tuple) else
        f"a value of type {type(value).__name__}"
    )  # fmt: skip


def _nothing(record: Mapping[str, Any], text_column: str) -> str:
    """The message for a record that holds nothing to learn: a column of null, or none."""
    for name in (text_column, *_LEARNT):
        if name in record and (name != OUTPUT or INSTRUCTION in record):
            return f"holds null in column {name!r}, not text"
    return missing_column(text_column, [str(name) for name in record])


def _text(record: Mapping[str, Any], name: str) -> str:
    """The text in a column."""
    if name not in record:
        raise InvalidRecordError(f"has no column {name!r}")
    if not isinstance(record[name], str):
        raise InvalidRecordError(f"holds {kind(record[name])} in column {name!r}, not text")
    text: str = record[name]
    return text


def _not_empty(record: Mapping[str, Any], name: str) -> str:
    text = _text(record, name)
    if not text.strip():
        raise InvalidRecordError(f"has an empty {name}: a supervised example needs both")
    return text


def _completion(record: Mapping[str, Any]) -> Completion | Conversation:
    """TRL's prompt and completion: texts, or lists of messages, of which those of the completion are learnt."""
    prompt, completion = record.get(PROMPT), record[COMPLETION]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], given=len(prompt))
    if isinstance(prompt, list) or isinstance(completion, list):
        raise InvalidRecordError(
            f"holds {kind(prompt)} in column {PROMPT!r} and {kind(completion)} in {COMPLETION!r}: "
            "both are text, or both lists of messages"
        )
    return Completion(_not_empty(record, PROMPT), _not_empty(record, COMPLETION))


def _messages(record: Mapping[str, Any]) -> Conversation:
    return _conversation(record[MESSAGES])


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    """ShareGPT's conversations: a list of {"from", "value"}, after the text of a column `system`."""
    turns = record[CONVERSATIONS]
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InvalidRecordError(f"holds {kind(turns)} in column {CONVERSATIONS!r}, not a list of messages")
    messages: list[Any] = []
    for turn in turns:
        role = turn.get("from", turn.get("role"))
        if not isinstance(role, str) or role not in _ROLES:
            raise InvalidRecordError(f"holds a message from {role!r}: known are {', '.join(_ROLES)}")
        messages.append({"role": _ROLES[role], "content": turn.get("value", turn.get("content"))})
    return _conversation(_system(record) + messages)


def _alpaca(record: Mapping[str, Any]) -> Instruction | Conversation:
    """Alpaca's instruction, input, which may be missing, and output; with system or history a conversation."""
    asked = _not_empty(record, INSTRUCTION)
    more = _text(record, INPUT) if record.get(INPUT) is not None else ""
    instruction = Instruction(asked, more.strip(), _not_empty(record, OUTPUT))
    before, history = _system(record), record.get(HISTORY) or []
    if not isinstance(history, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        raise InvalidRecordError(f"holds a {HISTORY} that is no list of pairs of a question and its answer")
    for question, answer in history:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _conversation(before + instruction.messages()) if before else instruction


def _system(record: Mapping[str, Any]) -> list[Any]:
    """The message of a column `system`, none where it is empty."""
    if record.get(SYSTEM) is None or not _text(record, SYSTEM).strip():
        return []
    return [{"role": "system", "content": record[SYSTEM]}]


def _conversation(messages: Any, given: int = 0) -> Conversation:
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise InvalidRecordError("holds messages that are no list of objects with a role and a content text each")
    answers = [m["content"] for m in messages[given:] if m["role"] == "assistant"]
    if not answers:
        raise InvalidRecordError("holds messages without one of the role 'assistant', so nothing is to be learnt")
    if not all(a.strip() for a in answers):
        raise InvalidRecordError("holds an empty message of the role 'assistant'")
    if messages[0]["role"] == "assistant":
        raise InvalidRecordError("begins with a message of the role 'assistant', which answers nothing")
    return Conversation(messages, given)


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a value, keys too; InvalidRecordError for one that nests too deeply to be rendered."""
    levels = [value]
    for _ in range(_DEEPEST):
        yield from (part for part in levels if isinstance(part, str))
        levels = [inner for part in levels for inner in _parts(part)]
        if not levels:
            return
    raise InvalidRecordError(f"nests deeper than {_DEEPEST} levels")


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
