"""Rows that come and go, each with a request of its own, in the batches of one decoder.

Slow twin: the decoder called with each row alone; compared in tests/test_live.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unmask.core.network import DiffusionConfig, Network
from unmask.sampling.acceptance import Coupled
from unmask.sampling.autoregressive import TokenRows
from unmask.sampling.block import BlockRows
from unmask.sampling.canvas import Canvas, Steps, canvas_steps
from unmask.sampling.canvases import check_steps, text_steps
from unmask.sampling.constraint import check_unconstrained
from unmask.sampling.decoders import Autoregressive, Blocks, Decoder, Speculative, WholeCanvas, pace_of
from unmask.sampling.request import Request, RowRequests, SampledTokens
from unmask.sampling.speculative import DraftedRows


class LiveRows:
    """The rows of one decoder. most: rows that decode at a time; further ones are not taken.

    A row gets what it would get alone: tokens, and counts of forwards but for a pace that is measured.
    """

    def __init__(self, decoder: Decoder, network: Network, config: DiffusionConfig | None, most: int) -> None:
        decoder.check(config)
        self._free, self._active = list(range(most)), set[int]()
        self._batch: _SlotRows | _CanvasRows
        if isinstance(decoder, WholeCanvas):
            assert config is not None
            self._batch = _CanvasRows(decoder, network, config)
        else:
            self._batch = _SlotRows(decoder, network, config, most)

    @property
    def room(self) -> int:
        """How many rows more there is a place for."""
        return len(self._free)

    @torch.inference_mode()
    def put(self, prompt: Tensor, request: Request, canvas: Canvas | None = None) -> int:
        """Take a row; its number, which another row has once this one has ended. canvas: to fill, after its prompt.

        Raises ValueError for what the decoder refuses of the request.
        """
        row = self._free[-1]
        self._batch.put(row, prompt, request, canvas)
        self._active.add(self._free.pop())
        return row

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        """End a row that is not wanted any more."""
        self._batch.drop(row)
        self._leave(row)

    @torch.inference_mode()
    def step(self) -> dict[int, SampledTokens]:
        """One step of all rows: what the rows that ended with it have become, by their numbers."""
        ended = {row: sampled for row, sampled in self._batch.step(self._active).items() if row in self._active}
        for row in ended:
            self._leave(row)
        return ended

    def _leave(self, row: int) -> None:
        self._active.discard(row)
        self._free.append(row)
        if not self._active:
            self._batch.clear()


class _SlotRows:
    """Rows in slots of one cache, of the decoders that have one. The first step opens the slots."""

    def __init__(
        self,
        decoder: Autoregressive | Blocks | Speculative,
        network: Network,
        config: DiffusionConfig | None,
        most: int,
    ) -> None:
        self._decoder, self._network, self._config, self._most = decoder, network, config, most
        self.clear()

    def clear(self) -> None:
        """Begin anew; the keys are let go."""
        self._requests = RowRequests(self._most)
        self._rows, self._opened = self._new_rows(), False

    def put(self, row: int, prompt: Tensor, request: Request, canvas: Canvas | None) -> None:
        """Let a row wait for a slot."""
        self._requests.put(row, request)
        if isinstance(self._rows, BlockRows):
            check_unconstrained(request.constraint)
            self._rows.put(row, prompt, canvas)
        else:
            assert canvas is None
            self._rows.put(row, prompt)

    def drop(self, row: int) -> None:
        """Free its slot."""
        if self._opened:
            self._rows.drop(row)
        else:
            self._rows.waiting.remove(row)

    def step(self, active: set[int]) -> dict[int, SampledTokens]:
        """One forward, or a cycle of them."""
        if not active:
            return {}
        if not self._opened:
            self._rows.open_slots(self._most)
            self._opened = True
        self._rows.step()
        ended = active - {*self._rows.scheduler.rows, *self._rows.waiting}
        return {row: self._rows.sampled([row]) for row in ended}

    def _new_rows(self) -> TokenRows | BlockRows | DraftedRows:
        decoder, requests = self._decoder, self._requests
        if isinstance(decoder, Autoregressive):
            return TokenRows(self._network, requests, self._most)
        assert self._config is not None
        config = self._config.with_block_size(decoder.block_size)
        if isinstance(decoder, Speculative):
            pace, acceptance = pace_of(decoder, self._network, config), decoder.acceptance or Coupled()
            return DraftedRows(self._network, config, requests, self._most, pace, acceptance)
        return BlockRows(
            self._network, config, requests, self._most, select=decoder.select, window=decoder.window,
            max_denoising_steps=decoder.max_denoising_steps, guidance_scale=decoder.guidance_scale,
        )  # fmt: skip


class _CanvasRows:
    """Rows that are filled by whole canvases: those that came together share forwards, a group for each step."""

    def __init__(self, decoder: WholeCanvas, network: Network, config: DiffusionConfig) -> None:
        self._decoder, self._network, self._config = decoder, network, config
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._waiting: dict[int, tuple[Tensor, Request, Canvas | None]] = {}
        self._groups: list[_Group] = []

    def put(self, row: int, prompt: Tensor, request: Request, canvas: Canvas | None) -> None:
        """Let a row wait for the next step."""
        check_unconstrained(request.constraint)
        decoder, most = self._decoder, request.max_new_tokens
        check_steps(decoder.max_denoising_steps, None if canvas else decoder.block_size, most, decoder.remask)
        self._waiting[row] = prompt, request, canvas

    def drop(self, row: int) -> None:
        """Leave a row out; its group goes on without it once its next tokens are there."""
        self._waiting.pop(row, None)
        for group in self._groups:
            group.drop(row)
        self._groups = [group for group in self._groups if group.rows]

    def step(self, active: set[int]) -> dict[int, SampledTokens]:  # noqa: ARG002
        """A forward of each group."""
        for filled in (False, True):
            some = {row: entry for row, entry in self._waiting.items() if (entry[2] is not None) == filled}
            if some:
                self._groups.append(_Group(self._decoder, self._network, self._config, some))
        self._waiting = {}
        ended: dict[int, SampledTokens] = {}
        for group in self._groups:
            ended |= group.step()
        self._groups = [group for group in self._groups if group.rows]
        return ended


class _Group:
    """Rows that share the forwards of their canvases. rows: the number of each, by its place in the group."""

    def __init__(
        self, decoder: WholeCanvas, network: Network, config: DiffusionConfig,
        entries: dict[int, tuple[Tensor, Request, Canvas | None]],
    ) -> None:  # fmt: skip
        self.rows = dict(enumerate(entries))
        self._requests = RowRequests(len(entries))
        for place, (_, request, _) in enumerate(entries.values()):
            self._requests.put(place, request)
        canvases = [canvas for _, _, canvas in entries.values() if canvas is not None]
        options: dict[str, Any] = {"select": decoder.select, "guidance_scale": decoder.guidance_scale}
        self._steps: Steps
        if canvases:
            self._steps = canvas_steps(network, config, canvases, self._requests, remask=decoder.remask,
                                       max_denoising_steps=decoder.max_denoising_steps, **options)  # fmt: skip
        else:
            prompts = [prompt for prompt, _, _ in entries.values()]
            self._steps = text_steps(
                network, config, prompts, self._requests, canvas_size=decoder.block_size, remask=decoder.remask,
                max_denoising_steps=decoder.max_denoising_steps, **options,
            )  # fmt: skip

    def drop(self, row: int) -> None:
        """End a row at its next commits."""
        for place, number in list(self.rows.items()):
            if number == row:
                del self.rows[place]
                self._requests.end(place)

    def step(self) -> dict[int, SampledTokens]:
        """One forward; all rows when the last of them has ended."""
        try:
            next(self._steps)
        except StopIteration as end:
            whole: SampledTokens = end.value
            rows, self.rows = self.rows, {}
            return {row: whole.of_row(place) for place, row in rows.items()}
        return {}
