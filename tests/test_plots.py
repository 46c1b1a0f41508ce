"""Figures: that they are drawn, the same each time, and hold what the rows say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from unmask.lab import plots


def text_of(svg: Path) -> str:
    return svg.read_text()


def frontier_rows(**extra: object) -> list[dict]:
    base = {"rule": None, "value": None, "block_size": None, "batch_size": None, "unigram_entropy": 3.5,
            "distinct_2": 0.3, "speed_over_ar": None, "accuracy": None} | extra  # fmt: skip
    rows = [base | {"mode": "data", "tokens_per_forward": None, "parent_nll": 1.2}]
    for batch in (1, 8):
        at = {"batch_size": batch}
        rows.append(base | at | {"mode": "ar", "tokens_per_forward": 1.0, "parent_nll": 0.6, "speed_over_ar": 1.0})
        for value, tpf, nll in ((0.9, 1.1, 1.0), (0.5, 2.0, 1.8)):
            found = {"value": value, "tokens_per_forward": tpf, "parent_nll": nll, "speed_over_ar": tpf / 2}
            rows.append(base | at | {"mode": "diffusion", "rule": "Threshold", "block_size": 8} | found)
    rows.append(base | {"mode": "oracle", "block_size": 8, "tokens_per_forward": 3.0, "parent_nll": 1.0})
    return rows


def test_frontier_names_every_line_and_axis(tmp_path: Path) -> None:
    png, svg = plots.frontier(frontier_rows(), tmp_path / "frontier.png", title="a < b & c")
    assert png.read_bytes()[:4] == b"\x89PNG"
    text = text_of(svg)
    for word in ("AR parent", "Threshold, blocks of 8", "oracle, blocks of 8", "real text", "batch 1", "batch 8",
                 "tokens per forward", "nats per token", "a &lt; b &amp; c"):  # fmt: skip
        assert word in text, word


def test_frontier_of_a_task_shows_accuracy(tmp_path: Path) -> None:
    rows = frontier_rows()
    assert "accuracy" not in text_of(plots.frontier(rows, tmp_path / "a")[1])
    assert "accuracy" in text_of(plots.frontier([row | {"accuracy": 0.5} for row in rows], tmp_path / "b")[1])


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    first, second = (plots.frontier(frontier_rows(), tmp_path / name) for name in "ab")
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_heat_map_writes_means_into_cells(tmp_path: Path) -> None:
    rows = [{"train": a, "eval": b, "nelbo": a / b} for a in (4, 8, 16) for b in (4, 8)]
    rows += [{"train": 4, "eval": 8, "nelbo": 1.5}]  # a second seed: mean of 0.5 and 1.5
    rows = [row for row in rows if (row["train"], row["eval"]) != (16, 8)]
    labels = {"x_label": "training block size", "y_label": "evaluation block size"}
    svg = text_of(plots.heat_map(rows, tmp_path / "h", x="train", y="eval", value="nelbo",
                                 value_label="NELBO (nats per token)", **labels)[1])  # fmt: skip
    for word in ("training block size", "evaluation block size", "NELBO (nats per token)", ">4<", ">16<"):
        assert word in svg


def test_curves_and_bars_take_seeds(tmp_path: Path) -> None:
    rows = [{"arm": arm, "tokens": t, "nelbo": 3 + seed / 10 - t / 100} for arm in ("shift", "none") for t in (10, 20)
            for seed in range(3)]  # fmt: skip
    svg = text_of(plots.curves(rows, tmp_path / "c", x="tokens", y="nelbo", by="arm", y_label="NELBO", log_x=True)[1])
    assert ">shift<" in svg
    assert "FillBetween" in svg or "PolyCollection" in svg
    svg = text_of(plots.bars(rows, tmp_path / "b.svg", by="arm", y="nelbo", y_label="NELBO (nats per token)")[1])
    assert ">none<" in svg
    assert (tmp_path / "b.png").exists()


def test_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        plots.curves([], tmp_path / "x", x="a", y="b")
    with pytest.raises(ValueError, match="column 'nelbo' is in no row: use one of a, b"):
        plots.curves([{"a": 1, "b": 2}], tmp_path / "x", x="a", y="nelbo")


def test_plots_need_no_torch_and_say_what_is_missing() -> None:
    code = (
        "import sys; from unmask.lab import plots\nassert 'torch' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try: plots.require_matplotlib()\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'unmask[plots]'" in done.stdout
