"""A stock causal language model as a `Network`, controlled by a 4-D attention mask and position ids alone."""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import DynamicCache, cache_utils

from unmask.core.attention import Layout, Pattern, causal, intersect, same_document
from unmask.core.head_loss import RowLoss, whole_sum
from unmask.core.network import GrowingCache, Later, LogitsOf, Pass, SlotCacheState, not_deferred, rows_of, run
from unmask.core.transfer import to_device
from unmask.hf.fast.again import Contexts, layers_again
from unmask.hf.fast.chunked import CHUNK
from unmask.hf.fast.graphs import CompiledPasses
from unmask.hf.fast.head import gather, head_input, head_rows, head_sum, is_linear
from unmask.hf.fast.kv_cache import CacheIndex, SlotCache, SlotMemory, using_slots
from unmask.hf.fast.last_layer import CHUNKED, last_layer_rows
from unmask.hf.fast.packed import PackedMaps, packed_maps
from unmask.hf.fast.recompute import recomputing
from unmask.hf.layers import layers_of, plain_layers, runs_again
from unmask.hf.long_rope import (
    LongSlots,
    first_long_position,
    in_long_documents,
    rotating,
    run_on_long_slots,
)
from unmask.hf.masks import UnsupportedModelError, local_attention, make_mask
from unmask.hf.temperature import layers_with_temperature, scaling_queries

_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
"""One lock for each model, beside the models: these are copied and pickled, which a lock cannot be."""
_LOCKS_LOCK = threading.Lock()


def lock_of(model: torch.nn.Module) -> Any:
    """The reentrant lock under which passes run: a pass puts hooks and attributes on the model until it ends."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


@dataclass(frozen=True)
class FastPaths:
    """Which fast paths a model takes.

    chunked: `fast.last_layer`'s attention in tiles, and `fast.kv_cache`'s attention to slots. last_rows: the last layer
    on the rows that are read. head_sum: losses at the head.
    """

    chunked: bool = False
    last_rows: bool = False
    head_sum: bool = False


@dataclass
class PassPlan:
    """A pass on slots: its key, and what is computed once for all passes of the same key, lengths and layout."""

    key: Any
    lengths: Tensor
    layout: Layout
    keys: Layout
    index: CacheIndex
    masks: dict[tuple[Pattern, str], Any] = field(default_factory=dict)


Head = Callable[[Tensor | slice | None], AbstractContextManager[None]]
"""(flat rows that are read, None for all) -> a context in which the model's head works on these rows."""


