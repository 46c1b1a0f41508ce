"""The cases of `gpu.py`, in the order in which they run: what most depends on comes first. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    # The shapes of SmolLM2-135M, of Llama-3.2-1B, and of a rehearsal.
    "0.1b": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
             "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "vocab_size": 128256, "max_position_embeddings": 8192},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 512},
}  # fmt: skip
"""Llama, with tied embeddings."""

STEP_TOKENS = {"0.1b": 32768, "1b": 32768, "tiny": 512}
"""Tokens of an optimiser step; rows and micro-batches are as long as `adapt` makes them for the size."""

COMPILING = 150.0
"""Seconds that a case may take which compiles."""


@dataclass(frozen=True)
class Case:
    """part: "device", "train", "decode" or "embed"; it says which options count.

    what: the recipe, or the way to decode. attention: None where it is the model's. precision: "bf16", "tf32" or
    "float32". limit: seconds after which the case is stopped.
    """

    part: str
    size: str
    what: str
    precision: str = "bf16"
    attention: str | None = None
    batch: int = 1
    temperature: float = 0.0
    checkpointing: bool = False
    compiled: bool = False
    limit: float = 60.0

    @property
    def name(self) -> str:
        """Unique among the cases."""
        words = [self.part, self.size, self.what]
        if self.part == "decode":
            words += [f"batch-{self.batch}", f"temperature-{self.temperature:g}"]
        words += [self.attention or "", self.precision, "checkpointing" * self.checkpointing]
        return "/".join(filter(None, [*words, "compiled" * self.compiled]))


def _train(size: str, what: str, attention: str = "sdpa", **options: Any) -> Case:
    flex = attention == "flex"
    limit = COMPILING if flex or options.get("compiled") else 60.0
    return Case("train", size, what, attention=attention, limit=limit, **options)


def _decode(size: str, what: str, batch: int, temperature: float = 0.0, **options: Any) -> Case:
    limit = COMPILING if options.get("compiled") else 60.0
    return Case("decode", size, what, batch=batch, temperature=temperature, limit=limit, **options)


_TWO = ("sdpa", "flex")
_RECIPES = ("tri-mode", "efficient-dlm", "drafter")
_CHOSEN = ("blocks-3", "canvas-3", "speculative-one", "speculative-two")


def _learning(size: str) -> list[Case]:
    """How fast the recipes learn."""
    return [_train(size, "ar"), *[_train(size, recipe, attention) for recipe in _RECIPES for attention in _TWO]]


def _decoding(size: str) -> list[Case]:
    return [_decode(size, way, batch) for batch in (1, 8, 64) for way in ("generate", "ar", *_CHOSEN)]


def _changed(size: str) -> list[Case]:
    """What options change."""
    return [
        _train(size, "ar", compiled=True),
        *[_train(size, recipe, "flex", compiled=True) for recipe in ("tri-mode", "efficient-dlm")],
        *[_train(size, recipe, "flex", checkpointing=True) for recipe in ("tri-mode", "efficient-dlm")],
        *[_train(size, "efficient-dlm", attention, precision=precision)
          for precision in ("tf32", "float32") for attention in _TWO],
        _train(size, "diffullama"),
        *[Case("embed", size, what) for what in ("causal", "bidirectional")],
        *[_decode(size, way, 8, 1.0) for way in ("ar", *_CHOSEN)],
        *[_decode(size, way, 8) for way in ("blocks-threshold-0.9", "blocks-threshold-0", "speculative-two-gain-5")],
        *[Case("forward", size, "one block", compiled=compiled, limit=COMPILING if compiled else 60.0)
          for compiled in (False, True)],
        *[_decode(size, way, batch, compiled=True)
          for batch in (1, 8) for way in ("ar", "blocks-3", "speculative-two", "speculative-one")],
    ]  # fmt: skip


def _exact(size: str) -> list[Case]:
    """Whether texts are equal where rounding decides next to nothing."""
    drawn = [_decode(size, way, 8, 1.0, precision="float32") for way in ("speculative-one", "speculative-two")]
    return [_decode(size, way, 8, precision="float32") for way in ("ar", "speculative-one", "speculative-two")] + drawn


def _all(*sizes: str) -> list[Case]:
    return [
        Case("device", "any", "matmul", ""),
        *[case for size in sizes for case in _learning(size)],
        *[case for size in sizes for case in _decoding(size)],
        *_exact(sizes[0]),
        *[case for size in sizes for case in _changed(size)],
    ]


_GPU = _all("0.1b", "1b")
_REHEARSAL = [case for case in _all("tiny") if case.attention != "flex" and not case.compiled]
CASES = list(dict.fromkeys(_GPU + _REHEARSAL))


def listed(device: str) -> list[Case]:
    """The cases of a device; a CPU rehearses on a tiny model what needs no FlexAttention and no compiler."""
    return _GPU if device == "cuda" else _REHEARSAL
