"""`unmask frontier`: many ways of decoding one checkpoint, each timed in turn with its AR parent, into one folder.

The folder holds run.json (what was measured, on what), rows.jsonl (a line a setting and batch size, written as it is
made, so that a run cut short goes on where it stopped) and the figure. Texts do not depend on the batch size:
each is written and judged once and then timed at every batch size.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from unmask import hf
from unmask.conversion.run_record import IN_MEMORY
from unmask.data.plain_text import open_ids
from unmask.data.readers import read_documents
from unmask.data.sources import local_files
from unmask.lab.figures import draw_frontier
from unmask.lab.frontier import (
    FrontierRow,
    Score,
    Setting,
    accuracy_under_parallelism,
    block_size_of,
    check_vocabulary,
    data_row,
    decode,
    frontier_row,
    judge,
)
from unmask.lab.oracle import speed_of_light
from unmask.lab.tasks import problems
from unmask.limits import LARGEST, MOST_ROUNDS, check_seed, check_whole
from unmask.loading import load, recorded_base
from unmask.model import DiffusionLM
from unmask.model_name import locate
from unmask.plain_numbers import plain_fields
from unmask.progress import Advance, progress
from unmask.run_folder import RunFolder
from unmask.sampling import Confidence, EntropyBound, Factor, Random, Selector, Threshold
from unmask.sampling.tokens import check_sampling
from unmask.version import __version__

_RULES: dict[str, Callable[[float], Selector]] = {
    "threshold": Threshold,
    "factor": Factor,
    "entropy-bound": EntropyBound,
    "confidence": lambda n: Confidence(_whole("confidence", n)),
    "random": lambda n: Random(_whole("random", n)),
}
_MIN_TIMED_TEXTS = 4
"""The smallest number of texts of a timed run, whatever the batch size."""


_MOST = {"rounds": MOST_ROUNDS, "num_prompts": 100_000}


@dataclass(frozen=True)
class Sweep:
    """What to measure. block_sizes: None is the checkpoint's own. oracle: number of its prompts, 0 leaves it out.

    prompt_tokens: the beginning of a document that is the prompt. rounds: timed runs of each setting, in turn with the
    AR parent; medians are reported. seed: of sampling, and of a task's problems.
    """

    rules: tuple[Selector, ...]
    block_sizes: tuple[int | None, ...] = (None,)
    batch_sizes: tuple[int, ...] = (1, 8, 64)
    num_prompts: int = 64
    prompt_tokens: int = 24
    max_new_tokens: int = 64
    rounds: int = 3
    oracle: int = 0
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        plain_fields(self)
        counts = [(name, getattr(self, name)) for name in ("num_prompts", "prompt_tokens", "max_new_tokens", "rounds")]
        counts += [("batch size", size) for size in self.batch_sizes]
        counts += [("block size", size) for size in self.block_sizes if size is not None]
        for name, value in counts:
            check_whole(name, value, most=_MOST.get(name, LARGEST))
        if self.oracle < 0:
            raise ValueError(f"oracle {self.oracle} must be 0 (leave it out) or a number of prompts")
        check_whole("oracle", self.oracle, least=0)
        check_seed(self.seed)
        check_sampling(self.temperature, 1.0)
        if self.oracle and self.temperature > 0:
            raise ValueError(
                f"oracle {self.oracle} follows greedy decoding and temperature is {self.temperature}: use 0"
            )


def parse_rules(thresholds: str, rules: Sequence[str]) -> tuple[Selector, ...]:
    """Commit rules of "0.5,0.9" (thresholds) and of items like "factor=0.5,1"."""
    parsed = []
    for item in [f"threshold={thresholds}", *rules] if thresholds else rules:
        name, _, values = item.partition("=")
        if name not in _RULES:
            raise ValueError(f"rule {item!r} is unknown: use NAME=VALUE,... with a name of {', '.join(_RULES)}")
        parsed += [_RULES[name](value) for value in numbers(values, name)]
    if not parsed:
        raise ValueError("thresholds is empty and there is no rule: there is nothing to measure")
    return tuple(dict.fromkeys(parsed))


def numbers(text: str, name: str) -> list[float]:
    """The numbers of "1,2.5"."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise ValueError(f"{name} {text!r} is no list of numbers such as 0.5,0.9")
    return found


def whole_numbers(text: str, name: str) -> tuple[int, ...]:
    """The different numbers of "1,8"."""
    return tuple(dict.fromkeys(_whole(name, value) for value in numbers(text, name)))


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name} {value} must be a whole number")
    return int(value)


# --- prompts, parent, folder


