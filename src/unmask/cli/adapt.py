"""Commands that make models: adapt, demo."""

from __future__ import annotations

import difflib
import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Json, app, name_of
from unmask.cli.options import takes_options, tokens_of
from unmask.plain_json import to_json
from unmask.progress import say

_located = name_of("")["callback"]


def _model(name: str | None) -> str | None:
    """Look a model's name up; with --config the first word may be a setting already."""
    return name if name is None or _is_setting(name) else _located(name)


def _recipe_names(incomplete: str) -> list[str]:
    from unmask.recipe import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def _setting_names(incomplete: str) -> list[str]:
    from unmask.settings import TABLE

    return [f"{name}=" for name in TABLE if name.startswith(incomplete)]


@app.command(
    epilog="Example: unmask adapt Qwen/Qwen3-0.6B-Base --data corpus.jsonl --output runs/q --max-tokens 50000000 "
    "block_size=16 mixed_precision=bf16"
)
@takes_options("base", "device", "trust_remote_code")
def adapt(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Folder or hub id of a causal language model.", callback=_model, autocompletion=_setting_names
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(help="SETTING=VALUE of the recipe (see `unmask recipes NAME`).", autocompletion=_setting_names),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="A .txt, .jsonl or .parquet file, a folder of them or of prepared data, or a hub id; several names "
            "follow each other, or are mixed as NAME:WEIGHT.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run: checkpoints, metrics, final model.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Name of a recipe (see `unmask recipes`), or a .toml file of settings; by default a converted model's "
            "own, else tri-mode.",
            autocompletion=_recipe_names,
        ),
    ] = None,
    max_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER", help="Clean, unpadded training tokens, such as 10M; without it, one pass over the data."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A .toml file with model, data, output, recipe and settings of the run.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the saved weights (setting save_dtype); the setting dtype is theirs during the run."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Continue the run in the output folder.")] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Read model and data, say what the run would do, write nothing.")
    ] = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Convert a model by training it on text. What the command line says goes before what --config says."""
    words = [*([model] if model is not None and _is_setting(model) else []), *(settings or [])]
    more, chosen = split_settings(words)
    for option, value, name in (("--max-tokens", max_tokens, "max_tokens"), ("--dtype", dtype, "save_dtype")):
        if value is not None and name in chosen:
            raise ValueError(f"{option} {value} and {name}={chosen[name]} both say the same: leave one of them out")
    sources: list[str] = [*(data or []), *more]
    own = {"model": None if model is None or _is_setting(model) else model, "data": sources or None,
           "output": None if output is None else str(output), "recipe": recipe, "resume": resume or None,
           "max_tokens": None if max_tokens is None else tokens_of(max_tokens), "save_dtype": dtype}  # fmt: skip
    wanted = (read_run_file(config) if config is not None else {}) | chosen | loading
    wanted |= {name: value for name, value in own.items() if value is not None}
    for name, what in (("model", "MODEL"), ("data", "--data FILE"), ("output", "--output FOLDER")):
        if not wanted.get(name) and not (dry and name == "output"):
            raise ValueError(f"adapt lacks {what}: give it, or {name} = ... in the file of --config")

    import unmask
    from unmask.training.checkpoints import latest_checkpoint
    from unmask.training.ranks import join, leave

    named = [wanted["data"]] if isinstance(wanted["data"], str) else list(wanted["data"])
    wanted["data"] = [Path(name) if name else name for name in named]  # names, never texts
    folder = Path(wanted.pop("output", ""))
    if dry:
        if resume:
            raise ValueError("--dry-run writes nothing, so there is nothing to --resume: leave one of them out")
        _print_dry_run(wanted, as_json)
        return
    try:
        unmask.adapt(**wanted, output_dir=folder)
    except KeyboardInterrupt:
        newest = latest_checkpoint(folder) if folder.is_dir() else None
        what = "no checkpoint was saved yet" if newest is None else f"continue from {newest.name} with --resume"
        say(f"interrupted: {what}")
        raise
    is_main = join().is_main_process
    leave()
    if not is_main:
        return
    run = json.loads((folder / "run.json").read_text())
    if as_json:
        print(
            to_json({"output": str(folder), "tokens": run["tokens"], **run["evaluation"], "settings": run["settings"]})
        )
        return
    print(f"saved to {folder}")


def _print_dry_run(wanted: dict[str, Any], as_json: bool) -> None:
    """What a run of these arguments of `adapt` would do."""
    from unmask.conversion.dry_run import dry_run

    found = dry_run(**wanted)
    if as_json:
        print(to_json(asdict(found) | {"memory": found.memory._asdict()}))
        return
    settings = found.settings
    print(f"{settings['recipe']}: {found.steps:,} steps of {settings['batch_size']} rows of {settings['max_length']:,} "
          f"tokens, {found.tokens:,} training tokens, learning rate {settings['learning_rate']:g}")  # fmt: skip
    documents = "a stream" if found.documents is None else f"{found.documents:,} documents"
    print(f"{documents} to train on, {found.held_out:,} held out")
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in found.memory._asdict().items() if value)
    print(f"memory on one device, estimated: {sum(found.memory) / 1e9:.2f} GB ({parts})")
    for number, row in enumerate(found.rows, 1):
        shown = row if len(row) <= SHOWN else f"{row[: SHOWN // 2]} ... {row[-SHOWN // 2 :]}"
        print(f"row {number}: {shown!r}")


SHOWN = 400
"""Characters of a row that a dry run prints."""


def read_run_file(path: Path) -> dict[str, Any]:
    """The arguments of `adapt` in a TOML file: model, data, output, recipe, resume, options of loading, and settings.

    Settings may stand in a table [settings] of their own. ValueError for a file that is none, and for what no run has.
    """
    from unmask.recipe import read_toml
    from unmask.settings import TABLE

    found = read_toml(path, "--config")
    table = found.pop("settings", {})
    if not isinstance(table, dict):
        raise ValueError(f"--config {str(path)!r}: settings={table!r} must be a table [settings]")
    kinds = {"model": str, "output": str, "recipe": str, "base": str, "device": str, "resume": bool,
             "trust_remote_code": bool, "data": (str, list)}  # fmt: skip
    for name, kind in kinds.items():
        value = found.get(name)
        if name in found and not isinstance(value, kind):  # type: ignore[arg-type]
            raise ValueError(f"--config {str(path)!r}: {name}={value!r} has the wrong type")
    for name in found:
        if name not in (known := [*kinds, *TABLE]):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it may have {', '.join(kinds)}, and settings"
            raise ValueError(f"--config {str(path)!r}: {name!r} is unknown: {hint}")
    names = found.get("data", [])
    if not isinstance(names, str) and not all(isinstance(name, str) for name in names):
        raise ValueError(f"--config {str(path)!r}: data={names!r} must be a text or a list of texts")
    if twice := sorted(found.keys() & table.keys()):
        raise ValueError(f"--config {str(path)!r} sets {twice[0]} twice, inside [settings] and outside")
    return found | table


def _is_setting(word: str) -> bool:
    name, separator, _ = word.partition("=")
    return bool(separator) and name.isidentifier() and not Path(word).exists()


_OPTIONS = {
    "model": "the model first", "data": "--data FILE", "output": "--output FOLDER", "output_dir": "--output FOLDER",
    "recipe": "--recipe NAME", "resume": "--resume", "base": "--base FOLDER", "device": "--device NAME",
    "dtype": "--dtype TYPE", "trust_remote_code": "--trust-remote-code", "show_progress": "-q for false",
}  # fmt: skip
"""What is written as SETTING=VALUE in Python and in run files, and as an option on the command line."""


def split_settings(items: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Further data files, and SETTING=VALUE pairs with TOML values (bare words are strings).

    Raises ValueError for a setting that there is not, and for one that is written otherwise.
    """
    from unmask.recipe import check_setting_name
    from unmask.settings import TABLE

    files, chosen = [], {}
    for item in items:
        name, separator, raw = item.partition("=")
        if not separator or not name.isidentifier():
            setting = name.strip().lstrip("-").replace("-", "_")
            if setting in TABLE and not Path(item).exists():
                raise ValueError(
                    f"{item!r} is no file and no setting: write {setting}={raw.strip() or 'VALUE'} as one word"
                )
            files.append(item)
            continue
        if name in _OPTIONS:
            raise ValueError(f"{item!r} is no setting but an option: write {_OPTIONS[name]}")
        check_setting_name(name)
        try:
            chosen[name] = tomllib.loads(f"value = {raw}")["value"]
        except tomllib.TOMLDecodeError:
            chosen[name] = raw
    return files, chosen


@app.command(epilog="Example: unmask demo; unmask demo Qwen/Qwen3-0.6B-Base --data corpus.txt --output runs/q")
@takes_options("base", "device", "trust_remote_code")
def demo(
    model: Annotated[
        str | None, typer.Argument(**name_of("Folder or hub id; without it, the models of a checkout are shown."))
    ] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Text to adapt MODEL on.")] = None,
    output: Annotated[Path, typer.Option(help="Where pages and the converted model go.")] = Path("runs/demo"),
    max_tokens: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Training tokens of MODEL's conversion: 400k.")
    ] = None,
    *,
    loading: dict[str, Any],
) -> None:
    """Show what a conversion does, on the models of a checkout; or convert MODEL on --data and show both."""
    given = {
        "--data": data and data[0],
        "--max-tokens": max_tokens,
        **{f"--{name.replace('_', '-')}": value for name, value in loading.items()},
    }
    from unmask.run_folder import check_can_be_written

    check_can_be_written(output, "--output")
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

    run_demo(model, data, output, tokens_of("400k" if max_tokens is None else max_tokens), loading)
