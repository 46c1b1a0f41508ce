"""Commands that measure a checkpoint or make vectors with it: evaluate, embed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Json, app, name_of
from unmask.cli.options import DECODER, LOADING, TASKS, Part, opened, part_of, show_part, takes_options
from unmask.limits import MOST_SAMPLES, check_whole
from unmask.parts import Shard, write_part
from unmask.plain_json import to_json
from unmask.progress import note
from unmask.run_folder import RunFolder, check_can_be_written, write_text
from unmask.tables import wrapped


@app.command(
    epilog="Example: unmask evaluate runs/q --data test.jsonl --num-samples 16 --json; "
    "unmask evaluate runs/q --tasks arc_easy,hellaswag --limit 200 --output results/q"
)
@takes_options(*TASKS, *(name for name in DECODER if name != "block_size"), *LOADING)
def evaluate(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id."))],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A .txt, .jsonl or .parquet file, or a folder of them; can be repeated."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="Further data files.", show_default=False)] = None,
    parent: Annotated[
        str | None, typer.Option(**name_of("The AR model it was made from: shown beside it, in likelihood and text."))
    ] = None,
    max_documents: Annotated[int | None, typer.Option(help="Only the first documents.")] = None,
    block_size: Annotated[int | None, typer.Option(help="Score with another block size.")] = None,
    num_samples: Annotated[int, typer.Option(help="Masks per block of the NELBO.")] = 8,
    exact: Annotated[bool, typer.Option(help="Enumerate all masks (blocks of up to 4 tokens).")] = False,
    text_column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files.")] = "text",
    skip_invalid: Annotated[bool, typer.Option(help="Leave broken documents out instead of stopping.")] = False,
    seed: Annotated[int, typer.Option(help="Of the masks, and of sampling.")] = 0,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of --data: tasks of lm-evaluation-harness, or task files, with commas between."),
    ] = None,
    shard: Part = None,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
    decoder: dict[str, Any],
    of_tasks: dict[str, Any],
) -> None:
    """Likelihood of text (exact NLL in AR mode, NELBO in diffusion mode), or tasks of lm-evaluation-harness.

    Options of decoding are those of tasks.
    """
    bound: dict[str, Any] = {"num_samples": num_samples, "exact": exact, "block_size": block_size, "seed": seed}
    output = of_tasks.pop("output", None)
    if output is not None:
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output {str(output)!r} is a file: choose a folder")
        check_can_be_written(output, "--output")
    part = part_of(shard, output)
    if tasks is not None:
        if data or more or max_documents is not None:
            raise ValueError(f"--tasks {tasks} brings its own documents: leave --data, and take fewer with --limit")
        if parent is not None:
            raise ValueError(f"--parent {parent} is for --data: run the tasks on the parent itself, and compare")
        results = _run_tasks(model, loading, tasks, of_tasks, bound, decoder, output, part)
        _show(results, part, show_tasks, as_json)
        return
    for name, value in (of_tasks | decoder).items():
        raise ValueError(f"--{name.replace('_', '-')} {value} is for --tasks: leave it out, or name tasks")
    check_whole("--num-samples", num_samples, most=MOST_SAMPLES)
    check_whole("--block-size", block_size)
    if not data:
        raise ValueError("evaluate needs --data FILE, or --tasks NAME of lm-evaluation-harness")
    files = [*data, *(more or [])]
    documents = _documents(files, max_documents, text_column, skip_invalid, part)
    figures = _likelihoods(model, loading, documents, [Path(file).name for file in files], bound, parent, output, part)
    _show(figures, part, show_figures, as_json)


def _show(found: dict[str, Any] | RunFolder, part: Shard | None, show: Callable[..., None], as_json: bool) -> None:
    if isinstance(found, RunFolder):
        assert part is not None
        show_part(found.path, part, as_json)
    else:
        show(found, as_json)


def show_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Print the likelihoods of documents."""
    print(to_json(figures) if as_json else wrapped(_as_text(figures), "       "))


