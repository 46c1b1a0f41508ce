"""`benchmarks/gpu.py`, rehearsed on a CPU: what it measures is what `adapt` does, and a fault costs one row."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import torch
from gpu_cases import CASES, Case, listed
from gpu_measure import document_lengths, keys_seen, make_model, needed_flops, streams_of
from gpu_report import report
from gpu_training import Steps, corpus_of, settings_of
from packaging.requirements import Requirement
from transformers import LlamaConfig

from unmask.conversion.run_record import training_folder
from unmask.core.attention import Layout, bidirectional, causal, dense, intersect, same_document, two_stream
from unmask.data.packing import Packer, PackState
from unmask.recipe import recipe_names
from unmask.training.batches import TrainingData
from unmask.training.loop import in_training, train

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


# --- on a bare machine


def bare_packages(folder: Path) -> None:
    """A folder of packages that has torch, transformers and what these cannot do without, and nothing else."""
    left, seen = ["torch", "transformers"], {"typer", "rich"}  # transformers' command needs these, its models do not
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in package.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                left.append(needed.name)


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", str(SCRIPT), *map(str, arguments), "--device", "cpu"], capture_output=True, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_it_runs_with_torch_and_transformers_alone(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    bare_packages(packages)
    assert not any((packages / name).exists() for name in ("accelerate", "datasets", "psutil", "typer", "rich"))
    few = ("--only", "tiny/ar/", "--case-seconds", "0.01", "--new", "3")
    done = run(tmp_path / "rows", *few, PYTHONPATH=f"{ROOT / 'src'}{os.pathsep}{packages}")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "rows" / "rows.jsonl").read_text().splitlines()
    rows = {row["case"]: row for row in map(json.loads, lines)}
    assert list(rows) == [case.name for case in CASES if "tiny/ar/" in case.name and not case.compiled]
    assert all(row["tokens_per_second"] > 0 for row in rows.values()), rows
    assert rows["decode/tiny/ar/batch-8/temperature-0/float32"]["equal"] == "8 of 8"
    report = (tmp_path / "rows" / "report.md").read_text()
    assert all(f"| {name.split('/', 1)[1]} |" in report for name in rows)
    assert "Failed" not in report


# --- a step is the step of `adapt`


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("ar", {}), ("tri-mode", {}), ("drafter", {}), ("diffullama", {}), ("efficient-dlm", {"checkpointing": True})],
)
def test_its_steps_are_those_of_a_run(recipe: str, options: dict[str, Any], tmp_path: Path) -> None:
    case = Case("train", "tiny", recipe, precision="float32", **options)

    def steps() -> Steps:
        model = make_model("tiny", "cpu", torch.float32)
        settings = replace(settings_of(case, model), micro_batch_size=2, log_every=1)
        return Steps(model, settings, corpus_of("tiny", settings))

    measured, other = steps(), steps()
    losses = []
    for _ in range(3):
        measured.step()
        losses.append(measured.loss)
    settings = other.settings

    def batches(_step: int, place: PackState) -> Any:
        packer = Packer(corpus_of("tiny", settings), settings.max_length, seed=settings.seed, state=place)
        return packer.batches(settings.batch_size)

    data = TrainingData(batches, 3 * settings.batch_size * settings.max_length, measured.total)
    folder = training_folder(tmp_path)
    with in_training(other.model, settings, other.drafter):
        train(other.model, lambda _: other.network, settings, other.config, data, folder, teacher=other.teacher)
    assert [row["loss"] for row in folder.read_rows()] == pytest.approx(losses, rel=1e-6)
    for ours, theirs in zip(
        (measured.drafter or measured.model).parameters(), (other.drafter or other.model).parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


# --- faults


def speaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Run cases by a script instead, whose `begin` and `row` say what the real one does."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "asked = json.load(sys.stdin)['cases']\n"
        "def say(**line): print(json.dumps(line), flush=True)\n"
        "def begin(name): say(begin=name, seconds=0.5)\n"
        "def row(name): say(row={'case': name, 'value': 1})\n"
        "say(made={'device': 'this one'})\n" + body
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "rows")])


FAULTS = """
for name in asked:
    begin(name)
    if name.endswith('crashes'): os._exit(9)
    if name.endswith('hangs'): time.sleep(60)
    row(name)
