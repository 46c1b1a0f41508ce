"""Commands that measure: evaluate, embed, frontier, bench, study."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Json, Temperature, TrustRemoteCode, app
from unmask.plain_json import to_json
from unmask.version import __version__


@app.command(
    epilog="Example: unmask evaluate runs/q --data test.jsonl --num-samples 16 --json; "
    "unmask evaluate runs/q --tasks arc_easy,hellaswag --limit 200 --output results/q"
)
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="A .txt, .jsonl or .parquet file, or a folder of them; can be repeated."),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="Further data files.", show_default=False)] = None,
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
    tasks_folder: Annotated[str | None, typer.Option(help="Tasks: folder with task files of your own.")] = None,
    mode: Annotated[str | None, typer.Option(help="Tasks: diffusion, ar or speculative.")] = None,
    limit: Annotated[float | None, typer.Option(help="Tasks: documents of each, or a share below 1.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Tasks: solved examples in the prompt.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tasks: rows at a time, by default 16.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tasks: a shorter context than the model's.")] = None,
    confidence_threshold: Annotated[float | None, typer.Option(help="Tasks: of decoding, see generate.")] = None,
    max_denoising_steps: Annotated[int | None, typer.Option(help="Tasks: of decoding, see generate.")] = None,
    gen_kwargs: Annotated[
        str | None, typer.Option(help="Tasks: NAME=VALUE,... in place of a task's own, as max_gen_toks=64.")
    ] = None,
    apply_chat_template: Annotated[bool, typer.Option(help="Tasks: as messages in the chat template.")] = False,
    confirm_run_unsafe_code: Annotated[bool, typer.Option(help="Tasks: run code that the model wrote.")] = False,
    output: Annotated[Path | None, typer.Option(help="Tasks: folder for results.json and every sample.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Likelihood of text (exact NLL in AR mode, NELBO in diffusion mode), or tasks of lm-evaluation-harness."""
    if tasks is not None:
        if data or more or max_documents is not None:
            raise ValueError(f"--tasks {tasks} brings its own documents: leave --data, and take fewer with --limit")
        scoring: dict[str, Any] = {
            "num_samples": num_samples, "exact": exact, "block_size": block_size, "seed": seed, "mode": mode,
            "batch_size": batch_size or 16, "max_length": max_length, "max_denoising_steps": max_denoising_steps,
        }  # fmt: skip
        asked: dict[str, Any] = {
            "limit": limit, "num_fewshot": num_fewshot, "gen_kwargs": gen_kwargs,
            "apply_chat_template": apply_chat_template, "confirm_run_unsafe_code": confirm_run_unsafe_code,
        }  # fmt: skip
        _evaluate_tasks(
            model, trust_remote_code, tasks, tasks_folder, scoring, confidence_threshold, asked, output, as_json
        )
        return
    for option, given in {
        "--tasks-folder": tasks_folder, "--mode": mode, "--limit": limit, "--num-fewshot": num_fewshot,
        "--batch-size": batch_size, "--max-length": max_length, "--confidence-threshold": confidence_threshold,
        "--max-denoising-steps": max_denoising_steps, "--gen-kwargs": gen_kwargs, "--output": output,
        "--apply-chat-template": apply_chat_template or None,
        "--confirm-run-unsafe-code": confirm_run_unsafe_code or None,
    }.items():  # fmt: skip
        if given is not None:
            raise ValueError(f"{option} {given} is for --tasks: leave it out, or name tasks")
    if not data:
        raise ValueError("evaluate needs --data FILE, or --tasks NAME of lm-evaluation-harness")
    from unmask.data.documents import local_files, read_documents

    files = local_files([*data, *(more or [])], "data")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"--max-documents {max_documents} must be at least 1")
    texts: list[str] = []
    for file in files:
        before = len(texts)
        for text in read_documents(file, text_column=text_column, skip_invalid=skip_invalid):
            if max_documents is not None and len(texts) >= max_documents:
                break
            texts.append(text)
        if len(texts) == before and not texts:
            raise ValueError(f"data file {str(file)!r} holds no documents")

    import unmask
    from unmask.evaluation.likelihood import summarise

    lm = unmask.load(model, trust_remote_code=trust_remote_code)
    if lm.diffusion is None and (exact or block_size is not None):
        raise ValueError(f"model {model!r} is an untouched AR model and has no blocks: leave --block-size and --exact")
    exact_nll = summarise(lm.nll(texts, show_progress=True))
    bound = None
    if lm.diffusion is not None:
        bound = summarise(
            lm.nelbo(texts, num_samples=num_samples, exact=exact, block_size=block_size, seed=seed, show_progress=True)
        )
    if as_json:
        print(
            to_json(
                {
                    "nll": exact_nll.nats_per_token,
                    "nelbo": bound and bound.nats_per_token,
                    "nelbo_standard_error": bound and (0.0 if exact else bound.standard_error),
                    "nll_bits_per_byte": exact_nll.bits_per_byte,
                    "nelbo_bits_per_byte": bound and bound.bits_per_byte,
                    "num_documents": exact_nll.num_documents,
                    "num_tokens": exact_nll.num_tokens,
                    "num_samples": num_samples if bound and not exact else None,
                    "block_size": (block_size or lm.diffusion.block_size) if lm.diffusion else None,
                }
            )
        )
        return
    print(f"{exact_nll.num_documents} documents, {exact_nll.num_tokens} predicted tokens")
    print(
        f"nll    {exact_nll.nats_per_token:.4f} nats/token  {exact_nll.bits_per_byte:.4f} bits/byte  (AR mode, exact)"
    )
    if bound is not None:
        spread = f" ± {bound.standard_error:.4f}" if bound.standard_error else ""
        how = "exact enumeration" if exact else f"{num_samples} masks per block"
        print(
            f"nelbo  {bound.nats_per_token:.4f}{spread} nats/token  {bound.bits_per_byte:.4f} bits/byte  "
            f"(diffusion mode, bound, {how})"
        )
    else:
        print("nelbo  none: an untouched AR model has no diffusion mode")


