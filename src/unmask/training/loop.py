"""The training loop, on Accelerate.

A run is a function of its settings, its data and its seed: rows come from one stream in a fixed order, noise is a
function of (seed, step, row in the global batch), and the loss is divided by the token count of the whole step. So the
split into micro-batches and ranks changes nothing.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import torch
from torch import Tensor

from unmask import hf
from unmask.core.batch import Batch
from unmask.core.devices import peak_memory, runs_ahead
from unmask.core.drafter import Drafter
from unmask.core.finite import StepWatch, check_weights
from unmask.core.network import DiffusionConfig, Network
from unmask.core.objectives import predictable
from unmask.data.packing import PackState
from unmask.hf.layers import attending_by, compile_layers
from unmask.progress import note
from unmask.resolve import Resolved, at_step
from unmask.run_folder import RunFolder
from unmask.settings import RunSettings
from unmask.training import resharding
from unmask.training.batches import TrainingData
from unmask.training.checkpoints import (
    TrainState,
    drop_later_rows,
    hold_learnt_alone,
    newest_whole,
    read_state,
    save_checkpoint,
)
from unmask.training.devices import SHARDED, accelerator_of, prepare, products_of, syncing
from unmask.training.guards import STOPPED, StepClock, StopRequest, naming_memory
from unmask.training.optimizer import step_if
from unmask.training.ranks import add_gradients, agreeing, by_main
from unmask.training.sharded import is_sharded, run_first, shard, whole
from unmask.training.step import learning_rate_at, step_loss
from unmask.training.threads import ThreadedBackward

Evaluator = Callable[[], dict[str, float]]
"""Returns named figures of the model as it is, for metrics.jsonl."""


@dataclass(frozen=True)
class Progress:
    """The figures of one log step. loss: mean since the last log step, nats per token.

    memory: GiB at most so far, of the device on a GPU, else of this process.
    """

    step: int
    total_steps: int
    tokens: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    evaluation: dict[str, float]
    gradient_norm: float = 0.0
    memory: float = 0.0


@torch.enable_grad()
def train(
    model: Any,
    make_network: Callable[[Any], Network],
    settings: Resolved,
    config: DiffusionConfig | None,
    data: TrainingData,
    folder: RunFolder,
    *,
    resume: bool = False,
    evaluate: Evaluator | None = None,
    report: Callable[[Progress], object] | None = None,
    replicate: Callable[[Any], Any] | None = None,
    teacher: hf.HFNetwork | None = None,
) -> TrainState:
    """Train `model`, which is `in_training`, in place and return the state after the last step.

    Checkpoints go to checkpoint-<step> in the folder, figures to its metrics.jsonl. config: None trains the AR
    model. resume: continue the newest whole checkpoint, on the same hardware bit for bit as if never interrupted.
    evaluate: called every `eval_every` steps on every process. report: called with each log step; False ends the
    run. replicate: makes a network that shares the weights and has gradients of its own; with it the threads of a
    CPU share the rows of a micro-batch. teacher: the frozen AR model of the joint objective. Raises ValueError for
    a checkpoint that does not fit, and when a step or the weights are not finite.
    """
    with StopRequest() as request:
        run = _Run(model, make_network, settings, config, data.num_steps, folder, teacher, replicate, request)
        run.restore(resume)
        _train(run, settings, data, evaluate, report)
    run.close()
    if run.watch.stopping and run.state.tokens < data.num_tokens:
        if run.accelerator.is_main_process:
            note(f"SIGTERM stopped the run after step {run.state.step}, which is saved: go on with --resume")
        raise SystemExit(STOPPED)
    return run.state


def _train(
    run: _Run,
    settings: Resolved,
    data: TrainingData,
    evaluate: Evaluator | None,
    report: Callable[[Progress], object] | None,
) -> None:
    """The steps of a run until its tokens are seen or it is asked to stop; the last one is saved."""
    eval_every = settings.eval_every or max(1, data.num_steps // 10)
    batches = data.batches(run.state.step, run.state.data)
    while run.state.tokens < data.num_tokens and (batch := next(batches, None)) is not None:
        with naming_memory(settings, run.state.step + 1, run.accelerator.num_processes):  # the optimiser needs some too
            run.step(*batch)
        ended = run.state.tokens >= data.num_tokens
        evaluating = evaluate is not None and run.state.step % eval_every == 0 and not ended
        saving = run.state.step % settings.save_every == 0 or ended or run.watch.stopping
        if evaluating or saving:
            run.check_weights()
        figures = run.evaluate(evaluate) if evaluate is not None and evaluating else {}
        stopped = False
        if run.state.step % settings.log_every == 0 or evaluating or ended:
            stopped = not run.log(figures, report)
        if stopped and not saving:
            run.check_weights()
        if saving or stopped:
            run.save()
        if stopped or run.watch.stopping:
            break


class _Run:
    """The state of a run between two steps.

    wrapped: the model as Accelerate has prepared it; network: its network. summed, counted: loss sum and token count
    since the last row of metrics.jsonl, float64 on the device, so that only a log row waits for them.
    """

    def __init__(
        self,
        model: Any,
        make_network: Callable[[Any], Network],
        settings: Resolved,
        config: DiffusionConfig | None,
        total_steps: int,
        folder: RunFolder,
        teacher: hf.HFNetwork | None,
        replicate: Callable[[Any], Any] | None,
        request: StopRequest,
    ) -> None:
        self.accelerator = accelerator = accelerator_of(settings, folder)
        self.model, self.settings, self.config = model, settings, config
        self.total_steps, self.folder, self.teacher = total_steps, folder, teacher
        self.wrapped, self.optimizer = prepare(accelerator, model, settings)
        if hf.quantisation_of(model) is not None:
            hold_learnt_alone(accelerator)
        self.sharded = is_sharded(self.wrapped)
        if self.sharded:
            run_first(model)
            if teacher is not None:
                shard(accelerator, teacher.model)
        self.network = make_network(self.wrapped)
        on_cpu = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        threaded = on_cpu and torch.get_num_threads() > 1
        self.threads = ThreadedBackward(self.network, replicate) if replicate is not None and threaded else None
        self.state = TrainState()
        self.request, self.clock = request, StepClock(settings.rank_timeout)

    def restore(self, resume: bool) -> None:
        """Start from the newest whole checkpoint with `resume`, otherwise from step 0."""
        accelerator, settings = self.accelerator, self.settings
        # As the main process sees the folder: other machines may see it as it was a moment ago.
        newest = by_main(lambda: newest_whole(self.folder.path)) if resume else None
        if newest is not None:
            try:
                resharding.load(accelerator, self.model, self.optimizer, newest)
            except (RuntimeError, KeyError, ValueError, OSError, EOFError) as error:
                what = " ".join(str(error).split())[:300]
                raise ValueError(
                    f"{str(newest)!r} does not fit this run ({what}): remove it to go on from an earlier one"
                ) from error
            self.state = read_state(newest)
        if accelerator.is_main_process:
            drop_later_rows(self.folder, self.state)
        zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self.summed = zero + (self.state.loss if accelerator.is_main_process else 0.0)
        self.counted = zero + self.state.counted
        self.watch = StepWatch(settings.max_nonfinite_steps, self.state.skipped)
        self.logged_at, self.tokens_since_log = time.perf_counter(), 0

    def step(self, batch: Batch, place: PackState) -> None:
        """One optimiser step on the rows of all ranks, skipped if its loss or gradient is not finite.

        place: the place in the data after the batch.
        """
        accelerator, optimizer = self.accelerator, self.optimizer
        rate, place_of_step = self.learning_rate, f"step {self.state.step + 1}"
        self.clock.reach(place_of_step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # Every rank has the rows of all ranks, so the token count needs no communication.
        count = int(predictable(batch.layout, batch.loss_mask).sum())
        loss = self._backward(batch, count)
        self.clock.reach(f"the end of {place_of_step}")
        if accelerator.distributed_type not in SHARDED:
            add_gradients(self.wrapped.parameters())
        norm = whole(accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.max_grad_norm))
        told = torch.stack([loss, loss.new_full((), float(self.request.asked))])
        whole_loss, stop = accelerator.reduce(told) if accelerator.num_processes > 1 else told
        scaled = accelerator.scaler is not None
        finite = self.watch.look(self.state.step + 1, rate, whole_loss, norm, scaled=scaled, stop=stop)
        step_if(optimizer, finite, scaled=scaled)
        self.state = replace(
            self.state, step=self.state.step + 1, tokens=self.state.tokens + batch.num_tokens, data=place
        )
        self.summed += torch.where(finite, loss, torch.zeros_like(loss))
        self.counted += finite.double() * count
        self.tokens_since_log += batch.num_tokens
        self.last_rate = rate
        self.watch.settle(but_last=runs_ahead(accelerator.device))
        self.clock.reach("")

    def _backward(self, batch: Batch, count: int) -> Tensor:
        """Add this rank's gradients, divided by `count`, the tokens of the step; return its loss sum, float64."""
        accelerator, step = self.accelerator, self.state.step
        settings = at_step(self.settings, step, self.total_steps)
        averaged = accelerator.num_processes if accelerator.distributed_type in SHARDED else 1
        scale = averaged / max(1, count)
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        every = settings.sync_each_micro_batch
        for micro, rows, last in _micro_batches(batch, accelerator, settings.micro_batch_size):
            if count and not self.sharded and not bool(predictable(micro.layout, micro.loss_mask).any()):
                continue  # at the end of the data a rank may have padding alone
            if self.threads is not None:
                loss_of = functools.partial(step_loss, settings=settings, config=self.config, step=step)
                total += self.threads.run(loss_of, micro, rows, scale)
                continue
            with self._computing(), syncing(accelerator, self.wrapped, last or every):
                loss = step_loss(self.network, settings, self.config, micro, step, rows, self.teacher,
                                 sharded=self.sharded)  # fmt: skip
                accelerator.backward(loss.sum * scale)
            total += loss.sum.detach()
        return total

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Within the context passes compute in the precision, and attend in the way, that the settings say."""
        models = [self.model, *([] if self.teacher is None else [self.teacher.model])]
        with self.accelerator.autocast(), attending_by(self.settings.attn_implementation, *models):
            yield

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate_at(self.settings, self.state.step, self.total_steps)

    def check_weights(self) -> None:
        """Raise ValueError if a step or the weights are not finite."""
        self.watch.settle()
        with agreeing():
            check_weights(self.model, f"step {self.state.step} at learning rate {self.last_rate:.3g}")

    def evaluate(self, evaluate: Evaluator) -> dict[str, float]:
        """Held-out figures of the current model, on all processes; tokens per second leave out the time it takes."""
        before = time.perf_counter()
        self.wrapped.eval()
        figures = evaluate()
        self.wrapped.train()
        self.logged_at += time.perf_counter() - before
        return figures

    def log(self, figures: dict[str, float], report: Callable[[Progress], object] | None) -> bool:
        """Write a row of metrics.jsonl, the mean loss since the last row and `figures`, and report it.

        Returns whether the run goes on, on every rank: no report was False.
        """
        self.watch.settle()
        state, rate = self.state, self.last_rate
        loss = float(self.accelerator.reduce(self.summed)) / max(1.0, float(self.counted))
        speed = self.tokens_since_log / max(1e-9, time.perf_counter() - self.logged_at)
        goes_on = torch.ones((), device=self.accelerator.device)
        if self.accelerator.is_main_process:
            self.folder.append(
                {"step": state.step, "tokens": state.tokens, "loss": loss, "learning_rate": rate, **figures}
            )
            if report is not None:
                steps = max(self.total_steps, state.step)
                progress = Progress(state.step, steps, state.tokens, loss, rate, speed, figures, self.watch.norm,
                                    (peak_memory(self.accelerator.device) or 0) / 2**30)  # fmt: skip
                goes_on.fill_(report(progress) is not False)
        self.summed.zero_()
        self.counted.zero_()
        self.logged_at, self.tokens_since_log = time.perf_counter(), 0
        ranks = self.accelerator.num_processes
        return bool(goes_on) if ranks == 1 else bool(self.accelerator.reduce(goes_on) == ranks)

    def save(self) -> None:
        """Write a checkpoint. The main process takes the sums of all ranks, as it does after a resume."""
        accelerator = self.accelerator
        total = float(accelerator.reduce(self.summed.clone()))
        self.summed.fill_(total if accelerator.is_main_process else 0.0)
        rows = len(self.folder.read_rows()) if accelerator.is_main_process else None
        self.state = replace(self.state, loss=total, counted=float(self.counted), rows=rows, skipped=self.watch.skipped)
        save_checkpoint(accelerator, self.folder, self.state, self.settings.keep_checkpoints)

    def close(self) -> None:
        """Check the last step, and end threads."""
        self.watch.settle()
        self.clock.close()
        if self.threads is not None:
            self.threads.close()


def _micro_batches(
    batch: Batch, accelerator: accelerate.Accelerator, size: int
) -> Iterator[tuple[Batch, Tensor, bool]]:
    """This rank's rows, `size` at a time, with their numbers in the global batch and whether they are the last."""
    share = len(batch.x0) // accelerator.num_processes
    first = accelerator.process_index * share
    for start in range(first, first + share, size):
        end = min(start + size, first + share)
        yield batch.rows(start, end), torch.arange(start, end), end == first + share