def beginnings(tokenizer: Any, texts: Iterable[str], sweep: Sweep) -> tuple[list[Tensor], list[list[int]]]:
    """The first tokens of the first documents that are long enough, and the tokens that follow them there."""
    prompts, continuations = [], []
    length = sweep.prompt_tokens + sweep.max_new_tokens
    for text in texts:
        ids = open_ids(tokenizer, text)
        if len(ids) >= length:
            prompts.append(torch.tensor(ids[: sweep.prompt_tokens]))
            continuations.append(ids[sweep.prompt_tokens : length])
        if len(prompts) == sweep.num_prompts:
            break
    if not prompts:
        raise ValueError(f"no document has prompt_tokens + max_new_tokens = {length} tokens: ask for fewer")
    return prompts, continuations


def run_frontier(
    model: str,
    sweep: Sweep,
    *,
    base: str | None = None,
    data: Sequence[str] = (),
    task: str | None = None,
    parent: str | None = None,
    output: Path | None = None,
    show_progress: bool = True,
    **loading: Any,
) -> tuple[list[FrontierRow], dict[str, Any]]:
    """Rows and run.json of a model on documents' beginnings, or on the problems of a task. loading: of `load`."""
    files = local_files(data, "data") if data else []
    of_task = [] if task is None else problems([task], "test", sweep.num_prompts, sweep.seed)
    lm, ar = load_pair(model, parent, base, **loading)
    continuations, score = None, None
    if of_task:
        prompts = [torch.tensor(open_ids(ar.tokenizer, problem.prompt)) for problem in of_task]

        def score(texts: list[str]) -> list[bool]:
            return [problem.check(text) for problem, text in zip(of_task, texts, strict=False)]
    else:
        texts = (text for file in files for text in read_documents(file))
        prompts, continuations = beginnings(ar.tokenizer, texts, sweep)
    context, longest = lm.network.context_length, max(map(len, prompts)) + sweep.max_new_tokens
    if context is not None and longest > context:
        raise ValueError(f"prompt and max_new_tokens make {longest} tokens, more than the model's context of {context}")
    run = describe(model, lm, ar, prompts, sweep, [f"task {task}"] if task else [Path(file).name for file in files])
    folder = None if output is None else RunFolder(output, "run.json", "rows.jsonl", ("model_fingerprint",), None)
    with nullcontext() if folder is None else folder.claimed():
        earlier = [] if folder is None else earlier_rows(folder, run)
        rows = run_sweep(lm, ar, prompts, sweep, continuations=continuations, score=score, earlier=earlier,
                         folder=folder, show_progress=show_progress)  # fmt: skip
        if folder is not None:
            draw_frontier(folder.path, model, run["parent"], rows)
    return rows, run


def load_pair(
    model: str, parent: str | None = None, base: str | None = None, **loading: Any
) -> tuple[DiffusionLM, DiffusionLM]:
    """A converted checkpoint and the AR model it was made from: `parent`, or its `base`, or what its folder records.

    loading: options of `load`, of both.
    """
    lm = load(model, base=base, **loading)
    if lm.diffusion is None:
        raise ValueError(f"model {model!r} is an untouched AR model, whose frontier is one point: adapt it first")
    name = parent or base or _recorded_parent(model)
    try:
        ar = load(name, **loading)
    except (ValueError, OSError) as error:
        raise ValueError(f"parent {name!r} does not load, give the AR model with --parent: {error}") from error
    if ar.diffusion is not None and not ar.diffusion.serves_ar:
        raise ValueError(
            f"parent {name!r} is converted itself, and its AR mode is no language model: give the original AR model "
            "with --parent"
        )
    check_vocabulary(lm, ar)
    return lm, ar


def _recorded_parent(model: str) -> str:
    name, run = recorded_base(model), Path(locate(model)) / "run.json"
    if not name and run.is_file():
        name = json.loads(run.read_text()).get("parent", {}).get("name")
    if not name or name == IN_MEMORY:
        raise ValueError(f"model {model!r} records no AR parent to compare with: give it with --parent")
    return str(name)


def earlier_rows(folder: RunFolder, run: dict[str, Any]) -> list[FrontierRow]:
    """The rows that an earlier run of the same measurement left; ValueError for those of another one."""
    before = folder.read()
    if before is None:
        folder.write(run)
        return []
    if before["model_fingerprint"] != run["model_fingerprint"]:
        raise ValueError(
            f"output folder {str(folder.path)!r} holds results of another model, {before['model']!r} "
            f"(fingerprint {before['model_fingerprint']}, not {run['model_fingerprint']}): choose another folder"
        )
    compared = {key: value for key, value in run.items() if key not in ("model", "parent", "versions")}
    folder.refuse_another("another frontier", before, compared)
    return [FrontierRow(**row) for row in folder.read_rows()]


