"""Tasks of lm-evaluation-harness in parts: the answers to the documents of a part, and all answers back to figures.

Every part builds all prompts, since solved examples are drawn document after document, and answers those of its own
documents. Figures come from the harness itself, which asks again when all parts are there and gets the kept answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from unmask.data.prompts import chat_text
from unmask.evaluation.figures import fingerprint
from unmask.evaluation.harness import run_tasks
from unmask.evaluation.lm_eval import Cost, HarnessLM
from unmask.parts import Shard, Whole
from unmask.version import __version__


class _AllAnswered(Exception):
    """Ends a run of the harness: there is nothing left to ask."""


class _Asked(LM):
    """A model of the harness that answers each kind of request by `_answer`."""

    tokenizer_name = ""  # of caches of prompts, which are not used

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[Any]:
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        raise NotImplementedError


class _Recorder(_Asked):
    """Answers the requests of a part's documents with `model`, and keeps the answers as rows."""

    def __init__(self, model: HarnessLM, shard: Shard, tasks: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.tokenizer, self.costs = model, model.tokenizer, model.costs
        self.shard, self.tasks, self.rows = shard, tasks, list[dict[str, Any]]()
        self._kinds: set[str] = set()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.model.apply_chat_template(chat_history, add_generation_prompt)

    def _answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        own = [request for request in requests if self.shard.takes(request.doc_id)]
        for request, answer in zip(own, getattr(self.model, kind)(own) if own else [], strict=True):
            self.rows.append(_row(request) | {"asked": _hash(request), "answer": answer})
        self._kinds.add(kind)
        if self._kinds >= {request.request_type for task in self.tasks["tasks"].values() for request in task.instances}:
            raise _AllAnswered
        return [None] * len(requests)


class _Replay(_Asked):
    """Answers all requests as the rows of all parts say."""

    def __init__(self, whole: Whole, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer, self._info = tokenizer, whole.record["estimator"]
        self.costs = _summed([run["costs"] for run, _ in whole.parts])
        self._kept: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in whole.rows:
            self._kept.setdefault(_key(row), []).append(row)

    def get_model_info(self) -> dict[str, Any]:
        return self._info

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def _answer(self, _kind: str, requests: list[Instance]) -> list[Any]:
        return [tuple(answer) if isinstance(answer, list) else answer for answer in map(self._next, requests)]

    def _next(self, request: Instance) -> Any:
        kept = self._kept.get(_key(_row(request)))
        if not kept or kept[0]["asked"] != _hash(request):
            raise ValueError(
                f"task {request.task_name!r}: the parts have no answer to what document {request.doc_id + 1} asks now, "
                "so the task's files or the harness have changed: run the parts again"
            )
        return kept.pop(0)["answer"]


def describe(
    name: str,
    model: HarnessLM,
    tasks: Sequence[str],
    tasks_folder: str | None,
    options: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> dict[str, Any]:
    """What run.json says of the measurement. tasks, tasks_folder: of `load_tasks`; options: of `run_tasks`."""
    return {
        "measured": "tasks",
        "model": name,
        "model_fingerprint": fingerprint(model.lm),
        "loading": {key: loading[key] for key in ("base", "trust_remote_code") if key in loading},
        "dtype": str(model.lm.model.dtype).removeprefix("torch."),
        "tasks": list(tasks),
        "tasks_folder": tasks_folder and str(tasks_folder),
        "options": dict(options),
        "estimator": model.get_model_info(),
        "decoding": {key: str(value) for key, value in model.decoding.items()},
        "versions": {"unmask": __version__, "torch": torch.__version__, "lm_eval": version("lm_eval")},
    }


def answers(
    model: HarnessLM, tasks: dict[str, Any], shard: Shard, **options: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the answers to a part's documents, and what they cost by task. options: those of `run_tasks`."""
    recorder = _Recorder(model, shard, tasks)
    with suppress(_AllAnswered):
        run_tasks(recorder, tasks, **options)
    return recorder.rows, {name: asdict(cost) for name, cost in model.costs.items()}


def results_of(whole: Whole, tasks: dict[str, Any], tokenizer: Any = None) -> dict[str, Any]:
    """What `run_tasks` gives for all documents at once. tokenizer: the model's, where a chat template is applied."""
    return run_tasks(_Replay(whole, tokenizer), tasks, **whole.record["options"])


def _summed(costs: Sequence[Mapping[str, Mapping[str, int]]]) -> dict[str, Cost]:
    """The costs of all parts, by task."""
    total: dict[str, Cost] = {}
    for of_part in costs:
        for task, cost in of_part.items():
            before = asdict(total.get(task, Cost()))
            total[task] = Cost(**{name: before[name] + value for name, value in cost.items()})
    return total


def _row(request: Instance) -> dict[str, Any]:
    return {"task": request.task_name, "document": request.doc_id, "request": request.idx}


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["document"], row["request"]


def _hash(request: Instance) -> str:
    return hashlib.sha256(repr(request.args).encode("utf-8", "surrogatepass")).hexdigest()[:16]
