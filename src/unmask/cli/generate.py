"""Commands that write text: generate, infill."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Json, app, name_of
from unmask.cli.options import CONSTRAINT, DECODER, LOADING, SAMPLING, mode_of, opened, packed, takes_options
from unmask.plain_json import to_json
from unmask.progress import say
from unmask.tables import tokens_in_forwards


@app.command(epilog='Example: unmask generate runs/q "Once upon a time" --max-new-tokens 64 --confidence-threshold 0.8')
@takes_options(*DECODER, *SAMPLING, *CONSTRAINT, *LOADING)
def generate(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id."))],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 128,
    replay: Annotated[
        Path | None, typer.Option(help="Write a page (.html) that replays how the text was denoised.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show on the terminal how the text is denoised, coloured by confidence.")
    ] = False,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
    decoder: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Continue a prompt."""
    if watch and as_json:
        raise ValueError("--watch draws where --json prints: leave one of them out")
    if watch and not sys.stdout.isatty():
        raise ValueError("--watch draws on a terminal, and standard output is none: leave it out, or use --replay FILE")
    text = sys.stdin.read().removeprefix("\ufeff") if prompt == "-" else prompt

    from unmask.cli.watch import watching
    from unmask.outputs import summary
    from unmask.replaying import Replay, page_of, text_beside
    from unmask.sampling import Trace

    _check_replay(replay)
    lm = opened(model, loading, mode_of(decoder))
    packed(lm)
    chosen: Any = lm.decoder(**decoder)
    given = lm.prompt_ids(text)[0].tolist()
    live: Any = _went_on
    if watch:
        say()
    if sys.stdout.isatty() and not (as_json or watch):
        say()
        _write(text)
        live = lm.live_text(lm.prompt_ids(text)[0], _write, sampling.get("stop_strings"))
    trace = None
    with watching(lm.tokenizer, given, text, show=watch) as watcher:
        if watcher is not None or replay is not None:
            trace = Trace(getattr(chosen, "select", None), on_step=watcher, callback=live)
            if hasattr(chosen, "select"):
                chosen = replace(chosen, select=trace.select)
        callback, began = live if trace is None else trace.callback, time.perf_counter()
        out = lm.generate(text, chosen, max_new_tokens=max_new_tokens, callback=callback, **sampling)
        seconds = time.perf_counter() - began
        if watcher is not None:
            watcher.finish(out.new_tokens(0, len(given)))
    if as_json:
        print(to_json({"text": out.texts[0], "mode": decoder.get("mode", lm.default_mode), **_counts(out)}))
    else:
        if watcher is None:
            print(text + out.texts[0] if live is _went_on else live.rest(out.texts[0]), flush=True)
        say(summary(out))
        if float(out.tokens_per_forward[0]) <= 1 < int(out.num_new_tokens[0]):
            say(_how_to_get_more(lm, decoder))
    if replay is not None and trace is not None:
        request = {"max_new_tokens": max_new_tokens, **sampling}
        beside = text_beside(lm, text, chosen, _parent(lm, model), **request)
        page = page_of(lm, text, chosen, out, trace.steps, seconds, beside, request)
        Replay(out, page).save(replay)
        say(f"replay in {replay}")


def _check_replay(page: Path | None) -> None:
    from unmask.replay_page import check_page

    if page is None:
        return
    if page.is_dir() or not page.parent.is_dir():
        raise ValueError(f"--replay {str(page)!r} is no file in a folder that exists: name one such as replay.html")
    check_page(page)


def _parent(lm: Any, model: str) -> Any:
    """The AR parent of a model whose own AR mode is none, where its folder names one that is on this machine."""
    from unmask.conversion.run_record import parent_in
    from unmask.loading import load

    if lm.diffusion is None or lm.diffusion.serves_ar:
        return None
    name = parent_in(Path(model))
    return load(name) if name and Path(name).is_dir() else None


