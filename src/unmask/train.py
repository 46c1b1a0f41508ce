"""Recipes and the training loop, on Accelerate.

A recipe is a TOML file of settings. A run is a function of its settings, its data and its seed: rows come
from one stream in a fixed order, noise from (seed, step, row in the global batch), and the loss is divided by
the token count of the whole step, so that micro-batches, accumulation and ranks change nothing.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor

from unmask.attention import Layout, Pattern, annealed, lookahead
from unmask.corruption import (
    Corruption,
    mask_bernoulli,
    mask_complementary,
    mask_exact,
    noise_levels,
    position_noise,
    segments,
)
from unmask.data import Batch, Corpus, HubStream, Packer, PackState
from unmask.denoiser import DiffusionConfig, Network
from unmask.noise import uniform
from unmask.objectives import DISTANCES, LossOutput, ar_loss, diffusion_loss, distill_loss, joint_loss, predictable

Evaluator = Callable[[Any], dict[str, float]]
"""Called with the unwrapped model; returns named figures for metrics.jsonl."""


# --- settings and recipes

LORA_TRAINABLE = ("embeddings", "norms", "head")


@dataclass(frozen=True)
class Settings:
    """Everything that defines a run besides the model and the data. None means: resolved from the model.

    attention "ar" trains the next-token loss instead. noise_level: "block" | "sequence" shares t.
    masking: "exact" draws ceil(t n) of n tokens, "bernoulli" each with probability t, "all" is t = 1.
    objective: "diffusion", "joint" (next-token loss + alpha * diffusion) or "distill" (a drafter: gated adapters of
    drafter_rank on a frozen base, pulled by `distance` to the base's next-token law; mask_per_place gives each
    place in the block a mask embedding of its own). first_block_size: double the block from there to block_size
    over the run. half_life: of position-dependent masking, inf is uniform. min_noise_level: t is drawn from (it, 1].
    loss_normaliser: divide by the predictable "tokens" (unbiased) or the "masked" ones of the micro-batch
    (DiffuLLaMA's code). anneal_steps, anneal_form, anneal_redraw: see `annealing`; 1 is full attention at once.
    self_prompts, self_tokens, self_temperature: of --data self, the file whose documents' beginnings the model
    continues, how many tokens it writes (max_tokens unless given), and how. predict_padding: one document a row,
    filled up with end tokens that are corrupted and predicted (DiffuLLaMA's fine-tuning), instead of packed rows.
    lora_rank: train adapters of this rank instead of the weights, scaled by lora_alpha / lora_rank (lora_alpha
    None: twice the rank); lora_trainable: what is trained beside them; lora_merge=false saves a PEFT adapter, not
    a model. batch_size counts rows of max_length in one optimiser step, micro_batch_size those that run at once on
    one device. eval_every: steps, by default a tenth of the run.
    """

    recipe: str
    # what is learnt
    attention: str = "two_stream"
    clean_attention: str | None = None
    block_size: int | None = None
    shift: bool = False
    noisy_attention: str = "bidirectional"
    objective: str = "diffusion"
    alpha: float = 0.3
    distance: str = "kl+tv"
    drafter_rank: int = 32
    drafter_scale: float = 64.0
    drafter_targets: str = "all"
    mask_per_place: bool = False
    first_block_size: int | None = None
    noise_level: str = "block"
    masking: str = "exact"
    complementary: bool = False
    min_noise_level: float = 0.0
    loss_normaliser: str = "tokens"
    anneal_steps: int = 1
    anneal_form: str = "entries"
    anneal_redraw: bool = False
    half_life: float | None = None
    mask_token: str | None = None
    mask_init: str | None = None
    # data
    max_length: int | None = None
    text_column: str = "text"
    split: str = "train"
    skip_invalid: bool = False
    end_token: str | None = None
    predict_padding: bool = False
    self_prompts: str | None = None
    self_tokens: int | None = None
    self_temperature: float = 0.0
    eval_data: str | None = None
    eval_documents: int = 32
    eval_samples: int = 2
    # adapters
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_trainable: str = "embeddings,norms,head"
    lora_merge: bool = True
    # optimisation
    max_tokens: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    min_learning_rate_ratio: float | None = None
    warmup_ratio: float = 0.02
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    seed: int = 0
    # bookkeeping
    log_every: int = 10
    eval_every: int | None = None
    save_every: int = 500
    keep_checkpoints: int = 2
    report_to: str | None = None

    def __post_init__(self) -> None:
        choices = {
            "attention": ("two_stream", "block_causal", "bidirectional", "ar"),
            "noise_level": ("block", "sequence"),
            "noisy_attention": ("bidirectional", "causal"),
            "objective": ("diffusion", "joint", "distill"),
            "distance": DISTANCES,
            "masking": ("exact", "bernoulli", "all"),
            "loss_normaliser": ("tokens", "masked"),
            "anneal_form": ("entries", "window"),
            "mixed_precision": ("no", "bf16", "fp16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(allowed)}")
        for name in ("block_size", "max_length", "batch_size", "micro_batch_size", "log_every", "eval_every",
                     "save_every", "keep_checkpoints", "eval_samples", "max_tokens", "learning_rate", "half_life",
                     "max_grad_norm", "anneal_steps", "lora_rank", "lora_alpha", "drafter_rank", "drafter_scale",
                     "first_block_size", "self_tokens"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        for name in self.trainable:
            if name not in LORA_TRAINABLE:
                raise ValueError(
                    f"lora_trainable={self.lora_trainable!r}: {name!r} is unknown: use any of "
                    f"{', '.join(LORA_TRAINABLE)}, with commas between"
                )
        if not 0 <= self.min_noise_level < 1:
            raise ValueError(f"min_noise_level={self.min_noise_level} must lie in [0, 1)")
        if self.anneal_steps > 1 and self.attention != "bidirectional":
            raise ValueError(
                f"anneal_steps={self.anneal_steps} opens a causal mask towards attention='bidirectional', "
                f"not towards {self.attention!r}: use anneal_steps=1"
            )
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha} must not be negative")
        if self.objective != "diffusion" and (self.attention, self.clean_attention) != ("two_stream", "causal"):
            raise ValueError(
                f"objective={self.objective!r} needs attention='two_stream' with clean_attention='causal', "
                f"not {self.attention!r} with {self.clean_attention!r}"
            )
        if self.mask_per_place and self.objective != "distill":
            raise ValueError(f"mask_per_place=true needs objective='distill', not {self.objective!r}")
        if self.objective == "distill" and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing=true does not go with objective='distill': leave it out")
        if self.complementary and self.masking != "exact":
            raise ValueError("complementary=true needs masking='exact'")
        if self.half_life is not None and math.isfinite(self.half_life) and self.masking != "exact":
            raise ValueError(f"half_life={self.half_life} needs masking='exact': Bernoulli masks have no order")

    @property
    def trainable(self) -> tuple[str, ...]:
        """The parts named in lora_trainable."""
        return tuple(name.strip() for name in self.lora_trainable.split(",") if name.strip())


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    folder = resources.files("unmask") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_summary(name: str) -> str:
    """A recipe's first line: what it reproduces."""
    text = (resources.files("unmask") / "recipes" / f"{name}.toml").read_text()
    return text.splitlines()[0].removeprefix("# ")


def load_recipe(name: str, **overrides: Any) -> Settings:
    """Settings of a recipe with overrides; unknown names and values of the wrong type are errors."""
    if name not in recipe_names():
        raise ValueError(f"recipe {name!r} is unknown: use one of {', '.join(recipe_names())}")
    text = (resources.files("unmask") / "recipes" / f"{name}.toml").read_text()
    values = tomllib.loads(text) | overrides
    known = {f.name: str(f.type) for f in fields(Settings)}
    for key, value in values.items():
        if key not in known or key == "recipe":
            raise ValueError(f"setting {key!r} is unknown: use one of {', '.join(k for k in known if k != 'recipe')}")
        values[key] = _typed(key, value, known[key])
    return Settings(recipe=name, **values)


def _typed(name: str, value: Any, annotation: str) -> Any:
    kinds = [kind.strip() for kind in annotation.split("|")]
    if value is None and "None" in kinds:
        return None
    if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    for kind, python in (("bool", bool), ("int", int), ("float", float), ("str", str)):
        if kind in kinds and type(value) is python:
            return value
    raise ValueError(f"setting {name}={value!r} has the wrong type: it takes {annotation}")


_SMALL, _LARGE = 100e6, 1e9
_RULE: dict[str, tuple[float, float]] = {
    # measured on parents below 100M parameters; published for parents from 1B
    "learning_rate": (4e-3, 1e-5),
    "min_learning_rate_ratio": (0.02, 0.3),
    "batch_tokens": (1024, 2**21),
    "max_length": (512, 4096),
    "block_size": (8, 16),
    "micro_batch_tokens": (16384, 4096),
}


def resolve(settings: Settings, num_parameters: int, context_length: int | None) -> Settings:
    """Fill what depends on the parent's size.

    Up to 100M parameters our measured values, from 1B the published ones, between them interpolated in the
    logarithms of size and value: value = small * (large / small)^s, s = log(N / 100M) / log(10) in [0, 1].
    half_life, infinite for small parents and 0.1 for large ones, is 0.1 / s.
    """
    s = min(1.0, max(0.0, math.log(num_parameters / _SMALL) / math.log(_LARGE / _SMALL)))
    ruled = {name: small * (large / small) ** s for name, (small, large) in _RULE.items()}
    block = settings.block_size or 2 ** round(math.log2(ruled["block_size"]))
    if settings.attention == "bidirectional" and settings.noise_level == "sequence":
        block = settings.block_size or 1  # no blocks: any length will do
    length = settings.max_length
    if length is None:
        length = 2 ** round(math.log2(ruled["max_length"]))
        if context_length is not None:
            length = min(length, context_length)
        length = length // block * block
    elif length % block:
        raise ValueError(f"max_length={length} is no multiple of block_size={block}")
    if context_length is not None and length > context_length:
        raise ValueError(f"max_length={length} exceeds the model's context of {context_length}")
    if length < block:
        raise ValueError(f"block_size={block} exceeds max_length={length}")
    first = settings.first_block_size
    if first is not None and block not in (first << n for n in range(block.bit_length())):
        raise ValueError(f"first_block_size={first} does not double to block_size={block}")
    batch = settings.batch_size or max(1, round(ruled["batch_tokens"] / length))
    return replace(
        settings,
        block_size=block,
        max_length=length,
        batch_size=batch,
        micro_batch_size=min(settings.micro_batch_size or max(1, round(ruled["micro_batch_tokens"] / length)), batch),
        half_life=(0.1 / s if s else math.inf) if settings.half_life is None else settings.half_life,
        learning_rate=settings.learning_rate or float(f"{ruled['learning_rate']:.2g}"),
        min_learning_rate_ratio=(
            ruled["min_learning_rate_ratio"]
            if settings.min_learning_rate_ratio is None
            else settings.min_learning_rate_ratio
        ),
    )


RULE_TEXT = (
    "learning rate, batch and length: our measured values up to 100M parameters, the paper's from 1B, "
    "log-interpolated between"
)


def diffusion_config(settings: Settings, mask_token_id: int, version: str) -> DiffusionConfig:
    """What a checkpoint trained with these (resolved) settings says of itself."""
    return DiffusionConfig(
        mask_token_id=mask_token_id,
        attention=settings.attention,
        clean_attention=settings.clean_attention,
        block_size=None if settings.attention == "bidirectional" else settings.block_size,
        shift=settings.shift,
        recipe=settings.recipe,
        version=version,
        noisy_attention=settings.noisy_attention,
        mask_rows=settings.block_size if settings.mask_per_place and settings.block_size else 1,
    )


def at_step(settings: Settings, step: int, total_steps: int) -> Settings:
    """The settings of one step: with first_block_size, blocks double in equal parts of the run."""
    if settings.first_block_size is None:
        return settings
    assert settings.block_size is not None
    stages = (settings.block_size // settings.first_block_size).bit_length()
    stage = min(stages - 1, step * stages // max(1, total_steps))
    return replace(settings, block_size=settings.first_block_size << stage, first_block_size=None)


# --- one step's noise and loss


def corruptions(
    settings: Settings, layout: Layout, step: int, rows: Tensor, loss_mask: Tensor | None = None
) -> list[Corruption]:
    """The mask of these rows of the global batch at an optimiser step; two with complementary pairs."""
    assert settings.batch_size is not None
    assert settings.block_size is not None
    by_block = settings.noise_level == "block"
    device, length = layout.position.device, layout.position.shape[1]
    segment = segments(layout, settings.block_size) if by_block else torch.zeros_like(layout.position)
    # Stratified levels of neighbouring rows are alike, which a loss divided within micro-batches would feel.
    strata = settings.batch_size if settings.loss_normaliser == "tokens" else 1
    t = noise_levels(settings.seed, step, rows, strata, length).to(device)
    t = settings.min_noise_level + (1 - settings.min_noise_level) * t
    noise = position_noise(settings.seed, step, rows, length).to(device)
    maskable = predictable(layout, loss_mask)
    if settings.masking == "all":
        return [Corruption(maskable, maskable.float())]
    if settings.masking == "bernoulli":
        return [mask_bernoulli(t, noise, segment, maskable)]
    size = settings.block_size if by_block else length
    place = (layout.position % size + 1) / size
    half_life = math.inf if settings.half_life is None else settings.half_life
    if settings.complementary:
        return list(mask_complementary(t, noise, segment, maskable, place=place, half_life=half_life))
    return [mask_exact(t, noise, segment, maskable, place=place, half_life=half_life)]


@functools.lru_cache(maxsize=1)
def _opened(length: int, ratio: float, key: tuple[int | str, ...]) -> Tensor:
    """Each entry True with probability `ratio`; kept, since all micro-batches of a step share it."""
    return uniform(length, length, key=key) < ratio


def annealing(settings: Settings, step: int, rows: Tensor, device: torch.device) -> Pattern | None:
    """The pattern of an optimiser step while attention opens up; None once it is fully bidirectional.

    r = min(1, (step + 1) / anneal_steps) (DiffuLLaMA 2410.17891, section 3.3). anneal_form "entries": every
    entry above the diagonal is open with probability r, one max_length x max_length matrix a step, on
    positions inside documents; with `anneal_redraw` one for each micro-batch, told apart by its first row.
    "window": the next ceil(r * max_length) positions are open. A function of the step alone, so that a resumed
    run goes on where it stopped.
    """
    assert settings.max_length is not None
    ratio = (step + 1) / settings.anneal_steps
    if ratio >= 1:
        return None
    if settings.anneal_form == "window":
        return lookahead(math.ceil(ratio * settings.max_length))
    key: tuple[int | str, ...] = ("anneal", settings.seed, step)
    if settings.anneal_redraw:
        key += (int(rows[0]),)
    return annealed(_opened(settings.max_length, ratio, key).to(device))


def step_loss(
    network: Network, settings: Settings, config: DiffusionConfig | None, batch: Batch, step: int, rows: Tensor
) -> LossOutput:
    """Loss (sum, count) of these rows; a mean over draws where a pair of masks is drawn.

    loss_normaliser "masked": the sum is that of DiffuLLaMA's released code, sum (1/t) CE / masked tokens of
    the micro-batch, times the count, so that dividing by the step's count gives the mean over micro-batches.
    """
    if config is None:
        return ar_loss(network, batch.x0, batch.layout, batch.loss_mask)
    if config.block_size is not None:
        config = config.with_block_size(settings.block_size)  # a curriculum's blocks are smaller
    # A reused mask token that stands in the text by nature is seen as a mask and never predicted.
    natural = batch.x0 == config.mask_token_id
    drawn = [c.sparing(natural) for c in corruptions(settings, batch.layout, step, rows, batch.loss_mask)]
    pattern = annealing(settings, step, rows, batch.x0.device)

    def loss_of(corruption: Corruption) -> LossOutput:
        given = (network, config, batch.x0, batch.layout, corruption)
        if settings.objective == "joint":
            return joint_loss(*given, settings.alpha, batch.loss_mask)
        if settings.objective == "distill":
            return distill_loss(*given, settings.distance, batch.loss_mask)
        return diffusion_loss(*given, pattern, batch.loss_mask)

    losses = [loss_of(corruption) for corruption in drawn]
    if settings.loss_normaliser == "masked":
        losses = [
            LossOutput(loss.sum * loss.count / corruption.masked.sum().clamp_min(1), loss.count)
            for loss, corruption in zip(losses, drawn, strict=True)
        ]
    total = losses[0]
    for loss in losses[1:]:
        total = LossOutput(total.sum + loss.sum, total.count)
    return LossOutput(total.sum / len(losses), total.count)


def learning_rate_at(settings: Settings, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine from learning_rate to learning_rate * min_learning_rate_ratio."""
    assert settings.learning_rate is not None
    assert settings.min_learning_rate_ratio is not None
    warmup = max(1, round(settings.warmup_ratio * total_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = settings.min_learning_rate_ratio
    return settings.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


# --- the loop


@dataclass(frozen=True)
class Progress:
    """One log step, for whoever shows it."""

    step: int
    total_steps: int
    tokens: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    evaluation: dict[str, float]


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds besides weights and optimiser."""

    step: int = 0
    tokens: int = 0
    data: PackState = field(default_factory=PackState)


def train(
    model: Any,
    make_network: Callable[[Any], Network],
    settings: Settings,
    config: DiffusionConfig | None,
    source: Corpus | HubStream,
    output_dir: Path,
    *,
    resume: bool = False,
    evaluate: Evaluator | None = None,
    report: Callable[[Progress], None] | None = None,
    replicate: Callable[[Any], Any] | None = None,
) -> TrainState:
    """Train `model` in place and return where it ended. `settings` are resolved ones.

    Checkpoints go to output_dir/checkpoint-<step>, metrics to output_dir/metrics.jsonl. With `resume` the
    newest whole checkpoint is continued, bit for bit as if never interrupted on the same hardware. replicate:
    makes a network with weights shared and gradients apart; with it the rows of a micro-batch are spread over
    the threads of a CPU.
    """
    assert settings.max_length is not None
    assert settings.batch_size is not None
    assert settings.micro_batch_size is not None
    accelerator = accelerate.Accelerator(
        mixed_precision=settings.mixed_precision, log_with=settings.report_to, project_dir=str(output_dir)
    )
    if settings.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size={settings.batch_size} is no multiple of the {accelerator.num_processes} processes"
        )
    if settings.report_to:
        accelerator.init_trackers("unmask", config={k: str(v) for k, v in asdict(settings).items()})
    model.train()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped, optimizer = accelerator.prepare(model, _optimizer(model, settings))
    network = make_network(wrapped)
    on_cpu = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    crew = _Crew(network, replicate) if replicate is not None and on_cpu and torch.get_num_threads() > 1 else None

    state = TrainState()
    newest = latest_checkpoint(output_dir) if resume else None
    if newest is not None:
        accelerator.load_state(str(newest))
        state = read_state(newest)
    if accelerator.is_main_process:
        _trim_metrics(output_dir / "metrics.jsonl", state.step)

    goal = token_goal(settings, source)
    total_steps = count_steps(settings, source)
    eval_every = settings.eval_every or max(1, total_steps // 10)
    packer = Packer(
        source,
        settings.max_length,
        seed=settings.seed,
        epochs=None if settings.max_tokens is not None else 1,
        state=state.data,
    )
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = settings.batch_size // ranks
    # Kept on the device: a step waits for nothing, a log line for its figures.
    summed = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    counted, since, tokens_since = 0, time.perf_counter(), 0
    while state.tokens < goal:
        full = packer.batch(settings.batch_size)
        if full is None:
            break
        rate = learning_rate_at(settings, state.step, total_steps)
        now = at_step(settings, state.step, total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        mine = full.rows(rank * share, (rank + 1) * share)
        # Every rank sees the whole step's rows, so the count to divide by needs no communication.
        count = int(predictable(full.layout, full.loss_mask).sum())
        for start, micro in _micro_batches(mine, settings.micro_batch_size):
            rows = torch.arange(len(micro.x0)) + rank * share + start
            last = start + settings.micro_batch_size >= len(mine.x0)
            if crew is not None:
                micro_step = functools.partial(step_loss, settings=settings, config=config, step=state.step)
                summed += crew.run(micro_step, micro, rows, 1 / max(1, count))
                continue
            with accelerator.autocast(), _sync(accelerator, wrapped, last):
                loss = step_loss(network, now, config, micro.to(accelerator.device), state.step, rows)
                # Gradients are averaged over ranks, hence the factor.
                accelerator.backward(loss.sum * (ranks / max(1, count)))
            summed += loss.sum.detach()
        accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        state = TrainState(state.step + 1, state.tokens + full.num_tokens, packer.state)

        counted += count
        tokens_since += full.num_tokens
        ended = state.tokens >= goal
        evaluating = evaluate is not None and state.step % eval_every == 0 and not ended
        evaluation: dict[str, float] = {}
        if evaluate is not None and evaluating and accelerator.is_main_process:
            before = time.perf_counter()
            wrapped.eval()
            evaluation = evaluate(accelerator.unwrap_model(wrapped))
            wrapped.train()
            since += time.perf_counter() - before
        if state.step % settings.log_every == 0 or evaluating or ended:
            loss_now = float(accelerator.reduce(summed)) / max(1, counted)
            speed = tokens_since / max(1e-9, time.perf_counter() - since)
            if accelerator.is_main_process:
                row = {
                    "step": state.step,
                    "tokens": state.tokens,
                    "loss": loss_now,
                    "learning_rate": rate,
                    **evaluation,
                }
                append_metrics(output_dir, row)
                if settings.report_to:
                    accelerator.log({k: v for k, v in row.items() if k != "step"}, step=state.step)
                if report is not None:
                    steps = max(total_steps, state.step)
                    report(Progress(state.step, steps, state.tokens, loss_now, rate, speed, evaluation))
            summed.zero_()
            counted, since, tokens_since = 0, time.perf_counter(), 0
        if state.step % settings.save_every == 0:
            save_checkpoint(accelerator, output_dir, state, settings.keep_checkpoints)
    if crew is not None:
        crew.pool.shutdown()
    accelerator.end_training()
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # undoes the mixed-precision wrapper of forward
    model.eval()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    return state


def token_goal(settings: Settings, source: Corpus | HubStream) -> int:
    """Tokens to train on: max_tokens, else one pass; a stream has no known end."""
    if settings.max_tokens is not None:
        return settings.max_tokens
    if not isinstance(source, Corpus):
        raise ValueError("a streamed data set has no known end: give --max-tokens")
    return source.num_tokens


def count_steps(settings: Settings, source: Corpus | HubStream) -> int:
    """Optimiser steps of the run."""
    assert settings.max_length is not None
    assert settings.batch_size is not None
    length = settings.max_length
    per_row = source.tokens_per_row(length) if isinstance(source, Corpus) else length
    return math.ceil(token_goal(settings, source) / (per_row * settings.batch_size))


def _optimizer(model: Any, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; no decay on vectors (norms, biases)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(settings.beta1, settings.beta2), fused=True)


class _Crew:
    """Threads that each run the forward and backward pass of some rows, one thread of kernels apiece.

    On a CPU the operations of a small model are too small to be shared by threads; its rows are not. The
    gradients are added up in the order of the rows, so that a run remains a function of its seed.
    """

    def __init__(self, network: Any, replicate: Callable[[Any], Any]) -> None:
        self.networks = [network] + [replicate(network) for _ in range(torch.get_num_threads() - 1)]
        self.pool = ThreadPoolExecutor(len(self.networks), initializer=lambda: torch.set_num_threads(1))

    def run(self, loss_of: Callable[..., LossOutput], batch: Batch, rows: Tensor, scale: float) -> Tensor:
        """The detached loss sum of the rows; `scale` times its gradient is added to the first network's model."""
        size = -(-len(rows) // len(self.networks))

        def work(index: int) -> Tensor:
            part = slice(index * size, (index + 1) * size)
            loss = loss_of(self.networks[index], batch=batch.rows(part.start, part.stop), rows=rows[part])
            (loss.sum * scale).backward()
            return loss.sum.detach().double()

        sums = list(self.pool.map(work, range(-(-len(rows) // size))))
        first, *others = (list(network.model.parameters()) for network in self.networks)
        for other in others:
            for parameter, twin in zip(first, other, strict=True):
                if twin.grad is not None:
                    parameter.grad = twin.grad if parameter.grad is None else parameter.grad + twin.grad
                    twin.grad = None
        return torch.stack(sums).sum()


def _micro_batches(batch: Batch, size: int) -> Iterator[tuple[int, Batch]]:
    for start in range(0, len(batch.x0), size):
        yield start, batch.rows(start, start + size)


def _sync(accelerator: accelerate.Accelerator, model: Any, last: bool) -> Any:
    """Gradients travel between ranks with the last micro-batch only."""
    return nullcontext() if last else accelerator.no_sync(model)


# --- what a run leaves on disk


def append_metrics(output_dir: Path, row: dict[str, Any]) -> None:
    with (output_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def _trim_metrics(path: Path, step: int) -> None:
    """Drop rows after `step`: they will be written again."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = []
    for row in rows:
        try:
            if json.loads(row)["step"] <= step:
                kept.append(row)
        except json.JSONDecodeError:  # a line cut by the interruption
            continue
    path.write_text("".join(row + "\n" for row in kept))


def save_checkpoint(accelerator: accelerate.Accelerator, output_dir: Path, state: TrainState, keep: int) -> None:
    """Write checkpoint-<step> whole or not at all, and drop the oldest beyond `keep`."""
    final = output_dir / f"checkpoint-{state.step}"
    partial = output_dir / f"checkpoint-{state.step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        (partial / "state.json").write_text(json.dumps(asdict(state)))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in _checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _checkpoints(output_dir: Path) -> list[Path]:
    found = [p for p in output_dir.glob("checkpoint-*") if p.suffix != ".partial" and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return next(reversed(_checkpoints(output_dir)), None)


def read_state(checkpoint: Path) -> TrainState:
    raw = json.loads((checkpoint / "state.json").read_text())
    return TrainState(raw["step"], raw["tokens"], PackState(**raw["data"]))
