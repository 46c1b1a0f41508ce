"""Half precision on a CPU: slow where there are no instructions for it, and then said."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import unmask
from unmask import loading


@pytest.mark.parametrize(("dtype", "ratio", "said"), [
    (torch.bfloat16, 8.0, True), (torch.float16, 2.0, True), (torch.bfloat16, 0.4, False), (torch.float32, 8.0, False),
])  # fmt: skip
def test_slow_half_precision_is_named_when_a_model_is_loaded(
    dtype: torch.dtype, ratio: float, said: bool, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "seconds_of_product", lambda kind: 1.0 if kind == torch.float32 else ratio)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        unmask.load(shared / "models" / "stories260k", dtype=dtype)
    messages = [str(entry.message) for entry in caught if "slow on this CPU" in str(entry.message)]
    assert len(messages) == said
    if said:
        assert f"{ratio:.1f} times as long as in float32; load with dtype='float32'" in messages[0]


def test_a_product_is_timed() -> None:
    assert 0 < loading.seconds_of_product(torch.float32) < 1
