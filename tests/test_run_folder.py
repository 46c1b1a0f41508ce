"""A run's folder: damaged checkpoints, one writer, full disks, moved bases, longer runs, ordinary permissions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask
from unmask import run_folder
from unmask.conversion.run_record import training_folder
from unmask.evaluation.embed import write_embeddings
from unmask.lab.tasks import Problem, write_problems
from unmask.replaying import Replay
from unmask.training.checkpoints import checkpoints, damage, latest_checkpoint, read_state

RUN = {"max_tokens": 2000, "max_length": 64, "block_size": 4, "batch_size": 4, "log_every": 1, "save_every": 2,
       "show_progress": False, "eval_documents": 2, "eval_every": 4, "keep_checkpoints": 9}  # fmt: skip


def metrics(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text()


def adapt(base: Path, stories: Path, folder: Path, **settings: object) -> unmask.DiffusionLM:
    return unmask.adapt(base, stories, "efficient-dlm", folder, **(RUN | settings))


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints(folder)]


def unfinished(folder: Path, at: int) -> None:
    """What a run leaves that was killed after the checkpoint of a step, and some rows later."""
    for name in ("model.safetensors", "README.md"):
        (folder / name).unlink()
    run = json.loads((folder / "run.json").read_text())
    run = {k: v for k, v in run.items() if k not in ("tokens", "evaluation")} | {"finished": False}
    (folder / "run.json").write_text(json.dumps(run))
    for step in steps(folder):
        if step > at:
            shutil.rmtree(folder / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def whole(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    adapt(tokenizer_and_model, stories, folder)
    return folder


@pytest.fixture
def cut(whole: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    unfinished(folder, 4)
    return folder


def same(folder: Path, other: Path) -> None:
    first, second = (unmask.load(path).model.state_dict() for path in (folder, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert metrics(folder) == metrics(other)


# --- resuming


@pytest.mark.parametrize("log_every", [1, 2, 3, 5, 100])
def test_metrics_after_a_resume_are_those_of_one_run(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, log_every: int
) -> None:
    options = {"log_every": log_every, "save_every": 2, "eval_every": 3}
    adapt(tokenizer_and_model, stories, tmp_path / "whole", **options)
    for at in steps(tmp_path / "whole"):
        folder = tmp_path / f"cut{at}"
        shutil.copytree(tmp_path / "whole", folder)
        unfinished(folder, at)
        adapt(tokenizer_and_model, stories, folder, resume=True, **options)
        same(folder, tmp_path / "whole")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut weights": lambda p: os.truncate(p / "model.safetensors", 1000),
    "empty optimiser": lambda p: os.truncate(p / "optimizer.bin", 0),
    "cut optimiser, no manifest": lambda p: (os.truncate(p / "optimizer.bin", 900), (p / "files.json").unlink()),
    "zeros": lambda p: (p / "optimizer.bin").write_bytes(bytes((p / "optimizer.bin").stat().st_size)),
    "no state": lambda p: (p / "state.json").unlink(),
    "empty state": lambda p: (p / "state.json").write_text(""),
    "foreign state": lambda p: (p / "state.json").write_text("[]"),
    "foreign manifest": lambda p: (p / "files.json").write_text("3"),
    "no random state": lambda p: (p / "random_states_0.pkl").unlink(),
    "no weights, no manifest": lambda p: ((p / "model.safetensors").unlink(), (p / "files.json").unlink()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    damage: str, cut: Path, whole: Path, tokenizer_and_model: Path, stories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](cut / "checkpoint-4")
    assert latest_checkpoint(cut) == cut / "checkpoint-2"
    adapt(tokenizer_and_model, stories, cut, resume=True)
    assert capsys.readouterr().err.count(f"{cut / 'checkpoint-4'} is damaged") == 1
    same(cut, whole)


def test_names_like_a_copy_are_no_checkpoints(cut: Path, whole: Path, tokenizer_and_model: Path, stories: Path) -> None:
    for name in ("checkpoint-9 copy", "checkpoint-", "checkpoint-x", "checkpoint-99.partial", "checkpoint-7.old"):
        shutil.copytree(cut / "checkpoint-2", cut / name)
    (cut / "checkpoint-11").write_text("a file")
    assert steps(cut) == [2, 4]
    adapt(tokenizer_and_model, stories, cut, resume=True)
    same(cut, whole)
    assert (cut / "checkpoint-9 copy").is_dir()


def test_a_later_damaged_checkpoint_does_not_push_out_good_ones(
    cut: Path, tokenizer_and_model: Path, stories: Path
) -> None:
    shutil.copytree(cut / "checkpoint-4", cut / "checkpoint-99")
    os.truncate(cut / "checkpoint-99" / "model.safetensors", 5)
    adapt(tokenizer_and_model, stories, cut, resume=True, keep_checkpoints=1)
    (last,) = steps(cut)
    assert damage(cut / f"checkpoint-{last}") is None


def test_checkpoints_of_before_are_read(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(whole / "checkpoint-4", folder)
    (folder / "files.json").unlink()
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({key: state[key] for key in ("step", "tokens", "data")}))
    assert damage(folder) is None
    assert read_state(folder).step == 4


def test_the_same_base_may_lie_elsewhere(
    cut: Path, whole: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    shutil.copytree(tokenizer_and_model, tmp_path / "moved")
    adapt(tmp_path / "moved" / ".." / "moved", stories, cut, resume=True)
    same(cut, whole)


def test_a_finished_run_can_be_made_longer(
    whole: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "longer"
    shutil.copytree(whole, folder)
    last = steps(folder)[-1]
    adapt(tokenizer_and_model, stories, folder, resume=True, max_tokens=3000)
    assert "stretched" in capsys.readouterr().err
    run = json.loads((folder / "run.json").read_text())
    assert run["finished"]
    assert run["tokens"] >= 3000
    logged = [json.loads(line)["step"] for line in metrics(folder).splitlines() if '"loss"' in line]
    assert logged == list(range(1, steps(folder)[-1] + 1))
    assert steps(folder)[-1] > last
    with pytest.raises(ValueError, match="max_tokens is 3000, not 2500"):
        adapt(tokenizer_and_model, stories, folder, resume=True, max_tokens=2500)


def test_a_spoilt_run_file_is_named(cut: Path, tokenizer_and_model: Path, stories: Path) -> None:
    (cut / "run.json").write_text("")
    with pytest.raises(ValueError, match=r"run\.json.* is no JSON"):
        adapt(tokenizer_and_model, stories, cut, resume=True)


# --- writing


def test_a_second_writer_is_refused(cut: Path, tokenizer_and_model: Path, stories: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from unmask.conversion.run_record import training_folder\n"
        "with training_folder(Path(sys.argv[1])).claimed():\n print('held', flush=True); input()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(cut)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        before = metrics(cut)
        with pytest.raises(ValueError, match="is being written by another run"):
            adapt(tokenizer_and_model, stories, cut, resume=True)
        assert metrics(cut) == before
    finally:
        holder.kill()
        holder.communicate()
    adapt(tokenizer_and_model, stories, cut, resume=True)


def test_a_claim_ends_with_its_context(tmp_path: Path) -> None:
    folder = training_folder(tmp_path)

    def claim_twice() -> None:
        with folder.claimed():
            with pytest.raises(ValueError, match="another run"), training_folder(tmp_path).claimed():
                pass
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            claim_twice()


def test_a_row_that_was_cut_is_written_again(tmp_path: Path) -> None:
    folder = training_folder(tmp_path)
    folder.append({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert folder.read_rows() == [{"step": 1}]
    folder.append({"step": 2})
    assert metrics(tmp_path) == '{"step": 1}\n{"step": 2}\n'


def test_a_whole_row_without_a_line_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    training_folder(tmp_path).read_rows()
    training_folder(tmp_path).append({"step": 2})
    assert metrics(tmp_path) == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("record", ["[]", "{}", '{"model_fingerprint": "0"}'])
def test_a_folder_of_another_kind_of_run_is_refused(
    record: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(ValueError, match="holds another kind of run"):
        adapt(tokenizer_and_model, stories, tmp_path, resume=True)
    assert (tmp_path / "run.json").read_text() == record


def test_a_run_that_was_killed_as_it_began_can_begin_again(tmp_path: Path) -> None:
    (tmp_path / "run.json.partial").write_text("{")
    assert training_folder(tmp_path).read() is None
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        training_folder(tmp_path).read()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="holds something else"), training_folder(tmp_path / "run").claimed():
        pass


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(
    cut: Path, whole: Path, tokenizer_and_model: Path, stories: Path
) -> None:
    """A file may grow to less than the optimiser's state, which ends a write as a full disk does."""
    size = (cut / "checkpoint-4" / "optimizer.bin").stat().st_size
    for limit in (size - 5000, size // 8):
        code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n" \
               "from unmask.cli import main; main()"  # fmt: skip
        command = [sys.executable, "-c", code, "adapt", str(tokenizer_and_model), "--data", str(stories), "--output",
                   str(cut), "--resume", "--recipe", "efficient-dlm",
                   *(f"{k}={v}" for k, v in RUN.items() if k != "show_progress")]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "unmask: error: the disk is full: " in done.stderr.splitlines()[-1]
        assert steps(cut) == [2, 4]
        assert not list(cut.glob("*.partial"))
        assert damage(cut / "checkpoint-4") is None
    adapt(tokenizer_and_model, stories, cut, resume=True)
    same(cut, whole)


def test_files_have_the_users_ordinary_permissions(
    tokenizer_and_model: Path, stories: Path, converted: Path, tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        adapt(tokenizer_and_model, stories, tmp_path / "run", max_tokens=300)
        unmask.load(converted).save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for folder in ("run", "saved") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {"model.safetensors", "state.json", "run.json"} <= {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files if path.stat().st_mode & 0o777 != 0o640} == {}


def test_what_is_written_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    run_folder.write_text(path, "before")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"disk is full: .*run\.json"):
        run_folder.write_text(path, "after")
    assert path.read_text() == "before"


def some_replay(path: Path, size: int) -> None:
    Replay(None, '<script type="application/json" id="data">' + "x" * size).save(path)  # type: ignore[arg-type]


def some_vectors(path: Path, size: int) -> None:
    write_embeddings(path, ["a"] * size, torch.randn(size, 4))


def some_results(path: Path, size: int) -> None:
    pytest.importorskip("lm_eval")
    from unmask.evaluation.harness import write_results

    write_results({"results": {"a": "x" * size}, "samples": {}}, path.parent)


def some_problems(path: Path, size: int) -> None:
    write_problems(path, [Problem("a", "b")] * size)


@pytest.mark.parametrize(
    ("name", "write"),
    [("page.html", some_replay), *((f"v.{kind}", some_vectors) for kind in ("npy", "jsonl", "parquet")),
     ("results.json", some_results), ("problems.jsonl", some_problems)],
)  # fmt: skip
def test_a_full_disk_leaves_what_was_there(name: str, write: Callable[[Path, int], None], tmp_path: Path) -> None:
    """A file may grow to less than the new one, which ends a write as a full disk does."""
    resource = pytest.importorskip("resource")
    path = tmp_path / name
    write(path, 2)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        with pytest.raises(ValueError, match=f"the disk is full: .*{re.escape(name)}"):
            write(path, 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [found.name for found in tmp_path.iterdir()] == [name]
    assert path.read_bytes() == before


def test_a_full_disk_is_one_line_whatever_wrote(
    run: Any, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unmask.evaluation.embed.write_embeddings", full)
        code, _, err = run("embed", tokenizer_and_model, stories, "--output", tmp_path / "v.npy")
    assert code == 2
    assert "the disk is full" in err.splitlines()[-1]
