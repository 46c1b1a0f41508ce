"""Studies: a grid of recipes and settings on one parent at equal tokens, measured and reported.

A study is a small TOML file: arms (a recipe and settings each), settings they share, seeds, a token budget, and the
measures to take. Every arm and seed is one `adapt` run in OUT/runs/<arm>-<seed>; what is measured on it is appended to
OUT/rows.jsonl, one line for each measure of each checkpoint; OUT/report.md is made of these lines alone. So a study
that was interrupted goes on where it stopped: within a run, between runs, or between measures.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from unmask import hf
from unmask.conversion import adapt
from unmask.conversion.run_record import training_folder
from unmask.core.finite import check_weights
from unmask.data.documents import load_corpus
from unmask.data.sources import find_files, local_files
from unmask.lab.measures import MEASURES, Budget, HeldOut, Subject, hold_out
from unmask.lab.report import write_report
from unmask.lab.tasks import check
from unmask.loading import load
from unmask.model import DiffusionLM
from unmask.near_names import unknown
from unmask.plain_json import to_json
from unmask.progress import progress, say
from unmask.recipe import differences, load_recipe
from unmask.resolve import resolve
from unmask.run_folder import RunFolder
from unmask.settings import Settings
from unmask.training.checkpoints import checkpoints, damage

PARENT = "parent"
"""The arm under whose name the untouched parent is measured."""


@dataclass(frozen=True)
class Study:
    """What is compared. settings: recipe and settings that arms share. arms: name -> what sets it apart.
    An arm takes those of the shared settings that its run reads; one of its own that it does not read is an error.

    points: checkpoints of each run, the last one included; `along` is measured at all of them, `measures` at the
    last. max_tokens: of every arm alike. answers: the held-out text is problems of `unmask.lab.tasks`. A setting of
    "none" takes the recipe's value away.
    """

    name: str
    summary: str
    arms: dict[str, dict[str, Any]]
    measures: tuple[str, ...]
    along: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    max_tokens: int = 1_000_000
    points: int = 1
    answers: bool = False
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError(f"study {self.name!r} has no arms: give at least one table [arms.NAME] with a recipe")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must be different numbers, at least one")
        for what in ("max_tokens", "points"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} {getattr(self, what)} of study {self.name!r} must be at least 1")
        for measure in (*self.measures, *self.along):
            if measure not in MEASURES:
                raise ValueError(
                    f"measure {measure!r} of study {self.name!r} is unknown: use any of {', '.join(MEASURES)}"
                )
        for arm in self.arms:
            if arm == PARENT or not arm.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"arm {arm!r} of study {self.name!r} needs another name: letters, digits, - _ .")
            self.run_settings(arm, self.seeds[0])

    def run_settings(self, arm: str, seed: int) -> Settings:
        """The settings of one run; raises ValueError where the recipe or a setting is wrong."""
        shared, of_arm = dict(self.settings), dict(self.arms[arm])
        recipe = of_arm.pop("recipe", shared.pop("recipe", None))
        if recipe is None:
            raise ValueError(f"arm {arm!r} of study {self.name!r} names no recipe")
        if (shared | of_arm).get("max_tokens", self.max_tokens) != self.max_tokens:
            raise ValueError(f"arm {arm!r} of study {self.name!r} sets max_tokens: all arms train on equally many")
        return load_recipe(recipe, shared, **of_arm | {"seed": seed, "max_tokens": self.max_tokens})

    def runs(self) -> Iterator[tuple[str, int]]:
        """(arm, seed), all arms of a seed before the next seed."""
        return ((arm, seed) for seed in self.seeds for arm in self.arms)


def study_names() -> list[str]:
    """Names of the studies shipped with the package."""
    folder = resources.files("unmask") / "studies"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_study(name: str | Path) -> Study:
    """A study that ships with the package, or one in a .toml file of one's own."""
    file = Path(name)
    if file.suffix == ".toml":
        if not file.is_file():
            raise ValueError(f"study file {str(name)!r} does not exist")
        text, name = file.read_text(), file.stem
    elif str(name) in study_names():
        text = (resources.files("unmask") / "studies" / f"{name}.toml").read_text()
    else:
        otherwise = f"use one of {', '.join(study_names())}, or a .toml file"
        raise ValueError(unknown("study", str(name), study_names(), otherwise))
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"study file {str(file)!r} is no TOML: {error}") from None
    _check_names(raw, {f.name for f in fields(Study)} - {"name", "summary"}, f"study {name!r}")
    _check_names(raw.get("budget", {}), {f.name for f in fields(Budget)}, f"budget of study {name!r}")
    for key in ("arms", "measures"):
        if not raw.get(key):
            raise ValueError(f"study {str(name)!r} has no {key}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    budget: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("budget", {}).items()}
    summary = " ".join(line.removeprefix("#").strip() for line in text.splitlines()[:1])
    return Study(name=str(name), summary=summary, budget=Budget(**budget), **values)


def _check_names(table: dict[str, Any], names: set[str], where: str) -> None:
    for key in table:
        if key not in names:
            raise ValueError(f"{key!r} in {where} is unknown: use any of {', '.join(sorted(names))}")


def choose(
    study: Study,
    *,
    max_tokens: int | None = None,
    seeds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
) -> Study:
    """The study with another token budget, other seeds, or some of its arms."""
    for arm in arms or ():
        if arm not in study.arms:
            raise ValueError(f"arm {arm!r} is none of study {study.name!r}: use any of {', '.join(study.arms)}")
    return replace(
        study,
        max_tokens=study.max_tokens if max_tokens is None else max_tokens,
        seeds=study.seeds if seeds is None else tuple(seeds),
        arms=study.arms if arms is None else {arm: study.arms[arm] for arm in arms},
    )


def run_study(
    study: Study,
    model: str | Path,
    data: Sequence[str | Path],
    eval_data: Sequence[str | Path],
    output: Path,
    *,
    show_progress: bool = True,
    base: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> list[dict[str, Any]]:
    """Train what is not trained yet, measure what is not measured yet, write the report; the lines of rows.jsonl."""
    files = local_files(list(eval_data), "eval data")
    find_files(list(data))
    loading: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    parent = load(model, dtype=torch.float32, base=base, **loading)
    if parent.diffusion is not None:
        raise ValueError(f"model {str(model)!r} is converted already: a study compares conversions of one AR parent")
    folder = RunFolder(output, "study.json", "rows.jsonl", ("study", "arms"), beside=("runs",))
    total = len(study.arms) * len(study.seeds)
    with folder.claimed():
        _begin(folder, _describe(study, parent, model, [*data], files))
        results = _Results(study, parent, _held_out(parent, study, files), folder)
        with progress(f"study {study.name}", total, show=show_progress) as advance:
            results.measure(parent, PARENT, None, 0, [m for m in study.measures if m != "drift"])
            for arm, seed in study.runs():
                run = output / "runs" / f"{arm}-{seed}"
                if _finished(run) is None:
                    _train(study, arm, seed, parent, model, data, run, show_progress, base, loading)
                _measure_run(study, arm, seed, run, results, loading)
                advance(1, f"{arm}-{seed}")
                write_report(output)
    return results.rows


class _Results:
    """The rows of a study's folder, each the rows of one measure of one checkpoint, which is taken once."""

    def __init__(self, study: Study, parent: DiffusionLM, held_out: HeldOut, folder: RunFolder) -> None:
        self.study, self.parent, self.held_out, self.folder = study, parent, held_out, folder
        self.rows = folder.read_rows()
        self._done = {(row["arm"], row["seed"], row["tokens"], row["measure"]) for row in self.rows}

    def lacks(self, arm: str, seed: int | None, tokens: int, names: Sequence[str]) -> bool:
        """Whether one of these measures is still to be taken."""
        return any((arm, seed, tokens, name) not in self._done for name in names)

    def measure(self, lm: DiffusionLM, arm: str, seed: int | None, tokens: int, names: Sequence[str]) -> None:
        """Take those of these measures that are still to be taken."""
        subject = Subject(lm, self.parent, self.study.budget, self.held_out)
        for name in names:
            if self.lacks(arm, seed, tokens, (name,)):
                found = MEASURES[name](subject)
                row = {"arm": arm, "seed": seed, "tokens": tokens, "measure": name, "rows": found}
                self.folder.append(row)
                self.rows.append(row)
                self._done.add((arm, seed, tokens, name))


def _measure_run(study: Study, arm: str, seed: int, run: Path, results: _Results, loading: dict[str, Any]) -> None:
    """All measures of a finished run, and those along training at its earlier checkpoints."""
    tokens = _finished(run) or 0
    names = list(dict.fromkeys([*study.measures, *study.along]))
    unmeasured = [point for point in _points(run) if results.lacks(arm, seed, point[0], study.along)]
    if not unmeasured and not results.lacks(arm, seed, tokens, names):
        return
    lm = load(run, **loading)
    results.measure(lm, arm, seed, tokens, names)
    for tokens_of_point, weights in unmeasured:
        if _load_weights(lm, weights):
            results.measure(lm, arm, seed, tokens_of_point, study.along)


def _train(
    study: Study,
    arm: str,
    seed: int,
    parent: DiffusionLM,
    model: str | Path,
    data: Sequence[str | Path],
    folder: Path,
    show_progress: bool,
    base: str | None,
    loading: dict[str, Any],
) -> None:
    settings = study.run_settings(arm, seed)
    sized = resolve(settings, sum(p.numel() for p in parent.model.parameters()), parent.network.context_length)
    steps = -(-study.max_tokens // (sized.batch_size * sized.max_length))
    every = -(-steps // study.points)
    # Evaluation is the study's own, on checkpoints: none during training.
    of_run = differences(settings) | {"save_every": every, "keep_checkpoints": study.points + 1}
    of_run |= {"eval_every": 10**9, "eval_documents": 4}
    if show_progress:
        say(f"study {study.name}: train {arm} with seed {seed}")
    adapt(
        model, list(data), settings.recipe, folder, resume=True, show_progress=show_progress,
        base=base, **loading, **of_run,
    )  # fmt: skip


def _finished(folder: Path) -> int | None:
    """Tokens of the run in a folder if it is finished."""
    run = training_folder(folder).read()
    return int(run["tokens"]) if run is not None and run.get("finished") else None


def _points(folder: Path) -> Iterator[tuple[int, Path]]:
    """(tokens, weights) of the checkpoints that a finished run kept."""
    for checkpoint in checkpoints(folder):
        if (checkpoint / "model.safetensors").is_file() and damage(checkpoint) is None:
            state = json.loads((checkpoint / "state.json").read_text())
            yield state["tokens"], checkpoint / "model.safetensors"


def _load_weights(lm: DiffusionLM, weights: Path) -> bool:
    """Load a checkpoint's weights; False where it holds something else (adapters, a drafter)."""
    state = load_file(weights)
    if not state.keys() <= lm.model.state_dict().keys():
        return False
    lm.model.load_state_dict(state, strict=False)  # tied weights are stored once
    check_weights(lm.model, f"checkpoint {str(weights)!r}")
    return True


def _held_out(parent: DiffusionLM, study: Study, files: list[Path]) -> HeldOut:
    end = next(iter(hf.end_token_ids(parent.model, parent.tokenizer)), None)
    corpus = load_corpus(
        files,
        parent.tokenizer,
        end_token_id=end,
        max_length=parent.network.context_length,
        max_documents=20 * max(study.budget.documents, study.budget.prompts),
    )
    held_out = hold_out(corpus, study.budget, end)
    if not study.answers:
        return held_out
    problems = [parent.tokenizer.decode(ids, skip_special_tokens=True) for ids in held_out.prompts]
    for problem in problems:
        check(problem, "")  # raises for what is no problem
    return replace(held_out, score=lambda texts: [check(p, text) for p, text in zip(problems, texts, strict=True)])


# --- the study's folder


def _describe(
    study: Study, parent: DiffusionLM, model: str | Path, data: list[Any], eval_files: list[Path]
) -> dict[str, Any]:
    """What study.json says."""
    files = find_files(data)
    return {
        "study": study.name,
        "model": str(model),
        "fingerprint": hf.fingerprint(parent.model),
        "data": [str(d) for d in data] if files is None else _digest(files),
        "eval": _digest(eval_files),
        "max_tokens": study.max_tokens,
        "points": study.points,
        "budget": json.loads(to_json(asdict(study.budget))),
        "arms": {arm: json.loads(to_json(study.settings | own)) for arm, own in study.arms.items()},
        "summary": study.summary,
    }


def _begin(folder: RunFolder, study: dict[str, Any]) -> None:
    """Write study.json, or check that the one there is of the same study: only seeds and arms may be added."""
    before = folder.read()
    if before is None:
        folder.write(study)
        return
    known = before["arms"]
    same_weights = before.get("fingerprint") == study["fingerprint"]  # wherever they lie
    free = ("arms", "summary", "model") if same_weights else ("arms", "summary")
    compared = {key: value for key, value in study.items() if key not in free}
    compared |= {f"arm {arm!r}": own for arm, own in study["arms"].items() if arm in known}
    folder.refuse_another("another study", before | {f"arm {arm!r}": own for arm, own in known.items()}, compared)
    folder.write(study | {"arms": known | study["arms"]})


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return f"{', '.join(file.name for file in files)} ({digest.hexdigest()[:12]})"
