"""Speed and memory beside the plain AR baseline of the same Hugging Face model, in the same process.

Every case runs ours and the baseline in turn and reports medians and their ratio. Random weights of a given
shape suffice: in the fixed-commit mode exactly n tokens are committed per forward, which separates the engine
from the quality of a model. Times are seconds of CPU on CPU (one thread) and of wall clock on GPU.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from unmask import hf
from unmask.core.attention import Layout
from unmask.core.corruption import Corruption, mask_exact, noise_levels, position_noise, segments
from unmask.core.drafter import Drafter, DrafterConfig, target_modules
from unmask.core.network import DiffusionConfig
from unmask.core.objectives import diffusion_loss, distill_loss, predictable, shared_loss
from unmask.loading import load
from unmask.version import __version__


@dataclass(frozen=True)
class Case:
    """value: ours. baseline: the AR model's. ratio: what the case compares (see `unit`)."""

    case: str
    value: float
    baseline: float
    ratio: float
    unit: str


_SHAPES: dict[str, dict[str, int | bool]] = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 64, "intermediate_size": 768, "vocab_size": 8192, "tie_word_embeddings": True},
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
             "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True},
    "4b": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
           "head_dim": 128, "intermediate_size": 12288, "vocab_size": 151936, "tie_word_embeddings": False},
}  # fmt: skip


def make_model(
    shape: str,
    *,
    base: str | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """A random Qwen3 of a named shape, or the model of a name; of a drafter, its base. changes: of the shape."""
    place = hf.present_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    if shape not in _SHAPES:
        if len(shape) <= 4:
            raise ValueError(f"shape {shape!r} is unknown: use one of {', '.join(_SHAPES)}, or give a model")
        lm = load(shape, place, dtype, base=base, trust_remote_code=trust_remote_code)
        if lm.drafter is not None:
            lm.drafter.detach()
        return lm.model
    if base is not None:
        raise ValueError(f"base={base!r} is for a drafter's or an adapter's folder, and {shape!r} is a shape")
    torch.manual_seed(0)
    config = Qwen3Config(**(_SHAPES[shape] | {"max_position_embeddings": 4096} | dict(changes or {})))
    with torch.device(place):  # billions of random numbers take long on a CPU
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


Clocks = tuple[float, float]
"""Seconds of CPU, and of wall clock."""


class Measured(NamedTuple):
    """Medians of seconds, ours and the baseline's, and of the rounds' ratios; wall_ratio: the ratio by wall clock."""

    ours: float
    baseline: float
    ratio: float
    wall_ratio: float


def measure(ours: Callable[[], Any], baseline: Callable[[], Any], rounds: int) -> Measured:
    """Both in turn, after a warm-up of each; CPU seconds of the process on a CPU, wall clock on a GPU."""
    ours(), baseline()
    return medians([(clocks(ours), clocks(baseline)) for _ in range(rounds)])


def medians(times: Sequence[tuple[Clocks, Clocks]]) -> Measured:
    """Of (ours, the baseline's) in each round, by the clock that counts on this machine."""
    clock = int(torch.cuda.is_available())
    ours, baseline = (statistics.median(pair[i][clock] for pair in times) for i in (0, 1))
    ratios = [statistics.median(a[c] / b[c] for a, b in times) for c in (clock, 1)]
    return Measured(ours, baseline, *ratios)


def clocks(work: Callable[[], Any]) -> Clocks:
    """The seconds that `work` takes, a GPU's work included."""
    gc.collect()
    synchronize()
    began = time.process_time(), time.perf_counter()
    work()
    synchronize()
    return time.process_time() - began[0], time.perf_counter() - began[1]


def synchronize() -> None:
    """Wait for a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- training


def _bench_drafter(model: Any, mask_token_id: int) -> Drafter:
    """Adapters of rank 16 on the attention outputs."""
    maps = {name.rsplit(".", 1)[-1] for name, _ in target_modules(model, "all")}
    target = next(name for name in ("o_proj", "out_proj", "c_proj", "dense") if name in maps)
    return Drafter(model, mask_token_id, DrafterConfig(rank=16, scale=32.0, targets=target)).to(model.device)


@dataclass(frozen=True)
class _Training:
    """A network as a conversion trains it, and the rows it trains on; adapters: of a drafter, whose base is frozen."""

    network: hf.HFNetwork
    config: DiffusionConfig
    adapters: Drafter | None
    x0: Tensor
    num_masks: int

    def loss(self, step: int, rows: Tensor, layout: Layout) -> Tensor:
        """The summed loss of some rows at one step."""
        x0 = self.x0[rows]
        if self.adapters is not None:
            masked = predictable(layout)
            return distill_loss(self.network, self.config, x0, layout, Corruption(masked, masked.float()), "tv").sum
        masks = [self._draw(step * self.num_masks + i, rows, layout) for i in range(self.num_masks)]
        if self.num_masks > 1:
            return shared_loss(self.network, self.config, x0, layout, masks).sum
        return diffusion_loss(self.network, self.config, x0, layout, masks[0]).sum

    def _draw(self, number: int, rows: Tensor, layout: Layout) -> Corruption:
        segment = segments(layout, self.config.segment_size)
        t = noise_levels(0, number, rows, *self.x0.shape)
        return mask_exact(t, position_noise(0, number, rows, self.x0.shape[1]), segment, predictable(layout))


def _training(model: Any, kind: str, block_size: int, x0: Tensor, num_masks: int) -> _Training:
    """What a kind of step trains; a drafter's mask is no row of the vocabulary."""
    drafter = kind == "drafter"
    mask = model.config.vocab_size if drafter else model.config.vocab_size - 1
    adapters = _bench_drafter(model, mask) if drafter else None
    network = hf.as_network(model.train(), mask, gate=None if adapters is None else adapters.rows)
    hf.without_dropout(model)
    clean = {"two_stream": "block_causal", "drafter": "causal"}.get(kind)
    attention = "bidirectional" if clean is None else "two_stream"
    config = DiffusionConfig(mask, attention, clean, block_size, False, "bench", __version__)
    return _Training(network, config, adapters, x0, num_masks)


def train_steps(
    model: Any, kind: str, block_size: int, rows: int, length: int, micro: int | None = None, num_masks: int = 1
) -> dict[str, Callable[[], None]]:
    """One forward and backward of the AR loss as Hugging Face computes it, and of ours.

    micro: rows of a micro-batch of ours. num_masks: more than 1 of "two_stream", masks on one clean pass.
    kind: "two_stream" or "bidirectional" for a diffusion loss, "drafter" for gated adapters of rank 16 on the
    frozen model's attention outputs, distilled in total variation with every token masked. On a GPU our passes
    over two streams run FlexAttention.
    """
    x0 = torch.randint(0, model.config.vocab_size - 1, (rows, length), generator=torch.Generator().manual_seed(0))
    training = _training(model, kind, block_size, x0, num_masks)
    layout = Layout.of(torch.arange(length).expand(rows, length))
    parts = [(part, layout.subset(part)) for part in torch.arange(rows).split(micro or rows)]
    count = int(predictable(layout).sum())
    device = training.network.device
    implementation = model.config._attn_implementation
    flex = device.type == "cuda" and kind != "bidirectional"
    on_device, step = x0.to(device), 0

    def diffusion() -> None:
        nonlocal step
        step += 1
        model.requires_grad_(training.adapters is None)
        model.config._attn_implementation = "flex_attention" if flex else implementation
        for part in parts:
            (training.loss(step, *part) / count).backward()
        for module in (model, training.adapters):
            if module is not None:
                module.zero_grad()
        model.config._attn_implementation = implementation
        model.requires_grad_(True)

    def autoregressive() -> None:
        model(input_ids=on_device, labels=on_device, use_cache=False).loss.backward()
        model.zero_grad()

    return {"diffusion": diffusion, "ar": autoregressive}


MICRO = 2
"""Rows of our steps at a time: two streams of two rows are as many tokens as AR's four rows."""


@dataclass(frozen=True)
class Step:
    """A kind of step and its sizes; changes: what differs from the shape asked for (named shapes only)."""

    kind: str
    block_size: int = 32
    rows: int = 4
    length: int = 512
    micro: int | None = MICRO
    num_masks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)

    def steps(self, shape: str, **options: Any) -> dict[str, Callable[[], None]]:
        """The steps on a model of `make_model`, whose options these are."""
        model = make_model(shape, changes=self.changes, **options)
        return train_steps(model, self.kind, self.block_size, self.rows, self.length, self.micro, self.num_masks)


