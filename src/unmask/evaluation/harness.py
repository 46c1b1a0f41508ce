"""A run of lm-evaluation-harness tasks, from names to figures: what `evaluate --tasks` does."""

from __future__ import annotations

import contextlib
import difflib
import os
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval import evaluator, utils
from lm_eval.tasks import TaskManager

from unmask.limits import LARGEST, check_number, check_whole
from unmask.plain_json import to_json
from unmask.run_folder import write_text

_TASK_FILES = ("", ".yaml", ".yml")
"""How names of the harness's task files end."""

_MOST_EXAMPLES = 1000
"""Solved examples in a prompt, at most."""


def load_tasks(names: Sequence[str], folder: str | None = None) -> dict[str, Any]:
    """Tasks and groups by name, pattern (mmlu_*) or .yaml file; `folder` holds task files besides the harness's."""
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"tasks folder {folder!r} does not exist")
    manager = TaskManager(include_path=folder, include_defaults=False)
    of_harness = [name for name in names if not os.path.isfile(name) and not manager.match_tasks([name])]
    if of_harness:
        _refuse_misspelt(of_harness, manager.all_tasks)
        manager = TaskManager(include_path=folder)  # the harness's own 14,000 take seconds to read
    chosen: list[str] = []
    for name in names:
        found = [name] if os.path.isfile(name) else manager.match_tasks([name])
        if not found:
            raise _no_such_task(name, difflib.get_close_matches(name, manager.all_tasks, 5))
        chosen += [n for n in found if n not in chosen]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return manager.load(chosen)
    except Exception as error:  # reading a data set fails in the ways of files, parsers and networks
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise ValueError(f"tasks {', '.join(chosen)} cannot be loaded: {type(error).__name__}: {reason}") from error


def _refuse_misspelt(names: Sequence[str], own: Sequence[str]) -> None:
    """Raise ValueError for a name that no task file of the harness has in it, but a like one: without parsing them."""
    folder = Path(lm_eval.tasks.__file__).parent
    files = [path for path in folder.rglob("*") if path.suffix in _TASK_FILES and path.is_file()]
    text = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)
    for name in names:
        if name in text or set(name) & set("*?["):
            continue
        named = set(re.findall(r"""["']?(?:task|group|tag)["']?\s*:\s*["']?([\w./-]+)""", text))
        near = difflib.get_close_matches(name, [*own, *named], 5)
        if near:
            raise _no_such_task(name, near)


def _no_such_task(name: str, near: Sequence[str]) -> ValueError:
    hint = f"near names are {', '.join(near)}" if near else "`lm_eval ls tasks` lists the harness's own"
    return ValueError(f"task {name!r} does not exist: {hint}; your own task files are found with --tasks-folder")


def run_tasks(
    model: Any,
    tasks: dict[str, Any],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    gen_kwargs: str | dict[str, Any] | None = None,
    apply_chat_template: bool = False,
    fewshot_seed: int = 1234,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Run what `load_tasks` gave; the harness's results, and beside them `model` (estimator, samples ...) and `costs`.

    model: a `HarnessLM`, or what has its tokenizer, information and costs.
    As `lm_eval.simple_evaluate` with its own defaults, but for 1,000 bootstrap draws where a standard error
    has no formula. limit: documents of each task, or their share if below 1. gen_kwargs: in place of a task's
    own settings of generation, as a dict or "name=value,...".
    """
    check_number("limit", limit)
    if limit is not None and not (0 < limit < 1 or (1 <= limit <= LARGEST and limit == int(limit))):
        raise ValueError(f"limit {limit} must be above 0: a number of documents, or a share below 1")
    check_whole("num_fewshot", num_fewshot, least=0, most=_MOST_EXAMPLES)
    if apply_chat_template and not getattr(model.tokenizer, "chat_template", None):
        raise ValueError("apply_chat_template needs a chat template, and this tokenizer has none: leave it out")
    if isinstance(gen_kwargs, str):
        if not all("=" in pair for pair in gen_kwargs.split(",")):
            raise ValueError(f"gen_kwargs {gen_kwargs!r} must be name=value pairs with commas between")
        gen_kwargs = utils.simple_parse_args_string(gen_kwargs)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrap here: forking a process that runs torch may hang
    random.seed(0)
    for task in tasks["tasks"].values():
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config(key="generation_kwargs", value=gen_kwargs, update=True)
        of_task = task.get_config("num_fewshot")
        if of_task is None or (num_fewshot is not None and of_task != 0):  # a task that says 0 stays at 0
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=fewshot_seed)
    with contextlib.redirect_stdout(sys.stderr):
        results: dict[str, Any] = evaluator.evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=1000,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
    costs = {name: asdict(cost) | {"tokens_per_forward": cost.tokens_per_forward} for name, cost in model.costs.items()}
    return results | {"model": model.get_model_info(), "costs": costs}


def write_results(results: dict[str, Any], folder: Path) -> None:
    """results.json, and every document with the model's answers in samples_TASK.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: value for name, value in results.items() if name != "samples"}
    write_text(folder / "results.json", to_json(figures, indent=2, default=str) + "\n")
    for task, samples in results["samples"].items():
        lines = "".join(to_json(sample, default=str) + "\n" for sample in samples)
        write_text(folder / f"samples_{utils.sanitize_task_name(task)}.jsonl", lines)


def table(results: dict[str, Any]) -> str:
    """The figures of `run_tasks` as lines to read."""
    lines = ["  ".join(f"{name} {value}" for name, value in results["model"].items() if value is not None)]
    for task, values in (results["results"] | results.get("groups", {})).items():
        for metric, figure in values.items():
            name, _, filter_name = metric.partition(",")
            if isinstance(figure, float) and not name.endswith("_stderr"):
                error = values.get(f"{name}_stderr,{filter_name}")
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                suffix = "" if filter_name == "none" else f" ({filter_name})"
                lines.append(f"{task:20} {name:14} {figure:.4f}{spread}{suffix}")
    for task, cost in results["costs"].items():
        rate = cost["tokens_per_forward"]
        cut = f", {cost['num_truncated']} cut to the context" if cost["num_truncated"] else ""
        lines.append(
            f"{task:20} {cost['num_requests']} requests{cut}, {cost['num_forwards']} forwards"
            + (f", {rate:.2f} tokens per forward" if rate else "")
        )
    return "\n".join(lines)
