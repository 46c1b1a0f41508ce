"""Rotary embeddings that change with the length of a text (LongRoPE, 2402.13753), by the text of each row alone.

Past `original_max_position_embeddings` such a model rotates a whole text by other factors, its first tokens too.
transformers chooses for a whole pass, by its largest position: batch-mates and padding decide for every row, and keys
that were cached with the short factors meet queries with the long ones. Here a document has the factors of its own
length, as in a stock pass over it alone. While text grows, a row of logits has those of the text that it sees, as in
stock `generate` of models that know of this (Phi-3), which reads the text again where the factors change.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmask.core.attention import Layout, Pattern, intersect, same_document
from unmask.core.network import SlotCacheState
from unmask.core.transfer import to_device
from unmask.hf.fast.kv_cache import SlotCache, _SlotLayer


def rotary_modules(model: Any) -> list[torch.nn.Module]:
    """The modules of a model whose rotary factors change with the length of the text."""
    kinds = ((module, getattr(module, "rope_type", None)) for module in model.modules())
    return [m for m, kind in kinds if kind == "longrope" or (isinstance(kind, dict) and "longrope" in kind.values())]


def first_long_position(model: Any) -> int | None:
    """The first position whose texts have the long factors; None for a model that has one set of factors."""
    parameters = [p for module in rotary_modules(model) for p in _parameters(module.config)]
    first = {p["original_max_position_embeddings"] for p in parameters if p.get("rope_type") == "longrope"}
    if len(first) > 1:
        raise ValueError(f"original_max_position_embeddings differs between layers: {sorted(first)}; give one value")
    return first.pop() if first else None


def _parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of a configuration, one for all layers or one for each of their types."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [given] if "rope_type" in given or "type" in given else [p for p in given.values() if isinstance(p, dict)]


def changes_unseen(model: Any) -> bool:
    """Whether the configuration asks for such factors, but no module that computes them is known: code of its own."""
    kinds = {p.get("rope_type", p.get("type")) for p in _parameters(model.config.get_text_config())}
    return bool(kinds & {"longrope", "su"}) and not rotary_modules(model)


def in_long_documents(layout: Layout, first: int) -> Tensor:
    """Whether the document of each token (batch, length) reaches position `first`; padding is no document."""
    found = torch.zeros_like(layout.real)
    beyond = layout.real & (layout.position >= first)
    for row in beyond.any(1).nonzero()[:, 0].tolist():
        document = layout.document[row]
        found[row] = torch.isin(document, document[beyond[row]])
    return found


@contextmanager
def rotating(model: Any, position: Tensor, is_long: Tensor, first: int) -> Iterator[None]:
    """Within the context of a pass the tokens of `is_long` (batch, length) have the long factors, the others the short.

    position: of the pass, (batch, length), on the host like `is_long`.
    """
    if bool((is_long == (position.max() >= first)).all()):  # what transformers chooses for the whole pass
        yield
        return

    def hook(module: Any, args: tuple[Any, ...], given: dict[str, Any], _out: Any) -> Any:
        call = inspect.signature(module.forward).bind(*args, **given)
        at = call.arguments["position_ids"]
        where = to_device(is_long, at.device)

        def rotated(at: Tensor) -> Any:
            call.arguments["position_ids"] = at
            return module.forward(*call.args, **call.kwargs)

        short = rotated(at.masked_fill(where, 0).clamp_max(first - 1))
        long = rotated(torch.nn.functional.pad(at, (0, 1), value=first))  # one more token, which makes it long
        return tuple(torch.where(where[..., None], b[:, :-1], a) for a, b in zip(short, long, strict=True))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in rotary_modules(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LongSlots(SlotCache):
    """Slots that know their tokens, and whose keys have the long factors: they are made again when that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.is_long = _SlotLayer(self.memory), torch.zeros(0, dtype=torch.bool)

    def is_long_of(self, slots: int) -> Tensor:
        """Whether the keys of each slot (slots,) have the long factors."""
        more = max(0, slots - len(self.is_long))
        self.is_long = torch.nn.functional.pad(self.is_long, (0, more))[:slots]
        return self.is_long

    def note(self, input_ids: Tensor) -> None:
        """Write the tokens of a pass that was located, beside its keys."""
        self.tokens.update(input_ids[:, None, :, None], input_ids[:, None, :, None])

    def keep_slots(self, keep: Tensor) -> None:
        super().keep_slots(keep)
        self.tokens.keep_slots(keep)
        self.is_long = self.is_long[keep]


Run = Callable[[Tensor, Layout, Tensor | None, SlotCacheState, Tensor], Tensor]
"""(tokens, layout, rows, cache, is_long (batch, length)) -> the output of the head in a pass on slots."""


def run_on_long_slots(
    run: Run,
    first: int,
    input_ids: Tensor,
    layout: Layout,
    pattern: Pattern,
    rows: Tensor | None,
    past: SlotCacheState,
) -> Tensor:
    """A pass over rows that continue `LongSlots`; each row that is read has the factors of the text that it sees.

    Where one slot has rows of both kinds there are two passes, and the keys of the second, the long one, stay.
    """
    slot = torch.arange(len(past.lengths)) if past.rows is None else torch.tensor(list(past.rows))
    cache: LongSlots = past.cache
    is_long = cache.is_long_of(len(past.lengths)).clone()
    is_long[slot] = False
    is_long[slot[(layout.real & (layout.position >= first)).any(1)]] = True
    flat = torch.arange(layout.position.numel()) if rows is None else rows.cpu()
    row, column = flat // layout.position.shape[1], flat % layout.position.shape[1]
    early = is_long[slot[row]] & ~_sees_long(layout, pattern, past, row, column, first)
    passes = [is_long]
    if bool(early.any()):
        passes = [is_long.clone().index_fill_(0, slot[row[early]], False), is_long]
    begin = torch.where(layout.real, layout.position, past.columns).amin(1)  # what is before it has been written
    outs = []
    for wanted in passes:
        for s in (wanted != cache.is_long).nonzero()[:, 0].tolist():
            _write_again(run, past, s, min(int(past.lengths[s]), int(begin[slot == s].min())), bool(wanted[s]))
        cache.is_long = wanted
        outs.append(run(input_ids, layout, rows, past, wanted[slot][:, None].expand(layout.position.shape)))
    if len(outs) == 1:
        return outs[0]
    short, long = outs
    return torch.where(to_device(early, long.device).view(*long.shape[:-1], 1), short, long)


def _sees_long(
    layout: Layout, pattern: Pattern, past: SlotCacheState, row: Tensor, column: Tensor, first: int
) -> Tensor:
    """Whether the tokens at (row, column) of a pass, each (n,), see a position from `first` on, or stand there."""
    found = layout.position[row, column] >= first
    at = (~found).nonzero()[:, 0]
    keys = past.keys(layout).subset(row[at])
    seen = intersect(pattern, same_document)(layout.subset(row[at], column[at]).subset(..., None), keys)
    found[at] = (seen & (keys.position >= first)).any(1)
    return found


def _write_again(run: Run, past: SlotCacheState, slot: int, count: int, is_long: bool) -> None:
    """Write the keys of the first `count` tokens of a slot once more, with the factors of a long or a short text."""
    if count > 0:
        tokens, position = past.cache.tokens.keys[slot, :count, 0, 0][None].clone(), torch.arange(count)[None]
        again, none = replace(past, rows=[slot], column=None, columns=count), torch.zeros(0, dtype=torch.long)
        run(tokens, Layout.of(position), none, again, torch.full_like(position, is_long, dtype=torch.bool))
