"""What the command says beside its results: help, near names, progress, how to go on."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import unmask
from unmask.conversion.model_card import _front_matter


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
def test_a_setting_as_an_option_is_shown_as_a_setting(run, arguments, message) -> None:
    code, out, err = run("adapt", ".", "--data", "x", "--output", "y", *arguments)
    assert (code, out) == (2, "")
    assert err.strip().endswith(message)


def test_a_package_that_an_option_needs_is_one_line(run, tokenizer_and_model, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    code, out, err = run("generate", tokenizer_and_model, "Once", "--regex", "[0-9]+")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == "unmask: error: constraint needs llguidance: pip install 'unmask[grammar]'"
    assert "Traceback" not in err


def test_help_is_asked_for_by_a_letter(run) -> None:
    assert run("-h")[:2] == run("--help")[:2]
    assert run("adapt", "-h")[:2] == run("adapt", "--help")[:2]


def test_env_names_versions_and_devices(run) -> None:
    code, out, _ = run("env", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["unmask"] == unmask.__version__
    assert found["devices"][-1] == "cpu"
    assert f"torch            {found['torch']}" in run("env")[1]


def test_a_run_says_how_to_go_on_and_where_it_goes_on(run, tokenizer_and_model, stories, tmp_path, monkeypatch) -> None:
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


def test_a_resumed_run_names_its_step(run, tokenizer_and_model, stories, tmp_path) -> None:
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
    assert shown.stderr.splitlines() == [
        f"{tokenizer_and_model}: 25,120 parameters, an AR model; mode ar, cpu, float32",
        "2 tokens in 2 forwards (1.00 per forward)",
        "one token a forward, as AR models write: `unmask adapt` turns this one into one that writes several",
    ]
    loud = subprocess.run([*command, "-v"], capture_output=True, text=True)
    assert "Loading weights" in loud.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "Once", "--max-new-tokens", 2),
        ("evaluate", "--data", "STORIES"),
        ("infill", "--text", "A <gap:2> b"),
    ],
)
def test_quiet_leaves_results_alone(run, converted, stories, arguments) -> None:
    name, *rest = [stories if word == "STORIES" else word for word in arguments]
    code, out, err = run(name, converted, *rest)
    assert code == 0
    assert err.startswith(f"{converted}: ")
    for at in (("-q", name, converted, *rest), (name, converted, *rest, "--quiet")):
        assert run(*at) == (0, out, "")
    code, out, err = run("-q", name, converted.parent / "nowhere", *rest)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_verbose_shows_where_an_error_comes_from(run, tokenizer_and_model) -> None:
    wrong = ("generate", tokenizer_and_model, "Once", "--mode", "diffusion")
    code, _, err = run(*wrong)
    assert (code, err.count("\n")) == (2, 1)
    code, _, loud = run(*wrong, "-v")
    assert code == 2
    assert loud.startswith("Traceback")
    assert loud.splitlines()[-1] == err.strip()


@pytest.mark.parametrize(("mode", "says"), [
    (("--mode", "ar"), "without it, the mode is diffusion"),
    (("--confidence-threshold", "1"), "surer than 1.0: a lower --confidence-threshold commits more"),
])  # fmt: skip
def test_one_token_a_forward_says_what_would_change_that(run, converted, mode, says) -> None:
    code, _, err = run("generate", converted, "Once", "--max-new-tokens", 4, *mode)
    assert code == 0
    assert err.strip().endswith(says)
    assert "more" not in run("generate", converted, "Once", "--max-new-tokens", 4, "--confidence-threshold", 0)[2]


@pytest.mark.parametrize("command", ["generate", "chat", "infill", "evaluate", "embed", "frontier", "bench"])
@pytest.mark.parametrize(("option", "value"), [("--device", "cuda:7"), ("--device", "gpu"), ("--dtype", "float7")])
def test_a_device_or_a_type_that_is_not_there_is_one_line(run, converted, stories, command, option, value) -> None:
    rest = {
        "generate": (converted, "Once"), "chat": (converted,), "infill": (converted, "--text", "A <gap:2> b"),
        "evaluate": (converted, "--data", stories), "embed": (converted, stories, "--output", "x.npy"),
        "frontier": (converted, "--data", stories), "bench": ("decode", converted),
    }[command]  # fmt: skip
    code, out, err = run(command, *rest, option, value)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert value in err


def test_a_dtype_is_taken(run, converted) -> None:
    _, _, err = run("generate", converted, "Once", "--max-new-tokens", 2, "--dtype", "float64", "--device", "cpu")
    assert "cpu, float64" in err


def test_completion_knows_commands_recipes_and_settings() -> None:
    def completed(words: str, number: int) -> list[str]:
        told = {"_UNMASK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(number)}
        code = "import sys; sys.argv = ['unmask']; from unmask.cli import main; main()"
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | told)
        assert shown.stderr == ""
        return shown.stdout.split()

    assert completed("unmask ad", 1) == ["adapt"]
    assert completed("unmask adapt . --recipe tri", 4) == ["tri-mode", "tri-mode-published"]
    assert completed("unmask adapt . --data x block_s", 5) == ["block_size="]


def test_a_run_from_a_file(run, tokenizer_and_model, stories, tmp_path) -> None:
    """The file's values and the command line's give the run that the command line alone gives."""
    settings = ("max_length=32", "block_size=4", "batch_size=2", "max_tokens=200")
    assert run("adapt", tokenizer_and_model, "--data", stories, "--output", tmp_path / "a", "--recipe", "bd3lm",
               *settings, "seed=3")[0] == 0  # fmt: skip
    file = tmp_path / "run.toml"
    file.write_text(
        f"model = {str(tokenizer_and_model)!r}\ndata = [{str(stories)!r}]\nrecipe = 'bd3lm'\nmax_tokens = 200\n"
        "[settings]\nmax_length = 32\nblock_size = 4\nbatch_size = 2\nseed = 1\n"
    )
    assert run("adapt", "--config", file, "--output", tmp_path / "b", "seed=3")[0] == 0
    a, b = (json.loads((tmp_path / name / "run.json").read_text()) for name in "ab")
    assert a["settings"] == b["settings"]
    assert a["evaluation"] == b["evaluation"]
    for text, says in [
        ("modle = 'x'", "'modle' is unknown: did you mean"), ("model = 3", "model=3 has the wrong type"),
        ("a =", "is no TOML"),
        ("seed = 1\n[settings]\nseed = 2", "sets seed twice"), ("", "adapt lacks MODEL"), ("data = [1]", "data=[1]"),
    ]:  # fmt: skip
        file.write_text(text)
        model = () if not text or "model" in text.split()[0] else (tokenizer_and_model,)
        code, out, err = run("adapt", *model, "--config", file, "--data", stories, "--output", tmp_path / "c")
        if text == "modle = 'x'":
            code, out, err = run(
                "adapt", tokenizer_and_model, "--config", file, "--data", stories, "--output", tmp_path / "c"
            )
        assert (code, out, err.count("\n")) == (2, "", 1), text
        assert says in err
    assert "run.toml" in run("adapt", "--config", tmp_path / "no-run.toml")[2]


def test_a_recipe_of_ones_own(run, tokenizer_and_model, stories, tmp_path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("recipe = 'bd3lm'\nmax_length = 32\nbatch_size = 2\nmax_tokens = 200\n")
    command = ("adapt", tokenizer_and_model, "--data", stories, "--recipe", recipe)
    assert run(*command, "--output", tmp_path / "a", "block_size=4")[0] == 0
    record = json.loads((tmp_path / "a" / "run.json").read_text())["settings"]
    assert (record["recipe"], record["attention"], record["max_length"]) == ("mine", "two_stream", 32)
    assert run(*command, "--output", tmp_path / "a", "block_size=4", "--resume")[0] == 0
    for text, says in [
        ("recipe = 'bd3m'", "did you mean 'bd3lm'"),
        ("blok_size = 4", "did you mean 'block_size'"),
        ("[", "is no TOML"),
    ]:
        recipe.write_text(text)
        code, _, err = run(*command, "--output", tmp_path / "b")
        assert (code, err.count("\n")) == (2, 1)
        assert says in err
    recipe.unlink()
    assert "mine.toml" in run(*command, "--output", tmp_path / "b")[2]


def test_a_run_folder_has_a_page_that_people_read(run, tokenizer_and_model, stories, tmp_path) -> None:
    """Parent and result, texts, curve, command, duration, device, data, licence; its command repeats the run."""
    parent = tmp_path / "par: ent #1 | `x`"
    shutil.copytree(tokenizer_and_model, parent)
    (parent / "README.md").write_text("---\nlicense: mit\nlanguage:\n- en\n- de\nbase_model: x\n---\nhello\n")
    config = json.loads((parent / "config.json").read_text()) | {"dtype": "bfloat16"}
    (parent / "config.json").write_text(json.dumps(config))
    out = tmp_path / "a"
    code, _, err = run("adapt", parent, "--data", stories, "--output", out, "--recipe", "bd3lm", "--max-tokens", 2000,
                       "--dtype", "bfloat16", "max_length=32", "block_size=4", "batch_size=2", "log_every=2",
                       "eval_every=5", "sample_texts=true", f"eval_data={stories}")  # fmt: skip
    assert code == 0, err
    assert "on cpu, weights float32, bfloat16 in the parent, saved as bfloat16" in err
    page = (out / "README.md").read_text()
    front = yaml.safe_load(page.split("---")[1])
    assert front.pop("tags") == ["diffusion-language-model", "block-diffusion", "unmask"]
    assert front == {
        "library_name": "transformers",
        "license": "mit",
        "language": ["en", "de"],
    }
    assert unmask.load(out).model.dtype == torch.bfloat16
    texts = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [text["step"] for text in texts] == [row["step"] for row in rows if "nelbo" in row and "loss" in row]
    assert all(repr(text["text"]) in page for text in texts)
    for said in ("| held-out text | nats per token |", "this model, AR mode", f"{rows[-2]['loss']:.4f}",
                 str(stories.name), "| weights | bfloat16 |", "| device | cpu |", "time of the last session",
                 "par: ent \\#1 \\|"):  # fmt: skip
        assert said in page, said
    command = shlex.split(next(line for line in page.splitlines() if line.startswith("unmask adapt")))
    command[command.index(str(out))] = str(tmp_path / "b")
    assert run(*command[1:])[0] == 0
    a, b = (json.loads((folder / "run.json").read_text()) for folder in (out, tmp_path / "b"))
    assert (a["settings"], a["evaluation"]) == (b["settings"], b["evaluation"])


@pytest.mark.parametrize("name", ["org/model", "a/b: c", "x\n---\nlicense: none", "null", "'\"", "- a"])
def test_front_matter_is_safe_against_odd_names(name: str) -> None:
    """No name of data or base breaks out of its line, and what the hub cannot know is not named as a base."""
    job = SimpleNamespace(sources=("org/data", name), parts=None, stream=None)
    text = _front_matter(job, name, SimpleNamespace(diffusion=None, drafter=None))
    front = yaml.safe_load(text.removeprefix("---").removesuffix("---"))
    on_the_hub = name == "org/model"
    assert front["datasets"] == ["org/data", *([name] if on_the_hub else [])]
    assert front.get("base_model") == (name if on_the_hub else None)
    assert "license" not in front


def test_callbacks_see_each_log_step_and_end_a_run(tokenizer_and_model, stories, tmp_path) -> None:
    seen: list[int] = []

    def watch(progress) -> bool:
        seen.append(progress.step)
        return progress.step < 4

    same = {
        "recipe": "bd3lm",
        "show_progress": False,
        "max_length": 32,
        "block_size": 4,
        "batch_size": 2,
        "log_every": 2,
    }
    unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "a", max_tokens=2000, callbacks=[watch], **same)
    assert seen == [2, 4]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["finished"]
    assert (
        record["tokens"] == json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[1])["tokens"] < 2000
    )
    assert (tmp_path / "a" / "checkpoint-4").is_dir()
    assert unmask.load(tmp_path / "a").generate("Once", max_new_tokens=3).texts
    unmask.adapt(
        tokenizer_and_model, stories, output_dir=tmp_path / "a", max_tokens=2001, resume=True, **same
    )  # goes on
    assert json.loads((tmp_path / "a" / "run.json").read_text())["tokens"] >= 2001


def test_tied_weights_are_saved_without_a_word(tokenizer_and_model, stories, tmp_path, caplog) -> None:
    unmask.adapt(tokenizer_and_model, stories, "bd3lm", tmp_path / "a", max_tokens=200, max_length=32, block_size=4,
                 batch_size=2, show_progress=False)  # fmt: skip
    assert "shared tensor" not in caplog.text
