"""What the parent's size decides of a run: batch, lengths, learning rate; and what the device decides: precision."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from unmask.core.network import DiffusionConfig
from unmask.settings import RunSettings, Settings


@dataclass(frozen=True, kw_only=True, repr=False)
class Resolved(Settings):
    """Settings of a run on one parent: what its size decides has a value.

    teacher_top_k alone may stay None: a distance then compares the whole vocabulary.
    """

    block_size: int
    max_length: int
    batch_size: int
    micro_batch_size: int
    mixed_precision: str
    half_life: float
    learning_rate: float
    min_learning_rate_ratio: float


_SMALL, _LARGE = 100e6, 1e9
_RULE: dict[str, tuple[float, float]] = {
    # measured on parents below 100M parameters; published for parents from 1B
    "learning_rate": (4e-3, 1e-5),
    "joint_learning_rate": (1e-3, 1e-5),  # faster, and the AR model wanders off (results/tri-mode)
    "taught_learning_rate": (2e-4, 1e-5),  # with a frozen parent as teacher, which nothing is then forgotten of
    "min_learning_rate_ratio": (0.02, 0.3),
    "batch_tokens": (1024, 2**21),
    "max_length": (512, 4096),
    "block_size": (8, 16),
    "micro_batch_tokens": (16384, 4096),
}


LARGEST_BATCH = 2**25
"""Tokens of a batch, at most: sixteen times the largest of the rule; all of them lie in memory at once."""

FULL_VOCABULARY, TEACHER_TOP_K = 65_536, 64
"""Vocabulary size up to which a teacher's whole distribution is compared; beyond it, its likeliest tokens alone."""


def resolve(
    settings: Settings, num_parameters: int, context_length: int | None, vocabulary: int | None = None
) -> Resolved:
    """Fill what depends on the parent's size; raise ValueError for a length that does not fit block or context.

    Up to 100M parameters our measured values, from 1B the published ones, between them interpolated in the
    logarithms of size and value: value = small * (large / small)^s, s = log(N / 100M) / log(10) in [0, 1].
    half_life, infinite for small parents and 0.1 for large ones, is 0.1 / s.
    """
    s = min(1.0, max(0.0, math.log(num_parameters / _SMALL) / math.log(_LARGE / _SMALL)))
    ruled = {name: small * (large / small) ** s for name, (small, large) in _RULE.items()}
    block = settings.block_size or 2 ** round(math.log2(ruled["block_size"]))
    if settings.attention == "bidirectional" and settings.noise_level == "sequence":
        block = settings.block_size or 1  # no blocks: any length will do
    length = _length(settings.max_length, block, 2 ** round(math.log2(ruled["max_length"])), context_length)
    first = settings.first_block_size
    if first is not None and block not in (first << n for n in range(block.bit_length())):
        raise ValueError(f"first_block_size={first} does not double to block_size={block}")
    batch = settings.batch_size or max(1, round(ruled["batch_tokens"] / length))
    if batch * length > LARGEST_BATCH:
        raise ValueError(
            f"batch_size={batch} rows of max_length={length} make a batch of {batch * length:,} tokens: use at most "
            f"{LARGEST_BATCH // length} rows"
        )
    rate = "learning_rate"
    if settings.objective == "joint":
        rate = "joint_learning_rate" if settings.teacher is None else "taught_learning_rate"
    of_size = {
        "block_size": block,
        "max_length": length,
        "batch_size": batch,
        "micro_batch_size": max(1, round(ruled["micro_batch_tokens"] / length)),
        "mixed_precision": "no",
        "half_life": 0.1 / s if s else math.inf,
        "learning_rate": float(f"{ruled[rate]:.2g}"),
        "min_learning_rate_ratio": ruled["min_learning_rate_ratio"],
        "teacher_top_k": TEACHER_TOP_K if vocabulary is not None and vocabulary > FULL_VOCABULARY else None,
    }
    chosen = {name: value for name, value in vars(settings).items() if value is not None}
    values = vars(settings) | of_size | chosen
    return Resolved(**values | {"micro_batch_size": min(values["micro_batch_size"], batch)})