@contextmanager
def in_training(model: Any, settings: RunSettings, drafter: Drafter | None = None) -> Iterator[None]:
    """Within the context the model trains, with recomputed or compiled layers if the settings say so.

    drafter: the only part that trains, the model being its frozen base. After the context, also after an error, the
    model is in eval mode, without gradients, and its layers are as they were.
    """
    with _trained_alone(model, drafter):
        model.train()
        try:
            if settings.gradient_checkpointing:
                hf.checkpoint_layers(model, compiled=settings.compile_layers)
            if settings.compile_layers:
                compile_layers(model)
            with products_of(settings):
                yield
        finally:
            model.eval()
            model.zero_grad()
            if settings.gradient_checkpointing:
                hf.checkpoint_layers(model, on=False, compiled=settings.compile_layers)
            if settings.compile_layers:
                compile_layers(model, on=False)


@contextmanager
def _trained_alone(model: Any, drafter: Drafter | None) -> Iterator[None]:
    """Within the context the drafter is a part of the model, and no other parameter requires a gradient."""
    if drafter is None:
        yield
        return
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    model.requires_grad_(False)
    model.add_module("drafter", drafter)
    try:
        yield
    finally:
        del model.drafter
        for name in learning:  # perhaps another one than it was, see `sharded`
            model.get_parameter(name).requires_grad_(True)
