"""Any Hugging Face causal language model as a `Network`, without touching its code.

The whole hook is a 4-D attention mask and explicit position ids handed to the stock model. What a model does
with them is not taken on trust: `probe` runs a tiny instance of the same configuration class and refuses
what cannot be controlled. Also here: the mask token, and what a checkpoint folder holds.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
)
from transformers.utils import logging as hf_logging

from unmask.attention import (
    Layout,
    Pattern,
    block_causal,
    block_mask,
    causal,
    dense,
    intersect,
    same_document,
    two_stream,
    window,
)
from unmask.chunked import CHUNK
from unmask.denoiser import DiffusionConfig, Pass, Past, Prefix, run
from unmask.drafter import Drafter, DrafterConfig
from unmask.readout import RowLoss
from unmask.shortcuts import CHUNKED, head_rows, head_sum, last_layer, last_layer_rows
from unmask.slots import SLOTS, SlotCache, placed

MASK_TOKEN = "<|mask|>"
SDAR_MASK_TOKEN = "<|MASK|>"
"""Qwen3 bases get SDAR's mask token at its id 151669, the one that SGLang and LMDeploy know."""


class UnsupportedModelError(ValueError):
    """The model's attention cannot be controlled from outside; the message says which part and why."""


# --- the hook


class HFNetwork:
    """A stock causal LM as a `denoiser.Network`.

    mask_token_id: its logit is -inf in everything this returns; None for an untouched AR model.
    forward: what runs the model, if not the model itself (a DDP or FSDP wrapper around it).
    per_layer_type: hand each layer type its own mask (sliding windows need it; off only to show that).
    gate: entered around every pass with its noisy rows, (batch, length) bool: what adapts those rows alone.
    """

    def __init__(
        self,
        model: Any,
        mask_token_id: int | None = None,
        *,
        forward: Callable[..., Any] | None = None,
        per_layer_type: bool = True,
        gate: Callable[[Tensor], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.model = model
        self.forward = forward or model
        self.mask_token_id = mask_token_id
        self.per_layer_type = per_layer_type
        self.gate = gate
        self.head = model.get_output_embeddings()
        self.config = model.config.get_text_config()
        self._masks: deque[tuple[Pattern, Layout, str, Any]] = deque(maxlen=2)

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

    def new_slots(self) -> SlotCache:
        return SlotCache()

    def __call__(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        *,
        rows: Tensor | None = None,
        past: Past | Prefix | None = None,
    ) -> Tensor:
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

    def weighted_sum(self, passed: Pass, row_loss: RowLoss, weight: Tensor, past: Past | None = None) -> Tensor:
        """sum_i weight_i * row_loss(logits of row i), without whole logits where the head allows it."""
        if not self.routes.readout or type(self.head) is not torch.nn.Linear or hasattr(self.head, "_hf_hook"):
            return (weight * row_loss(run(self, passed, past), slice(None))).sum()
        head = functools.partial(
            head_sum, self.head, row_loss=row_loss, weight=weight, mask_token_id=self.mask_token_id
        )
        return self._run(*passed, past, head)

    def _run(
        self,
        input_ids: Tensor,
        layout: Layout,
        pattern: Pattern,
        rows: Tensor | None,
        past: Past | Prefix | None,
        head: Callable[[Tensor | slice | None], AbstractContextManager[None]],
    ) -> Tensor:
        """What the head puts out; `head` says what it does with which of the rows that it gets."""
        kv = layout if past is None else past.keys(layout)
        gate = nullcontext() if self.gate is None else self.gate(layout.noisy)
        if isinstance(past, Prefix):
            shortcuts: AbstractContextManager[Tensor | slice | None] = self._on_slots(past, layout, rows)
        else:
            shortcuts = self._shortcuts(layout, rows)
        with shortcuts as kept, head(kept), gate:
            out: Tensor = self.forward(
                input_ids=input_ids,
                attention_mask=self.attention_argument(pattern, layout, kv),
                position_ids=layout.position,
                past_key_values=None if past is None else past.cache,
                use_cache=past is not None,
            ).logits
        return out

    @functools.cached_property
    def routes(self) -> Routes:
        return find_routes(self.model)

    @contextmanager
    def _shortcuts(self, layout: Layout, rows: Tensor | None) -> Iterator[Tensor | slice | None]:
        """Leave out masked-out pairs, and the unread rows of the last layer; yields where the wanted rows are."""
        batch, length = layout.position.shape
        layer = last_layer(self.model)
        # Checkpointed layers run again in the backward pass, when the hooks of this pass are gone.
        again = self.model.training and getattr(layer, "gradient_checkpointing", False)
        if length < 2 * CHUNK or self.device.type != "cpu" or again or not self.routes.chunked:
            yield rows
            return
        before = self.config._attn_implementation
        self.config._attn_implementation = CHUNKED
        try:
            if layer is None or not self.routes.last_rows or rows is None or len(rows) > 0.8 * batch * length:
                yield rows
                return

            def gate(rows: Tensor) -> AbstractContextManager[None]:
                return nullcontext() if self.gate is None else self.gate(layout.noisy.flatten()[rows][None])

            with last_layer_rows(layer, rows, gate):
                yield slice(len(rows))
        finally:
            self.config._attn_implementation = before

    @contextmanager
    def _on_slots(self, past: Prefix, layout: Layout, rows: Tensor | None) -> Iterator[Tensor | None]:
        """Attend to the slots of a pass where they lie, where the model takes it; yields where the wanted rows are."""
        direct, before = self.routes.chunked, self.config._attn_implementation
        place = past.cache.place(past.rows, past.column(layout), past.columns, len(past.lengths), gathers=not direct)
        if direct:
            self.config._attn_implementation = SLOTS
        try:
            with placed(place):
                yield rows
        finally:
            self.config._attn_implementation = before

    def attention_argument(self, pattern: Pattern, q: Layout, kv: Layout) -> Any:
        """What this model takes as `attention_mask`: one mask, or one per layer type.

        The last layouts are remembered: one that comes again, the same tensors, gets the mask made for it.
        """
        if kv is not q:
            return self._new_argument(pattern, q, kv)
        implementation = self.config._attn_implementation
        for known, layout, made_for, argument in self._masks:
            if (known, made_for) == (pattern, implementation) and all(a is b for a, b in zip(layout, q, strict=True)):
                return argument
        argument = self._new_argument(pattern, q, kv)
        self._masks.append((pattern, q, implementation, argument))
        return argument

    def _new_argument(self, pattern: Pattern, q: Layout, kv: Layout) -> Any:
        pattern = intersect(pattern, same_document)
        size = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if not size or not self.per_layer_type or (kinds and "sliding_attention" not in kinds):
            return self._form(pattern, q, kv)
        # Measured on positions: in [noisy | clean], and behind left padding, indices say nothing of distance.
        near = self._form(intersect(pattern, window(size)), q, kv)
        if not kinds:
            return near
        return {"full_attention": self._form(pattern, q, kv), "sliding_attention": near}

    def _form(self, pattern: Pattern, q: Layout, kv: Layout) -> Any:
        implementation = self.config._attn_implementation
        if implementation == "flex_attention":
            return block_mask(pattern, q, kv)
        allowed = dense(pattern, q, kv)[:, None]
        if implementation == SLOTS and allowed.device.type == "cpu" and bool(allowed.all()):
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


@dataclass(frozen=True)
class Routes:
    """Which shortcuts a model takes: see `shortcuts`."""

    chunked: bool = False
    last_rows: bool = False
    readout: bool = False


def find_routes(model: Any) -> Routes:
    """The shortcuts under which a tiny instance of the model's class gives the same logits."""
    config = model.config.get_text_config()
    config_class: Any = type(config)
    routes = _probe_routes(config_class, _tiny_json(config))
    if config._attn_implementation != "sdpa" or getattr(config, "attention_dropout", 0.0):
        return Routes(readout=routes.readout)
    return routes


def sees_position_differences(model: Any) -> bool:
    """Whether moving all positions by the same amount changes nothing (rotary models), tried on a tiny instance."""
    config = model.config.get_text_config()
    config_class: Any = type(config)
    return _probe_positions(config_class, _tiny_json(config))


@contextmanager
def head_input(head: torch.nn.Module, read: list[Tensor]) -> Iterator[None]:
    """Within the context the list takes up what the head `head` is given; the head runs on one row only."""

    def take(_module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        read.append(args[0])
        return (args[0][:1, :1],)

    handle = head.register_forward_pre_hook(take)
    try:
        yield
    finally:
        handle.remove()


def replicate(network: HFNetwork) -> HFNetwork:
    """The same network on a copy of the model that shares its weights and buffers, but not its gradients.

    Threads can run forward and backward side by side, each on a copy of its own (hooks are per copy).
    """
    model = network.model
    memo: dict[int, Any] = {id(p): torch.nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b for b in model.buffers()}
    twin = copy.copy(network)
    twin.model = twin.forward = copy.deepcopy(model, memo)
    twin._masks = deque(maxlen=2)
    twin.head, twin.config = twin.model.get_output_embeddings(), twin.model.config.get_text_config()
    return twin


# --- the probe

_PROBE_WINDOW = 5
_TINY: dict[str, Any] = {
    # width
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "n_inner": 48, "ffn_dim": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "block_ff_dim": 48,
    # heads
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    # experts, vocabulary, context
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "vocab_size": 61, "vocab_size_per_layer_input": 61,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "initializer_range": 0.2,
}  # fmt: skip


def probe(model: Any) -> None:
    """Raise `UnsupportedModelError` unless 4-D masks and position ids control the model's attention.

    Runs on a tiny random float32 instance of the same configuration class, its windows shrunk, once per
    class and kind of layers, so that it costs nothing on a large model.
    """
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", "flex_attention"):
        raise UnsupportedModelError(
            f"{type(model).__name__} runs attention implementation {implementation!r}, which takes no 4-D mask: "
            "load it with attn_implementation='sdpa' or 'eager'"
        )
    config_class: Any = type(config)
    reason = _probe_class(
        config_class,
        _tiny_json(config),
        "sdpa" if implementation == "flex_attention" else implementation,
    )
    if reason:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be converted: {reason}. {_layers(config)}"
            "A supported model attends through 4-D masks in every layer (llama, qwen, mistral, gemma, gpt2 ...)."
        )


@functools.lru_cache(maxsize=64)
def _probe_routes(config_class: Hashable, config: str) -> Routes:
    try:
        network = HFNetwork(_tiny_model(config_class, config, "sdpa"))
    except Exception:  # whatever it is, the model goes without
        return Routes()
    length = 2 * CHUNK
    layout = Layout.of(torch.arange(length).expand(2, length) % 40)
    tokens = torch.arange(2 * length).view(2, length) % 50 + 3
    passed = Pass(tokens, layout, causal, torch.arange(0, 2 * length, 3))
    weight = torch.ones(len(passed.rows))

    def loss(logits: Tensor, _part: slice) -> Tensor:  # curved, so that scaled logits are not a scaled loss
        return logits.logsumexp(-1)

    def same(routes: Routes) -> bool:
        network.routes = routes
        try:
            got = network.weighted_sum(passed, loss, weight) if routes.readout else run(network, passed)
        except Exception:
            return False
        expected = loss(logits, slice(None)).sum() if routes.readout else logits
        return got.shape == expected.shape and bool((got - expected).abs().max() <= 1e-5 * expected.abs().max())

    with torch.inference_mode():
        network.routes = routes = Routes()
        logits = run(network, passed)
        for name in ("chunked", "last_rows", "readout"):
            tried = replace(routes, **{name: True})
            routes = tried if same(tried) else routes
    return routes


@functools.lru_cache(maxsize=64)
def _probe_positions(config_class: Hashable, config: str) -> bool:
    network = HFNetwork(_tiny_model(config_class, config, "sdpa"))
    tokens, position = torch.arange(20)[None] + 3, torch.arange(20)[None]
    with torch.inference_mode():
        logits = network(tokens, Layout.of(position), causal)
        gap = (network(tokens, Layout.of(position + 7), causal) - logits).abs().max()
    return bool(gap <= 1e-4 * logits.abs().max())


def _tiny_model(config_class: Any, config: str, implementation: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            config_class(**json.loads(config)), attn_implementation=implementation, dtype=torch.float32
        ).eval()


@functools.lru_cache(maxsize=64)
def _probe_class(config_class: Hashable, config: str, implementation: str) -> str | None:
    """Why the class is refused, or None."""
    try:
        tiny = _tiny_model(config_class, config, implementation)
    except Exception as error:
        return f"no tiny instance of {config_class} could be built to test it ({_first_line(error)})"
    try:
        with torch.inference_mode():
            return probe_network(HFNetwork(tiny))
    except Exception as error:
        return f"it does not take 4-D attention masks with position ids ({_first_line(error)})"


def probe_network(network: HFNetwork) -> str | None:
    """The checks themselves on a float32 model; a reason to refuse it, or None.

    1. identity: the causal pattern gives the stock logits, on more tokens than any window is wide.
    2. influence: with two streams, changing a token changes just the rows that the pattern lets see it.
    3. positions: a noisy block beside the clean stream equals the same block run after its clean prefix.
    """
    vocabulary, block, length = network.config.vocab_size, 4, 3 * _PROBE_WINDOW + 3
    tokens = torch.arange(3, 3 + 2 * length)[None] * 7 % (vocabulary - 4) + 2
    clean = Layout.of(torch.arange(length)[None])

    stock = network.model(input_ids=tokens[:, :length], use_cache=False).logits
    tolerance = 1e-5 * float(stock.abs().max())
    gap = float((network(tokens[:, :length], clean, causal) - stock).abs().max())
    if not gap <= tolerance:
        return f"a causal mask changes its logits by {gap:.1e}, so the mask replaces more than it should"

    both = Layout.of(clean.position, noisy=True).then(clean)
    pattern = two_stream(block)
    base = network(tokens, both, pattern)
    changed = tokens.repeat(2 * length, 1)
    changed.diagonal().copy_(changed.diagonal() % (vocabulary - 4) + 3)
    many = Layout(*(field.expand(2 * length, -1) for field in both))
    effect = (network(changed, many, pattern) - base).abs().amax(-1).T  # (row, changed token)

    sees = dense(pattern, both, both)[0]
    reach = sees
    for _ in range(network.config.num_hidden_layers):
        reach = (reach.float() @ sees.float()) > 0
    leak = effect.masked_fill(reach, 0)
    if float(leak.max()) > tolerance:
        row, token = divmod(int(leak.argmax()), 2 * length)
        return (
            f"row {row} of a two-stream pass changes by {float(leak.max()):.1e} with token {token}, "
            "which the mask hides from it, so some layer moves information past the mask"
        )
    size = getattr(network.config, "sliding_window", None) or length
    near = sees & dense(window(size), both, both)[0]
    if not bool((effect[near] > 0).all()):
        return "tokens that the mask shows have no effect, so some layer stays causal whatever the mask says"

    start = length // block * block  # the last, short block
    rows = torch.cat([tokens[:, length : length + start], tokens[:, start:length]], dim=1)
    alone = network(rows, clean, block_causal(block))[:, start:]
    gap = float((alone - base[:, start:length]).abs().max())
    if not gap <= tolerance:
        return f"repeated position ids move its logits by {gap:.1e}, so positions come from somewhere else"
    return None


def _tiny_json(config: Any) -> str:
    """The settings, as JSON, of a tiny model with one layer of each kind (at least two layers)."""
    tiny = {k: v for k, v in copy.deepcopy(config.to_dict()).items() if v is not None}
    for name in ("model_type", "transformers_version", "architectures", "quantization_config", "dtype", "diffusion",
                 "_name_or_path", "id2label", "label2id", "auto_map", "name_or_path"):  # fmt: skip
        tiny.pop(name, None)
    tiny.update({name: value for name, value in _TINY.items() if name in tiny})
    kinds = list(dict.fromkeys(tiny.get("layer_types", ())))
    layers = max(2, len(kinds))
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        if name in tiny:
            tiny[name] = layers
    if kinds:
        tiny["layer_types"] = (kinds * layers)[:layers]
    if tiny.get("sliding_window"):
        tiny["sliding_window"] = _PROBE_WINDOW
    if "attention_types" in tiny:  # gpt_neo spells its layer kinds its own way
        tiny["attention_types"] = [[["global", "local"], 1]]
        tiny["attention_layers"] = ["global", "local"]
        tiny["window_size"] = _PROBE_WINDOW
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        tiny[name] = 0
    for name in ("no_rope_layers", "mlp_layer_types", "expert_layer_period", "full_attn_idxs"):
        if isinstance(tiny.get(name), list):
            tiny[name] = tiny[name][:layers]
    rope = tiny.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:
        # Scaled rotary embeddings carry tables of the full head size; where tokens stand is the same without.
        kept = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor") if k in rope}
        tiny["rope_parameters"] = kept | {"rope_type": "default"}
    tiny.pop("rope_scaling", None)
    return json.dumps(tiny, default=str, sort_keys=True)


def _layers(config: Any) -> str:
    known = {
        "conv": "a convolution, which reads its neighbours whatever the mask says",
        "linear_attention": "linear attention, which carries a state past every mask",
        "mamba": "a recurrent state, which no mask reaches",
        "chunked_attention": "attention in fixed chunks, which a 4-D mask overrides",
        "local": "attention through a causal buffer of its own",
    }
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ())
    odd = [f"layer type {k!r} is {known.get(k, 'not one this library knows')}" for k in kinds
           if k not in ("full_attention", "sliding_attention", "global")]  # fmt: skip
    if config.model_type in ("mamba", "mamba2", "falcon_mamba"):
        odd.append(f"layer type 'mamba' is {known['mamba']}")
    if config.model_type in ("bloom", "mpt"):
        odd.append("layer type 'alibi' attention takes distances from indices, not from position ids")
    return "".join(f"Its {text}. " for text in odd)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


# --- the mask token


def add_mask_token(model: Any, tokenizer: Any, *, token: str | None = None, like: str | None = None) -> int:
    """Give the model a mask token and return its id; embeddings grow only when no row is free.

    token: its text; one that the vocabulary already has is reused with its embedding (unless `like` is
    given). like: initialise the row as this token's instead of the mean of all rows.
    """
    vocabulary = tokenizer.get_vocab()
    if like is not None and like not in vocabulary:
        raise ValueError(f"mask_init {like!r} is no token of this vocabulary: give an existing token or leave it out")
    if token is None:
        sdar = model.config.get_text_config().model_type in ("qwen3", "qwen3_moe")
        token = tokenizer.mask_token or (SDAR_MASK_TOKEN if sdar else MASK_TOKEN)
    reused = token in vocabulary
    tokenizer.add_special_tokens({"mask_token": token})
    mask_token_id: int = tokenizer.mask_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    if mask_token_id >= rows:
        with _quiet():
            model.resize_token_embeddings(mask_token_id + 1, mean_resizing=False)
    if not reused or like is not None:
        used = len(vocabulary)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                weight = embedding.weight
                row = weight[vocabulary[like]] if like is not None else weight[:used].float().mean(0)
                weight[mask_token_id] = row.to(weight.dtype)
                if getattr(embedding, "bias", None) is not None:
                    bias = embedding.bias
                    bias[mask_token_id] = bias[vocabulary[like]] if like is not None else bias[:used].mean()
    return mask_token_id


@contextmanager
def _quiet() -> Iterator[None]:
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


# --- folders


def load_pretrained(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
) -> tuple[Any, Any]:
    """Model (in eval mode) and tokenizer of a folder or hub id."""
    path = Path(name)
    if not path.exists() and (str(name).startswith((".", "/", "~")) or str(name).count("/") > 1):
        raise ValueError(f"model folder {str(name)!r} does not exist: give an existing folder or a hub id")
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"model folder {str(name)!r} holds no config.json: give the folder of an HF checkpoint")
    options = {
        "attn_implementation": attn_implementation,
        "device_map": device_map,
        "quantization_config": quantization_config,
        "dtype": dtype,
    }
    try:
        config = AutoConfig.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, config=config, **{k: v for k, v in options.items() if v is not None}
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model {str(name)!r} cannot be loaded: {_first_line(error)}") from error
    if device_map is None and quantization_config is None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
    return model.eval(), tokenizer


