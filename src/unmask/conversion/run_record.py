"""run.json of a training run: how it is read, and whether two records are of the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmask.recipe import under_current_names
from unmask.run_folder import RunFolder
from unmask.settings import TABLE, unmet

IN_MEMORY = "a model in memory"
"""The name in run.json of a parent that was passed as an object and has no name."""

FREE = ("log_every", "eval_every", "save_every", "keep_checkpoints", "report_to", "micro_batch_size",
        "max_nonfinite_steps", "rank_timeout", "attn_implementation", "sync_each_micro_batch", "eval_data",
        "eval_documents", "eval_samples", "sample_texts", "save_dtype")  # fmt: skip
"""Settings that may change when a run is resumed."""


def parent_in(folder: Path) -> str | None:
    """The name of the parent in the run.json of a folder; None without one, and for a parent that had no name."""
    record = folder / "run.json"
    name = json.loads(record.read_text(encoding="utf-8")).get("parent", {}).get("name") if record.is_file() else None
    return None if not name or name == IN_MEMORY else str(name)


def training_folder(path: Path) -> RunFolder:
    """The folder of a training run: run.json, and metrics.jsonl with a row for each log step."""
    return RunFolder(path, "run.json", "metrics.jsonl", ("parent", "settings", "data"))


def read_earlier(folder: RunFolder, resume: bool) -> dict[str, Any] | None:
    """run.json of the run in the folder, None if there is none; ValueError if there is one and `resume` is False."""
    if folder.holds_run and not resume:
        raise ValueError(
            f"output folder {str(folder.path)!r} already holds a run: continue it with --resume, or choose another"
        )
    record = folder.read()
    return None if record is None else record | {"settings": under_current_names(record["settings"])}


def check_same_run(folder: RunFolder, earlier: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise ValueError for the first value in which `run` differs from the earlier run of its folder."""
    before, now = _identity(earlier), _identity(run)
    settings = run["settings"]
    free = {name for name in TABLE if name in FREE or unmet(name, settings) is not None}
    if settings["loss_normaliser"] == "masked" or settings["anneal_redraw"]:
        free.discard("micro_batch_size")  # it is a part of these two
    if extends(earlier, now["max_tokens"]):
        free.add("max_tokens")
    free |= {name for name in ("model", "teacher") if _same_weights(before[name], now[name])}
    if before["data"] == now["data"]:
        free.add("self_prompts")  # the same text, wherever its file is
    folder.refuse_another("a different run", before, {key: value for key, value in now.items() if key not in free})


def extends(earlier: dict[str, Any], max_tokens: int | None) -> bool:
    """Whether max_tokens is more than the earlier run had, or was started with."""
    before = earlier["settings"].get("max_tokens") or earlier.get("tokens")
    return max_tokens is not None and before is not None and max_tokens > before


def _same_weights(before: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whether two models have the same weights, whatever their paths; None is no model."""
    if before is None or now is None:
        return before is now
    if before.get("fingerprint") is None:  # an older version recorded a teacher's name alone
        return Path(before["name"]).resolve() == Path(now["name"]).resolve()
    return bool(before["fingerprint"] == now["fingerprint"])


def _identity(run: dict[str, Any]) -> dict[str, Any]:
    """Name -> value of everything that must not change when a run is resumed."""
    held_out = "number of documents held out of training (eval_documents, eval_data)"
    settings, data = run["settings"], run["data"]
    named = None if settings.get("teacher") is None else {"name": settings["teacher"]}
    return settings | {
        "teacher": run.get("teacher", named),
        "model": run["parent"],
        "data": data["fingerprint"],
        held_out: data.get("held_out"),
    }
