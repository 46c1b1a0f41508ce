"""Models load from several threads at once, each whole, and loading leaves transformers and torch as they were."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import unmask


def test_models_load_side_by_side(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = (PreTrainedModel, "tie_weights"), (torch.nn.init, "normal_")
    before = [getattr(*place) for place in swapped]
    for place, function in zip(swapped, before, strict=True):
        monkeypatch.setattr(*place, function)  # put back for later tests, whatever happens here
    alone = unmask.load(converted).nll("The cat sang.")[0].nats
    with ThreadPoolExecutor(6) as threads:
        nats = list(threads.map(lambda _: unmask.load(converted).nll("The cat sang.")[0].nats, range(12)))
    assert nats == [alone] * 12
    assert [getattr(*place) for place in swapped] == before