def without_dropout(model: Any) -> None:
    """Set every dropout rate to 0, so that a training step is a function of its data and noise."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def end_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """`generation_config.eos_token_id`, else the tokenizer's end token, else none."""
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    ids = generation.eos_token_id if generation is not None else None
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)


def read_diffusion(model: Any) -> DiffusionConfig | None:
    """The `diffusion` object of the model's config; None for an untouched AR model."""
    raw = getattr(model.config, "diffusion", None)
    if raw is None:
        return None
    known = {f.name for f in fields(DiffusionConfig)}
    missing = {f.name for f in fields(DiffusionConfig) if f.default is MISSING} - set(raw)
    if missing:
        raise ValueError(f"config.json's diffusion object lacks {sorted(missing)}: it was written by something else")
    return DiffusionConfig(**{k: v for k, v in raw.items() if k in known})


def write_diffusion(model: Any, diffusion: DiffusionConfig | None) -> None:
    """Put the `diffusion` object into the model's config."""
    if diffusion is not None:
        model.config.diffusion = asdict(diffusion)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or hub id."""
    return AutoTokenizer.from_pretrained(name)


def save_pretrained(folder: str | Path, model: Any, tokenizer: Any, diffusion: DiffusionConfig | None) -> None:
    """Write an ordinary HF folder; a converted one has `diffusion` in its config.json."""
    write_diffusion(model, diffusion)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- drafter folders: adapters and a mask row beside a base that stays where it is

DRAFTER_WEIGHTS = "drafter.safetensors"


@dataclass(frozen=True)
class Base:
    """The frozen model that a drafter belongs to: path or hub id, and the hash of its weights."""

    name: str
    fingerprint: str


def fingerprint(model: Any) -> str:
    """Hash of a model's parameter names, shapes and a few values of each, whatever precision it is loaded in."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to(torch.bfloat16).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def add_drafter(model: Any, tokenizer: Any, config: DrafterConfig, *, token: str | None = None) -> Drafter:
    """Hook a new drafter on `model`; the mask token is the tokenizer's alone, the base gets no row for it."""
    tokenizer.add_special_tokens({"mask_token": token or tokenizer.mask_token or MASK_TOKEN})
    return Drafter(model, tokenizer.mask_token_id, config).to(model.device)


