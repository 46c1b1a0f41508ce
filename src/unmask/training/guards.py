"""What ends a long run early, and how: a signal to stop, too little memory, a process that does not come on.

Knows torch, and the store through which processes find each other; nothing of models or data.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from unmask.resolve import Resolved

STOPPED = 128 + signal.SIGTERM
"""The exit status of a run that SIGTERM ended."""


class StopRequest:
    """Whether SIGTERM has come, with which Slurm announces that it will take the machine; a second one ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _ask(self, *_signal: object) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, self._before)


@contextmanager
def naming_memory(settings: Resolved, step: int, num_processes: int) -> Iterator[None]:
    """Turn an error of too little memory into a ValueError that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not _of_memory(error, text):
            raise
        changes = []
        if settings.micro_batch_size > 1:
            changes.append(f"micro_batch_size={max(1, settings.micro_batch_size // 2)} (the result stays the same)")
        if not settings.gradient_checkpointing:
            changes.append("gradient_checkpointing=true")
        if settings.mixed_precision == "no":
            changes.append("mixed_precision=bf16")
        learns_all = settings.objective != "distill" and settings.lora_rank is None
        if learns_all and settings.optimizer == "adamw" and num_processes < 2:  # it does not go with FSDP2
            changes.append("optimizer=adamw-8bit")
        changes.append(f"max_length below {settings.max_length}")
        changes.append("more processes with FSDP2 (docs/scale.md)" if num_processes < 2 else "more processes")
        raise ValueError(f"out of memory in step {step} ({text[:160]}): try {', '.join(changes)}") from error


def _of_memory(error: RuntimeError, text: str) -> bool:
    """Whether an error is of too little memory; the allocator of a CPU raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text


class StepClock:
    """Ends the process if a step takes too long, and says which processes lag.

    Processes wait for each other inside collectives, where nothing can interrupt them. So each tells the store of the
    process group how far it is, and a thread reads what the others told. seconds: of one step, None waits for ever.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._place, self._since = "", 0.0
        self._store: Any = None
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if seconds is None or not several:
            return
        self._store = dist.distributed_c10d._get_default_store()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="step clock", daemon=True).start()

    def reach(self, place: str) -> None:
        """Tell the others that this process is at `place`, such as "step 3"; empty where no step runs."""
        self._place, self._since = place, time.monotonic()
        if self._store is not None:
            self._store.set(f"unmask/{self.rank}", place or "between steps")

    def close(self) -> None:
        """End the thread."""
        if self._store is not None:
            self._closed.set()

    def _watch(self) -> None:
        assert self.seconds is not None
        while not self._closed.wait(min(5.0, self.seconds / 4)):
            place, since = self._place, self._since
            if place and time.monotonic() - since > self.seconds and place == self._place:
                self._end(place)

    def _end(self, place: str) -> None:
        keys = [f"unmask/{rank}" for rank in range(self.size)]
        places = [self._store.get(key).decode() if self._store.check([key]) else "its start" for key in keys]
        others = [f"process {rank} is at {at}" for rank, at in enumerate(places) if at != place]
        where = "; ".join(others) or "all processes are at the same place, so one hangs inside a pass or its network"
        took = f"{place} took more than rank_timeout={self.seconds:g} seconds on process {self.rank}"
        advice = "look at that machine, or raise rank_timeout, then go on with --resume"
        print(f"error: {took}: {where}; {advice}", file=sys.stderr, flush=True)
        os._exit(1)
