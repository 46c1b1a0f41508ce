"""Lines of progress: their share never passes 100%, which comes once, at the end."""

from __future__ import annotations

import re

import pytest

from unmask import progress as module
from unmask.progress import progress


@pytest.mark.parametrize("seconds", [0.0, module.LINE_SECONDS])
@pytest.mark.parametrize(("total", "steps"), [
    (100, [50, 50]), (100, [80, 40, 30]), (100, [40, 20]), (None, [3, 4]), (10, [4, 4, 4, 4]), (10, [4]), (10, [5, 5]),
])  # fmt: skip
def test_shares_end_at_100_whatever_the_total_was_thought_to_be(
    total: int | None, steps: list[int], seconds: float, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(module, "LINE_SECONDS", seconds)
    with progress("work", total) as advance:
        for step in steps:
            advance(step, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    shares = [int(found) for line in lines for found in re.findall(r"(\d+)%", line)]
    assert shares == sorted(set(shares))
    assert lines[-1].endswith(f"loss {steps[-1]}")
    if total is not None:
        assert shares[-1] == 100
        assert shares.count(100) == 1
        assert max(shares) == 100
        assert all(share < 100 for share in shares[:-1])


def test_work_that_stops_does_not_say_100(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        with progress("work", 10) as advance:
            advance(4)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stop()
    assert "100%" not in capsys.readouterr().err
