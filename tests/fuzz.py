"""Calls with values that nobody should give, and whether each ends as it should.

A call is a method of `DiffusionLM`, `adapt`, or a command of the command line, with some of its options; most have
sensible values, a few have any. It must end well, or with one line that says what is wrong, within 8 seconds:

- Python raises ValueError, and TypeError only for a value of a type that the option does not have;
- the command exits with 2 and one line on stderr, and prints nothing on stdout;
- a number that is not finite is refused (`half_life=inf` is one of its values), and no result holds one;
- a refused run leaves no output folder behind.

    python tests/fuzz.py 6000              # a campaign, with a process of its own that is ended when a call hangs
    python tests/fuzz.py 6000 --seed 3     # another one
    python tests/fuzz.py --each            # every option by itself with every value of the lists: 19,000 calls

The last campaigns, of 6,500 calls (seed 21) and the 18,528 of `--each`, found nothing more; those before them found
an empty mask token, whole numbers beyond 64 bits as temperatures, options that were no functions, and a demo that
trained before it refused. `tests/test_fuzz.py` runs some hundred calls, always the same.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from conftest import STORIES, write_parent
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

import unmask
from unmask import cli, sampling
from unmask.recipe import load_recipe, recipe_names
from unmask.settings import TABLE, unmet

SECONDS = 8.0
"""How long a call may take."""

MEMORY = 12 * 2**30
"""Bytes that the process of a campaign may ask for."""

LONG = {"max_tokens", "self_tokens", "rounds", "prompts"}
"""Options that may ask for hours of work, which is no fault: large values that are in range are not tried."""


class Made(NamedTuple):
    """An object that a call is given: a class of `unmask.sampling`, and its options."""

    kind: str
    options: dict[str, Any]


class Call(NamedTuple):
    """surface: what is called. model: on which checkpoint. options: what it is given; of a command, texts."""

    surface: str
    model: str
    options: dict[str, Any]


# --- values

WHOLE = [
    -(10**20),
    -(2**31),
    -7,
    -1,
    0,
    1,
    2,
    3,
    5,
    9,
    127,
    128,
    129,
    1000,
    4096,
    10**6,
    2**31 - 1,
    2**31,
    2**63,
    10**20,
]
REAL = [math.nan, math.inf, -math.inf, -1.5, -0.0, 5e-324, 1e-200, 1e-9, 0.3, 0.5, 1.0, 1.5, 7.3, 1e9, 1e300]
TEXT = [
    "",
    " ",
    "x",
    "ar",
    "auto",
    "none",
    "nan",
    "é\n",
    "</s>",
    "\ud800",
    "a" * 300,
    "../nowhere",
    "norms",
    "True",
    "3",
]
ODD: list[Any] = [None, True, False, [], {}, (), [1], [-1], ["a"], {"a": 1}, b"x", 1j, [None], [[1]], [0.5], object]
WORDS = ["", "-1", "0", "1", "3", "129", "1000", "1000000", "2147483648", "100000000000000000000", "nan", "inf", "-inf",
         "-0.0", "1e-320", "1e400", "0.5", "1.5", "x", "none", "true", "1,2", "0.5,nan", "1,,2", "a=b", "[1]", "{}",
         "é", "../nowhere", "ar", "\ud800", "-", "--", "'", "copy"]  # fmt: skip

anything = st.one_of(
    *map(st.sampled_from, (WHOLE, REAL, TEXT, ODD)), st.integers(-300, 300), st.floats(), st.text(max_size=5)
)
any_word = st.sampled_from(WORDS) | st.integers(-300, 300).map(str) | st.floats(width=32).map(str)

some_text = st.sampled_from(["Once there was", "A cat", "", "The little bird sang."])
some_gaps = st.sampled_from(["Once<gap:3>", "<gap:1,2> there<gap:9> was", "A <gap:2><gap:2>cat"])
small = st.integers(1, 9)
GOOD: dict[str, st.SearchStrategy[Any]] = {
    # of decoders, and of what they are asked
    "mode": st.sampled_from(["ar", "diffusion", "speculative"]), "block_size": st.sampled_from([1, 2, 4, 8]),
    "max_denoising_steps": st.integers(1, 4), "confidence_threshold": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    "guidance_scale": st.sampled_from([0.0, 1.0, 1.5]), "window": small, "draft_length": small | st.just("auto"),
    "max_new_tokens": st.integers(1, 12), "temperature": st.sampled_from([0.0, 0.7, 1.0]),
    "top_p": st.sampled_from([0.5, 1.0]), "top_k": small, "seed": st.integers(0, 9), "batch_size": st.integers(1, 3),
    "constraint": st.sampled_from(["json_object", {"type": "boolean"}]), "regex": st.just("[a-z ]+"),
    "json_schema": st.just('{"type": "boolean"}'), "grammar": st.just('start: "a"'),
    "shard": st.sampled_from(["1/1", "1/2", "2/2"]),
    "stop_strings": st.sampled_from(["the", ["a", "b"]]), "stop": st.sampled_from(["the", "a"]),
    "select": st.sampled_from(["Confidence", "Random", "Entropy", "Margin"]).flatmap(
        lambda kind: st.builds(Made, st.just(kind), st.fixed_dictionaries({"n": small}))),
    "remask": st.builds(Made, st.just("Remask"), st.fixed_dictionaries({"eta": st.floats(0, 1)})),
    "cycle": st.sampled_from(["one", "two", "auto"]), "base": st.just("{parent}"),
    "acceptance": st.builds(Made, st.sampled_from(["Coupled", "Rejection"]), st.just({})),
    "prompts": some_text | st.lists(some_text, min_size=1, max_size=3) | st.just(Made("tensor", {"ids": [[3, 4, 5]]}))
    | st.lists(st.sampled_from([0, 1, 5, 299, 300, 301, -1, 10**20]), min_size=1, max_size=4),
    "attention_mask": st.just(Made("tensor", {"ids": [[1, 1, 1]]})), "callback": st.just(Made("ignore", {})),
    "prefix": some_text | some_gaps | st.just(["A", 2, [1, 3], " cat"]), "text": some_gaps,
    "suffix": some_text, "num_tokens": small | st.lists(small, min_size=1, max_size=2),
    "stop_tokens": st.just([5]), "attention": st.just("bidirectional"), "num_samples": st.integers(1, 4),
    "texts": some_text | st.lists(some_text, min_size=1, max_size=3), "exact": st.booleans(),
    "pattern": st.sampled_from(["causal", "bidirectional", "block_causal"]), "batch_tokens": st.integers(1, 999),
    "numbers": st.sampled_from([[0], [7], [2, 0, 1]]), "show_progress": st.just(False),
    # of commands
    "prompt": some_text, "file": st.just("{stories}"), "data": st.just("{stories}"), "more": st.just("{stories}"),
    "evaluation": st.just("{stories}"), "max_documents": st.integers(1, 3), "text_column": st.just("text"),
    "skip_invalid": st.booleans(), "limit": st.integers(1, 3), "num_fewshot": st.integers(0, 2),
    "max_length": st.sampled_from([32, 64]), "gen_kwargs": st.just("max_gen_toks=4"), "tasks": st.just("no_such_task"),
    "tasks_folder": st.just("{folder}"), "output": st.sampled_from(["{out}", "{out}/x.npy"]),
    "replay": st.just("{out}.html"), "max_tokens": st.sampled_from([64, 128]), "rounds": st.just(1),
    "name": st.sampled_from(recipe_names()), "recipe": st.sampled_from(recipe_names()),
    "what": st.sampled_from(["train", "decode"]), "shape": st.just("tiny"), "task": st.just("copy"),
    "parent": st.just("{parent}"), "thresholds": st.just("0.5,0.9"), "rule": st.just("factor=1"),
    "block_sizes": st.just("2,4"), "batch_sizes": st.just("1,2"), "oracle": st.just(0),
    "prompt_tokens": small,
    "seeds": st.just("0"), "arms": st.just("bidirectional"),
    "device": st.just("cpu"), "dtype": st.sampled_from(["float32", "float64"]),
}  # fmt: skip
FLAGS = {"as_json", "exact", "everything", "markdown", "skip_invalid", "watch", "compiled", "trust_remote_code",
         "apply_chat_template", "confirm_run_unsafe_code", "resume", "quiet", "verbose"}  # fmt: skip
NUMBERS = (int, float)
TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("temperature", "top_p", "guidance_scale", "confidence_threshold", "eta", "factor"), NUMBERS),
    **dict.fromkeys(("mode", "attention", "pattern", "suffix", "stop_strings", "texts"), (str,)),
    "prefix": (str, list),
    "prompt": (str,), "cycle": (str,), "select": (), "remask": (), "acceptance": (), "callback": (),
    "prompts": (str,), "variant": (str,), "entropy_bound": NUMBERS, "exact": (bool,), "show_progress": (bool,),
    "attention_mask": (), "stop_tokens": (list,), "draft_length": (int, str), "num_tokens": (int, list),
}  # fmt: skip
"""Name -> the types that an option takes; whole numbers otherwise."""
NEVER_NONE = {"prompts", "prompt", "texts", "prefix", "suffix", "num_tokens", "temperature", "top_p", "max_new_tokens",
              "num_samples", "stop_tokens", "batch_tokens"}  # fmt: skip

WRONG: dict[str, list[dict[str, str]]] = {
    "bench": [{"what": word} for word in ("", "x", "nan")]
    + [{"rounds": n} for n in ("0", "-1", "nan", "9" * 20)]
    + [{"shape": word} for word in ("", "x", "nan", "-1")],
    "frontier": [
        {name: word}
        for name in ("prompts", "prompt_tokens", "max_new_tokens", "rounds", "oracle")
        for word in ("-1", "nan", "x", "9" * 20)
    ]
    + [{"thresholds": word} for word in ("nan", "2", ",", "1e400")]
    + [{"rule": word} for word in ("x", "factor=nan", "factor=", "confidence=0", "random=1e30", "=")]
    + [{name: word} for name in ("block_sizes", "batch_sizes") for word in ("0", "nan", "1e30", "1,,2", "x", "9" * 20)]
    + [{"temperature": word} for word in ("nan", "inf", "-1")]
    + [{"task": "x"}, {"parent": "../nowhere"}],
    "study": [{"seeds": word} for word in ("", "x", "1,1", "nan", "1e30", "9" * 20)]
    + [{"arms": "x"}, {"name": "x"}]
    + [{"max_tokens": word} for word in ("0", "-1", "nan", "9" * 20)],
    "demo": [{"max_tokens": word} for word in ("0", "-1", "nan", "9" * 20)]
    + [{"data": word} for word in ("", "x", "[]")],
}
"""Values of which one is wrong, whatever the others are, for commands that take minutes if none is."""

METHODS = ("generate", "stream", "infill", "nll", "nelbo", "embed")
MODELS = ("parent", "blocks", "tri-mode", "canvas", "drafter")
COMMANDS = ("generate", "chat", "infill", "evaluate", "embed", "recipes", "frontier", "bench", "study", "demo")


def _options(
    draw: Any, names: list[str], wild: st.SearchStrategy[Any], required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Some of the options, of which one or two have any value."""
    chosen = draw(st.lists(st.sampled_from(names), max_size=4, unique=True)) if names else []
    chosen = [*required, *(name for name in chosen if name not in required)]
    able = [name for name in chosen if name not in required or draw(st.integers(0, 5)) == 0]
    at = draw(st.sets(st.sampled_from(able), max_size=2)) if able else set()
    return {name: _wild(draw, name, wild) if name in at else draw(GOOD.get(name, wild)) for name in chosen}


