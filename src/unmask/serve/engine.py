"""The queue behind the server: rows wait, are decoded in batches, and are answered as they end.

One thread decodes. Rows of one decoder share its forwards, whatever their lengths and settings; decoders take turns, a
step each. Single calls (infilling, embeddings) have a thread of their own, whose forwards come between those of the
rows: the network runs one at a time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unmask.core.network import DiffusionConfig
from unmask.model import DiffusionLM
from unmask.sampling import Canvas, Decoder, Request
from unmask.sampling.live import LiveRows
from unmask.serve.errors import StoppingError

_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many rows wait as may wait."""


class CancelledError(Exception):
    """Nobody waits for the row any more."""


@dataclass(frozen=True)
class Work:
    """A row to decode. config: what the checkpoint is read as. canvas: what is to be filled, behind the prompt."""

    prompt: Tensor
    decoder: Decoder
    request: Request
    config: DiffusionConfig | None
    canvas: Canvas | None = None


@dataclass(eq=False)
class Job:
    """A row, or a call of the model, which gets a function that raises once nobody waits any more.

    done: gets what came of it or the exception, once, in the thread of the engine; nothing if it was cancelled.
    """

    work: Work | Callable[[Callable[[], None]], Any]
    done: Callable[[Any], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise CancelledError if nobody waits any more."""
        if self.cancelled.is_set():
            raise CancelledError


class Engine:
    """The queue and its thread. max_queue: rows that may wait. max_rows: rows that decode at a time."""

    def __init__(self, lm: DiffusionLM, *, max_queue: int, max_rows: int) -> None:
        self.lm, self.max_queue, self.max_rows = lm, max_queue, max_rows
        self._waiting: deque[Job] = deque()
        self._calls: deque[Job] = deque()
        self._running: dict[Any, _Running] = {}
        self._changed, self._closed = threading.Condition(), False
        num_threads = torch.get_num_threads()
        self._threads = [threading.Thread(target=work, args=(num_threads,), name=name, daemon=True)
                         for work, name in ((self._decode, "unmask-rows"), (self._call, "unmask-calls"))]  # fmt: skip
        for thread in self._threads:
            thread.start()

    @property
    def num_waiting(self) -> int:
        """Rows and calls that wait for their turn."""
        return len(self._waiting) + len(self._calls)

    @property
    def num_running(self) -> int:
        """Rows that decode."""
        return sum(len(running.jobs) for running in list(self._running.values()))

    def submit(self, jobs: list[Job]) -> None:
        """Let jobs wait, all or none; raises QueueFullError, and StoppingError after `close`."""
        with self._changed:
            if self._closed:
                raise StoppingError
            free = max(0, self.max_rows - self.num_running)
            if self.num_waiting + len(jobs) > self.max_queue + free:
                raise QueueFullError
            for job in jobs:
                (self._waiting if isinstance(job.work, Work) else self._calls).append(job)
            self._changed.notify_all()

    def cancel(self, jobs: list[Job]) -> None:
        """Nobody waits for these any more: they give up their places."""
        with self._changed:
            for job in jobs:
                job.cancelled.set()
            self._waiting = deque(job for job in self._waiting if not job.cancelled.is_set())
            self._calls = deque(job for job in self._calls if not job.cancelled.is_set())

    def close(self) -> None:
        """End the threads at their next steps; jobs that are not done get a StoppingError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _decode(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # a new thread has the number of the process
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                while self._waiting and self.num_running < self.max_rows:
                    self._put(self._waiting.popleft())
            for decoder, running in list(self._running.items()):
                if not running.step():
                    del self._running[decoder]
        decoding = [job for running in self._running.values() for job in running.jobs.values()]
        self._give_up([*decoding, *self._waiting])

    def _call(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        while True:
            with self._changed:
                while not (self._calls or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                job = self._calls.popleft()
            assert not isinstance(job.work, Work)
            try:
                job.check()
                result = job.work(partial(self._check, job))
            except CancelledError:
                continue
            except Exception as error:
                result = error
            job.done(result)
        self._give_up(list(self._calls))

    def _check(self, job: Job) -> None:
        """Raise CancelledError if nobody waits for a call any more, StoppingError if the server ends."""
        job.check()
        if self._closed:
            raise StoppingError

    def _give_up(self, jobs: list[Job]) -> None:
        for job in jobs:
            if not job.cancelled.is_set():
                job.done(StoppingError())

    def _put(self, job: Job) -> None:
        """Give a row a place among those of its decoder."""
        assert isinstance(job.work, Work)
        key = job.work.decoder, job.work.config
        try:
            if key not in self._running:
                live = LiveRows(job.work.decoder, self.lm.network, job.work.config, self.max_rows)
                self._running[key] = _Running(live)
            self._running[key].put(job, job.work)
        except Exception as error:
            job.done(error)


class _Running:
    """The rows of one decoder, and whose they are."""

    def __init__(self, live: LiveRows) -> None:
        self.live, self.jobs = live, dict[int, Job]()

    def put(self, job: Job, work: Work) -> None:
        self.jobs[self.live.put(work.prompt, work.request, work.canvas)] = job

    def step(self) -> bool:
        """One step; False when no row is left. A fault ends all rows, and is theirs."""
        for row in [row for row, job in self.jobs.items() if job.cancelled.is_set()]:
            del self.jobs[row]
            self.live.drop(row)
        if not self.jobs:
            return False
        try:
            ended = self.live.step()
        except Exception as error:
            _log.exception("a step of decoding failed")
            for job in self.jobs.values():
                job.done(RuntimeError(f"decoding failed: {type(error).__name__}"))
            self.jobs.clear()
            return False
        for row, sampled in ended.items():
            self.jobs.pop(row).done(sampled)
        return bool(self.jobs)
