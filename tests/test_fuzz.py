"""Calls with values that nobody should give end well, or with one line; `fuzz.py` has the calls, and the campaigns."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fuzz import (
    COMMANDS,
    FLAGS,
    GOOD,
    LONG,
    METHODS,
    MODELS,
    Call,
    Made,
    Place,
    adapt_calls,
    command,
    command_calls,
    every,
    fault,
    method_calls,
    performed,
)
from hypothesis import strategies as st

from unmask import DiffusionLM
from unmask.sampling.decoders import DECODERS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz")).make()


@pytest.mark.parametrize(
    ("calls", "number"), [(method_calls(), 100), (command_calls(), 30), (adapt_calls(), 6)], ids=lambda x: str(x)[:20]
)
def test_any_value_ends_well_or_with_one_line(place: Place, calls: st.SearchStrategy[Call], number: int) -> None:
    def tried(call: Call) -> None:
        found = fault(place, call)
        assert found is None, f"{found}: {call}"

    every(number, None, tried, calls)


HUGE = 10**20
BEYOND: list[tuple[str, str, dict[str, Any]]] = [
    ("generate", "blocks", {"max_new_tokens": HUGE}),
    ("generate", "blocks", {"batch_size": HUGE}),
    ("generate", "blocks", {"block_size": 129}),
    ("generate", "blocks", {"window": HUGE}),
    ("generate", "blocks", {"max_denoising_steps": 10**6}),
    ("generate", "blocks", {"select": Made("Confidence", {"n": HUGE})}),
    ("generate", "blocks", {"select": Made("Factor", {"factor": math.nan})}),
    ("generate", "blocks", {"temperature": math.inf}),
    ("generate", "blocks", {"temperature": 1e-320}),
    ("generate", "blocks", {"temperature": 10**400}),
    ("generate", "blocks", {"top_k": HUGE}),
    ("generate", "blocks", {"guidance_scale": -1.0}),
    ("generate", "blocks", {"guidance_scale": 1e300}),
    ("generate", "blocks", {"guidance_scale": HUGE}),
    ("generate", "tri-mode", {"mode": "speculative", "draft_length": 129}),
    ("generate", "tri-mode", {"mode": "speculative", "block_size": 129}),
    ("generate", "canvas", {"block_size": 129}),
    ("generate", "canvas", {"remask": Made("Remask", {"eta": 0.1}), "max_denoising_steps": 10**6}),
    ("infill", "blocks", {"num_tokens": [2, HUGE]}),
    ("infill", "blocks", {"num_tokens": [2, 3], "num_samples": 0}),
    ("infill", "blocks", {"num_tokens": [2, 3], "num_samples": 10**6}),
    ("nelbo", "blocks", {"num_samples": 10**6}),
    ("nelbo", "blocks", {"block_size": 129}),
    ("embed", "blocks", {"batch_tokens": 0}),
    *(("adapt", "parent", {"recipe": "efficient-dlm", name: value}) for name, value in [
        ("max_length", 2**21), ("block_size", HUGE), ("batch_size", 10**6), ("max_tokens", HUGE), ("num_masks", 65),
        ("eval_samples", 10**6), ("lora_rank", 10**4), ("log_every", HUGE), ("report_to", "no-such-tracker"),
        ("micro_batch_size", HUGE)]),
    ("adapt", "parent", {"recipe": "drafter", "drafter_rank": 10**4}),
]  # fmt: skip
TEXTS = {"generate": {"prompts": "Once"}, "infill": {"prefix": "Once", "suffix": "."}, "nelbo": {"texts": "Once there"},
         "embed": {"texts": "Once"}, "adapt": {"data": "{stories}"}}  # fmt: skip


@pytest.mark.parametrize(("method", "model", "options"), BEYOND, ids=lambda x: str(x)[:50])
def test_values_beyond_their_limits_are_named(place: Place, method: str, model: str, options: dict[str, Any]) -> None:
    """An error before any work, in one line, with the name of the option."""
    call = Call(method, model, TEXTS[method] | options)
    assert fault(place, call) is None
    name = list(options)[-1]
    expected = {"select": "n 1|factor nan", "remask": "max_denoising_steps"}.get(name, name)
    with pytest.raises(ValueError, match=expected) as raised:
        performed(place, call)
    assert "\n" not in str(raised.value)
    assert not place.out.exists()


def test_whole_numbers_beyond_64_bits_are_numbers_where_one_takes_fractions(place: Place) -> None:
    for options in (
        {"temperature": HUGE},
        {"select": Made("Factor", {"factor": HUGE})},
        {"select": Made("EntropyBound", {"entropy_bound": HUGE})},
    ):
        performed(place, Call("generate", "blocks", {"prompts": "Once", "mode": "diffusion", "seed": 0, **options}))


@pytest.mark.parametrize("value", [1.5, "3", True, [1]])
def test_a_value_of_another_type_is_a_type_error(place: Place, value: Any) -> None:
    seed = () if isinstance(value, list) else ("seed",)  # a list has one for each prompt
    for name in ("max_new_tokens", "batch_size", "block_size", "top_k", *seed):
        with pytest.raises(TypeError, match=f"{name} .* must be a whole number"):
            place.load("blocks").generate("Once", **{name: value})


def test_an_option_that_is_no_object_of_its_kind_is_a_type_error(place: Place) -> None:
    for model, name in (("blocks", "select"), ("canvas", "select"), ("canvas", "remask"), ("blocks", "callback")):
        with pytest.raises(TypeError, match=f"{name} -1 must be a "):
            place.load(model).generate("Once", mode="diffusion", **{name: -1})
    with pytest.raises(TypeError, match="acceptance -1 must be a "):
        place.load("tri-mode").generate("Once", acceptance=-1)


@pytest.mark.parametrize("value", [-1, None, "ab", [1.5], [None], {"a": 1}])
def test_candidate_lengths_are_whole_numbers(place: Place, value: Any) -> None:
    if value != -1:
        with pytest.raises(TypeError, match=r"num_tokens .* must be a "):
            place.load("blocks").infill("Once", ".", value)


@pytest.mark.parametrize("value", [-1, None, "ab", [1.5], [None], {"a": 1}])
def test_stop_tokens_are_a_list_of_whole_numbers(place: Place, value: Any) -> None:
    with pytest.raises(TypeError, match=r"stop_tokens .* must be a "):
        place.load("blocks").infill("Once", ".", 2, stop_tokens=value)


@pytest.mark.parametrize("method", ["nll", "nelbo"])
def test_numbers_of_texts_are_one_for_each(place: Place, method: str) -> None:
    score = getattr(place.load("blocks"), method)
    for wrong in (-1, "ab", [1.5], [None], {"a": 1}, math.nan, {0}, iter([0])):
        with pytest.raises(TypeError, match=r"numbers .* must be a "):
            score("Once", numbers=wrong)
    for beyond in ([], [0, 1], [-1], [HUGE]):
        with pytest.raises(ValueError, match=r"numbers .* must be "):
            score("Once", numbers=beyond)
    assert len(score(["Once", "A cat"], numbers=range(7, 9))) == 2


@pytest.mark.parametrize("name", ["mask_token", "mask_init", "end_token", "report_to", "eval_data", "text_column"])
def test_an_empty_text_is_no_setting(place: Place, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='' is empty"):
        performed(place, Call("adapt", "parent", {"data": "{stories}", "recipe": "efficient-dlm", name: ""}))


@pytest.mark.parametrize(
    ("method", "options"),
    [("generate", {"mode": ""}), ("infill", {"mode": ""}), ("embed", {"pattern": ""}), ("adapt", {"recipe": ""})],
)
def test_an_empty_word_or_0_is_not_an_option_that_was_left_out(place: Place, method: str, options: dict) -> None:
    model = "parent" if method == "adapt" else "blocks"
    with pytest.raises(ValueError, match=r"'' (is|cannot) "):
        performed(
            place, Call(method, model, TEXTS[method] | ({"num_tokens": 2} if method == "infill" else {}) | options)
        )
    for wrong in ({"max_tokens": "0"}, {"max_tokens": "-1"}):
        assert fault(place, Call("unmask demo", "parent", {"data": "{stories}", "output": "{out}", **wrong})) is None
        assert not place.out.exists() or not list(place.out.rglob("*.safetensors"))


def test_every_option_has_sensible_values() -> None:
    """A new option needs them in `GOOD`, so that calls get past it to the others."""
    options = {p.name for name in COMMANDS for p in command(name).params} - {"model", "help"}
    options |= {name for method in METHODS for name in inspect.signature(getattr(DiffusionLM, method)).parameters}
    options |= {field.name for decoder in DECODERS for field in fields(decoder)}
    assert options - GOOD.keys() - FLAGS == {"self", "options"}


def test_the_fuzz_finds_what_it_looks_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of fault, put in by hand."""
    lm = place.load("blocks")
    call = Call("nll", "blocks", {"texts": "Once"})

    def ends(how: Any) -> str:
        monkeypatch.setattr(type(lm), "nll", how)
        return fault(place, call) or ""

    def raising(error: Exception) -> Any:
        def nll(_self: Any, **_: Any) -> None:
            raise error

        return nll

    assert ends(raising(ValueError("two\nlines"))).startswith("a message of 2 lines")
    assert ends(raising(KeyError("x"))).startswith("KeyError")
    assert ends(raising(TypeError("x"))).startswith("TypeError")
    assert ends(lambda _self, **_: place.load("blocks").embed("Once") * math.nan) == "vectors that are not finite"
    monkeypatch.undo()
    assert fault(place, call) is None
    assert LONG
    assert set(MODELS) <= set(place.names)


def test_watch_needs_a_terminal_and_replay_a_page(place: Place, tmp_path: Path) -> None:
    notes, page = tmp_path / "notes.html", tmp_path / "page.txt"
    notes.write_text("my notes")
    for options in ({"watch": True}, {"replay": str(notes)}, {"replay": str(page)}):
        call = Call("unmask generate", "blocks", {"prompt": "Once", "max_new_tokens": 2, **options})
        assert fault(place, call) is None
    assert notes.read_text() == "my notes"
    assert not page.exists()
