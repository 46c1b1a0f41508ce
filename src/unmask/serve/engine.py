"""One thread that owns the model: rows wait in a queue, are decoded in batches, and are answered as they end.

Rows of one decoder share its forwards. Batches of several decoders take turns, a step each, and so do single calls
(infilling, embeddings).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from unmask.sampling import Decoder, Request, SampledTokens


class QueueFullError(Exception):
    """As many rows wait as may wait."""


class CancelledError(Exception):
    """Nobody waits for the row any more."""


@dataclass(eq=False)
class Job:
    """A row to decode, or one call. done: gets what came of it, once, in the thread of the engine.

    request: of this row. Its seed is that of the call (seed, number of the row), so that it is decoded as in
    `lm.generate` of all of them.
    """

    done: Callable[[Any], None]
    prompt: Tensor | None = None
    decoder: Decoder | None = None
    request: Request | None = None
    call: Callable[[Callable[[], None]], Any] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise CancelledError if nobody waits any more."""
        if self.cancelled.is_set():
            raise CancelledError


class Engine:
    """The queue and its thread. max_queue: rows that may wait."""

    def __init__(self, lm: Any, *, max_queue: int) -> None:
        self.lm, self.max_queue = lm, max_queue
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="unmask-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(self, jobs: list[Job]) -> None:
        """Let jobs wait, all or none; raises QueueFullError."""
        with self._changed:
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFullError
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """End the thread at its next step."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._waiting.popleft()
            try:
                job.check()
                job.done(self._run(job))
            except CancelledError as error:
                job.done(error)
            except Exception as error:
                job.done(error)

    def _run(self, job: Job) -> Any:
        if job.call is not None:
            return job.call(job.check)
        assert job.decoder is not None
        sampled: SampledTokens = self.lm.sample([job.prompt], job.decoder, job.request)
        return sampled
