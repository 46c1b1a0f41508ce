"""Commands of the lab: frontier, bench, study."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Json, Temperature, app, name_of
from unmask.cli.options import LOADING, Part, part_of, show_part, takes_options, tokens_of
from unmask.limits import MOST_ROUNDS, check_whole
from unmask.plain_json import to_json
from unmask.tables import wrapped
from unmask.version import __version__


@app.command(
    epilog="Example: unmask frontier runs/q --data test.jsonl --thresholds 0.5,0.7,0.9 --rule entropy-bound=0.1,0.5 "
    "--output results/q"
)
@takes_options(*LOADING)
def frontier(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id of a converted model."))],
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Files whose documents' beginnings are the prompts.")
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(help="Further data files.", show_default=False)] = None,
    text_column: Annotated[str, typer.Option(help="Column of .jsonl and .parquet files.")] = "text",
    skip_invalid: Annotated[bool, typer.Option(help="Leave broken documents out instead of stopping.")] = False,
    task: Annotated[str | None, typer.Option(help="A task with answers instead of data: copy, reverse, ...")] = None,
    parent: Annotated[
        str | None, typer.Option(**name_of("The AR model it was made from; by default what its folder records."))
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
    shard: Part = None,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Quality against tokens per forward and speed, always beside the AR parent in the same run."""
    files = [*(data or []), *(more or [])]
    if bool(files) == (task is not None):
        raise ValueError(f"--data {files} and --task {task}: give documents to begin with, or one task, and not both")

    part = part_of(shard, output)

    import torch

    from unmask.lab.frontier_folder import run_frontier
    from unmask.lab.sweep import Sweep, parse_rules, whole_numbers

    torch.set_num_threads(1)
    sweep = Sweep(
        rules=parse_rules(thresholds, rule or []), num_prompts=prompts, prompt_tokens=prompt_tokens,
        block_sizes=(None,) if block_sizes is None else whole_numbers(block_sizes, "block_sizes"),
        batch_sizes=whole_numbers(batch_sizes, "batch_sizes"), max_new_tokens=max_new_tokens, rounds=rounds,
        oracle=oracle, temperature=temperature, seed=seed,
    )  # fmt: skip
    rows, run = run_frontier(
        model,
        sweep,
        data=files,
        text_column=text_column,
        skip_invalid=skip_invalid,
        task=task,
        parent=parent,
        output=output,
        shard=part,
        **loading,
    )
    if part is not None and output is not None:
        show_part(output / part.folder_name, part, as_json)
    else:
        show_frontier(rows, run, as_json)


def show_frontier(rows: Any, run: dict[str, Any], as_json: bool) -> None:
    """Print the rows of a frontier."""
    from unmask.lab.sweep import areas, table

    if as_json:
        print(to_json({"rows": [asdict(row) for row in rows], "aup": areas(rows), "settings": run}))
    else:
        print("\n".join([table(rows), *(f"AUP {area:7.2f}  {name}" for name, area in areas(rows).items())]))


@app.command(epilog="Example: unmask bench decode --json; unmask bench train runs/q --rounds 3")
@takes_options(*LOADING)
def bench(
    what: Annotated[str, typer.Argument(help="train or decode.")],
    model: Annotated[str | None, typer.Argument(**name_of("Folder or hub id instead of random weights."))] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random Qwen3 weights of this shape: tiny, the default, 0.6b, 4b or 8b.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile our decoding passes (a GPU replays them as CUDA graphs).")
    ] = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Speed and memory beside the plain AR baseline of the same model, as ratios from one run."""
    if what not in ("train", "decode"):
        raise ValueError(f"bench {what!r} is unknown: use train or decode")
    check_whole("--rounds", rounds, most=MOST_ROUNDS)
    if "base" in loading and model is None:
        raise ValueError(f"--base {loading['base']} is for a drafter or an adapter: give its folder, or leave it out")
    if compiled and what == "train":
        raise ValueError("--compile is for decoding: leave it out of bench train")
    if model is not None and shape is not None:
        raise ValueError(f"--shape {shape} is for random weights, and model {model!r} has its own: give one of them")
    measured = model or shape or "tiny"

    import torch
    import transformers

    from unmask.lab.bench_decode import bench_decode
    from unmask.lab.bench_train import bench_train

    torch.set_num_threads(1)
    cases: Any = (
        bench_train(measured, rounds, **loading)
        if what == "train"
        else bench_decode(measured, rounds, compiled=compiled, **loading)
    )
    settings = {
        "shape": measured,
        "rounds": rounds,
        "device": loading.get("device", "cuda" if torch.cuda.is_available() else "cpu"),
        "threads": 1,
        "unmask": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if as_json:
        print(to_json({"cases": [asdict(case) for case in cases], "settings": settings}))
        return
    first = next(cases)  # what is refused prints nothing else
    print(wrapped("  ".join(f"{name} {value}" for name, value in settings.items())), flush=True)
    for case in itertools.chain([first], cases):
        figures = f"ours {case.value:.4g}, AR {case.baseline:.4g} {case.unit}"
        print(wrapped(f"{case.case:20} ratio {case.ratio:.3f}   {figures}"), flush=True)


@app.command(
    epilog="Example: unmask study attention stories260k --data train.txt --eval valid.txt --output runs/attention "
    "--max-tokens 600000 --seeds 0,1,2"
)
@takes_options("base", "device", "trust_remote_code")
def study(
    name: Annotated[
        str | None, typer.Argument(help="A study that ships with unmask, or a .toml file; without it, list them.")
    ] = None,
    model: Annotated[str | None, typer.Argument(**name_of("Folder or hub id of the AR parent."))] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="Training text of every arm; can be repeated.")
    ] = None,
    evaluation: Annotated[
        list[str] | None, typer.Option("--eval", help="Held-out text that all arms are measured on; can be repeated.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the study: runs, rows.jsonl, report.md.")] = None,
    max_tokens: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Training tokens of every arm, such as 10M.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds with commas between, as 0,1,2.")] = None,
    arms: Annotated[str | None, typer.Option(help="Only these arms, with commas between.")] = None,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Compare recipes and settings on one parent at equal tokens; an interrupted study goes on when run again."""
    from unmask.lab.study import choose, load_study, run_study, study_names

    if name is None:
        summaries = {shipped: load_study(shipped).summary for shipped in study_names()}
        print(to_json(summaries) if as_json else "\n".join(f"{key:16} {text}" for key, text in summaries.items()))
        return
    chosen = choose(
        load_study(name), max_tokens=None if max_tokens is None else tokens_of(max_tokens),
        seeds=None if seeds is None else _numbers("--seeds", seeds),
        arms=None if arms is None else [arm.strip() for arm in arms.split(",")],
    )  # fmt: skip
    if model is None or not data or not evaluation or output is None:
        raise ValueError(f"study {name!r} needs a MODEL, --data, --eval and --output")
    rows = run_study(chosen, model, data, evaluation, output, **loading)
    if as_json:
        print(to_json({"study": chosen.name, "output": str(output), "rows": rows}))
    else:
        print((output / "report.md").read_text(), end="")


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r} must be whole numbers with commas between") from None
