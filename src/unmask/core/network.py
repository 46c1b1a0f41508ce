"""The one interface between a network and everything that trains, scores or decodes with it.

A `Network` maps tokens, their layout and a pattern to logits, alone or on top of a cache. Knows no architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from unmask.core.attention import PADDING, Layout, Pattern, bidirectional, block_causal, two_stream
from unmask.core.head_loss import RowLoss, whole_sum
from unmask.core.transfer import to_device
from unmask.limits import check_whole
from unmask.plain_numbers import plain_fields


@dataclass(frozen=True)
class DiffusionConfig:
    """What a converted network was trained to be; the object `diffusion` of a checkpoint's config.json.

    attention: "bidirectional" | "block_causal" (one stream, noisy context) | "two_stream" (clean context).
    clean_attention: "causal" | "block_causal" for two streams, else None.
    shift: position i is scored by row i - 1, as in AR models, instead of row i.
    noisy_attention: "bidirectional" | "causal" inside a noisy block of two streams.
    mask_rows: embeddings of the mask, ids mask_token_id + 0, 1, ...: one for each place in a block (a drafter may
    have these), or one for all.
    noise_tokens: 0: masks are embeddings. Else random tokens below this number stand where masks would (a drafter's
    rows may read these, Uno 2609.04010), and mask_token_id only marks their places.
    adapt_anchor: a drafter's block begins with the last verified token, read by an adapted row, so that a draft forward
    has adapted rows alone. Else that token's row is the AR model's.
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
    noise_tokens: int = 0
    adapt_anchor: bool = False

    def __post_init__(self) -> None:
        plain_fields(self)
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
        if self.noise_tokens < 0 or (self.noise_tokens and (self.mask_rows > 1 or self.attention != "two_stream")):
            raise ValueError(
                f"noise_tokens {self.noise_tokens} must be 0, or a number of tokens with two_stream attention and one "
                f"mask, not {self.attention!r} and mask_rows {self.mask_rows}"
            )
        if self.adapt_anchor and not self.serves_ar:
            raise ValueError(f"adapt_anchor is for drafters, whose clean half is causal, not {self.clean_attention!r}")
        if self.noisy_attention not in ("bidirectional", "causal"):
            raise ValueError(f"noisy_attention {self.noisy_attention!r} is unknown: use bidirectional or causal")
        if self.noisy_attention == "causal" and self.attention != "two_stream":
            raise ValueError(f"noisy_attention 'causal' needs two_stream attention, not {self.attention!r}")
        check_whole("block_size", self.block_size)
        if self.attention != "bidirectional" and self.block_size is None:
            raise ValueError(f"block_size {self.block_size} must be at least 1 for {self.attention} attention")

    @property
    def shape(self) -> str:
        """What a noisy row sees, in a few words."""
        blocks = "" if self.block_size is None else f" in blocks of {self.block_size}"
        clean = "" if self.clean_attention is None else f" with a {self.clean_attention} clean half"
        return f"{self.attention}{blocks}{clean}"

    def with_block_size(self, block_size: int | None) -> DiffusionConfig:
        """The same network read with another block size; None changes nothing."""
        return self if block_size is None else replace(self, block_size=block_size)

    @property
    def segment_size(self) -> int | None:
        """Tokens that share a noise level when the bound is measured: a block of two streams, else a document.

        Only a clean context makes blocks independent given their context; one noisy stream is one canvas.
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
    """Keys and values in slots; `hf.fast.kv_cache.SlotCache` is one."""

    def locate(self, rows: Sequence[int] | None, column: Tensor, columns: int, slots: int, device: torch.device) -> Any:
        """Index of the slots and columns that the next pass writes and reads."""

    def keep_slots(self, keep: Tensor) -> None:
        """Keep these slots."""


@dataclass
class GrowingCache:
    """A cache that a pass appends its keys and values to, and the layout of the tokens in it."""

    cache: Any
    layout: Layout
    _last: tuple[Layout, Layout, Layout] | None = None

    def keys(self, layout: Layout) -> Layout:
        """The layout of the keys of a pass over `layout`; the same tensors for the same layouts."""
        if self._last is None or not (self._last[0].is_same(self.layout) and self._last[1].is_same(layout)):
            self._last = self.layout, layout, self.layout.concat(layout)
        return self._last[2]


_ROUND_TO = 64


@dataclass
class SlotCacheState:
    """The state of rows that are being decoded, each in a slot: positions 0 .. lengths[s] - 1 of slot s are cached.

    Column p of a slot holds the token at position p. lengths: (slots,), on the host like the layouts of passes, so that
    positions can be read without waiting. columns: how many a pass reads and writes, for all rows.
    next_logits: (slots, vocab), of the last cached row, kept only where the shift reads them.
    rows: the slot of each row of a pass, None for row i in slot i. column: see `for_branches`. round_to: `set_columns`
    rounds up to its multiples.
    """

    cache: Any
    lengths: Tensor
    columns: int = 0
    next_logits: Tensor | None = None
    rows: Sequence[int] | None = None
    column: Tensor | None = None
    round_to: int = 1

    @classmethod
    def empty(cls, network: Network, slots: int, columns: int) -> SlotCacheState:
        """Empty slots of at most this many columns."""
        round_to = 1 if network.device.type == "cpu" else _ROUND_TO  # a GPU wants aligned masks of few shapes
        return cls(network.new_slots(slots, columns), torch.zeros(slots, dtype=torch.long), round_to=round_to)

    def for_rows(self, rows: Sequence[int] | None) -> SlotCacheState:
        """The state for a pass whose row i is in slot rows[i]; a slot may come more than once."""
        return replace(self, rows=rows)

    def for_branches(self, rows: Sequence[int], column: Tensor) -> SlotCacheState:
        """The state for a pass with several continuations of a slot, each in a row of its own.

        column: (rows, length), where each token is written: the clean ones at their positions, where all rows of the
        slot see them; the noisy ones in columns of their own past all positions, and only their row sees them.
        """
        columns = max(self.columns, int(column.max()) + 1)
        return replace(self, rows=rows, column=column, columns=-(-columns // self.round_to) * self.round_to)

    def set_columns(self, columns: int) -> None:
        """Let passes read and write this many columns, rounded up."""
        self.columns = -(-columns // self.round_to) * self.round_to

    def keys(self, layout: Layout) -> Layout:
        """The layout of the keys of a pass over `layout`, (slots, columns), or (rows, columns) where rows are set."""
        rows = None if self.rows is None else torch.tensor(self.rows)
        if self.column is None or rows is None:
            return slot_keys(layout, rows, self.lengths, self.columns)
        return branch_keys(layout, rows, self.column, self.lengths, self.columns)

    def keep_slots(self, keep: Tensor) -> None:
        """Keep these slots, in this order; keep: their numbers, on the host."""
        self.cache.keep_slots(keep)
        self.lengths = self.lengths[keep]
        if self.next_logits is not None:
            self.next_logits = self.next_logits[to_device(keep, self.next_logits.device)]


def slot_keys(layout: Layout, rows: Tensor | None, lengths: Tensor, columns: int) -> Layout:
    """The layout of the keys of a pass over `layout`, (slots, columns), or (rows, columns) with `rows`.

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
    return kv if rows is None else kv.subset(rows)