def _how_to_get_more(lm: Any, decoder: dict[str, Any]) -> str:
    """What would make more than one token a forward."""
    if lm.diffusion is None:
        return "one token a forward, as AR models write: `unmask adapt` turns this one into one that writes several"
    mode = decoder.get("mode", lm.default_mode)
    if mode == "ar":
        return f"one token a forward, as --mode ar asks: without it, the mode is {lm.default_mode}"
    if mode == "speculative":
        return "no draft was accepted: train longer, or try --mode diffusion, whose text is another"
    threshold = decoder.get("confidence_threshold", 0.9)
    return f"no second token of a forward was surer than {threshold}: a lower --confidence-threshold commits more"


def _counts(out: Any) -> dict[str, Any]:
    """What --json says of the one row of a `SampleOutput`."""
    counts = {
        "num_new_tokens": int(out.num_new_tokens[0]),
        "num_forwards": int(out.num_forwards[0]),
        "num_prefill_forwards": int(out.num_prefill_forwards[0]),
        "tokens_per_forward": round(float(out.tokens_per_forward[0]), 4),
    }
    if out.num_forced is not None:
        counts["num_forced"] = int(out.num_forced[0])
    cycles = out.tokens_per_cycle
    return counts if cycles is None else counts | {"tokens_per_cycle": round(float(cycles[0]), 4)}


def _went_on(_row: int, _positions: list[int], _tokens: list[int]) -> None:
    """The first commit: nothing was refused."""
    say()


def _write(text: str) -> None:
    print(text, end="", flush=True)


@app.command(epilog='Example: unmask infill runs/d --text "Tom had<gap:8> dog. They were<gap:4> friends."')
@takes_options("block_size", "max_denoising_steps", "confidence_threshold", "guidance_scale", *SAMPLING, *LOADING)
def infill(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id of a converted model."))],
    text: Annotated[
        str | None, typer.Option(help="A text with gaps, such as <gap:8> of 8 tokens or <gap:4,8> of 4 or 8.")
    ] = None,
    prefix: Annotated[str | None, typer.Option(help="Instead of --text: the text before the only gap.")] = None,
    suffix: Annotated[str | None, typer.Option(help="The text after it.")] = None,
    num_tokens: Annotated[
        list[int] | None,
        typer.Option(help="Tokens in it; repeated, candidate lengths to choose from by the bound."),
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="bidirectional: let a block-wise model see the whole suffix.")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option(help="Forwards that score a candidate length, by default 8.")
    ] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Write a page (.html) that replays how the gaps were filled.")
    ] = None,
    as_json: Json = False,
    *,
    loading: dict[str, Any],
    decoder: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Fill the gaps of a text, or the one between a prefix and a suffix."""
    given = {"--prefix": prefix, "--suffix": suffix, "--num-tokens": num_tokens or None}
    if text is not None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} {value!r} stands beside --text, which says where its gaps are: leave it out")
    missing = [name for name, value in given.items() if value is None]
    if text is None and missing:
        raise ValueError(f"{missing[0]} is missing: give --text with gaps, or --prefix, --suffix and --num-tokens")

    from unmask.replaying import replay_infill

    _check_replay(replay)
    lm = opened(model, loading, "infill")
    asked: dict[str, Any] = {"prefix": text}
    if num_tokens:
        asked = {
            "prefix": prefix,
            "suffix": suffix,
            "num_tokens": num_tokens[0] if len(num_tokens) == 1 else num_tokens,
        }
    asked |= {"attention": attention, "num_samples": num_samples, **decoder, **sampling}
    if replay is None:
        out = lm.infill(**asked)
    else:
        replayed = replay_infill(lm, **asked)
        out = replayed.output
        replayed.save(replay)
    assert out.filled is not None
    assert out.fills is not None
    if as_json:
        around = {} if prefix is None else {"prefix": prefix, "suffix": suffix}
        print(to_json({"text": out.texts[0], **around, "fills": out.fills[0], "filled": out.filled[0], **_counts(out)}))
    else:
        print(out.filled[0])
        say(tokens_in_forwards(int(out.num_new_tokens[0]), int(out.num_forwards[0])))
    if replay is not None:
        say(f"replay in {replay}")
