"""Turn any pretrained autoregressive language model into a diffusion language model.

`load`, `adapt`, `recipes` and `DiffusionLM` are the surface; they are imported when first used, so that
`import unmask` and `unmask --help` stay fast.
"""

from typing import TYPE_CHECKING, Any

from unmask.version import __version__

if TYPE_CHECKING:
    from unmask.conversion import adapt
    from unmask.conversion.prepare import prepare
    from unmask.conversion.trainer import for_trainer
    from unmask.evaluation.likelihood import LikelihoodOutput
    from unmask.hf import JsonSchema, Lark, Regex, UnsupportedModelError
    from unmask.loading import load
    from unmask.model import DiffusionLM
    from unmask.outputs import SampleOutput
    from unmask.recipe import recipes
    from unmask.replaying import replay, replay_infill

__all__ = [
    "DiffusionLM",
    "JsonSchema",
    "Lark",
    "LikelihoodOutput",
    "Regex",
    "SampleOutput",
    "UnsupportedModelError",
    "__version__",
    "adapt",
    "for_trainer",
    "load",
    "prepare",
    "recipes",
    "replay",
    "replay_infill",
]

_HOMES = {
    "DiffusionLM": "unmask.model",
    "JsonSchema": "unmask.hf",
    "Lark": "unmask.hf",
    "LikelihoodOutput": "unmask.evaluation.likelihood",
    "Regex": "unmask.hf",
    "SampleOutput": "unmask.outputs",
    "UnsupportedModelError": "unmask.hf",
    "load": "unmask.loading",
    "adapt": "unmask.conversion",
    "for_trainer": "unmask.conversion.trainer",
    "prepare": "unmask.conversion.prepare",
    "recipes": "unmask.recipe",
    "replay": "unmask.replaying",
    "replay_infill": "unmask.replaying",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unmask' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
