"""Commands that write text: generate, chat, infill."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Base, Json, TrustRemoteCode, app, name_of
from unmask.cli.options import CONSTRAINT, DECODER, SAMPLING, takes_decoding
from unmask.plain_json import to_json


@app.command(epilog='Example: unmask generate runs/q "Once upon a time" --max-new-tokens 64 --confidence-threshold 0.8')
@takes_decoding(*DECODER, *SAMPLING, *CONSTRAINT)
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
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    *,
    decoder: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Continue a prompt."""
    if watch and as_json:
        raise ValueError("--watch draws where --json prints: leave one of them out")
    if replay is not None and (replay.is_dir() or not replay.parent.is_dir()):
        raise ValueError(f"--replay {str(replay)!r} is no file in a folder that exists: name one such as replay.html")
    if watch and not sys.stdout.isatty():
        raise ValueError("--watch draws on a terminal, and standard output is none: leave it out, or use --replay FILE")
    text = sys.stdin.read().removeprefix("\ufeff") if prompt == "-" else prompt

    import unmask
    from unmask.cli.replay import check_page, watching, write_replay
    from unmask.sampling import Trace

    if replay is not None:
        check_page(replay)

    lm = unmask.load(model, base=base, trust_remote_code=trust_remote_code)
    _pack(lm)
    chosen: Any = lm.decoder(**decoder)
    given = lm.prompt_ids(text)[0].tolist()
    live = None
    if sys.stdout.isatty() and not (as_json or watch):
        _write(text)
        live = lm.live_text(lm.prompt_ids(text)[0], _write, sampling.get("stop_strings"))
    trace = None
    with watching(lm.tokenizer, given, text, show=watch) as watcher:
        if watcher is not None or replay is not None:
            trace = Trace(getattr(chosen, "select", None), on_step=watcher, callback=live)
            if hasattr(chosen, "select"):
                chosen = replace(chosen, select=trace.select)
        callback = live if trace is None else trace.callback
        out = lm.generate(text, chosen, max_new_tokens=max_new_tokens, callback=callback, **sampling)
        new = out.sequences[0, len(given) : len(given) + int(out.num_new_tokens[0])].tolist()
        if watcher is not None:
            watcher.finish(new)
    made = (
        f"{int(out.num_new_tokens[0])} tokens in {int(out.num_forwards[0])} forwards "
        f"({float(out.tokens_per_forward[0]):.2f} per forward)"
    )
    if replay is not None and trace is not None:
        write_replay(replay, lm.tokenizer, given, new, trace.steps, title=Path(model).name, summary=made,
                     prompt_text=text)  # fmt: skip
        print(f"replay in {replay}", file=sys.stderr)
    if as_json:
        print(to_json({"text": out.texts[0], "mode": decoder.get("mode", lm.default_mode), **_counts(out)}))
        return
    if watcher is None:
        print(live.rest(out.texts[0]) if live is not None else text + out.texts[0])
    print(made, file=sys.stderr)


@app.command(epilog="Example: unmask chat runs/q --confidence-threshold 0.8")
@takes_decoding(*DECODER, *SAMPLING, *CONSTRAINT)
def chat(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id of a model with a chat template."))],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile decoding: a slow first answer, faster ones on a GPU.")
    ] = False,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    *,
    decoder: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk to a fine-tuned model; /reset forgets the conversation, /exit ends it."""
    import unmask
    from unmask.data.supervised import check_template

    lm = unmask.load(model, base=base, trust_remote_code=trust_remote_code)
    check_template(lm.tokenizer)
    _pack(lm)
    chosen = lm.decoder(**decoder)
    if compiled:
        lm.compile()
    messages: list[dict[str, str]] = []
    while (line := _ask("> ")) is not None:
        if line == "/exit":
            break
        if line == "/reset":
            messages.clear()
        if not line or line == "/reset":
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            live = lm.live_text(lm.prompt_ids(asked)[0], _write, sampling.get("stop_strings"))
            out = lm.generate(asked, chosen, max_new_tokens=max_new_tokens, callback=live, **sampling)
        except ValueError as error:  # too long by now, or a template that refuses: the conversation can go on
            print(f"unmask: {' '.join(str(error).split())} (/reset begins anew)", file=sys.stderr)
            continue
        print(live.rest(out.texts[0]), flush=True)
        messages = [*asked, {"role": "assistant", "content": out.texts[0].strip()}]


def _pack(lm: Any) -> None:
    """Pack the weights on a CPU, where the copy is small beside the memory that is free."""
    import psutil

    num_bytes = sum(p.numel() * p.element_size() for p in lm.model.parameters())
    if 4 * num_bytes < psutil.virtual_memory().available:
        lm.pack()


def _ask(sign: str) -> str | None:
    """A line from standard input, without white space around it; None at its end."""
    try:
        return (input(sign) if sys.stdin.isatty() else input()).strip()
    except EOFError:
        return None


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


def _write(text: str) -> None:
    print(text, end="", flush=True)


@app.command(epilog='Example: unmask infill runs/d --text "Tom had<gap:8> dog. They were<gap:4> friends."')
@takes_decoding("block_size", "max_denoising_steps", "confidence_threshold", "guidance_scale", *SAMPLING)
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
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    *,
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

    import unmask

    lm = unmask.load(model, base=base, trust_remote_code=trust_remote_code)
    asked: dict[str, Any] = {"prefix": text}
    if num_tokens:
        asked = {
            "prefix": prefix,
            "suffix": suffix,
            "num_tokens": num_tokens[0] if len(num_tokens) == 1 else num_tokens,
        }
    out = lm.infill(**asked, attention=attention, num_samples=num_samples, **decoder, **sampling)
    assert out.filled is not None
    assert out.fills is not None
    if as_json:
        around = {} if prefix is None else {"prefix": prefix, "suffix": suffix}
        print(to_json({"text": out.texts[0], **around, "fills": out.fills[0], "filled": out.filled[0], **_counts(out)}))
        return
    print(out.filled[0])
    print(f"{int(out.num_new_tokens[0])} tokens in {int(out.num_forwards[0])} forwards", file=sys.stderr)
