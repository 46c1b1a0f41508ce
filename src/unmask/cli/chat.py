"""The command chat: a conversation on standard input, its answers streamed, and words that begin with / about it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from unmask.cli.app import app, name_of
from unmask.cli.options import DECODER, LOADING, SAMPLING, mode_of, opened, packed, takes_options
from unmask.progress import say
from unmask.tables import tokens_in_forwards

_HELP = """/help        these words
/mode NAME   decode otherwise: {modes}; without NAME, the mode of now
/stats       tokens, forwards and seconds of the last answer and of all
/reset       forget the conversation
/exit        end it, as Ctrl-D does; Ctrl-C ends an answer"""


@app.command(epilog="Example: unmask chat runs/q --confidence-threshold 0.8")
@takes_options(*DECODER, *SAMPLING, *LOADING)
def chat(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id of a model with a chat template."))],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile decoding: a slow first answer, faster ones on a GPU.")
    ] = False,
    *,
    loading: dict[str, Any],
    decoder: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk to a fine-tuned model; /help lists what can be asked beside that, /exit ends it."""
    from unmask.data.supervised import check_template

    lm = opened(model, loading, mode_of(decoder))
    check_template(lm.tokenizer)
    packed(lm)
    talk = _Talk(lm, lm.decoder(**decoder), decoder, sampling | {"max_new_tokens": max_new_tokens})
    if compiled:
        lm.compile()
    say("/help lists commands, /exit ends, Ctrl-C ends an answer")
    while (line := _ask("> ")) is not None and line != "/exit":
        if line.startswith("/"):
            talk.command(*line[1:].split(maxsplit=1))
        elif line:
            talk.answer(line)


@dataclass
class _Talk:
    """A conversation. decoder: options of the first mode. counts: tokens, forwards and seconds of each answer."""

    lm: Any
    chosen: Any
    decoder: dict[str, Any]
    sampling: dict[str, Any]
    messages: list[dict[str, str]] = field(default_factory=list)
    counts: list[tuple[int, int, float]] = field(default_factory=list)

    def answer(self, line: str) -> None:
        """Stream the answer to a line, as far as Ctrl-C lets it come, and remember both."""
        asked, shown = [*self.messages, {"role": "user", "content": line}], []

        def show(piece: str) -> None:
            shown.append(piece)
            print(piece, end="", flush=True)

        began = time.perf_counter()
        try:
            live = self.lm.live_text(self.lm.prompt_ids(asked)[0], show, self.sampling.get("stop_strings"))
            with _interruptible(live) as callback:
                out = self.lm.generate(asked, self.chosen, callback=callback, **self.sampling)
        except _StoppedError:
            say("(stopped)")
        except ValueError as error:  # too long by now, or a template that refuses: the conversation can go on
            print(f"unmask: {' '.join(str(error).split())} (/reset begins anew)", file=sys.stderr)
            return
        else:
            show(live.rest(out.texts[0]))
            self.counts.append((int(out.num_new_tokens[0]), int(out.num_forwards[0]), time.perf_counter() - began))
        print(flush=True)
        self.messages = [*asked, {"role": "assistant", "content": "".join(shown).strip()}]

    def command(self, name: str = "", value: str | None = None) -> None:
        """Do what a word after / asks for."""
        commands: dict[str, Callable[[str | None], None]] = {
            "help": self._help, "mode": self._mode, "stats": self._stats, "reset": self._reset,
        }  # fmt: skip
        if name not in commands:
            say(f"/{name} is unknown: /help lists what there is")
            return
        commands[name](value)

    def _help(self, _: str | None) -> None:
        for line in _HELP.format(modes="ar, diffusion, speculative").splitlines():
            say(line)

    def _mode(self, name: str | None) -> None:
        if name is not None:
            try:
                self.chosen = self.lm.decoder(**self.decoder | {"mode": name})
            except ValueError as error:
                say(" ".join(str(error).split()))
                return
        say(f"mode {type(self.chosen).__name__}: {self.chosen}")

    def _stats(self, _: str | None) -> None:
        for name, counts in (("last answer", self.counts[-1:]), ("all answers", self.counts)):
            tokens, forwards, seconds = (sum(column) for column in zip((0, 0, 0.0), *counts, strict=True))
            rate, speed = tokens / max(1, forwards), tokens / max(seconds, 1e-9)
            say(f"{name}: {tokens_in_forwards(tokens, forwards)} ({rate:.2f} per forward), {speed:.1f} tokens/s")

    def _reset(self, _: str | None) -> None:
        self.messages.clear()


class _StoppedError(Exception):
    """Ctrl-C, while an answer is written."""


@contextmanager
def _interruptible(callback: Callable[..., None]) -> Iterator[Callable[..., None]]:
    """Within the context Ctrl-C ends the answer at its next token: no pass of the model is left half done."""
    stopped = threading.Event()

    def call(row: int, positions: list[int], tokens: list[int]) -> None:
        if stopped.is_set():
            raise _StoppedError
        callback(row, positions, tokens)

    if threading.current_thread() is not threading.main_thread():
        yield call
        return
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield call
    finally:
        signal.signal(signal.SIGINT, before)


def _ask(sign: str) -> str | None:
    """A line from standard input, without white space around it; None at its end. Ctrl-C asks again."""
    while True:
        try:
            return (input(sign) if sys.stdin.isatty() else input()).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            say("", "/exit or Ctrl-D ends the conversation")
