"""The text of a row while it is decoded: what of it is final, its log-probabilities, and its commits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask.data.prompts import StopStrings
from unmask.model import DiffusionLM
from unmask.sampling import Request, SampledTokens
from unmask.sampling.request import first_end
from unmask.serve.answers import Commit, Row
from unmask.streaming import FinalText


@dataclass(frozen=True)
class Scored:
    """That log-probabilities are wanted, and how many alternatives of each token; chat: in the form of chats."""

    top: int
    chat: bool


@dataclass(frozen=True)
class TokenScore:
    """ln p of a token, before temperature, top-p and top-k, and the likeliest tokens there with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Heard:
    """Commits of a row: positions in the text with its prompt, and tokens. scores: of the first of them."""

    row: int
    positions: list[int]
    tokens: list[int]
    scores: list[TokenScore]


class Listener:
    """The callback and the observer of one row, in the thread that decodes: they hand its commits on."""

    def __init__(self, row: int, post: Callable[[Heard], None], top: int | None) -> None:
        self._row, self._post, self._top = row, post, top
        self._logits: Tensor | None = None

    def observe(self, _row: int, logits: Tensor) -> None:
        """Keep the logits of the next commit."""
        self._logits = logits

    def __call__(self, _row: int, positions: list[int], tokens: list[int]) -> None:
        self._post(Heard(self._row, positions, tokens, self._scores(tokens)))
        self._logits = None

    def _scores(self, tokens: list[int]) -> list[TokenScore]:
        if self._logits is None or self._top is None:
            return []
        n = min(len(tokens), len(self._logits))
        log_p = self._logits[:n].double().log_softmax(-1).cpu()
        best = log_p.topk(min(self._top, log_p.shape[-1]), dim=-1)
        chosen = log_p.gather(-1, torch.tensor(tokens[:n])[:, None])[:, 0].tolist()
        tops = [list(zip(ids, values, strict=True))
                for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)]  # fmt: skip
        return [TokenScore(*entry) for entry in zip(tokens[:n], chosen, tops, strict=True)]


class Writing:
    """The text of one row, in the event loop."""

    def __init__(
        self, lm: DiffusionLM, prompt: Tensor, request: Request, stop: StopStrings, scored: Scored | None
    ) -> None:
        self._lm, self._prompt, self._request, self._stop, self._scored = lm, prompt, request, stop, scored
        self._text_of = partial(lm.new_text, prompt)
        self._pieces: list[str] = []
        self._final = FinalText(self._text_of, len(prompt), self._pieces.append, request.end_token_ids, stop.strings)
        self._scores: list[TokenScore] = []
        self._shown = self._sent = 0
        self._new: list[int] | None = None

    def heard(self, event: Heard) -> str:
        """What became final with these commits."""
        if self._scored is not None:
            self._scores += event.scores
        self._pieces.clear()
        self._final(0, event.positions, event.tokens)
        text = "".join(self._pieces)
        self._shown += len(text)
        return text

    def ended(self, sampled: SampledTokens) -> tuple[str, Row]:
        """What was not handed on yet, and the whole row."""
        new = self._new = sampled.new_tokens[0]
        text = self._stop.cut(self._text_of(new))
        rest, self._shown = self._final.rest(text), len(text)
        forced = None if self._request.constraint is None or sampled.num_forced is None else int(sampled.num_forced[0])
        return rest, Row(
            new, text, "length" if self._request.kept(0, new) is None else "stop", int(sampled.num_forwards[0]),
            int(sampled.num_prefill_forwards[0]), forced, self._as_json(0, self._within(len(text))),
        )  # fmt: skip

    def scores_of_shown(self) -> Any:
        """Log-probabilities of tokens whose text was handed on, and that were not sent yet."""
        return self._next(self._within(self._shown))

    def rest_of_scores(self) -> Any:
        """Those of all tokens of the text that were not sent yet."""
        return self._next(self._within(self._shown))

    def commits(self, event: Heard) -> list[Commit]:
        """The commits, with the text of each token."""
        sure: list[Any] = [score.logprob for score in event.scores]
        sure += [None] * (len(event.tokens) - len(sure))
        return [
            Commit(position=p, token=t, text=self._token_text(t),
                   confidence=None if c is None else float(torch.tensor(c).exp()))
            for p, t, c in zip(event.positions, event.tokens, sure, strict=True)
        ]  # fmt: skip

    def _token_text(self, token: int) -> str:
        """What a token adds to a text: SentencePiece leaves out the space before a word where it comes first."""
        return self._lm.new_text(torch.tensor([token]), [token])

    def _next(self, end: int) -> Any:
        begin, self._sent = self._sent, max(self._sent, end)
        return self._as_json(begin, end) if end > begin else None

    def _within(self, length: int) -> int:
        """How many tokens begin within so many characters of the text; none where they are not wanted."""
        if self._scored is None:
            return 0
        tokens = [score.token for score in self._scores]
        tokens = tokens[: len(tokens) if self._new is None else len(self._new)]
        end = first_end(tokens, self._request.end_token_ids)
        tokens = tokens if end is None else tokens[: end - 1]
        n = self._sent
        while n < len(tokens) and len(self._text_of(tokens[:n])) < length:
            n += 1
        return n

    def _as_json(self, begin: int, end: int) -> Any:
        """Log-probabilities of tokens begin .. end - 1, as OpenAI has them; None where they are not wanted."""
        if self._scored is None:
            return None
        scores, text = self._scores[begin:end], self._token_text
        if self._scored.chat:
            return {"content": [
                _entry(text(s.token), s.logprob) | {"top_logprobs": [_entry(text(t), p) for t, p in s.top]}
                for s in scores
            ], "refusal": None}  # fmt: skip
        tokens = [score.token for score in self._scores]
        return {
            "tokens": [text(s.token) for s in scores],
            "token_logprobs": [_finite(s.logprob) for s in scores],
            "top_logprobs": [{text(t): _finite(p) for t, p in s.top} for s in scores] if self._scored.top else None,
            "text_offset": [len(self._text_of(tokens[:i])) for i in range(begin, end)],
        }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}


def _finite(logprob: float) -> float:
    """OpenAI writes -9999 for a probability of 0."""
    return max(logprob, -9999.0)
