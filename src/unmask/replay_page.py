"""How a text was denoised, as a page that replays it: in a file, or in a notebook.

The page is one file that loads nothing, so it works from file:// and as an attachment. Text reaches it as JSON in
which no character can end the script, and is only ever shown as text.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from unmask.model import DiffusionLM
from unmask.outputs import SampleOutput
from unmask.plain_json import to_json
from unmask.sampling import Guess, Step, Trace


@dataclass(frozen=True, repr=False)
class Replay:
    """What `replay` returns: in a notebook it shows how the text came about.

    output: as of `generate`. page: the HTML of the replay.
    """

    output: SampleOutput
    page: str

    def __repr__(self) -> str:
        return f"Replay({self.output!r})"

    def _repr_html_(self) -> str:
        style = "width: 100%; height: 32em; border: 1px solid #8888; border-radius: 6px"
        return f'<iframe style="{style}" sandbox="allow-scripts" srcdoc="{html.escape(self.page)}"></iframe>'

    def save(self, path: str | Path) -> Path:
        """Write the page to a file; ValueError for one that does not end in .html, or is there and no replay."""
        path = Path(path)
        check_page(path)
        path.write_text(self.page, encoding="utf-8")
        return path


_OF_REQUEST = ("max_new_tokens", "temperature", "top_p", "top_k", "stop_strings", "seed", "callback", "constraint")
"""Options of `generate` that are not of a decoder."""


def replay(lm: DiffusionLM, prompt: str, mode: Any = None, **options: Any) -> Replay:
    """Continue one prompt, and keep how: `lm.generate(prompt, mode, **options)`, whose text is the same.

    In a notebook the result replays itself; `save` writes its page.
    """
    of_request = {name: options.pop(name) for name in _OF_REQUEST if name in options}
    decoder: Any = lm.decoder(mode, **options)
    trace = Trace(getattr(decoder, "select", None), callback=of_request.pop("callback", None))
    if hasattr(decoder, "select"):
        decoder = replace(decoder, select=trace.select)
    given = lm.prompt_ids(prompt)
    if len(given) != 1:
        raise ValueError(f"a replay is of one prompt, not of {len(given)}: give a text")
    output = lm.generate(prompt, decoder, callback=trace.callback, **of_request)
    ids, number = given[0].tolist(), int(output.num_new_tokens[0])
    new = output.sequences[0, len(ids) : len(ids) + number].tolist()
    page = replay_page(
        lm.tokenizer, ids, new, trace.steps, title=Path(str(lm.model.config._name_or_path)).name,
        summary=summary(output),
        prompt_text=prompt if isinstance(prompt, str) else None,
    )  # fmt: skip
    return Replay(output, page)


def summary(output: SampleOutput) -> str:
    """The counts of the one row of an output, in words."""
    return (
        f"{int(output.num_new_tokens[0])} tokens in {int(output.num_forwards[0])} forwards "
        f"({float(output.tokens_per_forward[0]):.2f} per forward)"
    )


def replay_page(
    tokenizer: Any,
    prompt: Sequence[int],
    new: Sequence[int],
    steps: Sequence[Step],
    *,
    title: str,
    summary: str,
    prompt_text: str | None = None,
) -> str:
    """The page, HTML, of one row: its prompt and new token ids, and the steps that a `Trace` recorded of it."""
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
    return head + _OPEN + _safe_json(data) + _CLOSE + tail


def write_replay(path: str | Path, *row: Any, **words: Any) -> Path:
    """Write `replay_page` of a row to a file."""
    Path(path).write_text(replay_page(*row, **words), encoding="utf-8")
    return Path(path)


_OPEN, _CLOSE = '<script type="application/json" id="data">', "</script>"
_PLACE = f"{_OPEN}{{}}{_CLOSE}"


def check_page(path: Path) -> None:
    """Raise ValueError for a name that no browser opens as a page, and for a file that is none of ours."""
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"{str(path)!r} names no page: let it end in .html")
    if path.is_file() and path.stat().st_size and _OPEN not in path.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{str(path)!r} is a file that is no replay, and would be lost: name another")


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


def _safe_json(data: Any) -> str:
    """JSON in which no string can end the script element that holds it."""
    text = to_json(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _rounded(p: float | None) -> float | None:
    return None if p is None else round(p, 4)
