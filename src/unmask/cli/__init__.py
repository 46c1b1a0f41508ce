"""The `unmask` command."""

from unmask.cli import adapt, env, evaluate, generate, lab, prepare, recipes  # noqa: F401  (each adds its commands to the app)
from unmask.cli.app import app, main

__all__ = ["app", "main"]