def _wild(draw: Any, name: str, wild: st.SearchStrategy[Any]) -> Any:
    value = draw(wild)
    return draw(st.sampled_from([-1, 0, 10**20])) if _is_long(name, value) else value


def _is_long(name: str, value: Any) -> bool:
    """Whether the value asks for hours of work, which is no fault."""
    try:
        return name in LONG and 100 <= float(value) <= 10**15
    except (TypeError, ValueError, OverflowError):
        return False


@st.composite
def method_calls(draw: Any) -> Call:
    """A method of `DiffusionLM`, with a mode's name and its options or a decoder."""
    name, model = draw(st.sampled_from(METHODS)), draw(st.sampled_from(MODELS))
    parameters = inspect.signature(getattr(unmask.DiffusionLM, name)).parameters.values()
    required = tuple(p.name for p in parameters if p.default is p.empty and p.name not in ("self", "options"))
    if name == "infill" and draw(st.booleans()):  # between two texts, not in one
        required = ("prefix", "suffix", "num_tokens")
    if name == "stream":  # which takes those of generate
        parameters = inspect.signature(unmask.DiffusionLM.generate).parameters.values()
    names = [p.name for p in parameters if p.name not in ("self", "options", "prompts", *required)]
    if name in ("generate", "stream", "infill"):
        names += ["guidance_scale", "window", "remask", "draft_length", "acceptance", "cycle"]
        mode = (
            draw(st.sampled_from(["diffusion", "diffusion", "ar", "speculative"])) if name != "infill" else "diffusion"
        )
        if draw(st.integers(0, 4)):  # what the mode reads
            bidirectional = model == "canvas" and mode == "diffusion"
            kind = {"ar": sampling.Autoregressive, "speculative": sampling.Speculative}.get(
                mode, sampling.WholeCanvas if bidirectional else sampling.Blocks)  # fmt: skip
            of_others = {f.name for other in sampling.decoders.DECODERS for f in fields(other)}
            of_others -= {f.name for f in fields(kind)}
            names = [n for n in names if n not in of_others | {"mode", "attention_mask", "confidence_threshold"}]
            names += ["confidence_threshold"] if "select" in names else []
    options = _options(draw, names, anything, required)
    if name in ("generate", "stream") and "mode" not in options and model != "parent":
        options["mode"] = mode
    if name in ("generate", "stream", "infill") and draw(st.integers(0, 3)) == 0:
        kind = draw(st.sampled_from(sampling.decoders.DECODERS))
        options["mode"] = Made(kind.__name__, _options(draw, [f.name for f in fields(kind)], anything))
    if "select" in options and draw(st.booleans()):
        rules = (sampling.Threshold, sampling.Factor, sampling.EntropyBound, sampling.Random, sampling.Ancestral)
        rule = draw(st.sampled_from(rules))
        options["select"] = Made(rule.__name__, {f.name: draw(anything) for f in fields(rule)})
    if "remask" in options and draw(st.booleans()):
        options["remask"] = Made(
            "Remask", {"variant": draw(st.sampled_from(["cap", "loop", "x"])), "eta": draw(anything)}
        )
    return Call(name, model, options)


