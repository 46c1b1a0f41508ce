"""The training loop, on Accelerate.

A run is a function of its settings, its data and its seed: rows come
from one stream in a fixed order, noise from (seed, step, row in the global batch), and the loss is divided by
the token count of the whole step, so that micro-batches, accumulation and ranks change nothing.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor

from unmask import hf
from unmask.core.attention import Layout, Pattern, annealed
from unmask.core.corruption import (
    Corruption,
    mask_bernoulli,
    mask_complementary,
    mask_exact,
    noise_levels,
    position_noise,
    segments,
)
from unmask.core.finite import StepWatch, check_weights
from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import Key, bernoulli, uniforms
from unmask.core.objectives import (
    LossOutput,
    ar_loss,
    diffusion_loss,
    distill_loss,
    joint_loss,
    predictable,
    shared_loss,
)
from unmask.data.documents import Batch, Corpus, HubStream, Packer, PackState
from unmask.hf.fast.shortcuts import compile_layers
from unmask.plain_json import to_json
from unmask.run_folder import newest_whole, put_in_place, seal, sync, write_text, writing
from unmask.settings import Settings, at_step
from unmask.training.ranks import add_gradients, share_weights

Evaluator = Callable[[Any], dict[str, float]]
"""Called with the unwrapped model; returns named figures for metrics.jsonl."""


# --- one step's noise and loss


def corruptions(
    settings: Settings, layout: Layout, step: int, rows: Tensor, loss_mask: Tensor | None = None
) -> list[Corruption]:
    """The masks of these rows of the global batch at an optimiser step: `num_masks` of them, or pairs of them."""
    drawn = []
    for draw in range(settings.num_masks):
        drawn += _corruptions(settings, layout, step, rows, loss_mask, draw)
    return drawn


def _corruptions(
    settings: Settings, layout: Layout, step: int, rows: Tensor, loss_mask: Tensor | None, draw: int
) -> list[Corruption]:
    assert settings.batch_size is not None
    assert settings.block_size is not None
    by_block = settings.noise_level == "block"
    device, length = layout.position.device, layout.position.shape[1]
    segment = segments(layout, settings.block_size) if by_block else torch.zeros_like(layout.position)
    # Stratified levels of neighbouring rows are alike, which a loss divided within micro-batches would feel.
    strata = settings.batch_size if settings.loss_normaliser == "tokens" else 1
    t = noise_levels(settings.seed, step, rows, strata, length, draw).to(device)
    t = settings.min_noise_level + (1 - settings.min_noise_level) * t
    noise = position_noise(settings.seed, step, rows, length, draw).to(device)
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


def offset_blocks(batch: Batch, settings: Settings, step: int, rows: Tensor) -> Batch:
    """The batch with each document on a block grid of its own, begun at one of block_size places.

    A document's positions all move by its offset. Rotary attention sees differences alone, so only the blocks
    change; what was the document's first token stays given.
    """
    assert settings.block_size is not None
    position, document, noisy = batch.layout
    draws = uniforms([("offset", settings.seed, step, row) for row in rows.tolist()], position.shape[1])
    offset = (draws.to(document.device).gather(-1, document.clamp_min(0)) * settings.block_size).long()
    return Batch(batch.x0, Layout(position + offset, document, noisy), predictable(batch.layout, batch.loss_mask))


@functools.lru_cache(maxsize=1)
def _opened(length: int, ratio: float, key: Key, device: torch.device) -> Tensor:
    """Each entry True with probability `ratio`, drawn on `device`; kept, since a step's micro-batches share it."""
    return bernoulli(length, length, probability=ratio, key=key, device=device)


def annealing(settings: Settings, step: int, rows: Tensor, device: torch.device) -> Pattern | None:
    """The pattern of an optimiser step while attention opens up; None once it is fully bidirectional.

    r = min(1, (step + 1) / anneal_steps) (DiffuLLaMA 2410.17891, section 3.3): every entry above the diagonal
    is open with probability r, one max_length x max_length matrix a step, on positions inside documents; with
    `anneal_redraw` one for each micro-batch, keyed by its first row. A function of the step alone, so that a
    resumed run goes on where it stopped.
    """
    assert settings.max_length is not None
    ratio = (step + 1) / settings.anneal_steps
    if ratio >= 1:
        return None
    key: Key = ("anneal", settings.seed, step)
    if settings.anneal_redraw:
        key += (int(rows[0]),)
    return annealed(_opened(settings.max_length, ratio, key, device))


