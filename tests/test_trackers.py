"""Trackers get what the log has, from one process, also after a resume; those that cannot work are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import full, interrupted, on_ranks, run_case

import unmask
from unmask.conversion import trackers

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CASE = {"recipe": "efficient-dlm", "report_to": "tensorboard", "save_every": 2, "keep_checkpoints": 9}
OF_THE_CLOCK = {"tokens_per_second", "memory"}


@pytest.fixture(scope="module")
def tracked(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracked") / "run"
    run_case(full(CASE, tokenizer_and_model, stories, folder))
    return folder


def sent(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars in the event files of a run, (step, value) in order."""
    events = EventAccumulator(str(folder / "unmask")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.jsonl; values there are float64."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row: dict[str, Any] = json.loads(line)
        for name, value in row.items():
            if name != "step" and not (name == "tokens" and "loss" not in row):
                found.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    return found


def test_the_event_file_has_what_the_log_has(tracked: Path) -> None:
    found = sent(tracked)
    assert {name: found[name] for name in logged(tracked)} == logged(tracked)
    assert set(found) == set(logged(tracked)) | OF_THE_CLOCK | {"gradient_norm"}
    assert len(found["loss"]) > 3
    assert found["nelbo"][-1][0] == found["loss"][-1][0]  # the last figure, after the last step
    for name in (*OF_THE_CLOCK, "gradient_norm"):
        assert [step for step, _ in found[name]] == [step for step, _ in found["loss"]]
        assert all(value > 0 for _, value in found[name])


def test_a_resumed_run_is_shown_as_one(tracked: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    folder = interrupted(tracked, tmp_path / "run", 2)
    run_case(full(CASE, tokenizer_and_model, stories, folder) | {"resume": True})
    assert logged(folder) == {name: sent(folder)[name] for name in logged(folder)}
    assert len(list((folder / "unmask").glob("events*"))) == 2


def test_a_run_without_a_checkpoint_starts_over(
    tracked: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    """What it sent before it was cut short is not shown."""
    folder = interrupted(tracked, tmp_path / "run", 2)
    shutil.rmtree(folder / "checkpoint-2")
    run_case(full(CASE, tokenizer_and_model, stories, folder) | {"resume": True})
    assert logged(folder) == {name: sent(folder)[name] for name in logged(folder)}


def test_several_processes_send_once(tracked: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    on_ranks(2, {"tracked": full(CASE, tokenizer_and_model, stories, tmp_path / "two")}, tmp_path / "ranks")
    assert len(list((tmp_path / "two" / "unmask").glob("events*"))) == 1
    one, two = sent(tracked), sent(tmp_path / "two")
    assert list(two) == list(one)
    for name in set(one) - OF_THE_CLOCK:
        assert two[name] == [(step, pytest.approx(value, rel=1e-5)) for step, value in one[name]]


@pytest.mark.parametrize("name", [name for name in trackers.LOGGER_TYPE_TO_CLASS if not trackers._chosen(name)])
def test_a_missing_package_is_one_line(
    run, tokenizer_and_model: Path, stories: Path, tmp_path: Path, name: str
) -> None:
    code, out, err = run(
        "adapt", tokenizer_and_model, "--data", stories, "--output", tmp_path / "x", f"report_to={name}"
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"report_to={name!r} needs a package that is not installed: pip install {name.replace('_', '-')}" in err
    assert not (tmp_path / "x").exists()


def test_a_tracker_that_does_not_start_or_fails_later(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kind = trackers.LOGGER_TYPE_TO_CLASS["tensorboard"]
    case = full(CASE, tokenizer_and_model, stories, tmp_path / "run") | {"max_tokens": 300, "show_progress": False}
    case.pop("fault", None)
    (model, data), rest = (case.pop("model"), case.pop("data")), case
    data = str(stories) if data == "stories" else data

    def fails(*_: object, **__: object) -> None:
        raise OSError("no such\nservice")

    monkeypatch.setattr(kind, "log", fails)
    unmask.adapt(model, data, **rest)
    assert "report_to='tensorboard' failed (no such service) and gets no more figures" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.setattr(kind, "start", fails)
    with pytest.raises(ValueError, match=r"report_to='tensorboard' does not start \(no such service\): mend that"):
        unmask.adapt(model, data, **rest | {"output_dir": str(tmp_path / "other")})


def test_a_tracker_that_does_not_take_the_settings_gets_the_figures(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """mlflow does not where a run goes on in its run (MLFLOW_RUN_ID) with other settings."""

    def fails(*_: object, **__: object) -> None:
        raise OSError("changing values is not allowed")

    monkeypatch.setattr(trackers.LOGGER_TYPE_TO_CLASS["tensorboard"], "store_init_configuration", fails)
    run_case(full(CASE | {"max_tokens": 300}, tokenizer_and_model, stories, tmp_path / "run"))
    said = capsys.readouterr().err
    assert "report_to='tensorboard' does not take the settings of the run (changing values is not allowed)" in said
    assert sent(tmp_path / "run")["loss"] == logged(tmp_path / "run")["loss"]


def test_trackers_that_started_are_closed_where_another_does_not(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that stays open would refuse the next run of the process."""
    closed, kind = [], trackers.LOGGER_TYPE_TO_CLASS["tensorboard"]
    finish, missing = kind.finish, next(name for name in ("comet_ml", "aim", "clearml") if not trackers._chosen(name))
    monkeypatch.setattr(kind, "finish", lambda self: closed.append(finish(self)))
    monkeypatch.setattr(trackers, "_chosen", lambda _name: ["tensorboard", missing])
    with pytest.raises(ValueError, match=f"report_to='{missing}' does not start"):
        run_case(full(CASE | {"report_to": "all"}, tokenizer_and_model, stories, tmp_path / "run"))
    assert len(closed) == 1