def settings_values(name: str) -> st.SearchStrategy[Any]:
    """Values in range of a setting, small."""
    entry = TABLE[name]
    if entry.metadata["one_of"]:
        return st.sampled_from(entry.metadata["one_of"])
    given_here = {
        "max_length": [32, 64], "block_size": [2, 4, 8], "first_block_size": [1, 2], "eval_data": ["{stories}"],
        "self_prompts": ["{stories}"], "self_tokens": [64], "teacher": ["parent"], "report_to": ["tensorboard"],
        "end_token": ["</s>"], "mask_token": ["<m>"], "mask_init": ["a"], "drafter_targets": ["all", "q_proj"],
        "lora_trainable": ["norms", "embeddings,head"], "text_column": ["text"], "split": ["train"],
    }  # fmt: skip
    if name in given_here:
        return st.sampled_from(given_here[name])
    kind = str(entry.type)
    if "bool" in kind:
        return st.booleans()
    return st.integers(1, 4) if "int" in kind else st.sampled_from([0.0, 0.1, 0.5, 1.0])


@st.composite
def runs(draw: Any, wild: st.SearchStrategy[Any]) -> dict[str, Any]:
    """Settings of a run, most of them those that its recipe reads."""
    recipe = draw(st.sampled_from(recipe_names()))
    values = vars(load_recipe(recipe))
    read = [name for name in TABLE if unmet(name, values) is None]
    names = draw(st.lists(st.sampled_from(read), max_size=4, unique=True))
    names += draw(st.lists(st.sampled_from(list(TABLE)), max_size=1))
    chosen: dict[str, Any] = {"recipe": recipe, "max_tokens": 128, "max_length": 32, "block_size": 4, "batch_size": 2,
                              "eval_documents": 1, "mixed_precision": "no"}  # fmt: skip
    chosen |= {name: draw(settings_values(name)) for name in names}
    for name in draw(st.sets(st.sampled_from(names or ["alpha"]), max_size=2)):
        chosen[name] = _wild(draw, name, wild)
    chosen.pop("compile_layers", None)  # takes a minute
    return chosen


