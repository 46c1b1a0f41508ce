"""`--shard i/n` and `unmask merge`: three parts are what one run is; what is no whole is refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import STORIES

import unmask
from unmask.parts import Shard, read_parts

DOUBLE = ("--dtype", "float64")
"""Sums over other batches differ by rounding alone."""


@pytest.fixture
def measure(run, converted: Path, stories: Path, tmp_path: Path):
    """The JSON of a command as a whole, and of three parts put together."""

    def call(command: str, *options: object, number: int = 3) -> tuple[Any, Any]:
        code, out, err = run(command, converted, *options, *DOUBLE, "--output", tmp_path / "whole", "--json")
        assert code == 0, err
        whole = json.loads(out)
        for i in reversed(range(1, number + 1)):
            code, out, err = run(command, converted, *options, *DOUBLE, "--output", tmp_path / "parts", "--json",
                                 "--shard", f"{i}/{number}")  # fmt: skip
            assert code == 0, err
            assert json.loads(out) == {"part": f"{i}/{number}",
                                       "folder": str(tmp_path / "parts" / f"part-{i}-of-{number}")}  # fmt: skip
        code, out, err = run("merge", tmp_path / "parts", "--json")
        assert code == 0, err
        return whole, json.loads(out)

    del stories
    return call


def same(found: Any, expected: Any, ignored: tuple[str, ...] = ()) -> None:
    """Equal but for float64 rounding, and for values that clocks give."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            if key not in ignored:
                same(found[key], value, ignored)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other, ignored)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-12)
    else:
        assert found == expected


@pytest.mark.parametrize("options", [("--num-samples", 3, "--seed", 5), ("--exact", "--max-documents", 10)])
def test_likelihoods_in_parts_are_those_of_one_run(
    measure, stories, converted, tokenizer_and_model, tmp_path, options
) -> None:
    whole, merged = measure("evaluate", "--data", stories, "--parent", tokenizer_and_model, *options)
    same(merged, whole)
    assert whole["parent"]["text"]
    assert merged["num_documents"] == (10 if "--exact" in options else len(STORIES))
    same(*(json.loads((tmp_path / name / "results.json").read_text()) for name in ("parts", "whole")))
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {
        "results.json", "part-1-of-3", "part-2-of-3", "part-3-of-3",
    }  # fmt: skip
    # each document's row is that of the library's call on all of them
    lm = unmask.load(converted, dtype="float64")
    bound = {"exact": True} if "--exact" in options else {"num_samples": 3, "seed": 5}
    nelbo = lm.nelbo(STORIES[: whole["num_documents"]], **bound)
    rows = read_parts([tmp_path / "parts"]).rows
    assert sorted(row["document"] for row in rows) == list(range(len(nelbo)))
    for row in rows:
        same(row["nelbo"], asdict(nelbo[row["document"]]))


def test_more_parts_than_documents(measure, stories) -> None:
    whole, merged = measure("evaluate", "--data", stories, "--max-documents", 2, "--num-samples", 1, number=4)
    same(merged, whole)


def test_a_frontier_in_parts_is_that_of_one_run(measure, stories, tmp_path) -> None:
    whole, merged = measure(
        "frontier", "--data", stories, "--thresholds", "0.3", "--block-sizes", "2,4", "--prompts", 4,
        "--prompt-tokens", 5, "--max-new-tokens", 4, "--rounds", 1, "--batch-sizes", "1,2", "--oracle", 1,
        "--temperature", 0,
    )  # fmt: skip
    same(merged, whole, ("tokens_per_second", "speed_over_ar"))
    for kind in ("run.json", "frontier.svg", "frontier.png"):
        assert (tmp_path / "parts" / kind).exists()
    assert json.loads((tmp_path / "parts" / "run.json").read_text()) == merged["settings"]
    assert [json.loads(line) for line in (tmp_path / "parts" / "rows.jsonl").read_text().splitlines()] == merged["rows"]


def test_sampled_texts_of_a_frontier_in_parts(measure) -> None:
    """More parts than settings: some have none."""
    whole, merged = measure(
        "frontier", "--task", "copy", "--thresholds", "0.5", "--prompts", 3, "--max-new-tokens", 6, "--rounds", 1,
        "--batch-sizes", "2", "--temperature", 1, "--seed", 3, number=5,
    )  # fmt: skip
    same(merged, whole, ("tokens_per_second", "speed_over_ar"))


