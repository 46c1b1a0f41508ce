"""Options that several commands share: of loading a model, of decoding, of tasks; and the model that they open.

None of them has a default of its own: what is not given is left to the library, and what is given to a mode that does
not read it is refused by the library, with the mode's name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Base, TrustRemoteCode
from unmask.limits import number_of_tokens
from unmask.parts import Shard
from unmask.plain_json import to_json
from unmask.progress import announce

LOADING: dict[str, Any] = {
    "base": Base,
    "device": Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default a GPU if there is one.")],
    "dtype": Annotated[str | None, typer.Option(help="float32, bfloat16, float16; by default the folder's own.")],
    "trust_remote_code": TrustRemoteCode,
}
"""Options of `unmask.load`."""

DECODER: dict[str, Any] = {
    "mode": Annotated[
        str | None, typer.Option(help="diffusion, ar or speculative; by default the best that the checkpoint has.")
    ],
    "block_size": Annotated[int | None, typer.Option(help="Decode in blocks of another size.")],
    "max_denoising_steps": Annotated[int | None, typer.Option(help="Forwards per block at most.")],
    "confidence_threshold": Annotated[
        float | None, typer.Option(help="Commit tokens of higher probability: 1 is one a forward, 0 a block.")
    ],
    "window": Annotated[
        int | None, typer.Option(help="Masked positions of a block that a forward sees; faster, and worse.")
    ],
    "draft_length": Annotated[
        str | None, typer.Option(help="Positions drafted at a time in speculative mode, or auto.")
    ],
    "cycle": Annotated[
        str | None,
        typer.Option(help="Forwards of a speculative cycle: one, two, or auto, the faster one."),
    ],
    "guidance_scale": Annotated[float | None, typer.Option(help="Of classifier-free guidance; 1 is none.")],
}
"""Options of the decoders of `unmask.sampling`."""

SAMPLING: dict[str, Any] = {
    "temperature": Annotated[float | None, typer.Option(help="0, the default, is greedy.")],
    "top_p": Annotated[float | None, typer.Option(help="Sample from the smallest set of tokens with this mass.")],
    "top_k": Annotated[int | None, typer.Option(help="Sample from so many tokens at most.")],
    "stop": Annotated[list[str] | None, typer.Option(help="End where this text appears; can be repeated.")],
    "seed": Annotated[int | None, typer.Option(help="The same seed gives the same text.")],
}
"""Options of every decoder."""

CONSTRAINT: dict[str, Any] = {
    "json_schema": Annotated[
        str | None, typer.Option(help="Write JSON of this schema: a file, its text, or json_object for any object.")
    ],
    "regex": Annotated[str | None, typer.Option(help="Write text that this regular expression matches as a whole.")],
    "grammar": Annotated[str | None, typer.Option(help="Write text of this Lark grammar: a file, or its text.")],
}
"""Options of modes ar and speculative: one of them is `constraint` of `DiffusionLM.generate`."""


TASKS: dict[str, Any] = {
    "tasks_folder": Annotated[str | None, typer.Option(help="Tasks: folder with task files of your own.")],
    "limit": Annotated[float | None, typer.Option(help="Tasks: documents of each, or a share below 1.")],
    "num_fewshot": Annotated[int | None, typer.Option(help="Tasks: solved examples in the prompt.")],
    "batch_size": Annotated[int | None, typer.Option(help="Tasks: rows at a time, by default 16.")],
    "max_length": Annotated[int | None, typer.Option(help="Tasks: a shorter context than the model's.")],
    "gen_kwargs": Annotated[
        str | None, typer.Option(help="Tasks: NAME=VALUE,... in place of a task's own, as max_gen_toks=64.")
    ],
    "apply_chat_template": Annotated[bool | None, typer.Option(help="Tasks: as messages in the chat template.")],
    "confirm_run_unsafe_code": Annotated[bool | None, typer.Option(help="Tasks: run code that the model wrote.")],
    "output": Annotated[
        Path | None, typer.Option(help="Folder for results.json, the samples of tasks, and parts of --shard.")
    ],
}
"""Options of `evaluate --tasks` besides those of decoding; a task says itself how it samples."""

Part = Annotated[
    str | None,
    typer.Option(help="Do part i/n of the work, 1/n to n/n, for `unmask merge`; --output is the folder of all parts."),
]


def tokens_of(max_tokens: str) -> int:
    """The number that --max-tokens gives."""
    return number_of_tokens(max_tokens, "--max-tokens")


def part_of(shard: str | None, output: Path | None) -> Shard | None:
    """The part that --shard names; ValueError for one without --output."""
    if shard is None:
        return None
    part = Shard.parse(shard)
    if output is None:
        raise ValueError(f"--shard {shard} needs --output, the folder of all parts, where this one is kept")
    return part


def show_part(folder: Path, part: Shard, as_json: bool) -> None:
    """Say that a part is finished, and how all are put together."""
    if as_json:
        print(to_json({"part": str(part), "folder": str(folder)}))
    else:
        print(f"{folder} is finished; when all parts are: unmask merge {folder.parent}")


_TABLES = {"loading": LOADING, "decoder": DECODER, "sampling": SAMPLING | CONSTRAINT, "of_tasks": TASKS}
"""The parameter of a command that gets the options of a table, by name."""


def takes_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add these options of the tables to a command, which gets those that were given, a dictionary for each table.

    `loading` holds keywords of `unmask.load`, `decoder` of `DiffusionLM.decoder`, `sampling` of `DiffusionLM.generate`,
    `of_tasks` of the harness.
    """
    added = {name: (LOADING | DECODER | SAMPLING | CONSTRAINT | TASKS)[name] for name in names}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def call(**arguments: Any) -> None:
            asked = {name: arguments.pop(name) for name in names}
            given = {name: value for name, value in asked.items() if value is not None and value is not False}
            for table in tables:
                of_table = {_KEYWORDS.get(name, name): value for name, value in given.items() if name in _TABLES[table]}
                arguments[table] = _READ[table](of_table)
            command(**arguments)

        own = inspect.signature(command, eval_str=True)
        tables = [name for name in own.parameters if name in _TABLES]
        kept = [entry for name, entry in own.parameters.items() if name not in _TABLES]
        kind = inspect.Parameter.KEYWORD_ONLY
        new = [inspect.Parameter(name, kind, default=None, annotation=what) for name, what in added.items()]
        call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, command.__module__
        call.__signature__ = own.replace(parameters=[entry.replace(kind=kind) for entry in kept] + new)  # type: ignore[attr-defined]
        call.__annotations__ = {entry.name: entry.annotation for entry in kept} | added
        return call

    return decorate