TRAIN_CASES = {
    "block_step": Step("two_stream"),
    "block_step_whole": Step("two_stream", micro=None),
    "block_step_draws2": Step("two_stream", num_masks=2),
    "bidirectional_step": Step("bidirectional"),
    "drafter_step": Step("drafter"),
    "two_stream_1024": Step("two_stream", length=1024, changes={"num_hidden_layers": 4, "vocab_size": 1024}),
}
"""`whole`: our rows at once too, as AR's. `draws2`: two masks on one clean pass, time per mask."""
MEMORY_CASES = {"block_peak_memory": "block_step", "block_peak_memory_whole": "block_step_whole"}
"""Cases of peak memory by the steps that they measure."""


@dataclass(frozen=True)
class TrainCase(Case):
    """value, baseline: seconds of CPU (of wall clock on GPU). tokens_per_second: clean tokens, each counted once."""

    wall_ratio: float
    tokens_per_second: float
    settings: dict[str, Any]


def bench_train(shape: str, rounds: int = 5, **options: Any) -> Iterator[Case]:
    """Training steps: `ratio` is ours over AR's (lower is better); each as it is done. options: of `make_model`."""
    for name, step in TRAIN_CASES.items():
        steps, n = step.steps(shape, **options), step.num_masks
        ours, baseline, ratio, wall_ratio = measure(steps["diffusion"], steps["ar"], rounds)
        unit = "seconds per step" if n == 1 else "seconds per mask, AR's per step"
        speed = step.rows * step.length / (ours / n)
        yield TrainCase(name, ours / n, baseline, ratio / n, unit, wall_ratio / n, speed, asdict(step))
    baseline = _peak_growth(shape, "block_step", "ar", **options)
    for name, measured in MEMORY_CASES.items():
        ours = _peak_growth(shape, measured, "diffusion", **options)
        yield Case(name, ours, baseline, ours / baseline, "MiB of peak growth")


def _peak_growth(shape: str, case: str, which: str, **options: Any) -> float:
    """Growth of peak memory over three steps, MiB, in a process of its own."""
    code = (
        "import torch; from unmask.lab.bench_train import memory_growth; torch.set_num_threads(1); "
        f"print(memory_growth({shape!r}, {case!r}, {which!r}, **{options!r}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(process.stdout.splitlines()[-1])


def memory_growth(shape: str, case: str, which: str, **options: Any) -> float:
    """Peak memory of three steps above what stood before them, MiB."""
    step = TRAIN_CASES[case].steps(shape, **options)[which]
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    resident = _peak_resident()
    for _ in range(3):
        step()
    return _peak_resident() - resident


def _peak_resident() -> float:
    """Peak resident memory of this process, MiB (getrusage's figure would include the parent's at the fork)."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise ValueError("peak memory is read from /proc, which this system lacks")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10
