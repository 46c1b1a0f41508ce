"""Commands that write text: generate, chat, infill."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import GuidanceScale, Json, Temperature, TopK, TopP, TrustRemoteCode, app
from unmask.plain_json import to_json


@app.command(epilog='Example: unmask generate runs/q "Once upon a time" --max-new-tokens 64 --confidence-threshold 0.8')
def generate(
    model: Annotated[str, typer.Argument(help="Folder or hub id.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    mode: Annotated[
        str | None, typer.Option(help="diffusion, ar or speculative; by default what the checkpoint is.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.")] = 128,
    block_size: Annotated[int | None, typer.Option(help="Decode in blocks of another size.")] = None,
    max_denoising_steps: Annotated[int | None, typer.Option(help="Forwards per block at most.")] = None,
    confidence_threshold: Annotated[
        float | None, typer.Option(help="Commit tokens of higher probability: 1 is one a forward, 0 a block.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Masked positions of a block that a forward sees; faster, and worse.")
    ] = None,
    draft_length: Annotated[
        str | None, typer.Option(help="Positions drafted at a time in speculative mode, or auto.")
    ] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    guidance_scale: GuidanceScale = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End where this text appears; can be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Write a page (.html) that replays how the text was denoised.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show on the terminal how the text is denoised, coloured by confidence.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt."""
    if watch and as_json:
        raise ValueError("--watch draws where --json prints: leave one of them out")
    if replay is not None and (replay.is_dir() or not replay.parent.is_dir()):
        raise ValueError(f"--replay {str(replay)!r} is no file in a folder that exists: name one such as replay.html")
    text = sys.stdin.read() if prompt == "-" else prompt
    drafted: int | str | None = draft_length
    if draft_length is not None and draft_length.lstrip("-").isdigit():
        drafted = int(draft_length)

    import unmask
    from unmask.cli.replay import watching, write_replay
    from unmask.sampling import Threshold, Trace

    select = None if confidence_threshold is None else Threshold(confidence_threshold)
    lm = unmask.load(model, trust_remote_code=trust_remote_code)
    given = lm._prompt_ids(text, None)[0].tolist()
    live = _Stream(lm, text) if sys.stdout.isatty() and not (as_json or stop or watch) else None
    with watching(lm.tokenizer, given, text, show=watch and sys.stdout.isatty()) as watcher:
        trace = Trace(select, watcher, live) if watcher is not None or replay is not None else None
        out = lm.generate(
            text,
            mode=mode,
            max_new_tokens=max_new_tokens,
            block_size=block_size,
            max_denoising_steps=max_denoising_steps,
            select=select if trace is None else trace.select,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            guidance_scale=guidance_scale,
            stop_strings=stop,
            window=window,
            seed=seed,
            callback=live if trace is None else trace.callback,
            draft_length=drafted,
        )
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
        cycles = {} if out.tokens_per_cycle is None else {"tokens_per_cycle": round(float(out.tokens_per_cycle[0]), 4)}
        print(
            to_json(
                {
                    "text": out.texts[0],
                    "mode": mode or ("ar" if lm.diffusion is None else "diffusion"),
                    **_counts(out),
                    **cycles,
                }
            )
        )
        return
    if watcher is None:
        print(out.texts[0][live.shown :] if live is not None else text + out.texts[0])
    print(made, file=sys.stderr)