_KEYWORDS = {"stop": "stop_strings"}


def _with_constraint(sampling: dict[str, Any]) -> dict[str, Any]:
    """One of --json-schema, --regex and --grammar as what it asks for."""
    given = {name: sampling[name] for name in CONSTRAINT if name in sampling}
    if len(given) > 1:
        first, second, *_ = (f"--{name.replace('_', '-')} {value!r}" for name, value in given.items())
        raise ValueError(f"{first} and {second} both say what the text must be: leave one of them out")
    rest = {name: value for name, value in sampling.items() if name not in given}
    for name, value in given.items():
        from unmask.hf import JsonSchema, Lark, Regex

        if name == "regex":
            rest["constraint"] = Regex(value)
        elif name == "grammar":
            has_rules = re.search(r"\bstart\b[^\n]*:", value) is not None
            rest["constraint"] = Lark(_text_or_file(name, value, is_text=has_rules))
        elif value == "json_object":
            rest["constraint"] = value
        else:
            rest["constraint"] = JsonSchema(_text_or_file(name, value, is_text=value.lstrip().startswith("{")))
    return rest


def _text_or_file(name: str, value: str, *, is_text: bool) -> str:
    """The value itself, or what the file of this name holds."""
    if is_text:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ValueError(
            f"--{name.replace('_', '-')} {value!r} is neither the text itself nor a file that can be read ({why})"
        ) from None


def _with_length(decoder: dict[str, Any]) -> dict[str, Any]:
    """draft_length is a number, or the word auto."""
    length = decoder.get("draft_length")
    if length is not None and length.lstrip("-").isdigit():
        return decoder | {"draft_length": int(length)}
    return decoder


_READ: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "loading": dict, "decoder": _with_length, "sampling": _with_constraint, "of_tasks": dict
}  # fmt: skip
"""How the options of a table become keywords."""


def opened(name: str, loading: dict[str, Any], how: str | None = None) -> Any:
    """The `DiffusionLM` of a command, which a line on stderr describes.

    loading: keywords of `unmask.load`. how: what it is used for, such as "mode ar"; by default its best mode.
    """
    import unmask

    lm = unmask.load(name, **loading)
    parameters = sum(p.numel() for p in lm.model.parameters())
    what = "an AR model" if lm.diffusion is None else f"{lm.diffusion.recipe}, {lm.diffusion.shape}"
    dtype = str(lm.model.dtype).removeprefix("torch.")
    announce(
        f"{name}: {parameters:,} parameters, {what}; {how or f'mode {lm.default_mode}'}, {lm.network.device}, {dtype}"
    )
    return lm


def mode_of(decoder: dict[str, Any]) -> str | None:
    """How a model is used whose mode was given."""
    return f"mode {decoder['mode']}" if "mode" in decoder else None


def packed(lm: Any) -> None:
    """Pack the weights on a CPU, where the copy is small beside the memory that is free."""
    import psutil

    num_bytes = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    if 4 * num_bytes < psutil.virtual_memory().available:
        lm.pack()
