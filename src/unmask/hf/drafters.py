"""A drafter on a model: the ids of its masks, and what it can gate, measured.

That are linear maps that run once on each token of a pass, and tables that ids look up.
Experts get only the tokens that are routed to them, some maps read cached tokens again, and some routers give more than
their product: noisy tokens cannot be picked there. So the base runs once, with and without a cache, and is watched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from unmask.core.drafter import Drafter, DrafterConfig, linear_maps
from unmask.hf.network import cache_keyword
from unmask.hf.quantised import check_bare
from unmask.hf.special_tokens import check_mask_token

MASK_TOKEN = "<|mask|>"
"""The text of a mask token, unless its model has one or another is asked for."""


@dataclass(frozen=True)
class Gateable:
    """maps: names of linear maps. tables: names of embeddings that ids index, beside the input embedding (Gemma 3n)."""

    maps: tuple[str, ...]
    tables: tuple[str, ...]


def add_drafter(
    model: Any,
    tokenizer: Any,
    config: DrafterConfig,
    *,
    token: str | None = None,
    first: int | None = None,
    parts: Gateable | None = None,
) -> Drafter:
    """Hook a new drafter on `model`; only the tokenizer gets the mask token, the base's embedding gets no row for it.

    The ids of the masks must not be those of other tokens, or clean text would be read as masks; nor those of rows that
    the base has beyond its tokens, since these have logits and the AR model would lose them. So a new token that the
    tokenizer puts on such a row has its masks after all rows. A mask token of the base's is used where no other token
    follows it too closely. first: the id that a folder names. parts: what can be gated, if that is known.
    """
    check_bare(model)
    found = tokenizer.get_vocab()
    token = token or own_mask_token(tokenizer, config)
    check_mask_token(model, tokenizer, token)
    own = found.get(token, len(tokenizer))
    taken = _taken(found, token, own, config)
    if taken or (token in found and token != tokenizer.mask_token):
        raise ValueError(
            f"mask token {token!r} of the drafter is not its own: its {config.mask_rows} ids from {own} on are "
            f"those of {[token, *taken][-1]!r} too; give a new token with mask_token=TEXT"
        )
    tokenizer.add_special_tokens({"mask_token": token})
    own, rows = tokenizer.mask_token_id, model.get_input_embeddings().weight.shape[0]
    after_all = max(rows, 1 + max(tokenizer.get_vocab().values()))
    if first is None:
        first = own if token in found or own >= rows else after_all
    elif first < after_all:
        first = own  # of an older folder; one that names another id is refused by `parse_diffusion`
    return drafter_on(model, first, config, parts).to(model.device)


def own_mask_token(tokenizer: Any, config: DrafterConfig) -> str:
    """The text of a drafter's mask token where none is asked for."""
    found, reused = tokenizer.get_vocab(), tokenizer.mask_token
    return reused if reused and not _taken(found, reused, found[reused], config) else MASK_TOKEN


def _taken(vocabulary: dict[str, int], token: str, first: int, config: DrafterConfig) -> list[str]:
    """Other tokens with the ids of the masks."""
    return [t for t, i in vocabulary.items() if first <= i < first + max(1, config.mask_rows) and t != token]


def drafter_on(model: Any, mask_token_id: int, config: DrafterConfig, parts: Gateable | None = None) -> Drafter:
    """A new drafter on all that can be gated of its targets."""
    parts = gateable(model) if parts is None else parts
    return Drafter(model, mask_token_id, config, parts.maps, parts.tables)


def gateable(model: Any) -> Gateable:
    """What a drafter on this model can gate; the model runs on a few tokens."""
    rows, length = 2, 7
    size = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(rows * 2 * length).view(rows, -1) * 5 + 3) % size
    ids = ids.to(model.get_input_embeddings().weight.device)
    seen: dict[str, set[bool]] = {}
    tables: dict[str, None] = {}
    present = ids[:, :length]

    def watch_map(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            shape = args[0].shape[:-1]
            each = tuple(shape) in ((rows, present.shape[1]), (present.numel(),))
            seen.setdefault(name, set()).add(each and isinstance(out, Tensor) and out.shape[:-1] == shape)

        return hook

    def watch_table(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], _out: Any) -> None:
            if args[0].shape == present.shape and torch.equal(args[0], present):
                tables[name] = None

        return hook

    own = model.get_input_embeddings()
    handles = [module.register_forward_hook(watch_map(name)) for name, module in linear_maps(model)]
    handles += [module.register_forward_hook(watch_table(name)) for name, module in model.named_modules()
                if isinstance(module, nn.Embedding) and module is not own]  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _masked_by_itself(model):
            model(input_ids=present, use_cache=False)
            cache = {cache_keyword(model): DynamicCache()}
            with suppress(Exception):  # of a model whose passes cannot be cached: `probes` says so where that is asked
                model(input_ids=present, use_cache=True, **cache)
                present = ids[:, length : 2 * length - 3]  # another number of tokens than are cached
                model(input_ids=present, use_cache=True, **cache)
    finally:
        for handle in handles:
            handle.remove()
    routed = {_kind(name) for name, good in seen.items() if False in good}
    return Gateable(tuple(name for name in seen if _kind(name) not in routed), tuple(tables))


def _kind(name: str) -> str:
    """The name without numbers: the same for all layers and experts, some of which may get every token by chance."""
    return re.sub(r"\d+", "*", name)


@contextmanager
def _masked_by_itself(model: Any) -> Iterator[None]:
    """Within the context the model makes its own masks, by attention that needs no compiler."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    if before == "flex_attention":
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = before
