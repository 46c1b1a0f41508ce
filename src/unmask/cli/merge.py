"""`unmask merge`: the parts of `evaluate --shard` and `frontier --shard` as one result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli.app import Json, app
from unmask.cli.evaluate import show_figures, show_tasks, write_figures
from unmask.cli.lab import show_frontier
from unmask.parts import Whole, read_parts


@app.command(epilog="Example: unmask merge results/q")
def merge(
    folders: Annotated[list[Path], typer.Argument(help="The --output of all parts, or of some each.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for what one run writes; by default that of the first part.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the parts of `evaluate` or `frontier` together: what one run of all prints and writes."""
    whole = read_parts(folders)
    kind = whole.record["measured"]
    if kind not in _MERGED:
        raise ValueError(f"the parts in {str(whole.place)!r} are of {kind!r}, which this version does not know: update")
    _MERGED[kind](whole, output or whole.place, as_json)


def _likelihood(whole: Whole, output: Path, as_json: bool) -> None:
    from unmask.evaluation.figures import figures

    found = figures(whole.record, whole.rows, whole.record["written"])
    write_figures(output, found)
    show_figures(found, as_json)


def _tasks(whole: Whole, output: Path, as_json: bool) -> None:
    from unmask.evaluation.harness import load_tasks, write_results
    from unmask.evaluation.task_parts import results_of
    from unmask.loading import load_tokenizer

    tokenizer = None
    if whole.record["options"].get("apply_chat_template"):
        tokenizer, _ = load_tokenizer(whole.record["model"], **whole.record["loading"])
    results = results_of(whole, load_tasks(whole.record["tasks"], whole.record["tasks_folder"]), tokenizer)
    write_results(results, output)
    show_tasks(results, as_json)


def _frontier(whole: Whole, output: Path, as_json: bool) -> None:
    from unmask.lab.frontier_folder import merge_parts

    show_frontier(*merge_parts(whole, output), as_json)


_MERGED = {"likelihood": _likelihood, "tasks": _tasks, "frontier": _frontier}
"""By what was measured."""