def describe(
    model: str, lm: DiffusionLM, parent: DiffusionLM, prompts: Sequence[Tensor], sweep: Sweep, sources: list[str]
) -> dict[str, Any]:
    """What run.json says: everything that rows of one folder must have in common."""
    device = lm.network.device.type
    clock = "CPU seconds of one thread" if device == "cpu" and torch.get_num_threads() == 1 else "wall clock"
    fingerprint = hf.fingerprint(lm.model) + ("" if lm.drafter is None else "-" + hf.fingerprint(lm.drafter))
    listed = repr([prompt.tolist() for prompt in prompts])
    return {
        "model": model,
        "model_fingerprint": fingerprint,
        "parent": str(getattr(parent.model.config, "_name_or_path", "")),
        "parent_fingerprint": hf.fingerprint(parent.model),
        "prompts": sources,
        "num_prompts": len(prompts),
        "prompts_fingerprint": hashlib.sha256(listed.encode()).hexdigest()[:16],
        "max_new_tokens": sweep.max_new_tokens,
        "temperature": sweep.temperature,
        "seed": sweep.seed,
        "rounds": sweep.rounds,
        "device": device,
        "clock": clock,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "versions": {"unmask": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


# --- measuring


def run_sweep(
    lm: DiffusionLM,
    parent: DiffusionLM,
    prompts: Sequence[Tensor],
    sweep: Sweep,
    *,
    continuations: Sequence[Sequence[int]] | None = None,
    score: Score | None = None,
    earlier: Sequence[FrontierRow] = (),
    folder: RunFolder | None = None,
    show_progress: bool = False,
) -> list[FrontierRow]:
    """All rows, `earlier` ones first, new ones also appended to those in the folder.

    continuations: those of the documents, for a row of the data itself. score: of a task, for accuracies.
    """
    assert lm.diffusion is not None
    rows, keys = list(earlier), {_key(row) for row in earlier}

    def add(row: FrontierRow) -> None:
        rows.append(row)
        if folder is not None:
            folder.append(asdict(row))

    plan = list(_plan(lm, parent, sweep))
    sizes = [size or lm.diffusion.block_size for size in sweep.block_sizes] if sweep.oracle else []
    if sizes and lm.diffusion.attention == "bidirectional":
        sizes = [lm.diffusion.block_size]  # one canvas, whatever it is cut into
    missing_sizes = [size for size in sizes if ("oracle", None, None, size, None) not in keys]
    total = sum(len(batches) for _, _, batches in plan) + len(sizes)
    missing = [(model, setting, [b for b in batches if _wanted_key(model, setting, b) not in keys])
               for model, setting, batches in plan]  # fmt: skip
    num_missing = sum(len(batches) for _, _, batches in missing) + len(missing_sizes)
    with progress("frontier", total, start=total - num_missing, show=show_progress) as advance:
        if continuations is not None and not any(row.mode == "data" for row in earlier):
            add(data_row(parent, [prompt.tolist() for prompt in prompts], continuations))
        for model, setting, batches in missing:
            if batches:
                for row in _measure(model, parent, prompts, setting, batches, sweep, score, advance):
                    add(row)
        for size in missing_sizes:
            add(_oracle(lm, parent, prompts[: sweep.oracle], size, sweep, score))
            advance(1, "oracle")
    return rows


def _plan(lm: DiffusionLM, parent: DiffusionLM, sweep: Sweep) -> Iterator[tuple[DiffusionLM, Setting, Sequence[int]]]:
    """(model, setting, batch sizes), baselines first."""
    yield parent, Setting("ar"), sweep.batch_sizes
    yield parent, Setting("prompt_lookup", batch_size=1), (1,)
    for block_size in sweep.block_sizes:
        if lm.diffusion is not None and lm.diffusion.serves_ar:
            yield lm, Setting("speculative", block_size=block_size), sweep.batch_sizes
        for rule in sweep.rules:
            yield lm, Setting("diffusion", rule, block_size), sweep.batch_sizes


def _measure(
    lm: DiffusionLM,
    parent: DiffusionLM,
    prompts: Sequence[Tensor],
    setting: Setting,
    batches: Sequence[int],
    sweep: Sweep,
    score: Score | None,
    advance: Advance,
) -> Iterator[FrontierRow]:
    """A row for each batch size: the same texts, judged once, timed in turn with the parent."""
    options: dict[str, Any] = {
        "max_new_tokens": sweep.max_new_tokens, "temperature": sweep.temperature, "seed": sweep.seed
    }  # fmt: skip
    largest = replace(setting, batch_size=max(batches))
    decoded = decode(lm, prompts, largest, **options)
    row = frontier_row(lm, largest, decoded, judge(parent, decoded.prompts, decoded.texts), score=score)
    for batch in batches:
        timed = [prompts[i % len(prompts)] for i in range(max(batch, _MIN_TIMED_TEXTS))]
        speeds, ratios = [], []
        for _ in range(sweep.rounds):
            ours = decode(lm, timed, replace(setting, batch_size=batch), **options)
            speeds.append(ours.num_new_tokens / max(ours.seconds, 1e-9))
            if setting.mode != "ar":
                ar = decode(parent, timed, Setting("ar", batch_size=batch), **options)
                ratios.append(speeds[-1] * max(ar.seconds, 1e-9) / ar.num_new_tokens)
        yield replace(
            row, batch_size=batch, tokens_per_second=statistics.median(speeds),
            speed_over_ar=statistics.median(ratios) if ratios else 1.0,
        )  # fmt: skip
        value = "" if setting.value is None else f" {setting.value:g}"
        advance(1, f"{setting.rule or setting.mode}{value}, batch {batch}")


def _oracle(
    lm: DiffusionLM,
    parent: DiffusionLM,
    prompts: Sequence[Tensor],
    block_size: int | None,
    sweep: Sweep,
    score: Score | None,
) -> FrontierRow:
    """The speed-of-light oracle of serial greedy decoding; its text is that of one commit per forward."""
    assert lm.diffusion is not None
    config = lm.diffusion.with_block_size(block_size)
    found = [
        speed_of_light(lm.network, config, prompt, max_new_tokens=sweep.max_new_tokens,
                       context_length=lm.network.context_length,
                       end_token_ids=hf.end_token_ids(lm.model, lm.tokenizer))
        for prompt in prompts
    ]  # fmt: skip
    texts = [text.tokens for text in found]
    new = sum(map(len, texts))
    right = None
    if score is not None:
        right = score([lm.new_text(prompt, text) for prompt, text in zip(prompts, texts, strict=True)])
    quality = judge(parent, [prompt.tolist() for prompt in prompts], texts)
    return FrontierRow(
        "oracle", None, None, config.block_size, None, len(texts), new / len(texts),
        new / sum(text.num_forwards for text in found), None, None, **vars(quality),
        accuracy=None if right is None else sum(right) / len(right),
    )  # fmt: skip


def _key(row: FrontierRow) -> tuple[Any, ...]:
    return row.mode, row.rule, row.value, row.block_size, row.batch_size


def _wanted_key(lm: DiffusionLM, setting: Setting, batch_size: int) -> tuple[Any, ...]:
    """`_key` of the row that a setting will make."""
    return setting.mode, setting.rule, setting.value, block_size_of(lm, setting), batch_size


def areas(rows: Sequence[FrontierRow]) -> dict[str, float]:
    """AUP of each rule and block size of a task, and of the AR modes; empty without accuracies."""
    graded = [row for row in rows if row.accuracy is not None and row.tokens_per_forward is not None]
    best = max((row.accuracy or 0.0 for row in graded), default=0.0)
    points: dict[str, set[tuple[float, float]]] = {}
    for row in graded:
        name = row.mode if row.rule is None else row.rule
        name += f", blocks of {row.block_size}" if row.block_size is not None else ""
        points.setdefault(name, set()).add((row.tokens_per_forward or 0.0, row.accuracy or 0.0))
    return {name: accuracy_under_parallelism(sorted(curve), best_accuracy=best) for name, curve in points.items()}


_COLUMNS = {
    "tokens/forward": "tokens_per_forward", "tokens/s": "tokens_per_second", "x AR": "speed_over_ar",
    "parent's NLL": "parent_nll", "entropy": "unigram_entropy", "distinct-2": "distinct_2", "accuracy": "accuracy",
}  # fmt: skip


def table(rows: Sequence[FrontierRow]) -> str:
    """The rows as aligned text, a line each."""
    lines: list[list[str]] = [["", "batch", *_COLUMNS]]
    for row in rows:
        value = "" if row.value is None else f" {row.value:g}"
        block = "" if row.block_size is None else f", block {row.block_size}"
        figures = [getattr(row, column) for column in _COLUMNS.values()]
        shown = ["-" if f is None else f"{f:,.0f}" if f >= 100 else f"{f:.2f}" for f in figures]
        lines.append([f"{row.rule or row.mode}{value}{block}", str(row.batch_size or "-"), *shown])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