def step_loss(
    network: Network,
    settings: Settings,
    config: DiffusionConfig | None,
    batch: Batch,
    step: int,
    rows: Tensor,
    teacher: Network | None = None,
) -> LossOutput:
    """Loss (sum, count) of these rows; a mean over masks where several are drawn.

    loss_normaliser "masked": the sum is that of DiffuLLaMA's released code, sum (1/t) CE / masked tokens of
    the micro-batch, times the count, so that dividing by the step's count gives the mean over micro-batches.
    """
    if config is None:
        return ar_loss(network, batch.x0, batch.layout, batch.loss_mask)
    if config.block_size is not None:
        config = config.with_block_size(settings.block_size)  # a curriculum's blocks are smaller
    if settings.random_offset:
        batch = offset_blocks(batch, settings, step, rows)
    # A reused mask token that stands in the text by nature is seen as a mask and never predicted.
    natural = batch.x0 == config.mask_token_id
    drawn = [c.excluding(natural) for c in corruptions(settings, batch.layout, step, rows, batch.loss_mask)]
    read = batch.loss_mask  # what the clean rows predict
    if settings.objective == "joint":
        read = ~natural if read is None else read & ~natural
    pattern = annealing(settings, step, rows, network.device)

    def loss_of(corruption: Corruption) -> LossOutput:
        given = (network, config, batch.x0, batch.layout, corruption)
        if settings.objective == "joint":
            return joint_loss(*given, settings.alpha, read, teacher=teacher, distance=settings.distance,
                              top_k=settings.teacher_top_k)  # fmt: skip
        if settings.objective == "distill":
            return distill_loss(*given, settings.distance, batch.loss_mask, top_k=settings.teacher_top_k)
        return diffusion_loss(*given, pattern, batch.loss_mask)

    ce = settings.objective == "diffusion" or (settings.objective == "joint" and settings.distance == "ce")
    plain = pattern is None and teacher is None and settings.loss_normaliser == "tokens"
    plain = plain and not settings.gradient_checkpointing and not settings.compile_layers
    if len(drawn) > 1 and ce and plain and _shares_clean_stream(config):
        alpha = settings.alpha if settings.objective == "joint" else None
        return shared_loss(network, config, batch.x0, batch.layout, drawn, alpha, read)
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


def _shares_clean_stream(config: DiffusionConfig) -> bool:
    """Whether several masks can stand on one pass over the clean tokens."""
    return config.attention == "two_stream" and not config.shift


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
    """What a checkpoint holds besides weights and optimiser.

    loss, counted: sums of the steps since the last row of metrics.jsonl. rows: how many rows that file has, None in
    checkpoints that do not say. skipped: steps without an update, as their loss or gradient was not finite.
    """

    step: int = 0
    tokens: int = 0
    data: PackState = field(default_factory=PackState)
    loss: float = 0.0
    counted: float = 0.0
    rows: int | None = None
    skipped: int = 0