@st.composite
def adapt_calls(draw: Any) -> Call:
    in_python = draw(st.booleans())
    chosen = draw(runs(anything if in_python else any_word))
    own = chosen.get("self_prompts") is not None and draw(st.booleans())
    return Call("adapt" if in_python else "unmask adapt", draw(st.sampled_from(["parent", "parent", *MODELS])),
                {"data": "self" if own else "{stories}", **chosen})  # fmt: skip


@st.composite
def command_calls(draw: Any) -> Call:
    """A command and some of its options, as texts."""
    name = draw(st.sampled_from(COMMANDS))
    names = [p.name for p in command(name).params if p.name not in ("help", "model", "trust_remote_code")]
    required = tuple(p.name for p in command(name).params if p.required and p.name != "model")
    if name == "infill":
        required = draw(st.sampled_from([("text",), ("prefix", "suffix", "num_tokens")]))
        names = [n for n in names if n not in ("text", "prefix", "suffix", "num_tokens")]
    if name in ("evaluate", "frontier", "demo") and draw(st.integers(0, 9)):
        required = (*required, "data")
    if name in ("frontier", "bench", "demo", "study"):  # long where they are right: a value that is not
        chosen = _options(draw, names, any_word, required)
        chosen |= draw(st.sampled_from(WRONG[name]))
    else:
        chosen = _options(draw, names, any_word, required)
    options = {key: draw(st.booleans()) if key in FLAGS else value for key, value in chosen.items()}
    return Call(f"unmask {name}", draw(st.sampled_from(MODELS)), options)


