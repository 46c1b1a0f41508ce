"""Runs `on_emulated_device.py` in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def test_what_runs_on_an_emulated_device(shared: Path) -> None:
    if not (shared / "tools" / "emulated_device.py").is_file():
        pytest.skip("needs shared/tools/emulated_device.py beside the checkout")
    cases = Path(__file__).with_name("on_emulated_device.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cases.parent)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
