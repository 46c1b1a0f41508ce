"""`adapt`: turn a causal LM into a diffusion LM by training it on text.

One function a step, in this order: plan and load_parent (job), read_text (text), describe and holds_finished (run),
hold_out (text), convert (learner), claim_folder (run), learn and finish (learner).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Unpack

from unmask.conversion.job import load_parent, plan
from unmask.conversion.learner import begins_at, convert, finish, learn, parent_nll, parent_text
from unmask.conversion.reports import Callback
from unmask.conversion.run import claim_folder, describe, holds_finished
from unmask.conversion.run_record import training_folder
from unmask.conversion.text import hold_out, read_text
from unmask.conversion.trackers import tracking
from unmask.loading import load
from unmask.model import DiffusionLM
from unmask.settings import SettingsKeywords
from unmask.training.devices import in_shards
from unmask.training.ranks import join, sharding, use_device


def adapt(
    model: str | Path | DiffusionLM,
    data: str | Path | Iterable[Any],
    recipe: str | None = None,
    output_dir: str | Path = "runs/adapted",
    *,
    resume: bool = False,
    show_progress: bool = True,
    base: str | Path | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    callbacks: Sequence[Callback] = (),
    **settings: Unpack[SettingsKeywords],
) -> DiffusionLM:
    """Turn a causal LM into what `recipe` says, by training it on `data`, and save it to `output_dir`.

    model: folder, hub id or a loaded model, which is trained in place. data: .txt, .jsonl or .parquet files, folders of
    them or of prepared data (with a weight as NAME:WEIGHT, for a mixture), one hub id, a `Dataset` or `IterableDataset`
    of `datasets`, a list of texts or of records (dicts), or "self" (with self_prompts): text that the model itself
    writes. recipe: tri-mode by default; without one a converted model keeps its recipe, attention, shift and block
    size. settings: replace those of the recipe. resume: continue the run in output_dir from its newest checkpoint; a
    finished run is loaded and returned, or extended by a larger max_tokens. base, trust_remote_code: of `load`. device:
    where it trains, by default a GPU if there is one; with several processes their launcher decides. callbacks: called
    with the `Progress` of each log step, on the main process; one that returns False ends the run there, saved and
    finished. Returns the adapted model, in eval mode. Raises ValueError for what cannot work, mostly before
    output_dir is written to.
    """
    use_device(device)
    folder = training_folder(Path(output_dir))
    job = plan(model, data, recipe, {**settings}, folder, resume, show_progress, base, trust_remote_code, callbacks)
    parent = load_parent(job)
    with in_shards(parent.lm.model, parent.settings, folder):
        text = read_text(job, parent)
        run = describe(job, parent, text)
        if holds_finished(job, run):
            return load(folder.path, device="cpu" if sharding() else None, trust_remote_code=trust_remote_code)
        corpus = hold_out(job, parent, text)
        run["parent_nll"] = parent_nll(job, parent, corpus)
        run["parent_text"] = parent_text(job, parent, corpus)
    learner = convert(job, parent)
    run |= learner.record
    with claim_folder(job, run):
        start = begins_at(job)
        with tracking(parent.settings, folder.path, start) as track:
            state = learn(job, parent, learner, corpus, start, track)
            finish(job, parent, learner, corpus, state, run, track)
    join().wait_for_everyone()
    learner.lm.model.config._name_or_path = str(folder.path)
    return learner.lm
