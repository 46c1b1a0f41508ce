"""`adapt --dry-run`: what a run would do, beside what it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import unmask
from unmask.cli import main
from unmask.conversion.dry_run import dry_run

RUN = {"max_length": 32, "batch_size": 4, "block_size": 4, "max_tokens": 512, "eval_documents": 2}


def test_a_dry_run_says_what_the_run_does_and_writes_nothing(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    found = dry_run(tokenizer_and_model, stories, "efficient-dlm", show_progress=False, **RUN)
    assert list(tmp_path.iterdir()) == []
    unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "run", show_progress=False, **RUN)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert found.settings == run["settings"]
    assert found.tokens == 512
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert abs(found.steps - last["step"]) <= 1
    assert found.held_out == run["data"]["held_out"]
    assert found.documents is not None
    assert len(found.rows) == 2
    assert all(found.rows)
    assert found.memory.weights == 4 * unmask.load(tokenizer_and_model).model.num_parameters()


def test_the_command_needs_no_output(
    tokenizer_and_model: Path, stories: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapt", tokenizer_and_model, "--data", stories, "--recipe", "efficient-dlm", "--dry-run",
             *(f"{name}={value}" for name, value in RUN.items())]  # fmt: skip
    for more, code, said in (((), 0, "row 1: "), (("--json",), 0, '"rows"'), (("--resume",), 2, "writes nothing")):
        monkeypatch.setattr("sys.argv", ["unmask", *map(str, words), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        assert int(ended.value.code or 0) == code
        out = capsys.readouterr()
        assert said in out.out + out.err


def test_own_text_is_not_written(tokenizer_and_model: Path, stories: Path) -> None:
    with pytest.raises(ValueError, match="a dry run has no rows to show"):
        dry_run(tokenizer_and_model, "self", "drafter", self_prompts=str(stories), self_tokens=100, show_progress=False)
