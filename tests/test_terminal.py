"""What the command says beside its results: help, near names, progress, how to go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import run  # noqa: F401

import unmask


def test_the_command_alone_and_the_package_as_a_module_print_help() -> None:
    shown = subprocess.run([sys.executable, "-m", "unmask"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "adapt" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--block-size", "16"), "--block-size, which is a setting: write block_size=16"),
        (("--block-size=16",), "--block-size, which is a setting: write block_size=16"),
        (("--learning-rate",), "--learning-rate, which is a setting: write learning_rate=VALUE"),
        (("--blok-size", "16"), "--blok-size (did you mean block_size=16?)"),
        (("--nothing", "16"), "No such option: --nothing"),
    ],
)
def test_a_setting_as_an_option_is_shown_as_a_setting(run, arguments, message) -> None:  # noqa: F811
    code, out, err = run("adapt", ".", "--data", "x", "--output", "y", *arguments)
    assert (code, out) == (2, "")
    assert err.strip().endswith(message)


def test_env_names_versions_and_devices(run) -> None:  # noqa: F811
    code, out, _ = run("env", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["unmask"] == unmask.__version__
    assert found["devices"][-1] == "cpu"
    assert f"torch            {found['torch']}" in run("env")[1]


def test_a_run_says_how_to_go_on_and_where_it_goes_on(run, tokenizer_and_model, stories, tmp_path, monkeypatch) -> None:  # noqa: F811
    from unmask.training import loop

    same = ["adapt", tokenizer_and_model, "--data", stories, "--output", tmp_path / "run", "--max-tokens", 400,
            "max_length=32", "block_size=4", "batch_size=2", "save_every=2"]  # fmt: skip
    step, stop_at = loop._Run.step, [1]

    def interrupted(self, *batch) -> None:
        if self.state.step == stop_at[0]:
            raise KeyboardInterrupt
        step(self, *batch)

    monkeypatch.setattr(loop._Run, "step", interrupted)
    code, _, err = run(*same)
    assert code == 130
    assert err.strip().endswith("interrupted: no checkpoint was saved yet")
    stop_at[0] = 3
    code, _, err = run(*same, "--resume")
    assert err.strip().endswith("interrupted: continue from checkpoint-2 with --resume")


def test_a_resumed_run_names_its_step(run, tokenizer_and_model, stories, tmp_path) -> None:  # noqa: F811
    same = ["adapt", tokenizer_and_model, "--data", stories, "--output", tmp_path / "run", "max_length=32",
            "block_size=4", "batch_size=2", "save_every=2"]  # fmt: skip
    assert run(*same, "--max-tokens", 200)[0] == 0
    code, _, err = run(*same, "--max-tokens", 300, "--resume")
    assert code == 0
    assert "resuming from step 4\n" in err


def test_no_bars_and_warnings_of_other_libraries(tokenizer_and_model: Path) -> None:
    command = [sys.executable, "-m", "unmask", "generate", str(tokenizer_and_model), "Once", "--max-new-tokens", "2"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0
    assert shown.stderr.strip() == "2 tokens in 2 forwards (1.00 per forward)"