def each() -> Iterator[Call]:
    """Every option by itself with every value of the lists, on calls that are right without it."""
    right: dict[str, dict[str, Any]] = {
        "generate": {"prompts": "Once", "max_new_tokens": 5}, "stream": {"prompt": "Once", "max_new_tokens": 5},
        "infill": {"prefix": "A", "suffix": "b", "num_tokens": 3}, "nelbo": {"texts": "Once there"},
        "nll": {"texts": "Once there"}, "embed": {"texts": "Once there"},
    }  # fmt: skip
    of_decoders = {f.name for kind in sampling.decoders.DECODERS for f in fields(kind)}
    for method, options in right.items():
        names = set(inspect.signature(getattr(unmask.DiffusionLM, method)).parameters)
        if method in ("generate", "stream", "infill"):
            names |= of_decoders | {"top_k", "stop_strings", "callback"}
        for model in ("blocks", "tri-mode", "canvas"):
            for name in sorted(names - {"self", "options"}):
                yield from (Call(method, model, options | {name: value}) for value in (*WHOLE, *REAL, *TEXT, *ODD))
    for name in TABLE.keys() - {"compile_layers"}:
        readers = [recipe for recipe in recipe_names() if unmet(name, vars(load_recipe(recipe))) is None]
        options = {"data": "{stories}", "recipe": (*readers, "efficient-dlm")[0], "max_tokens": 64, "max_length": 32,
                   "block_size": 4, "batch_size": 2, "eval_documents": 1, "mixed_precision": "no"}  # fmt: skip
        options |= {"lora_rank": 2} if name.startswith("lora_") else {}
        options |= {"data": "self", "self_prompts": "{stories}"} if name.startswith("self_") else {}
        for value in (*WHOLE, *REAL, *TEXT, *ODD):
            if not _is_long(name, value):
                yield Call("adapt", "parent", options | {name: value})


