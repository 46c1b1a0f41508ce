"""Commands that make models: adapt, demo."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Base, Json, TrustRemoteCode, app, name_of
from unmask.plain_json import to_json


@app.command(
    epilog="Example: unmask adapt Qwen/Qwen3-0.6B-Base --data corpus.jsonl --output runs/q --max-tokens 50000000 "
    "block_size=16 mixed_precision=bf16"
)
def adapt(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id of a causal language model."))],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="A .txt, .jsonl or .parquet file, a folder of them or of prepared data, or a hub id; several names "
            "follow each other, or are mixed as NAME:WEIGHT.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the run: checkpoints, metrics, final model.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="SETTING=VALUE of the recipe (see `unmask recipes NAME`).")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a recipe (see `unmask recipes`); by default a converted model's own, else tri-mode."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Clean, unpadded training tokens; without it, one pass over the data.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the output folder.")] = False,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Convert a model by training it on text."""
    more, chosen = split_settings(settings or [])
    if max_tokens is not None:
        chosen["max_tokens"] = max_tokens

    import unmask
    from unmask.training.checkpoints import latest_checkpoint
    from unmask.training.ranks import join, leave

    sources = [Path(name) if name else name for name in (*data, *more)]  # names, never texts
    try:
        unmask.adapt(
            model, sources, recipe, output, resume=resume, base=base, trust_remote_code=trust_remote_code, **chosen
        )
    except KeyboardInterrupt:
        newest = latest_checkpoint(output) if output.is_dir() else None
        what = "no checkpoint was saved yet" if newest is None else f"continue from {newest.name} with --resume"
        print(f"interrupted: {what}", file=sys.stderr)
        raise
    is_main = join().is_main_process
    leave()
    if not is_main:
        return
    run = json.loads((output / "run.json").read_text())
    if as_json:
        print(
            to_json({"output": str(output), "tokens": run["tokens"], **run["evaluation"], "settings": run["settings"]})
        )
        return
    for name, value in run["evaluation"].items():
        print(f"held-out {name}: {value:.4f} nats per predicted token", file=sys.stderr)
    print(f"saved to {output}")


def split_settings(items: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Further data files, and SETTING=VALUE pairs with TOML values (bare words are strings)."""
    files, chosen = [], {}
    for item in items:
        name, separator, raw = item.partition("=")
        if not separator or not name.isidentifier():
            files.append(item)
            continue
        try:
            chosen[name] = tomllib.loads(f"value = {raw}")["value"]
        except tomllib.TOMLDecodeError:
            chosen[name] = raw
    return files, chosen


@app.command(epilog="Example: unmask demo; unmask demo Qwen/Qwen3-0.6B-Base --data corpus.txt --output runs/q")
def demo(
    model: Annotated[
        str | None, typer.Argument(**name_of("Folder or hub id; without it, the models of a checkout are shown."))
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Text to adapt MODEL on.")] = None,
    output: Annotated[Path, typer.Option(help="Where pages and the converted model go.")] = Path("runs/demo"),
    max_tokens: Annotated[int | None, typer.Option(help="Training tokens of MODEL's conversion: 400,000.")] = None,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what a conversion does, on the models of a checkout; or convert MODEL on --data and show both."""
    given = {
        "--data": data,
        "--max-tokens": max_tokens,
        "--base": base,
        "--trust-remote-code": trust_remote_code or None,
    }
    unread = [f"{name} {value}" for name, value in given.items() if value is not None]
    if model is None:
        if unread:
            raise ValueError(f"{unread[0]} is for a model of your own: name it (unmask demo MODEL), or leave it out")
        from unmask.cli.showcase import run_showcase

        run_showcase(output)
        return
    if not data:
        raise ValueError(f"unmask demo {model} needs text to convert it on: give --data FILE")
    from unmask.cli.demo import run_demo

    run_demo(model, data, output, 400_000 if max_tokens is None else max_tokens, base, trust_remote_code)
