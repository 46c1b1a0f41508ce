"""What a run of `adapt` would do: everything up to its first step, and nothing of it is written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from unmask import plan
from unmask.conversion.job import load_parent
from unmask.conversion.job import plan as plan_job
from unmask.conversion.run_record import training_folder
from unmask.conversion.text import hold_out, read_text
from unmask.data.packing import PackState
from unmask.hf.sizes import sizes_of_model
from unmask.model import DiffusionLM
from unmask.settings import SettingsKeywords, to_plain
from unmask.training.ranks import use_device


@dataclass(frozen=True)
class DryRun:
    """settings: resolved. documents, held_out: numbers, documents of a stream are None. steps, tokens: of the run.

    rows: texts of the first rows, padding left out. memory: estimated bytes of one device, by part (`plan.Memory`).
    """

    settings: dict[str, Any]
    documents: int | None
    held_out: int
    steps: int
    tokens: int
    rows: list[str]
    memory: plan.Memory


def dry_run(
    model: str | Path | DiffusionLM,
    data: str | Path | Iterable[Any],
    recipe: str | None = None,
    *,
    num_rows: int = 2,
    show_progress: bool = True,
    base: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    **settings: Unpack[SettingsKeywords],
) -> DryRun:
    """Read the model and the data of a run as `adapt` does, and say what it would do. Arguments: those of `adapt`.

    Raises what `adapt` would raise before its first step. Text of the model's own (data "self") is not written: its
    prompts are read.
    """
    use_device(device)
    with tempfile.TemporaryDirectory() as folder:
        job = plan_job(
            model, data, recipe, {**settings}, training_folder(Path(folder) / "run"), False, show_progress, base,
            trust_remote_code,
        )  # fmt: skip
        parent = load_parent(job)
        if parent.settings.self_prompts is not None:
            raise ValueError("data 'self' is written by the model in the run itself: a dry run has no rows to show")
        corpus = hold_out(job, parent, read_text(job, parent))
        run, tokenizer = parent.settings, parent.lm.tokenizer
        batch, _ = next(iter(corpus.rows.batches(0, PackState())))
        shown = zip(batch.x0[:num_rows], batch.layout.real[:num_rows], strict=True)
        rows = [tokenizer.decode(ids[real]) for ids, real in shown]
        documents = len(corpus.text) if hasattr(corpus.text, "__len__") else None
        memory = plan.memory_of(sizes_of_model(parent.lm.model), run, plan.LAYOUTS[0], 1, run.micro_batch_size)
        return DryRun(
            to_plain(run), documents, len(corpus.held_out), corpus.rows.num_steps, corpus.rows.num_tokens, rows, memory
        )