@torch.enable_grad()
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
    teacher: Network | None = None,
    renew: Callable[[int], Corpus] | None = None,
) -> TrainState:
    """Train `model`, which is `in_training`, in place and return where it ended. `settings` are resolved ones.

    Checkpoints go to output_dir/checkpoint-<step>, metrics to output_dir/metrics.jsonl. With `resume` the
    newest whole checkpoint is continued, bit for bit as if never interrupted on the same hardware. replicate:
    makes a network with weights shared and gradients apart; with it the rows of a micro-batch are spread over
    the threads of a CPU. teacher: of the joint objective. renew: called with the step at each multiple of
    `self_every` for the data from there on; called again with the same step after an interruption.
    """
    assert settings.max_length is not None
    assert settings.batch_size is not None
    assert settings.micro_batch_size is not None
    AcceleratorState._reset_state()  # else the precision of the first run in a process would bind all others
    accelerator = accelerate.Accelerator(
        mixed_precision=settings.mixed_precision, log_with=settings.report_to, project_dir=str(output_dir)
    )
    if settings.report_to:
        accelerator.init_trackers("unmask", config={k: str(v) for k, v in asdict(settings).items()})
    wrapped, optimizer = _prepare(accelerator, model, _optimizer(model, settings))
    network = make_network(wrapped)
    on_cpu = accelerator.device.type == "cpu" and accelerator.num_processes == 1
    crew = _Crew(network, replicate) if replicate is not None and on_cpu and torch.get_num_threads() > 1 else None

    state = TrainState()
    newest = newest_whole(output_dir) if resume else None
    if newest is not None:
        try:
            accelerator.load_state(str(newest))
        except (RuntimeError, KeyError, ValueError, OSError, EOFError) as error:
            what = " ".join(str(error).split())[:300]
            raise ValueError(f"{str(newest)!r} does not fit this run ({what}): remove it to go on from an earlier one"
                             ) from error  # fmt: skip
        state = read_state(newest)
    if accelerator.is_main_process:
        _trim_metrics(output_dir / "metrics.jsonl", state)

    goal = token_goal(settings, source)
    total_steps = count_steps(settings, source)
    eval_every = settings.eval_every or max(1, total_steps // 10)
    epochs = None if settings.max_tokens is not None else 1
    packer = Packer(source, settings.max_length, seed=settings.seed, epochs=epochs, state=state.data)
    every, begun = settings.self_every or max(1, total_steps) * 10**6, None  # begun: where the present data did
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = settings.batch_size // ranks
    averaged = ranks if accelerator.distributed_type in _SHARDED else 1
    # Kept on the device, the batch on the host: a step waits for nothing, a log line for its figures.
    zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    summed = zero + (state.loss if accelerator.is_main_process else 0.0)
    counted, since, tokens_since = zero + state.counted, time.perf_counter(), 0
    watch = StepWatch(settings.max_nonfinite_steps, state.skipped)
    while state.tokens < goal:
        if renew is not None and begun != state.step - state.step % every:
            begun = state.step - state.step % every
            where = PackState() if state.step == begun else state.data
            wrapped.eval()
            packer = Packer(renew(begun), settings.max_length, seed=settings.seed, state=where)
            wrapped.train()
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
        step_sum = zero.clone()
        for start, micro in _micro_batches(mine, settings.micro_batch_size):
            rows = torch.arange(len(micro.x0)) + rank * share + start
            last = start + settings.micro_batch_size >= len(mine.x0)
            if count and not bool(predictable(micro.layout, micro.loss_mask).any()):
                continue  # the end of the data may leave a rank nothing but padding
            if crew is not None:
                micro_step = functools.partial(step_loss, settings=now, config=config, step=state.step)
                step_sum += crew.run(micro_step, micro, rows, 1 / max(1, count))
                continue
            with accelerator.autocast(), _sync(accelerator, wrapped, last):
                loss = step_loss(network, now, config, micro, state.step, rows, teacher)
                accelerator.backward(loss.sum * (averaged / max(1, count)))
            step_sum += loss.sum.detach()
        if averaged == 1:
            add_gradients(wrapped.parameters())
        norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm)
        everywhere = accelerator.reduce(step_sum.clone()) if ranks > 1 else step_sum
        scaled = accelerator.scaler is not None
        finite = watch.look(state.step + 1, rate, everywhere, norm, scaled=scaled)
        if not scaled:  # skipped on the device, where the optimiser's own kernel heeds this
            optimizer.optimizer.found_inf = (~finite).float()
        optimizer.step()
        optimizer.zero_grad()
        state = replace(state, step=state.step + 1, tokens=state.tokens + full.num_tokens, data=packer.state)

        summed += torch.where(finite, step_sum, zero)
        counted += finite.double() * count
        watch.settle(but_last=accelerator.device.type == "cuda")
        tokens_since += full.num_tokens
        ended = state.tokens >= goal
        evaluating = evaluate is not None and state.step % eval_every == 0 and not ended
        evaluation: dict[str, float] = {}
        saving = state.step % settings.save_every == 0 or ended
        if evaluating or saving:
            watch.settle()
            check_weights(model, f"step {state.step} at learning rate {rate:.3g}")
        if evaluate is not None and evaluating and accelerator.is_main_process:
            before = time.perf_counter()
            wrapped.eval()
            evaluation = evaluate(accelerator.unwrap_model(wrapped))
            wrapped.train()
            since += time.perf_counter() - before
        if state.step % settings.log_every == 0 or evaluating or ended:
            watch.settle()
            loss_now = float(accelerator.reduce(summed)) / max(1.0, float(counted))
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
            counted.zero_()
            since, tokens_since = time.perf_counter(), 0
        if saving:
            # The main process takes the sum of all over, as it will after a resume.
            total = float(accelerator.reduce(summed.clone()))
            summed.fill_(total if accelerator.is_main_process else 0.0)
            logged = _count_rows(output_dir / "metrics.jsonl") if accelerator.is_main_process else None
            state = replace(state, loss=total, counted=float(counted), rows=logged, skipped=watch.skipped)
            save_checkpoint(accelerator, output_dir, state, settings.keep_checkpoints)
    watch.settle()
    if crew is not None:
        crew.pool.shutdown()
    for tracker in accelerator.trackers:  # not `end_training`, which takes the process group away from the caller
        tracker.finish()
    return state


