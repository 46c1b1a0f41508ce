"""Commands that measure a checkpoint or make vectors with it: evaluate, embed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Json, app, name_of
from unmask.cli.options import DECODER, LOADING, TASKS, opened, takes_options
from unmask.limits import MOST_SAMPLES, check_whole
from unmask.plain_json import to_json
from unmask.progress import note


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
    if tasks is not None:
        if data or more or max_documents is not None:
            raise ValueError(f"--tasks {tasks} brings its own documents: leave --data, and take fewer with --limit")
        if parent is not None:
            raise ValueError(f"--parent {parent} is for --data: run the tasks on the parent itself, and compare")
        results = _run_tasks(model, loading, tasks, of_tasks, bound | decoder)
        if as_json:
            figures = {name: value for name, value in results.items() if name not in ("samples", "configs")}
            print(to_json(figures, default=str))
        else:
            from unmask.evaluation.harness import table

            print(table(results))
        return
    for name, value in (of_tasks | decoder).items():
        raise ValueError(f"--{name.replace('_', '-')} {value} is for --tasks: leave it out, or name tasks")
    check_whole("--num-samples", num_samples, most=MOST_SAMPLES)
    check_whole("--block-size", block_size)
    if not data:
        raise ValueError("evaluate needs --data FILE, or --tasks NAME of lm-evaluation-harness")
    texts = _documents([*data, *(more or [])], max_documents, text_column, skip_invalid)
    figures = _likelihoods(model, loading, texts, bound, parent)
    print(to_json(figures) if as_json else _as_text(figures))


def _documents(files: Sequence[str], limit: int | None, text_column: str, skip_invalid: bool) -> list[str]:
    """The first `limit` documents of the files."""
    from unmask.data.readers import read_documents
    from unmask.data.sources import local_files

    check_whole("--max-documents", limit)
    paths = local_files(files, "data")
    texts: list[str] = []
    for path in paths:
        for text in read_documents(path, text_column=text_column, skip_invalid=skip_invalid, note=note):
            if limit is not None and len(texts) >= limit:
                break
            texts.append(text)
        if not texts:
            raise ValueError(f"data file {str(path)!r} holds no documents")
    return texts


def _likelihoods(
    model: str, loading: dict[str, Any], texts: list[str], bound: dict[str, Any], parent: str | None = None
) -> dict[str, Any]:
    """The figures of --json: nats per predicted token and bits per byte, None where the checkpoint has no such mode.

    parent: a model whose figures stand beside them, with what both write.
    """
    from unmask.evaluation.likelihood import summarise

    lm = opened(model, loading, "likelihood")
    exact, block_size = bound["exact"], bound["block_size"]
    if lm.diffusion is None and (exact or block_size is not None):
        raise ValueError(f"model {model!r} is an untouched AR model and has no blocks: leave --block-size and --exact")
    of_parent = None if parent is None else _load_parent(parent, lm, loading)
    nll = summarise(lm.nll(texts, show_progress=True))
    nelbo = None if lm.diffusion is None else summarise(lm.nelbo(texts, show_progress=True, **bound))
    figures = {
        "nll": nll.nats_per_token,
        "nelbo": nelbo and nelbo.nats_per_token,
        "nelbo_standard_error": nelbo and (0.0 if exact else nelbo.standard_error),
        "nll_bits_per_byte": nll.bits_per_byte,
        "nelbo_bits_per_byte": nelbo and nelbo.bits_per_byte,
        "num_documents": nll.num_documents,
        "num_tokens": nll.num_tokens,
        "num_samples": bound["num_samples"] if nelbo and not exact else None,
        "block_size": (block_size or lm.diffusion.block_size) if lm.diffusion else None,
    }
    return figures if of_parent is None else figures | _beside(parent, of_parent, lm, texts)


def _load_parent(name: str, lm: Any, loading: dict[str, Any]) -> Any:
    """The parent; ValueError for a model that `lm` cannot be compared with."""
    from unmask.evaluation.beside import check_same_vocabulary

    parent = opened(name, {key: value for key, value in loading.items() if key != "base"}, "mode ar")
    check_same_vocabulary(parent.tokenizer, lm.tokenizer, f"parent {name!r}", "the model")
    return parent


def _beside(name: str | None, parent: Any, lm: Any, texts: list[str]) -> dict[str, Any]:
    """The parent's figures, and what it and `lm` write after the beginnings of the texts."""
    from unmask.evaluation.beside import beginnings, write
    from unmask.evaluation.likelihood import summarise

    nll = summarise(parent.nll(texts, show_progress=True))
    of_parent = {"model": name, "nll": nll.nats_per_token, "nll_bits_per_byte": nll.bits_per_byte}
    prompts = beginnings(
        [document.ids for document in lm._documents(texts)], lm.diffusion and lm.diffusion.mask_token_id
    )
    if not len(prompts):
        return {"parent": of_parent}
    both = {"parent": write(parent, prompts, "ar"), "model": write(lm, prompts)}
    of_parent |= {"text": both["parent"].text, "tokens_per_forward": both["parent"].tokens_per_forward}
    return {
        "parent": of_parent,
        "prompt": lm.tokenizer.decode(prompts[0]),
        "text": both["model"].text,
        "mode": lm.default_mode,
        "tokens_per_forward": both["model"].tokens_per_forward,
    }


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
    model: str, loading: dict[str, Any], tasks: str, of_tasks: dict[str, Any], scoring: dict[str, Any]
) -> dict[str, Any]:
    """`evaluate --tasks`: `scoring` are the options of the bound and of decoding."""
    try:
        from unmask.evaluation.harness import load_tasks, run_tasks, write_results
        from unmask.evaluation.lm_eval import HarnessLM
    except ImportError as error:
        raise ValueError(f'--tasks needs lm-evaluation-harness ({error}): pip install "unmask[eval]"') from error
    loaded = load_tasks([name.strip() for name in tasks.split(",")], of_tasks.pop("tasks_folder", None))

    lm = opened(model, loading)
    output = of_tasks.pop("output", None)
    size = {name: of_tasks.pop(name) for name in ("batch_size", "max_length") if name in of_tasks}
    results = run_tasks(HarnessLM(lm, show_progress=True, **scoring, **size), loaded, **of_tasks)
    if output is not None:
        write_results(results, output)
    return results


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