def branch_keys(layout: Layout, rows: Tensor, column: Tensor, lengths: Tensor, columns: int) -> Layout:
    """`slot_keys` of a pass with branches: a row sees its noisy tokens, in `column`, and no clean one past its own."""
    clean = layout._replace(document=layout.document.masked_fill(layout.noisy, PADDING))
    keys = slot_keys(clean, rows, lengths, columns)
    last = layout.position.masked_fill(layout.noisy, -1).amax(-1, keepdim=True)
    keys = keys._replace(document=keys.document.masked_fill(keys.position > last, PADDING))
    spare = (0, 1)  # a column for what is not noisy
    index = (torch.arange(len(rows))[:, None], column.where(layout.noisy & layout.real, columns))
    return Layout(*(pad(x, spare).index_put(index, y)[:, :-1] for x, y in zip(keys, layout, strict=True)))


class Network(Protocol):
    """Tokens, their layout and a pattern -> logits; implemented by `hf.HFNetwork` and by toys in tests.

    Logits are on `device`. Inputs may be on the host, where indices are computed without waiting for the device.
    """

    @property
    def device(self) -> torch.device: ...

    def new_cache(self) -> Any:
        """An empty cache that grows by whole passes, for `GrowingCache`."""

    def new_slots(self, slots: int, columns: int) -> Any:
        """An empty cache for a `SlotCacheState` of this many slots and at most this many columns."""

    def __call__(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        *,
        rows: Tensor | None = None,
        past: GrowingCache | SlotCacheState | None = None,
    ) -> Tensor:
        """Logits (len(rows), vocab) of `rows`, flat indices into (batch * length); of all rows without it.

        With `past`, queries also attend to its tokens where the pattern allows, and the keys and values of the pass
        are written to `past.cache`; the caller updates `past.layout` or `past.lengths`.
        """