def show_tasks(results: dict[str, Any], as_json: bool) -> None:
    """Print the figures of tasks."""
    from unmask.evaluation.harness import table

    figures = {name: value for name, value in results.items() if name not in ("samples", "configs")}
    print(to_json(figures, default=str) if as_json else table(results))


def _documents(
    files: Sequence[str], limit: int | None, text_column: str, skip_invalid: bool, part: Shard | None = None
) -> Any:
    """The first `limit` documents of the files, or those of a part of them."""
    from unmask.data.readers import read_documents
    from unmask.data.sources import local_files
    from unmask.evaluation import figures

    check_whole("--max-documents", limit)
    paths = local_files(files, "data")

    def texts() -> Iterator[str]:
        found = False
        for path in paths:
            for text in read_documents(path, text_column=text_column, skip_invalid=skip_invalid, note=note):
                found = True
                yield text
            if not found:
                raise ValueError(f"data file {str(path)!r} holds no documents")

    return figures.part_of(islice(texts(), limit), part or Shard())


def _likelihoods(
    model: str, loading: dict[str, Any], documents: Any, data: list[str], bound: dict[str, Any],
    parent: str | None, output: Path | None, part: Shard | None,
) -> dict[str, Any] | RunFolder:  # fmt: skip
    """The figures of --json, or the folder of a part.

    parent: a model whose figures stand beside them, with what both write.
    """
    from unmask.evaluation.figures import describe, figures, measure, written_beside
    from unmask.evaluation.likelihood import check_estimator

    lm = opened(model, loading, "likelihood")
    if lm.diffusion is None and (bound["exact"] or bound["block_size"] is not None):
        raise ValueError(f"model {model!r} is an untouched AR model and has no blocks: leave --block-size and --exact")
    if lm.diffusion is not None:
        check_estimator(lm.diffusion.with_block_size(bound["block_size"]), bound["num_samples"], bound["exact"])
    ar = None if parent is None else _load_parent(parent, lm, loading)
    record = describe(model, lm, documents, data, bound, parent, ar)

    def written() -> dict[str, Any] | None:
        return None if ar is None else written_beside(ar, lm, documents.first)

    if part is not None:

        def fill(folder: RunFolder) -> dict[str, Any]:
            folder.write_rows(measure(lm, ar, documents, bound))
            return {"written": written()} if part.number == 1 else {}

        assert output is not None
        return write_part(output, part, record, fill)
    found = figures(record, measure(lm, ar, documents, bound), written())
    if output is not None:
        write_figures(output, found)
    return found


def write_figures(output: Path, figures: dict[str, Any]) -> None:
    """results.json of the likelihoods of documents."""
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "results.json", to_json(figures, indent=2) + "\n")


def _load_parent(name: str, lm: Any, loading: dict[str, Any]) -> Any:
    """The parent; ValueError for a model that `lm` cannot be compared with."""
    from unmask.evaluation.figures import check_parent

    parent = opened(name, {key: value for key, value in loading.items() if key != "base"}, "mode ar")
    check_parent(parent, name, lm)
    return parent


def _as_text(figures: dict[str, Any]) -> str:
    """The figures of `_likelihoods` as lines to read."""
    lines = [
        f"{figures['num_documents']} documents, {figures['num_tokens']} predicted tokens",
        f"nll    {figures['nll']:.4f} nats/token  {figures['nll_bits_per_byte']:.4f} bits/byte  (AR mode, exact)",
    ]
    if figures["nelbo"] is None:
        lines.append("nelbo  none: an untouched AR model has no diffusion mode")
        return "\n".join(lines + _parent_as_text(figures))
    spread = f" ± {figures['nelbo_standard_error']:.4f}" if figures["nelbo_standard_error"] else ""
    how = "exact enumeration" if figures["num_samples"] is None else f"{figures['num_samples']} masks per block"
    lines.append(
        f"nelbo  {figures['nelbo']:.4f}{spread} nats/token  {figures['nelbo_bits_per_byte']:.4f} bits/byte  "
        f"(diffusion mode, bound, {how})"
    )
    return "\n".join(lines + _parent_as_text(figures))


