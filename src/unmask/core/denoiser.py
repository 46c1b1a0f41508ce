"""The one interface between a network and everything that trains, scores or decodes with it.

A `Network` maps tokens, their layout and a pattern to logits. The functions here arrange its passes: which
streams stand in a pass, and which row scores which position. The token shift is resolved in this file and
nowhere else: whoever calls `score` or `denoise` gets, for position i, the logits that predict token i.

Knows no architecture. Notation: x0 clean tokens, xt corrupted tokens, both (batch, length) int64;
`wanted` (batch, length) bool marks the positions whose logits are asked for, returned (wanted.sum(), vocab)
in row-major order. Logits are float32 (float64 for a float64 network), the mask token's is -inf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from torch.utils.weak import WeakIdKeyDictionary

from unmask.core.attention import PADDING, Layout, Pattern, bidirectional, block_causal, causal, drafting, two_stream
from unmask.core.head_loss import RowLoss, whole_sum
from unmask.core.transfer import to_device


@dataclass(frozen=True)
class DiffusionConfig:
    """What a converted network was trained to be; the object `diffusion` of a checkpoint's config.json.

    attention: "bidirectional" | "block_causal" (one stream, noisy context) | "two_stream" (clean context).
    clean_attention: "causal" | "block_causal" for two streams, else None.
    shift: position i is scored by row i - 1, as in AR models, instead of row i.
    noisy_attention: "bidirectional" | "causal" inside a noisy block of two streams.
    mask_rows: embeddings of the mask, ids mask_token_id + 0, 1, ...: one for each place in the block (a
    drafter's), or one for all.
    """

    mask_token_id: int
    attention: str
    clean_attention: str | None
    block_size: int | None
    shift: bool
    recipe: str
    version: str
    noisy_attention: str = "bidirectional"
    mask_rows: int = 1

    def __post_init__(self) -> None:
        if self.attention not in ("bidirectional", "block_causal", "two_stream"):
            raise ValueError(f"attention {self.attention!r} is unknown: use bidirectional, block_causal or two_stream")
        if (self.attention == "two_stream") != (self.clean_attention is not None):
            raise ValueError(
                f"clean_attention {self.clean_attention!r} does not go with attention {self.attention!r}: "
                "two_stream needs 'causal' or 'block_causal', the others none"
            )
        if self.clean_attention not in (None, "causal", "block_causal"):
            raise ValueError(f"clean_attention {self.clean_attention!r} is unknown: use causal or block_causal")
        if self.mask_rows < 1:
            raise ValueError(f"mask_rows {self.mask_rows} must be at least 1")
        if self.noisy_attention not in ("bidirectional", "causal"):
            raise ValueError(f"noisy_attention {self.noisy_attention!r} is unknown: use bidirectional or causal")
        if self.noisy_attention == "causal" and self.attention != "two_stream":
            raise ValueError(f"noisy_attention 'causal' needs two_stream attention, not {self.attention!r}")
        if self.attention != "bidirectional" and (self.block_size is None or self.block_size < 1):
            raise ValueError(f"block_size {self.block_size} must be at least 1 for {self.attention} attention")

    def with_block_size(self, block_size: int | None) -> DiffusionConfig:
        """The same network read with another block size; None changes nothing."""
        return self if block_size is None else replace(self, block_size=block_size)

    @property
    def segment_size(self) -> int | None:
        """Tokens that share a noise level when the bound is measured: a block of two streams, else a document.

        Only a clean context makes blocks independent given what they see; one noisy stream is one canvas.
        """
        return self.block_size if self.attention == "two_stream" else None

    @property
    def pattern(self) -> Pattern:
        if self.attention == "bidirectional":
            return bidirectional
        assert self.block_size is not None
        if self.attention == "block_causal":
            return block_causal(self.block_size)
        return two_stream(self.block_size, self.clean_attention or "block_causal", self.noisy_attention)

    @property
    def serves_ar(self) -> bool:
        """Whether the clean stream is the AR model itself, so that one cache serves every mode."""
        return self.attention == "two_stream" and self.clean_attention == "causal"


class Cache(Protocol):
    """Keys and values in slots; `slots.SlotCache` is one."""

    def place(self, rows: Sequence[int] | None, column: Tensor, columns: int, slots: int, device: torch.device) -> Any:
        """Say where the tokens of the next pass go."""

    def select(self, keep: Tensor) -> None:
        """Keep these slots."""


@dataclass
class Past:
    """What stands before a pass: a cache that keys and values are appended to, and where its tokens stand."""

    cache: Any
    layout: Layout
    _last: tuple[Layout, Layout, Layout] | None = None

    def keys(self, layout: Layout) -> Layout:
        """Where the keys of a pass over `layout` stand: the same tensors for passes at the same place."""
        if self._last is None or not (self._last[0].same(self.layout) and self._last[1].same(layout)):
            self._last = self.layout, layout, self.layout.then(layout)
        return self._last[2]


_GRAIN = 64


@dataclass
class Prefix:
    """Rows that are being decoded, each in a slot: positions 0 .. lengths[s] - 1 of slot s are cached and clean.

    A token at position p stands in column p of its slot. lengths: (slots,) on the host, as are the layouts of passes:
    all that says where things stand is known there. columns: how many of them a pass reaches, for all rows.
    next_logits: (slots, vocab), those of the last cached row, kept only where the shift will read them.
    rows: the slot of each row of a pass, None for row i in slot i. grain: what `reach` rounds columns up to.
    """

    cache: Any
    lengths: Tensor
    columns: int = 0
    next_logits: Tensor | None = None
    rows: Sequence[int] | None = None
    grain: int = 1

    @classmethod
    def empty(cls, network: Network, slots: int, columns: int) -> Prefix:
        """Slots with nothing in them, which will reach so many columns at most."""
        grain = 1 if network.device.type == "cpu" else _GRAIN  # masks are aligned then, and shapes few
        return cls(network.new_slots(slots, columns), torch.zeros(slots, dtype=torch.long), grain=grain)

    def at(self, rows: Sequence[int] | None) -> Prefix:
        """The same rows for a pass over these of them; a slot may come more than once."""
        return replace(self, rows=rows)

    def reach(self, columns: int) -> None:
        """Let passes see and write this many columns."""
        self.columns = -(-columns // self.grain) * self.grain

    def keys(self, layout: Layout) -> Layout:
        """Where the keys of a pass over `layout` stand: (slots, or rows if given, columns)."""
        rows = None if self.rows is None else torch.tensor(self.rows)
        return slot_keys(layout, rows, self.lengths, self.columns)

    def select(self, keep: Tensor) -> None:
        """Keep these slots, in this order; keep: their numbers, on the host."""
        self.cache.select(keep)
        self.lengths = self.lengths[keep]
        if self.next_logits is not None:
            self.next_logits = self.next_logits[to_device(keep, self.next_logits.device)]


def slot_keys(layout: Layout, rows: Tensor | None, lengths: Tensor, columns: int) -> Layout:
    """Where the keys of a pass over `layout` stand, (slots, or rows if given, columns).

    rows: the slot of each row, None for row i in slot i. lengths: (slots,), columns that are cached and clean.
    """
    (slots,), device = lengths.shape, lengths.device
    column = torch.arange(columns, device=device).expand(slots, -1)
    document = torch.where(column < lengths[:, None], 0, PADDING)
    noisy = torch.zeros_like(document, dtype=torch.bool)
    slot = torch.arange(slots, device=device) if rows is None else rows
    spare = (0, 1)  # a column for padding
    index = (slot[:, None], layout.position.where(layout.real, columns))
    document = pad(document, spare).index_put(index, layout.document)[:, :-1]
    noisy = pad(noisy, spare).index_put(index, layout.noisy)[:, :-1]
    kv = Layout(column, document, noisy)
    return kv if rows is None else kv.at(rows)


class Network(Protocol):
    """Tokens, their layout and a pattern -> logits; implemented by `hf.HFNetwork` and by toys in tests.

    Logits are on `device`. What goes in may be on the host, where finding its places keeps no device waiting.
    """

    @property
    def device(self) -> torch.device: ...

    def new_cache(self) -> Any:
        """An empty cache that grows by whole passes, for `Past`."""

    def new_slots(self, slots: int, columns: int) -> Any:
        """An empty cache for a `Prefix` of so many slots, which will reach so many columns at most."""

    def __call__(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        *,
        rows: Tensor | None = None,
        past: Past | Prefix | None = None,
    ) -> Tensor:
        """Logits of row i of the pass in place i; `rows` are flat indices into (batch * length).

        With `past`, queries also see its tokens where the pattern allows, and their keys and values go into
        `past.cache`; `past.layout` or `past.lengths` is left to the caller.
        """


@runtime_checkable
class SummingNetwork(Network, Protocol):
    """A network that takes its logits apart where a loss only needs their weighted sum."""

    def weighted_sum(self, passed: Pass, row_loss: RowLoss, weight: Tensor, past: Past | None = None) -> Tensor:
        """sum_i weight_i * row_loss(logits of row i), differentiable once; `weight` and what the loss holds are not."""


class Pass(NamedTuple):
    """What a network is called with."""

    input_ids: Tensor
    layout: Layout
    pattern: Pattern
    rows: Tensor


def run(network: Network, passed: Pass, past: Past | None = None) -> Tensor:
    """The logits of a pass."""
    input_ids, layout, pattern, rows = passed
    return network(input_ids, layout, pattern, rows=rows, past=past)


def run_sum(network: Network, passed: Pass, row_loss: RowLoss, weight: Tensor, past: Past | None = None) -> Tensor:
    """sum_i weight_i * row_loss(logits of row i) of a pass, the logits never whole where the network can do that."""
    if isinstance(network, SummingNetwork):
        return network.weighted_sum(passed, row_loss, weight, past)
    return whole_sum(run(network, passed, past), row_loss, weight)


# --- whole sequences: training and scoring


def score(
    network: Network,
    config: DiffusionConfig,
    xt: Tensor,
    x0: Tensor,
    layout: Layout,
    wanted: Tensor,
    pattern: Pattern | None = None,
) -> Tensor:
    """Logits of the wanted positions of xt; with two streams each block of xt sees the clean x0 before it."""
    return run(network, scoring_pass(config, xt, x0, layout, wanted, pattern))


def scoring_pass(
    config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor, pattern: Pattern | None = None
) -> Pass:
    """The pass behind `score`.

    One pass over [xt | x0] with the positions repeated scores every block after its clean prefix at once
    (Efficient-DLM 2512.14067, section 2). `layout` is that of x0. `pattern` stands in for
    the config's while a mask is annealed.
    """
    if config.attention == "two_stream":
        input_ids, passed = torch.cat([_placed(config, xt, layout), x0], dim=1), _both_streams(layout)
    else:
        input_ids, passed = xt, layout
    rows = _scoring_rows(config, layout, input_ids)[wanted]
    return Pass(input_ids, passed, pattern or config.pattern, rows)


def _both_streams(layout: Layout) -> Layout:
    """[noisy | clean], the positions repeated."""
    return layout.once("both streams", lambda: _noisy(layout).then(layout))


_all_noisy: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What `_noisy` puts in place of a tensor."""


def _noisy(layout: Layout) -> Layout:
    if layout.noisy not in _all_noisy:
        with torch.inference_mode(False):  # as in `Layout.once`, which is for layouts that share no tensor
            _all_noisy[layout.noisy] = torch.ones_like(layout.noisy)
    return layout._replace(noisy=_all_noisy[layout.noisy])


def _placed(config: DiffusionConfig, xt: Tensor, layout: Layout) -> Tensor:
    """xt with the mask of each token's place in its block, where places have masks of their own."""
    if config.mask_rows == 1 or config.block_size is None:
        return xt
    place = to_device((layout.position % config.block_size).clamp_max(config.mask_rows - 1), xt.device)
    return torch.where(xt == config.mask_token_id, config.mask_token_id + place, xt)


def _scoring_rows(config: DiffusionConfig, layout: Layout, input_ids: Tensor) -> Tensor:
    """Flat index of the row that scores each position, (batch, length), in a pass over xt or [xt | x0]."""
    batch, length = layout.position.shape
    row = torch.arange(length, device=input_ids.device).expand(batch, length)
    if config.shift:
        row = row - 1
        if config.attention == "two_stream":
            # A block's first position has no row before it in its own block: the clean row i - 1 scores it.
            assert config.block_size is not None
            row = torch.where(layout.position % config.block_size == 0, row + length, row)
    return row + torch.arange(batch, device=input_ids.device)[:, None] * input_ids.shape[1]


def score_joint(
    network: Network, config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor, ar_wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """`score` of the positions `wanted` and `score_ar` of `ar_wanted`, in one pass over [xt | x0]."""
    passed, count = joint_pass(config, xt, x0, layout, wanted, ar_wanted)
    logits = run(network, passed)
    return logits[:count], logits[count:]


def joint_pass(
    config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor, ar_wanted: Tensor
) -> tuple[Pass, int]:
    """The pass behind `score_joint`, and how many of its rows score `wanted`; those of `ar_wanted` follow.

    Needs a strictly causal clean stream: only then is it the AR model (Nemotron-Labs 2607.05722, section 2.1).
    """
    _check_serves_ar(config)
    (batch, length), passed = xt.shape, scoring_pass(config, xt, x0, layout, wanted)
    clean = torch.arange(length, 2 * length, device=xt.device) - 1
    ar_rows = (clean + torch.arange(batch, device=xt.device)[:, None] * 2 * length)[ar_wanted]
    return passed._replace(rows=torch.cat([passed.rows, ar_rows])), len(passed.rows)


def score_distilled(
    network: Network, config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """`score` and `score_ar` of the positions `wanted`; the clean stream leaves no graph."""
    ar_logits, passed, past = distilled_pass(network, config, xt, x0, layout, wanted)
    return run(network, passed, past), ar_logits


def distilled_pass(
    network: Network, config: DiffusionConfig, xt: Tensor, x0: Tensor, layout: Layout, wanted: Tensor
) -> tuple[Tensor, Pass, Past]:
    """`score_ar` of the positions `wanted`, without a graph, and the pass on top of it that scores them.

    The clean tokens run first and fill a cache, and the noisy ones run on top of it: the same as one pass
    over [xt | x0], but only the noisy half is kept for the backward pass, so that a step costs about an AR
    step. With the shift, a block's first position is scored by the clean stream itself and must not be wanted.
    """
    _check_serves_ar(config)
    (batch, length), block = xt.shape, config.block_size
    row = torch.arange(batch * length, device=xt.device).view(batch, length)
    if config.shift and bool((wanted & (layout.position % (block or 1) == 0)).any()):
        raise ValueError("a block's first position has no noisy row with the shift: leave it out of wanted")
    past = Past(network.new_cache(), layout.at(..., slice(0, 0)))
    with torch.no_grad():
        ar_logits = network(x0, layout, causal, rows=row[wanted] - 1, past=past)
    past.layout = layout
    return ar_logits, noisy_pass(config, xt, layout, wanted), past


def noisy_pass(config: DiffusionConfig, xt: Tensor, layout: Layout, wanted: Tensor) -> Pass:
    """The pass over xt on top of the cached clean stream that scores the positions `wanted`."""
    row = torch.arange(xt.numel(), device=xt.device).view(xt.shape) - int(config.shift)
    return Pass(_placed(config, xt, layout), _noisy(layout), config.pattern, row[wanted])


def _check_serves_ar(config: DiffusionConfig) -> None:
    if not config.serves_ar:
        raise ValueError(
            f"clean attention {config.clean_attention!r} of {config.attention} attention is not the AR model: "
            "use attention='two_stream' with clean_attention='causal'"
        )


def score_ar(network: Network, x0: Tensor, layout: Layout, wanted: Tensor) -> Tensor:
    """Next-token logits: causal pattern, position i scored by row i - 1."""
    return run(network, ar_pass(x0, layout, wanted))


def ar_pass(x0: Tensor, layout: Layout, wanted: Tensor) -> Pass:
    """The pass behind `score_ar`."""
    row = torch.arange(x0.numel(), device=x0.device).view(x0.shape) - 1
    return Pass(x0, layout, causal, row[wanted])


# --- on top of a cache: decoding


def begin(
    network: Network, pattern: Pattern, prompts: Sequence[Tensor], *, columns: int = 0, keep_logits: bool = False
) -> Prefix:
    """The prompts, run once, each in a slot of its own, of which `columns` will be reached if that is known."""
    past = Prefix.empty(network, len(prompts), max(columns, *map(len, prompts)))
    prefill(network, pattern, past, range(len(prompts)), prompts, keep_logits=keep_logits)
    return past


def prefill(
    network: Network,
    pattern: Pattern,
    past: Prefix,
    rows: Sequence[int],
    prompts: Sequence[Tensor],
    *,
    keep_logits: bool = False,
) -> None:
    """Run `prompts`, possibly empty, into these slots; with `keep_logits` their last logits stay for what follows."""
    slots, lengths = torch.tensor(list(rows)), torch.tensor([len(prompt) for prompt in prompts])
    if lengths.any():
        ids = pad_sequence([prompt.cpu() for prompt in prompts], batch_first=True)
        # What fills up a shorter prompt stands behind it, where no prompt looks, and is not counted as cached.
        layout = Layout.of(torch.arange(ids.shape[1]).expand_as(ids))
        past.reach(max(past.columns, ids.shape[1]))
        last = torch.arange(len(lengths)) * ids.shape[1] + lengths - 1
        wanted = last.clamp_min(0) if keep_logits else last[:0]
        logits = network(ids, layout, pattern, rows=wanted, past=replace(past, rows=rows, columns=ids.shape[1]))
        if keep_logits:
            if past.next_logits is None:
                past.next_logits = logits.new_zeros(len(past.lengths), logits.shape[-1])
            past.next_logits[to_device(slots, logits.device)] = logits
    past.lengths[slots] = lengths


def denoise(
    network: Network,
    config: DiffusionConfig,
    past: Prefix,
    xt: Tensor,
    layout: Layout,
    wanted: Tensor,
    finished: tuple[Sequence[int], Tensor] | None = None,
) -> Tensor:
    """Logits of the wanted positions of the active blocks xt (slots, width) on top of the cached prefixes.

    xt and the finished tokens are on the network's device, `layout` and `wanted` on the host.

    A block sees itself and its prefix whole, and is not kept in the cache. `finished` holds the clean tokens
    (n, block) that stand between cache and active block in these n slots: they run in the same forward, as rows
    of their own which the active rows see, and stay, which is exactly the two forwards done apart.
    """
    slots, width = xt.shape
    if config.attention == "two_stream":
        xt, layout = _placed(config, xt, layout), _noisy(layout)
    rows: list[int] | None = None
    if finished is not None:
        behind, tokens = finished
        late, size = torch.tensor(list(behind)), tokens.shape[1]
        chunks = -(-size // width)  # rows as wide as the active ones, so that nothing is padded for them
        place = past.lengths[late, None] + torch.arange(chunks * width)
        inside = (torch.arange(chunks * width) < size).expand_as(place)
        clean = Layout.of(torch.where(inside, place, 0), torch.where(inside, 0, PADDING))
        cut = [x.unflatten(1, (chunks, width)).transpose(0, 1).flatten(0, 1) for x in
               (pad(tokens, (0, chunks * width - size)), *clean)]  # fmt: skip
        xt = torch.cat([xt, cut[0]])
        layout = Layout(*(torch.cat(pair) for pair in zip(layout, cut[1:], strict=True)))
        rows = [*range(slots), *list(behind) * chunks]
    index = torch.arange(slots * width).view(slots, width) - int(config.shift)
    if not config.shift:
        scoring = index[wanted]
    else:  # a block's first position is scored by the row before it, in this forward and in those after it
        scoring = index[:, 1:][wanted[:, 1:]]
        if finished is not None:
            first = slots + (chunks - 1) * len(behind)
            boundary = (first + torch.arange(len(behind))) * width + (size - 1) % width
            scoring = torch.cat([boundary, scoring])
    logits = network(xt, layout, config.pattern, rows=scoring, past=past.at(rows))
    if finished is not None:
        past.lengths[late] += size
    if not config.shift:
        return logits
    if finished is not None:
        if past.next_logits is None:
            past.next_logits = logits.new_zeros(slots, logits.shape[-1])
        past.next_logits[to_device(late, logits.device)], logits = logits[: len(behind)], logits[len(behind) :]
    if past.next_logits is None:  # nothing stands before the blocks: their first positions are never wanted
        return logits
    out = logits.new_empty(int(wanted.sum()), logits.shape[-1])
    first_place = torch.zeros_like(wanted)
    first_place[:, 0] = True
    is_first = first_place[wanted]
    begins, rest, slot = (to_device(x.nonzero()[:, 0], out.device) for x in (is_first, ~is_first, wanted[:, 0]))
    out[begins], out[rest] = past.next_logits[slot], logits
    return out


def draft(
    network: Network,
    config: DiffusionConfig,
    past: Prefix,
    last: Tensor,
    last_layout: Layout,
    layout: Layout,
    *,
    anchor: bool = False,
) -> tuple[Tensor, Tensor]:
    """One forward over [last verified token, clean | masks, noisy] on top of the cached prefix.

    The clean row is the AR model and its keys stay in the cache; the masks stand at `layout` (batch, k), from
    the first unverified position on, wherever that is in its block, and leave nothing. Returns the AR logits
    of the first unverified position (batch, vocab), exact, and the draft logits (batch, k, vocab). The first of
    them are the AR logits again with `anchor`, else the first mask's, a row that nobody needs otherwise.
    """
    _check_serves_ar(config)
    batch, width = layout.position.shape
    place = torch.arange(width, device=last.device).clamp_max(config.mask_rows - 1)
    masks = (config.mask_token_id + place).expand(batch, -1)
    passed = last_layout.then(_noisy(layout))
    read = torch.arange(width + 1)
    if config.shift:
        read = read[:-1]
    elif anchor:
        read = read[read != 1]
    rows = (torch.arange(batch)[:, None] * (width + 1) + read).flatten()
    logits = network(torch.cat([last, masks], dim=1), passed, drafting(config.noisy_attention), rows=rows, past=past)
    past.lengths += 1
    logits = logits.unflatten(0, (batch, -1))
    return logits[:, 0], logits[:, int(not config.shift and not anchor) :]


def verify(network: Network, past: Prefix, tokens: Tensor, layout: Layout) -> Tensor:
    """AR logits of what follows each of the tokens (batch, k, vocab).

    All of them are in the cache then, and none of them counts: those accepted are added to `past.lengths`.
    """
    return network(tokens, layout, causal, past=past)