calls = st.one_of(method_calls(), method_calls(), command_calls(), adapt_calls())


def command(name: str) -> Any:
    return typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]


# --- running them


class Place:
    """The folder of the models and data that calls use."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.names = {name: folder / name for name in MODELS} | {"stories": folder / "stories.txt", "folder": folder}
        self._loaded: dict[str, unmask.DiffusionLM] = {}

    def make(self) -> Place:
        """Write a tiny parent, what recipes make of it, and the stories."""
        self.names["stories"].write_text("<|endoftext|>".join(STORIES))
        write_parent(self.names["parent"])
        small = {"max_tokens": 64, "max_length": 32, "batch_size": 2, "eval_documents": 0, "show_progress": False}
        recipes = {"blocks": "efficient-dlm", "tri-mode": "tri-mode", "canvas": "diffullama", "drafter": "drafter"}
        for name, recipe in recipes.items():
            more: dict[str, Any] = {"mixed_precision": "no"} | ({} if name == "canvas" else {"block_size": 4})
            unmask.adapt(self.names["parent"], self.names["stories"], recipe, self.names[name], **small, **more)
        return self

    def load(self, name: str) -> unmask.DiffusionLM:
        if name not in self._loaded:
            self._loaded[name] = unmask.load(self.names[name])
        return self._loaded[name]

    def filled(self, value: Any) -> Any:
        """The value with the names of files, and objects made."""
        if isinstance(value, Made):
            options = {key: self.filled(inner) for key, inner in value.options.items()}
            if value.kind == "tensor":
                return torch.tensor(options["ids"])
            if value.kind == "ignore":
                return lambda *_: None
            return getattr(sampling, value.kind)(**options)
        if isinstance(value, str) and "{" in value:
            for name, path in {**self.names, "out": self.out}.items():
                value = value.replace(f"{{{name}}}", str(path))
        return value


def fault(place: Place, call: Call) -> str | None:
    """What is wrong with how the call ended, None if nothing is."""
    for left in place.folder.glob("out*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    began = time.process_time()  # other processes may share the cores
    with contextlib.chdir(place.folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _of_command(place, call) if call.surface.startswith("unmask ") else _of_python(place, call)
    seconds = time.process_time() - began
    return found or (f"took {seconds:.1f} s" if seconds > allowed(call) else None)


def allowed(call: Call) -> float:
    """Seconds that a call may take: names of tasks are looked up in the 14,000 of lm-evaluation-harness."""
    return 4 * SECONDS if "tasks" in call.options else SECONDS


def performed(place: Place, call: Call) -> Any:
    """The result of a call in Python; None of a run."""
    options = {name: place.filled(value) for name, value in call.options.items()}
    if call.surface != "adapt":
        result = getattr(place.load(call.model), call.surface)(**options)
        return "".join(result) if call.surface == "stream" else result
    data = options.pop("data")
    unmask.adapt(place.names[call.model], data, output_dir=place.out, show_progress=False, **options)
    return None


def _of_python(place: Place, call: Call) -> str | None:
    try:
        result = performed(place, call)
    except TypeError as error:
        return None if _wrong_type(call) else _unexpected(error)
    except ValueError as error:
        return _of_message(str(error)) or _left_behind(place, call, str(error))
    except Exception as error:
        return _unexpected(error)
    return _not_finite(call.options) or _wrong_result(result)


def _of_command(place: Place, call: Call) -> str | None:
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, sys.stdin, torch.get_num_threads()
    try:
        sys.argv, sys.stdin = ["unmask", *arguments(place, call)], io.StringIO("Once\n/reset\n")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        return "did not exit"
    except SystemExit as ended:
        code = int(ended.code or 0)
    except Exception as error:
        return _unexpected(error)
    finally:
        sys.argv, sys.stdin = before[:2]
        torch.set_num_threads(before[2])
    if code not in (0, 2):
        return f"exit code {code}"
    if code == 2:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("unmask: error: ")]
        if len(lines) != 1 or out.getvalue():
            return f"exit code 2 with stdout {out.getvalue()[:80]!r} and stderr {err.getvalue()[-200:]!r}"
        return _of_message(lines[0]) or _left_behind(place, call, lines[0])
    if call.options.get("as_json"):
        try:
            printed = json.loads(out.getvalue())
        except ValueError:
            return f"stdout is no JSON: {out.getvalue()[:200]!r}"
        if any(word in repr(printed) for word in ("nan,", "inf,", "nan}", "inf}")):
            return f"stdout holds a number that is not finite: {out.getvalue()[:200]!r}"
    return _not_finite(numbers_of(call))


def arguments(place: Place, call: Call) -> list[str]:
    """The command line of a call."""
    name = call.surface.removeprefix("unmask ")
    if name == "adapt":
        settings_ = [
            f"{key}={place.filled(value)}" for key, value in call.options.items() if key not in ("data", "recipe")
        ]
        rest = [
            "--data",
            place.filled(call.options["data"]),
            "--recipe",
            call.options["recipe"],
            "--output",
            str(place.out),
        ]
        return [name, str(place.names[call.model]), *rest, *settings_]
    given_, positional = [], []
    for parameter in command(name).params:
        if parameter.name == "model":
            positional.append(str(place.names[call.model]))
        if parameter.name not in call.options:
            continue
        value = call.options[parameter.name]
        values = value if isinstance(value, list) else [value]
        for one in map(place.filled, values):
            if parameter.name in FLAGS:
                given_ += [parameter.opts[0]] if one else []
            elif parameter.param_type_name == "argument":
                positional.append(str(one))
            else:
                given_ += [parameter.opts[0], str(one)]
    return [name, *given_, *positional]


def numbers_of(call: Call) -> dict[str, Any]:
    """The options of a command that take numbers, as numbers where they are such."""
    name = call.surface.removeprefix("unmask ")
    if name == "adapt":
        numeric = {key for key, entry in TABLE.items() if {"int", "float"} & set(str(entry.type).split(" | "))}
    else:
        numeric = {p.name for p in command(name).params if p.bare_type() in NUMBERS}
    return {key: _number(value) for key, value in call.options.items() if key in numeric}


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _unexpected(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:200]}"


def _of_message(message: str) -> str | None:
    if not message.strip():
        return "an empty message"
    return f"a message of {len(message.splitlines())} lines: {message[:200]!r}" if "\n" in message.strip() else None


def _left_behind(place: Place, call: Call, message: str) -> str | None:
    """Something in the output's place after an error; steps that are not finite are known only once they ran."""
    if not call.surface.endswith("adapt") or not place.out.exists() or "finite" in message:
        return None
    return f"left {sorted(p.name for p in place.out.iterdir())} behind: {message[:200]}"