def test_tasks_in_parts_are_those_of_one_run(measure, tmp_path) -> None:
    pytest.importorskip("lm_eval")
    tasks = _tasks(tmp_path)
    options = ("--tasks", "mood,end,story,word", "--tasks-folder", tasks, "--limit", 7, "--num-fewshot", 2,
               "--num-samples", 2)  # fmt: skip
    whole, merged = measure("evaluate", *options)
    same(merged, whole, ("date",))
    for path in sorted((tmp_path / "whole").glob("samples_*.jsonl")):
        ours, theirs = ([json.loads(line) for line in (folder / path.name).read_text().splitlines()]
                        for folder in (tmp_path / "parts", tmp_path / "whole"))  # fmt: skip
        assert len(theirs) == 7
        same(ours, theirs)


def _tasks(tmp_path: Path) -> Path:
    """Task files of all four kinds, with solved examples that are drawn at random."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"text": story, "start": story.rpartition(" was very ")[0] + " was very"} for story in STORIES]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {folder / 'stories.jsonl'}}}\ntest_split: train\n"
    drawn = "fewshot_split: train\n"
    files = {
        "mood": "output_type: multiple_choice\ndoc_to_text: '{{start}}'\ndoc_to_choice: [happy, tired]\n"
        "doc_to_target: \"{{1 if 'tired' in text else 0}}\"\nmetric_list: [{metric: acc}]\n" + drawn,
        "end": "output_type: generate_until\ndoc_to_text: '{{start}}'\ndoc_to_target: \"{{text.split()[-1]}}\"\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8, temperature: 1.0, do_sample: true}\nrepeats: 2\n"
        "metric_list: [{metric: exact_match}]\n" + drawn,
        "story": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        "word": "output_type: loglikelihood\ndoc_to_text: '{{start}}'\ndoc_to_target: ' happy'\n"
        "metric_list: [{metric: acc}, {metric: perplexity}]\n" + drawn,
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}metadata: {{version: 1}}\n")
    return folder


# --- what is refused


@pytest.fixture(scope="module")
def parts(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts of the likelihoods of 7 documents."""
    folder = tmp_path_factory.mktemp("parts")
    _write(folder, converted, "a", 3)
    return folder


def _write(folder: Path, model: Path, word: str, number: int, *options: str) -> None:
    from typer.testing import CliRunner

    from unmask.cli import app

    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{word} {story}"}) + "\n" for story in STORIES[:7])
    )
    for i in range(1, number + 1):
        line = ["evaluate", str(model), "--data", str(folder / "texts.jsonl"), "--num-samples", "1", "--shard",
                f"{i}/{number}", "--output", str(folder), *options]  # fmt: skip
        assert CliRunner().invoke(app, line).exit_code == 0


def test_parts_on_several_disks_are_put_together(run, parts, tmp_path) -> None:
    shutil.copytree(parts / "part-2-of-3", tmp_path / "elsewhere" / "part-2-of-3")
    for i in (1, 3):
        shutil.copytree(parts / f"part-{i}-of-3", tmp_path / "here" / f"part-{i}-of-3")
    whole = run("merge", parts, "--output", tmp_path / "out", "--json")[1]
    assert run("merge", tmp_path / "here", tmp_path / "elsewhere", "--json")[1] == whole
    assert run("merge", *sorted((tmp_path / "here").glob("part*")), tmp_path / "elsewhere", "--json")[1] == whole
    assert json.loads((tmp_path / "here" / "results.json").read_text()) == json.loads(whole)
    code, out, _ = run("merge", parts, "--output", tmp_path / "out")
    assert (code, out.splitlines()[0][:12]) == (0, "7 documents,")


