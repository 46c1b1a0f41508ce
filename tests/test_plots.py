"""Figures: that they are drawn, the same each time, and hold what the rows say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from matplotlib.figure import Figure

from unmask import plots

ROOT = Path(__file__).resolve().parents[1]


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


def test_frontier_says_what_is_what(tmp_path: Path) -> None:
    png, svg = plots.frontier(frontier_rows(), tmp_path / "frontier.png", title="a < b & c")
    assert png.read_bytes()[:4] == b"\x89PNG"
    text = text_of(svg)
    for word in (">AR parent<", ">threshold 0.5<", ">0.9<", ">real text<", ">better<", "AR parent, batch 1<",
                 "nats per token", "a &lt; b &amp; c"):  # fmt: skip
        assert word in text, word
    assert "oracle" not in text  # it has no time


def test_frontier_without_times_is_over_tokens_per_forward(tmp_path: Path) -> None:
    text = text_of(plots.frontier([row | {"speed_over_ar": None} for row in frontier_rows()], tmp_path / "f")[1])
    assert ">tokens per forward<" in text
    assert ">oracle<" in text


def test_details_name_every_line_and_axis(tmp_path: Path) -> None:
    rows = frontier_rows()
    text = text_of(plots.frontier_details(rows, tmp_path / "d", title="a < b & c")[1])
    for word in (">AR parent<", ">threshold<", ">oracle<", ">real text<", ">batch 1<", ">batch 8<",
                 "tokens per forward", "nats per token", "a &lt; b &amp; c"):  # fmt: skip
        assert word in text, word
    rows += [row | {"block_size": 16} for row in rows if row["mode"] == "diffusion"]
    text = text_of(plots.frontier_details(rows, tmp_path / "d")[1])
    assert ">threshold, blocks of 16<" in text


def test_frontier_of_a_task_shows_accuracy(tmp_path: Path) -> None:
    rows = frontier_rows()
    assert "accuracy" not in text_of(plots.frontier(rows, tmp_path / "a")[1])
    assert "accuracy" in text_of(plots.frontier([row | {"accuracy": 0.5} for row in rows], tmp_path / "b")[1])


@pytest.mark.parametrize("near", [0.0, 0.01, 0.3])
def test_labels_cover_neither_each_other_nor_a_mark(
    tmp_path: Path, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on the figure as it is saved, at points that lie near each other or all at one place."""
    lines = [plots.Line(f"rule number {i}", [(1.3 + near * i % 0.7, 1.0 + near * (i * 3 % 8) / 8)], ["0.25"])
             for i in range(8)]  # fmt: skip
    lines.append(plots.Line("line", [(1.1 + x / 40, 0.8 + x / 50) for x in range(8)], [f"0.{x}" for x in range(8)]))
    seen = saved_figures(monkeypatch)
    _, svg = plots.trade_off(
        lines, tmp_path / "f", parent=(1.0, 0.9), x_label="x", y_label="y", levels={"real text": 1.1}
    )
    (axes,) = seen[0].axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text() not in ("", "better")]
    assert len(boxes) >= 11
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert axes.get_window_extent().containsx(box.x0)
        assert axes.get_window_extent().containsx(box.x1)
        for x, y in [point for line in lines for point in line.points]:
            across, up = axes.transData.transform((x, y))
            assert not (box.x0 - 2 < across < box.x1 + 2 and box.y0 - 2 < up < box.y1 + 2)
    for line in lines:
        assert f">{line.name} " in text_of(svg)


