"""The command `recipes`: what a recipe sets, in words, and the page of all settings."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any

import typer

from unmask.cli.app import Json, app
from unmask.plain_json import to_json
from unmask.tables import Rows, fitted, wrapped


@app.command(epilog="Example: unmask recipes efficient-dlm")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show the settings of this recipe.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show also the settings that the recipe does not read, and what they need.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/settings.md.")] = False,
    as_json: Json = False,
) -> None:
    """Which recipe for which goal, and the list of all; or the settings of one."""
    from unmask.recipe import load_recipe, recipe_names, recipe_summary
    from unmask.settings import to_plain

    if markdown and (name is not None or everything or as_json):
        raise ValueError("--markdown prints the page of all settings: leave out NAME, --all and --json")
    if everything and (name is None or as_json):
        raise ValueError(
            "--all is for the listing of one recipe: give its NAME, without --json, which has all settings"
        )
    if markdown:
        print(settings_page(), end="")
        return
    names = recipe_names() if name is None else [name]
    if as_json:
        print(to_json({recipe: to_plain(load_recipe(recipe)) for recipe in names}))
    elif name is None:
        print(goals_table(lambda rows: fitted(rows, _markdown)))
        for recipe in names:
            print(wrapped(f"{recipe:24} {recipe_summary(recipe)}"))
    else:
        print(f"# {recipe_summary(name)}")
        print(settings_of(name, everything, shutil.get_terminal_size((120, 24)).columns), end="")


def goals_table(table: Callable[[Rows], str] | None = None) -> str:
    """Which recipe for which goal, and what it costs; tables as in docs/recipes.md, or as `table` makes them."""
    from unmask.goals import GOALS, SEEN, SIZES, cost, short

    wanted: list[tuple[str, ...]] = [
        ("you want", "recipe", "the AR model", "decodes as", "tokens that were enough (parameters)")
    ]
    costs: list[tuple[str, ...]] = [("recipe", *SIZES)]
    for goal in GOALS:
        seen = ", ".join(f"{short(run.num_tokens)} ({short(run.num_parameters)})" for run in SEEN[goal.recipe])
        wanted.append((goal.want, f"`{goal.recipe}`", goal.parent, goal.decodes, seen))
        cells = []
        for num_parameters in SIZES.values():
            tokens, hours, size, measured_tokens, measured_hours = cost(goal, num_parameters)
            signs = ("" if measured_tokens else "~"), ("" if measured_tokens and measured_hours else "~")
            cells.append(f"{signs[0]}{short(tokens)}, {signs[1]}{short(hours)} h, {short(size / 1e9)} GB")
        costs.append((f"`{goal.recipe}`", *cells))
    legend = "Tokens, hours on one H200, memory of weights, gradients and AdamW without activations; ~ is estimated."
    show = _markdown if table is None else table
    return f"{show(wanted)}\n{show(costs)}\n{legend if table is None else wrapped(legend, '')}\n"


def _markdown(rows: Rows) -> str:
    """A table in Markdown, its first row the header, with columns of equal width but the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    head, *body = ("| " + " | ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)) + " |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(widths), *body]) + "\n"


def settings_of(name: str, everything: bool = False, width: int = 120) -> str:
    """The settings that a recipe's run reads, in groups, each with its value and its sentence; or all of them."""
    from unmask.recipe import load_recipe
    from unmask.settings import GROUPS, condition, unmet

    values = vars(load_recipe(name))
    text = ""
    for group in GROUPS:
        lines = ""
        for entry in fields(group):
            reads = unmet(entry.name, values) is None
            if reads or everything:
                sentence = _sentence(entry) + ("" if reads else f" [not read: needs {condition(entry.name)}]")
                lines += _beside(f"{entry.name} = {_value(entry, values[entry.name])}", sentence, width)
        text += f"\n{group.__doc__}\n{lines}" if lines else ""
    return text


_HEAD = """# Settings

What defines a run besides the model and the data: `SETTING=VALUE` after `unmask adapt`, keyword arguments of
`unmask.adapt`, lines of a recipe. A recipe sets some of them, the others have the defaults below. A setting that the
run would not read is an error; `unmask recipes NAME` shows those that a recipe's run reads, with `--all` all of them.
`none` unsets a setting that may be unset. `unmask recipes --markdown > docs/settings.md` makes this page.
"""


def settings_page() -> str:
    """docs/settings.md: a table for each group."""
    from unmask.settings import GROUPS, condition

    text = _HEAD
    for group in GROUPS:
        text += f"\n## {(group.__doc__ or '').rstrip('.')}\n"
        text += "| setting | default | what it is | read if |\n|---|---|---|---|\n"
        for entry in fields(group):
            default, read_if = _value(entry, entry.default), condition(entry.name)
            default = default if entry.default is None else f"`{default}`"
            text += f"| `{entry.name}` | {default} | {_sentence(entry)} | {f'`{read_if}`' if read_if else ''} |\n"
    return text


def _sentence(entry: Any) -> str:
    """What the setting is, and which values it takes where the sentence or its kind does not say so."""
    from unmask.settings import limits_of

    says, one_of, limits = (entry.metadata[key] for key in ("says", "one_of", "limits"))
    if not all(value in says for value in one_of):
        return f"{says} ({', '.join(one_of)})"
    return f"{says} ({limits_of(entry.name)})" if limits.keys() & {"most", "below"} else says


def _value(entry: Any, value: Any) -> str:
    """A value as SETTING=VALUE has it; where there is none, whether the parent's size decides."""
    if value is None:
        return "from the parent's size" if entry.metadata["of_size"] else "unset"
    return str(value) if isinstance(value, float) else to_json(value)


def _beside(left: str, right: str, width: int, column: int = 44) -> str:
    """Two columns, the right one wrapped."""
    lines = textwrap.wrap(right, max(30, width - column)) or [""]
    first = f"  {left}"
    first = f"{first:{column}}" if len(first) < column - 1 else f"{first}\n{'':{column}}"
    return first + f"\n{'':{column}}".join(lines) + "\n"
