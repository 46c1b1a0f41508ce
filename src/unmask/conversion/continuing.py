"""Adapting a converted model again: the settings that it keeps, and what a run changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from unmask.core.network import DiffusionConfig
from unmask.model import DiffusionLM
from unmask.recipe import load_recipe, recipe_names
from unmask.settings import CorruptionSettings, Settings

_KEPT = ("recipe", "attention", "clean_attention", "noisy_attention", "shift", "block_size")
"""Settings of the `DiffusionConfig` that a converted model keeps unless a recipe is named."""


_DEFAULT = "tri-mode"
"""Recipe of an AR model: the one that keeps it."""


def recipe_settings(model: DiffusionLM | Mapping[str, Any], recipe: str | None, overrides: dict[str, Any]) -> Settings:
    """The settings of a run: those of the recipe, or without one those that a converted model keeps; then overrides.

    model: loaded, or the object in its config.json.
    """
    kept = {} if recipe is not None else _kept_settings(model)
    return load_recipe(kept.pop("recipe", _DEFAULT) if recipe is None else recipe, kept, **overrides)


def _kept_settings(model: DiffusionLM | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `_KEPT` of a converted model; empty for an AR model."""
    if isinstance(model, DiffusionLM):
        raw: Any = None if model.diffusion is None else asdict(model.diffusion)
    else:
        raw = model.get("diffusion")
    if not isinstance(raw, dict):  # `load` raises if it is something else
        return {}
    kept = {name: raw[name] for name in _KEPT if name in raw and (raw[name] is not None or name == "clean_attention")}
    if kept.get("recipe") not in recipe_names():
        kept["recipe"] = _nearest_recipe(kept)
    opened = {"anneal_steps": 1} if kept.get("attention") == "bidirectional" else {}  # its attention is open already
    return kept | opened | {"mask_init_noise": False}


def _nearest_recipe(kept: dict[str, Any]) -> str:
    """The recipe for a checkpoint of an unknown recipe: one of the same attention that agrees best with the rest."""
    recipes = {name: load_recipe(name) for name in (_DEFAULT, "efficient-dlm", *recipe_names())}
    fitting = [
        name
        for name, settings in recipes.items()
        if settings.attention == kept.get("attention") and settings.objective != "distill"
    ]
    rest = ("clean_attention", "shift", "noisy_attention")
    return max(
        fitting or [_DEFAULT],
        key=lambda name: [getattr(recipes[name], setting) == kept.get(setting) for setting in rest],
    )


def check_mask_stays(lm: DiffusionLM, settings: CorruptionSettings, name: str) -> None:
    """Raise ValueError for settings that would change the mask token of the converted model `name`."""
    if lm.diffusion is None:
        return
    if settings.mask_token is not None and settings.mask_token != lm.tokenizer.mask_token:
        raise ValueError(
            f"mask_token={settings.mask_token!r}: model {name!r} is converted already, with "
            f"{lm.tokenizer.mask_token!r}, which cannot be changed: leave mask_token out, or adapt its AR parent"
        )
    if settings.mask_init is not None:
        raise ValueError(
            f"mask_init={settings.mask_init!r}: model {name!r} is converted already, and its mask token has learnt: "
            "leave mask_init out, or adapt its AR parent"
        )
    if settings.mask_init_noise:
        raise ValueError(
            f"mask_init_noise=true: model {name!r} is converted already, and its mask token has learnt: "
            "mask_init_noise=false goes on from it"
        )


def changes(before: DiffusionConfig | None, after: DiffusionConfig | None) -> str:
    """What a run changes of a converted model, as "shift True -> False"; empty if nothing."""
    if before is None or after is None:
        return ""
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in _KEPT}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new)
