"""Which recipe for which goal: what was seen, what lies between, and the note before a run that is too short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import unmask
from unmask.cli import main
from unmask.cli.recipes import goals_table
from unmask.goals import GOALS, SEEN, SIZES, cost, short, tokens_needed, too_few
from unmask.recipe import recipe_names

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("recipe", list(SEEN))
def test_tokens_needed_are_those_that_were_seen_and_lie_between_them(recipe: str) -> None:
    seen = SEEN[recipe]
    assert recipe in recipe_names()
    for run in seen:
        assert tokens_needed(recipe, run.num_parameters) == pytest.approx(run.num_tokens)
    small, large = seen[0], seen[-1]
    assert tokens_needed(recipe, small.num_parameters / 50) == pytest.approx(small.num_tokens)
    assert tokens_needed(recipe, large.num_parameters * 50) == pytest.approx(large.num_tokens)
    middle = tokens_needed(recipe, (small.num_parameters * large.num_parameters) ** 0.5)
    assert middle == pytest.approx((small.num_tokens * large.num_tokens) ** 0.5)
    assert too_few(recipe, large.num_parameters, large.num_tokens) is None
    note = too_few(recipe, large.num_parameters, large.num_tokens - 1)
    assert note is not None
    assert all(word in note for word in (recipe, short(large.num_tokens), large.what))


def test_nothing_is_said_where_nothing_was_seen() -> None:
    assert tokens_needed("ar", 1e9) is None
    assert too_few("bd3lm", 1e9, 1) is None


def test_costs_follow_the_stated_formulas() -> None:
    for goal in GOALS:
        for num_parameters in SIZES.values():
            tokens, hours, size, _, measured = cost(goal, num_parameters)
            assert size == goal.bytes * num_parameters
            rate = tokens / hours / 3600
            if num_parameters >= 0.6e9:
                assert rate == pytest.approx(goal.rate * 0.6e9 / num_parameters)
                assert not (measured and num_parameters > 0.6e9)
            elif goal.small_rate is not None:
                assert rate == pytest.approx(goal.small_rate)


@pytest.mark.parametrize(
    ("number", "text"),
    [(9.45e6, "9.4M"), (65e9, "65B"), (135, "140"), (999_700, "1M"), (0.049, "0.049"), (2284, "2.3k")],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text


def test_the_page_shows_the_tables_that_the_command_prints(monkeypatch: Any, capsys: Any) -> None:
    assert goals_table().rstrip() in (ROOT / "docs" / "recipes.md").read_text()
    monkeypatch.setattr("sys.argv", ["unmask", "recipes"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert goals_table() in out
    assert all(f"\n{name} " in out for name in recipe_names())
    assert all(goal.recipe in recipe_names() for goal in GOALS)


def test_adapt_says_before_it_trains_that_the_budget_is_small(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, capsys: Any
) -> None:
    run: dict[str, Any] = {"max_tokens": 300, "max_length": 32, "block_size": 4, "batch_size": 2}
    first = tmp_path / "first"
    unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", first, **run)
    lines = capsys.readouterr().err.splitlines()
    (note,) = [i for i, line in enumerate(lines) if "300 training tokens are few" in line]
    assert "efficient-dlm needs about 5M" in lines[note]
    assert not any("step " in line and "/" in line for line in lines[:note])  # nothing was trained yet
    for model, recipe, quiet in (
        (first, None, True),
        (tokenizer_and_model, "ar", True),
        (tokenizer_and_model, None, False),
    ):
        unmask.adapt(model, stories, recipe, tmp_path / f"{recipe}-{quiet}", **run)
        assert ("tokens are few" in capsys.readouterr().err) != quiet