def save_drafter(folder: str | Path, drafter: Drafter, tokenizer: Any, diffusion: DiffusionConfig, base: Base) -> None:
    """Write a folder that `load_drafter` reads and that stock transformers refuses: there is no model in it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in drafter.state_dict().items()}
    save_file(weights, folder / DRAFTER_WEIGHTS, metadata={"format": "pt"})
    described = asdict(diffusion) | {"base": asdict(base), "lora": asdict(drafter.config)}
    (folder / "config.json").write_text(json.dumps({"model_type": "unmask-drafter", "diffusion": described}, indent=2))
    tokenizer.save_pretrained(folder)


def read_base(name: str | Path) -> Base | None:
    """The base that a drafter folder names; None for any other folder or hub id."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return None
    base = (json.loads(path.read_text()).get("diffusion") or {}).get("base")
    return None if base is None else Base(**base)


def load_drafter(name: str | Path, base: Base, **options: Any) -> tuple[Any, Any, DiffusionConfig, Drafter]:
    """Base with its drafter hooked on, tokenizer and config of a drafter folder; `options` load the base."""
    folder = Path(name)
    described = json.loads((folder / "config.json").read_text())["diffusion"]
    try:
        model, _ = load_pretrained(base.name, **options)
    except ValueError as error:
        raise ValueError(
            f"drafter {str(name)!r} needs its base {base.name!r}, which does not load: set diffusion.base.name in its "
            f"config.json to where the base is ({error})"
        ) from error
    found = fingerprint(model)
    if found != base.fingerprint:
        raise ValueError(
            f"drafter {str(name)!r} was trained on another model than {base.name!r}: its base has fingerprint "
            f"{base.fingerprint}, this one {found}; give the original base"
        )
    with _quiet():  # it would warn that the folder's model type is unknown, which is meant
        tokenizer = AutoTokenizer.from_pretrained(folder)
    drafter = add_drafter(model, tokenizer, DrafterConfig(**described["lora"]))
    drafter.load_state_dict(load_file(folder / DRAFTER_WEIGHTS))
    known = {f.name for f in fields(DiffusionConfig)}
    return model, tokenizer, DiffusionConfig(**{k: v for k, v in described.items() if k in known}), drafter.eval()
