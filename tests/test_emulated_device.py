"""Runs the short cases of `on_emulated_device.py` in a process of its own: a device that is registered stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_what_runs_on_an_emulated_device() -> None:
    cases = Path(__file__).with_name("on_emulated_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not nightly", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cases.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
