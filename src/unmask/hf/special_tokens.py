"""Tokens with a meaning: those that end a text, and which token may not become the mask token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, GenerationConfig

from unmask.hf.gguf import source_of


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of the generation config, and after them the tokenizer's; none if both have none."""
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    ids = generation.eos_token_id if generation is not None else None
    of_model = list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    of_tokenizer = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys(map(int, of_model + of_tokenizer)))


def begin_token_id(model: Any, tokenizer: Any) -> int:
    """The token from which an unconditional text starts: the begin token, else the end token; ValueError without."""
    ends = (tokenizer.eos_token_id, *end_token_ids(model, tokenizer))
    begin = next((token for token in (tokenizer.bos_token_id, *ends) if token is not None), None)
    if begin is None:
        raise ValueError("an empty prompt needs a begin or end token, and this tokenizer has neither")
    return int(begin)


def end_token_ids_at(place: Path | str, tokenizer: Any, *, trust_remote_code: bool = False) -> tuple[int, ...]:
    """`end_token_ids` of a located model without loading its weights."""
    source, of_file = source_of(place)
    try:
        generation = GenerationConfig.from_pretrained(source)
    except OSError:  # it has no file of its own, and transformers reads the model's configuration instead
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **of_file)
        generation = GenerationConfig.from_model_config(config)
    return end_token_ids(SimpleNamespace(generation_config=generation), tokenizer)


def end_token_id(tokenizer: Any, token: str) -> int:
    """The id of a token that is to end texts; ValueError if the vocabulary has none of that name."""
    found = tokenizer.get_vocab().get(token)
    if found is None:
        raise ValueError(f"end_token {token!r} is no token of this vocabulary: give one that is")
    return int(found)


def add_end_token(model: Any, tokenizer: Any, token: str) -> int:
    """Make a token of the vocabulary the first of the model's end tokens, beside those it has; return its id."""
    token_id = end_token_id(tokenizer, token)
    model.generation_config.eos_token_id = list(dict.fromkeys([token_id, *end_token_ids(model, tokenizer)]))
    return token_id


def check_mask_token(model: Any, tokenizer: Any, token: str) -> None:
    """Raise ValueError for a mask token that means something else already: text would be masked where it has it.

    The unknown token may be reused: no other text is spelled by it.
    """
    meanings = {
        name: text for name, text in tokenizer.special_tokens_map.items() if name not in ("mask_token", "unk_token")
    }
    meaning = next((name for name, text in meanings.items() if text == token), None)
    token_id = tokenizer.get_vocab().get(token)
    if meaning is None and token_id is not None and token_id in end_token_ids(model, tokenizer):
        meaning = "end token of its generation_config.json"
    template = tokenizer.chat_template
    templates = template.values() if isinstance(template, dict) else [template or ""]
    special = any(added.special and str(added) == token for added in tokenizer.added_tokens_decoder.values())
    if meaning is None and special and any(token in text for text in templates):
        meaning = "chat_template"
    if meaning is not None:
        raise ValueError(
            f"mask_token {token!r} has a meaning already ({meaning}), and would be masked text wherever it stands: "
            "give a token of its own, or leave mask_token out"
        )
