"""The recorded trajectories, made again: see `trajectories.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trajectories import FAMILIES, RECORD, TRAININGS, measure

RECORDED = json.loads(RECORD.read_text())


def test_the_record_holds_every_case() -> None:
    assert set(RECORDED) == {f"{family}: {training}" for family in FAMILIES for training in TRAININGS}


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trajectory_is_the_recorded_one(family: str, training: str, tmp_path: Path) -> None:
    """Losses to 1e-8 (float64 sums differ in their last bits between processors), tokens and counts exactly."""
    torch.set_num_threads(1)
    expected, found = RECORDED[f"{family}: {training}"], measure(family, training, tmp_path)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-8) if name in ("loss", "held_out") else value), name