def _changed(folder: Path, **changes: object) -> None:
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | changes))


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda f: shutil.rmtree(f / "part-2-of-3"), "part 2/3 is missing in"),
    "two missing": (lambda f: [shutil.rmtree(f / f"part-{i}-of-3") for i in (1, 2)], "part 1/3, 2/3 is missing in"),
    "unfinished": (
        lambda f: _changed(f / "part-3-of-3", finished=False),
        "part-3-of-3' is not finished: run --shard 3/3",
    ),
    "of other numbers": (
        lambda f: (shutil.copytree(f / "part-1-of-3", f / "part-4-of-4"), _changed(f / "part-4-of-4", part="4/4")),
        "part-1-of-3' is one of 3 parts and",
    ),
    "renamed": (lambda f: (f / "part-2-of-3").rename(f / "part-2-of-4"), "part-2-of-4' holds part 2/3"),
    "other samples": (lambda f: _changed(f / "part-2-of-3", num_samples=8), "num_samples is 1 and 8; run one of them"),
    "other documents": (lambda f: _changed(f / "part-2-of-3", documents_fingerprint="x"), "documents_fingerprint is"),
    "another model": (lambda f: _changed(f / "part-3-of-3", model_fingerprint="x"), "model_fingerprint is"),
    "another version": (lambda f: _changed(f / "part-3-of-3", versions={}), "versions is"),
    "another measurement": (lambda f: _changed(f / "part-3-of-3", measured="frontier"), "measured is 'likelihood' and"),
    "no record": (lambda f: (f / "part-3-of-3" / "run.json").unlink(), "part-3-of-3"),
    "no part": (lambda f: [shutil.rmtree(path) for path in f.glob("part*")], "holds no parts"),
    "no folder": (shutil.rmtree, "does not exist"),
    "no rows": (lambda f: (f / "part-1-of-3" / "rows.jsonl").unlink(), "part-1-of-3"),
    "a cut row": (lambda f: (f / "part-2-of-3" / "rows.jsonl").write_text('{"document": 1'), "part-2-of-3"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_whole_is_refused_by_name(run, parts: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "parts"
    shutil.copytree(parts, folder, ignore=shutil.ignore_patterns("results.json"))
    change, says = FAULTS[fault]
    change(folder)
    before = sorted(path for path in folder.rglob("*")) if folder.exists() else []
    code, out, err = run("merge", folder)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert before == (sorted(folder.rglob("*")) if folder.exists() else [])


def test_a_part_is_there_once(run, parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "part-2-of-3", tmp_path / "part-2-of-3")
    code, _, err = run("merge", parts, tmp_path)
    assert code == 2
    assert "part 2/3 is there twice" in err


def test_a_finished_part_is_left_and_another_is_not_written_over(run, converted, parts) -> None:
    line = ["evaluate", converted, "--data", parts / "texts.jsonl", "--shard", "1/3", "--output", parts]
    before = (parts / "part-1-of-3" / "rows.jsonl").stat().st_mtime_ns
    assert run(*line, "--num-samples", 1)[0] == 0
    assert (parts / "part-1-of-3" / "rows.jsonl").stat().st_mtime_ns == before
    code, _, err = run(*line, "--num-samples", 2)
    assert code == 2
    assert "part-1-of-3' holds another part: its num_samples is 1, not 2" in err


def test_an_interrupted_part_goes_on(run, converted, stories, tmp_path, monkeypatch) -> None:
    from unmask.lab import sweep

    line = ["frontier", converted, "--data", stories, "--thresholds", "0.5", "--prompts", 2, "--prompt-tokens", 5,
            "--max-new-tokens", 4, "--rounds", 1, "--output", tmp_path, "--shard", "1/2"]  # fmt: skip
    real = sweep.frontier_row
    monkeypatch.setattr(sweep, "frontier_row", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*line)[0] == 130
    rows = tmp_path / "part-1-of-2" / "rows.jsonl"
    before = rows.read_text()
    assert len(before.splitlines()) == 1
    assert "part 2/2 is missing" in run("merge", tmp_path)[2]
    monkeypatch.setattr(sweep, "frontier_row", real)
    assert run(*line)[0] == 0
    assert rows.read_text().startswith(before)


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/0", "-1/3", "1/2/3", "a/b", "", "1/999999999", "1.0/3"])
def test_a_shard_is_a_part_of_all(run, converted, stories, tmp_path, shard) -> None:
    for command in ("evaluate", "frontier"):
        code, out, err = run(command, converted, "--data", stories, "--output", tmp_path / "x", "--shard", shard)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert f"--shard {shard!r}" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["evaluate", "frontier"])
def test_a_shard_needs_a_folder(run, converted, stories, command) -> None:
    code, _, err = run(command, converted, "--data", stories, "--shard", "1/3")
    assert code == 2
    assert "--shard 1/3 needs --output" in err


def test_every_item_is_in_one_part() -> None:
    for of in (1, 3, 8):
        shards = [Shard(i, of) for i in range(1, of + 1)]
        assert all(sum(shard.takes(item) for shard in shards) == 1 for item in range(20))


def test_parts_are_read_in_their_order(parts: Path) -> None:
    assert [row["document"] for row in read_parts([parts]).rows] == [0, 3, 6, 1, 4, 2, 5]
