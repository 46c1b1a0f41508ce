"""The `unmask` command."""

from unmask.cli import (  # noqa: F401  (they add commands)
    adapt,
    chat,
    env,
    evaluate,
    export,
    generate,
    lab,
    merge,
    plan,
    prepare,
    recipes,
    serve,
)  # fmt: skip
from unmask.cli.app import app, main

__all__ = ["app", "main"]