@runtime_checkable
class SummingNetwork(Network, Protocol):
    """A network that can sum the losses of rows without holding all their logits at once."""

    def weighted_sum(self, passed: Pass, row_loss: RowLoss, weight: Tensor, past: GrowingCache | None = None) -> Tensor:
        """sum_i weight_i * row_loss(logits of row i); differentiable once, with respect to the model alone."""


Later = Callable[[Tensor], Tensor]
"""(flat rows of a pass, on the host) -> their logits, computed when they are asked for."""


LogitsOf = Callable[[Tensor | slice], Tensor]
"""(which of the rows of a pass) -> their logits, without a graph, computed when they are asked for."""


@runtime_checkable
class LazyNetwork(Network, Protocol):
    """A network whose head can run after a pass on some of its rows at a time, so that few logits exist at once."""

    def lazily(self, passed: Pass, past: GrowingCache | None = None) -> LogitsOf:
        """`run_lazily`."""


@runtime_checkable
class DeferringNetwork(Network, Protocol):
    """A network whose head can run on further rows of a pass once it is known which of them are read."""

    def deferred(self, passed: Pass, later: Tensor, past: SlotCacheState) -> tuple[Tensor, Later]:
        """`run_deferred`."""


class Pass(NamedTuple):
    """The arguments of a network."""

    input_ids: Tensor
    layout: Layout
    pattern: Pattern
    rows: Tensor


def run(network: Network, passed: Pass, past: GrowingCache | SlotCacheState | None = None) -> Tensor:
    """The logits of a pass."""
    input_ids, layout, pattern, rows = passed
    return network(input_ids, layout, pattern, rows=rows, past=past)


def run_sum(
    network: Network, passed: Pass, row_loss: RowLoss, weight: Tensor, past: GrowingCache | None = None
) -> Tensor:
    """sum_i weight_i * row_loss(logits of row i) of a pass, without whole logits where the network can do that."""
    if isinstance(network, SummingNetwork):
        return network.weighted_sum(passed, row_loss, weight, past)
    return whole_sum(run(network, passed, past), row_loss, weight)


@torch.no_grad()
def run_rows(
    network: Network, passed: Pass, of_rows: Callable[[Tensor, slice], Tensor], past: GrowingCache | None = None
) -> Tensor:
    """of_rows(logits (n, vocabulary) of some rows, which of them) -> (n, ...), of all rows of a pass, without a graph.

    Without whole logits where `run_sum` needs none.
    """
    found = []

    def kept(logits: Tensor, part: slice) -> Tensor:
        found.append(of_rows(logits, part))
        return torch.zeros(len(logits), device=logits.device)

    run_sum(network, passed, kept, torch.ones(len(passed.rows)), past)
    return torch.cat(found or [of_rows(torch.zeros(0, 1, device=network.device), slice(0, 0))])


@torch.no_grad()
def run_lazily(network: Network, passed: Pass, past: GrowingCache | None = None) -> LogitsOf:
    """A function from some of the rows of a pass to their logits, without a graph; the slow twin has them all."""
    if isinstance(network, LazyNetwork):
        return network.lazily(passed, past)
    return rows_of(run(network, passed, past))


def rows_of(logits: Tensor) -> LogitsOf:
    """Logits that exist already, as a function of their rows."""
    return lambda rows: logits[to_device(rows, logits.device) if isinstance(rows, Tensor) else rows]


def run_deferred(network: Network, passed: Pass, later: Tensor, past: SlotCacheState) -> tuple[Tensor, Later]:
    """The logits of `passed.rows`, and a function from some of the rows `later` to theirs; later: ascending."""
    if isinstance(network, DeferringNetwork):
        return network.deferred(passed, later, past)
    return not_deferred(network, passed, later, past)


def not_deferred(network: Network, passed: Pass, later: Tensor, past: SlotCacheState) -> tuple[Tensor, Later]:
    """`run_deferred` with the logits of all rows at once: the slow twin."""
    first = len(passed.rows)
    logits = run(network, passed._replace(rows=torch.cat([passed.rows, later])), past)
    return logits[:first], lambda rows: logits[to_device(first + torch.searchsorted(later, rows), logits.device)]
