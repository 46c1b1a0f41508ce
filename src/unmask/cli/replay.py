"""How a text was denoised: a page that replays it, and the same live in a terminal.

The page is one file that loads nothing, so it works from file:// and as an attachment. Text reaches it as JSON in
which no character can end the script, and is only ever shown as text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from unmask.plain_json import to_json
from unmask.sampling import Guess, Step

_FRAME_SECONDS = 0.04
"""How long a terminal shows a step at least: small models are faster than eyes."""


def token_pieces(tokenizer: Any, prompt: Sequence[int], new: Sequence[int]) -> list[str]:
    """The text that each new token adds, special tokens too; a character of several tokens belongs to the last."""
    pieces, before = [], tokenizer.decode(list(prompt))
    for i in range(len(new)):
        whole = tokenizer.decode([*prompt, *new[: i + 1]])
        if not whole.startswith(before):
            pieces.append(tokenizer.decode([new[i]]))
        elif whole.endswith("\ufffd") and i + 1 < len(new):
            pieces.append("")
            continue
        else:
            pieces.append(whole[len(before) :])
        before = whole
    return pieces


def guess_piece(tokenizer: Any, token: int, after: int) -> str:
    """The text of a token after another one, with the space between words."""
    before, both = tokenizer.decode([after]), tokenizer.decode([after, token])
    return str(both[len(before) :] if both.startswith(before) else tokenizer.decode([token]))


def write_replay(
    path: str | Path,
    tokenizer: Any,
    prompt: Sequence[int],
    new: Sequence[int],
    steps: Sequence[Step],
    *,
    title: str,
    summary: str,
    prompt_text: str | None = None,
) -> Path:
    """The page of one row: its prompt and new token ids, and the steps that a `Trace` recorded of it."""
    first, last = len(prompt), prompt[-1]
    piece = cache(partial(guess_piece, tokenizer, after=last))

    def inside(guesses: Sequence[Guess]) -> list[Guess]:
        return [g._replace(position=g.position - first) for g in guesses if g.position - first < len(new)]

    frames = [
        {
            "number": step.number,
            "commits": [[at, _rounded(p)] for at, _, p in inside(step.commits)],
            "guesses": [[at, piece(token), _rounded(p)] for at, token, p in inside(step.guesses)],
        }
        for step in steps
    ]
    data = {
        "title": title,
        "summary": summary,
        "prompt": tokenizer.decode(list(prompt), skip_special_tokens=True) if prompt_text is None else prompt_text,
        "tokens": token_pieces(tokenizer, prompt, new),
        "steps": [frame for frame in frames if frame["commits"]],
    }
    page = (files("unmask") / "replay.html").read_text(encoding="utf-8")
    head, place, tail = page.partition(_PLACE)
    assert place
    path = Path(path)
    path.write_text(head + _OPEN + _safe_json(data) + _CLOSE + tail, encoding="utf-8")
    return path


_OPEN, _CLOSE = '<script type="application/json" id="data">', "</script>"
_PLACE = f"{_OPEN}{{}}{_CLOSE}"


def check_page(path: Path) -> None:
    """Raise ValueError for a name that no browser opens as a page, and for a file that is none of ours."""
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--replay {str(path)!r} names no page: let it end in .html")
    if path.is_file() and path.stat().st_size and _OPEN not in path.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"--replay {str(path)!r} is a file that is no replay, and would be lost: name another")


def _safe_json(data: Any) -> str:
    """JSON in which no string can end the script element that holds it."""
    text = to_json(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _rounded(p: float | None) -> float | None:
    return None if p is None else round(p, 4)


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
