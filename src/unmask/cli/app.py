"""The command line. Torch is imported inside the commands, so that --help stays fast.

Exit code 0 on success, 2 on bad input with one line on stderr. With --json a command prints exactly one JSON
object on stdout; progress and logs go to stderr.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from unmask.progress import Note, hush, note, say, withdraw
from unmask.version import __version__

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _App(typer.Typer):
    """Commands that all have -q and -v."""

    def command(self, *arguments: Any, **options: Any) -> Callable[[_Command], _Command]:
        """As typer's."""
        register = super().command(*arguments, **options)

        def add(command: _Command) -> _Command:
            register(_with_loudness(command))
            return command

        return add


def _with_loudness(command: Callable[..., Any]) -> Callable[..., Any]:
    def call(quiet: bool, verbose: bool, **arguments: Any) -> Any:
        del quiet, verbose  # their callbacks have done it
        return command(**arguments)

    own = inspect.signature(command, eval_str=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    kept = [entry.replace(kind=kind) for entry in own.parameters.values()]
    new = [inspect.Parameter(name, kind, default=False, annotation=what) for name, what in _LOUDNESS.items()]
    call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, command.__module__
    call.__signature__ = own.replace(parameters=[*kept, *new])  # type: ignore[attr-defined]
    call.__annotations__ = {entry.name: entry.annotation for entry in [*kept, *new]}
    return call


def _be_quiet(quiet: bool) -> None:
    if quiet:
        hush()


def _be_verbose(verbose: bool) -> None:
    _verbose[0] = _verbose[0] or verbose


_verbose = [False]
"""Whether to show what other libraries say, and where errors come from."""

Quiet = Annotated[
    bool, typer.Option("-q", "--quiet", is_eager=True, callback=_be_quiet, help="Show results and errors alone.")
]
Verbose = Annotated[
    bool,
    typer.Option(
        "-v", "--verbose", is_eager=True, callback=_be_verbose,
        help="Show what other libraries say too, and where errors come from.",
    ),
]  # fmt: skip
_LOUDNESS: dict[str, Any] = {"quiet": Quiet, "verbose": Verbose}

app = _App(
    help="Turn any pretrained autoregressive language model into a diffusion language model.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[
    list[str],
    typer.Option("--data", help="A .txt, .jsonl or .parquet file, a folder of them, or a hub id; can be repeated."),
]


def name_of(what: str) -> Any:
    """What makes an argument or option a model's name, which is looked up before anything else is done."""
    return {"help": what, "callback": _located}


def _located(name: str | None) -> str | None:
    from unmask.model_name import locate

    if name is not None:
        locate(name)
        _quiet_libraries()
    return name


Base = Annotated[str | None, typer.Option(**name_of("Where a drafter's or adapter's base lies, if elsewhere."))]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's folder brings.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    del version, quiet, verbose  # their callbacks have done it


def main() -> None:
    """Entry point of the `unmask` command."""
    _set_encodings()
    hush(False)
    withdraw()
    _verbose[0] = False
    try:
        with warnings.catch_warnings():
            _show_notes()
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        say()
    except (ValueError, OSError) as error:
        _fail(_with_options(_said(error)))
    except KeyboardInterrupt:
        sys.exit(130)
    except ImportError as error:
        if "pip install" not in str(error):  # which ours name, see `hf.grammar`
            raise
        _fail(str(error))
    except Exception as error:
        # Usage errors of the parser (typer brings its own copy of click) know their exit code and message.
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        _fail(
            error.format_message() + _given(getattr(error, "param", None)) + _as_setting(error) + _how_to_go_on(error)
        )
    sys.exit(code or 0)


def _show_notes() -> None:
    """The library's own warnings are lines without the place in its code; those of others stay what they are."""
    others: Any = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, Note):
            note(str(message))
        else:
            others(message, category, *place, **more)

    warnings.simplefilter("always", Note)
    warnings.showwarning = show


def _set_encodings() -> None:
    """Standard input is UTF-8 whatever the locale, and output that the locale cannot write is escaped, not lost."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # other bytes are refused where text is read
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _said(error: Exception) -> str:
    """The message of an error; that of a full disk names no file, where a library wrote it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error}): free some space and start again"
    return str(error)


def _with_options(message: str) -> str:
    """A message whose fix is written as this command takes it: what are settings for `adapt` are options here."""
    if not {"evaluate", "embed", "frontier"} & set(sys.argv[1:3]):  # -q and -v may come first
        return message
    return message.replace("text_column=NAME", "--text-column NAME").replace("skip_invalid=true", "--skip-invalid")


def _given(param: Any) -> str:
    """The value that the command line gave an option, for messages that leave it out."""
    for option in getattr(param, "opts", ()):
        values = [sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1]) if word == option]
        if values:  # the last one counts
            return f" (got {values[-1]!r})"
    return ""


def _how_to_go_on(error: Any) -> str:
    """What to do about words that a command lacks or does not take."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if message.startswith("Got unexpected extra argument"):
        return ": put a text of several words in quotes"
    if message.startswith("No such command") and "Did you mean" not in message:
        return " `unmask --help` lists them."
    if message.startswith("Missing ") and context is not None and context.info_name is not None:
        return f" See `unmask {context.info_name} --help`."
    return ""


def _as_setting(error: Any) -> str:
    """How to write an option that `adapt` does not have as one but as a setting."""
    from unmask.settings import TABLE

    option = getattr(error, "option_name", None)
    if option is None or sys.argv[1:2] != ["adapt"]:
        return ""
    name = option.strip("-").replace("-", "_")
    near = difflib.get_close_matches(name, TABLE, n=1, cutoff=0.75)
    if not near:
        return ""
    at = next(i for i, item in enumerate(sys.argv) if item.partition("=")[0] == option)
    _, separator, value = sys.argv[at].partition("=")
    following = sys.argv[at + 1 : at + 2]
    given = value if separator else following[0] if following and not following[0].startswith("--") else "VALUE"
    return f", which is a setting: write {name}={given}" if near == [name] else f" (did you mean {near[0]}={given}?)"


def _quiet_libraries() -> None:
    """Leave out what other libraries say of their own work, but for the bars of downloads."""
    if _verbose[0]:
        return
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()  # transformers looks at this when it is imported
    enable_progress_bars("huggingface_hub")


def _fail(message: str) -> None:
    line = " ".join(message.split()) or "bad input"
    if _verbose[0]:
        traceback.print_exc()
    print(f"unmask: error: {line}", file=sys.stderr)
    sys.exit(2)
