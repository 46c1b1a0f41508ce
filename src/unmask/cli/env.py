"""The command `env`: what a report of a fault should say of the machine."""

from __future__ import annotations

import platform
from typing import Any

from unmask.cli.app import Json, app
from unmask.plain_json import to_json
from unmask.requirements import OLDEST, installed, too_old
from unmask.version import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "huggingface-hub", "numpy",
             "peft", "lm-eval", "matplotlib", "gguf", "mteb")  # fmt: skip


@app.command(epilog="Example: unmask env --json")
def env(as_json: Json = False) -> None:
    """Versions of the libraries, and the devices that a model can run on."""
    found = _environment()
    if as_json:
        print(to_json(found))
        return
    for name, value in found.items():
        shown = ", ".join(value) if isinstance(value, list) else "not installed" if value is None else value
        old = isinstance(value, str) and too_old(name, value)
        print(f"{name:16} {shown}" + (f" (too old: {OLDEST[name]} or later is needed)" if old else ""))


def _environment() -> dict[str, Any]:
    """Name -> version, None for a package that is not installed; devices, and threads of the CPU."""
    import torch

    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "unmask": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: installed(name) for name in _PACKAGES},
        "devices": [*devices, "cpu"],
        "threads": torch.get_num_threads(),
    }
