"""Everything that defines a run besides the model and the data. Imports no torch.

A line of a table says of each setting its default, what it is, which values it takes, and what other settings must be
for a run to read it. Groups are dataclasses that `Settings` inherits: names are unique, so that `adapt(**settings)`,
SETTING=VALUE, recipes and run.json are flat, and a function may ask for one group.
"""

from unmask.settings.keywords import SettingsKeywords
from unmask.settings.method import DISTANCES, CorruptionSettings
from unmask.settings.table import (
    GROUPS,
    TABLE,
    Settings,
    check_value,
    condition,
    limits_of,
    shown,
    to_plain,
    unmet,
)
from unmask.settings.training import OptimiserSettings, RunSettings

__all__ = [
    "DISTANCES",
    "GROUPS",
    "TABLE",
    "CorruptionSettings",
    "OptimiserSettings",
    "RunSettings",
    "Settings",
    "SettingsKeywords",
    "check_value",
    "condition",
    "limits_of",
    "shown",
    "to_plain",
    "unmet",
]
