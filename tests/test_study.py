"""Studies: what is run, what is measured once, what goes on after an interruption, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import tiny_llama
from transformers import PreTrainedTokenizerFast

import unmask
from unmask.lab import report, tasks
from unmask.lab.measures import MEASURES, Budget, count_votes
from unmask.lab.study import choose, load_study, run_study, study_names
from unmask.lab.tasks import write_problems

TINY = """# A comparison of nothing much.
max_tokens = 1500
seeds = [0, 1]
points = 2
measures = ["likelihood", "quality", "frontier", "pace", "block_sizes", "drift", "order", "speculation", "votes"]
along = ["likelihood"]
[settings]
block_size = 4
max_length = 64
batch_size = 4
[budget]
documents = 4
samples = 2
block_sizes = [2, 4]
thresholds = [0.0, 0.9]
paces = [1, 4]
prompts = 3
prompt_tokens = 8
new_tokens = 8
[arms.ar]
recipe = "ar"
[arms.clean]
recipe = "efficient-dlm"
[arms.causal]
recipe = "efficient-dlm"
clean_attention = "causal"
[arms.noisy]
recipe = "efficient-dlm"
attention = "block_causal"
clean_attention = "none"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tokenizer_and_model: Path, stories: Path) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.toml").write_text(TINY)
    study = load_study(folder / "tiny.toml")
    run_study(study, tokenizer_and_model, [stories], [stories], folder / "out", show_progress=False)
    return folder / "out"


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_run_is_measured_once(finished: Path) -> None:
    lines = lines_of(finished)
    keys = [(line["arm"], line["seed"], line["tokens"], line["measure"]) for line in lines]
    assert len(set(keys)) == len(keys)
    tokens = {json.loads(p.read_text())["tokens"] for p in finished.glob("runs/*/run.json")}
    assert len(tokens) == 1  # equal tokens for all arms
    last = tokens.pop()
    for arm in ("ar", "clean", "causal", "noisy"):
        for seed in (0, 1):
            assert {k[3] for k in keys if k[:3] == (arm, seed, last)} == set(MEASURES)
            before = {k[2] for k in keys if k[:2] == (arm, seed) and k[2] < last}
            assert len(before) == 1  # two points, the last one among them


def test_measures_say_what_a_checkpoint_has(finished: Path) -> None:
    found = {(line["arm"], line["measure"]): line["rows"] for line in report.last_lines(lines_of(finished))}
    assert set(found["parent", "likelihood"][0]) == {"nll"}
    assert set(found["clean", "likelihood"][0]) == {"nelbo", "nelbo_masks_error"}
    assert set(found["causal", "likelihood"][0]) == {"nll", "nelbo", "nelbo_masks_error"}
    assert [row["at"] for row in found["clean", "block_sizes"]] == [2, 4]
    assert found["noisy", "block_sizes"] == []  # one canvas, whatever its attention
    assert found["clean", "speculation"] == [] != found["causal", "speculation"]
    assert [row["at"] for row in found["clean", "frontier"]] == [0.9, 0.0]
    assert found["clean", "frontier"][0]["tokens_per_forward"] <= found["clean", "frontier"][1]["tokens_per_forward"]
    assert {(row["at"], row["part"]) for row in found["clean", "drift"]} == {
        (layer, part) for layer in (0, 1) for part in ("attention", "mlp")
    }
    assert all(row["mean_change"] > 0 for row in found["clean", "drift"])
    assert [row["tokens_per_forward"] for row in found["clean", "pace"]] == [1.0, 4.0]
    order = found["clean", "order"]
    assert [row["at"] for row in order] == [0, 1, 2, 3]
    # 3 prompts of 8 tokens, 2 blocks of 4 places, one token a forward: every forward commits once in every block
    assert [sum(row["counts"][step] for row in order) for step in range(4)] == [6] * 4
    assert found["clean", "votes"] == []  # text has no answers to vote on


def test_a_finished_study_is_left_alone(finished: Path, tokenizer_and_model: Path, stories: Path) -> None:
    study = load_study(finished.parent / "tiny.toml")
    before = (finished / "rows.jsonl").read_text()
    times = {p: p.stat().st_mtime_ns for p in finished.glob("runs/*/model.safetensors")}
    run_study(study, tokenizer_and_model, [stories], [stories], finished, show_progress=False)
    assert (finished / "rows.jsonl").read_text() == before
    assert {p: p.stat().st_mtime_ns for p in finished.glob("runs/*/model.safetensors")} == times


