"""A stock causal language model as a `Network`: a 4-D attention mask and explicit position ids, and nothing else."""

from __future__ import annotations

import copy
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
from transformers import (
    DynamicCache,
)

from unmask.core.attention import (
    Layout,
    Pattern,
    block_mask,
    dense,
    intersect,
    same_document,
    window,
)
from unmask.core.head_loss import RowLoss, whole_sum
from unmask.core.network import GrowingCache, Pass, SlotCacheState, run
from unmask.core.transfer import to_device
from unmask.hf.fast.chunked import CHUNK
from unmask.hf.fast.graphs import CompiledPasses
from unmask.hf.fast.head import head_input, head_rows, head_sum
from unmask.hf.fast.kv_cache import SLOTS, CacheIndex, SlotCache, SlotMemory, using_index
from unmask.hf.fast.last_layer import CHUNKED, last_layer_rows
from unmask.hf.fast.recompute import rebuilding
from unmask.hf.layers import layers_of, plain_layers


class UnsupportedModelError(ValueError):
    """The model's attention cannot be controlled from outside; the message says which part and why."""


_LOCKS: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
"""One lock for each model: kept beside the models, which are copied and pickled, as a lock cannot be."""
_LOCKS_LOCK = threading.Lock()


def lock_of(model: torch.nn.Module) -> Any:
    """The reentrant lock under which passes run: a pass leaves hooks, masks and places on the model while it runs."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


def in_turn(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method of a network that only one thread at a time runs on its model."""

    @functools.wraps(method)
    def alone(self: HFNetwork, *given: Any, **options: Any) -> Tensor:
        with self.lock:
            return method(self, *given, **options)

    return alone


@dataclass(frozen=True)
class FastPaths:
    """Which shortcuts a model takes: see `shortcuts`."""

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


