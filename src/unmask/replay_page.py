"""The page that replays how a text was denoised: HTML that loads nothing.

It works from file://, as an attachment and in a notebook. Text reaches it as JSON in which no character can end the
script, and is only ever shown as text; without scripts the page shows the text as it ended.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from unmask.plain_json import to_json
from unmask.run_folder import check_can_be_written
from unmask.sampling import Guess, Step, Threshold


class Beside(NamedTuple):
    """Another text of the same prompt: who wrote it, what each of its tokens adds, and what there is to say of it.

    It is shown as written from left to right, a token a forward.
    """

    name: str
    pieces: Sequence[str]
    facts: Mapping[str, str]


class Gap(NamedTuple):
    """New tokens side by side. before: the ids of all that stands before them. new: their ids.

    start: the position of the first while the row was decoded. behind: the given text up to the next gap or the end.
    """

    before: Sequence[int]
    new: Sequence[int]
    start: int
    behind: str = ""


def replay_page(
    tokenizer: Any,
    gaps: Sequence[Gap],
    steps: Sequence[Step],
    *,
    title: str,
    facts: Mapping[str, str],
    prompt_text: str | None = None,
    beside: Beside | None = None,
) -> str:
    """The page, HTML, of one row: where it has new tokens, and the steps that a `Trace` recorded of it.

    gaps: at least one; what stands before the first is the prompt, and a prompt that is continued has no other gap.
    facts: name -> value of what is said above the text, such as the mode. beside: a text to compare with.
    """
    if prompt_text is None:
        prompt_text = tokenizer.decode(list(gaps[0].before), skip_special_tokens=True)
    pieces = [token_pieces(tokenizer, gap.before, gap.new) for gap in gaps]
    ends = itertools.accumulate(map(len, pieces))
    frames, words = _frames(tokenizer, gaps, steps)
    data = {
        "title": title,
        "facts": list(facts.items()),
        "prompt": prompt_text,
        "tokens": [piece for of_gap in pieces for piece in of_gap],
        "given": [[end, gap.behind] for end, gap in zip(ends, gaps, strict=True) if gap.behind],
        "words": words,
        "steps": frames,
        "beside": None if beside is None else beside._asdict() | {"facts": list(beside.facts.items())},
    }
    page = (files("unmask") / "replay.html").read_text(encoding="utf-8")
    shown = "".join(html.escape("".join(of_gap) + gap.behind) for of_gap, gap in zip(pieces, gaps, strict=True))
    page = page.replace("<!--prompt-->", html.escape(prompt_text)).replace("<!--new-->", shown)
    head, place, tail = page.rpartition(_PLACE)
    assert place
    return head + _OPEN + _safe_json(data) + _CLOSE + tail


def _frames(tokenizer: Any, gaps: Sequence[Gap], steps: Sequence[Step]) -> tuple[list[dict[str, Any]], list[str]]:
    """The steps that commit something of the new tokens, and the words of their guesses.

    A guess is (place among the new tokens, index of its word, confidence), and stands only where it is another than in
    the step before.
    """
    piece = cache(partial(guess_piece, tokenizer, after=gaps[0].before[-1]))
    positions = itertools.chain.from_iterable(range(gap.start, gap.start + len(gap.new)) for gap in gaps)
    place = {position: i for i, position in enumerate(positions)}
    words: dict[str, int] = {}
    before: dict[int, tuple[int, float | None]] = {}

    def inside(guesses: Sequence[Guess]) -> list[Guess]:
        return [guess._replace(position=place[guess.position]) for guess in guesses if guess.position in place]

    frames = []
    for step in steps:
        commits = [(at, _rounded(p)) for at, _, p in inside(step.commits)]
        if not commits:
            continue
        for at, _ in commits:
            before.pop(at, None)
        guesses = []
        for at, token, p in inside(step.guesses):
            guess = words.setdefault(piece(token), len(words)), _rounded(p)
            if before.get(at) != guess:
                before[at] = guess
                guesses.append([at, *guess])
        frames.append({"number": step.number, "commits": commits, "guesses": guesses})
    return frames, list(words)


def in_frame(page: str, height: str = "34em") -> str:
    """A page inside another, such as a notebook's, on which it cannot act."""
    style = f"width: 100%; height: {height}; border: 1px solid #8888; border-radius: 6px"
    return f'<iframe style="{style}" sandbox="allow-scripts" srcdoc="{html.escape(page)}"></iframe>'


_OPEN, _CLOSE = '<script type="application/json" id="data">', "</script>"
_PLACE = f"{_OPEN}{{}}{_CLOSE}"


def check_page(path: Path) -> None:
    """Raise ValueError for a name that no browser opens as a page, and for a file that is none of ours."""
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"{str(path)!r} names no page: let it end in .html")
    if path.is_file() and path.stat().st_size and _OPEN not in path.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{str(path)!r} is a file that is no replay, and would be lost: name another")
    check_can_be_written(path, "replay page")


def facts_of(decoder: Any) -> dict[str, str]:
    """What was asked of a decoder, in words: its mode, its commit rule, and every option that was set."""
    modes = {"Autoregressive": "ar", "Blocks": "diffusion", "WholeCanvas": "diffusion", "Speculative": "speculative"}
    facts = {"mode": modes[type(decoder).__name__]}
    for entry in fields(decoder):
        value = getattr(decoder, entry.name)
        if entry.name == "select":
            facts |= _rule_facts(Threshold() if value is None else getattr(value, "rule", value))
        elif value != entry.default:
            facts[_words(entry.name)] = _words(type(value).__name__) if is_dataclass(value) else str(value)
    return facts


def _rule_facts(rule: Any) -> dict[str, str]:
    """A commit rule and its values: `Threshold(0.9)` is threshold 0.9."""
    values = [getattr(rule, entry.name) for entry in fields(rule)] if is_dataclass(rule) else []
    name = _words(getattr(rule, "__name__", type(rule).__name__))
    return {name: ", ".join(map(str, values))} if values else {"rule": name}


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").strip().lower()


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
    return None if p is None else round(p, 2)
