"""Constraints on new text from JSON schemas, regular expressions and grammars, by llguidance.

A grammar works on bytes, and a mask says which tokens of the vocabulary may come next. Where only one text is possible,
the mask leaves the token alone with which the tokenizer would write it, so that names of keys cost no forwards.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unmask.plain_json import to_json


@dataclass(frozen=True)
class JsonSchema:
    """Text is JSON that a schema (a dictionary, or its JSON) validates, written as `json.dumps` does.

    any_whitespace: allow white space wherever JSON does. Small models may write it without end, and keys are no longer
    free.
    """

    schema: Any
    any_whitespace: bool = False


@dataclass(frozen=True)
class Regex:
    """The whole text matches a regular expression (of Rust's regex crate: without look-around and back-references)."""

    pattern: str


@dataclass(frozen=True)
class Lark:
    """Text that the rule `start` of a context-free grammar derives, in llguidance's dialect of Lark."""

    grammar: str


ConstraintSpec = Any
"""A `JsonSchema`, `Regex` or `Lark`; or in short: a schema as a dictionary, a Pydantic model, `re.compile(...)`, or
"json_object" for any JSON object; or the `response_format` of OpenAI's clients."""


def grammar_constraint(
    spec: ConstraintSpec,
    tokenizer: Any,
    num_tokens: int,
    end_token_ids: Sequence[int],
    plain_ids: Callable[[str], list[int]],
    mask_token_id: int | None = None,
) -> Grammar:
    """The constraint that a specification means for this tokenizer.

    num_tokens: width of the logits. end_token_ids: one of these follows the text when it is complete. plain_ids: tokens
    of a text in which special tokens are ordinary text. mask_token_id: is never allowed. Raises ValueError for a
    specification that is wrong or that llguidance cannot hold, and ImportError without llguidance.
    """
    if isinstance(spec, Grammar):
        return spec
    llguidance = _llguidance()
    if not end_token_ids:
        raise ValueError(
            f"constraint {_shown(spec)} needs an end token to end the text with, and this model has none: set "
            "eos_token_id in its generation_config"
        )
    vocabulary = _vocabulary(tokenizer, num_tokens, tuple(end_token_ids))
    grammar = _grammar(llguidance.LLMatcher, spec)
    error = llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
    if error:
        raise ValueError(f"constraint {_shown(spec)} cannot be used: {' '.join(error.split())}")
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    banned = (set() if isinstance(spec, Lark) else special) - set(end_token_ids)  # a Lark grammar may name special ones
    banned |= set() if mask_token_id is None else {mask_token_id}
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0)
    return Grammar(spec, matcher, num_tokens, frozenset(end_token_ids), frozenset(banned), plain_ids)


@dataclass(frozen=True, repr=False)
class Grammar:
    """A `Constraint` of the sampler: a grammar over the tokens of one vocabulary; banned: tokens that are no text."""

    spec: ConstraintSpec
    matcher: Any
    num_tokens: int
    end_token_ids: frozenset[int]
    banned: frozenset[int]
    plain_ids: Callable[[str], list[int]]

    def __repr__(self) -> str:
        return _shown(self.spec)

    def begin(self) -> GrammarState:
        return GrammarState(self, self.matcher.deep_copy())


