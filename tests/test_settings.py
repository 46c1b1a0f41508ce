"""The table of settings: values in range, conditions that say what a run reads, recipes, what a size resolves."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Unpack, get_type_hints

import pytest

import unmask
from unmask import recipe
from unmask.cli.recipes import settings_of, settings_page
from unmask.core import distances
from unmask.lab.study import Study
from unmask.recipe import check_data_settings, differences, load_recipe, recipe_names
from unmask.resolve import Resolved, resolve
from unmask.settings import DISTANCES, GROUPS, TABLE, OptimiserSettings, Settings, SettingsKeywords, unmet

# --- the table


def test_names_are_unique_and_all_settings_are_described() -> None:
    assert sum(len(fields(group)) for group in GROUPS) == len(TABLE) == len(fields(Settings)) - 1
    for name, entry in TABLE.items():
        assert entry.metadata["says"], name
        assert not entry.metadata["one_of"] or entry.default in (*entry.metadata["one_of"], None), name
    assert DISTANCES == distances.DISTANCES + distances.OF_BLOCKS


def test_conditions_speak_of_earlier_settings() -> None:
    order = list(TABLE)
    for name, entry in TABLE.items():
        for needs in (entry.metadata["needs"], *entry.metadata["either"]):
            assert all(order.index(other) < order.index(name) for other in needs), name


def test_a_group_is_a_part_of_the_settings() -> None:
    chosen = load_recipe("efficient-dlm", beta1=0.5)
    assert isinstance(chosen, OptimiserSettings)
    assert OptimiserSettings(beta1=0.5).beta1 == chosen.beta1
    with pytest.raises(TypeError):
        OptimiserSettings(alpha=0.5)  # type: ignore[call-arg]


# --- what is refused


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("eficient-dlm", {}, "recipe 'eficient-dlm' is unknown: did you mean 'efficient-dlm'?"),
        ("magic", {}, "recipe 'magic' is unknown: the recipes are ar, bd3lm"),
        ("efficient-dlm", {"lerning_rate": 1}, "setting 'lerning_rate' is unknown: did you mean 'learning_rate'?"),
        ("efficient-dlm", {"anneal_form": "window"}, "setting 'anneal_form' is unknown"),
        ("efficient-dlm", {"batch_size": "many"}, "batch_size='many' has the wrong type: it takes int | None"),
        ("efficient-dlm", {"shift": 1}, "shift=1 has the wrong type: it takes bool"),
        ("efficient-dlm", {"attention": "full", "shift": True}, "attention='full' is unknown: use one of two_stream"),
        ("efficient-dlm", {"max_tokens": 0}, "max_tokens=0 must be above 0"),
        ("efficient-dlm", {"half_life": -1.0}, "half_life=-1.0 must be above 0"),
        ("efficient-dlm", {"weight_decay": -1}, "weight_decay=-1.0 must be at least 0"),
        ("efficient-dlm", {"warmup_ratio": -2}, "warmup_ratio=-2.0 must be at least 0 and at most 1"),
        ("efficient-dlm", {"min_learning_rate_ratio": 9}, "min_learning_rate_ratio=9.0 must be at least 0 and at most"),
        ("efficient-dlm", {"beta1": 5}, "beta1=5.0 must be at least 0 and below 1"),
        ("efficient-dlm", {"eval_documents": -1}, "eval_documents=-1 must be at least 0"),
        ("efficient-dlm", {"learning_rate": math.inf}, "learning_rate=inf must be finite"),
        ("efficient-dlm", {"lora_rank": 2, "lora_trainable": "norms,tail"}, "'tail' is unknown: use any of embeddings"),
        ("efficient-dlm", {"alpha": 0.9}, "alpha=0.9 needs objective='joint'; recipe efficient-dlm has objective="),
        ("efficient-dlm", {"alpha": 0.3}, "alpha=0.3 needs objective='joint'"),
        ("efficient-dlm", {"distance": "kl"}, "distance='kl' needs objective='joint' or 'distill'; recipe"),
        ("efficient-dlm", {"drafter_rank": 64}, "drafter_rank=64 needs objective='distill'"),
        ("efficient-dlm", {"lora_alpha": 3}, "lora_alpha=3.0 needs lora_rank; recipe efficient-dlm has no lora_rank"),
        ("efficient-dlm", {"teacher": "parent"}, "teacher='parent' needs objective='joint'"),
        ("efficient-dlm", {"min_noise_level": 0.1}, "min_noise_level=0.1 needs masking='bernoulli'"),
        ("efficient-dlm", {"anneal_steps": 9}, "anneal_steps=9 needs attention='bidirectional'"),
        ("efficient-dlm", {"random_offset": True}, "random_offset=true needs clean_attention='causal'; recipe"),
        ("efficient-dlm", {"self_every": 3}, "self_every=3 needs self_prompts; recipe efficient-dlm has no self_pro"),
        ("efficient-dlm", {"eval_documents": 0, "eval_every": 3}, "eval_every=3 needs eval_documents above 0; this"),
        ("efficient-dlm", {"half_life": 0.1, "masking": "bernoulli"},
         "half_life=0.1 needs masking='exact'; this run has masking='bernoulli'"),
        ("efficient-dlm", {"masking": "bernoulli", "complementary": True}, "complementary=true needs masking='exact'"),
        ("diffullama", {"anneal_steps": 1, "anneal_redraw": True}, "anneal_redraw=true needs anneal_steps above 1; th"),
        ("diffullama", {"first_block_size": 2},
         "first_block_size=2 needs attention='two_stream' or 'block_causal', or attention='bidirectional' and "
         "noise_level='block'; recipe diffullama has attention='bidirectional', noise_level='sequence'"),
        ("tri-mode-published", {"teacher_top_k": 4}, "teacher_top_k=4 needs teacher, or distance='kl', 'tv', 'kl+tv',"),
        ("tri-mode", {"loss_normaliser": "masked"}, "loss_normaliser='masked' needs objective='diffusion'; recipe tri"),
        ("tri-mode", {"distance": "reach"}, "distance='reach' needs objective='distill', not 'joint'"),
        ("drafter", {"lora_rank": 4}, "lora_rank=4 needs objective='diffusion' or 'joint'; recipe drafter has"),
        ("drafter", {"compile_layers": True}, "compile_layers=true needs objective='diffusion' or 'joint'"),
        ("drafter", {"self_prompts": "x", "self_mode": "diffusion", "masking": "exact"}, "masking='all', not 'exact'"),
        ("drafter", {"self_prompts": "x", "self_steps": 2}, "self_steps=2 needs self_mode='diffusion'; recipe drafter"),
        ("drafter", {"self_prompts": "x", "self_mode": "diffusion", "self_steps": 0}, "self_steps=0 must be above 0"),
        ("drafter", {"self_end": False}, "self_end=false needs self_prompts; recipe drafter has no self_prompts"),
        ("efficient-dlm", {"predict_mask": True}, "predict_mask=true needs masking='bernoulli'; recipe efficient-dlm"),
        ("tri-mode", {"predict_mask": True}, "predict_mask=true needs objective='diffusion' and masking='bernoulli'"),
        ("drafter", {"mask_init_noise": True}, "mask_init_noise=true needs objective='diffusion' or 'joint'"),
        ("tri-mode-published", {"self_prompts": "x", "self_mode": "diffusion", "masking": "all"}, "and teacher=FOLDER"),
        ("ar", {"objective": "joint"}, "objective='joint' needs attention='two_stream' with clean_attention='causal'"),
        ("ar", {"masking": "all"}, "masking='all' needs attention other than 'ar'; recipe ar has attention='ar'"),
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(name: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_recipe(name, **overrides)


def test_refused_before_anything_is_loaded_or_claimed(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    (tmp_path / "no-model").mkdir()
    (tmp_path / "no-model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"alpha=0.9 needs objective='joint'"):
        unmask.adapt(tmp_path / "no-model", stories, "efficient-dlm", tmp_path / "run", alpha=0.9)
    with pytest.raises(ValueError, match=r"split='test' needs a data set with splits.*; the data are .txt"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "run", split="test")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kinds", "has_splits", "overrides", "message"),
    [
        ({".txt"}, False, {"split": "test"}, "split='test' needs a data set with splits, of the hub or of `datasets`; "
                                             "the data are .txt"),
        ({".txt"}, False, {"text_column": "body"}, "text_column='body' needs data with columns"),
        ({"a hub data set"}, True, {"skip_invalid": True, "text_column": "body"}, None),
        ({".txt", ".jsonl"}, False, {"text_column": "body", "skip_invalid": True}, None),
        ({".txt", "a hub data set"}, True, {"text_column": "body", "skip_invalid": True, "split": "test"}, None),
        ({".txt"}, False, {"split": None, "seed": 3}, None),
    ],
)  # fmt: skip
def test_settings_of_other_data_are_refused(
    kinds: set[str], has_splits: bool, overrides: dict[str, Any], message: str | None
) -> None:
    with nullcontext() if message is None else pytest.raises(ValueError, match=re.escape(message)):
        check_data_settings(overrides, kinds, has_splits)


# --- what a run takes


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_nothing_that_its_run_does_not_read(name: str) -> None:
    own = tomllib.loads((resources.files("unmask") / "recipes" / f"{name}.toml").read_text())
    values = vars(load_recipe(name))
    assert {key: unmet(key, values) for key in own} == dict.fromkeys(own)


def test_what_an_override_makes_pointless_goes_or_may_be_taken_back() -> None:
    pairs = load_recipe("fast-dllm-v2", masking="bernoulli")
    assert not pairs.complementary
    assert pairs == load_recipe("fast-dllm-v2", masking="bernoulli", complementary=False)
    blocks = load_recipe("diffullama-gpt2", attention="block_causal")
    assert (blocks.anneal_steps, blocks.anneal_redraw) == (1, False)
    assert load_recipe("diffullama", masking="exact", min_noise_level=0.0).min_noise_level == 0


def test_background_is_taken_where_it_is_read() -> None:
    shared = {"half_life": 0.5, "block_size": 4, "lora_alpha": 3.0}
    assert load_recipe("efficient-dlm", shared).half_life == 0.5
    plain = load_recipe("ar", shared)
    assert (plain.half_life, plain.block_size, plain.lora_alpha) == (math.inf, 4, None)
    assert load_recipe("efficient-dlm", shared, half_life=0.2).half_life == 0.2
    with pytest.raises(ValueError, match="mask_init='a' needs"):
        load_recipe("drafter", shared, mask_init="a")


def test_arms_of_a_study_take_shared_settings_that_they_read() -> None:
    arms: dict[str, Any] = {"a": {"recipe": "efficient-dlm"}, "b": {"recipe": "ar"}, "c": {"recipe": "bd3lm"}}
    study = Study("s", "", arms, ("likelihood",), settings={"half_life": 0.5, "seed": 3})
    assert [study.run_settings(arm, 0).half_life for arm in arms] == [0.5, math.inf, math.inf]
    with pytest.raises(ValueError, match=r"half_life=0.5 needs"):
        Study("s", "", {"b": {"recipe": "ar", "half_life": 0.5}}, ("likelihood",))


def test_none_unsets_what_may_be_unset() -> None:
    assert load_recipe("diffullama-gpt2").max_length == 512
    assert load_recipe("diffullama-gpt2", max_length="none").max_length is None
    with pytest.raises(ValueError, match="beta1='none' has the wrong type"):
        load_recipe("diffullama-gpt2", beta1="none")


@pytest.mark.parametrize("name", recipe_names())
def test_differences_give_the_settings_again(name: str) -> None:
    chosen = load_recipe(name, {"half_life": 0.5, "alpha": 0.1}, seed=3, max_length="none")
    assert load_recipe(name, **differences(chosen)) == chosen
    assert differences(load_recipe(name)) == {}


# --- what a run reads

SMALL: dict[str, Any] = {"max_tokens": 128, "max_length": 32, "batch_size": 2, "micro_batch_size": 1, "block_size": 4,
                         "mixed_precision": "no", "eval_documents": 2}  # fmt: skip
VARIANTS: list[dict[str, Any]] = [
    *({"recipe": name} for name in recipe_names()),
    {"recipe": "efficient-dlm", "lora_rank": 2},
    {"recipe": "tri-mode-published", "teacher": "parent", "distance": "kl", "teacher_top_k": 5},
    {"recipe": "diffullama", "anneal_steps": 3, "noise_level": "block", "first_block_size": 2},
    {"recipe": "drafter", "data": "self"},
    {"recipe": "drafter", "data": "self", "self_mode": "diffusion", "self_steps": 2},
]


@pytest.fixture
def record_reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the settings that code of the package, but that of the settings themselves, reads from now on."""
    seen: set[str] = set()
    package, own = str(Path(unmask.__file__).parent), {sys.modules[Settings.__module__].__file__, recipe.__file__}

    def recorded(self: Settings, name: str) -> Any:
        code = sys._getframe(1).f_code
        by_run = code.co_filename not in own or code.co_name == "trainable"
        if name in TABLE and code.co_filename.startswith(package) and by_run:
            seen.add(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Settings, "__getattribute__", recorded)
    return seen


