"""Prompts as token ids, and numpy's integers wherever a whole number is asked for."""

from __future__ import annotations

import json
from collections import UserDict
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STORIES

import unmask
import unmask.sampling
from unmask.core.drafter import DrafterConfig
from unmask.lab.sweep import Sweep
from unmask.recipe import load_recipe
from unmask.sampling import Request, SampledTokens

TEXT = STORIES[0][:20]


@pytest.fixture(scope="module")
def lm(converted: Path) -> unmask.DiffusionLM:
    return unmask.load(converted)


ONE = {
    "list": lambda ids: list(ids),
    "tuple": lambda ids: tuple(ids),
    "tensor": torch.tensor,
    "int32 tensor": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "array": np.array,
    "uint16 array": lambda ids: np.array(ids, dtype=np.uint16),
    "numpy's integers": lambda ids: list(np.array(ids)),
    "tensors of one id": lambda ids: list(torch.tensor(ids)),
    "row of a batch": lambda ids: torch.tensor([ids]),
}


@pytest.mark.parametrize("kind", ONE)
def test_ids_are_one_prompt(kind: str, lm: unmask.DiffusionLM) -> None:
    ids = lm.tokenizer(TEXT)["input_ids"]
    given = ONE[kind](ids)
    assert [row.tolist() for row in lm.prompt_ids(given)] == [ids]
    assert lm.generate(given, max_new_tokens=5).texts == lm.generate(TEXT, max_new_tokens=5).texts


@pytest.mark.parametrize("kind", [kind for kind in ONE if kind != "row of a batch"])
def test_a_list_holds_prompts_of_every_kind(kind: str, lm: unmask.DiffusionLM) -> None:
    ids = lm.tokenizer(TEXT)["input_ids"]
    rows = lm.prompt_ids([ONE[kind](ids), TEXT, ONE[kind](ids[:3])])
    assert [row.tolist() for row in rows] == [ids, ids, ids[:3]]


def test_an_attention_mask_goes_with_a_tensor(lm: unmask.DiffusionLM) -> None:
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert [row.tolist() for row in lm.prompt_ids(ids, mask)] == [[5, 6], [7, 8, 9]]
    assert [row.tolist() for row in lm.prompt_ids(ids[0], mask[0])] == [[5, 6]]
    assert [row.tolist() for row in lm.prompt_ids(ids[0, :0])] == [lm.begin_token().tolist()]
    with pytest.raises(ValueError, match="attention_mask is for ids in a tensor"):
        lm.prompt_ids(TEXT, mask)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 3\) does not fit prompts of \(2, 2\)"):
        lm.prompt_ids(ids[:, :2], mask)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([5, 99999], "prompt token id 99999 is outside the model's vocabulary"),
        ([[5], [5, -1]], "prompt token id -1 is outside"),
        (torch.tensor([-100, 3]), "prompt token id -100 is outside"),
        (np.array([2**40]), "prompt token id 1099511627776 is outside"),
        ([5, 2**70], "must be whole numbers"),
        ([5, "a"], "must be whole numbers"),
        ([5, 1.5], "must be whole numbers"),
        (torch.tensor([1.0, 2.0]), "must be whole numbers"),
        (torch.tensor([True]), "must be whole numbers"),
        (np.array([1.5]), "must be whole numbers"),
        (torch.zeros(1, 1, 3, dtype=torch.long), r"have shape \(1, 1, 3\)"),
        (torch.tensor(5), r"have shape \(\)"),
        ([torch.zeros(2, 2, dtype=torch.long)], "must be whole numbers in a row"),
        (5, "prompts 5 must be text, token ids"),
        (None, "prompts None must be text"),
        (b"abc", "prompts b'abc' must be text"),
        ({"role": "user", "content": "a"}, "prompts {'role': 'user', 'content': 'a'} must be"),
        (UserDict(input_ids=[[5]]), "must be text, token ids"),
        ([1.5], "prompt 1.5 must be text"),
        ([None], "prompt None must be text"),
        ([["a", "b"]], r"prompt \['a', 'b'\] must be text"),
        ([], "prompts is empty"),
        (torch.zeros(0, 3, dtype=torch.long), "prompts is empty"),
    ],
)
def test_what_is_no_prompt_is_named_in_a_line(prompts: Any, message: str, lm: unmask.DiffusionLM) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        lm.generate(prompts, max_new_tokens=2)
    assert "\n" not in str(raised.value)