def _evaluate_tasks(
    model: str,
    trust_remote_code: bool,
    tasks: str,
    folder: str | None,
    scoring: dict[str, Any],
    confidence_threshold: float | None,
    asked: dict[str, Any],
    output: Path | None,
    as_json: bool,
) -> None:
    """`evaluate --tasks`: `scoring` is for the harness's model, `asked` for its tasks."""
    try:
        from unmask.evaluation.harness import load_tasks, run_tasks, table, write_results
        from unmask.evaluation.lm_eval import HarnessLM
    except ImportError as error:
        raise ValueError(f'--tasks needs lm-evaluation-harness ({error}): pip install "unmask[eval]"') from error
    from unmask.sampling import Threshold

    select = None if confidence_threshold is None else Threshold(confidence_threshold)
    loaded = load_tasks([name.strip() for name in tasks.split(",")], folder)

    import unmask

    lm = unmask.load(model, trust_remote_code=trust_remote_code)
    harness_lm = HarnessLM(lm, select=select, show_progress=True, **scoring)
    results = run_tasks(harness_lm, loaded, **asked)
    if output is not None:
        write_results(results, output)
    if as_json:
        shown = {name: value for name, value in results.items() if name not in ("samples", "configs")}
        print(to_json(shown, default=str))
        return
    print(table(results))


