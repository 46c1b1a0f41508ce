"""What the parts of `gpu.py` share: clocks, waits, memory, rates, models of a size, needed arithmetic."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_cases import SIZES
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from unmask.core.attention import Layout

NOMINAL = {"GB200": 2500, "B200": 2250, "H200": 989, "H100": 989, "GH200": 989, "A100": 312, "L40S": 362, "L4": 121,
           "RTX 4090": 165, "RTX 3090": 71}  # fmt: skip
"""bf16 TFLOP/s of tensor cores, dense, by the makers' data sheets; float32 sums."""


class Clock:
    """The seconds of a case: `rounds` go on while some are left."""

    def __init__(self, seconds: float) -> None:
        self.until = time.perf_counter() + seconds

    def rounds(self, most: int) -> Iterator[int]:
        """0, 1, ...: at least one, at most `most`, none after the time is over."""
        for number in range(most):
            if number and time.perf_counter() > self.until:
                return
            yield number


def synchronize() -> None:
    """Wait for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    """Wall clock of `work`, a GPU's work included."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def waits(work: Callable[[], Any], device: str) -> int | None:
    """How often `work` makes the host wait for a GPU, by torch's own count; None on a CPU."""
    if device != "cuda":
        work()
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing" in str(warning.message) for warning in seen)


def forget_peak() -> None:
    """Measure peak memory from here on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float | None:
    """GiB at most since `forget_peak`, weights included; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Within the context float32 products are computed in TF32, for "tf32" alone."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def matmul_rate(device: str, kind: str) -> float:
    """Floating-point operations a second of one large square matrix product in a precision, the best of a few."""
    size = 8192 if device == "cuda" else 512
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    with precision(kind):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return 2.0 * size**3 / min(seconds(lambda: a @ b) for _ in range(6))


def matmul_rates(device: str) -> dict[str, Any]:
    """The row of the case "device": TFLOP/s by precision, and the data sheet's for bf16 where it is known."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    rates = {kind: matmul_rate(device, kind) / 1e12 for kind in ("bf16", "tf32", "float32")}
    return rates | {"nominal_bf16": nominal(name)}


def nominal(device_name: str) -> float | None:
    """TFLOP/s of bf16 by the data sheet; None for a device that `NOMINAL` lacks."""
    return next((float(rate) for name, rate in NOMINAL.items() if name in device_name), None)


def shares(flops: float, device: str, kind: str) -> dict[str, float | None]:
    """Operations a second as shares of the measured matrix product's rate and, for bf16, of the data sheet's (MFU)."""
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    known = nominal(name) if kind == "bf16" else None
    return {"of_matmul": flops / matmul_rate(device, kind), "mfu": None if known is None else flops / known / 1e12}


def make_model(size: str, device: str, dtype: torch.dtype) -> Any:
    """A random Llama of a size, on the device."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], tie_word_embeddings=True)
    with torch.device(device):  # billions of random numbers take long on a CPU
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")


# --- needed arithmetic


def keys_seen(layout: Layout, kind: str, block_size: int) -> float:
    """Keys that a token that is not padding sees on average; kind: "causal", "block_causal" or "bidirectional"."""
    position, document, real = layout.position, layout.document, layout.real
    row = torch.arange(len(position))[:, None] * (int(document.max()) + 2)
    _, index, count = torch.unique((row + document)[real], return_inverse=True, return_counts=True)
    length, place = count[index], position[real]
    first = torch.full_like(count, 2**60).scatter_reduce(0, index, place, "amin")[index]  # of pieces of a document
    if kind == "bidirectional":
        seen = length
    elif kind == "causal":
        seen = place - first + 1
    else:
        seen = torch.minimum((place // block_size + 1) * block_size - first, length)
    return float(seen.double().mean())


Stream = tuple[float, float, float]
"""Keys that a token sees, share of the rows that the head reads, and operations for each multiplication and addition:
6 where weights learn (2 forward, 4 backward), 4 where gradients only pass through, 2 without a backward pass."""


def streams_of(settings: Any, layout: Layout) -> list[Stream]:
    """The streams of a training step.

    Half of the tokens are masked on average, and read; of frozen weights nothing but the noisy stream has gradients.
    """

    def seen(kind: str) -> float:
        return keys_seen(layout, kind, settings.block_size)

    if settings.attention == "ar":
        return [(seen("causal"), 1.0, 6.0)]
    if settings.attention == "bidirectional":
        return [(seen("bidirectional"), 0.5, 6.0)]
    inside = seen("causal" if settings.noisy_attention == "causal" else "block_causal")
    if settings.objective == "distill":
        return [(inside, 1.0, 4.0), (seen("causal"), 1.0, 2.0)]
    clean = (seen(settings.clean_attention), float(settings.objective == "joint"), 6.0)
    teacher = [(seen("causal"), 1.0, 2.0)] if settings.teacher else []
    return [(inside, 0.5, 6.0), clean, *teacher]


def needed_flops(config: Any, streams: list[Stream], num_tokens: int) -> float:
    """Floating-point operations that a step needs: matrix products, of attention the pairs that the pattern allows, of
    the last layer the rows that the head reads."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    width = head_dim * config.num_attention_heads
    keys = hidden * 2 * head_dim * config.num_key_value_heads
    rest = hidden * width * 2 + 3 * hidden * config.intermediate_size
    total = 0.0
    for pairs, read, each in streams:
        own = rest + 2 * width * pairs
        total += each * ((layers - 1) * (keys + own) + keys + read * (own + hidden * config.vocab_size))
    return total * num_tokens


def document_lengths(num_tokens: int, longest: int) -> list[int]:
    """Lengths of documents as of web text: many short ones, few long ones, 16 to `longest` tokens, `num_tokens` in
    all or a few more."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(max(16, num_tokens // 100)).exponential_(1 / min(600, longest / 2), generator=generator)
    lengths = drawn.long().clamp(16, longest)
    enough = int((lengths.cumsum(0) < num_tokens).sum()) + 1
    return lengths[:enough].tolist()


def random_ids(lengths: list[int], vocabulary: int) -> list[Tensor]:
    """Random tokens, of each length; never the last of the vocabulary, which is the mask."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocabulary - 1, (length,), generator=generator) for length in lengths]
