"""Texts that grow by whole canvases, one after the other; `canvas` fills each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unmask.core.network import DiffusionConfig, Network
from unmask.sampling.canvas import Canvas, Steps, canvas_steps, last_of, too_many
from unmask.sampling.remask import Remask
from unmask.sampling.request import Asked, Request, SampledTokens


@torch.inference_mode()
def sample_canvases(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    request: Request,
    *,
    canvas_size: int | None = None,
    max_denoising_steps: int | None = None,
    remask: Remask | None = None,
    **options: Any,
) -> SampledTokens:
    """Continue ragged prompts by whole canvases of `canvas_size` new tokens, one after the other.

    By default one canvas holds all max_new_tokens. A canvas sees all the text before it and nothing after itself.
    max_denoising_steps: of each canvas. `options` go to `sample_bidirectional`.
    """
    check_steps(max_denoising_steps, canvas_size, request.max_new_tokens, remask)
    return last_of(
        text_steps(
            network, config, prompts, request, canvas_size=canvas_size, max_denoising_steps=max_denoising_steps,
            remask=remask, **options,
        )
    )  # fmt: skip


def check_steps(steps: int | None, canvas_size: int | None, max_new_tokens: int, remask: Remask | None) -> None:
    """Raise ValueError for more forwards of a canvas than it has tokens."""
    size = min(canvas_size or max_new_tokens, max_new_tokens)
    if steps is not None and steps > size and remask is None:
        raise ValueError(too_many(steps, size))


def text_steps(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    request: Asked,
    *,
    canvas_size: int | None = None,
    max_denoising_steps: int | None = None,
    remask: Remask | None = None,
    **options: Any,
) -> Steps:
    """`sample_canvases`, a forward at a time."""
    texts = _Texts(prompts, request, canvas_size)
    for rows in texts.groups():
        while rows:
            canvases = texts.canvases(rows)
            steps: int | list[int] | None = max_denoising_steps
            if max_denoising_steps is not None and remask is None:
                steps = [min(max_denoising_steps, texts.room(row)) for row in rows]
            filled = yield from canvas_steps(
                network, config, canvases, request, max_denoising_steps=steps, remask=remask, row_numbers=rows,
                kept=texts.kept, **options,
            )  # fmt: skip
            rows = texts.extend(rows, filled)
    return texts.sampled()


class _Texts:
    """Rows that grow by canvases of `size` tokens, or one. Of each row: new_tokens; num_forwards; limits, in tokens."""

    def __init__(self, prompts: Sequence[Tensor], request: Asked, size: int | None) -> None:
        self.prompts, self.request, self.size = prompts, request, size
        self.new_tokens: list[list[int]] = [[] for _ in prompts]
        self.limits = [request.limit(len(prompt), row) for row, prompt in enumerate(prompts)]
        self.num_forwards = torch.zeros(len(prompts), dtype=torch.long)

    def groups(self) -> list[list[int]]:
        """The rows that want tokens, batch_size of them at a time."""
        rows = [row for row, limit in enumerate(self.limits) if limit > 0]
        size = self.request.batch_size or max(1, len(rows))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def room(self, row: int) -> int:
        """Open positions of the row's next canvas."""
        rest = self.limits[row] - len(self.new_tokens[row])
        return rest if self.size is None else min(self.size, rest)

    def canvases(self, rows: list[int]) -> list[Canvas]:
        """The next canvas of each of the rows: its text so far, and open positions."""
        texts = [torch.cat([self.prompts[i].cpu(), torch.tensor(self.new_tokens[i], dtype=torch.long)]) for i in rows]
        return [Canvas.around(text, self.room(row)) for row, text in zip(rows, texts, strict=True)]

    def kept(self, row: int, new: list[int]) -> int | None:
        """`Request.kept`, for the tokens of the row's next canvas alone."""
        before = self.new_tokens[row]
        kept = self.request.kept(row, [*before, *new])
        return None if kept is None else max(0, kept - len(before))

    def extend(self, rows: list[int], filled: SampledTokens) -> list[int]:
        """Add the tokens of canvases that were filled in; which of the rows want another canvas."""
        self.num_forwards[rows] += filled.num_forwards
        unfinished = []
        for row, new in zip(rows, filled.new_tokens, strict=True):
            whole = len(new) == self.room(row)
            self.new_tokens[row] = self.new_tokens[row] + new
            ended = not whole or self.request.kept(row, self.new_tokens[row]) is not None
            if not ended and self.room(row) > 0:
                unfinished.append(row)
        return unfinished

    def sampled(self) -> SampledTokens:
        return SampledTokens(self.new_tokens, self.num_forwards, torch.zeros(len(self.prompts), dtype=torch.long))