def _parent_as_text(figures: dict[str, Any]) -> list[str]:
    """The lines of --parent, none without it."""
    parent = figures.get("parent")
    if parent is None:
        return []
    nll, bits = parent["nll"], parent["nll_bits_per_byte"]
    lines = [f"parent {nll:.4f} nats/token  {bits:.4f} bits/byte  (AR mode, exact, {parent['model']})"]
    if "prompt" in figures:
        rate, mode = figures["tokens_per_forward"], figures["mode"]
        lines += [
            f"prompt {figures['prompt']!r}",
            f"parent {parent['text']!r}  ({parent['tokens_per_forward']:.2f} tokens per forward)",
            f"model  {figures['text']!r}  ({rate:.2f} tokens per forward, mode {mode})",
        ]
    return lines


def _run_tasks(
    model: str, loading: dict[str, Any], tasks: str, of_tasks: dict[str, Any], bound: dict[str, Any],
    decoder: dict[str, Any], output: Path | None, part: Shard | None,
) -> dict[str, Any] | RunFolder:  # fmt: skip
    """`evaluate --tasks`: its results, or the folder of a part."""
    try:
        from unmask.evaluation.harness import load_tasks, run_tasks, write_results
        from unmask.evaluation.lm_eval import HarnessLM
        from unmask.evaluation.task_parts import answers, describe
    except ImportError as error:
        raise ValueError(f'--tasks needs lm-evaluation-harness ({error}): pip install "unmask[eval]"') from error
    names, folder = [name.strip() for name in tasks.split(",")], of_tasks.pop("tasks_folder", None)
    loaded = load_tasks(names, folder)

    lm = opened(model, loading)
    size = {name: of_tasks.pop(name) for name in ("batch_size", "max_length") if name in of_tasks}
    harness = HarnessLM(lm, show_progress=True, **bound, **decoder, **size)
    if part is None:
        results = run_tasks(harness, loaded, **of_tasks)
        if output is not None:
            write_results(results, output)
        return results

    def fill(place: RunFolder) -> dict[str, Any]:
        rows, costs = answers(harness, loaded, part, **of_tasks)
        place.write_rows(rows)
        return {"costs": costs}

    assert output is not None
    return write_part(output, part, describe(model, harness, names, folder, of_tasks, loading), fill)


@app.command(epilog="Example: unmask embed runs/q sentences.jsonl --output sentences.npy")
@takes_options(*LOADING)
def embed(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id."))],
    file: Annotated[Path, typer.Argument(help="A .txt, .jsonl or .parquet file of texts.")],
    output: Annotated[Path, typer.Option(help=".npy (vectors alone), .jsonl or .parquet (text and embedding).")],
    pattern: Annotated[
        str | None,
        typer.Option(help="causal, bidirectional or block_causal; by default bidirectional if converted, else causal."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files.")] = "text",
    skip_invalid: Annotated[bool, typer.Option(help="Leave broken documents out instead of stopping.")] = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Texts as vectors: the mean of the last hidden states, one vector a document, in the file's order."""
    from unmask.data.readers import read_documents
    from unmask.data.sources import local_files
    from unmask.evaluation.embed import check_output, write_embeddings

    check_output(output)
    files = local_files([file], "file")
    options: dict[str, Any] = {"text_column": text_column, "skip_invalid": skip_invalid, "note": note}
    texts = [text for one in files for text in read_documents(one, **options)]
    if not texts:
        raise ValueError(f"file {str(file)!r} holds no documents")

    lm = opened(model, loading, "embed")
    vectors = lm.embed(texts, pattern, show_progress=True)
    write_embeddings(output, texts, vectors)
    used = pattern or lm.embedding_pattern
    if as_json:
        print(to_json({"output": str(output), "num_texts": len(texts), "size": vectors.shape[1], "pattern": used}))
        return
    print(f"{len(texts)} vectors of {vectors.shape[1]} ({used}) in {output}")