@app.command(epilog="Example: unmask embed runs/q sentences.jsonl --output sentences.npy")
def embed(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    file: Annotated[Path, typer.Argument(help="A .txt, .jsonl or .parquet file of texts.")],
    output: Annotated[Path, typer.Option(help=".npy (vectors alone), .jsonl or .parquet (text and embedding).")],
    pattern: Annotated[
        str | None,
        typer.Option(help="causal, bidirectional or block_causal; by default bidirectional if converted, else causal."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files.")] = "text",
    skip_invalid: Annotated[bool, typer.Option(help="Leave broken documents out instead of stopping.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Texts as vectors: the mean of the last hidden states, one vector a document, in the file's order."""
    from unmask.data.documents import local_files, read_documents
    from unmask.evaluation.embed import check_output, write_embeddings

    check_output(output)
    files = local_files([file], "file")
    texts = [text for one in files for text in read_documents(one, text_column=text_column, skip_invalid=skip_invalid)]
    if not texts:
        raise ValueError(f"file {str(file)!r} holds no documents")

    import unmask

    lm = unmask.load(model, trust_remote_code=trust_remote_code)
    vectors = lm.embed(texts, pattern, show_progress=True)
    write_embeddings(output, texts, vectors)
    used = pattern or lm.embedding_pattern
    if as_json:
        print(to_json({"output": str(output), "num_texts": len(texts), "size": vectors.shape[1], "pattern": used}))
        return
    print(f"{len(texts)} vectors of {vectors.shape[1]} ({used}) in {output}")


@app.command(
    epilog="Example: unmask frontier runs/q --data test.jsonl --thresholds 0.5,0.7,0.9 --rule entropy-bound=0.1,0.5 "
    "--output results/q"
)
def frontier(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a converted model.")],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Files whose documents' beginnings are the prompts.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="Further data files.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help="A task with answers instead of data: copy, reverse, ...")] = None,
    parent: Annotated[
        str | None, typer.Option(help="The AR model it was made from; by default what its folder records.")
    ] = None,
    thresholds: Annotated[str, typer.Option(help="Confidence thresholds to decode with.")] = "0.1,0.3,0.5,0.7,0.9",
    rule: Annotated[
        list[str] | None,
        typer.Option(help="More rules, as NAME=VALUE,...: factor, entropy-bound, confidence or random."),
    ] = None,
    block_sizes: Annotated[str | None, typer.Option(help="Decode in blocks of these sizes.")] = None,
    batch_sizes: Annotated[str, typer.Option(help="Rows at a time in the timed runs.")] = "1,8,64",
    prompts: Annotated[int, typer.Option(help="Number of prompts.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a document that are given.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 64,
    temperature: Temperature = 0.0,
    rounds: Annotated[int, typer.Option(help="Timed runs of each setting, in turn with the AR parent.")] = 3,
    oracle: Annotated[
        int, typer.Option(help="Find the fewest forwards (speed of light) on so many prompts; 0 leaves it out.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling, and of a task's problems.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder for run.json, rows.jsonl and the figure; continued where it stopped.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quality against tokens per forward and speed, always beside the AR parent in the same run."""
    files = [*(data or []), *(more or [])]
    if bool(files) == (task is not None):
        raise ValueError(f"--data {files} and --task {task}: give documents to begin with, or one task, and not both")

    import torch

    from unmask.lab import sweep

    torch.set_num_threads(1)
    asked = sweep.Sweep(
        rules=sweep.parse_rules(thresholds, rule or []),
        block_sizes=(None,) if block_sizes is None else sweep.whole_numbers(block_sizes, "block_sizes"),
        batch_sizes=sweep.whole_numbers(batch_sizes, "batch_sizes"),
        num_prompts=prompts,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        rounds=rounds,
        oracle=oracle,
        temperature=temperature,
        seed=seed,
    )
    rows, run = sweep.run_frontier(
        model, asked, data=files, task=task, parent=parent, output=output, trust_remote_code=trust_remote_code
    )
    areas = sweep.areas(rows)
    if as_json:
        print(to_json({"rows": [asdict(row) for row in rows], "aup": areas, "settings": run}))
        return
    print(sweep.table(rows))
    for name, area in areas.items():
        print(f"AUP {area:7.2f}  {name}")


@app.command(epilog="Example: unmask bench decode --json; unmask bench train runs/q --rounds 3")
def bench(
    what: Annotated[str, typer.Argument(help="train or decode.")],
    model: Annotated[str | None, typer.Argument(help="Folder or hub id instead of random weights.")] = None,
    shape: Annotated[str, typer.Option(help="Random Qwen3 weights of this shape: tiny, 0.6b, 4b or 8b.")] = "tiny",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile our decoding passes (a GPU replays them as CUDA graphs).")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Speed and memory beside the plain AR baseline of the same model, as ratios from one run."""
    if what not in ("train", "decode"):
        raise ValueError(f"bench {what!r} is unknown: use train or decode")
    if rounds < 1:
        raise ValueError(f"--rounds {rounds} must be at least 1")
    if compiled and what == "train":
        raise ValueError("--compile is for decoding: leave it out of bench train")

    import torch
    import transformers

    from unmask.lab.bench_decode import bench_decode
    from unmask.lab.bench_train import bench_train

    torch.set_num_threads(1)
    cases: Any = (
        bench_train(model or shape, rounds, trust_remote_code=trust_remote_code)
        if what == "train"
        else bench_decode(model or shape, rounds, compiled=compiled, trust_remote_code=trust_remote_code)
    )
    settings = {
        "shape": model or shape,
        "rounds": rounds,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": 1,
        "unmask": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if as_json:
        print(to_json({"cases": [asdict(case) for case in cases], "settings": settings}))
        return
    print("  ".join(f"{name} {value}" for name, value in settings.items()))
    for case in cases:
        print(f"{case.case:20} ratio {case.ratio:.3f}   ours {case.value:.4g}, AR {case.baseline:.4g} {case.unit}")


@app.command(
    epilog="Example: unmask study attention stories260k --data train.txt --eval valid.txt --output runs/attention "
    "--max-tokens 600000 --seeds 0,1,2"
)
def study(
    name: Annotated[
        str | None, typer.Argument(help="A study that ships with unmask, or a .toml file; without it, list them.")
    ] = None,
    model: Annotated[str | None, typer.Argument(help="Folder or hub id of the AR parent.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Training text of every arm; can be repeated.")
    ] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out text that all arms are measured on; can be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the study: runs, rows.jsonl, report.md.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Training tokens of every arm.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds with commas between, as 0,1,2.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms, with commas between.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Compare recipes and settings on one parent at equal tokens; an interrupted study goes on when run again."""
    from unmask.lab.study import choose, load_study, run_study, study_names

    if name is None:
        found = {known: load_study(known).summary for known in study_names()}
        print(to_json(found) if as_json else "\n".join(f"{known:16} {text}" for known, text in found.items()))
        return
    chosen = choose(
        load_study(name), max_tokens=max_tokens, seeds=None if seeds is None else _numbers("--seeds", seeds),
        arms=None if arms is None else [arm.strip() for arm in arms.split(",")],
    )  # fmt: skip
    if model is None or not data or not evaluation or output is None:
        raise ValueError(f"study {name!r} needs a MODEL, --data, --eval and --output")
    rows = run_study(chosen, model, data, evaluation, output, trust_remote_code=trust_remote_code)
    if as_json:
        print(to_json({"study": chosen.name, "output": str(output), "rows": rows}))
    else:
        print((output / "report.md").read_text(), end="")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be whole numbers with commas between") from None
