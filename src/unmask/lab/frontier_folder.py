"""`unmask frontier`: what it is measured on, and its folder.

The folder holds run.json (what was measured, on what), rows.jsonl (a line a setting and batch size, written as it is
made, so that a run cut short goes on where it stopped) and the figure. A part of a frontier has a folder in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from unmask import hf
from unmask.conversion.run_record import IN_MEMORY, parent_in
from unmask.data.plain_text import open_ids
from unmask.data.readers import read_documents
from unmask.data.sources import local_files
from unmask.evaluation.figures import fingerprint
from unmask.lab.figures import draw_frontier
from unmask.lab.frontier import FrontierRow, check_vocabulary
from unmask.lab.sweep import Sweep, key_of, plan, run_sweep
from unmask.lab.tasks import problems
from unmask.loading import load, recorded_base
from unmask.model import DiffusionLM
from unmask.model_name import locate
from unmask.parts import Shard, Whole, write_part
from unmask.progress import note
from unmask.run_folder import RunFolder
from unmask.version import __version__


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
    text_column: str = "text",
    skip_invalid: bool = False,
    task: str | None = None,
    parent: str | None = None,
    output: Path | None = None,
    shard: Shard | None = None,
    show_progress: bool = True,
    **loading: Any,
) -> tuple[list[FrontierRow], dict[str, Any]]:
    """Rows and run.json of a model on documents' beginnings, or on the problems of a task. loading: of `load`.

    text_column, skip_invalid: of reading `data`. shard: measure these settings alone, into a folder in `output`;
    `merge_parts` puts all together.
    """
    files = local_files(data, "data") if data else []
    of_task = [] if task is None else problems([task], "test", sweep.num_prompts, sweep.seed)
    lm, ar = load_pair(model, parent, base, **loading)
    continuations, score = None, None
    if of_task:
        prompts = [torch.tensor(open_ids(ar.tokenizer, problem.prompt)) for problem in of_task]

        def score(texts: list[str]) -> list[bool]:
            return [problem.check(text) for problem, text in zip(of_task, texts, strict=False)]
    else:
        reading: dict[str, Any] = {"text_column": text_column, "skip_invalid": skip_invalid, "note": note}
        texts = (text for file in files for text in read_documents(file, **reading))
        prompts, continuations = beginnings(ar.tokenizer, texts, sweep)
    context, longest = lm.network.context_length, max(map(len, prompts)) + sweep.max_new_tokens
    if context is not None and longest > context:
        raise ValueError(f"prompt and max_new_tokens make {longest} tokens, more than the model's context of {context}")
    run = describe(model, lm, ar, prompts, sweep, [f"task {task}"] if task else [Path(file).name for file in files])

    def measure(folder: RunFolder | None, earlier: Sequence[FrontierRow]) -> list[FrontierRow]:
        return run_sweep(lm, ar, prompts, sweep, continuations=continuations, score=score, earlier=earlier,
                         folder=folder, shard=shard or Shard(), show_progress=show_progress)  # fmt: skip

    def fill(folder: RunFolder) -> None:
        measure(folder, _rows_in(folder))

    if shard is not None and output is not None:
        keys = [key for unit in plan(lm, ar, sweep, data=continuations is not None) for key in unit.keys]
        record = run | {"measured": "frontier", "oracle": sweep.oracle, "rows": keys}  # of all parts
        part = write_part(output, shard, record, fill)
        return _rows_in(part), part.read() or {}
    if output is None:
        return measure(None, ()), run
    folder = _whole(output)
    with folder.claimed():
        rows = measure(folder, earlier_rows(folder, run))
        draw_frontier(folder.path, run["model"], run["parent"], rows)
    return rows, run


def merge_parts(whole: Whole, output: Path) -> tuple[list[FrontierRow], dict[str, Any]]:
    """All parts of a frontier as the rows and run.json of one run, written to `output` with the figure."""
    run = {key: value for key, value in whole.record.items()
           if key not in ("measured", "part", "finished", "num_rows", "oracle", "rows")}  # fmt: skip
    found = {key_of(row): row for row in (FrontierRow(**row) for row in whole.rows)}
    keys = [tuple(key) for key in whole.record["rows"]]
    folder = _whole(output)
    with folder.claimed():
        others = [row for row in earlier_rows(folder, run) if key_of(row) not in found]
        rows = [found[key] for key in keys] + others
        folder.write_rows(map(asdict, rows))
        draw_frontier(folder.path, run["model"], run["parent"], rows)
    return rows, run


def _whole(output: Path) -> RunFolder:
    """The folder of a whole frontier."""
    return RunFolder(output, "run.json", "rows.jsonl", ("model_fingerprint",), None)


def _rows_in(folder: RunFolder) -> list[FrontierRow]:
    return [FrontierRow(**row) for row in folder.read_rows()]


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
    name = recorded_base(model) or parent_in(Path(locate(model)))
    if not name or name == IN_MEMORY:
        raise ValueError(f"model {model!r} records no AR parent to compare with: give it with --parent")
    return name


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
    return _rows_in(folder)


def describe(
    model: str, lm: DiffusionLM, parent: DiffusionLM, prompts: Sequence[Tensor], sweep: Sweep, sources: list[str]
) -> dict[str, Any]:
    """What run.json says: everything that rows of one folder must have in common."""
    device = lm.network.device.type
    clock = "CPU seconds of one thread" if device == "cpu" and torch.get_num_threads() == 1 else "wall clock"
    listed = repr([prompt.tolist() for prompt in prompts])
    return {
        "model": model,
        "model_fingerprint": fingerprint(lm),
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