def _not_finite(options: dict[str, Any]) -> str | None:
    """A number in the options that is not finite, which a call that ended well must not have taken."""
    for name, value in options.items():
        if isinstance(value, Made):
            inner = _not_finite(value.options)
            if inner is not None:
                return inner
        taken = (name == "half_life" and value == math.inf) or TYPES.get(name) == (bool,)
        if isinstance(value, float) and not math.isfinite(value) and not taken:
            return f"accepted {name}={value}"
    return None


def _wrong_result(result: Any) -> str | None:
    """A result with a number that is not finite, or a token that does not exist."""
    if isinstance(result, torch.Tensor):
        return None if bool(result.isfinite().all()) else "vectors that are not finite"
    if isinstance(result, str):
        return None
    if isinstance(result, list):
        return None if all(math.isfinite(one.nats) for one in result) else f"likelihoods {result}"
    if result is not None and (int(result.sequences.min()) < 0 or int(result.num_forwards.min()) < 0):
        return f"tokens {result.sequences.tolist()}"
    return None


def _wrong_type(call: Call) -> bool:
    """Whether an option has a value of a type that it does not take."""

    def odd(name: str, value: Any) -> bool:
        if isinstance(value, Made):
            return any(odd(key, inner) for key, inner in value.options.items()) or name not in GOOD
        if name in TABLE and call.surface == "adapt":
            return False  # the table says it itself, in a ValueError
        if isinstance(value, list) and any(isinstance(inner, list) or odd(name, inner) for inner in value):
            return True
        takes = TYPES.get(name, (int,))
        return not isinstance(value, takes) or (isinstance(value, bool) and bool not in takes)

    return any(odd(name, value) for name, value in call.options.items() if value is not None or name in NEVER_NONE)