"""


def through(rows: gpu.Rows, cases: list[Any], until: float = 1e9) -> None:
    while waiting := rows.waiting(cases):
        if not gpu.run(waiting, rows, until, argparse.Namespace(seconds=1)):
            return


def named(*names: str) -> list[Any]:
    return [SimpleNamespace(name=name) for name in names]


def test_a_case_that_crashes_or_hangs_costs_its_row_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaking(tmp_path, monkeypatch, FAULTS)
    cases = named("train/a", "train/crashes", "train/b", "decode/hangs", "decode/c")
    through(gpu.Rows(tmp_path / "rows"), cases)
    rows = gpu.Rows(tmp_path / "rows").by_name
    assert {name for name, row in rows.items() if row.get("value") == 1} == {"train/a", "train/b", "decode/c"}
    assert rows["train/crashes"]["error"] == "its process ended with status 9"
    assert "took longer than" in rows["decode/hangs"]["error"]
    assert "| train/crashes | its process ended with status 9 |" in (tmp_path / "rows" / "report.md").read_text()


def test_it_goes_on_where_it_stopped_and_tries_again_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaking(tmp_path, monkeypatch, FAULTS)
    through(gpu.Rows(tmp_path / "rows"), named("train/a", "train/crashes"))
    path = tmp_path / "rows" / "rows.jsonl"
    path.write_text(path.read_text() + '{"case": "train/b", "val')  # a machine that was taken away
    rows = gpu.Rows(tmp_path / "rows")
    waiting = [case.name for case in rows.waiting(named("train/a", "train/crashes", "train/b"))]
    assert waiting == ["train/b", "train/crashes"]


def test_rows_of_another_machine_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaking(tmp_path, monkeypatch, FAULTS)
    through(gpu.Rows(tmp_path / "rows"), named("train/a"))
    path = tmp_path / "rows" / "rows.jsonl"
    path.write_text(path.read_text().replace("this one", "another"))
    with pytest.raises(SystemExit, match="device 'another', and here it is 'this one': give another folder"):
        through(gpu.Rows(tmp_path / "rows"), named("train/b"))
    path.write_text('{"case": "matmul", "value": 685.0}\n')
    with pytest.raises(SystemExit, match="rows of another kind"):
        gpu.Rows(tmp_path / "rows")


def test_the_whole_time_ends_a_case_that_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaking(tmp_path, monkeypatch, FAULTS.replace("0.5", "60"))
    import time

    began = time.monotonic()
    rows = gpu.Rows(tmp_path / "rows")
    through(rows, named("train/hangs"), until=began + 0.4)
    assert time.monotonic() - began < 20
    assert rows.by_name == {}


def test_a_case_that_raises_is_a_row_with_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    from gpu_measure import Clock
    from gpu_worker import _row

    row = _row(Case("train", "tiny", "efficient-llm"), Clock(1), argparse.Namespace(device="cpu"))
    assert row == {"error": "ValueError: recipe 'efficient-llm' is unknown: did you mean 'efficient-dlm'? "
                            "the recipes are " + ", ".join(recipe_names())}  # fmt: skip
    assert "Traceback" in capfd.readouterr().err


def test_the_report_shows_figures_in_their_columns_and_what_failed() -> None:
    made = {"device": "H200", "torch": "2.13", "new": 128}
    rows = [
        {"case": "train/1b/ar/sdpa/bf16", "tokens_per_second": 41234.5, "mfu": 0.5, "steps": 20, "made": made},
        {"case": "decode/1b/ar", "error": "RuntimeError: a | b", "made": made},
    ]
    lines = report(rows).splitlines()
    assert lines[0] == "# H200"
    header, _, row = lines[lines.index("## Training steps") + 2 :][:3]
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert (cells["| case"], cells["tokens/s"], cells["MFU"], cells["peak GiB"], cells["steps |"]) == (
        "| 1b/ar/sdpa/bf16", "4.123e+04", "0.5", "", "20 |"
    )  # fmt: skip
    assert lines[-1] == "| decode/1b/ar | RuntimeError: a / b |"


# --- the cases


def test_names_of_cases_are_unique_and_a_rehearsal_has_every_way() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    kinds = [{(case.part, case.what) for case in listed(device) if not case.compiled} for device in ("cuda", "cpu")]
    assert kinds[0] == kinds[1]


def test_a_time_or_a_name_that_means_nothing_is_refused(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT / "src")}
    refused = run(tmp_path, "--seconds", "0", **environment)
    assert (refused.returncode, "--seconds 0" in refused.stderr) == (1, True)
    refused = run(tmp_path, "--only", "train/2b", **environment)
    assert (refused.returncode, "--only 'train/2b' is in no case's name" in refused.stderr) == (1, True)


# --- needed arithmetic


def packed() -> Layout:
    """Documents of 5, 7 and 4 tokens in a row of 16; of 10 and 3 in another, with padding."""
    lengths, rows = [[5, 7, 4], [10, 3]], []
    for row in lengths:
        position = [p for n in row for p in range(n)]
        document = [i for i, n in enumerate(row) for _ in range(n)]
        rows.append((position + [0] * (16 - len(position)), document + [-1] * (16 - len(document))))
    position, document = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    return Layout.of(position, document)


@pytest.mark.parametrize("noisy", ["bidirectional", "causal"])
@pytest.mark.parametrize("clean", ["causal", "block_causal"])
def test_keys_that_a_token_sees_are_those_of_the_pattern(clean: str, noisy: str) -> None:
    layout, block = packed(), 4
    real = layout.real

    def mean(pattern: Any, q: Layout, kv: Layout) -> float:
        return float(dense(intersect(pattern, same_document), q, kv).sum(-1)[real].double().mean())

    both = layout._replace(noisy=torch.ones_like(layout.noisy)).concat(layout)
    pattern = two_stream(block, clean, noisy)
    of_noisy = mean(pattern, layout._replace(noisy=torch.ones_like(layout.noisy)), both)
    settings = SimpleNamespace(attention="two_stream", noisy_attention=noisy, clean_attention=clean, block_size=block,
                               objective="joint", teacher="parent")  # fmt: skip
    (inside, *_), (of_clean, *_), (of_teacher, *_) = streams_of(settings, layout)
    assert inside == pytest.approx(of_noisy)
    assert of_clean == pytest.approx(mean(pattern, layout, both))
    assert of_teacher == pytest.approx(mean(causal, layout, layout))
    assert keys_seen(layout, "bidirectional", 1) == pytest.approx(mean(bidirectional, layout, layout))


def test_needed_arithmetic_is_counted_as_by_hand() -> None:
    config = LlamaConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                         intermediate_size=16, vocab_size=32)  # fmt: skip
    keys, rest, head = 8 * 8, 8 * 8 * 2 + 3 * 8 * 16, 8 * 32
    ar = 2 * (keys + rest + 2 * 8 * 6.5) + head  # 12 tokens see 1..12 keys, 6.5 on average
    layout = Layout.of(torch.arange(12).expand(3, 12))
    settings = SimpleNamespace(attention="ar", block_size=4)
    assert needed_flops(config, streams_of(settings, layout), 36) == 6 * 36 * ar
    both = 2 * (keys + rest + 2 * 8 * 8) + 2 * keys + 0.5 * (rest + 2 * 8 * 8 + head)  # blocks of 4 see 4, 8, 12
    settings = SimpleNamespace(attention="two_stream", noisy_attention="bidirectional", clean_attention="block_causal",
                               block_size=4, objective="diffusion", teacher=None)  # fmt: skip
    assert needed_flops(config, streams_of(settings, layout), 36) == 6 * 36 * both
    drafter = SimpleNamespace(**(vars(settings) | {"clean_attention": "causal", "objective": "distill"}))
    noisy, clean = 2 * (keys + rest + 2 * 8 * 8) + head, ar  # gradients pass through the noisy stream alone
    assert needed_flops(config, streams_of(drafter, layout), 36) == 36 * (4 * noisy + 2 * clean)


def test_documents_are_many_short_ones_and_few_long_ones() -> None:
    lengths = document_lengths(100_000, 2048)
    assert 100_000 <= sum(lengths) < 100_000 + 2048
    assert 16 <= min(lengths) < 100
    assert 1000 < max(lengths) <= 2048
