"""The table of settings: all groups as one, which values a run takes, and which of them it reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from unmask.limits import LARGEST
from unmask.settings.data import DataSettings, RolloutSettings
from unmask.settings.field import LIMITS, Need
from unmask.settings.method import (
    DISTANCES,
    AttentionSettings,
    CorruptionSettings,
    DrafterSettings,
    ObjectiveSettings,
)
from unmask.settings.training import (
    LORA_TRAINABLE,
    EvaluationSettings,
    LoraSettings,
    OptimiserSettings,
    RunSettings,
)


# A dataclass takes the fields of its last base first.
@dataclass(frozen=True, repr=False)
class Settings(
    RunSettings,
    EvaluationSettings,
    OptimiserSettings,
    LoraSettings,
    RolloutSettings,
    DataSettings,
    CorruptionSettings,
    DrafterSettings,
    ObjectiveSettings,
    AttentionSettings,
):
    """All groups, and the recipe's name. Values are in range and go together; some of them a run may not read."""

    recipe: str

    def __post_init__(self) -> None:
        for name in TABLE:
            check_value(name, getattr(self, name))
        for check in (_check_lora_trainable, _check_clean_half, _check_reach, _check_own_states, _check_anchor):
            check(self)

    def __repr__(self) -> str:
        """The recipe, and what differs from the defaults of the table; all of it: `to_plain`."""
        own = [f"{n}={getattr(self, n)!r}" for n, entry in TABLE.items() if getattr(self, n) != entry.default]
        return f"{type(self).__name__}({', '.join([f'recipe={self.recipe!r}', *own])})"

    @property
    def trainable(self) -> tuple[str, ...]:
        """The parts named in lora_trainable."""
        return tuple(name.strip() for name in self.lora_trainable.split(",") if name.strip())


GROUPS = Settings.__bases__[::-1]
"""The groups in the order of the table."""
TABLE = {entry.name: entry for group in GROUPS for entry in fields(group)}
"""Name -> field of every setting, in order."""


def to_plain(settings: Settings) -> dict[str, Any]:
    """Flat values for JSON: infinity is "inf"."""
    return {name: "inf" if value == math.inf else value for name, value in asdict(settings).items()}


# --- values


def shown(value: Any) -> str:
    """A value as SETTING=VALUE takes it, texts in quotes."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def limits_of(name: str) -> str:
    """A setting's limits in words, such as "at least 0 and below 1"."""
    return " and ".join(f"{LIMITS[limit][0]} {bound:,}" for limit, bound in TABLE[name].metadata["limits"].items())


def check_value(name: str, value: Any) -> None:
    """Raise ValueError for a value of the right type that the setting does not take."""
    if value is None:
        return
    metadata = TABLE[name].metadata
    if metadata["one_of"] and value not in metadata["one_of"]:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(metadata['one_of'])}")
    if isinstance(value, str) and not value.strip() and name not in ("lora_trainable", "self_prompts"):
        raise ValueError(f"{name}={value!r} is empty: give a text, or leave it out")
    if isinstance(value, float) and not math.isfinite(value) and not (metadata["infinite"] and value == math.inf):
        raise ValueError(f"{name}={value} must be finite")
    if not all(LIMITS[limit][1](value, bound) for limit, bound in metadata["limits"].items()):
        raise ValueError(f"{name}={value} must be {limits_of(name)}")
    if name != "seed" and "most" not in metadata["limits"] and isinstance(value, int) and value > LARGEST:
        raise ValueError(f"{name}={value} must be at most {LARGEST:,}")


def _check_lora_trainable(settings: Settings) -> None:
    for part in settings.trainable:
        if part not in LORA_TRAINABLE:
            raise ValueError(
                f"lora_trainable={settings.lora_trainable!r}: {part!r} is unknown: use any of "
                f"{', '.join(LORA_TRAINABLE)}, with commas between"
            )


def _check_clean_half(settings: Settings) -> None:
    """Other objectives than diffusion read AR rows off the clean stream."""
    attention = (settings.attention, settings.clean_attention)
    if settings.objective != "diffusion" and attention != ("two_stream", "causal"):
        raise ValueError(
            f"objective={settings.objective!r} needs attention='two_stream' with clean_attention='causal', "
            f"not {settings.attention!r} with {settings.clean_attention!r}"
        )


def _check_reach(settings: Settings) -> None:
    """How far a draft reaches is the drafter's measure alone."""
    if settings.objective == "joint" and settings.distance in DISTANCES[-2:]:
        raise ValueError(f"distance={settings.distance!r} needs objective='distill', not 'joint'")


def _check_own_states(settings: Settings) -> None:
    """Masks of self_mode="diffusion" are states of the student's own decoding, which the text does not answer."""
    if settings.self_mode != "diffusion":
        return
    if settings.masking != "all" or settings.random_offset:
        raise ValueError(
            f"self_mode='diffusion' brings masks of its own: use masking='all', not {settings.masking!r}, and no "
            "random_offset"
        )
    if settings.objective != "distill" and settings.teacher is None:
        raise ValueError(
            "self_mode='diffusion' teaches another model's distribution, not the student's own words: with objective="
            f"{settings.objective!r} it needs objective='joint' and teacher=FOLDER, the AR model"
        )


def _check_anchor(settings: Settings) -> None:
    """A block of one token is an anchor without drafts."""
    for name in ("block_size", "first_block_size"):
        if settings.adapt_anchor and getattr(settings, name) == 1:
            raise ValueError(f"adapt_anchor=true with {name}=1 leaves nothing to draft: use blocks of at least 2")


# --- conditions


def unmet(name: str, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """What keeps a run with these values (of all settings) from reading a setting; None if it reads it.

    Returns the failed condition in words, such as "objective='joint'", and the names of the settings in it.
    """
    needs, either = TABLE[name].metadata["needs"], TABLE[name].metadata["either"]
    failed = {other: need for other, need in needs.items() if not need.holds(values[other])}
    if failed:
        return _in_words(failed), tuple(failed)
    if not either or any(all(need.holds(values[other]) for other, need in part.items()) for part in either):
        return None
    return ", or ".join(map(_in_words, either)), tuple(dict.fromkeys(other for part in either for other in part))


def condition(name: str) -> str:
    """The condition under which a run reads a setting, in words; empty if every run does."""
    needs, either = TABLE[name].metadata["needs"], TABLE[name].metadata["either"]
    alternatives = "either " + ", or ".join(map(_in_words, either)) if either else ""
    return ", and ".join(part for part in (_in_words(needs), alternatives) if part)


def _in_words(needs: Mapping[str, Need]) -> str:
    return " and ".join(other + need.says for other, need in needs.items())
