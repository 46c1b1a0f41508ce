"""The rules of the benchmark scripts: what counts as an answer, a hit, a pass."""

from __future__ import annotations

import ast
import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # scripts import what they share from beside them
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 * 9 = 18\n#### 18", "18"),
        ("#### 3\nno, #### 1,234 ", "1234"),
        ("#### $5", "$5"),
        ("so 18", ""),
        ("####", ""),
        ("", ""),
    ],
)
def test_gsm8k_answer_is_what_follows_the_last_marker(text: str, answer: str) -> None:
    assert script("gsm8k").extract_answer(text) == answer


def test_gsm8k_gold_answers_are_numbers(shared: Path) -> None:
    gsm8k = script("gsm8k")
    examples = gsm8k.read(shared / "eval" / "gsm8k" / "test.jsonl")
    assert len(examples) == 1319
    assert all(float(gsm8k.extract_answer(e["completion"])) is not None for e in examples)


def test_lambada_counts_each_exact_word_once(tokenizer_and_model: Path) -> None:
    lambada = script("lambada")
    assert lambada.split_passage("the cat sat on the mat\n") == ("the cat sat on the", "mat")
    assert [lambada.is_hit(t, "mat") for t in (" mat", "mat ", " mats", " mat .", "Mat")] == [True, True] + [False] * 3
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    before, word = "Once there was a cat who liked to", "play"
    whole = tokenizer(f"{before} {word}")["input_ids"]
    assert lambada.answer_tokens(tokenizer, before, word) == len(whole) - len(tokenizer(before)["input_ids"])
    kept = lambada.shortened(tokenizer, before, 5)
    assert before.endswith(kept)
    assert len(tokenizer(kept)["input_ids"]) <= 5


@pytest.mark.parametrize(
    ("text", "golds", "contained", "exact", "f1"),
    [
        (" The Onion.", ["Onion", "Allium cepa"], 1, 1, 1.0),
        ("It is an onion, I think", ["Onion"], 1, 0, 2 / 6),  # six words: it is onion i think, and the gold
        ("allium", ["Onion", "Allium cepa"], 0, 0, 2 / 3),
        ("onions", ["Onion"], 1, 0, 0.0),  # a part of a word is contained, as in the paper's rule
        ("anything", ["The"], 0, 0, 0.0),  # empty once normalised
        ("", ["Onion"], 0, 0, 0.0),
    ],
)
def test_triviaqa_scores(text: str, golds: list[str], contained: int, exact: int, f1: float) -> None:
    found = script("triviaqa").scores(text, golds)
    assert (found["contained"], found["exact"]) == (contained, exact)
    assert found["f1"] == pytest.approx(f1)


def test_triviaqa_gives_the_length_of_the_answer(tokenizer_and_model: Path, shared: Path) -> None:
    trivia, tokenizer = script("triviaqa"), AutoTokenizer.from_pretrained(tokenizer_and_model)
    question, answer = "Question: Who liked to play?\nAnswer:", "the cat"
    whole = tokenizer(f"{question} {answer}")["input_ids"]
    assert trivia.answer_tokens(tokenizer, question, answer) == len(whole) - len(tokenizer(question)["input_ids"])
    lines = (shared / "eval" / "triviaqa" / "triviaqa_sm_sub.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:200]]
    assert all(trivia.scores(f" {row['answer']}", [row["answer"], *row["aliases"]])["exact"] for row in rows)


def test_multiple_choice_formats() -> None:
    read = script("multiple_choice").read_question
    assert read({"query": "Question: Why?", "choices": ["a", "b"], "gold": 1}) == (
        [("Question: Why?\nAnswer:", " a"), ("Question: Why?\nAnswer:", " b")],
        1,
    )
    assert read({"query": "It rained, so", "choices": ["we left"], "gold": 0})[0] == [("It rained, so", " we left")]
    options = {"context_options": ["Ann", "Bob"], "continuation": "left.", "gold": 0}
    assert read(options) == ([("Ann", " left."), ("Bob", " left.")], 0)
    swag = {"activity_label": "Ski", "ctx_a": "A man.", "ctx_b": "he", "endings": ["falls"], "label": 0}
    assert read(swag) == ([("Ski: A man. He", " falls")], 0)


def test_multiple_choice_files_are_read(shared: Path) -> None:
    read = script("multiple_choice").read_question
    for file in (shared / "eval" / "multiple-choice").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            pairs, gold = read(json.loads(line))
            assert 0 <= gold < len(pairs)
            assert all(context.strip() and choice.strip() for context, choice in pairs)


SAMPLE = {
    "prompt": "def double(x):\n",
    "suffix": "    return y\n",
    "canonical_solution": "    y = 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}


@pytest.mark.parametrize(
    ("completion", "outcome"),
    [
        (SAMPLE["canonical_solution"], "passed"),
        ("    y = x\n", "failed"),
        ("    y = = x\n", "failed"),
        ("    raise SystemExit(0)\n", "failed"),  # leaving early is no pass
        ("    import os; os._exit(0)\n", "failed"),
        ("    y = bytearray(1 << 33) and 4\n", "failed"),  # memory
        ("    open('big', 'w').write('x' * (1 << 22)); y = 4\n", "failed"),
        ("    import os; y = 4 if not os.environ.get('HOME') else 0\n", "passed"),
    ],
)
def test_humaneval_completions_are_judged_by_the_tests(completion: str, outcome: str) -> None:
    assert script("humaneval_infilling").check(SAMPLE, completion) == outcome


def test_humaneval_endless_programs_end(tmp_path: Path) -> None:
    began = time.monotonic()
    leaves = f"    import subprocess; subprocess.Popen(['sleep', '1000']); y = 0\n    while {tmp_path.exists()}: pass\n"
    assert script("humaneval_infilling").check(SAMPLE, leaves, seconds=1.0) == "timed out"
    assert time.monotonic() - began < 10


def test_humaneval_canonical_lines_pass(shared: Path) -> None:
    humaneval = script("humaneval_infilling")
    path = shared / "eval" / "humaneval-infilling" / "HumanEval-SingleLineInfilling.jsonl.gz"
    samples = humaneval.read_samples(path)
    assert len(samples) == 1033
    for sample in samples[::200]:
        assert humaneval.check(sample, sample["canonical_solution"]) == "passed"
        assert humaneval.check(sample, "    raise ValueError\n") == "failed"


def test_story_endings_are_last_sentences() -> None:
    split = script("story_endings").split_story
    assert split('Tom ran.  He fell! "Help!"\nMum came.') == ('Tom ran. He fell! "Help!"', "Mum came.")
    assert split("Tom ran.") is None
    assert split("") is None


SCRIPTS = sorted(
    path for folder in ("benchmarks", "examples", "tests") for path in (FOLDER.parent / folder).rglob("*.py")
    if not path.name.startswith("test_")
)  # fmt: skip


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(FOLDER.parent)))
def test_what_a_script_imports_of_the_library_is_there(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names if alias.name.split(".")[0] == "unmask"):
                assert importlib.util.find_spec(name) is not None, name
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "unmask":
            module = importlib.import_module(node.module or "")
            for name in (alias.name for alias in node.names):
                inside = f"{node.module}.{name}"
                assert hasattr(module, name) or importlib.util.find_spec(inside) is not None, inside
