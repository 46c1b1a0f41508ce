"""`adapt`: from a causal LM and text to a converted checkpoint, in one sentence for each step on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unmask.conversion.job import load_parent, plan
from unmask.conversion.learner import convert, finish, learn
from unmask.conversion.run import begun, describe, holds_finished
from unmask.conversion.run_record import training_folder
from unmask.conversion.text import hold_out, read_text
from unmask.loading import load
from unmask.model import DiffusionLM
from unmask.training.ranks import join


def adapt(
    model: str | Path | DiffusionLM,
    data: str | Path | Sequence[str | Path],
    recipe: str | None = None,
    output_dir: str | Path = "runs/adapted",
    *,
    resume: bool = False,
    show_progress: bool = True,
    trust_remote_code: bool = False,
    **settings: Any,
) -> DiffusionLM:
    """Turn a causal LM into what `recipe` says, by training it on `data`, and save it to `output_dir`.

    recipe: by default efficient-dlm; a converted model goes on as what it is (recipe, attention, shift, block size) but
    for what is set here, and a recipe sets all of it. model: folder, hub id or a loaded model (trained in place).
    data: .txt, .jsonl or .parquet files, folders of them, one hub id, or "self" (with self_prompts): text that the
    model itself writes. settings: any of the recipe's, overriding it. resume: go on from the newest checkpoint of the
    same run; a finished run is loaded and returned, or extended by a larger max_tokens. trust_remote_code: run Python
    code that the model's folder brings. Returns the adapted model, in eval mode.
    """
    folder = training_folder(Path(output_dir))
    job = plan(model, data, recipe, settings, folder, resume, show_progress, trust_remote_code)
    parent = load_parent(job)
    text = read_text(job, parent)
    run = describe(job, parent, text)
    if holds_finished(job, run):
        return load(folder.path, trust_remote_code=trust_remote_code)
    corpus = hold_out(job, parent, text)
    learner = convert(job, parent)
    run |= learner.record
    with begun(job, run):
        state = learn(job, parent, learner, corpus)
        finish(job, parent, learner, corpus, state, run)
    join().wait_for_everyone()
    learner.lm.model.config._name_or_path = str(folder.path)
    return learner.lm
