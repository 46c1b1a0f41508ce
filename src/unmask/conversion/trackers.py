"""Trackers of a run (tensorboard, wandb, mlflow and others that Accelerate knows): its figures, sent by one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from unmask.progress import note
from unmask.resolve import Resolved
from unmask.training.loop import Progress
from unmask.training.ranks import main_alone

Track = Callable[[int, Mapping[str, float]], None]
"""Sends the figures of a step."""

_PROJECT = "unmask"


def check_tracker(name: str | None) -> None:
    """Raise ValueError for a tracker that Accelerate does not know, or whose package is not installed."""
    if name is None:
        return
    known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
    if name not in (*LOGGER_TYPE_TO_CLASS, "all"):
        raise ValueError(f"report_to={name!r} is unknown: use one of {known}, or all of them that are installed (all)")
    if not _chosen(name):
        package = "tensorboard, or that of another tracker" if name == "all" else name.replace("_", "-")
        raise ValueError(f"report_to={name!r} needs a package that is not installed: pip install {package}")


def _chosen(name: str) -> list[str]:
    """The trackers of this name whose packages are installed."""
    installed = [str(kind.value) for kind in get_available_trackers()]
    return installed if name == "all" else [name] if name in installed else []


@contextmanager
def tracking(settings: Resolved, folder: Path, start: int) -> Iterator[Track]:
    """Within the context, a function that sends figures to the run's trackers; on one process, once.

    tensorboard writes into `folder`; the others where their own settings (environment variables) say. start: the step
    at which the run begins: what was sent of later ones, by a run that was cut short, is not shown by tensorboard.
    Raises ValueError for a tracker that does not start. One that fails later is left, with a note.
    """
    trackers: dict[str, Any] = {}

    def track(step: int, figures: Mapping[str, float]) -> None:
        for name in list(trackers):
            with _leaving(trackers, name):
                trackers[name].log(dict(figures), step=step)

    try:
        with main_alone() as is_main:
            if is_main and settings.report_to is not None:
                for name in _chosen(settings.report_to):
                    trackers[name] = _started(name, settings, folder, start)
        yield track
    finally:
        for name in list(trackers):
            with _leaving(trackers, name):
                trackers[name].finish()


def _started(name: str, settings: Resolved, folder: Path, start: int) -> Any:
    kind = LOGGER_TYPE_TO_CLASS[name]
    of_kind: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": start + 1}, "wandb": {"name": folder.name},
        "mlflow": {"run_name": folder.name},
    }  # fmt: skip
    place = [str(folder)] if kind.requires_logging_directory else []
    try:
        tracker = kind(_PROJECT, *place, **of_kind.get(name, {}))
        tracker.start()
    except Exception as error:  # a service fails in ways of its own
        raise ValueError(f"report_to={name!r} does not start ({_line(error)}): mend that, or leave it out") from error
    try:
        tracker.store_init_configuration({key: str(value) for key, value in asdict(settings).items()})
    except Exception as error:  # mlflow keeps the settings that a run began with, also where it goes on with others
        note(f"report_to={name!r} does not take the settings of the run ({_line(error)}); run.json has them")
    return tracker


@contextmanager
def _leaving(trackers: dict[str, Any], name: str) -> Iterator[None]:
    """Within the context an error of a tracker is a note, and ends its use."""
    try:
        yield
    except Exception as error:
        del trackers[name]
        note(f"report_to={name!r} failed ({_line(error)}) and gets no more figures; metrics.jsonl has all of them")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def figures_of(progress: Progress) -> dict[str, float]:
    """What trackers get of a log step: what its line says, and what metrics.jsonl keeps. memory: GiB."""
    return {
        "tokens": progress.tokens,
        "loss": progress.loss,
        "learning_rate": progress.learning_rate,
        "tokens_per_second": progress.tokens_per_second,
        "gradient_norm": progress.gradient_norm,
        "memory": progress.memory,
        **progress.evaluation,
    }
