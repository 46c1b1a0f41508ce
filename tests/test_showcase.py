"""The parts of `unmask demo` without a model, on the small models that the repository holds."""

from __future__ import annotations

from pathlib import Path

import pytest

import unmask
from unmask.cli import showcase
from unmask.cli.showcase_page import write_page
from unmask.lab.tasks import problems

ROOT = Path(__file__).resolve().parents[1]


def test_the_small_models_answer_as_their_parent_in_fewer_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    asked = problems(showcase.TASKS, "test", 20)
    scores, gap, replay = showcase.task_scores(asked, tmp_path)
    ar, speculative, diffusion = scores
    assert ar.right >= 19
    assert speculative.right == ar.right
    assert diffusion.right >= 18
    assert ar.tokens == ar.forwards
    assert speculative.tokens / speculative.forwards > 2
    assert diffusion.tokens / diffusion.forwards > 3
    assert gap == "b h"
    assert "of 20 right" in capsys.readouterr().out
    answers = [
        showcase.Answer("why <b>?", way, "so & so", 8, n, 1.0) for way, n in zip(showcase.WAYS, (8, 8, 4), strict=True)
    ]
    shown = showcase.Shown(answers, scores, gap, scores[:1], scores[2:], [(10, 2.0), (20, 1.0)], replay)
    page = write_page(tmp_path / "demo.html", shown).read_text(encoding="utf-8")
    assert "why &lt;b&gt;?" in page
    assert "the same text" in page
    assert 'src="replay.html"' in page
    assert page.count("<svg") == 2


def test_without_a_checkout_the_demo_says_where_to_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="run it in the repository's folder, or name a MODEL and --data"):
        showcase.run_showcase(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tasks_models_belong_together() -> None:
    base, tri_mode = (unmask.load(ROOT / path) for path in (showcase.BASE, showcase.TRI_MODE))
    asked = problems(("copy", "chain"), "test", 6)
    prompts = [p.prompt for p in asked]
    out = tri_mode.generate(prompts, "speculative", 20, cycle="two")
    assert out.texts == tri_mode.generate(prompts, "ar", 20).texts
    assert [p.check(text) for p, text in zip(asked, base.generate(prompts, "ar", 20).texts, strict=True)] == [True] * 6


def test_the_answers_of_all_ways_are_the_same_and_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    lm = unmask.load(ROOT / showcase.TRI_MODE)
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    prompt = problems(("copy",), "test", 1)[0].prompt
    answers = [showcase._written(lm, prompt, way) for way in showcase.WAYS]
    assert len({answer.text for answer in answers}) == 1
    assert capsys.readouterr().out.count(answers[0].text.strip()) == len(showcase.WAYS)
    assert answers[0].forwards == answers[0].tokens == answers[1].tokens
    assert answers[2].forwards < answers[0].forwards