def saved_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved from now on."""
    seen: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: object, **options: object) -> None:
        seen.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return seen


def test_an_svg_has_every_colour_of_its_own_in_dark(tmp_path: Path) -> None:
    """Text and lines of one scheme on the paper of the other could not be read."""
    drawn = [plots.frontier(frontier_rows(), tmp_path / "f"), plots.frontier_details(frontier_rows(), tmp_path / "d"),
             plots.curves([{"x": 1, "y": 2}, {"x": 2, "y": 3}], tmp_path / "c", x="x", y="y"),
             plots.training_curve(RUN, tmp_path / "t", parent_nll=1.3),
             plots.bars([{"x": "a", "y": 2}], tmp_path / "b", by="x", y="y")]  # fmt: skip
    for _, svg in drawn:
        text = text_of(svg)
        rules = dict(re.findall(r'\[style\*="((?:fill|stroke): #\w+)"\]\{(\w+:#\w+)!important\}', text))
        body = text.partition("</style>")[2]
        used = set(re.findall(r"(?:fill|stroke): #\w{6}", body)) - {"fill: #ffffff", "stroke: #ffffff"}
        assert used == set(rules)
        assert not re.search(r"<text(?![^>]*fill)", body)  # a text without a colour is black in both schemes


def test_the_figures_of_the_docs_are_those_of_the_rows(tmp_path: Path) -> None:
    """By their words: bytes differ between versions of matplotlib."""
    subprocess.run([sys.executable, ROOT / "docs" / "site" / "figures.py", tmp_path], check=True)
    kept = {file.name: file for file in (ROOT / "docs" / "images").glob("measured_*")}
    drawn = {file.name: file for file in tmp_path.iterdir()}
    assert set(drawn) == set(kept)
    for name, file in drawn.items():
        assert re.findall(r">([^<>]+)</text>", text_of(file)) == re.findall(r">([^<>]+)</text>", text_of(kept[name]))


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
    svg = text_of(plots.heat_map(rows, tmp_path / "n", x="train", y="eval", value="nelbo", y_label="")[1])
    assert ">eval<" not in svg  # what needs no name has none


def test_curves_and_bars_take_seeds(tmp_path: Path) -> None:
    rows = [{"arm": arm, "tokens": t, "nelbo": 3 + seed / 10 - t / 100} for arm in ("shift", "none") for t in (10, 20)
            for seed in range(3)]  # fmt: skip
    svg = text_of(plots.curves(rows, tmp_path / "c", x="tokens", y="nelbo", by="arm", y_label="NELBO", log_x=True)[1])
    assert ">shift<" in svg
    assert "FillBetween" in svg or "PolyCollection" in svg
    svg = text_of(plots.bars(rows, tmp_path / "b.svg", by="arm", y="nelbo", y_label="NELBO (nats per token)")[1])
    assert ">none<" in svg
    assert (tmp_path / "b.png").exists()


def test_curves_have_their_names_beside_them_and_no_name_covers_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where lines lie close together, as arms of a study do."""
    seen = saved_figures(monkeypatch)
    arms = [f"clean-shift-{i}" for i in range(7)]
    rows = [{"arm": arm, "tokens": 64_000 * t, "nelbo": 4 - t / 5 + i / 40} for i, arm in enumerate(arms)
            for t in range(1, 5)]  # fmt: skip
    text = text_of(plots.curves(rows, tmp_path / "c", x="tokens", y="nelbo", by="arm")[1])
    (axes,) = seen[0].axes
    assert {written.get_text() for written in axes.texts} == set(arms)
    boxes = [written.get_window_extent() for written in axes.texts]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert axes.get_window_extent().containsx(box.x0)
        assert axes.get_window_extent().containsx(box.x1)
    assert ">250k<" in text


def test_speeds_close_to_one_have_more_than_one_number_below_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = saved_figures(monkeypatch)
    for fastest in (1.01, 1.1, 1.6, 2.9, 9.0):
        lines = [plots.Line("a", [(1.0, 2.0), (fastest, 3.0)], ["0.9", "0.5"])]
        plots.trade_off(lines, tmp_path / "t", parent=(1.0, 1.0), x_label="tokens per forward", y_label="NLL")
        axes = seen[-1].axes[0]
        low, high = axes.get_xlim()
        assert sum(low <= tick <= high for tick in axes.get_xticks()) > 1, fastest


RUN = [{"tokens": 500_000 * step, "loss": 6 / step, "nelbo": 5 / step, "nll": 1.3} for step in (1, 2, 3, 4)]


def test_a_training_curve_has_the_parents_line_and_words(tmp_path: Path) -> None:
    text = text_of(plots.training_curve(RUN, tmp_path / "t", parent_nll=1.25, title="costs $5 and $6")[1])
    for word in (">training tokens<", ">nats per token<", ">AR parent: 1.250<", ">held-out text, bound: 1.250<", ">2M<",
                 ">held-out text, AR mode: 1.300<", ">training loss<", ">costs $5 and $6<"):  # fmt: skip
        assert word in text, word


def test_a_loss_that_is_a_distance_is_not_drawn_as_nats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = saved_figures(monkeypatch)
    text = text_of(plots.training_curve(RUN, tmp_path / "t", parent_nll=1.25, in_nats=False)[1])
    assert "loss, distance to the teacher" in text
    of_nats, of_loss = seen[0].axes
    assert max(of_loss.lines[0].get_ydata()) == 6
    assert all(max(line.get_ydata()) <= 5 for line in of_nats.lines)
    plain = [{"tokens": row["tokens"], "loss": row["loss"]} for row in RUN]
    text = text_of(plots.training_curve(plain, tmp_path / "t", parent_nll=1.25, in_nats=False)[1])
    assert "AR parent" not in text  # nothing here that it compares with


def test_bad_rows_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        plots.curves([], tmp_path / "x", x="a", y="b")
    with pytest.raises(ValueError, match="column 'nelbo' is in no row: use one of a, b"):
        plots.curves([{"a": 1, "b": 2}], tmp_path / "x", x="a", y="nelbo")


def test_plots_need_no_torch_and_say_what_is_missing() -> None:
    code = (
        "import sys; from unmask import plots\nassert 'torch' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try: plots.require_matplotlib()\nexcept ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'unmask[plots]'" in done.stdout
