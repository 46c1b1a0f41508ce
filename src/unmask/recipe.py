"""Recipes: TOML files of settings, and the settings of a run that starts from one.

A recipe knows no model and no text: numbers in, numbers out.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from unmask.limits import number_of_tokens
from unmask.near_names import unknown
from unmask.plain_numbers import plain
from unmask.settings import TABLE, Settings, check_value, shown, to_plain, unmet


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    folder = resources.files("unmask") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipes() -> dict[str, dict[str, Any]]:
    """Recipe name -> its settings; those left to the parent's size are None, infinity is "inf"."""
    return {name: to_plain(load_recipe(name)) for name in recipe_names()}


def recipe_summary(name: str) -> str:
    """A recipe's first line: what it reproduces."""
    return _text(name).splitlines()[0].removeprefix("# ")


def load_recipe(name: str, background: Mapping[str, Any] | None = None, /, **overrides: Any) -> Settings:
    """Settings of a recipe, by its name or a .toml file's, with overrides.

    An unknown name, a value of the wrong type or out of range, and an override that the run would not read are
    errors. background: values that replace the recipe's own. Of both the run takes those that it reads, so that what
    an override makes pointless needs not be taken back; to take it back is allowed.
    """
    own = _own(name) | dict(background or {})
    changed = {*(background or {}), *overrides}
    values: dict[str, Any] = {key: entry.default for key, entry in TABLE.items()}
    for key, value in (own | overrides).items():
        check_setting_name(key)
        values[key] = _typed(key, value)
        check_value(key, values[key])
    for key, entry in TABLE.items():  # conditions speak of earlier settings, whose values are final by now
        reason = unmet(key, values)
        if reason is None:
            continue
        taken_back = key in own and values[key] == entry.default
        if key in overrides and values[key] is not None and not taken_back:
            needed, others = reason
            whose = f"recipe {name}" if changed.isdisjoint(others) else "this run"
            present = ", ".join(f"no {o}" if values[o] is None else f"{o}={shown(values[o])}" for o in others)
            raise ValueError(f"{key}={shown(values[key])} needs {needed}; {whose} has {present}")
        values[key] = entry.default
    if values["attention"] == "two_stream" and values["clean_attention"] is None:
        where = "; a recipe file may stand on a recipe: recipe = 'tri-mode'" if _is_file(name) else ""
        raise ValueError(f"attention='two_stream' needs clean_attention='causal' or 'block_causal'{where}")
    return Settings(recipe=Path(name).stem if _is_file(name) else name, **values)


def check_setting_name(name: str) -> None:
    """Raise ValueError for a name that no setting has."""
    if name not in TABLE:
        raise ValueError(unknown("setting", name, TABLE, "`unmask recipes NAME --all` lists them"))


PREPARED_DATA = "prepared data"
"""The kind of data that `unmask prepare` wrote."""


def check_data_settings(overrides: Mapping[str, Any], kinds: Collection[str], has_splits: bool) -> None:
    """Raise ValueError for an override of how data is read that these data do not have.

    kinds: suffixes of all files that are read, held-out ones too, and words for other data. has_splits: the training
    data are a hub data set, or another with splits.
    """
    conditions = {
        "split": (has_splits, "a data set with splits, of the hub or of `datasets`"),
        "text_column": (
            bool(set(kinds) - {".txt", PREPARED_DATA}),
            "data with columns (.jsonl, .parquet, records, a hub data set)",
        ),
        "skip_invalid": (set(kinds) != {PREPARED_DATA}, "data that are not prepared yet: give it to `unmask prepare`"),
    }
    for name, (holds, needed) in conditions.items():
        if overrides.get(name) is not None and not holds:
            raise ValueError(f"{name}={shown(overrides[name])} needs {needed}; the data are {', '.join(sorted(kinds))}")


def differences(settings: Settings) -> dict[str, Any]:
    """What sets these settings apart from their recipe: `load_recipe` with them gives the settings again."""
    plain = asdict(load_recipe(settings.recipe))
    return {name: value for name, value in asdict(settings).items() if value != plain[name]}


def under_current_names(stored: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older run.json under their names of today, those that it lacks with their defaults.

    Raises ValueError for a run that used a retired one.
    """
    if stored.get("anneal_form", "entries") != "entries":
        raise ValueError(
            f"anneal_form={stored['anneal_form']!r} is no longer offered: finish the run with the version that began it"
        )
    renamed = {"draws": "num_masks"}
    plain = {name: "inf" if entry.default == math.inf else entry.default for name, entry in TABLE.items()}
    return plain | {renamed.get(name, name): value for name, value in stored.items() if name != "anneal_form"}


def read_toml(path: str | Path, what: str) -> dict[str, Any]:
    """The object in a TOML file; ValueError for a file that is none, which begins with `what`."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} {str(path)!r} is no TOML: {error}") from error


def _own(name: str) -> dict[str, Any]:
    """What a recipe sets: one that is shipped, or a file, whose line recipe = NAME says on which it stands."""
    if not _is_file(name):
        return tomllib.loads(_text(name))
    found = read_toml(name, "recipe file")
    on = found.pop("recipe", None)
    return found if on is None else tomllib.loads(_text(str(on))) | found


def _is_file(name: str) -> bool:
    return name.endswith(".toml")


def _text(name: str) -> str:
    names = recipe_names()
    if name not in names:
        raise ValueError(unknown("recipe", name, names, f"the recipes are {', '.join(names)}"))
    return (resources.files("unmask") / "recipes" / f"{name}.toml").read_text()


def _typed(name: str, value: Any) -> Any:
    """The value as the setting's type; "none" unsets a setting that may be unset, where a file has no word for it."""
    annotation = str(TABLE[name].type)
    kinds = [kind.strip() for kind in annotation.split("|")]
    value = plain(value)
    if value in (None, "none") and "None" in kinds:
        return None
    if name.endswith("_tokens") and isinstance(value, str):
        return number_of_tokens(value, f"setting {name}")
    if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    for kind, python in (("bool", bool), ("int", int), ("float", float), ("str", str)):
        if kind in kinds and type(value) is python:
            return value
    raise ValueError(f"setting {name}={value!r} has the wrong type: it takes {annotation}")