class HFNetwork:
    """A stock causal LM as a `core.network.Network`.

    mask_token_id: its logit is -inf in everything this returns; None for an untouched AR model.
    forward: what runs the model, if not the model itself (a DDP or FSDP wrapper around it).
    per_layer_type: hand each layer type its own mask (sliding windows need it; off only to show that).
    gate: entered around every pass with its noisy rows, (batch, length) bool: what adapts those rows alone.
    fast_paths: those that the model takes, by default none; `probes.as_network` finds them out.
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
    ) -> None:
        self.model = model
        self.forward = forward or model
        self.mask_token_id = mask_token_id
        self.per_layer_type = per_layer_type
        self.gate = gate
        self.fast_paths = fast_paths
        self.head = model.get_output_embeddings()
        self.config = model.config.get_text_config()
        self.cache_keyword = cache_keyword(model)
        self.lock = lock_of(model)
        self._masks: deque[tuple[Pattern, Layout, Layout, str, Any]] = deque(maxlen=2)
        self._plan: PassPlan | None = None
        self.compiled: CompiledPasses | None = None

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def context_length(self) -> int | None:
        """Longest document the positions of the model reach, if it says so."""
        return getattr(self.config, "max_position_embeddings", None)

    def new_cache(self) -> DynamicCache:
        # Without the config: caches made for sliding windows drop old keys.
        return DynamicCache()

    def new_slots(self, slots: int, columns: int) -> SlotCache:
        with self.lock:
            return SlotCache() if self.compiled is None else self.compiled.new_slots(slots, columns)

    def compile(self, **options: Any) -> None:
        """Compile decoding passes from now on; options: of torch.compile, see `CompiledPasses`."""
        self.compiled = CompiledPasses(self, **options)

    def __call__(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        *,
        rows: Tensor | None = None,
        past: GrowingCache | SlotCacheState | None = None,
    ) -> Tensor:
        if isinstance(past, SlotCacheState) and self.compiled is not None and self.compiled.takes(past):
            with self.lock:
                logits = self.compiled(input_ids, layout, pattern, rows, past)
        else:
            logits = self._run(input_ids, layout, pattern, rows, past, lambda kept: head_rows(self.head, kept))
        if logits.dtype != torch.float64:
            logits = logits.float()
        if self.mask_token_id is not None and self.mask_token_id < logits.shape[-1]:  # a drafter's has no logit
            logits[..., self.mask_token_id] = -torch.inf
        return logits

    def hidden_states(self, input_ids: Tensor, layout: Layout, pattern: Pattern) -> Tensor:
        """The last hidden states (batch, length, hidden): what the head reads, after the final norm."""
        read: list[Tensor] = []
        self._run(input_ids, layout, pattern, None, None, lambda _: head_input(self.head, read))
        return read[0]

    def weighted_sum(self, passed: Pass, row_loss: RowLoss, weight: Tensor, past: GrowingCache | None = None) -> Tensor:
        """sum_i weight_i * row_loss(logits of row i), without whole logits where the head allows it."""
        if not self.fast_paths.head_sum or type(self.head) is not torch.nn.Linear or hasattr(self.head, "_hf_hook"):
            return whole_sum(run(self, passed, past), row_loss, weight)
        head = functools.partial(
            head_sum, self.head, row_loss=row_loss, weight=weight, mask_token_id=self.mask_token_id
        )
        return self._run(*passed, past, head)

    @in_turn
    def _run(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        rows: Tensor | None,
        past: GrowingCache | SlotCacheState | None,
        head: Callable[[Tensor | slice | None], AbstractContextManager[None]],
    ) -> Tensor:
        """What the head puts out; `head` says what it does with which of the rows that it gets."""
        gate = nullcontext() if self.gate is None else self.gate(layout.noisy)  # which may read it, so not moved yet
        device = self.device
        input_ids, rows = to_device(input_ids, device), None if rows is None else to_device(rows, device)
        if isinstance(past, SlotCacheState):
            plan = self._plan_pass(past, layout, device)
            shortcuts, layout = self._on_slots(past, plan.index, rows), plan.layout.to(device)
            see = functools.partial(self._masks_of, plan, pattern, device)
        else:
            keys = layout if past is None else past.keys(layout)
            shortcuts, layout = self._shortcuts(layout, rows), layout.to(device)
            see = functools.partial(self.attention_argument, pattern, layout, keys.to(device))
        memory = rebuilding() if torch.is_grad_enabled() else nullcontext()
        cached = {} if past is None else {self.cache_keyword: past.cache}
        before = past.cache.get_seq_length() if isinstance(past, GrowingCache) else 0
        with shortcuts as kept, head(kept), gate, memory:
            out: Tensor = self.forward(
                input_ids=input_ids,
                attention_mask=see(),
                position_ids=layout.position,
                use_cache=past is not None,
                **cached,
            ).logits
        if isinstance(past, SlotCacheState):
            written = plan.index.written
        else:
            written = past is None or past.cache.get_seq_length() == before + input_ids.shape[1]
        if not written:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}.forward left its key-value cache as it was (given as "
                f"{self.cache_keyword!r}), so its cached passes would be wrong: this model cannot be decoded"
            )
        return out

    @contextmanager
    def _shortcuts(self, layout: Layout, rows: Tensor | None) -> Iterator[Tensor | slice | None]:
        """Leave out masked-out pairs, and the unread rows of the last layer; yields where the wanted rows are."""
        batch, length = layout.position.shape
        layer = next(reversed(layers_of(self.model)), None)
        # Checkpointed layers run again in the backward pass, when the hooks of this pass are gone.
        again = self.model.training and getattr(layer, "gradient_checkpointing", False)
        fixed = again or getattr(layer, "_compiled_call_impl", None) is not None
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

    def _plan_pass(self, past: SlotCacheState, layout: Layout, device: torch.device) -> PassPlan:
        """The plan of a pass on slots; the last plan again where nothing has moved."""
        memory, known = past.cache.memory, self._plan
        key = past.rows, past.columns, memory.capacity, layout.position.device
        if (
            known is not None
            and known.key == key
            and torch.equal(known.lengths, past.lengths)
            and all(map(torch.equal, layout, known.layout))
        ):
            memory.slots, memory.index = len(past.lengths), known.index
            return known
        column = torch.where(layout.real, layout.position, -1)
        index = past.cache.locate(past.rows, column, past.columns, len(past.lengths), device)
        key = past.rows, past.columns, memory.capacity, layout.position.device  # it may have grown
        self._plan = PassPlan(key, past.lengths.clone(), layout, past.keys(layout), index)
        return self._plan

    def _masks_of(self, plan: PassPlan, pattern: Pattern, device: torch.device) -> Any:
        """The masks of a pass on slots, made once for each plan."""
        key = pattern, self.config._attn_implementation
        if key not in plan.masks:
            q, kv = plan.layout.to(device), plan.keys.to(device)
            plan.masks[key] = self.form(self.patterns(pattern), q, kv)
        return plan.masks[key]

    @contextmanager
    def _on_slots(
        self, past: SlotCacheState, index: CacheIndex, rows: Tensor | None
    ) -> Iterator[Tensor | slice | None]:
        """Attend to the slots of a pass where they lie, where the model takes it; yields where the wanted rows are."""
        memory, index.written = past.cache.memory, False
        with self.slot_attention(memory), using_index(self.config, index), plain_layers(self.model):
            yield rows
        memory.whole = True

    @contextmanager
    def slot_attention(self, memory: SlotMemory) -> Iterator[None]:
        """Attention that knows slots, where the model takes it; else it is handed the keys of each row."""
        direct, before = self.fast_paths.chunked, self.config._attn_implementation
        memory.gathers = not direct
        if direct:
            self.config._attn_implementation = SLOTS
        try:
            yield
        finally:
            self.config._attn_implementation = before

    def attention_argument(self, pattern: Pattern, q: Layout, kv: Layout) -> Any:
        """What this model takes as `attention_mask`: one mask, or one per layer type.

        The last layouts are remembered: those that come again, the same tensors, get the mask made for them.
        """
        implementation = self.config._attn_implementation
        for known, queries, keys, made_for, argument in self._masks:
            if (known, made_for) == (pattern, implementation) and queries.is_same(q) and keys.is_same(kv):
                return argument
        with torch.inference_mode(False):  # a later pass may learn
            argument = self.form(self.patterns(pattern), q, kv)
        self._masks.append((pattern, q, kv, implementation, argument))
        return argument

    def patterns(self, pattern: Pattern) -> Pattern | dict[str, Pattern]:
        """What the layers of this model see where `pattern` is asked for, of each type if they have types."""
        pattern = intersect(pattern, same_document)
        size = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if not size or not self.per_layer_type or (kinds and "sliding_attention" not in kinds):
            return pattern
        # Measured on positions: in [noisy | clean], and behind left padding, indices say nothing of distance.
        near = intersect(pattern, window(size))
        return {"full_attention": pattern, "sliding_attention": near} if kinds else near

    def form(self, patterns: Pattern | dict[str, Pattern], q: Layout, kv: Layout) -> Any:
        """The masks of these patterns, in the form that the model takes."""
        if isinstance(patterns, dict):
            return {kind: self._form(pattern, q, kv) for kind, pattern in patterns.items()}
        return self._form(patterns, q, kv)

    def _form(self, pattern: Pattern, q: Layout, kv: Layout) -> Any:
        implementation = self.config._attn_implementation
        if implementation == "flex_attention":
            return block_mask(pattern, q, kv)
        allowed = dense(pattern, q, kv)[:, None]
        asking = allowed.device.type == "cpu" and not torch.compiler.is_compiling()
        if implementation == SLOTS and asking and bool(allowed.all()):
            return allowed.new_ones(1, 1, 1, 1)
        if implementation in ("sdpa", CHUNKED, SLOTS):
            return allowed
        if implementation == "eager":  # eager adds its mask: a bool one would be added as 0 and 1
            dtype = self.model.dtype
            return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
                ~allowed, torch.finfo(dtype).min
            )
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} takes no 4-D mask: "
            "load the model with attn_implementation='sdpa', 'eager' or 'flex_attention'"
        )


def cache_keyword(model: Any) -> str:
    """How the forward of this model calls its key-value cache: "cache" from transformers 5.24 on, before that
    "past_key_values", which newer models swallow without a word."""
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def replicate(network: HFNetwork) -> HFNetwork:
    """The same network on a copy of the model that shares its weights and buffers, but not its gradients.

    Threads can run forward and backward side by side, each on a copy of its own (hooks are per copy).
    """
    model = network.model
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    twin = copy.copy(network)
    twin.model = twin.forward = copy.deepcopy(model, memo)
    twin._masks, twin._plan, twin.compiled, twin.lock = deque(maxlen=2), None, None, lock_of(twin.model)
    twin.head, twin.config = twin.model.get_output_embeddings(), twin.model.config.get_text_config()
    return twin