FAST_FROM = (8, 0)
"""Capability of the first GPUs with bfloat16 and TF32 (NVIDIA's Ampere)."""

Capability = tuple[int, int]


def of_device(settings: Settings, device: str, capability: Capability | None, *, takes_flex: bool) -> dict[str, str]:
    """The faster values of settings that are unset, on a device of this type and capability; empty on a CPU.

    takes_flex: the model computes attention by FlexAttention, loaded with SDPA. Attention that opens step by step has
    a mask without whole blocks to skip, and one to make in each step: it stays with SDPA.
    """
    fast = {}
    if device == "cuda" and capability is not None and capability >= FAST_FROM:
        if settings.mixed_precision is None:
            fast["mixed_precision"] = "bf16"
        if settings.attn_implementation is None and takes_flex and settings.anneal_steps == 1:
            fast["attn_implementation"] = "flex_attention"
    return fast


def uses_tf32(settings: RunSettings, device: str, capability: Capability | None) -> bool:
    """Whether products that stay float32 beside a shorter type are in TF32, with 10 of their 23 bits."""
    ampere = device == "cuda" and capability is not None and capability >= FAST_FROM
    return ampere and settings.mixed_precision in ("bf16", "fp16")


def against_shards(settings: Settings) -> str | None:
    """Why a run with these settings does not spread its parameters over processes (FSDP2); None if it can."""
    if settings.quantize is not None:
        return f"quantize={settings.quantize!r}: packed weights are not sharded (FSDP2): use configs/ddp.yaml"
    if settings.optimizer != "adamw":
        return (
            f"optimizer={settings.optimizer!r}: bitsandbytes does not know sharded parameters (FSDP2), which spread "
            "the moments over the processes anyway: use optimizer=adamw, or configs/ddp.yaml"
        )
    if settings.dtype == "bfloat16" and settings.objective != "distill" and settings.lora_rank is None:
        return (
            "dtype='bfloat16': FSDP2 keeps weights that learn in float32, spread over the processes: leave dtype out, "
            "and have passes in bfloat16 with mixed_precision=bf16"
        )
    return None


def _length(asked: int | None, block: int, ruled: int, context_length: int | None) -> int:
    """Tokens of a row: what is asked for, else the rule's, within the context and in whole blocks."""
    length = asked
    if length is None:
        length = ruled if context_length is None else min(ruled, context_length)
        length = length // block * block
    elif length % block:
        raise ValueError(f"max_length={length} is no multiple of block_size={block}")
    if context_length is not None and length > context_length:
        raise ValueError(f"max_length={length} exceeds the model's context of {context_length}")
    if length < block:
        raise ValueError(f"block_size={block} exceeds max_length={length}")
    return length


RULE_TEXT = (
    "learning rate, batch and length: our measured values up to 100M parameters, the paper's from 1B, "
    "log-interpolated between"
)


def diffusion_config(settings: Resolved, mask_token_id: int, version: str, vocabulary: int = 0) -> DiffusionConfig:
    """What a checkpoint trained with these settings says of itself; vocabulary: tokens that noise is drawn from."""
    return DiffusionConfig(
        mask_token_id=mask_token_id,
        attention=settings.attention,
        clean_attention=settings.clean_attention,
        block_size=None if settings.attention == "bidirectional" else settings.block_size,
        shift=settings.shift,
        recipe=settings.recipe,
        version=version,
        noisy_attention=settings.noisy_attention,
        mask_rows=settings.block_size if settings.mask_per_place else 1,
        adapt_anchor=settings.adapt_anchor,
        noise_tokens=vocabulary if settings.noise == "uniform" else 0,
    )


def at_step(settings: Resolved, step: int, total_steps: int) -> Resolved:
    """The settings of one step: with first_block_size, blocks double in equal parts of the run."""
    if settings.first_block_size is None:
        return settings
    stages = (settings.block_size // settings.first_block_size).bit_length()
    stage = min(stages - 1, step * stages // max(1, total_steps))
    return replace(settings, block_size=settings.first_block_size << stage, first_block_size=None)
