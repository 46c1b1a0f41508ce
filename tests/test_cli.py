"""The command line: what it prints, what it exits with, what it leaves alone."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import REFUSED, STORIES, in_a_terminal
from transformers import AutoModelForCausalLM

import unmask

ROOT = Path(__file__).resolve().parents[1]


def test_help_is_fast_and_shows_examples() -> None:
    best = min(_seconds([sys.executable, "-m", "unmask.cli", "--help"]) for _ in range(3))
    bare = min(_seconds([sys.executable, "-c", "import typer"]) for _ in range(3))
    assert best < bare + 0.2  # no torch, which takes seconds
    for command in ("adapt", "generate", "infill", "evaluate", "recipes", "demo"):
        text = subprocess.run([sys.executable, "-m", "unmask.cli", command, "--help"], capture_output=True, text=True)
        assert text.returncode == 0
        assert f"Example: unmask {command}" in " ".join(text.stdout.split())


def _seconds(command: list[str]) -> float:
    """Of a CPU, which others may use meanwhile."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_drafter_speculates_from_the_command_line(
    run, tokenizer_and_model: Path, stories: Path, converted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "drafter"
    code, _, err = run("adapt", tokenizer_and_model, "--recipe", "drafter", "--data", stories, "--output", folder,
                       "--max-tokens", 500, "max_length=64", "block_size=4", "batch_size=4")  # fmt: skip
    assert code == 0, err
    answers = []
    for mode in ("speculative", "ar"):
        code, out, err = run("generate", folder, "Once there was", "--max-new-tokens", 8, "--mode", mode, "--json",
                             "--temperature", 0.7, "--seed", 3)  # fmt: skip
        assert code == 0, err
        answers.append(json.loads(out))
    fast, ar = answers
    assert fast["text"] == ar["text"]
    assert fast["tokens_per_cycle"] >= fast["tokens_per_forward"]
    assert "tokens_per_cycle" not in ar
    for bad, value in ((("--draft-length", 0), "draft_length 0"), (("--draft-length", "far"), "draft_length 'far'")):
        code, out, err = run("generate", folder, "x", "--mode", "speculative", *bad)
        assert (code, out) == (2, "")
        assert err.strip().splitlines()[-1].startswith("unmask: error:")
        assert value in err
    code, out, err = run("generate", converted, "x", "--window", 0)
    assert (code, out) == (2, "")
    assert "window 0" in err
    code, _, err = run("generate", converted, "x", "--mode", "speculative")
    assert code == 2
    assert "'block_causal'" in err
    written = json.loads((folder / "config.json").read_text())
    for base, problem in (("/nowhere/base", "does not load"), (str(converted), "was trained on another model")):
        written["diffusion"]["base"]["name"] = base
        (folder / "config.json").write_text(json.dumps(written))
        code, out, err = run("generate", folder, "x", "--mode", "speculative")
        assert (code, out) == (2, "")
        assert base in err
        assert problem in err


