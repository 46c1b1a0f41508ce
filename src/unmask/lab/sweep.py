"""Many ways of decoding one checkpoint, each timed in turn with its AR parent: the rows of a frontier.

Texts do not depend on the batch size: each is written and judged once and then timed at every batch size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from unmask import hf
from unmask.lab.frontier import (
    FrontierRow,
    Score,
    Setting,
    accuracy_under_parallelism,
    block_size_of,
    data_row,
    decode,
    frontier_row,
    judge,
)
from unmask.lab.oracle import speed_of_light
from unmask.limits import LARGEST, MOST_ROUNDS, check_seed, check_whole
from unmask.model import DiffusionLM
from unmask.parts import Shard
from unmask.plain_numbers import plain_fields
from unmask.progress import progress
from unmask.run_folder import RunFolder
from unmask.sampling import Confidence, EntropyBound, Factor, Random, Selector, Threshold
from unmask.sampling.tokens import check_sampling
from unmask.tables import fitted

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


Key = tuple[str, str | None, float | None, int | None, int | None]
"""Mode, rule, value, block size and batch size of a row: which one it is."""


class Unit(NamedTuple):
    """Rows that are measured together, a part of a sweep. setting: None for the data and the oracle."""

    model: DiffusionLM
    setting: Setting | None
    keys: tuple[Key, ...]


def plan(lm: DiffusionLM, parent: DiffusionLM, sweep: Sweep, *, data: bool) -> list[Unit]:
    """All rows of a sweep in their order, baselines first. data: whether the data have a row."""
    assert lm.diffusion is not None
    settings = [(parent, Setting("ar")), (parent, Setting("prompt_lookup", batch_size=1))]
    for block_size in sweep.block_sizes:
        if lm.diffusion.serves_ar:
            settings.append((lm, Setting("speculative", block_size=block_size)))
        settings += [(lm, Setting("diffusion", rule, block_size)) for rule in sweep.rules]
    units = [Unit(parent, None, (("data", None, None, None, None),))] if data else []
    for model, setting in settings:
        sizes = (1,) if setting.mode == "prompt_lookup" else sweep.batch_sizes
        what = (setting.mode, setting.rule, setting.value, block_size_of(lm, setting))
        units.append(Unit(model, setting, tuple((*what, size) for size in sizes)))
    blocks = [size or lm.diffusion.block_size for size in sweep.block_sizes] if sweep.oracle else []
    if blocks and lm.diffusion.attention == "bidirectional":
        blocks = [lm.diffusion.block_size]  # one canvas, whatever it is cut into
    units += [Unit(lm, None, (("oracle", None, None, size, None),)) for size in blocks]
    return list({unit.keys: unit for unit in units}.values())


def key_of(row: FrontierRow) -> Key:
    """Which row it is."""
    return row.mode, row.rule, row.value, row.block_size, row.batch_size


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
    shard: Shard = Shard(),
    show_progress: bool = False,
) -> list[FrontierRow]:
    """All rows, or those of a part; `earlier` ones first, new ones also appended to those in the folder.

    continuations: those of the documents, for a row of the data itself. score: of a task, for accuracies.
    """
    rows, done = list(earlier), set(map(key_of, earlier))
    units = [unit for i, unit in enumerate(plan(lm, parent, sweep, data=continuations is not None)) if shard.takes(i)]
    keys = [key for unit in units for key in unit.keys]
    with progress("frontier", len(keys), start=len(done & set(keys)), show=show_progress) as advance:
        for unit in units:
            missing = [key for key in unit.keys if key not in done]
            if not missing:
                continue
            for row in _rows_of(unit, missing, lm, parent, prompts, sweep, continuations, score):
                rows.append(row)
                if folder is not None:
                    folder.append(asdict(row))
                value = "" if row.value is None else f" {row.value:g}"
                batch = "" if row.batch_size is None else f", batch {row.batch_size}"
                advance(1, f"{row.rule or row.mode}{value}{batch}")
    return rows


def _rows_of(
    unit: Unit,
    missing: Sequence[Key],
    lm: DiffusionLM,
    parent: DiffusionLM,
    prompts: Sequence[Tensor],
    sweep: Sweep,
    continuations: Sequence[Sequence[int]] | None,
    score: Score | None,
) -> Iterator[FrontierRow]:
    """The rows of a unit that are missing."""
    mode, _, _, block_size, _ = missing[0]
    if unit.setting is not None:
        batches = [batch for *_, batch in missing if batch is not None]
        yield from _measure(unit.model, parent, prompts, unit.setting, batches, sweep, score)
    elif mode == "data":
        yield data_row(parent, [prompt.tolist() for prompt in prompts], continuations or [])
    else:
        yield _oracle(lm, parent, prompts[: sweep.oracle], block_size, sweep, score)


def _measure(
    lm: DiffusionLM,
    parent: DiffusionLM,
    prompts: Sequence[Tensor],
    setting: Setting,
    batches: Sequence[int],
    sweep: Sweep,
    score: Score | None,
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
    """The rows as aligned text, a line each, and what the figures are counted in."""
    lines: list[list[str]] = [["", "batch", *_COLUMNS]]
    for row in rows:
        value = "" if row.value is None else f" {row.value:g}"
        block = "" if row.block_size is None else f", block {row.block_size}"
        figures = [getattr(row, column) for column in _COLUMNS.values()]
        shown = ["-" if f is None else f"{f:,.0f}" if f >= 100 else f"{f:.2f}" for f in figures]
        lines.append([f"{row.rule or row.mode}{value}{block}", str(row.batch_size or "-"), *shown])
    return f"{fitted(lines)}\nparent's NLL and entropy: nats per token"
