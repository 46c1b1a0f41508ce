"""The run and its folder: the content of run.json, whether the run is finished already, the lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from unmask.conversion.job import Job, Parent
from unmask.conversion.run_record import check_same_run, extends, read_earlier
from unmask.conversion.text import num_held_out
from unmask.data.corpus import Corpus
from unmask.data.mixture import Mixture
from unmask.data.streams import RecordStream
from unmask.progress import note
from unmask.settings import to_plain
from unmask.training.checkpoints import latest_checkpoint
from unmask.training.ranks import check_shared, join, main_alone


def describe(job: Job, parent: Parent, text: Corpus | Mixture | RecordStream) -> dict[str, Any]:
    """The part of run.json that decides the result of the run."""
    teacher = {"name": parent.settings.teacher, "fingerprint": parent.teacher_fingerprint}
    return {
        "parent": {"name": parent.name, "class": parent.class_name, "fingerprint": parent.fingerprint},
        "teacher": None if parent.settings.teacher is None else teacher,
        "settings": to_plain(parent.settings),
        "data": {
            "sources": list(job.sources),
            "fingerprint": text.fingerprint,
            "held_out": num_held_out(job, text),
        },
    }


def holds_finished(job: Job, run: dict[str, Any]) -> bool:
    """Whether the folder holds this run, finished; ValueError if it holds another run, or no checkpoint to extend."""
    if job.earlier is None:
        return False
    check_same_run(job.folder, job.earlier, run)
    if not _is_longer(job, run):
        return bool(job.earlier.get("finished"))
    if latest_checkpoint(job.folder.path) is None:
        raise ValueError(
            f"output folder {str(job.folder.path)!r} holds no checkpoint from which max_tokens could be raised"
        )
    return False


def _is_longer(job: Job, run: dict[str, Any]) -> bool:
    """Whether max_tokens extends the run in the folder."""
    return job.earlier is not None and extends(job.earlier, run["settings"]["max_tokens"])


@contextmanager
def claim_folder(job: Job, run: dict[str, Any]) -> Iterator[None]:
    """Within the context the main process holds the lock of the folder; `run` is written to its run.json.

    Raises ValueError on all processes, also where one does not see the folder of the main one.
    """
    join().wait_for_everyone()  # all have read the folder before one writes to it
    with ExitStack() as held:
        with main_alone() as is_main:
            if is_main:
                held.enter_context(job.folder.claimed())
                _begin(job, run)
        check_shared(job.folder.path)
        yield


def _begin(job: Job, run: dict[str, Any]) -> None:
    if read_earlier(job.folder, job.resume) != job.earlier:
        raise ValueError(f"output folder {str(job.folder.path)!r} was changed by another run meanwhile: start again")
    job.folder.write(run)
    if _is_longer(job, run):
        note(
            f"the run goes on to max_tokens={run['settings']['max_tokens']}; its learning rates and other "
            "schedules are stretched over the new total, so that it differs from one run of that length"
        )
