"""The harness on local files: an AR model's numbers are those of its own `hf` model, bounds those of slow sums."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import STORIES
from test_cli import ROOT
from test_special_texts import prefixing_tokenizer
from test_tokenizers import family, tiny_llama_of

import unmask

pytest.importorskip("lm_eval")

from choices import choice_document
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from unmask.evaluation import harness
from unmask.evaluation.harness import load_tasks, run_tasks
from unmask.evaluation.likelihood import Document, nelbo
from unmask.evaluation.lm_eval import HarnessLM, continuation_log_p

TASKS = Path(__file__).parent / "tasks"


def request(kind: str, *arguments: object, task: str = "t", document: int = 0) -> Instance:
    return Instance(kind, {}, arguments, 0, (task, document, 1))


instance = request


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of task files: choose a story's mood, end it, give its likelihood."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": story, "start": story.rpartition(" was very ")[0] + " was very"} for story in STORIES]
    (folder / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {folder / 'stories.jsonl'}}}\ntest_split: train\n"
    files = {
        "mood": "output_type: multiple_choice\ndoc_to_text: '{{start}}'\ndoc_to_choice: [happy, tired]\n"
        "doc_to_target: \"{{1 if 'tired' in text else 0}}\"\nfewshot_split: train\nmetric_list: [{metric: acc}]\n",
        "end": "output_type: generate_until\ndoc_to_text: '{{start}}'\ndoc_to_target: \"{{text.split()[-1]}}\"\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n",
        "story": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n",
        "word": "output_type: loglikelihood\ndoc_to_text: '{{start}}'\ndoc_to_target: ' happy'\n"
        "metric_list: [{metric: acc}]\n",
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{head}{text}metadata: {{version: 1}}\n")
    return folder


# --- AR: the harness's own numbers


def compare_with_hf(folder: Path, task_folder: Path, tasks: list[str], limit: int, **changes: object) -> None:
    """Every log-likelihood to 1e-4 (and float32 rounding of long sums), every flag, text and metric."""
    lm = unmask.load(folder, device="cpu")
    answers = {}
    for name, model in {
        "ours": HarnessLM(lm, batch_size=3, **changes),
        "hf": HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, device="cpu", batch_size=4, **changes),
    }.items():
        loaded = load_tasks(tasks, str(task_folder))
        if name == "ours":
            answers[name] = run_tasks(model, loaded, limit=limit)
        else:
            for task in loaded["tasks"].values():
                task.set_config(key="num_fewshot", value=0)
            answers[name] = evaluator.evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=1000)
    for task in tasks:
        for mine, theirs in zip(*(answers[name]["samples"][task] for name in ("ours", "hf")), strict=True):
            for (a,), (b,) in zip(mine["resps"], theirs["resps"], strict=True):
                if isinstance(a, str):
                    assert a == b
                    continue
                (a, greedy), (b, theirs_greedy) = (x if isinstance(x, tuple) else (x, None) for x in (a, b))
                assert a == pytest.approx(b, abs=1e-4, rel=1e-7)
                assert greedy == theirs_greedy
        for metric, value in answers["hf"]["results"][task].items():
            if isinstance(value, float):
                assert answers["ours"]["results"][task][metric] == pytest.approx(value, rel=1e-4), metric
    assert answers["ours"]["model"]["estimator"] == "exact"


def test_ar_numbers_equal_the_harness_own(tokenizer_and_model: Path, ending: Path) -> None:
    compare_with_hf(tokenizer_and_model, ending, ["mood", "end", "story", "word"], 6)
    compare_with_hf(tokenizer_and_model, ending, ["mood", "story"], 3, max_length=11)  # cut, and in windows


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("stories260k", ["arc_easy", "hellaswag", "winogrande", "siqa", "piqa", "copa", "openbookqa", "triviaqa"]),
        ("babyllama-1m", ["arc_challenge", "lambada", "classics", "triviaqa"]),
    ],
)
def test_ar_numbers_equal_the_harness_own_on_real_models(
    name: str, tasks: list[str], shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    compare_with_hf(shared / "models" / name, TASKS, tasks, 2)


# --- diffusion: bounds


def test_choices_score_as_the_exact_bound_of_each_alone(converted: Path) -> None:
    lm = unmask.load(converted, dtype="float64")
    model = HarnessLM(lm, exact=True, batch_size=2)
    pairs = [(STORIES[i][:40], choice) for i in range(3) for choice in (" happy that day.", " tired", " cat sat")]
    requests = [request("loglikelihood", *pair, document=i // 3) for i, pair in enumerate(pairs)]
    got = model.loglikelihood(requests)
    for (value, greedy), pair in zip(got, pairs, strict=True):
        document = choice_document(lm.tokenizer, *pair)
        assert value == pytest.approx(-nelbo(lm.network, lm.diffusion, [document], exact=True)[0].nats, rel=1e-9)
        assert greedy is False
    assert model.costs["t"].num_forwards == len(pairs) * (2**4 - 1)
    # in AR mode of the same checkpoint: the choices are scored by another law
    assert HarnessLM(lm, "ar").loglikelihood(requests)[0] != got[0]


def test_a_tasks_bounds_do_not_depend_on_its_company(converted: Path) -> None:
    model = HarnessLM(unmask.load(converted), num_samples=3, seed=4)
    mine = [request("loglikelihood", story[:30], story[30:45], task="b", document=i) for i, story in enumerate(STORIES)]
    other = [request("loglikelihood", STORIES[0][:50], STORIES[0][50:], task="a")]
    together = model.loglikelihood(other + mine)[1:]
    assert together == HarnessLM(unmask.load(converted), num_samples=3, seed=4).loglikelihood(mine)
    assert together != HarnessLM(unmask.load(converted), num_samples=3, seed=5).loglikelihood(mine)


def test_rolling_windows_predict_each_token_once(converted: Path) -> None:
    lm = unmask.load(converted, dtype="float64")
    text = " ".join(STORIES[:2])
    ids = [lm.tokenizer.bos_token_id, *lm.tokenizer(text)["input_ids"]]
    whole = Document(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.long))
    expected = -nelbo(lm.network, lm.diffusion, [whole], exact=True)[0].nats
    [got] = HarnessLM(lm, exact=True).loglikelihood_rolling([request("loglikelihood_rolling", text)])
    assert got == pytest.approx(expected, rel=1e-9)
    length = 12
    [got] = HarnessLM(lm, exact=True, max_length=length).loglikelihood_rolling([request("loglikelihood_rolling", text)])
    total, done = 0.0, 1
    while done < len(ids):  # full windows, of which only what is new counts
        new = min(length - 1, len(ids) - done)
        window = torch.tensor(ids[max(0, done + new - length) : done + new])
        scored = torch.arange(len(window)) >= len(window) - new
        total -= nelbo(lm.network, lm.diffusion, [Document(window, torch.zeros_like(window), scored)], exact=True)[
            0
        ].nats
        done += new
    assert got == pytest.approx(total, rel=1e-9)


def test_a_lone_continuation_is_greedy_when_decoding_gives_it(converted: Path) -> None:
    lm = unmask.load(converted)
    requests, expected = [], []
    for i, story in enumerate(STORIES[:4]):
        out = lm.generate(story[:40], max_new_tokens=3 + i % 2)
        requests += [request("loglikelihood", story[:40], text, document=2 * i + n)
                     for n, text in enumerate((out.texts[0], " zebra"))]  # fmt: skip
        same = lm.tokenizer(story[:40] + out.texts[0])["input_ids"] == out.sequences[0].tolist()
        expected += [same, False]
    assert any(expected)
    assert [greedy for _, greedy in HarnessLM(lm, num_samples=1).loglikelihood(requests)] == expected


# --- text


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_texts_equal_generate_one_by_one(converted: Path, mode: str) -> None:
    lm = unmask.load(converted)
    asked = {"until": [" the"], "max_gen_toks": 9}
    prompts = [STORIES[i][: 20 + 7 * i] for i in range(5)] + [""]
    model = HarnessLM(lm, mode, batch_size=2)
    got = model.generate_until([request("generate_until", p, dict(asked), document=i) for i, p in enumerate(prompts)])
    outs = [lm.generate(p, mode, 9, stop_strings=[" the"]) for p in prompts]
    assert got == [out.texts[0] for out in outs]
    cost = model.costs["t"]
    assert cost.num_new_tokens == sum(int(out.num_new_tokens) for out in outs)
    assert cost.num_forwards == sum(int(out.num_forwards) for out in outs)
    assert cost.tokens_per_forward == pytest.approx(cost.num_new_tokens / cost.num_forwards)


def test_texts_do_not_depend_on_batch_size_and_order(converted: Path) -> None:
    lm = unmask.load(converted, dtype="float64")
    for mode in ("ar", "diffusion"):
        asked = [request("generate_until", STORIES[i][: 20 + i], {"do_sample": True, "max_gen_toks": 12}, document=i)
                 for i in range(7)]  # fmt: skip
        texts = HarnessLM(lm, mode, seed=1, batch_size=2).generate_until(asked)
        assert HarnessLM(lm, mode, seed=1, batch_size=5).generate_until(asked[::-1])[::-1] == texts
        assert HarnessLM(lm, mode, seed=1, batch_size=5).generate_until(asked[3:4]) == texts[3:4]
        assert len(set(texts)) == 7
    scored = [request("loglikelihood", STORIES[i][:30], STORIES[i][30:45], document=i) for i in range(7)]
    bounds = HarnessLM(lm, num_samples=2).loglikelihood(scored)
    for one, (expected, _) in zip(scored[::-1], bounds[::-1], strict=True):
        assert HarnessLM(lm, num_samples=2).loglikelihood([one])[0][0] == pytest.approx(expected, rel=1e-12)


def test_sampling_without_a_temperature_is_at_1(converted: Path) -> None:
    lm = unmask.load(converted)

    def texts(**settings: object) -> list[str]:
        settings["max_gen_toks"] = 12
        asked = [request("generate_until", STORIES[0][:30], dict(settings), document=i) for i in range(4)]
        return HarnessLM(lm, "ar", seed=3).generate_until(asked)

    assert len(set(texts())) == 1
    assert len(set(texts(do_sample=True))) == 4
    assert texts(do_sample=True) == texts(do_sample=True, temperature=1.0, top_k=0) == texts(temperature=1.0)
    assert texts(do_sample=True) != texts(do_sample=True, temperature=2.0)
    assert texts(do_sample=False, temperature=1.0) == texts() == texts(do_sample=True, temperature=0.0)


@pytest.mark.parametrize("name", ["gpt2", "llama2", "qwen2", "qwen2-sdar", "tiny"])
def test_texts_and_scores_of_every_tokenizer_equal_the_harness_own(name: str, request: pytest.FixtureRequest) -> None:
    if name == "tiny":
        lm = unmask.load(request.getfixturevalue("tokenizer_and_model"), dtype="float64")
    else:
        tokenizer = family(name, request.getfixturevalue("shared"))
        lm = unmask.DiffusionLM(tiny_llama_of(tokenizer).double(), tokenizer)
    hf = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, device="cpu", batch_size=1)
    ours = HarnessLM(lm, batch_size=3)
    prompts = [
        "Once",
        "the cat sat on a ",
        "Tom said:\n",
        "naïve 漢字",
        (lm.tokenizer.bos_token or lm.tokenizer.eos_token) + "a b",
    ]
    asked = []
    for i, prompt in enumerate(prompts):
        new = ours.generate_until([instance("generate_until", prompt, {"max_gen_toks": 16}, document=i)])[0]
        for until in ([], [new[len(new) // 2 :][:2] or "x"], [" " + new[:1], "\n\n"], [lm.tokenizer.eos_token, "zz"]):
            asked.append(instance("generate_until", prompt, {"until": until, "max_gen_toks": 16}, document=i))
    theirs = [hf.generate_until([one], disable_tqdm=True)[0] for one in asked]
    assert ours.generate_until(asked) == theirs
    scored = [instance("loglikelihood", prompt, text, document=i) for i, prompt in enumerate(["", *prompts[:4]])
              for text in (" cat", "x y")]  # fmt: skip
    expected = hf.loglikelihood(scored, disable_tqdm=True)
    for (mine, greedy), (theirs_log_p, theirs_greedy) in zip(ours.loglikelihood(scored), expected, strict=True):
        assert mine == pytest.approx(theirs_log_p, abs=1e-4, rel=1e-6)
        assert greedy == theirs_greedy


def test_a_tokenizer_without_begin_and_end_token_is_asked_for_one_only_without_context() -> None:
    tokenizer = prefixing_tokenizer()
    lm = unmask.DiffusionLM(tiny_llama_of(tokenizer), tokenizer)
    tokenizer.eos_token = lm.model.generation_config.eos_token_id = lm.model.generation_config.bos_token_id = None
    model = HarnessLM(lm)
    assert model.loglikelihood([request("loglikelihood", "once a", " cat")])[0][0] < 0
    assert isinstance(model.generate_until([request("generate_until", "once a", {"max_gen_toks": 4})])[0], str)
    with pytest.raises(ValueError, match="needs a begin or end token"):
        model.loglikelihood([request("loglikelihood", "", " cat")])


def test_a_continuation_of_probability_0_is_an_error(converted: Path) -> None:
    lm = unmask.load(converted)
    mask = torch.tensor([5, 6, lm.diffusion.mask_token_id])
    with pytest.raises(ValueError, match="document 2 has a likelihood of 0"):
        continuation_log_p(lm.network, [Document(ids, torch.zeros_like(ids)) for ids in (mask[:2], mask)])


def test_sampling_is_the_tasks_and_seeded(converted: Path) -> None:
    lm = unmask.load(converted)
    asked = [
        request("generate_until", STORIES[0][:30], {"do_sample": True, "temperature": 1.5, "max_gen_toks": 12})
    ] * 3
    texts = HarnessLM(lm, seed=1, batch_size=2).generate_until(asked)
    assert len(set(texts)) == 3  # repeats differ, in a batch and between batches
    assert texts == HarnessLM(lm, seed=1, batch_size=2).generate_until(asked)
    assert texts != HarnessLM(lm, seed=2, batch_size=2).generate_until(asked)


def test_a_stop_string_that_is_a_special_token_ends_the_text(converted: Path) -> None:
    lm = unmask.load(converted)
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[:] = 0  # every token is as likely: greedy decoding takes id 0, "<s>"
    model = HarnessLM(lm, "ar")
    assert model.generate_until([request("generate_until", "the", {"until": ["a", "<s>"], "max_gen_toks": 9})]) == [""]
    assert model.costs["t"].num_new_tokens == 1


@pytest.mark.parametrize("recipe", ["diffullama", "bd3lm", "fast-dllm-v2", "tri-mode", "drafter"])
def test_every_recipe_and_mode_runs(recipe: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    block = {} if recipe == "diffullama" else {"block_size": 4}
    lm = unmask.adapt(tokenizer_and_model, stories, recipe, tmp_path / "run", show_progress=False, max_tokens=400,
                      max_length=64, batch_size=2, **block)  # fmt: skip
    scored = [request("loglikelihood", STORIES[0][:40], STORIES[0][40:50], document=i) for i in range(2)]
    asked = [request("generate_until", STORIES[i][:30], {"until": ["."], "max_gen_toks": 6}) for i in range(2)]
    answers = {}
    for mode in ("ar", "diffusion", "speculative") if lm.diffusion.serves_ar else ("ar", "diffusion"):
        model = HarnessLM(lm, mode, num_samples=2)
        answers[mode] = model.loglikelihood(scored), model.generate_until(asked)
        assert all(value < 0 for value, _ in answers[mode][0])
        assert model.get_model_info()["estimator"] == ("nelbo" if mode == "diffusion" else "exact")
    assert answers["ar"][0] != answers["diffusion"][0]
    if "speculative" in answers:
        assert answers["speculative"] == answers["ar"]


# --- the command


def test_evaluate_tasks_from_the_command_line(run, converted: Path, ending: Path, tmp_path: Path) -> None:
    out_folder = tmp_path / "out"
    code, out, err = run("evaluate", converted, "--tasks", "mood,end,story", "--tasks-folder", ending, "--limit", 4,
                         "--num-samples", 2, "--num-fewshot", 1, "--confidence-threshold", 0.5, "--output", out_folder,
                         "--json")  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    assert 0 <= result["results"]["mood"]["acc,none"] <= 1
    assert result["model"] == {"mode": "diffusion", "estimator": "nelbo", "enumerated": False, "num_samples": 2,
                               "block_size": 4, "max_length": 128, "seed": 0}  # fmt: skip
    assert result["n-shot"] == {"mood": 1, "end": 1, "story": 1}
    assert result["costs"]["mood"]["num_forwards"] == 4 * 2 * 2
    assert result["costs"]["end"]["tokens_per_forward"] > 0.5  # what is committed behind an end token is no text
    assert json.loads((out_folder / "results.json").read_text())["results"] == result["results"]
    samples = [json.loads(line) for line in (out_folder / "samples_mood.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert samples[0]["arguments"][0][0].endswith(" was very")
    assert "100%" in err

    code, out, _ = run("evaluate", converted, "--tasks", ending / "mood.yaml", "--limit", 2, "--mode", "ar")
    assert code == 0
    assert out.startswith("mode ar  estimator exact")
    assert "acc " in out
    assert "4 requests, 4 forwards" in out


def test_a_misspelt_task_is_refused_before_the_harness_reads_its_own(ending: Path, monkeypatch) -> None:
    """All 14,000 take seconds; a name that may be one of them is looked up."""
    made: list[dict[str, object]] = []

    class Watched(harness.TaskManager):
        def __init__(self, **options: object) -> None:
            made.append(options)
            super().__init__(**options | {"include_defaults": False})

    monkeypatch.setattr(harness, "TaskManager", Watched)
    for name, meant in (("arc_esy", "arc_easy"), ("hellaswagg", "hellaswag"), ("moood", "mood")):
        with pytest.raises(ValueError, match=f"task '{name}' does not exist: near names are .*{meant}"):
            load_tasks([name], str(ending))
    assert all(options == {"include_path": str(ending), "include_defaults": False} for options in made)
    for name in ("arc_easy", "mafand_tasks", "no_name_is_like_this_0123", "arc_es*"):
        with pytest.raises(ValueError, match="does not exist"):
            load_tasks([name])
        assert made[-1] == {"include_path": None}


def test_chat_templates_are_applied(converted: Path, ending: Path) -> None:
    lm = unmask.load(converted)
    lm.tokenizer.chat_template = "{% for m in messages %}[{{m.role}}] {{m.content}}\n{% endfor %}"
    results = run_tasks(HarnessLM(lm, "ar"), load_tasks(["mood"], str(ending)), limit=1, apply_chat_template=True)
    assert results["samples"]["mood"][0]["arguments"][0][0].startswith("[user] Once there was")


@pytest.mark.parametrize(
    ("arguments", "bad"),
    [
        (["--tasks", "moood"], "'moood' does not exist: near names are"),
        (["--tasks", "mood", "--data", "{stories}"], "brings its own documents"),
        (["--tasks", "mood", "--tasks-folder", "./nowhere"], "'./nowhere' does not exist"),
        (["--tasks", "broken"], "tasks broken cannot be loaded"),
        (["--tasks", "mood", "--limit", "0"], "limit 0"),
        (["--tasks", "mood", "--num-fewshot", "-1"], "num_fewshot -1"),
        (["--tasks", "mood", "--mode", "diffusion"], "untouched AR model"),
        (["--tasks", "mood", "--exact"], "mode 'ar' scores exactly"),
        (["--tasks", "mood", "--batch-size", "-2"], "batch_size -2"),
        (["--tasks", "mood", "--max-length", "4096"], "max_length 4096"),
        (["--tasks", "mood", "--confidence-threshold", "1.5"], "1.5"),
        (["--tasks", "mood", "--gen-kwargs", "long"], "gen_kwargs 'long'"),
        (["--tasks", "mood", "--apply-chat-template"], "has none"),
        (["--tasks", "end", "--gen-kwargs", "max_gen_toks=128"], "max_gen_toks 128"),
        (["--tasks", "end", "--gen-kwargs", "num_beams=4"], "num_beams"),
        (["--tasks", "empty"], "makes no tokens"),
        (["--data", "{stories}", "--limit", "3"], "--limit 3.0 is for --tasks"),
        ([], "--data FILE, or --tasks NAME"),
    ],
)
def test_bad_input_is_one_clear_line(
    run, arguments: list[str], bad: str, tokenizer_and_model: Path, ending: Path, stories: Path,
) -> None:  # fmt: skip
    (ending / "broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: no.jsonl}\n")
    (ending / "empty.yaml").write_text(
        (ending / "word.yaml").read_text().replace("' happy'", "''").replace("word", "empty")
    )
    if "--tasks" in arguments and "--tasks-folder" not in arguments:
        arguments = [*arguments, "--tasks-folder", str(ending)]
    code, out, err = run("evaluate", tokenizer_and_model, *(a.format(stories=stories) for a in arguments))
    assert code == 2, err
    last = err.strip().splitlines()[-1]
    assert last.startswith("unmask: error:")
    assert bad in last
    assert out == ""


def test_a_missing_harness_is_named(tokenizer_and_model: Path) -> None:
    code = "import sys; sys.modules['lm_eval'] = None; from unmask.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "evaluate", tokenizer_and_model, "--tasks", "arc_easy"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2
    assert 'pip install "unmask[eval]"' in done.stderr
