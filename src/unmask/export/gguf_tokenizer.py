"""A tokenizer as llama.cpp's keys, or why llama.cpp would not give the same tokens.

Two kinds are known there: byte-level BPE, whose splitting of a text before merges has a name in llama.cpp's source
(`llama-vocab.cpp`), and sentencepiece's BPE, which has scores instead of merges.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens: `gguf.TokenType`."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _SHORT + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_DIGIT = r"\p{N}"

PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "dbrx",
    ((_QWEN2,), False): "qwen2",
}
"""llama.cpp's name of (expressions that split a text, whether a piece that is in the vocabulary is taken unmerged)."""

_SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """llama.cpp's keys `tokenizer.ggml.*`; scores: of sentencepiece, else merges. ids: of special tokens by name.

    notes: which texts llama.cpp tokenises otherwise.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    masks: Sequence[int] = ()
    adds_begin: bool = False
    adds_end: bool = False
    adds_space: bool = False
    chat_template: str | list[dict[str, str]] | None = None
    notes: tuple[str, ...] = ()


def vocabulary_of(
    tokenizer: Any, rows: int, end_token_ids: Iterable[int] = (), masks: Sequence[int] = ()
) -> Vocabulary:
    """The vocabulary of `rows` tokens, as many as the embedding has; ValueError where llama.cpp's would differ.

    masks: ids that no text has, and no sampler chooses.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(
            f"{type(tokenizer).__name__} is written in Python: only fast tokenizers (tokenizer.json) are known"
        )
    parts = json.loads(backend.to_str())
    kind = parts["model"].get("type")
    if kind != "BPE":
        raise _refused(f"its model is {kind}, not BPE")
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if parts["model"].get(key)]
    if odd:
        raise _refused(f"its BPE has {odd[0]} {parts['model'][odd[0]]!r}")
    for token in parts["added_tokens"]:
        if not token["special"] and (token["lstrip"] or token["rstrip"] or token["single_word"]):
            raise _refused(f"its added token {token['content']!r} takes the space beside it, or whole words alone")
    begin, end = _added(tokenizer)
    tokens, types = _tokens(parts, rows)
    for i in masks:
        tokens[i] = f"<|mask:{i}|>" if types[i] == UNUSED else tokens[i]
        types[i] = CONTROL
    return Vocabulary(
        **(_sentencepiece(parts, tokens, types) if parts["model"].get("byte_fallback") else _byte_level(parts)),
        tokens=tokens,
        types=types,
        ids=_ids(tokenizer, end_token_ids),
        masks=masks,
        adds_begin=begin,
        adds_end=end,
        chat_template=_template(tokenizer),
    )


def _template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    """The chat template, or all of them by name."""
    found = getattr(tokenizer, "chat_template", None)
    return [{"name": name, "template": text} for name, text in found.items()] if isinstance(found, dict) else found


def _refused(reason: str) -> ValueError:
    return ValueError(
        f"this tokenizer cannot be exported as GGUF, since llama.cpp would give other tokens: {reason}; use --format hf"
    )


def _added(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets a begin and an end token."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    before, after = (whole, []) if at is None else (whole[:at], whole[at + len(bare) :])
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if before not in ([], [begin]) or after not in ([], [end]):
        raise _refused(f"it puts {[*before, '...', *after]} around a text, not one begin and one end token at most")
    return bool(before), bool(after)


def _tokens(parts: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The text and type of each of the `rows` tokens; rows without a token are called unused."""
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    vocab, pieces = parts["model"]["vocab"], parts["model"].get("byte_fallback")
    if max(vocab.values()) >= rows:
        raise _refused(f"its vocabulary has the id {max(vocab.values())}, and the embedding {rows} rows")
    for token, i in vocab.items():
        is_byte = pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], types[i] = token, BYTE if is_byte else NORMAL
    unknown = parts["model"].get("unk_token")
    for token in parts["added_tokens"]:
        i, text = token["id"], token["content"]
        if i < rows:  # the mask token of drafters that read random tokens has no row
            tokens[i] = text.replace(_SPACE, " ") if pieces and not token["special"] else text
            types[i] = CONTROL if token["special"] else USER_DEFINED
    if pieces and unknown in vocab:
        types[vocab[unknown]] = UNKNOWN
    return tokens, types


def _ids(tokenizer: Any, end_token_ids: Iterable[int]) -> dict[str, int]:
    """Special tokens by llama.cpp's names; it knows three that end a text."""
    ends = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *end_token_ids) if i is not None))
    named = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    named |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    return {name: i for name, i in named.items() if i is not None}


# --- byte-level BPE


