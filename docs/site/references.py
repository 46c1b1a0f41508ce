"""A hook of mkdocs: two pages that the code itself writes on each build, of the command and of the Python interface."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.structure.files import File, Files

import unmask
from unmask import export, sampling
from unmask.cli import app

MODULES = {unmask: sorted(unmask.__all__, key=str.lower), sampling: sampling.__all__, export: ["export_model"]}
"""Modules and the names that are public there."""

WIDTH = 100


class Text(str):
    """An annotation that is shown as it is written."""

    __repr__ = str.__str__


def command_page() -> str:
    """What `unmask COMMAND --help` prints, of every command."""
    parts = ["# Every command", "What `unmask COMMAND --help` prints. [The command](command.md) has what they share."]
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        context = command.make_context(f"unmask {name}", [], resilient_parsing=True, terminal_width=WIDTH)
        parts += [f"## unmask {name}", f"```text\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    """Every public name and its public methods, with signature and docstring."""
    parts = ["# Python", "Every public name, with its docstring. Shapes of tensors stand in parentheses."]
    for module, names in MODULES.items():
        parts += [f"## {module.__name__}", text(module)]
        for name in (name for name in names if not name.startswith("_")):
            found = getattr(module, name)
            parts += [f"### {module.__name__}.{name}", signature(name, found), text(found)]
            for method, body in methods(found):
                parts += [f"#### {name}.{method}", signature(method, body), text(body)]
    return "\n\n".join(part for part in parts if part) + "\n"


def methods(found: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that have a docstring."""
    for name, body in vars(found).items() if inspect.isclass(found) else ():
        body = body.__func__ if isinstance(body, classmethod | staticmethod) else body
        if (
            not name.startswith("_")
            and inspect.getdoc(body)
            and (inspect.isroutine(body) or isinstance(body, property))
        ):
            yield name, body


def signature(name: str, what: Any) -> str:
    """A block with the signature, if there is one: an exception, a property and a type have none."""
    try:
        found = inspect.signature(what)
    except (TypeError, ValueError):
        return ""
    kept = [
        one.replace(annotation=Text(one.annotation) if isinstance(one.annotation, str) else one.annotation)
        for one in found.parameters.values()
        if one.name not in ("self", "cls")
    ]
    returns = Text(found.return_annotation) if isinstance(found.return_annotation, str) else found.return_annotation
    line = f"{name}{inspect.Signature(kept, return_annotation=returns)}"
    if len(line) > WIDTH:
        arguments, end = line[len(name) + 1 :].rsplit(")", 1)
        line = f"{name}(\n    " + ",\n    ".join(re.split(r", (?=\*|\w+(?:: | =|=|,|$))", arguments)) + f",\n){end}"
    return f"```python\n{line}\n```"


def text(what: Any) -> str:
    """A docstring as Markdown: outside code, signs of HTML and stars are text."""
    parts = re.split(r"(`[^`]*`)", inspect.getdoc(what) or "")
    return "".join(part if part[:1] == "`" else html.escape(part, quote=False).replace("*", r"\*") for part in parts)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages to those of the site."""
    for name, page in (("reference-command.md", command_page()), ("reference-python.md", python_page())):
        files.append(File.generated(config, name, content=page))
    return files
