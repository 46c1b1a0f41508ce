"""Steps as `adapt` makes them: packed rows with a new layout each step, noise, loss, backward pass, optimiser.

`training.loop` does the same with Accelerate, which a bare machine lacks; tests/test_gpu.py compares both.
"""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from typing import Any

import torch
from gpu_cases import SIZES, STEP_TOKENS, Case
from gpu_measure import (
    Clock,
    document_lengths,
    forget_peak,
    make_model,
    needed_flops,
    peak_gib,
    precision,
    random_ids,
    seconds,
    shares,
    streams_of,
    waits,
)

from unmask import hf
from unmask.core.attention import Layout
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.finite import StepWatch
from unmask.core.objectives import predictable
from unmask.data.corpus import Corpus, Document
from unmask.data.packing import Packer
from unmask.hf.layers import attending_by, compile_layers
from unmask.model import DiffusionLM
from unmask.recipe import load_recipe
from unmask.resolve import Resolved, diffusion_config, resolve, uses_tf32
from unmask.training.optimizer import make_optimizer
from unmask.training.step import learning_rate_at, step_loss
from unmask.training.teacher import freeze
from unmask.version import __version__

MOST = 20
"""Steps that are measured."""


def train(case: Case, clock: Clock, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step after two others: a first one compiles, a second has a new layout."""
    device = options.device
    model = make_model(case.size, device, torch.float32)
    settings = settings_of(case, model)
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    with precision("tf32" if uses_tf32(settings, device, capability) else case.precision):
        steps = Steps(model, settings, corpus_of(case.size, settings))
        first, second = seconds(steps.step), seconds(steps.step)
        waited = waits(steps.step, device)
        forget_peak()
        steps.seen.clear()

        def measured() -> None:
            for _ in clock.rounds(MOST):
                steps.step()
            steps.watch.settle()

        taken = seconds(measured)
    done, tokens = len(steps.seen), sum(int(layout.real.sum()) for layout in steps.seen)
    flops = sum(
        needed_flops(model.config, streams_of(settings, layout), int(layout.real.sum())) for layout in steps.seen
    )
    if not math.isfinite(steps.loss):
        raise ValueError(f"a loss of {steps.loss} after {done + 3} steps")
    return {
        "tokens_per_second": tokens / taken, "seconds_per_step": taken / done,
        **shares(flops / taken, device, case.precision), "peak_gib": peak_gib(), "waits_per_step": waited,
        "first_step_seconds": first, "second_step_seconds": second, "steps": done, "rows": settings.batch_size,
        "length": settings.max_length, "micro_batch_size": settings.micro_batch_size,
        "block_size": settings.block_size, "loss": steps.loss,
    }  # fmt: skip


def settings_of(case: Case, model: Any) -> Resolved:
    """What `adapt` resolves for a recipe on a model of this size, with fewer rows in a step."""
    overrides: dict[str, Any] = {"mixed_precision": "bf16" if case.precision == "bf16" else "no"}
    overrides["attn_implementation"] = {"flex": "flex_attention"}.get(case.attention or "", case.attention)
    overrides |= {"gradient_checkpointing": True} if case.checkpointing else {}
    overrides |= {"compile_layers": True} if case.compiled else {}
    if case.size == "tiny":
        overrides["max_length"] = 128
    parameters = sum(p.numel() for p in model.parameters())

    def resolved(**more: Any) -> Resolved:
        chosen = load_recipe(case.what, **overrides, **more)
        return resolve(chosen, parameters, SIZES[case.size]["max_position_embeddings"], model.config.vocab_size)

    return resolved(batch_size=max(1, STEP_TOKENS[case.size] // resolved().max_length))


def corpus_of(size: str, settings: Resolved) -> Corpus:
    """Random documents, enough for all steps."""
    tokens = (MOST + 4) * settings.batch_size * settings.max_length
    lengths = document_lengths(tokens, min(8192, 4 * settings.max_length))
    documents = random_ids(lengths, SIZES[size]["vocab_size"])
    return Corpus.of([Document(ids.numpy()) for ids in documents], "random")


class Steps:
    """A model that learns. seen: the layouts of its steps."""

    def __init__(self, model: Any, settings: Resolved, corpus: Corpus) -> None:
        self.model, self.settings, self.device = model, settings, model.device
        drafting = settings.objective == "distill"
        mask = model.config.vocab_size - int(not drafting)  # a drafter's has no row in the vocabulary
        self.config = None if settings.attention == "ar" else diffusion_config(settings, mask, __version__)
        hf.without_dropout(model.train())
        self.teacher = None
        if settings.teacher:
            self.teacher = freeze(None, DiffusionLM(model, None), mask, settings)
        self.drafter = drafter = None
        if drafting:
            rows = settings.block_size if settings.mask_per_place else 1
            shape = DrafterConfig(settings.drafter_rank, settings.drafter_scale, settings.drafter_targets, rows)
            self.drafter = drafter = Drafter(model.requires_grad_(False), mask, shape).to(self.device)
        self.models = [model, *([] if self.teacher is None else [self.teacher.model])]
        of_mask = None if self.config is None else mask
        self.network = hf.as_network(model, of_mask, gate=None if drafter is None else drafter.rows)
        if settings.gradient_checkpointing:
            hf.checkpoint_layers(model)
        if settings.compile_layers:
            compile_layers(model)
        self.learning = [p for p in (drafter or model).parameters() if p.requires_grad]
        self.optimizer = make_optimizer(drafter or model, settings)
        self.watch, self.number, self.total = StepWatch(), 0, MOST + 4
        self.batches = Packer(corpus, settings.max_length, seed=settings.seed).batches(settings.batch_size)
        self.seen: list[Layout] = []
        self._loss = torch.zeros((), dtype=torch.float64)

    @property
    def loss(self) -> float:
        """Nats per token of the last step."""
        return float(self._loss)

    def step(self) -> None:
        """One optimiser step, skipped on the device if it is not finite; the host waits for the one before at most."""
        settings, step = self.settings, self.number
        batch, _ = next(self.batches)
        count = int(predictable(batch.layout, batch.loss_mask).sum())
        rate, scale = learning_rate_at(settings, step, self.total), 1 / max(1, count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        summed = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, settings.batch_size, settings.micro_batch_size):
            end = min(start + settings.micro_batch_size, settings.batch_size)
            low = settings.mixed_precision == "bf16"
            computing = torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext()
            with computing, attending_by(settings.attn_implementation, *self.models):
                loss = step_loss(self.network, settings, self.config, batch.rows(start, end), step,
                                 torch.arange(start, end), self.teacher)  # fmt: skip
                (loss.sum * scale).backward()
            summed += loss.sum.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.learning, settings.max_grad_norm)
        finite = self.watch.look(step + 1, rate, summed, norm)
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.watch.settle(but_last=self.device.type == "cuda")
        self._loss, self.number = summed / count, step + 1
        self.seen.append(batch.layout)