class HFNetwork:
    """A stock causal LM as a `core.network.Network`.

    mask_token_id: its logit is -inf in everything this returns; None for an untouched AR model.
    forward: what runs the model, if not the model itself (a DDP or FSDP wrapper around it).
    per_layer_type: give each layer type its own mask, which windows need; off where no layer reads their setting.
    gate: entered around every pass with its noisy rows, (batch, length) bool: what adapts those rows alone.
    fast_paths: those that the model takes, by default none. no_cache: why its passes cannot stand on cached ones, None
    if they can. `probes.as_network` finds both out.
    """

    def __init__(
        self,
        model: Any,
        mask_token_id: int | None = None,
        *,
        forward: Callable[..., Any] | None = None,
        per_layer_type: bool = True,
        gate: Callable[[Tensor], AbstractContextManager[None]] | None = None,
        fast_paths: FastPaths = FastPaths(),
        no_cache: str | None = None,
    ) -> None:
        self.model = model
        self.forward = forward or model
        self.mask_token_id = mask_token_id
        self.per_layer_type = per_layer_type
        self.gate = gate
        self.fast_paths, self.no_cache = fast_paths, no_cache
        self.head = model.get_output_embeddings()
        self.config = model.config.get_text_config()
        self.with_temperature = layers_with_temperature(model)
        self.cache_keyword = cache_keyword(model)
        self.lock = lock_of(model)
        self._recent_masks: deque[tuple[Pattern, Layout, Layout, str, Any]] = deque(maxlen=2)
        self._plan: PassPlan | None = None
        self.compiled: CompiledPasses | None = None
        self.packed: PackedMaps | None = None
        self.first_long_position = first_long_position(model)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def context_length(self) -> int | None:
        """Longest document the positions of the model reach, if it says so."""
        return getattr(self.config, "max_position_embeddings", None)

    def _check_cache(self) -> None:
        if self.no_cache is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be decoded, nor trained or scored on a cache of its clean text: "
                f"{self.no_cache}. Whole passes can be trained and scored"
            )

    def new_cache(self) -> DynamicCache:
        self._check_cache()
        # Without the config: caches made for sliding windows drop old keys.
        cache, kept = DynamicCache(), "layer_class_to_replicate"
        setattr(cache, kept, getattr(cache_utils, "DynamicIndexedLayer", getattr(cache, kept)))  # sparse attention's
        return cache

    def new_slots(self, slots: int, columns: int) -> SlotCache:
        self._check_cache()
        if self.first_long_position is not None:
            return LongSlots()
        with self.lock:
            return SlotCache() if self.compiled is None else self.compiled.new_slots(slots, columns)

    def compile(self, **options: Any) -> None:
        """Compile later decoding passes, unless hooks change with each (`long_rope`, `temperature`).

        options: of torch.compile, see `CompiledPasses`.
        """
        if self.first_long_position is None and not self.with_temperature:
            self.compiled = CompiledPasses(self, **options)

    def pack(self) -> int:
        """Pack the linear maps for later passes, see `fast.packed`; returns the bytes of the copies, 0 for none."""
        ids = torch.zeros(1, 2, dtype=torch.long)
        self.packed = None
        self.packed = packed_maps(self.model, lambda: self(ids, Layout.of(torch.arange(2)[None]), causal))
        return 0 if self.packed is None else self.packed.num_bytes

    def __call__(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        *,
        rows: Tensor | None = None,
        past: GrowingCache | SlotCacheState | None = None,
    ) -> Tensor:
        with self.lock:
            if isinstance(past, SlotCacheState) and self.compiled is not None and self.compiled.takes(past):
                logits = self.compiled(input_ids, layout, pattern, rows, past)
            else:
                logits = self._run(input_ids, layout, pattern, rows, past, lambda kept: head_rows(self.head, kept))
        return self._finished(logits)

    def _finished(self, logits: Tensor) -> Tensor:
        """Logits as this network returns them: at least float32, and none for the mask."""
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self.mask_token_id is not None and self.mask_token_id < logits.shape[-1]:  # a drafter's has no logit
            logits[..., self.mask_token_id] = -torch.inf
        return logits

    def deferred(self, passed: Pass, later: Tensor, past: SlotCacheState) -> tuple[Tensor, Later]:
        """The logits of `passed.rows`, and a function from other flat rows of the same pass to theirs."""
        compiled = self.compiled is not None and self.compiled.takes(past)
        if not self._head_runs_alone or compiled or self.first_long_position is not None:
            return not_deferred(self, passed, later, past)
        read: list[Tensor] = []
        with self.lock:
            logits = self._run(*passed, past, lambda kept: head_rows(self.head, kept, read))

        def logits_of(rows: Tensor) -> Tensor:
            with self.lock, nullcontext() if self.packed is None else self.packed.used(len(rows)):
                return self._finished(self.head(read[0][to_device(rows, self.device)]))

        return self._finished(logits), logits_of

    @torch.no_grad()
    def lazily(self, passed: Pass, past: GrowingCache | None = None) -> LogitsOf:
        """A function from some of the rows of a pass to their logits, see `core.network.run_lazily`.

        A sharded head (FSDP2) keeps its matrix gathered until the model's next pass, in which the function still works.
        """
        if not self.plain_head:
            return rows_of(run(self, passed, past))
        read: list[Tensor] = []
        with self.lock:
            self._run(*passed, past, lambda kept: head_input(self.head, read, kept))
            gather(self.model, self.head)

        @torch.no_grad()
        def logits_of(rows: Tensor | slice) -> Tensor:
            # Not by the head itself, on which another thread may have put a hook.
            hidden = read[0][to_device(rows, self.device) if isinstance(rows, Tensor) else rows]
            return self._finished(linear(hidden, self.head.weight, self.head.bias))

        return logits_of

    @property
    def _head_runs_alone(self) -> bool:
        """Whether the head can run after its pass; a sharded one (FSDP2) has its matrix during a pass alone."""
        return self.plain_head and type(self.head) is torch.nn.Linear

    @property
    def plain_head(self) -> bool:
        """Whether logits are the head's output as it is, so that the head can run apart from the model."""
        return self.fast_paths.head_sum and is_linear(self.head)

    def hidden_states(self, input_ids: Tensor, layout: Layout, pattern: Pattern) -> Tensor:
        """The last hidden states (batch, length, hidden): what the head reads, after the final norm."""
        read: list[Tensor] = []
        with self.lock:
            self._run(input_ids, layout, pattern, None, None, lambda _: head_input(self.head, read))
        return read[0]

    def weighted_sum(self, passed: Pass, row_loss: RowLoss, weight: Tensor, past: GrowingCache | None = None) -> Tensor:
        """sum_i weight_i * row_loss(logits of row i), without whole logits where the head allows it."""
        if not self.plain_head:
            return whole_sum(run(self, passed, past), row_loss, weight)
        head = functools.partial(
            head_sum, self.head, row_loss=row_loss, weight=weight, mask_token_id=self.mask_token_id
        )
        with self.lock:
            return self._run(*passed, past, head)

    # --- one pass: see "One forward" in docs/architecture.md

    def _run(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        rows: Tensor | None,
        past: GrowingCache | SlotCacheState | None,
        head: Head,
    ) -> Tensor:
        """The output of the head in a pass; the caller holds the lock."""
        memory = recomputing() if torch.is_grad_enabled() else nullcontext()
        packed = nullcontext() if self.packed is None else self.packed.used(input_ids.numel())
        device = self.device
        input_ids, rows = to_device(input_ids, device), None if rows is None else to_device(rows, device)
        with memory, packed:
            if not isinstance(past, SlotCacheState):
                return self._run_whole(input_ids, layout, pattern, rows, past, head)
            if self.first_long_position is None:
                return self._run_on_slots(input_ids, layout, rows, past, None, pattern=pattern, head=head)
            run = functools.partial(self._run_on_slots, pattern=pattern, head=head)
            return run_on_long_slots(run, self.first_long_position, input_ids, layout, pattern, rows, past)

    @contextmanager
    def _prepared(self, layout: Layout, is_long: Tensor | None) -> Iterator[None]:
        """The contexts of every pass: a drafter's gate, and the rotary factors of each token's text."""
        gate = nullcontext() if self.gate is None else self.gate(layout.noisy)  # on the host, where it may be read
        with gate:
            if is_long is None or self.first_long_position is None:
                yield
                return
            with rotating(self.model, layout.position, is_long, self.first_long_position):
                yield

    def _run_whole(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        rows: Tensor | None,
        past: GrowingCache | None,
        head: Head,
    ) -> Tensor:
        """A pass over whole sequences, or on a cache that grows by them."""
        keys, cache = (layout, None) if past is None else (past.keys(layout), past.cache)
        q, kv = layout.to(input_ids.device), keys.to(input_ids.device)
        before, first = 0 if cache is None else cache.get_seq_length(), self.first_long_position
        is_long = None if first is None else in_long_documents(keys, first)[:, -input_ids.shape[1] :]
        with self._prepared(layout, is_long), self._unread_left_out(layout, rows) as kept, head(kept):
            masks, again = self.masks(pattern, q, kv), functools.partial(self._prepared, layout, is_long)
            out = self._forward(input_ids, q.position, masks, cache, again)
        self._check_written(cache is None or cache.get_seq_length() == before + input_ids.shape[1])
        return out

    def _run_on_slots(
        self,
        input_ids: Tensor,
        layout: Layout,
        rows: Tensor | None,
        past: SlotCacheState,
        is_long: Tensor | None,
        *,
        pattern: Pattern,
        head: Head,
    ) -> Tensor:
        """A pass over rows that continue slots of a cache."""
        device, memory = input_ids.device, past.cache.memory
        plan = self._plan_pass(past, layout, device)
        if isinstance(past.cache, LongSlots):
            past.cache.note(input_ids)
        position, plan.index.written = plan.layout.to(device).position, False
        with self._prepared(layout, is_long), self.attending_to_slots(memory), head(rows):
            out = self._forward(input_ids, position, self._masks_of(plan, pattern, device), past.cache)
        memory.whole = True
        self._check_written(plan.index.written)
        return out

    def _forward(self, input_ids: Tensor, position: Tensor, masks: Any, cache: Any, *contexts: Contexts) -> Tensor:
        """A stock forward; contexts: of a pass whose layers may run again in the backward pass."""
        cached = {} if cache is None else {self.cache_keyword: cache}
        end = input_ids.shape[1] + (0 if cache is None else cache.get_seq_length())
        scaled = functools.partial(scaling_queries, self.with_temperature, position, end)
        with scaled(), layers_again(self.model, cache, *contexts, scaled) if contexts else nullcontext():
            out: Tensor = self.forward(
                input_ids=input_ids, attention_mask=masks, position_ids=position, use_cache=cache is not None, **cached
            ).logits
        return out

    def _check_written(self, written: bool) -> None:
        if not written:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}.forward left its key-value cache as it was (passed as "
                f"{self.cache_keyword!r}), so its cached passes would be wrong: this model cannot be decoded"
            )

    @contextmanager
    def _unread_left_out(self, layout: Layout, rows: Tensor | None) -> Iterator[Tensor | slice | None]:
        """Skip hidden pairs, and unread rows of the last layer, where that pays; yields where the wanted rows are."""
        batch, length = layout.position.shape
        layer = next(reversed(layers_of(self.model)), None)
        # Checkpointed layers run again in the backward pass, when the hooks of this pass are gone.
        again = self.model.training and getattr(layer, "gradient_checkpointing", False)
        fixed = again or runs_again(self.model) or getattr(layer, "_compiled_call_impl", None) is not None
        if length < 2 * CHUNK or self.device.type != "cpu" or fixed or not self.fast_paths.chunked:
            yield rows
            return
        before = self.config._attn_implementation
        self.config._attn_implementation = CHUNKED
        try:
            if layer is None or not self.fast_paths.last_rows or rows is None or len(rows) > 0.8 * batch * length:
                yield rows
                return

            def gate(rows: Tensor) -> AbstractContextManager[None]:
                return nullcontext() if self.gate is None else self.gate(layout.noisy.flatten()[rows][None])

            with last_layer_rows(layer, rows, gate):
                yield slice(len(rows))
        finally:
            self.config._attn_implementation = before

    @contextmanager
    def attending_to_slots(self, memory: SlotMemory) -> Iterator[None]:
        """Within the context layers run uncompiled, and attend to the slots of `memory` where the model allows that."""
        with using_slots(self.config, memory, direct=self.fast_paths.chunked), plain_layers(self.model):
            yield

    # --- masks

    def _plan_pass(self, past: SlotCacheState, layout: Layout, device: torch.device) -> PassPlan:
        """The plan of a pass on slots; the last plan again for equal slots, lengths and layout."""
        memory, known = past.cache.memory, self._plan
        key = past.rows, past.columns, memory.capacity, layout.position.device
        if (
            known is not None
            and known.key == key
            and past.column is None
            and torch.equal(known.lengths, past.lengths)
            and all(map(torch.equal, layout, known.layout))
        ):
            memory.slots, memory.index = len(past.lengths), known.index
            return known
        column = torch.where(layout.real, layout.position if past.column is None else past.column, -1)
        index = past.cache.locate(past.rows, column, past.columns, len(past.lengths), device)
        key = past.rows, past.columns, memory.capacity, layout.position.device  # the capacity may have grown
        plan = PassPlan(key, past.lengths.clone(), layout, past.keys(layout), index)
        self._plan = plan if past.column is None else None
        return plan

    def _masks_of(self, plan: PassPlan, pattern: Pattern, device: torch.device) -> Any:
        """The masks of a pass on slots, made once for each plan, pattern and attention implementation."""
        key = pattern, self.config._attn_implementation
        if key not in plan.masks:
            q, kv = plan.layout.to(device), plan.keys.to(device)
            plan.masks[key] = self.make_masks(self.layer_patterns(pattern), q, kv)
        return plan.masks[key]

    def masks(self, pattern: Pattern, q: Layout, kv: Layout) -> Any:
        """The model's `attention_mask`: one mask, or one for each layer type.

        Those of the last two calls are kept, for the same pattern and the same tensors of both layouts.
        """
        implementation = self.config._attn_implementation
        for known, queries, keys, made_for, masks in self._recent_masks:
            if (known, made_for) == (pattern, implementation) and queries.is_same(q) and keys.is_same(kv):
                return masks
        with torch.inference_mode(False):  # a later pass may learn
            masks = self.make_masks(self.layer_patterns(pattern), q, kv)
        self._recent_masks.append((pattern, q, kv, implementation, masks))
        return masks

    def layer_patterns(self, pattern: Pattern) -> Pattern | dict[str, Pattern]:
        """The pattern of the model's layers in a pass with `pattern`, one for each layer type if it has types."""
        pattern = intersect(pattern, same_document)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        # Measured on positions: in [noisy | clean], and after left padding, indices say nothing about distance.
        near = {kind: intersect(pattern, limit) for kind, limit in local_attention(self.config).items()}
        if not self.per_layer_type or (kinds and not kinds & set(near)):
            return pattern
        if not kinds:
            return near.get("sliding_attention", pattern)
        return {kind: near.get(kind, pattern) for kind in kinds | {"full_attention"}}

    def make_masks(self, patterns: Pattern | dict[str, Pattern], q: Layout, kv: Layout) -> Any:
        """The masks of these patterns, in the form that the attention implementation takes."""
        implementation, dtype = self.config._attn_implementation, self.model.dtype
        if isinstance(patterns, dict):
            return {kind: make_mask(implementation, dtype, pattern, q, kv) for kind, pattern in patterns.items()}
        return make_mask(implementation, dtype, patterns, q, kv)


def cache_keyword(model: Any) -> str:
    """The keyword of the key-value cache in the model's forward: "cache" from transformers 5.24 on, before that
    "past_key_values", which newer models accept and ignore."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"
