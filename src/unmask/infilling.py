"""Spans between a prefix and a suffix: their candidate lengths, and which of them to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unmask.core.network import DiffusionConfig, Network
from unmask.data.plain_text import following_ids
from unmask.evaluation.likelihood import continuation_nelbo
from unmask.limits import MOST_SAMPLES, check_whole, whole_numbers
from unmask.plain_numbers import plain
from unmask.progress import warn
from unmask.sampling import Blocks, Decoder, Request, SampledTokens, WholeCanvas


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
    return replace(config, attention="bidirectional", clean_attention=None, block_size=None)


def texts_around(
    tokenizer: Any,
    prompt_ids: Callable[[list[str]], list[Tensor]],
    prefix: str | Sequence[str],
    suffix: str | Sequence[str],
) -> tuple[list[Tensor], list[Tensor]]:
    """The tokens before and after each span, tokenised apart. prompt_ids: those of texts that begin a row."""
    prefixes, suffixes = ([text] if isinstance(text, str) else list(text) for text in (prefix, suffix))
    if len(prefixes) != len(suffixes):
        raise ValueError(f"{len(prefixes)} prefixes do not go with {len(suffixes)} suffixes: give as many of each")
    after = [following_ids(tokenizer, text) for text in suffixes]
    return prompt_ids(prefixes), [torch.tensor(ids, dtype=torch.long) for ids in after]


def fill_spans(
    decoder: Blocks | WholeCanvas,
    network: Network,
    config: DiffusionConfig,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    num_tokens: int | Sequence[int],
    *,
    stop_tokens: Sequence[int],
    num_samples: int | None,
    seed: int,
    context_length: int | None,
    **sampling: Any,
) -> SampledTokens:
    """The spans filled, with the best of the candidate lengths; sampling: more fields of the `Request`."""
    lengths = span_lengths(num_tokens, before, after, context_length)
    check_samples(num_samples, lengths)
    warn_of_unseen(decoder, config, before, after, max(lengths))
    request = Request(
        max_new_tokens=max(lengths), seed=seed, end_token_ids=whole_numbers("stop_tokens", stop_tokens),
        context_length=context_length, **sampling,
    )  # fmt: skip
    candidates = fill_lengths(decoder, network, config, before, after, request, lengths)
    if len(candidates) == 1:
        return candidates[0]
    config = config.with_block_size(decoder.block_size)
    return best_length(network, config, before, after, candidates, num_samples=plain(num_samples) or 8, seed=seed)


def span_lengths(
    num_tokens: int | Sequence[int], before: Sequence[Tensor], after: Sequence[Tensor], context_length: int | None
) -> list[int]:
    """The candidate lengths of the spans; raises ValueError for none, and where the longest exceeds the context."""
    given = plain(num_tokens)
    lengths = list(whole_numbers("num_tokens", given if isinstance(given, Iterable) else [given]))
    if not lengths or min(lengths) < 1:
        raise ValueError(f"num_tokens {num_tokens} must be at least 1: there is nothing to fill in")
    check_whole("num_tokens", max(lengths))
    longest = max(len(p) + len(s) for p, s in zip(before, after, strict=True)) + max(lengths)
    if context_length is not None and longest > context_length:
        raise ValueError(
            f"prefix, {max(lengths)} tokens and suffix make {longest}, more than the model's context of "
            f"{context_length}: shorten them"
        )
    return lengths


def check_samples(num_samples: int | None, lengths: Sequence[int]) -> None:
    """Raise ValueError for a number of samples out of range, and for one where no lengths are compared."""
    check_whole("num_samples", num_samples, most=MOST_SAMPLES)
    if num_samples is not None and len(lengths) == 1:
        raise ValueError(f"num_samples={num_samples} compares candidate lengths: give several num_tokens")


def warn_of_unseen(
    decoder: Decoder, config: DiffusionConfig, before: Sequence[Tensor], after: Sequence[Tensor], length: int
) -> None:
    """Warn where a block-wise model fills `length` tokens without seeing all of the suffix.

    Blocks lie on absolute positions, and the network sees nothing after the active one.
    """
    block_size = config.with_block_size(decoder.block_size).block_size if isinstance(decoder, Blocks) else None
    if block_size is None:
        return
    ends = [len(prefix) + length for prefix in before]
    unseen = [max(0, len(suffix) - -end % block_size) for end, suffix in zip(ends, after, strict=True)]
    rows = [row for row, number in enumerate(unseen) if number]
    if rows:
        where = "" if len(before) == 1 else f" of row {rows[0] + 1} ({len(rows)} of {len(before)} rows are concerned)"
        warn(
            f"{unseen[rows[0]]} of the {len(after[rows[0]])} tokens of the suffix{where} are not seen: this checkpoint "
            f"decodes in blocks of {block_size}, and a block sees nothing after its end; attention='bidirectional' "
            "shows the whole suffix, which the checkpoint was not trained on",
        )


def fill_lengths(
    decoder: Blocks | WholeCanvas,
    network: Network,
    config: DiffusionConfig,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    request: Request,
    lengths: Sequence[int],
) -> list[SampledTokens]:
    """The spans filled with each of the lengths; a step budget that fits the longest is cut to a shorter one."""
    filled, steps = [], decoder.max_denoising_steps
    for length in lengths:
        if steps is not None and steps <= max(lengths):
            decoder = replace(decoder, max_denoising_steps=min(steps, length))
        filled.append(decoder(network, config, before, replace(request, max_new_tokens=length), suffixes=after))
    return filled


def best_length(
    network: Network,
    config: DiffusionConfig,
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    candidates: Sequence[SampledTokens],
    *,
    num_samples: int,
    seed: int,
) -> SampledTokens:
    """For each row the candidate of lowest NELBO per token of what follows the prefix; its forwards are those of all.

    num_samples: masks, and so forwards, that score a candidate.
    """
    scores = []
    for filled in candidates:
        texts = [
            torch.cat([p, torch.tensor(new, dtype=torch.long), s])
            for p, new, s in zip(before, filled.new_tokens, after, strict=True)
        ]
        bounds = continuation_nelbo(
            network, config, texts, [len(p) for p in before], num_samples=num_samples, seed=seed
        )
        scores.append([bound.nats / bound.num_tokens for bound in bounds])
    best = [min(range(len(candidates)), key=lambda c: scores[c][row]) for row in range(len(before))]
    return SampledTokens(
        [candidates[c].new_tokens[row] for row, c in enumerate(best)],
        torch.stack([filled.num_forwards + num_samples for filled in candidates]).sum(0),
        torch.stack([filled.num_prefill_forwards for filled in candidates]).sum(0),
    )