def _byte_level(parts: dict[str, Any]) -> dict[str, Any]:
    model, normalizer = parts["model"], parts.get("normalizer")
    if normalizer is not None and normalizer["type"] != "NFC":  # llama.cpp leaves texts as they are, and most are NFC
        raise _refused(f"it changes texts by {normalizer['type']} before it splits them")
    expressions = tuple(_expressions(parts.get("pre_tokenizer")))
    pre = PRE_TOKENIZERS.get((expressions, bool(model.get("ignore_merges"))))
    if pre is None:
        raise _refused(
            f"it splits texts by {list(expressions)} (ignore_merges {bool(model.get('ignore_merges'))}); known are the "
            f"pre-tokenizers {', '.join(PRE_TOKENIZERS.values())}"
        )
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    notes = () if normalizer is None else ("texts that are not in Unicode's form NFC get other tokens in llama.cpp",)
    return {"model": "gpt2", "pre": pre, "merges": merges, "notes": notes}


def _expressions(pre_tokenizer: dict[str, Any] | None) -> Iterable[str]:
    """The expressions by which a text is split, one after the other."""
    if pre_tokenizer is None:
        raise _refused("it does not split texts into words, nor bytes into characters")
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        raise _refused(f"its last splitting step is {steps[-1]['type']}, not byte-level without a space before a text")
    for step in steps:
        if (
            step["type"] == "Split"
            and "Regex" in step["pattern"]
            and step["behavior"] == "Isolated"
            and not step["invert"]
        ):
            yield step["pattern"]["Regex"]
        elif step["type"] == "Digits" and step["individual_digits"]:
            yield _DIGIT
        elif step["type"] == "ByteLevel":
            if step["use_regex"]:
                yield _GPT2
        else:
            raise _refused(f"it splits texts by {step['type']}")


# --- sentencepiece


def _sentencepiece(parts: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    """Scores by which llama.cpp merges in the same order: of neighbours that spell a token, the best token first."""
    if sum(kind == BYTE for kind in types) != 256:
        raise _refused(f"it has {sum(kind == BYTE for kind in types)} of the 256 tokens for bytes")
    merges = [tuple(pair if isinstance(pair, list) else pair.split(" ")) for pair in parts["model"]["merges"]]
    vocab = parts["model"]["vocab"]
    ordinary = {token for token, i in vocab.items() if types[i] == NORMAL}
    known = set(merges)
    for token in vocab:  # text that spells a token for a byte becomes one in llama.cpp
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair[0] in ordinary and pair[1] in ordinary and pair not in known:
                raise _refused(f"{pair[0]!r} and {pair[1]!r} spell the token {token!r} but are never merged")
    scores = [0.0] * len(tokens)
    found = _scores(merges)
    for token, score in found.items():
        scores[vocab[token]] = score
    adds_space, notes = _adds_space(parts)
    if len(set(found.values())) < len(found):
        longest = max(len(token) for token in found if len(set(token)) == 1)
        notes += (f"runs of more than {longest} spaces get other tokens in llama.cpp",)
    return {"model": "llama", "pre": "default", "scores": scores, "adds_space": adds_space, "notes": notes}


def _scores(merges: list[tuple[str, ...]]) -> dict[str, float]:
    """The score of each merged token: less for each later one.

    Merges that make one token must follow each other. Runs of one character may lie among each other and then share a
    score: Llama 2's runs of spaces do, and share one in its own file too (longer runs are split elsewhere).
    """
    made = [left + right for left, right in merges]
    last = {token: i for i, token in enumerate(made)}
    score: dict[str, float] = {}
    i = 0
    while i < len(made):
        end, group = last[made[i]], i
        while group <= end:  # the merges from i to `end` make tokens that others of theirs lie between
            end, group = max(end, last[made[group]]), group + 1
        odd = [token for token in dict.fromkeys(made[i : end + 1]) if len(set(token)) > 1]
        if odd and len(set(made[i : end + 1])) > 1:
            raise _refused(f"other merges lie between those that make {odd[0]!r}, so no score gives their order")
        score |= dict.fromkeys(made[i : end + 1], -float(i))
        i = end + 1
    return score


def _adds_space(parts: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether a text gets a space at its beginning, and notes; spaces become the sign of sentencepiece in any case."""
    normalizer, splitting = parts.get("normalizer"), parts.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepends = {"type": "Prepend", "prepend": _SPACE}
    if splitting is not None and splitting["type"] == "Metaspace" and not steps:
        if not splitting.get("split", True) and splitting["replacement"] == _SPACE:
            if splitting["prepend_scheme"] == "never":
                return False, ()
            return True, ("texts that begin with a space, and texts after a special token, get one more in llama.cpp",)
    elif steps in ([prepends, replaces], [replaces]) and _splits_nothing(splitting):
        return steps[0] == prepends, ()
    raise _refused(f"it prepares texts by {[step['type'] for step in [*steps, *([splitting] if splitting else [])]]}")


def _splits_nothing(splitting: dict[str, Any] | None) -> bool:
    """None, or Gemma's split at spaces, of which none are left."""
    return splitting is None or (splitting["type"] == "Split" and splitting["pattern"] == {"String": " "})
