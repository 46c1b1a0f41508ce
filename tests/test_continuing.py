"""A converted model that is adapted further stays what it is, and a run that is resumed trains on the same text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import STORIES

import unmask

SHORT: dict[str, Any] = {"max_tokens": 512, "max_length": 32, "batch_size": 2, "eval_documents": 4}


@pytest.fixture(scope="module")
def shifted(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shifted") / "run"
    unmask.adapt(
        tokenizer_and_model, stories, "tri-mode-published", folder, show_progress=False, shift=True,
        noisy_attention="causal", block_size=4, **SHORT,
    )  # fmt: skip
    return folder


def same(one: Any, other: Any) -> bool:
    names = ("attention", "clean_attention", "noisy_attention", "shift", "block_size", "mask_token_id", "mask_rows")
    return all(getattr(one, name) == getattr(other, name) for name in names)


@pytest.mark.parametrize("in_memory", [False, True])
def test_without_a_recipe_a_converted_model_stays_what_it_is(
    shifted: Path, stories: Path, tmp_path: Path, in_memory: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before = unmask.load(shifted)
    after = unmask.adapt(before if in_memory else shifted, stories, output_dir=tmp_path / "on", **SHORT)
    assert before.diffusion is not None
    assert same(before.diffusion, after.diffusion)
    assert after.diffusion is not None
    assert after.diffusion.recipe == "tri-mode-published"
    assert "note: this run changes" not in capsys.readouterr().err


def test_what_is_set_changes_and_is_announced(
    shifted: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = unmask.adapt(
        shifted, stories, output_dir=tmp_path / "set", block_size=8, noisy_attention="bidirectional", **SHORT
    )
    assert lm.diffusion is not None
    assert (lm.diffusion.block_size, lm.diffusion.noisy_attention, lm.diffusion.shift) == (8, "bidirectional", True)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("note: this run changes"))
    assert "block_size 4 -> 8" in line
    assert "noisy_attention causal -> bidirectional" in line
    assert "shift True" not in line


def test_a_recipe_sets_all_of_it(
    shifted: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = unmask.adapt(shifted, stories, "efficient-dlm", output_dir=tmp_path / "set", **SHORT)
    assert lm.diffusion is not None
    assert (lm.diffusion.clean_attention, lm.diffusion.shift) == ("block_causal", False)
    assert "shift True -> False" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [{"mask_token": "<other>"}, {"mask_init": "a"}, {"mask_init_noise": True}])
def test_the_mask_token_of_a_converted_model_cannot_change(
    shifted: Path, stories: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(setting))):
        unmask.adapt(shifted, stories, output_dir=tmp_path / "x", show_progress=False, **SHORT, **setting)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("setting", ["eval_data", "self_prompts"])
def test_a_file_of_a_setting_that_is_not_there_is_an_error(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, setting: str
) -> None:
    data = "self" if setting == "self_prompts" else stories
    with pytest.raises(ValueError, match=f"{setting} 'typo'"):
        unmask.adapt(tokenizer_and_model, data, output_dir=tmp_path / "x", **{setting: "typo"}, **SHORT)


def test_another_cut_of_the_corpus_is_another_run(tokenizer_and_model: Path, tmp_path: Path) -> None:
    many, held_out = tmp_path / "many.txt", tmp_path / "held-out.txt"
    many.write_text("<|endoftext|>".join(f"{i}. {STORIES[i % len(STORIES)]}" for i in range(900)))
    held_out.write_text(STORIES[0])
    options: dict[str, Any] = {"show_progress": False, "max_length": 32, "batch_size": 2, "save_every": 2}
    run = tmp_path / "run"
    unmask.adapt(tokenizer_and_model, many, output_dir=run, max_tokens=256, eval_documents=4, **options)
    for changed in ({"eval_documents": 8}, {"eval_documents": 4, "eval_data": str(held_out)}):
        with pytest.raises(ValueError, match="held out of training"):
            unmask.adapt(tokenizer_and_model, many, output_dir=run, resume=True, max_tokens=256, **options, **changed)
    unmask.adapt(tokenizer_and_model, many, output_dir=run, resume=True, max_tokens=256, eval_documents=4, **options)


def test_open_attention_is_not_closed_again(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    short = SHORT | {"max_tokens": 128, "show_progress": False}
    unmask.adapt(tokenizer_and_model, stories, "diffullama", tmp_path / "a", **short)

    def steps(run: str) -> int:
        return int(json.loads((tmp_path / run / "run.json").read_text())["settings"]["anneal_steps"])

    assert steps("a") > 1
    unmask.adapt(tmp_path / "a", stories, output_dir=tmp_path / "on", **short)
    assert steps("on") == 1
    unmask.adapt(tmp_path / "a", stories, output_dir=tmp_path / "set", anneal_steps=3, **short)
    assert steps("set") == 3


def test_an_empty_name_is_not_the_working_folder(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    sources: list[tuple[Any, dict[str, Any]]] = [(stories, {"eval_data": ""}), ("", {}), ([stories, ""], {})]
    for data, setting in sources:
        with pytest.raises(ValueError, match="'' is empty"):
            unmask.adapt(tokenizer_and_model, data, output_dir=tmp_path / "x", **SHORT, **setting)


def test_a_run_of_an_older_version_goes_on_under_todays_names(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    run, record = tmp_path / "run", tmp_path / "run" / "run.json"
    options = SHORT | {"show_progress": False, "num_masks": 2, "max_tokens": 128}
    unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", run, **options)
    new = json.loads(record.read_text())
    old = {name: value for name, value in new["settings"].items() if name != "num_masks"} | {"draws": 2}
    record.write_text(json.dumps(new | {"settings": old | {"anneal_form": "entries"}}))
    unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", run, resume=True, **options)
    record.write_text(json.dumps(new | {"settings": old | {"alpha": 0.9}}))  # which the run never read
    unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", run, resume=True, **options)
    with pytest.raises(ValueError, match="its num_masks is 2, not 3"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", run, resume=True, **(options | {"num_masks": 3}))
    record.write_text(json.dumps(new | {"settings": old | {"anneal_form": "window"}}))
    with pytest.raises(ValueError, match="anneal_form='window' is no longer offered"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", run, resume=True, **options)


@pytest.mark.parametrize("recipe", ["efficient-dlm", "tri-mode", "diffullama"])
def test_a_checkpoint_of_an_unknown_recipe_goes_on_with_the_nearest_one(
    tokenizer_and_model: Path,
    stories: Path,
    tmp_path: Path,
    recipe: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unmask.adapt(tokenizer_and_model, stories, recipe, tmp_path / "first", **(SHORT | {"show_progress": False}))
    config = tmp_path / "first" / "config.json"
    raw = json.loads(config.read_text())
    raw["diffusion"]["recipe"] = "one-of-tomorrow"
    config.write_text(json.dumps(raw))
    before = unmask.load(tmp_path / "first").diffusion
    after = unmask.adapt(tmp_path / "first", stories, output_dir=tmp_path / "on", **SHORT).diffusion
    assert after is not None
    assert same(before, after)
    assert after.recipe == recipe
    assert f"recipe one-of-tomorrow -> {recipe}" in capsys.readouterr().err


@pytest.fixture
def taught(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A finished run with a teacher, and its settings."""
    shutil.copytree(tokenizer_and_model, tmp_path / "teacher")
    settings = SHORT | {"max_tokens": 128, "show_progress": False, "teacher": str(tmp_path / "teacher")}
    unmask.adapt(tokenizer_and_model, stories, "tri-mode-published", tmp_path / "run", **settings)
    return tmp_path / "run", settings