class GrammarState:
    """A `ConstraintState`: a matcher, and what it allows next once that was asked for."""

    def __init__(self, grammar: Grammar, matcher: Any) -> None:
        self._grammar, self._matcher = grammar, matcher
        self._allowed: Tensor | None = None
        self.ended = False

    def allowed(self) -> Tensor:
        if self._allowed is None:
            grammar = self._grammar
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            known = np.unpackbits(bits, bitorder="little", count=min(8 * len(bits), grammar.num_tokens))
            mask = torch.zeros(grammar.num_tokens, dtype=torch.bool)
            mask[: len(known)] = torch.from_numpy(known).bool()
            banned = grammar.banned if self._matcher.is_accepting() else grammar.banned | grammar.end_token_ids
            mask[[token for token in banned if token < grammar.num_tokens]] = False
            if not mask.any():
                mask[self._spelled()] = True
            self._allowed = mask
        return self._allowed

    def _spelled(self) -> int:
        """The first token of the only text that may follow, where its bytes are those of a special token."""
        text = self._matcher.compute_ff_bytes().decode(errors="ignore")
        if not text:
            why = _first_line(self._matcher.get_error()) or "special tokens alone could follow"
            raise ValueError(f"the constraint allows no token here: {why}")
        return self._grammar.plain_ids(text)[0]

    def accept(self, token: int) -> None:
        if token in self._grammar.end_token_ids and bool(self.allowed()[token]):
            self.ended = True  # the matcher would not take it back
            return
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} breaks the constraint: {_first_line(self._matcher.get_error())}")
        self._allowed = None

    def undo(self, count: int) -> None:
        if count and self.ended:
            self.ended, count = False, count - 1
        if count:
            self._matcher.rollback(count)
            self._allowed = None


def _first_line(error: str) -> str:
    return error.split("\n", 1)[0]


def _grammar(matcher: Any, spec: ConstraintSpec) -> str:
    """A specification as a grammar of llguidance."""
    if isinstance(spec, re.Pattern):
        spec = Regex(spec.pattern)
    elif isinstance(spec, str) and spec == "json_object":
        spec = JsonSchema({"type": "object"})
    elif isinstance(spec, dict):
        spec = JsonSchema(_schema_of(spec))
    elif hasattr(spec, "model_json_schema"):
        spec = JsonSchema(spec.model_json_schema())
    if isinstance(spec, Regex):
        return str(matcher.grammar_from_regex(spec.pattern))
    if isinstance(spec, Lark):
        return str(matcher.grammar_from_lark(spec.grammar))
    if not isinstance(spec, JsonSchema):
        raise ValueError(
            f"constraint {_shown(spec)} is none: give a JSON schema (a dictionary or a Pydantic model), 'json_object', "
            "Regex('...') or Lark('...')"
        )
    try:
        schema = spec.schema if isinstance(spec.schema, str) else to_json(spec.schema)
        schema = to_json(json.loads(schema))
    except (TypeError, ValueError) as error:
        raise ValueError(f"constraint {_shown(spec)} is no JSON: {error}") from None
    spaces = {"whitespace_flexible": True} if spec.any_whitespace else _AS_DUMPED
    return str(matcher.grammar_from_json_schema(schema, overrides=spaces))


def _schema_of(given: dict[str, Any]) -> Any:
    """A schema, which may come as the `response_format` of OpenAI's clients."""
    if given == {"type": "json_object"}:
        return {"type": "object"}
    if given.get("type") != "json_schema":
        return given
    inside = given.get("json_schema")
    if not isinstance(inside, dict) or "schema" not in inside:
        raise ValueError(f"constraint {_shown(given)} has no schema: give {{'json_schema': {{'schema': ...}}}}")
    return inside["schema"]


_AS_DUMPED = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_vocabularies: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _vocabulary(tokenizer: Any, num_tokens: int, end_token_ids: tuple[int, ...]) -> Any:
    """llguidance's view of the tokenizer, which takes a second to make for a large one."""
    import llguidance.hf
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(
            f"constraint needs a tokenizer with a tokenizer.json, and {type(tokenizer).__name__} has none: save it as "
            "a fast tokenizer"
        )
    made = _vocabularies.setdefault(tokenizer, {})
    key = num_tokens, end_token_ids, len(tokenizer)
    if key not in made:
        size = max(num_tokens, len(tokenizer))
        try:
            made[key] = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=list(end_token_ids))
        except ValueError as error:
            raise ValueError(
                "constraint needs to know which bytes each token spells, and llguidance cannot tell from this "
                f"{type(tokenizer.backend_tokenizer.model).__name__} tokenizer ({error}): it reads byte-level BPE and "
                "SentencePiece"
            ) from None
    return made[key]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError("constraint needs llguidance: pip install 'unmask[grammar]'") from None
    return llguidance


def _shown(spec: Any) -> str:
    """The specification in an error message, cut where it is long."""
    shown = repr(spec)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."