def test_report_shows_means_and_errors(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    assert "A comparison of nothing much." in text
    assert "| clean |" in text
    assert "## NELBO along training, by tokens" in text
    assert "By NELBO (lower is better):" in text
    for figure in ("along-nelbo", "frontier-parent_nll", "block-sizes", "drift", "order-mean_step"):
        assert (finished / "figures" / f"{figure}.png").stat().st_size < 200_000
        assert f"(figures/{figure}.png)" in text
    frontier = (finished / "figures" / "frontier-parent_nll.svg").read_text()
    assert all(word in frontier for word in (">AR parent<", ">better<", ">clean "))
    found = report.series(report.last_lines(lines_of(finished)), "likelihood", "nelbo", lambda *_: None)
    assert str(found["clean"][None]) in text
    assert found["clean"][None].seeds == 2


def test_estimates() -> None:
    made = report.estimate([1.0, 2.0, 3.0])
    assert (made.mean, made.seeds) == (2.0, 3)
    assert made.error == pytest.approx(1 / 3**0.5)
    assert str(report.estimate([2.0])) == "2.000"
    assert report.apart(report.Estimate(1.0, 0.1, 3), report.Estimate(1.5, 0.1, 3))
    assert not report.apart(report.Estimate(1.0, 0.1, 3), report.Estimate(1.2, 0.1, 3))
    assert not report.apart(report.Estimate(1.0, None, 1), report.Estimate(9.0, None, 1))


def test_a_killed_study_goes_on(file: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    """kill -9 during the second run, and a line of rows.jsonl cut in two."""
    study = choose(load_study(file), arms=["ar", "clean"], seeds=[0])
    straight = run_study(study, tokenizer_and_model, [stories], [stories], tmp_path / "straight", show_progress=False)
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "unmask.cli", "study", str(file), str(tokenizer_and_model), "--data", str(stories),
               "--eval", str(stories), "--output", str(killed), "--arms", "ar,clean", "--seeds", "0"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(killed.glob("runs/clean-0/checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "runs/clean-0/config.json").exists(), "the run ended before it could be killed"
    made = (killed / "runs/ar-0/model.safetensors").stat().st_mtime_ns
    with (killed / "rows.jsonl").open("a") as rows:
        rows.write('{"arm": "clean", "se')
    resumed = run_study(study, tokenizer_and_model, [stories], [stories], killed, show_progress=False)
    assert (killed / "runs/ar-0/model.safetensors").stat().st_mtime_ns == made
    assert resumed == straight == lines_of(killed)


def test_shipped_studies_load() -> None:
    assert "attention" in study_names()
    for name in study_names():
        study = load_study(name)
        assert study.summary
        assert len(list(study.runs())) == len(study.arms) * len(study.seeds)


def test_answers_of_tasks_are_checked(tmp_path: Path) -> None:
    problems = {split: write_problems(tmp_path / f"{split}.jsonl", tasks.problems(["copy", "chain"], split, 12))
                for split in ("train", "test")}  # fmt: skip
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<s>", "</s>", *tasks.WORDS]))}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    lm = unmask.DiffusionLM(tiny_llama(torch.float32, vocab_size=len(vocabulary), eos_token_id=1), tokenizer)
    lm.save_pretrained(tmp_path / "base")
    study = load_study("tasks")
    small = replace(
        choose(study, max_tokens=300, arms=["efficient-dlm", "tri-mode"]),
        budget=Budget(prompts=4, new_tokens=8, documents=4, thresholds=(0.5,), votes=2),
    )

    def run(evaluation: Path, output: str) -> list[dict]:
        return run_study(
            small, tmp_path / "base", [problems["train"]], [evaluation], tmp_path / output, show_progress=False
        )

    found = {(line["arm"], line["measure"]): line["rows"] for line in run(problems["test"], "out")}
    assert found["parent", "quality"][0]["accuracy"] == 0.0
    assert 0 <= found["efficient-dlm", "frontier"][0]["accuracy"] <= 1
    assert [row["at"] for row in found["efficient-dlm", "votes"]] == [1, 2]
    assert all(row["any_accuracy"] >= row["majority_accuracy"] for row in found["tri-mode", "votes"])
    with pytest.raises(ValueError, match=r"is no problem of a task: it begins with one of copy"):
        run(write_problems(tmp_path / "sums.jsonl", [tasks.Problem("copy 1 + 1 =", "2")]), "other")


def test_majority_and_any() -> None:
    answers = [["a", "b", "x"], ["b", "b", "y"], ["b", "c", "x"]]  # three samples of three prompts
    right = [[answer == "b" for answer in sample] for sample in answers]
    rows = count_votes(answers, right)
    assert [row["at"] for row in rows] == [1, 2, 3]
    assert [row["majority_accuracy"] for row in rows] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert [row["any_accuracy"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('measures = ["likelihood"]', "has no arms"),
        ('measures = ["beauty"]\n[arms.a]\nrecipe = "ar"', "measure 'beauty' of study 'bad' is unknown: use any of li"),
        ('measures = ["drift"]\n[arms.a]\nrecipe = "er"', "recipe 'er' is unknown"),
        ('measures = ["drift"]\n[arms.a]\nshift = true', "arm 'a' of study 'bad' names no recipe"),
        ('measures = ["drift"]\n[arms.a]\nrecipe = "ar"\nblocksize = 4', "setting 'blocksize' is unknown"),
        ('measures = ["drift"]\nmasures = 1\n[arms.a]\nrecipe = "ar"', "'masures' in study 'bad' is unknown"),
        ('measures = ["drift"]\n[budget]\ntexts = 1\n[arms.a]\nrecipe = "ar"', "'texts' in budget of study 'bad'"),
        ('measures = ["drift"]\nseeds = [1, 1]\n[arms.a]\nrecipe = "ar"', r"seeds \[1, 1\] must be different"),
        ('measures = ["drift"]\nmax_tokens = 0\n[arms.a]\nrecipe = "ar"', "max_tokens 0 of study 'bad' must be"),
        ('measures = ["drift"]\n[arms.parent]\nrecipe = "ar"', "arm 'parent' of study 'bad' needs another name"),
        ('measures = ["drift"]\n[arms.a]\nrecipe = "ar"\nmax_tokens = 5', "arm 'a' of study 'bad' sets max_tokens"),
        ("measures =", "is no TOML"),
    ],
)
def test_bad_studies_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_study(path)


def test_bad_calls_are_named(
    file: Path, finished: Path, tokenizer_and_model: Path, converted: Path, stories: Path, tmp_path: Path
) -> None:
    study = load_study(file)
    with pytest.raises(ValueError, match="study 'atention' is unknown: did you mean 'attention'"):
        load_study("atention")
    with pytest.raises(ValueError, match=r"study file 'gone.toml' does not exist"):
        load_study("gone.toml")
    with pytest.raises(ValueError, match="arm 'cleen' is none of study 'tiny'"):
        choose(study, arms=["cleen"])

    def run(out: Path, study=study, model=tokenizer_and_model, evaluation=stories) -> None:
        run_study(study, model, [stories], [evaluation], out, show_progress=False)

    with pytest.raises(ValueError, match="is converted already"):
        run(tmp_path / "new", model=converted)
    with pytest.raises(ValueError, match="eval data 'some/corpus' is no file here"):
        run(tmp_path / "new", evaluation="some/corpus")
    with pytest.raises(ValueError, match="holds another study: its max_tokens is 1500, not 99"):
        run(finished, choose(study, max_tokens=99))
    other = tmp_path / "other.txt"
    other.write_text(stories.read_text() * 2)
    with pytest.raises(ValueError, match=r"holds another study: its eval is 'stories.txt .*', not 'other.txt"):
        run(finished, evaluation=other)
    with pytest.raises(ValueError, match="holds another study: its study is 'tiny', not 'attention'"):
        run(finished, load_study("attention"))
    file.write_text(TINY.replace('clean_attention = "causal"', 'clean_attention = "causal"\nshift = true'))
    with pytest.raises(ValueError, match="its arm 'causal' is"):
        run(finished, load_study(file))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else: choose an empty or new one"):
        run(tmp_path / "full")


def test_another_model_is_named(finished: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    lm = unmask.load(tokenizer_and_model)
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.mul_(1.1)
    lm.save_pretrained(tmp_path / "other")
    study = load_study(finished.parent / "tiny.toml")
    with pytest.raises(ValueError, match=r"holds another study: its model is '.*parent0', not '.*other'"):
        run_study(study, tmp_path / "other", [stories], [stories], finished, show_progress=False)