def other_value(name: str) -> Any:
    """A value that is not the default."""
    entry = TABLE[name]
    if isinstance(entry.default, bool):
        return not entry.default
    if entry.metadata["one_of"]:
        return next(value for value in entry.metadata["one_of"] if value != entry.default)
    return {"int": 3, "float": 0.5, "str": "norms"}[str(entry.type).split(" ")[0]]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))
def test_every_setting_is_read_or_refused(
    variant: dict[str, Any], record_reads: set[str], tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    settings = SMALL | {"eval_data": str(stories)} | variant
    name, data = settings.pop("recipe"), settings.pop("data", stories)
    if data == "self":
        settings["self_prompts"] = str(stories)
    unmask.adapt(tokenizer_and_model, data, name, tmp_path / "run", show_progress=False, **settings)
    chosen = load_recipe(name, **settings)
    read = {key for key in TABLE if unmet(key, vars(chosen)) is None}
    assert read - record_reads <= {"split"}  # of hub data alone
    for key in TABLE.keys() - read:
        with pytest.raises(ValueError, match=rf"{key}=.* needs .*; (recipe {name}|this run) has "):
            load_recipe(name, **settings | {key: other_value(key)})


def test_every_setting_is_read_by_some_variant() -> None:
    read = set()
    for variant in VARIANTS:
        settings = {key: value for key, value in variant.items() if key not in ("recipe", "data")}
        settings |= {"self_prompts": "x"} if "data" in variant else {}
        values = vars(load_recipe(variant["recipe"], **settings))
        read |= {key for key in TABLE if unmet(key, values) is None}
    assert read == TABLE.keys()


# --- what a size resolves


OF_SIZE = {name for name, entry in TABLE.items() if entry.metadata["of_size"]}


def test_resolved_settings_have_a_value_for_all_that_a_size_decides() -> None:
    chosen = load_recipe("efficient-dlm")
    assert all(getattr(chosen, name) is None for name in OF_SIZE)
    sized = resolve(chosen, 10**8, 2048, 100_000)
    assert isinstance(sized, Resolved)
    assert all(getattr(sized, name) is not None for name in OF_SIZE)
    assert {name for name, value in asdict(sized).items() if value != getattr(chosen, name)} == OF_SIZE | {
        "mixed_precision"
    }
    # The device decides one, and the other is None for small vocabularies.
    assert {*Resolved.__annotations__} - {"mixed_precision"} | {"teacher_top_k"} == OF_SIZE
    assert resolve(sized, 10**9, 2048, 100) == sized


@pytest.mark.parametrize(
    ("size", "block", "tokens"), [("1.5b", 16, 300 * 10**9), ("4b", 64, 300 * 10**9), ("8b", 64, 500 * 10**9)]
)
def test_efficient_dlm_presets_hold_the_published_settings(size: str, block: int, tokens: int) -> None:
    """2512.14067, sections 2.2, 5, A and D, whatever the parent's size."""
    for num_parameters in (10**6, 8 * 10**9):
        chosen = resolve(load_recipe(f"efficient-dlm-{size}"), num_parameters, 32768)
        assert (chosen.block_size, chosen.max_tokens, chosen.half_life) == (block, tokens, 0.1)
        assert chosen.learning_rate == 1e-5
        assert chosen.learning_rate * chosen.min_learning_rate_ratio == pytest.approx(3e-6)
        assert (chosen.attention, chosen.clean_attention, chosen.shift) == ("two_stream", "block_causal", False)
        assert chosen.max_length % block == 0
    assert (chosen.max_length, chosen.max_length * chosen.batch_size) == (4096, 2**21)


def test_small_parents_get_measured_values_and_large_ones_the_papers() -> None:
    chosen = load_recipe("efficient-dlm")
    small, middle, large = (resolve(chosen, n, None) for n in (10**6, int(10**8.5), 4 * 10**9))
    assert large.learning_rate == 1e-5
    assert large.min_learning_rate_ratio == pytest.approx(0.3)
    assert large.half_life == pytest.approx(0.1)
    assert small.half_life == math.inf
    assert small.learning_rate > middle.learning_rate > large.learning_rate
    assert middle.learning_rate == pytest.approx(math.sqrt(small.learning_rate * large.learning_rate), rel=0.05)
    assert resolve(replace(chosen, learning_rate=3e-3), 10**6, None).learning_rate == 3e-3
    joint = load_recipe("tri-mode-published")
    assert [resolve(joint, n, None).learning_rate for n in (10**6, 4 * 10**9)] == [1e-3, 1e-5]
    assert resolve(joint, 4 * 10**9, None).half_life == math.inf


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_resolves_at_every_size(name: str) -> None:
    for parameters in (10**5, 10**8, 5 * 10**8, 10**10):
        chosen = resolve(load_recipe(name), parameters, 2048)
        assert chosen.max_length % chosen.block_size == 0
        assert chosen.micro_batch_size <= chosen.batch_size
    assert unmask.recipes()[name]["recipe"] == name


@pytest.mark.parametrize(
    ("settings", "context", "message"),
    [
        ({"max_length": 30, "block_size": 8}, None, "max_length=30 is no multiple of block_size=8"),
        ({"max_length": 64}, 32, "max_length=64 exceeds the model's context of 32"),
        ({"block_size": 64}, 32, "block_size=64 exceeds"),
        ({"block_size": 16, "first_block_size": 3}, None, "first_block_size=3 does not double to block_size=16"),
    ],
)
def test_lengths_that_do_not_fit_are_named(settings: dict[str, Any], context: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(Settings("x", **settings), 10**6, context)


# --- what people read


def listed(text: str) -> dict[str, str]:
    """Name -> value of the settings in the listing of a recipe, whose sentences stand further right."""
    return dict(re.findall(r"^  (\w+) = (.+?)(?:  |$)", text, re.MULTILINE))


@pytest.mark.parametrize("name", recipe_names())
def test_a_listing_has_what_the_recipe_reads(name: str) -> None:
    chosen = load_recipe(name)
    shown = listed(settings_of(name))
    assert list(shown) == [key for key in TABLE if unmet(key, vars(chosen)) is None]
    for key, value in shown.items():
        size, unset = value == "from the parent's size", value == "unset"
        assert (size or unset) == (getattr(chosen, key) is None), key
        assert size == (getattr(chosen, key) is None and key in OF_SIZE), key
        if not size and not unset:  # as SETTING=VALUE takes it
            assert tomllib.loads(f"x = {value}")["x"] == getattr(chosen, key)


def test_a_listing_of_all_has_the_conditions_of_what_is_not_read() -> None:
    text = settings_of("efficient-dlm", everything=True, width=1000)
    assert list(listed(text)) == list(TABLE)
    lines = {line.split()[0]: line for line in text.splitlines() if " = " in line}
    assert lines["alpha"].endswith("weight of the diffusion term [not read: needs objective='joint']")
    assert "not read" not in lines["masking"]
    some = "'kl', 'tv', 'kl+tv', 'lk', 'reach' or 'first-error'"
    needed = f"objective='joint' or 'distill', and either teacher, or distance={some}"
    assert lines["teacher_top_k"].endswith(f"[not read: needs {needed}]")


def test_the_page_of_settings_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
    assert page.read_text() == settings_page(), "run: unmask recipes --markdown > docs/settings.md"
    assert all(f"| `{name}` |" in page.read_text() for name in TABLE)


def test_the_table_knows_no_torch() -> None:
    code = "import sys, unmask.cli.recipes as r; r.settings_page(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_keywords_are_the_table() -> None:
    """What editors complete: the same names in the same order, of the same types."""
    assert SettingsKeywords.__annotations__.keys() == TABLE.keys()
    for name, entry in TABLE.items():
        assert SettingsKeywords.__annotations__[name].__forward_arg__ == entry.type, name
    assert get_type_hints(unmask.adapt, include_extras=True)["settings"] == Unpack[SettingsKeywords]