@pytest.mark.parametrize("recorded", [True, False])
def test_a_teacher_is_the_same_under_another_path(
    taught: tuple[Path, dict[str, Any]], tokenizer_and_model: Path, stories: Path, tmp_path: Path, recorded: bool
) -> None:
    folder, settings = taught
    record = json.loads((folder / "run.json").read_text())
    shutil.copytree(tokenizer_and_model, tmp_path / "moved")
    others = [str(tmp_path / "moved"), "parent"]
    if not recorded:  # as versions before this one left it: paths are compared
        del record["teacher"]
        (folder / "run.json").write_text(json.dumps(record))
        others = [str(tmp_path / "moved" / ".." / "teacher")]
    for teacher in others:
        options = settings | {"teacher": teacher}
        unmask.adapt(tokenizer_and_model, stories, "tri-mode-published", folder, resume=True, **options)


def test_other_weights_at_the_same_path_are_another_teacher(
    taught: tuple[Path, dict[str, Any]], tokenizer_and_model: Path, stories: Path
) -> None:
    folder, settings = taught
    other = unmask.load(settings["teacher"])
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(1.1)
    other.save_pretrained(settings["teacher"])
    with pytest.raises(ValueError, match="holds a different run: its teacher is"):
        unmask.adapt(tokenizer_and_model, stories, "tri-mode-published", folder, resume=True, **settings)


def test_beginnings_are_the_same_under_another_path(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    settings = SHORT | {"max_tokens": 128, "show_progress": False}
    folder, copy, other = tmp_path / "run", tmp_path / "copy.txt", tmp_path / "other.txt"
    shutil.copy(stories, copy)
    other.write_text("<|endoftext|>".join(reversed(STORIES)))

    def run(prompts: Path, resume: bool) -> None:
        unmask.adapt(
            tokenizer_and_model, "self", "drafter", folder, resume=resume, self_prompts=str(prompts), **settings
        )

    run(stories, False)
    run(copy, True)
    with pytest.raises(ValueError, match="holds a different run: its self_prompts is"):
        run(other, True)


def test_a_run_ends_with_its_parent_beside_it(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = SHORT | {"show_progress": True, "eval_data": str(stories)}
    lm = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "run", **run)
    lines = [line for line in capsys.readouterr().err.splitlines() if "held-out text" in line]
    assert len(lines) == 1
    texts = stories.read_text().split("<|endoftext|>")[: run["eval_documents"]]
    for model, name in ((unmask.load(tokenizer_and_model), "parent"), (lm, "this model")):
        nll = model.nll(texts)
        value = sum(document.nats for document in nll) / sum(document.num_tokens for document in nll)
        assert f"{value:.4f} ({name}, AR mode)" in lines[0]
        assert f"{name}, AR mode | {value:.4f} |" in (tmp_path / "run" / "README.md").read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"{record['evaluation']['nelbo']:.4f} (diffusion mode, bound)" in lines[0]
    card, before = (tmp_path / "run" / "README.md").read_text(), record["parent_nll"]
    ids = torch.tensor([record["parent_text"]["ids"]])
    assert ids[0].tolist() == lm.tokenizer(texts[0])["input_ids"][:16]
    for model, mode, name in ((unmask.load(tokenizer_and_model), "ar", "parent"), (lm, "diffusion", "this")):
        out = model.generate(ids, mode=mode, max_new_tokens=32)
        assert f"{name:8}{out.texts[0]!r}\n" in card
    rate = int(out.num_new_tokens[0]) / int(out.num_forwards[0])
    assert f"({rate:.2f} tokens per forward, mode diffusion)" in card
    unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "run", resume=True,
                 **(run | {"max_tokens": 900}))  # fmt: skip
    assert json.loads((tmp_path / "run" / "run.json").read_text())["parent_nll"] == before
