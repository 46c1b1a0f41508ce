"""Synthetic tasks: right answers are taken, wrong ones are not, and no problem is in two splits."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import unmask
from unmask.lab.tasks import (
    ITEMS,
    LONG_TASKS,
    LONG_WORDS,
    SPLITS,
    TASKS,
    WORDS,
    Problem,
    canonical,
    check,
    draw,
    problems,
    split_of,
    write_problems,
)
from unmask.sampling import Blocks, Threshold


@pytest.mark.parametrize("task", TASKS)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_drawn_problems_belong_to_their_split_and_are_answered(task: str, seed: int) -> None:
    for split in SPLITS:
        for problem in itertools.islice(draw(task, split, seed), 5):
            assert problem.task == task
            assert split_of(problem) == split
            assert problem.check(problem.answer)
            assert problem.check(f" {problem.answer}\n")
            assert not problem.check(problem.answer + " a")
            assert not problem.check("")
            words = (problem.prompt + problem.answer).split()
            assert set(words) <= set(LONG_WORDS if task in LONG_TASKS else WORDS)
            if task in LONG_TASKS:
                assert 16 <= len(problem.answer.split()) <= 48


def test_no_problem_is_in_two_splits() -> None:
    """Of all splits and many seeds, canonical forms never meet; a rearranged plan stays where it was."""
    met: dict[str, set[str]] = {split: set() for split in SPLITS}
    for task, split, seed in itertools.product(TASKS, SPLITS, range(3)):
        met[split] |= {canonical(p) for p in itertools.islice(draw(task, split, seed), 300)}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not met[a] & met[b]
    for numbers in itertools.permutations("1479"):
        assert split_of(Problem(f"plan 3 : {' '.join(numbers)} > ", "")) == split_of(Problem("plan 3 : 1 4 7 9 > ", ""))


def test_splits_have_their_shares() -> None:
    problem = (Problem(f"copy {' '.join(items)} > ", "") for items in itertools.permutations(ITEMS[:7]))
    shares = [split_of(p) for p in problem]
    assert abs(shares.count("train") / len(shares) - 0.8) < 0.02
    assert abs(shares.count("test") / len(shares) - 0.1) < 0.02


@pytest.mark.parametrize(
    ("prompt", "right", "wrong"),
    [
        ("copy d a b > ", ["d a b"], ["a d b", "d a", "d a b b", "d  a b", "dab"]),
        ("reverse d a b > ", ["b a d"], ["d a b", "b a"]),
        ("replace a k : d a b > ", ["d k b"], ["d a b", "k d b"]),
        ("shuffle d a b > ", ["a b d", "d a b", "b d a"], ["a b", "a a d", "a b d d"]),
        ("chain 7 +5 -3 -9 > ", ["+5 2 -3 9 -9 0"], ["2 9 0", "+5 12 -3 9 -9 0", "+5 2 -3 9", "+5 2 -3 9 -9 1"]),
        (
            "plan 3 : 1 4 2 > ",
            ["+1 +4 -2", "-2 +4 +1"],
            ["1 +4 -2", "+1 +4", "+1 +4 -2 +0", "+5 -2", "-1 +4 +2", "+4 -1"],
        ),
        ("plan 0 : 2 2 4 > ", ["+2 +2 -4", "-2 -2 +4"], ["+2 -2", "+2 -2 +4"]),
        ("sort 12 5 40 > ", ["5 12 40"], ["12 40 5", "12 5 40", "5 12", "5 12 40 40"]),
        (
            "sum 2 9 5 + 8 0 7 > ",
            ["5 7 0 = 12 ; 9 0 1 = 10 ; 2 8 1 = 11 ; 1 1 0 2"],
            [
                "1 1 0 2",
                "5 7 0 = 12 ; 9 0 1 = 10 ; 2 8 1 = 11 ; 1 1 0 3",
                "5 7 0 = 12 ; 9 0 0 = 9 ; 2 8 0 = 10 ; 1 0 9 2",
            ],
        ),
        (
            "record drinks tea , is aged 31 > ",
            ['{ " age " : 31 , " drink " : " tea " }'],
            [
                '{ " drink " : " tea " , " age " : 31 }',
                '{ " age " : " 31 " , " drink " : " tea " }',
                '{ " age " : 31 }',
            ],
        ),
    ],
)
def test_answers_are_judged(prompt: str, right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert check(prompt, text), text
        assert check(prompt.strip(), text), text  # as a tokenizer gives it back
    for text in wrong:
        assert not check(prompt, text), text


def test_problems_take_turns_and_do_not_repeat() -> None:
    found = problems(["copy", "plan"], "valid", 100, seed=1)
    assert found == problems(["copy", "plan"], "valid", 100, seed=1)
    assert found != problems(["copy", "plan"], "valid", 100, seed=2)
    assert len({p.prompt for p in found}) == 100
    assert [sum(p.task == task for p in found) for task in ("copy", "plan")] == [50, 50]


def test_written_problems_are_supervised_examples(tmp_path: Path) -> None:
    found = problems(list(TASKS), "test", 12)
    records = [
        json.loads(line) for line in write_problems(tmp_path / "new" / "t.jsonl", found).read_text().splitlines()
    ]
    assert records == [{"prompt": p.prompt, "completion": p.answer} for p in found]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="task 'sing' is unknown: use one of copy, reverse"):
        next(draw("sing", "train", 0))
    with pytest.raises(ValueError, match="split 'dev' is unknown: use one of train, valid, test"):
        next(draw("copy", "dev", 0))
    with pytest.raises(ValueError, match="prompt 'Once upon a time' is no problem of a task"):
        check("Once upon a time", "b")
    with pytest.raises(ValueError, match="prompt 'copy a b' is no problem of a task"):
        check("copy a b", "a b")


# --- the benchmark


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "tasks.py"
    spec = importlib.util.spec_from_file_location("tasks_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_rows_of_training_hold_every_problem(bench: ModuleType) -> None:
    """The longest problem, its answer and the end token fit into a row, and the answer into what may be written."""
    for family in (bench.SHORT, bench.LONG):
        for problem in problems(family.tasks, "train", 3000):
            answer = len(problem.answer.split()) + 1
            assert len(problem.prompt.split()) + answer <= family.length
            assert answer <= family.new_tokens


def test_decoder_is_chosen_on_valid(bench: ModuleType, tmp_path: Path) -> None:
    """The most tokens per forward within a point of the base; the most accurate where none is; test does not count."""
    rows = bench.Rows(tmp_path / "rows.jsonl")
    run = {"family": "short", "arm": "a", "seed": 0, "tokens": 10}
    accuracy_speed = {"t 0.9": (1.0, 2.0), "t 0.5": (0.98, 4.0), "t 0.2": (0.95, 6.0)}
    for split, base in (("valid", 0.989), ("test", 0.9)):
        for decoder, (accuracy, speed) in accuracy_speed.items():
            found = {"accuracy": accuracy, "tokens_per_forward": speed}
            rows.add({"measure": "answers", **run, "decoder": decoder, "split": split}, found)
        found = {"accuracy": base, "tokens_per_forward": 1.0}
        rows.add({"measure": "answers", **run, "arm": "base", "tokens": 0, "decoder": "ar", "split": split}, found)
    some = bench.Bench(bench.SHORT, tmp_path, tmp_path, {}, bench.Rows(rows.path))
    assert some.chosen(run, list(accuracy_speed)) == "t 0.5"
    assert some.chosen(run, ["t 0.2"]) == "t 0.2"
    assert len(rows.path.read_text().splitlines()) == 8


def test_accuracy_is_the_mean_of_tasks_and_forwards_are_summed(bench: ModuleType) -> None:
    tasks = {
        "copy": {"problems": 4, "right": 4, "tokens": 30, "forwards": 10},
        "chain": {"problems": 2, "right": 1, "tokens": 10, "forwards": 10},
        "shuffle": {"problems": 2, "right": 0, "tokens": 10, "forwards": 1},
    }
    assert bench.summary(tasks, ("copy", "chain")) == {"accuracy": 0.75, "tokens_per_forward": 2.0}


def test_model_in_the_repository_answers_several_tokens_a_forward(bench: ModuleType) -> None:
    lm = unmask.load(Path(__file__).resolve().parents[1] / "models" / "tasks-one-block")
    found = bench.answers(lm, problems(bench.FIVE, "test", 100), Blocks(select=Threshold(0.8)), bench.SHORT)
    assert found["accuracy"] >= 0.97
    assert found["tokens_per_forward"] > 5
    assert found["tasks"]["copy"]["forwards"] == found["tasks"]["copy"]["problems"]