@app.command(epilog="Example: unmask chat runs/q --confidence-threshold 0.8")
def chat(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model with a chat template.")],
    mode: Annotated[str | None, typer.Option(help="diffusion or ar; by default what the checkpoint is.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    confidence_threshold: Annotated[
        float | None, typer.Option(help="Commit tokens of higher probability: 1 is one a forward, 0 a block.")
    ] = None,
    temperature: Temperature = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile decoding: a slow first answer, faster ones on a GPU.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a fine-tuned model; /reset forgets the conversation, /exit ends it."""
    import unmask
    from unmask.data.supervised import check_template
    from unmask.sampling import Threshold

    select = None if confidence_threshold is None else Threshold(confidence_threshold)
    lm = unmask.load(model, trust_remote_code=trust_remote_code)
    check_template(lm.tokenizer)
    if compiled:
        lm.compile()
    lm._check_mode(mode or ("ar" if lm.diffusion is None else "diffusion"))
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
            live = _Stream(lm, asked, echo=False)
            out = lm.generate(
                asked,
                mode=mode,
                max_new_tokens=max_new_tokens,
                select=select,
                temperature=temperature,
                seed=seed,
                callback=live,
            )
        except ValueError as error:  # too long by now, or a template that refuses: the conversation can go on
            print(f"unmask: {' '.join(str(error).split())} (/reset begins anew)", file=sys.stderr)
            continue
        print(out.texts[0][live.shown :], flush=True)
        messages = [*asked, {"role": "assistant", "content": out.texts[0].strip()}]


def _ask(sign: str) -> str | None:
    """A line from standard input, without white space around it; None at its end."""
    try:
        return (input(sign) if sys.stdin.isatty() else input()).strip()
    except EOFError:
        return None


def _counts(out: Any) -> dict[str, Any]:
    """What --json tells of the one row of a `SampleOutput`."""
    return {
        "num_new_tokens": int(out.num_new_tokens[0]),
        "num_forwards": int(out.num_forwards[0]),
        "num_prefill_forwards": int(out.num_prefill_forwards[0]),
        "tokens_per_forward": round(float(out.tokens_per_forward[0]), 4),
    }


class _Stream:
    """Writes the text as far as it is final: up to the first position that is still masked."""

    def __init__(self, lm: Any, prompt: Any, echo: bool = True) -> None:
        self.lm, self.shown = lm, 0
        self.prompt = lm._prompt_ids(prompt, None)[0]
        self.tokens: dict[int, int] = {}
        if echo:
            print(prompt, end="", flush=True)

    def __call__(self, _row: int, positions: list[int], tokens: list[int]) -> None:
        self.tokens.update(zip(positions, tokens, strict=True))
        new: list[int] = []
        while len(self.prompt) + len(new) in self.tokens:
            new.append(self.tokens[len(self.prompt) + len(new)])
        text = self.lm.new_text(self.prompt, new)
        if not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[self.shown :], end="", flush=True)
            self.shown = max(self.shown, len(text))


@app.command(
    epilog='Example: unmask infill runs/d --prefix "Tom had a dog." --suffix " They were happy." --num-tokens 16'
)
def infill(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a converted model.")],
    prefix: Annotated[str, typer.Option(help="The text before the gap.")],
    suffix: Annotated[str, typer.Option(help="The text after the gap.")],
    num_tokens: Annotated[
        list[int], typer.Option(help="Tokens in the gap; repeated, candidate lengths to choose from by the bound.")
    ],
    max_denoising_steps: Annotated[
        int | None, typer.Option(help="Forwards at most (per block, if block-wise).")
    ] = None,
    confidence_threshold: Annotated[float | None, typer.Option(help="Commit tokens of higher probability.")] = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    guidance_scale: GuidanceScale = 1.0,
    attention: Annotated[
        str | None, typer.Option(help="bidirectional: let a block-wise model see the whole suffix.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the gap where this text appears.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fill the gap between a prefix and a suffix."""
    import unmask
    from unmask.sampling import Threshold

    lm = unmask.load(model, trust_remote_code=trust_remote_code)
    out = lm.infill(
        prefix,
        suffix,
        num_tokens[0] if len(num_tokens) == 1 else num_tokens,
        max_denoising_steps=max_denoising_steps,
        select=None if confidence_threshold is None else Threshold(confidence_threshold),
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        guidance_scale=guidance_scale,
        attention=attention,
        stop_strings=stop,
        seed=seed,
    )
    if as_json:
        print(
            to_json(
                {
                    "text": out.texts[0],
                    "prefix": prefix,
                    "suffix": suffix,
                    **_counts(out),
                }
            )
        )
        return
    print(prefix + out.texts[0] + suffix)
    print(f"{int(out.num_new_tokens[0])} tokens in {int(out.num_forwards[0])} forwards", file=sys.stderr)
