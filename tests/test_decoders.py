"""Requests and decoders: every option is read by the decoder that is asked, or refused by name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import block_config, network, random_tokens

import unmask
from unmask.cli import options as cli_options
from unmask.sampling import (
    Autoregressive,
    Blocks,
    Confidence,
    Coupled,
    Random,
    Rejection,
    Remask,
    Request,
    Speculative,
    Threshold,
    WholeCanvas,
    choose_decoder,
)
from unmask.sampling.decoders import DECODERS

VALUES: dict[str, Any] = {
    "block_size": 4,
    "max_denoising_steps": 3,
    "select": Random(2),
    "confidence_threshold": 0.01,
    "guidance_scale": 2.0,
    "window": 2,
    "remask": Remask(),
    "draft_length": 2,
    "cycle": "one",
    "acceptance": Rejection(),
}
CHECKPOINTS = {
    "untouched": (None, ("ar",)),
    "block-wise": (block_config(8), ("ar", "diffusion")),
    "bidirectional": (block_config(attention="bidirectional", clean=None, block_size=None), ("ar", "diffusion")),
    "causal": (block_config(4, clean="causal"), ("ar", "diffusion", "speculative")),
}
READ = {
    Autoregressive: set(),
    Blocks: {"block_size", "max_denoising_steps", "select", "confidence_threshold", "guidance_scale", "window"},
    WholeCanvas: {"block_size", "max_denoising_steps", "select", "confidence_threshold", "guidance_scale", "remask"},
    Speculative: {"block_size", "cycle", "draft_length", "acceptance"},
}


def modes() -> Iterator[tuple[str, str]]:
    return ((name, mode) for name, (_, has) in CHECKPOINTS.items() for mode in has)


def test_every_option_has_a_value_here() -> None:
    names = {entry.name for kind in DECODERS for entry in fields(kind)} | {"confidence_threshold"}
    assert names == set(VALUES)
    assert set(cli_options.DECODER) - {"mode"} <= names


@pytest.mark.parametrize(("checkpoint", "mode"), list(modes()))
@pytest.mark.parametrize("name", list(VALUES))
def test_every_pair_of_option_and_mode_is_read_or_refused(checkpoint: str, mode: str, name: str) -> None:
    config = CHECKPOINTS[checkpoint][0]
    kind = type(choose_decoder(mode, config, {}))
    if name in READ[kind]:
        decoder = choose_decoder(mode, config, {name: VALUES[name]})
        assert decoder != choose_decoder(mode, config, {})
        assert type(decoder) is kind
        return
    with pytest.raises(ValueError, match=rf"^{name}=.* is not read by mode '{mode}' \({kind.__name__}\)") as caught:
        choose_decoder(mode, config, {name: VALUES[name]})
    assert "or use mode=" in str(caught.value)


class Reads:
    """A decoder whose fields are counted when they are read."""

    def __init__(self, decoder: Any) -> None:
        self.decoder, self.read = decoder, set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.decoder, name)


@pytest.mark.parametrize(("kind", "config", "options"), [
    (Blocks, block_config(4), {}),
    (WholeCanvas, block_config(attention="bidirectional", clean=None, block_size=None), {}),
    (Speculative, block_config(4, clean="causal"), {"acceptance": Coupled()}),
])  # fmt: skip
def test_a_decoder_reads_each_of_its_fields(kind: Any, config: Any, options: dict[str, Any]) -> None:
    watched = Reads(kind(**options))
    kind.__call__(watched, network(), config, [random_tokens(3)], Request(max_new_tokens=2))
    assert watched.read == {entry.name for entry in fields(kind)}


@pytest.mark.parametrize(
    ("mode", "checkpoint", "options", "message"),
    [
        ("fast", "causal", {}, "mode 'fast' is unknown"),
        ("diffusion", "untouched", {}, "mode 'diffusion' is not available: this is an untouched AR model"),
        ("speculative", "untouched", {}, "this checkpoint has no drafter"),
        ("speculative", "block-wise", {}, "its cache is not the AR model's"),
        ("speculative", "untouched", {"select": Random()}, "this checkpoint has no drafter"),
        (Blocks(), "bidirectional", {}, "Blocks needs a block-wise checkpoint"),
        (WholeCanvas(), "causal", {}, "WholeCanvas needs a bidirectional checkpoint"),
        (Blocks(), "causal", {"block_size": 4}, r"block_size=4 stands beside a decoder: .* Blocks\(block_size=...\)"),
        (Speculative(), "causal", {"window": 4}, "window=4 is not read by Speculative"),
        (
            Threshold(),
            "causal",
            {},
            r"mode Threshold\(.*\) is no decoder: .* Autoregressive, Blocks, Whole",
        ),
        ("diffusion", "causal", {"windw": 4}, "option windw=4 is unknown: did you mean 'window'"),
        ("diffusion", "causal", {"zzz": 4}, "option zzz=4 is unknown: options of decoders are"),
        ("diffusion", "causal", {"select": Confidence(2), "confidence_threshold": 0.5}, "leave one of them out"),
        ("diffusion", "causal", {"confidence_threshold": 1.5}, "confidence_threshold 1.5 must lie"),
        ("diffusion", "causal", {"block_size": -3}, "block_size -3 must be at least 1"),
        ("diffusion", "causal", {"max_denoising_steps": -5}, "max_denoising_steps -5 must be at least 1"),
        ("diffusion", "causal", {"guidance_scale": -1}, "guidance_scale -1 must be finite"),
        ("speculative", "causal", {"draft_length": 0}, "draft_length 0 must be at least 1"),
        ("speculative", "causal", {"draft_length": "many"}, "draft_length 'many' must be a number"),
    ],
)
def test_bad_choices_are_named(mode: Any, checkpoint: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_decoder(mode, CHECKPOINTS[checkpoint][0], options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0 must"),
        ({"batch_size": 0}, "batch_size 0 must"),
        ({"temperature": -1.0}, "temperature -1.0 must"),
        ({"top_p": 0.0}, "top_p 0.0 must"),
        ({"top_k": 0}, "top_k 0 must"),
    ],
)
def test_bad_requests_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**({"max_new_tokens": 4} | options))


def test_a_decoder_and_a_mode_with_options_write_the_same(converted: Path) -> None:
    lm = unmask.load(converted)
    short = lm.generate("Once", max_new_tokens=9, confidence_threshold=0.02)
    for same in (
        lm.generate("Once", max_new_tokens=9, select=Threshold(0.02)),
        lm.generate("Once", Blocks(select=Threshold(0.02)), max_new_tokens=9),
    ):
        assert same.texts == short.texts
        assert same.num_forwards.tolist() == short.num_forwards.tolist()
    assert lm.infill("a", "b", 3, Blocks()).texts == lm.infill("a", "b", 3).texts
    with pytest.raises(ValueError, match="mode 'ar' cannot see a suffix"):
        lm.infill("a", "b", 3, "ar")
    with pytest.raises(ValueError, match="num_samples=4 compares candidate lengths"):
        lm.infill("a", "b", 3, num_samples=4)


@pytest.mark.parametrize(
    ("command", "option"),
    list(
        itertools.chain(
            *(
                [(command, ("--mode", "ar", f"--{name.replace('_', '-')}", VALUES[name]))
                 for name in cli_options.DECODER if name != "mode"]
                for command in ("generate", "chat")
            )
        )
    ),
)  # fmt: skip
def test_commands_refuse_what_the_mode_does_not_read(
    command: str, option: tuple[Any, ...], converted: Path, monkeypatch: Any, capsys: Any
) -> None:
    from unmask.cli import main

    words = {"generate": ("generate", converted, "Once"), "chat": ("chat", converted)}[command]
    monkeypatch.setattr("sys.argv", ["unmask", *map(str, words), *map(str, option)])
    monkeypatch.setattr("sys.stdin", iter(()))
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    if command == "generate":
        name = option[2][2:].replace("-", "_")
        assert f"{name}=" in error
        assert "is not read by mode 'ar'" in error
    assert json.dumps(error).count("\\n") == 1
