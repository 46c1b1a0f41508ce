"""How a text is denoised, live on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from unmask.replay_page import guess_piece, token_pieces
from unmask.sampling import Step

_FRAME_SECONDS = 0.04
"""How long a terminal shows a step at least: small models are faster than eyes."""


@contextmanager
def watching(tokenizer: Any, prompt: Sequence[int], prompt_text: str, *, show: bool) -> Iterator[Watch | None]:
    """A `Watch` on the terminal, or None where nothing is to be shown."""
    if not show:
        yield None
        return
    from rich.live import Live

    with Live(auto_refresh=False, vertical_overflow="visible") as live:
        yield Watch(tokenizer, prompt, prompt_text, live)


class Watch:
    """Shows a row on a terminal while it is denoised; called with each `Step`.

    Colour: confidence at commit, from orange (unsure) to blue (sure). Bold: just committed. Grey: guesses for
    positions that are still masked.
    """

    _COLOURS = ("#d55e00", "#e69f00", "#56b4e9", "#0072b2")

    def __init__(self, tokenizer: Any, prompt: Sequence[int], prompt_text: str, live: Any) -> None:
        self.tokenizer, self.prompt, self.prompt_text, self.live = tokenizer, list(prompt), prompt_text, live
        self.committed: dict[int, tuple[str, float | None]] = {}

    def __call__(self, step: Step) -> None:
        piece = partial(guess_piece, self.tokenizer, after=self.prompt[-1])
        self.committed |= {position: (piece(token), p) for position, token, p in step.commits}
        self._show({at for at, _, _ in step.commits}, {at: piece(token) for at, token, _ in step.guesses})
        time.sleep(_FRAME_SECONDS)

    def finish(self, new: Sequence[int]) -> None:
        """Show what the row kept, and nothing after it."""
        pieces = enumerate(token_pieces(self.tokenizer, self.prompt, new), len(self.prompt))
        self.committed = {at: (piece, self.committed.get(at, ("", None))[1]) for at, piece in pieces}
        self._show(set(), {})

    def _show(self, just: set[int], guessed: dict[int, str]) -> None:
        from rich.text import Text

        text = Text(self.prompt_text, style="dim")
        for at in range(len(self.prompt), max([*self.committed, *guessed], default=-1) + 1):
            piece, p = self.committed.get(at, (guessed.get(at, "·"), None))
            if at not in self.committed:
                text.append(piece, style="dim italic")
            elif p is None:
                text.append(piece, style="bold" if at in just else "not dim")
            else:
                text.append(piece, style=f"not dim {'bold ' if at in just else ''}{self._COLOURS[min(3, int(4 * p))]}")
        self.live.update(text, refresh=True)