@contextmanager
def in_training(model: Any, settings: Settings) -> Iterator[None]:
    """Within the context the model trains as the settings say; after it, however it ends, it is a stock one again."""
    model.train()
    try:
        if settings.gradient_checkpointing:
            hf.checkpoint_layers(model)
        if settings.compile_layers:
            compile_layers(model)
        yield
    finally:
        model.eval()
        model.zero_grad()
        if settings.gradient_checkpointing:
            hf.checkpoint_layers(model, on=False)
        if settings.compile_layers:
            compile_layers(model, on=False)


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
                    parameter.grad = twin.grad if parameter.grad is None else parameter.grad.add_(twin.grad)
                    twin.grad = None
        return torch.stack(sums).sum()


def _micro_batches(batch: Batch, size: int) -> Iterator[tuple[int, Batch]]:
    for start in range(0, len(batch.x0), size):
        yield start, batch.rows(start, start + size)


_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Where a wrapper of Accelerate's averages the gradients of ranks itself."""


def _prepare(accelerator: accelerate.Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Model and optimiser on the device and known to the accelerator, the model's forward left as it was."""
    forward = model.__dict__.get("forward")
    if accelerator.distributed_type in _SHARDED:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    else:
        wrapped, optimizer = accelerator.prepare_model(model, evaluation_mode=True), accelerator.prepare(optimizer)
        share_weights(model)
    # Steps enter autocast themselves. Accelerate's own wrapper would stay on the model, and its way to take it off
    # takes the model's decorators along, without which the cache is not returned.
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)
    if forward is not None:  # a hook's, of a model spread over devices
        model.forward = forward
    return wrapped, optimizer


def check_machine(settings: Settings, ranks: int, device: torch.device) -> None:
    """Raise ValueError where a step's rows cannot be shared out evenly, or a device lacks the precision."""
    assert settings.batch_size is not None
    if settings.mixed_precision == "fp16" and device.type == "cpu":
        raise ValueError("mixed_precision='fp16' needs a GPU: use 'bf16' or 'no' on a CPU")
    if settings.batch_size % ranks:
        raise ValueError(
            f"batch_size={settings.batch_size} is no multiple of the {ranks} processes: give one that is, such as "
            f"batch_size={ranks * max(1, round(settings.batch_size / ranks))}"
        )


def _sync(accelerator: accelerate.Accelerator, model: Any, last: bool) -> Any:
    """Gradients travel between ranks with the last micro-batch only."""
    return nullcontext() if last else accelerator.no_sync(model)


# --- what a run leaves on disk


def append_metrics(output_dir: Path, row: dict[str, Any]) -> None:
    path = output_dir / "metrics.jsonl"
    with writing(path), path.open("a") as file:
        file.write(to_json(row) + "\n")


def _count_rows(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def _trim_metrics(path: Path, state: TrainState) -> None:
    """Drop rows that were written after `state`: they will be written again."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = []
    for row in rows[: state.rows]:
        try:
            if json.loads(row)["step"] <= state.step:
                kept.append(row)
        except json.JSONDecodeError:  # a line cut by the interruption
            continue
    write_text(path, "".join(row + "\n" for row in kept))


def save_checkpoint(accelerator: accelerate.Accelerator, output_dir: Path, state: TrainState, keep: int) -> None:
    """Write checkpoint-<step> whole or not at all, and drop the oldest beyond `keep`."""
    final = output_dir / f"checkpoint-{state.step}"
    partial = output_dir / f"checkpoint-{state.step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        with writing(final):
            accelerator.save_state(str(partial))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # its space may be what is lacking
        raise
    accelerator.wait_for_everyone()  # each wrote a file of its own into the folder
    if accelerator.is_main_process:
        try:
            with writing(final):
                if (output_dir / "metrics.jsonl").exists():
                    sync(output_dir / "metrics.jsonl")
                write_text(partial / "state.json", to_json(asdict(state)))
                seal(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        put_in_place(partial, final, state.step, keep)
    accelerator.wait_for_everyone()


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return newest_whole(output_dir, quiet=True)


def read_state(checkpoint: Path) -> TrainState:
    raw = json.loads((checkpoint / "state.json").read_text())
    return TrainState(**(raw | {"data": PackState(**raw["data"])}))