# --- numpy's integers


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_integers_to_every_decoder(kind: type, lm: unmask.DiffusionLM) -> None:
    n, four = kind(6), kind(4)
    for options in (
        {"mode": "ar"},
        {"mode": "diffusion", "block_size": 4, "max_denoising_steps": 2, "top_k": 5},
        {"mode": "diffusion", "window": 3},
        {"mode": "diffusion", "batch_size": 1},
    ):
        given = {name: kind(value) if isinstance(value, int) else value for name, value in options.items()}
        plain = lm.generate([TEXT, TEXT], max_new_tokens=6, seed=4, temperature=0.8, **options)
        ours = lm.generate([TEXT, TEXT], max_new_tokens=n, seed=four, temperature=np.float32(0.8), **given)
        assert torch.equal(ours.sequences, plain.sequences)
    filled = [
        lm.infill("Once", "cat", m, seed=4, num_samples=s) for m, s in (([2, 3], 2), ([kind(2), kind(3)], kind(2)))
    ]
    assert torch.equal(filled[0].sequences, filled[1].sequences)
    assert torch.equal(lm.infill("Once", "cat", kind(2)).sequences, lm.infill("Once", "cat", 2).sequences)
    a, b = (lm.nelbo(TEXT, num_samples=s, seed=4, block_size=z) for s, z in ((2, 4), (kind(2), four)))
    assert a == b


def test_numbers_of_numpy_are_settings(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    plain = {"max_tokens": 200, "max_length": 32, "block_size": 4, "batch_size": 2, "learning_rate": 1e-3, "seed": 3}
    given = {name: (np.int64 if isinstance(v, int) else np.float64)(v) for name, v in plain.items()}
    for options in (plain, given):
        run = tmp_path / ("plain" if options is plain else "numpy")
        unmask.adapt(tokenizer_and_model, stories, "tri-mode", run, show_progress=False, random_offset=np.bool_(True),
                     **options)  # fmt: skip
    a, b = (json.loads((tmp_path / run / "run.json").read_text())["settings"] for run in ("plain", "numpy"))
    assert a == b
    assert type(load_recipe("tri-mode", block_size=np.int64(4)).block_size) is int
    assert type(load_recipe("tri-mode", learning_rate=np.float32(0.5)).learning_rate) is float
    assert type(load_recipe("tri-mode", learning_rate=np.int64(1)).learning_rate) is float
    for wrong in (np.float64(4), np.bool_(True), np.str_("4")):
        with pytest.raises(ValueError, match=r"block_size=.* has the wrong type"):
            load_recipe("tri-mode", block_size=wrong)


def test_a_request_takes_them(lm: unmask.DiffusionLM) -> None:
    decoder = lm.decoder("ar")
    row = lm.prompt_ids(TEXT)
    a, b = (
        decoder(lm.network, lm.diffusion, row, Request(n, temperature=1.0, seed=s, end_token_ids=ends))
        for n, s, ends in ((4, 1, [9]), (np.int64(4), np.int64(1), np.array([9])))
    )
    assert a.new_tokens == b.new_tokens


def test_every_decoder_rule_and_measurement_keeps_plain_numbers() -> None:
    """A scalar of numpy would overflow at its width, and JSON does not hold it."""
    kinds = [kind for kind in vars(unmask.sampling).values() if isinstance(kind, type) and is_dataclass(kind)]
    examined = 0
    for kind in [*kinds, Sweep, DrafterConfig]:
        numbers = {entry.name: entry.default for entry in fields(kind) if type(entry.default) in (int, float)}
        others = {
            entry.name: () for entry in fields(kind) if entry.default is MISSING and entry.default_factory is MISSING
        }
        if kind is SampledTokens or not numbers:
            continue
        others |= {"max_new_tokens": np.uint8(9)} if "max_new_tokens" in others else {}
        made = kind(**others, **{name: (np.int64 if type(v) is int else np.float32)(v) for name, v in numbers.items()})
        examined += 1
        assert all(type(getattr(made, name)) is type(value) for name, value in numbers.items()), kind
    assert examined > 8
    assert type(unmask.sampling.Blocks(block_size=np.uint8(4)).block_size) is int
    assert type(Sweep(rules=(), batch_sizes=(np.int64(4),)).batch_sizes[0]) is int