# --- campaigns


def every(number: int, seed: int | None, tried: Callable[[Call], None], calls: st.SearchStrategy[Call] = calls) -> None:
    """`number` calls; without a seed always the same ones."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @settings(max_examples=number, deadline=None, database=None, derandomize=seed is None, phases=[Phase.generate],
              suppress_health_check=checks)  # fmt: skip
    @given(calls)
    def run(call: Call) -> None:
        tried(call)

    (run if seed is None else hypothesis_seed(seed)(run))()


def _serve(folder: Path, pipe: Any) -> None:
    """The process that runs calls."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    place = Place(folder)
    sys.stdout = sys.stderr = io.StringIO()
    pipe.send("ready")
    while True:
        try:
            pipe.send(fault(place, pipe.recv()))
        except Exception as error:
            pipe.send(f"of the fuzz itself: {_unexpected(error)}")


class Worker:
    """A process that runs calls and is ended and begun anew when one hangs or it dies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._begin()

    def _begin(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.folder, other), daemon=True)
        self.process.start()
        other.close()
        assert self.pipe.recv() == "ready"

    def fault(self, call: Call) -> str | None:
        try:
            self.pipe.send(call)
            if self.pipe.poll(allowed(call) + 2):
                return self.pipe.recv()
            found = f"hangs for {allowed(call)} s"
        except EOFError:
            found = "ended the process"
        self.process.kill()
        self.process.join()
        self._begin()
        return found


@contextlib.contextmanager
def made_place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        yield Place(Path(folder)).make()


def campaign(number: int | None, seed: int, faults_file: Path | None) -> int:
    """Run so many calls, or those of `each`; print each fault, and return how many there were."""
    faults: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with made_place() as place:
        worker = Worker(place.folder)

        def tried(call: Call) -> None:
            counts[call.surface] += 1
            found = worker.fault(call)
            if found is not None:
                faults[found] += 1
                line = f"{found}\n    {call}"
                print(line, flush=True)
                if faults_file is not None:
                    with faults_file.open("a") as file:
                        file.write(line.encode("utf-8", "replace").decode() + "\n")

        if number is None:
            for call in each():
                tried(call)
        else:
            every(number, seed, tried)
    print(f"{counts.total()} calls, {faults.total()} faults, {len(faults)} different; " + ", ".join(
        f"{name} {n}" for name, n in sorted(counts.items())))  # fmt: skip
    return faults.total()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", type=int, nargs="?", default=6000, help="calls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", action="store_true", help="instead every option by itself with every value")
    parser.add_argument("--faults", type=Path, help="a file to which faults are added")
    given_options = parser.parse_args()
    sys.exit(
        campaign(None if given_options.each else given_options.number, given_options.seed, given_options.faults) > 0
    )
