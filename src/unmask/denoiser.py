"""The one interface between a network and everything that trains, scores or decodes with it.

A `Network` maps tokens, their layout and a pattern to logits. The functions here arrange its passes: which
streams stand in a pass, and which row scores which position. The token shift is resolved in this file and
nowhere else: whoever calls `score` or `denoise` gets, for position i, the logits that predict token i.

Knows no architecture. Notation: x0 clean tokens, xt corrupted tokens, both (batch, length) int64;
`wanted` (batch, length) bool marks the positions whose logits are asked for, returned (wanted.sum(), vocab)
in row-major order. Logits are float32 (float64 for a float64 network), the mask token's is -inf.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from unmask.attention import PADDING, Layout, Pattern, bidirectional, block_causal, causal, drafting, two_stream
from unmask.readout import RowLoss


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
    """Keys and values of past tokens; transformers' `DynamicCache` is one."""

    def crop(self, max_length: int) -> None:
        """Drop the last -max_length tokens (negative lengths only)."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""


@dataclass
class Past:
    """What stands before a pass: its cache, where its tokens stand, and the logits that score what follows.

    next_logits: (batch, vocab), those of the last cached row, kept only where the shift will read them.
    """

    cache: Any
    layout: Layout
    next_logits: Tensor | None = None

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch."""
        self.cache.batch_select_indices(rows)
        self.layout = self.layout.at(rows)
        if self.next_logits is not None:
            self.next_logits = self.next_logits[rows]


class Network(Protocol):
    """Tokens, their layout and a pattern -> logits; implemented by `hf.HFNetwork` and by toys in tests."""

    @property
    def device(self) -> torch.device: ...

    def new_cache(self) -> Any: ...

    def __call__(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        *,
        rows: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Logits of row i of the pass in place i; `rows` are flat indices into (batch * length).

        With `past`, queries also see its tokens where the pattern allows, and their keys and values are
        appended to `past.cache`; `past.layout` is left to the caller.
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
    return (weight * row_loss(run(network, passed, past), slice(None))).sum()


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
        input_ids, passed = torch.cat([_placed(config, xt, layout), x0], dim=1), _noisy(layout).then(layout)
    else:
        input_ids, passed = xt, layout
    rows = _scoring_rows(config, layout, input_ids)[wanted]
    return Pass(input_ids, passed, pattern or config.pattern, rows)


def _noisy(layout: Layout) -> Layout:
    return layout._replace(noisy=torch.ones_like(layout.noisy))


def _placed(config: DiffusionConfig, xt: Tensor, layout: Layout) -> Tensor:
    """xt with the mask of each token's place in its block, where places have masks of their own."""
    if config.mask_rows == 1 or config.block_size is None:
        return xt
    place = (layout.position % config.block_size).clamp_max(config.mask_rows - 1)
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


def prefill(
    network: Network, pattern: Pattern, input_ids: Tensor, layout: Layout, *, keep_logits: bool = False
) -> Past:
    """Run the (left-padded) prompts once; with `keep_logits` the last row's logits stay for what follows."""
    past = Past(network.new_cache(), layout.at(..., slice(0, 0)))
    batch, length = input_ids.shape
    if length:
        last = (torch.arange(batch, device=input_ids.device) + 1) * length - 1
        rows = last if keep_logits else last[:0]
        logits = network(input_ids, layout, pattern, rows=rows, past=past)
        past.layout = layout
        past.next_logits = logits if keep_logits else None
    return past


def denoise(
    network: Network,
    config: DiffusionConfig,
    past: Past,
    xt: Tensor,
    layout: Layout,
    wanted: Tensor,
    finished: tuple[Tensor, Layout] | None = None,
) -> Tensor:
    """Logits of the wanted positions of the active block xt (batch, block) on top of the cached prefix.

    The block sees itself and the prefix whole, and is not kept in the cache. `finished` is the clean block
    before it, if that one is not cached yet: both run in one forward, and the finished block stays, which is
    exactly the two forwards done apart.
    """
    batch, width = xt.shape
    if config.attention == "two_stream":
        xt, layout = _placed(config, xt, layout), _noisy(layout)
    input_ids, passed, kept = xt, layout, 0
    if finished is not None:
        input_ids, passed = torch.cat([finished[0], xt], dim=1), finished[1].then(layout)
        kept = finished[0].shape[1]
    length = kept + width
    offset = torch.arange(batch, device=xt.device)[:, None] * length
    row = kept - config.shift + torch.arange(width, device=xt.device) + offset
    if not config.shift:
        rows = row[wanted]
    elif kept:  # the boundary rows score the block's first position, in this forward and in those after it
        rows = torch.cat([row[:, 0], row[:, 1:][wanted[:, 1:]]])
    else:
        rows = row[:, 1:][wanted[:, 1:]]
    logits = network(input_ids, passed, config.pattern, rows=rows, past=past)
    past.cache.crop(-width)
    if finished is not None:
        past.layout = past.layout.then(finished[1])
    if not config.shift:
        return logits
    if kept:
        past.next_logits, logits = logits[:batch], logits[batch:]
    if past.next_logits is None:  # nothing stands before the block: its first position is never wanted
        return logits
    out = logits.new_empty(int(wanted.sum()), logits.shape[-1])
    first = torch.zeros_like(wanted)
    first[:, 0] = True
    first = first[wanted]
    out[first], out[~first] = past.next_logits[wanted[:, 0]], logits
    return out


def draft(
    network: Network, config: DiffusionConfig, past: Past, last: Tensor, last_layout: Layout, layout: Layout
) -> tuple[Tensor, Tensor]:
    """One forward over [last verified token, clean | masks, noisy] on top of the cached prefix.

    The clean row is the AR model and its keys stay in the cache; the masks stand at `layout` (batch, k), from
    the first unverified position on, wherever that is in its block, and leave nothing. Returns the AR logits
    of the first unverified position (batch, vocab), exact, and the draft logits (batch, k, vocab).
    """
    _check_serves_ar(config)
    width = layout.position.shape[1]
    place = torch.arange(width, device=last.device).clamp_max(config.mask_rows - 1)
    masks = (config.mask_token_id + place).expand_as(layout.position)
    passed = last_layout.then(_noisy(layout))
    logits = network(torch.cat([last, masks], dim=1), passed, drafting(config.noisy_attention), past=past)
    past.cache.crop(-width)
    past.layout = past.layout.then(last_layout)
    return logits[:, 0], logits[:, :-1] if config.shift else logits[:, 1:]


def verify(network: Network, past: Past, tokens: Tensor, layout: Layout) -> Tensor:
    """AR logits of what follows each of the tokens (batch, k, vocab); all of them enter the cache."""
    logits = network(tokens, layout, causal, past=past)
    past.layout = past.layout.then(layout)
    return logits


def retract(past: Past, width: int, accepted: Tensor) -> None:
    """Of the last `width` cached tokens keep the first `accepted` (batch,) of each row.

    What no row keeps is cropped. A rejected token before that becomes padding, which nothing sees: exact, at
    the price of a dead slot in the rows that accepted less than their batch-mates.
    """
    kept = int(accepted.max())
    column = torch.arange(width, device=accepted.device)
    dead = column >= accepted[:, None]
    tail = past.layout.at(..., slice(past.layout.position.shape[1] - width, None))
    tail = tail._replace(document=tail.document.masked_fill(dead, PADDING)).at(..., slice(0, kept))
    if kept < width:
        past.cache.crop(kept - width)
    past.layout = past.layout.at(..., slice(0, past.layout.position.shape[1] - width)).then(tail)
