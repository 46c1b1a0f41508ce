"""The `unmask` command."""

# Each of these adds its commands to the app.
from unmask.cli import adapt, env, evaluate, export, generate, lab, prepare, recipes  # noqa: F401
from unmask.cli.app import app, main

__all__ = ["app", "main"]
