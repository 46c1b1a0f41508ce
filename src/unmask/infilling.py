"""Texts with gaps: how they are written, how they are filled, and which of the candidate lengths are kept."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from unmask.core.network import DiffusionConfig, Network
from unmask.data.plain_text import following_ids
from unmask.data.prompts import StopStrings
from unmask.evaluation.likelihood import continuation_nelbo
from unmask.limits import MOST_SAMPLES, check_whole, whole_numbers
from unmask.plain_numbers import plain
from unmask.progress import warn
from unmask.replay_page import Gap
from unmask.sampling import Blocks, Canvas, Decoder, Request, SampledTokens, WholeCanvas, choose_decoder
from unmask.sampling.request import Callback, given_or_new

MOST_COMBINATIONS = 64
"""Of candidate lengths of a text's gaps, at most: each combination is filled and scored."""

Pieces = Sequence[str | int | Sequence[int]]
"""Texts, and between them gaps: the number of tokens of each, or its candidate numbers."""

NewText = Callable[[Tensor, Sequence[int]], str]
"""(tokens before, new tokens) -> the text that the new ones add."""


@dataclass(frozen=True)
class Gapped:
    """A text with gaps: texts[i] stands before gap i, the last one behind all. pieces: their tokens, (length,) int64.

    The first piece has at least one token. lengths: the candidates of each gap.
    """

    texts: tuple[str, ...]
    lengths: tuple[tuple[int, ...], ...]
    pieces: tuple[Tensor, ...] = ()

    def joined(self, gaps: Sequence[Sequence[int]]) -> list[int]:
        """The tokens up to the gap after these: all of them, if these are all gaps."""
        parts = [piece.tolist() for piece in self.pieces[: len(gaps) + 1]]
        return [token for part, gap in zip(parts, [*gaps, []], strict=True) for token in [*part, *gap]]

    def split(self, tokens: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """The tokens of each gap, of those of all gaps in order; a single gap may have ended early."""
        ends = itertools.accumulate(lengths)
        return [list(tokens[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

    def as_decoded(self, gaps: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[Gap]:
        """The gaps with these tokens, at the positions that they had with these lengths."""
        given = itertools.accumulate(map(len, self.pieces[:-1]))
        open_before = itertools.accumulate(lengths[:-1], initial=0)
        starts = map(sum, zip(given, open_before, strict=True))
        return [
            Gap(self.joined(gaps[:i]), gap, start, self.texts[i + 1])
            for i, (gap, start) in enumerate(zip(gaps, starts, strict=True))
        ]


@dataclass(frozen=True)
class Filled:
    """Rows with filled gaps: what sampling counted, all tokens, the texts of the gaps, and whole texts.

    gaps: of each row, as they were decoded. kept: of each row, which calls of the request's callback filled them, and
    not with other candidate lengths; none without a callback.
    """

    sampled: SampledTokens
    sequences: list[list[int]]
    fills: list[list[str]]
    texts: list[str]
    gaps: list[list[Gap]]
    kept: list[slice]


# --- how gaps are written


def texts_with_gaps(
    text: Any, suffix: str | Sequence[str] | None, num_tokens: int | Sequence[int] | None
) -> list[Gapped]:
    """The rows that `infill` is asked for, not tokenised yet: prefixes and suffixes, or texts with gaps in them.

    Raises ValueError for a row without a gap, and for one without tokens; TypeError for what is none of these.
    """
    if suffix is None:
        if num_tokens is not None:
            raise ValueError(f"num_tokens {num_tokens} needs a suffix: give one, or mark gaps in the text as <gap:8>")
        rows: list[Any] = [text] if isinstance(text, str) or _is_pieces(text) else list(text)
        if not rows:
            raise ValueError("the list of texts is empty: give at least one with a gap, such as 'Once <gap:8> end'")
        return [_of_pieces(_marked(row) if isinstance(row, str) else row) for row in rows]
    if num_tokens is None:
        raise TypeError("num_tokens None must be a number of tokens between prefix and suffix, or a list of candidates")
    prefixes, suffixes = ([one] if isinstance(one, str) else list(one) for one in (text, suffix))
    if len(prefixes) != len(suffixes):
        raise ValueError(f"{len(prefixes)} prefixes do not go with {len(suffixes)} suffixes: give as many of each")
    lengths = (_lengths("num_tokens", num_tokens),)
    return [Gapped(pair, lengths) for pair in zip(prefixes, suffixes, strict=True)]


def _is_pieces(items: Any) -> bool:
    """Whether a list holds the pieces of one text, and not several texts: it has a gap, a number or numbers alone."""
    if not _is_list(items):
        raise TypeError(f"text {items!r} must be a text with gaps, or a list of texts and numbers of tokens")
    return any(not isinstance(item, str) and not (_is_list(item) and any(isinstance(part, str) for part in item))
               for item in items)  # fmt: skip


def _is_list(item: Any) -> bool:
    return isinstance(item, Iterable) and not isinstance(item, str | bytes | dict)


def _marked(text: str) -> list[str | list[int]]:
    """The pieces of a text in which <gap:8> is a gap of 8 tokens, and <gap:4,8> one of 4 or 8."""
    pieces: list[str | list[int]] = []
    end = 0
    for mark in re.finditer(r"<gap(?::([^<>]*))?>", text):
        numbers = (mark[1] or "").split(",")
        if not all(re.fullmatch(" *[0-9]{1,12} *", number) for number in numbers):
            raise ValueError(
                f"the mark {mark[0]!r} gives no number of tokens: write <gap:8>, or give a list of pieces, "
                "['Once ', 8, ' end'], in which it is ordinary text"
            )
        pieces += [text[end : mark.start()], [int(number) for number in numbers]]
        end = mark.end()
    return [*pieces, text[end:]]


def _of_pieces(pieces: Iterable[Any]) -> Gapped:
    """Texts, and gaps as numbers of tokens; texts side by side are one, and an empty one stands between two gaps."""
    texts, lengths = [""], []
    for piece in pieces:
        if isinstance(piece, str):
            texts[-1] += piece
        else:
            lengths.append(_lengths("gap", piece))
            texts.append("")
    if not lengths:
        shown = repr(texts[0] if len(texts[0]) <= 70 else texts[0][:67] + "...")
        raise ValueError(
            f"the text {shown} has no gap: write <gap:8> where tokens are wanted, or give a suffix as well"
        )
    return Gapped(tuple(texts), tuple(lengths))


def _lengths(name: str, given: Any) -> tuple[int, ...]:
    """The candidate lengths of a gap; ValueError for none, and for one below 1."""
    value = plain(given)
    lengths = whole_numbers(name, value if _is_list(value) else [value])
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{name} {given} must be at least 1: there is nothing to fill in")
    check_whole(name, max(lengths))
    return lengths


def tokenised(tokenizer: Any, prompt_ids: Callable[[list[str]], list[Tensor]], rows: Sequence[Gapped]) -> list[Gapped]:
    """The rows with their tokens, each text tokenised apart. prompt_ids: tokens of texts that begin a row."""
    first = prompt_ids([row.texts[0] for row in rows])
    later = [[torch.tensor(following_ids(tokenizer, text), dtype=torch.long) for text in row.texts[1:]] for row in rows]
    return [replace(row, pieces=(begin, *others)) for row, begin, others in zip(rows, first, later, strict=True)]


# --- how they are filled


def span_config(
    config: DiffusionConfig | None, mode: str | Decoder | None, attention: str | None, *, is_drafter: bool
) -> DiffusionConfig:
    """What a checkpoint is read as when a span is filled; attention: None, its own, or "bidirectional"."""
    if config is None:
        raise ValueError("infill needs a converted checkpoint: this is an untouched AR model; adapt it first")
    if isinstance(mode, str) and mode != "diffusion":
        raise ValueError(f"mode {mode!r} cannot see a suffix: infill works in mode 'diffusion'")
    if attention is None:
        return config
    if attention != "bidirectional":
        raise ValueError(f"attention {attention!r} is unknown: leave it out, or use 'bidirectional'")
    if is_drafter:
        raise ValueError(
            "attention 'bidirectional' needs a model that was converted whole: a drafter reads noise beside its "
            "base's clean context alone"
        )
    return replace(
        config, attention="bidirectional", clean_attention=None, noisy_attention="bidirectional", block_size=None
    )


def filling_decoder(
    config: DiffusionConfig | None,
    mode: str | Decoder | None,
    attention: str | None,
    options: dict[str, Any],
    context_length: int | None,
    *,
    is_drafter: bool,
) -> tuple[DiffusionConfig, Blocks | WholeCanvas]:
    """What the checkpoint is read as, and the decoder of these options that fills gaps in it."""
    chosen = span_config(config, mode, attention, is_drafter=is_drafter)
    decoder = choose_decoder("diffusion" if mode is None else mode, chosen, options, context_length)
    if not isinstance(decoder, Blocks | WholeCanvas):
        raise ValueError(f"mode {mode!r} cannot see a suffix: infill works in mode 'diffusion'")
    return chosen, decoder


def check_rows(
    rows: Sequence[Gapped],
    choices: Sequence[Sequence[Sequence[int]]],
    num_samples: int | None,
    context_length: int | None,
) -> None:
    """Raise ValueError for a row beyond the context, too many choices of lengths, and a num_samples without any."""
    check_whole("num_samples", num_samples, most=MOST_SAMPLES)
    if num_samples is not None and max(map(len, choices)) == 1:
        raise ValueError(f"num_samples={num_samples} compares candidate lengths: give several of a gap")
    for row, combinations in zip(rows, choices, strict=True):
        if len(combinations) > MOST_COMBINATIONS:
            raise ValueError(
                f"{len(combinations)} combinations of candidate lengths exceed {MOST_COMBINATIONS}, and each is filled "
                "and scored: give fewer"
            )
        longest = max(map(sum, combinations))
        whole = sum(map(len, row.pieces)) + longest
        if context_length is not None and whole > context_length:
            what = f"prefix, {longest} tokens and suffix" if len(row.lengths) == 1 else f"texts and {longest} tokens"
            raise ValueError(f"{what} make {whole}, more than the model's context of {context_length}: shorten them")


def warn_of_unseen(decoder: Decoder, config: DiffusionConfig, rows: Sequence[Gapped]) -> None:
    """Warn where a block-wise model fills a gap without seeing all of the text behind it.

    Blocks lie on absolute positions, and the network sees nothing after the active one.
    """
    block_size = config.with_block_size(decoder.block_size).block_size if isinstance(decoder, Blocks) else None
    if block_size is None:
        return
    unseen = [_unseen(row, block_size) for row in rows]
    concerned = [number for number, of_row in enumerate(unseen) if any(of_row)]
    if not concerned:
        return
    row = rows[concerned[0]]
    gap, number = next((gap, number) for gap, number in enumerate(unseen[concerned[0]]) if number)
    behind = sum(map(len, row.pieces[gap + 1 :]))
    text = "the suffix" if len(row.lengths) == 1 else f"the text after gap {gap + 1}"
    where = "" if len(rows) == 1 else f" of row {concerned[0] + 1} ({len(concerned)} of {len(rows)} rows are concerned)"
    warn(
        f"{number} of the {behind} tokens of {text}{where} are not seen: this checkpoint decodes in blocks of "
        f"{block_size}, and a block sees nothing after its end; attention='bidirectional' shows the whole text, which "
        "the checkpoint was not trained on",
    )


def _unseen(row: Gapped, block_size: int) -> list[int]:
    """For each gap, at its greatest length, the given tokens past the end of the block that it ends in."""
    position, stretches, ends = 0, [], []
    for piece, lengths in zip(row.pieces, [*row.lengths, (0,)], strict=True):
        stretches.append((position, position + len(piece)))
        position += len(piece) + max(lengths)
        ends.append(-(-position // block_size) * block_size)
    return [
        sum(max(0, end - max(begin, seen)) for begin, end in stretches[gap + 1 :]) for gap, seen in enumerate(ends[:-1])
    ]


def fill_gaps(
    decoder: Blocks | WholeCanvas,
    network: Network,
    config: DiffusionConfig,
    rows: Sequence[Gapped],
    new_text: NewText,
    *,
    stop_strings: str | Sequence[str] | None = None,
    stop_tokens: Sequence[int] = (),
    num_samples: int | None = None,
    seed: int | None = 0,
    context_length: int | None = None,
    callback: Callback | None = None,
    **sampling: Any,
) -> Filled:
    """The rows with their gaps filled, of the best candidate lengths; sampling: more fields of the `Request`.

    seed: of tokens, and of the masks that score candidates; None: tokens drawn anew, and masks of 0, so that greedy
    text is the same each time. A stop ends its gap. A row of one gap then ends early; one of several is filled whole
    before it is cut, so that what stands between the gaps is text.
    """
    choices = [list(itertools.product(*row.lengths)) for row in rows]
    check_rows(rows, choices, num_samples, context_length)
    warn_of_unseen(decoder, config, rows)
    stop = StopStrings(lambda row, new: new_text(rows[row].pieces[0], new), stop_strings)
    calls = [[0] for _ in rows]
    request = Request(
        max_new_tokens=max(sum(lengths) for combinations in choices for lengths in combinations),
        seed=given_or_new(seed),
        end_token_ids=whole_numbers("stop_tokens", stop_tokens), stop=stop if stop.strings else None,
        context_length=context_length, callback=None if callback is None else _counted(callback, calls), **sampling,
    )  # fmt: skip
    candidates: list[tuple[SampledTokens, list[list[list[int]]]]] = []
    for number in range(max(map(len, choices))):
        lengths = [combinations[min(number, len(combinations) - 1)] for combinations in choices]  # the last one again
        filled = _fill(decoder, network, config, rows, lengths, request)
        gaps = [
            _cut(row, row.split(new, chosen), request, stop.strings, new_text)
            for row, new, chosen in zip(rows, filled.new_tokens, lengths, strict=True)
        ]
        candidates.append((filled, gaps))
        for of_row in calls:
            of_row.append(of_row[-1])
    sampled, best = candidates[0][0], [0] * len(rows)
    if len(candidates) > 1:
        sampled, best = _best(
            network, config.with_block_size(decoder.block_size), rows, [len(c) for c in choices], candidates,
            num_samples=plain(num_samples) or 8, seed=0 if seed is None else int(seed),
        )  # fmt: skip
    gaps = [candidates[c][1][row] for row, c in enumerate(best)]
    chosen = [combinations[c] for combinations, c in zip(choices, best, strict=True)]
    kept = [slice(of_row[c - 1] if c else 0, of_row[c]) for of_row, c in zip(calls, best, strict=True)]
    return _as_filled(rows, gaps, chosen, sampled, kept, lambda before, new: stop.cut(new_text(before, new)))


def _counted(callback: Callback, calls: Sequence[list[int]]) -> Callback:
    """The callback, whose calls for a row are added to the last number of that row."""

    def call(row: int, positions: list[int], tokens: list[int]) -> None:
        calls[row][-1] += 1
        callback(row, positions, tokens)

    return call


def _as_filled(
    rows: Sequence[Gapped],
    gaps: Sequence[Sequence[list[int]]],
    lengths: Sequence[Sequence[int]],
    sampled: SampledTokens,
    kept: list[slice],
    fill_text: NewText,
) -> Filled:
    """The rows whose gaps got these tokens, when they had these lengths. fill_text: what a gap's tokens say."""
    sampled = replace(sampled, new_tokens=[[token for gap in of_row for token in gap] for of_row in gaps])
    fills = [
        [fill_text(torch.tensor(row.joined(of_row[:i])), gap) for i, gap in enumerate(of_row)]
        for row, of_row in zip(rows, gaps, strict=True)
    ]
    sequences = [row.joined(of_row) for row, of_row in zip(rows, gaps, strict=True)]
    texts = ["".join(itertools.chain(*zip(row.texts, [*of_row, ""], strict=True)))
             for row, of_row in zip(rows, fills, strict=True)]  # fmt: skip
    as_decoded = [row.as_decoded(new, chosen) for row, new, chosen in zip(rows, gaps, lengths, strict=True)]
    return Filled(sampled, sequences, fills, texts, as_decoded, kept)


def _fill(
    decoder: Blocks | WholeCanvas,
    network: Network,
    config: DiffusionConfig,
    rows: Sequence[Gapped],
    lengths: Sequence[Sequence[int]],
    request: Request,
) -> SampledTokens:
    """The gaps filled with so many tokens; a step budget that fits the longest row is cut to shorter ones."""
    steps, most = decoder.max_denoising_steps, max(map(sum, lengths))
    if steps is not None and steps <= request.max_new_tokens:
        decoder = replace(decoder, max_denoising_steps=min(steps, most))
    canvases = [Canvas.of_pieces(row.pieces, of_row) for row, of_row in zip(rows, lengths, strict=True)]
    return decoder.fill(network, config, canvases, request)


def _cut(
    row: Gapped, gaps: list[list[int]], request: Request, stop_strings: Sequence[str], new_text: NewText
) -> list[list[int]]:
    """The gaps of a row that was filled whole, each up to and with the token that ends it."""
    if len(gaps) == 1:
        return gaps
    cut: list[list[int]] = []
    for gap in gaps:
        before = torch.tensor(row.joined(cut))
        stop = StopStrings(lambda _, new, before=before: new_text(before, new), stop_strings)  # type: ignore[misc]
        cut.append(gap[: replace(request, stop=stop).kept(0, gap)])
    return cut


def _best(
    network: Network,
    config: DiffusionConfig,
    rows: Sequence[Gapped],
    num_choices: Sequence[int],
    candidates: Sequence[tuple[SampledTokens, list[list[list[int]]]]],
    *,
    num_samples: int,
    seed: int,
) -> tuple[SampledTokens, list[int]]:
    """The number of the candidate of each row that has the lowest NELBO per token of what follows its first piece.

    Its forwards are those of all its candidates and of scoring them. num_samples: masks, and so forwards, that score
    a candidate.
    """
    given = [len(row.pieces[0]) for row in rows]
    scores = []
    for _, gaps in candidates:
        texts = [torch.tensor(row.joined(of_row)) for row, of_row in zip(rows, gaps, strict=True)]
        bounds = continuation_nelbo(network, config, texts, given, num_samples=num_samples, seed=seed)
        scores.append([bound.nats / bound.num_tokens for bound in bounds])
    best = [min(range(n), key=lambda c: scores[c][row]) for row, n in enumerate(num_choices)]
    own = torch.tensor([[c < n for n in num_choices] for c in range(len(candidates))])
    scoring = torch.tensor([num_samples * n if n > 1 else 0 for n in num_choices])
    forwards, prefills = (
        (torch.stack([getattr(filled, name) for filled, _ in candidates]) * own).sum(0)
        for name in ("num_forwards", "num_prefill_forwards")
    )
    return SampledTokens([], forwards + scoring, prefills), best