def test_adapt_generate_evaluate(run, tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    second = tmp_path / "more.jsonl"
    second.write_text(json.dumps({"text": "One more story."}) + "\n")
    same = ["adapt", tokenizer_and_model, "--data", stories, second, "--output", tmp_path / "run", "--max-tokens", 2000,
            "max_length=64", "block_size=4", "batch_size=4", f"eval_data={stories}"]  # fmt: skip
    code, out, err = run(*same, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["tokens"] >= 2000
    assert answer["settings"]["block_size"] == 4
    assert answer["nelbo"] > 0
    assert "log-interpolated" in err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["sources"] == [str(stories), str(second)]

    code, out, err = run("generate", tmp_path / "run", "Once there was", "--max-new-tokens", 8, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert (answer["mode"], answer["num_new_tokens"]) == ("speculative", 8)
    assert answer["num_forwards"] >= 1
    assert answer["tokens_per_forward"] == pytest.approx(8 / answer["num_forwards"], abs=1e-3)

    code, out, err = run("evaluate", tmp_path / "run", "--data", stories, second, "--num-samples", 4, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["num_documents"] == len(STORIES) + 1
    assert answer["nelbo"] > 0
    assert answer["nll"] > 0
    assert answer["nelbo_standard_error"] > 0
    assert answer["nelbo_bits_per_byte"] / answer["nelbo"] == pytest.approx(answer["nll_bits_per_byte"] / answer["nll"])
    code, out, err = run("evaluate", tmp_path / "run", "--data", stories, "--max-documents", 3, "--exact")
    assert code == 0, err
    assert "3 documents" in out
    assert "exact enumeration" in out

    # the same run again is refused, and continued where asked
    code, _, err = run(*same)
    assert (code, err.count("\n")) == (2, 1)
    assert "--resume" in err
    assert run(*same, "--resume")[0] == 0


def test_evaluate_shows_the_parent_beside_a_model(
    run, converted: Path, tokenizer_and_model: Path, shared: Path, stories: Path
) -> None:
    code, out, err = run("evaluate", converted, "--data", stories, "--max-documents", 3, "--num-samples", 1,
                         "--parent", tokenizer_and_model, "--json")  # fmt: skip
    beside = json.loads(out)
    alone = json.loads(run("evaluate", tokenizer_and_model, "--data", stories, "--max-documents", 3, "--json")[1])
    assert all(beside["parent"][name] == alone[name] for name in ("nll", "nll_bits_per_byte"))
    assert beside["parent"]["model"] == str(tokenizer_and_model)
    assert beside["parent"]["tokens_per_forward"] == 1.0
    code, out, err = run("generate", tokenizer_and_model, beside["prompt"], "--max-new-tokens", 32, "--json")
    assert json.loads(out)["text"] == beside["parent"]["text"]
    assert beside["mode"] == "diffusion"
    assert beside["tokens_per_forward"] >= 1.0
    code, out, err = run("evaluate", converted, "--data", stories, "--max-documents", 3, "--num-samples", 1,
                         "--parent", tokenizer_and_model)  # fmt: skip
    assert re.search(rf"^parent {alone['nll']:.4f} nats/token", out, re.MULTILINE)
    assert repr(beside["text"]) in out
    story = shared / "models" / "stories260k"
    code, _, err = run("evaluate", converted, "--data", stories, "--parent", story)
    assert (code, err.count("\n")) == (2, 1)
    assert f"parent '{story}' has another vocabulary" in err


def test_an_untouched_model_has_no_bound(run, tokenizer_and_model: Path, stories: Path) -> None:
    code, out, err = run("evaluate", tokenizer_and_model, "--data", stories, "--max-documents", 2, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["nelbo"] is None
    assert answer["nelbo_bits_per_byte"] is None
    assert answer["nll"] > 0


def test_a_prompt_from_standard_input_and_plain_output(run, converted: Path) -> None:
    code, out, err = run("generate", converted, "-", "--max-new-tokens", 6, stdin="Once there was")
    assert code == 0
    assert out.startswith("Once there was")
    assert "6 tokens in" in err
    greedy = run("generate", converted, "Once there was", "--max-new-tokens", 6, "--confidence-threshold", 1)
    assert "6 tokens in 6 forwards" in greedy[2]
    sampled = [run("generate", converted, "Once", "--temperature", 1, "--seed", 3, "--json")[1] for _ in range(2)]
    assert sampled[0] == sampled[1]


def test_text_streams_to_a_terminal(converted: Path) -> None:
    """In a pseudo-terminal the text appears as it becomes final, and once."""
    command = [
        sys.executable,
        "-m",
        "unmask.cli",
        "generate",
        str(converted),
        "Once there was",
        "--max-new-tokens",
        "12",
    ]
    shown = in_a_terminal(command, stderr=subprocess.DEVNULL)
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == plain.strip()


def test_recipes(run) -> None:
    code, out, _ = run("recipes")
    assert code == 0
    assert "efficient-dlm" in out
    assert "2512.14067" in out
    code, out, _ = run("recipes", "efficient-dlm")
    assert "half_life = from the parent's size" in out
    assert "alpha" not in re.findall(r"(\w+) = ", out)
    assert "alpha" in re.findall(r"(\w+) = ", run("recipes", "efficient-dlm", "--all")[1])
    assert json.loads(run("recipes", "--json")[1])["efficient-dlm"]["attention"] == "two_stream"
    assert json.loads(run("recipes", "ar", "--json")[1]) == {"ar": unmask.recipes()["ar"]}
    code, _, err = run("recipes", "eficient-dlm")
    assert code == 2
    assert "did you mean 'efficient-dlm'?" in err


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (["adapt", "./no-such-model", "--data", "{stories}", "--output", "{out}"], "./no-such-model"),
        (["adapt", "{refused}", "--data", "{stories}", "--output", "{out}"], "'conv'"),
        (["adapt", "{parent}", "--data", "{empty}", "--output", "{out}"], "empty.txt"),
        (["adapt", "{parent}", "--data", "{latin}", "--output", "{out}"], "latin.txt', line 2"),
        (["adapt", "{parent}", "--data", "{broken}", "--output", "{out}"], "broken.jsonl', line 2"),
        (["adapt", "{parent}", "--data", "./missing.txt", "--output", "{out}"], "missing.txt"),
        (["adapt", "{parent}", "--data", "{stories}", "--output", "{out}", "max_length=30", "block_size=8"], "=30"),
        (["adapt", "{parent}", "--data", "{stories}", "--output", "{out}", "--max-tokens", "0"], "--max-tokens '0'"),
        (["adapt", "{parent}", "--data", "{stories}", "--output", "{out}", "no_such=1"], "no_such"),
        (["adapt", "{parent}", "--data", "{stories}", "--output", "{out}", "--recipe", "magic"], "magic"),
        (["adapt", "{parent}", "--data", "{stories}", "--output", "{taken}"], "taken"),
        (["adapt", "{parent}", "--data", "{stories}"], "--output"),
        (["adapt", "{parent}", "--data", "{stories}", "--output", "{out}", "end_token=zzz"], "zzz"),
        (["generate", "{parent}", "{long}"], "context of 128"),
        (["generate", "{parent}", "hi", "--confidence-threshold", "7"], "7"),
        (["generate", "{parent}", "hi", "--mode", "diffusion"], "diffusion"),
        (["generate", "{parent}", "hi", "--max-new-tokens", "some"], "some"),
        (["evaluate", "{parent}", "--data", "{empty}"], "empty.txt"),
        (["evaluate", "{parent}", "--data", "{broken}"], "broken.jsonl', line 2"),
        (["evaluate", "{parent}", "--data", "{stories}", "--max-documents", "0"], "0"),
        (["evaluate", "{parent}", "--data", "{stories}", "--exact"], "untouched AR model"),
        (["evaluate", "{parent}", "--tasks", "x", "--parent", "{parent}"], "is for --data: run the tasks on"),
        (["recipes", "magic"], "magic"),
        (["paint"], "paint"),
    ],
)
def test_bad_input_is_one_clear_line(
    run, arguments: list[str], bad: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    names = {"empty": "empty.txt", "latin": "latin.txt", "broken": "broken.jsonl"} | {
        name: name for name in ("out", "taken", "refused")
    }
    places = {name: tmp_path / file for name, file in names.items()}
    places |= {"parent": tokenizer_and_model, "stories": stories, "long": "Once there was " * 99}
    places["empty"].touch()
    places["latin"].write_bytes(b"fine\nna\xefve")
    places["broken"].write_text('{"text": "fine"}\n{"text":\n')
    places["taken"].mkdir()
    (places["taken"] / "thesis.tex").touch()
    if "{refused}" in arguments:
        AutoModelForCausalLM.from_config(REFUSED["lfm2"](), dtype=torch.float32).save_pretrained(places["refused"])
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(tokenizer_and_model).save_pretrained(places["refused"])
    code, out, err = run(*(a.format(**places) for a in arguments))
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("unmask: error: ")
    assert bad in last
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["thesis.tex"]


def test_broken_documents_are_left_out_when_asked(run, tokenizer_and_model: Path, tmp_path: Path) -> None:
    data = tmp_path / "broken.jsonl"
    data.write_text("".join(json.dumps({"text": s}) + "\n" for s in STORIES) + '{"text":\n')
    code, _, err = run("adapt", tokenizer_and_model, "--data", data, "--output", tmp_path / "run", "--max-tokens", 300,
                       "max_length=64", "skip_invalid=true")  # fmt: skip
    assert code == 0, err


def test_the_wheel_holds_what_the_package_needs(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
                   check=True, capture_output=True)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("unmask/")}
    source = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "unmask").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == source
    assert {"unmask/py.typed", "unmask/recipes/efficient-dlm.toml"} <= packed
