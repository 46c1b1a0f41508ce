"""The likely mistakes: each is one line with the value and the fix, and nothing is lost or left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import unmask

UNWRITTEN = "cannot be written"
ADAPT = ("adapt", "{parent}", "--data", "{stories}", "--output", "{new}")
SMALL = ("--max-tokens", "100", "max_length=32", "block_size=4", "batch_size=2")
MISTAKES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # what is missing
    "no data": (("adapt", "{parent}", "--output", "{new}"), ("--data FILE",)),
    "no output": (("adapt", "{parent}", "--data", "{stories}"), ("--output FOLDER",)),
    "no model": (("adapt", "--data", "{stories}", "--output", "{new}"), ("MODEL",)),
    "a data file that is not there": (
        ("adapt", "{parent}", "--data", "corpsu.txt", "--output", "{new}"), ("corpsu.txt",)),
    "an empty data file": (("adapt", "{parent}", "--data", "{empty}", "--output", "{new}"), ("{empty}",)),
    "evaluate without data": (("evaluate", "{parent}"), ("--data FILE",)),
    "a parent folder that is not there": (("generate", "./no/such", "x"), ("./no/such",)),
    "a folder without a model": (("generate", "{folder}", "x"), ("{folder}", "config.json")),
    "a file that is no model": (("generate", "{stories}", "x"), ("'{stories}' is a file", "HF checkpoint")),
    # misspelt
    "a command": (("genrate", "{parent}", "x"), ("genrate", "generate")),
    "an option": (("generate", "{parent}", "x", "--max-new-token", "3"), ("--max-new-tokens",)),
    "a recipe": ((*ADAPT, "--recipe", "tri-mod"), ("'tri-mod'", "'tri-mode'")),
    "a setting": ((*ADAPT, "blok_size=4"), ("'blok_size'", "'block_size'")),
    "a setting as an option": ((*ADAPT, "--block-size", "4"), ("block_size=4",)),
    "a value of a setting": ((*ADAPT, "attention=two-stream"), ("two-stream", "two_stream")),
    "a task": (("evaluate", "{parent}", "--tasks", "arc_esy"), ("arc_esy",)),
    "a mode": (("generate", "{converted}", "x", "--mode", "difusion"), ("difusion", "diffusion")),
    "a device": (("generate", "{parent}", "x", "--device", "cuda:9"), ("cuda:9",)),
    "a device to train on": ((*ADAPT, "--device", "cuda:9"), ("cuda:9",)),
    "a type": (("generate", "{parent}", "x", "--dtype", "float7"), ("float7", "float16")),
    "a type to save in": ((*ADAPT, "--dtype", "bf16"), ("bf16", "bfloat16")),
    "a study": (("study", "atention"), ("atention", "attention")),
    "a shape": (("bench", "decode", "--shape", "tny"), ("tny", "tiny")),
    "a folder": (("generate", "{parent}x", "x"), ("{parent}x", "did you mean '{parent}'?")),
    "a folder on the way": (("generate", "{misspelt_folder}", "x"), ("did you mean '{parent}'?",)),
    "a data file": (("evaluate", "{parent}", "--data", "{misspelt_stories}"), ("did you mean '{stories}'?",)),
    "a data file of a setting": ((*ADAPT, "eval_data={misspelt_stories}"), ("did you mean '{stories}'?",)),
    # written otherwise
    "a setting with dashes": ((*ADAPT, "block-size=4"), ("'block-size=4'", "write block_size=4")),
    "a setting and its value apart": ((*ADAPT, "block_size", "4"), ("'block_size'", "write block_size=VALUE")),
    "an option as a setting": ((*ADAPT, "device=cpu"), ("'device=cpu'", "write --device NAME")),
    "an argument as a setting": ((*ADAPT, "output_dir=x"), ("'output_dir=x'", "write --output FOLDER")),
    "a name of Python's": ((*ADAPT, "callbacks=x"), ("'callbacks' is unknown",)),
    "a name of a parameter": (("plan", "{parent}", "--tokens", "1M", "name=x"), ("'name' is unknown",)),
    "a number of tokens twice": ((*ADAPT, *SMALL, "max_tokens=200"), ("--max-tokens 100", "max_tokens=200")),
    "a prompt without quotes": (("generate", "{parent}", "Once", "upon"), ("(upon)", "in quotes")),
    "no prompt": (("generate", "{parent}"), ("'prompt'", "`unmask generate --help`")),
    "a misspelt study": (
        ("study", "atention", "{parent}", "--data", "{stories}", "--eval", "{stories}", "--output", "o"),
        ("'atention'", "did you mean 'attention'?")),
    "a word that is no command": (("help",), ("'help'", "`unmask --help`")),
    "the last of two values": (
        ("generate", "{parent}", "x", "--max-new-tokens", "3", "--max-new-tokens", "4k"), ("'4k'",)),
    "memory that is no number": (("plan", "{parent}", "--tokens", "1M", "--gpu-memory", "nan"), ("nan", "finite")),
    "a recipe file without a clean half": (
        (*ADAPT, "--recipe", "{recipe}"), ("clean_attention", "recipe = 'tri-mode'")),
    # cannot be written
    "a run below a file": (("adapt", "{parent}", "--data", "{stories}", "--output", "{stories}/x"), ("{stories}/x",)),
    "a run that cannot be": (
        ("adapt", "{parent}", "--data", "{stories}", "--output", "/proc/x"),
        ("/proc/x", UNWRITTEN)),
    "vectors that cannot be": (
        ("embed", "{parent}", "{stories}", "--output", "/proc/x.npy"),
        ("/proc/x.npy", UNWRITTEN)),
    "tokens that cannot be": (
        ("prepare", "{stories}", "--model", "{parent}", "--output", "/proc/x"),
        ("/proc/x", UNWRITTEN)),
    "an export that cannot be": (
        ("export", "{parent}", "--format", "hf", "--output", "/proc/x"),
        ("/proc/x", UNWRITTEN)),
    "results that cannot be": (("evaluate", "{parent}", "--tasks", "x", "--output", "/proc/x"), ("/proc/x", UNWRITTEN)),
    "a study that cannot be": (
        ("study", "masking", "{parent}", "--data", "{stories}", "--eval", "{stories}", "--output", "/proc/x"),
        ("/proc/x", UNWRITTEN)),
    "a replay of gaps that cannot be": (
        ("infill", "{converted}", "--text", "a<gap:2>", "--replay", "/proc/x.html"),
        ("/proc/x.html", UNWRITTEN)),
    "a replay that cannot be": (("generate", "{parent}", "x", "--replay", "/proc/x.html"), ("/proc/x.html", UNWRITTEN)),
    "a frontier that cannot be": (
        ("frontier", "{converted}", "--data", "{stories}", "--output", "/proc/x", "--prompt-tokens", "2",
         "--max-new-tokens", "2"), ("/proc/x", UNWRITTEN)),
    # does not go together
    "an exact bound of long blocks": (
        ("evaluate", "{converted}", "--data", "{stories}", "--exact", "--block-size", "8"), ("block_size 8",)),
    "a wrong column": (("adapt", "{parent}", "--data", "{records}", "--output", "{new}", *SMALL), ("'text'", "words")),
    "a column of evaluate": (
        ("evaluate", "{parent}", "--data", "{records}"), ("'text'", "words", "--text-column NAME", "--skip-invalid")),
    "a column of frontier": (
        ("frontier", "{converted}", "--data", "{records}"), ("words", "--text-column NAME", "--skip-invalid")),
    "a column of embed": (("-q", "embed", "{parent}", "{records}", "--output", "{new}.npy"), ("--text-column NAME",)),
    "a mode that the model lacks": (("generate", "{parent}", "x", "--mode", "diffusion"), ("diffusion", "adapt")),
    "infilling with an AR model": (("infill", "{parent}", "--text", "A <gap:2> b"), ("adapt",)),
    "chat without a template": (("chat", "{parent}"), ("chat template",)),
    "a block that does not divide": ((*ADAPT, "max_length=30", "block_size=4"), ("max_length=30", "block_size=4")),
    "rows beyond the context": ((*ADAPT, "max_length=4096", "block_size=4"), ("4096", "128")),
    "a prompt beyond the context": (("generate", "{parent}", "{long}"), ("128",)),
    "a threshold above 1": (("generate", "{converted}", "x", "--confidence-threshold", "90"), ("90",)),
    "a setting of another recipe": ((*ADAPT, "--recipe", "bd3lm", "alpha=0.5"), ("alpha=0.5", "objective='joint'")),
    "a number as a word": ((*ADAPT, "learning_rate=fast"), ("learning_rate='fast'", "float")),
    "output that holds a run": (
        ("adapt", "{parent}", "--data", "{stories}", "--output", "{converted_run}"), ("--resume",)),
    "output that holds something else": (
        ("adapt", "{parent}", "--data", "{stories}", "--output", "{folder}"), ("{folder}",)),
    "resume with other settings": (
        ("adapt", "{parent}", "--data", "{stories}", "--output", "{converted_run}", "--recipe",
         "efficient-dlm", "--resume", "seed=77"), ("choose another folder",)),
    "a replay that is no page": (("generate", "{converted}", "x", "--replay", "{folder}/page.txt"), (".html",)),
    "a recipe file that is not there": ((*ADAPT, "--recipe", "mine.toml"), ("mine.toml",)),
    "a run file that is not there": (("adapt", "--config", "run.toml"), ("run.toml",)),
}  # fmt: skip


IN_PYTHON: dict[str, tuple[Callable[[unmask.DiffusionLM, Path], object], str]] = {
    "an option of generate": (lambda lm, _: lm.generate("x", temprature=1), "did you mean 'temperature'?"),
    "an option of its decoder": (lambda lm, _: lm.generate("x", draft_lenght=1), "did you mean 'draft_length'?"),
    "a device": (lambda lm, _: lm.to("gpu"), r"device 'gpu' is not there: this machine has .*cpu"),
    "a folder that is a file": (lambda lm, file: lm.save_pretrained(file), "stories.txt' is a file"),
    "a folder that cannot be": (lambda lm, _: lm.save_pretrained("/proc/x"), "'/proc/x' cannot be written"),
    "callbacks that are none": (
        lambda lm, file: unmask.adapt(lm, file, output_dir="/proc/x", callbacks=3), "callbacks 3 must be a list"),
    "a name of a parameter": (
        lambda lm, file: unmask.adapt(lm, file, output_dir="/proc/x", background=3), "'background' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", IN_PYTHON)
def test_a_mistake_in_python_is_named(converted: Path, stories: Path, mistake: str) -> None:
    act, says = IN_PYTHON[mistake]
    with pytest.raises(ValueError, match=says):
        act(unmask.load(converted), stories)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_the_fix(
    run,
    tokenizer_and_model: Path,
    converted: Path,
    stories: Path,
    tmp_path: Path,
    mistake: str,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("kept")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "recipe.toml").write_text("block_size = 4\n")
    (tmp_path / "records.jsonl").write_text('{"words": "Once upon a time"}\n' * 3)
    places = {
        "parent": str(tokenizer_and_model), "converted": str(converted), "stories": str(stories),
        "new": str(tmp_path / "new"), "folder": str(folder), "empty": str(tmp_path / "empty.txt"),
        "records": str(tmp_path / "records.jsonl"),
"recipe": str(tmp_path / "recipe.toml"),
        "misspelt_stories": str(stories.with_name(stories.name.replace("s", "", 1))),
        "misspelt_folder": str(tokenizer_and_model.parent) + "x/" + tokenizer_and_model.name,
        "converted_run": str(converted), "long": "Once upon a time " * 99,
    }  # fmt: skip
    before = {path: path.read_bytes() for path in converted.rglob("*") if path.is_file()}
    words, fixes = MISTAKES[mistake]
    code, out, err = run(*(word.format(**places) for word in words))
    assert (code, out) == (2, ""), err
    *earlier, line = err.splitlines()
    assert line.startswith("unmask: error: ")
    assert all(before.startswith(("tokenise", f"{converted}: ")) for before in earlier), err
    for fix in fixes:
        assert fix.format(**places) in line
    assert len(line) < 700
    assert not (tmp_path / "new").exists()
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert {path: path.read_bytes() for path in converted.rglob("*") if path.is_file()} == before
