"""`unmask frontier`: what stands in its folder, that it goes on where it stopped, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import STORIES

import unmask
from unmask.lab import sweep
from unmask.lab.frontier import Setting, measure
from unmask.sampling import Confidence, EntropyBound, Factor, Random, Threshold

SMALL = ("--prompts", 3, "--prompt-tokens", 5, "--max-new-tokens", 6, "--rounds", 1, "--batch-sizes", "1,2")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frontier") / "texts.txt"
    path.write_text("<|endoftext|>".join(STORIES))
    return path


def test_command_writes_rows_beside_the_parent_and_goes_on(run, converted, texts, tmp_path, monkeypatch) -> None:
    output = tmp_path / "f"
    arguments = ("frontier", converted, "--data", texts, *SMALL, "--output", output, "--json")
    # stop after a few rows
    real, written = sweep.frontier_row, []

    def counted(*args, **kwargs):
        written.append(1)
        if len(written) > 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(sweep, "frontier_row", counted)
    assert run(*arguments, "--thresholds", "0.2,0.9", "--rule", "confidence=2", "--oracle", 1)[0] == 130
    before = (output / "rows.jsonl").read_text()
    assert [json.loads(line)["mode"] for line in before.splitlines()] == ["data", "ar", "ar", "prompt_lookup",
                                                                         "diffusion", "diffusion"]  # fmt: skip
    monkeypatch.setattr(sweep, "frontier_row", real)
    with (output / "rows.jsonl").open("a") as file:
        file.write('{"mode": "dif')  # killed while writing
    code, out, err = run(*arguments, "--thresholds", "0.2,0.9", "--rule", "confidence=2", "--oracle", 1)
    assert code == 0, err
    found = json.loads(out)
    lines = (output / "rows.jsonl").read_text()
    assert lines.startswith(before)
    assert [json.loads(line) for line in lines.splitlines()] == found["rows"]
    assert len(found["rows"]) == 1 + 2 + 1 + 3 * 2 + 1
    assert found["aup"] == {}
    assert found["settings"] == json.loads((output / "run.json").read_text())
    for name in ("frontier.png", "frontier.svg", "frontier-details.png", "frontier-details.svg"):
        assert (output / name).exists()
    assert "converted with efficient-dlm" in (output / "frontier.svg").read_text()
    by = {(r["mode"], r["rule"], r["value"], r["batch_size"]): r for r in found["rows"]}
    assert by["ar", None, None, 1]["speed_over_ar"] == by["ar", None, None, 1]["tokens_per_forward"] == 1
    assert by["data", None, None, None]["tokens_per_forward"] is None
    assert by["diffusion", "Confidence", 2, 1]["tokens_per_forward"] > 1
    serial = by["oracle", None, None, None]["tokens_per_forward"]
    assert serial >= 1
    # the row is what `measure` says
    lm, parent = unmask.load(converted), unmask.load(by and found["settings"]["parent"])
    prompts = [torch.tensor(parent.tokenizer(text)["input_ids"][:5]) for text in STORIES[:3]]
    once = measure(lm, parent, prompts, Setting(select=Threshold(0.2)), max_new_tokens=6)
    row = by["diffusion", "Threshold", 0.2, 2]
    assert (row["tokens_per_forward"], row["parent_nll"]) == (once.tokens_per_forward, once.parent_nll)

    # another threshold adds rows; other prompts do not belong here, nor does another model
    code, out, _ = run(*arguments, "--thresholds", "0.5")
    assert code == 0
    assert len(json.loads(out)["rows"]) == len(found["rows"]) + 2
    code, _, err = run(*arguments, "--seed", 3)
    assert code == 2
    assert "holds another frontier: its seed is 0, not 3; choose another folder" in err
    other = tmp_path / "other"
    shutil.copytree(converted, other)
    changed = unmask.load(other)
    with torch.no_grad():
        next(changed.model.parameters()).add_(0.1)
    changed.save_pretrained(other)
    code, _, err = run("frontier", other, *arguments[2:])
    assert code == 2
    assert "holds results of another model" in err
    assert "Traceback" not in err


def test_a_table_without_a_folder(run, converted, texts) -> None:
    code, out, _ = run("frontier", converted, "--data", texts, *SMALL, "--thresholds", "0.5")
    assert code == 0
    lines = out.splitlines()
    assert "tokens/forward" in lines[0]
    assert [line.split()[0] for line in lines[1:-1]] == ["data", "ar", "ar", "prompt_lookup", "Threshold", "Threshold"]
    assert lines[-1].endswith("nats per token")


def test_a_task_gives_accuracies_and_areas(run, converted) -> None:
    code, out, err = run(
        "frontier", converted, "--task", "copy", *SMALL, "--thresholds", "0.5", "--oracle", 1, "--json"
    )
    assert code == 0, err
    found = json.loads(out)
    assert all(row["accuracy"] == 0 for row in found["rows"])  # it never learnt to copy
    assert found["aup"] == {"ar": 0, "prompt_lookup": 0, "Threshold, blocks of 4": 0, "oracle, blocks of 4": 0}


def test_a_causal_clean_half_speculates_and_a_canvas_has_no_blocks(converted: Path) -> None:
    lm = unmask.load(converted)
    assert lm.diffusion is not None
    parent = unmask.DiffusionLM(lm.model, lm.tokenizer)
    asked = sweep.Sweep((Threshold(0.5),), block_sizes=(2, 4), batch_sizes=(2,), max_new_tokens=5, rounds=1, oracle=1)
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([6, 7])]

    def systems(**changes: object) -> list[tuple[str, int | None]]:
        lm.diffusion = replace(lm.diffusion, **changes)
        rows = sweep.run_sweep(lm, parent, prompts, asked)
        assert all(row.parent_nll == rows[0].parent_nll for row in rows if row.mode in ("ar", "speculative"))
        return [(row.mode, row.block_size) for row in rows]

    baselines = [("ar", None), ("prompt_lookup", None)]
    both = [("speculative", 2), ("diffusion", 2), ("speculative", 4), ("diffusion", 4)]
    assert systems(clean_attention="causal") == [*baselines, *both, ("oracle", 2), ("oracle", 4)]
    canvas = systems(clean_attention=None, attention="bidirectional", block_size=None)
    assert canvas == [*baselines, ("diffusion", 2), ("diffusion", 4), ("oracle", None)]


def test_a_drafter_is_compared_with_its_base(run, tokenizer_and_model: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drafter"
    unmask.adapt(tokenizer_and_model, texts, "drafter", folder, show_progress=False, max_tokens=300, max_length=64,
                 block_size=4, batch_size=4)  # fmt: skip
    code, out, err = run("frontier", folder, "--data", texts, *SMALL, "--thresholds", "0.5", "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = {row["mode"]: row for row in found["rows"]}
    assert found["settings"]["parent"] == str(tokenizer_and_model)
    assert rows["speculative"]["tokens_per_cycle"] >= 1
    for column in ("parent_nll", "unigram_entropy", "distinct_3", "mean_length"):  # AR's own text
        assert rows["speculative"][column] == rows["ar"][column] == rows["prompt_lookup"][column]


def test_areas_compare_with_the_best_of_all_systems() -> None:
    empty = {"block_size": None, "batch_size": 1, "num_texts": 1, "mean_length": 1, "tokens_per_cycle": None,
             "tokens_per_second": 1, "parent_nll": 1, "unigram_entropy": 1, "distinct_1": 1, "distinct_2": 1,
             "distinct_3": 1}  # fmt: skip
    points = (("ar", None, None, 1.0, 1.0), ("diffusion", "Threshold", 0.9, 1.0, 0.8),
              ("diffusion", "Threshold", 0.5, 2.0, 0.8))  # fmt: skip
    rows = [sweep.FrontierRow(mode=mode, rule=rule, value=value, tokens_per_forward=tpf, accuracy=accuracy, **empty)
            for mode, rule, value, tpf, accuracy in points]  # fmt: skip
    areas = sweep.areas(rows)
    assert areas["ar"] == pytest.approx(100)
    assert areas["Threshold"] == pytest.approx(80 + 80 * torch.tensor(-3 * 0.2).exp().item(), rel=1e-6)


def test_rules_are_parsed() -> None:
    rules = sweep.parse_rules("0.5,0.9", ["factor=0.5", "entropy-bound=0.1,1", "confidence=2",
                                          "random=3", "threshold=0.5"])  # fmt: skip
    assert rules == (Threshold(0.5), Threshold(0.9), Factor(0.5), EntropyBound(0.1), EntropyBound(1.0),
                     Confidence(2), Random(3))  # fmt: skip
    assert sweep.parse_rules("", ["factor=1"]) == (Factor(1.0),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--thresholds", "0.5,1.5"), "confidence_threshold 1.5 must lie in [0, 1]"),
        (("--thresholds", "-0.1"), "confidence_threshold -0.1 must lie in [0, 1]"),
        (("--batch-sizes", "inf"), "batch_sizes 'inf' is no list of numbers"),
        (("--thresholds", "high"), "threshold 'high' is no list of numbers"),
        (("--thresholds", ""), "thresholds is empty and there is no rule"),
        (("--rule", "luck=1"), "rule 'luck=1' is unknown"),
        (("--rule", "confidence=1.5"), "confidence 1.5 must be a whole number"),
        (("--batch-sizes", "0"), "batch size 0 must be at least 1"),
        (("--block-sizes", "0"), "block size 0 must be at least 1"),
        (("--rounds", "0"), "rounds 0 must be at least 1"),
        (("--prompts", "0"), "num_prompts 0 must be at least 1"),
        (("--prompt-tokens", "0"), "prompt_tokens 0 must be at least 1"),
        (("--oracle", "-1"), "oracle -1 must be 0"),
        (("--oracle", "2", "--temperature", "1"), "oracle 2 follows greedy decoding"),
        (("--task", "copy"), "give documents to begin with, or one task, and not both"),
        (("--prompt-tokens", "500"), "no document has prompt_tokens + max_new_tokens = 564 tokens"),
        (("--parent", "nowhere/at/all"), "model folder 'nowhere/at/all' does not exist"),
    ],
)
def test_bad_values_are_named(run, converted, texts, arguments, message) -> None:
    code, out, err = run("frontier", converted, "--data", texts, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1 or "Loading weights" in err


def test_task_and_data_and_parents_that_do_not_fit(run, converted, tokenizer_and_model, texts, tmp_path) -> None:
    def error(*arguments: object) -> str:
        code, _, err = run("frontier", *arguments)
        assert code == 2
        return err

    assert "task 'dance' is unknown: use one of copy" in error(converted, "--task", "dance")
    assert "give documents to begin with, or one task" in error(converted)
    assert "is an untouched AR model" in error(tokenizer_and_model, "--data", texts)
    orphan = tmp_path / "orphan"
    shutil.copytree(converted, orphan, ignore=shutil.ignore_patterns("run.json", "checkpoint-*"))
    assert "records no AR parent to compare with: give it with --parent" in error(orphan, "--data", texts)
    assert "its AR mode is no language model" in error(converted, "--data", texts, "--parent", converted)
    assert "holds another kind of run" in error(converted, "--data", texts, *SMALL, "--output", converted)
    assert "is no file here" in error(converted, "--data", "hub/name")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert "holds something else" in error(converted, "--data", texts, *SMALL, "--output", tmp_path)
    assert "more than the model's context of 128" in error(converted, "--task", "copy", "--max-new-tokens", 120)
