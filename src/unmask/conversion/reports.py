"""What is done at the log steps of a run: the bar, trackers, texts that the model writes meanwhile, callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from unmask.conversion.job import Job
from unmask.conversion.text import Data
from unmask.conversion.trackers import Track, figures_of
from unmask.evaluation.beside import beginnings, write
from unmask.model import DiffusionLM
from unmask.progress import say
from unmask.run_folder import RunFolder
from unmask.training.loop import Progress
from unmask.training.sharded import is_sharded

Callback = Callable[[Progress], object]
"""Called on the main process with the figures of each log step; False ends the run there, saved and finished."""


def reports(
    job: Job, lm: DiffusionLM, data: Data, bar: Callable[[Progress], None], track: Track, start: int
) -> Callback:
    """All that is done at a log step, as one; start: the step at which the run begins."""
    first: list[Callback] = [bar, lambda progress: track(progress.step, figures_of(progress))]
    if job.settings.sample_texts:
        first.append(_writing(job, lm, data, start))

    def report(progress: Progress) -> bool:
        answers = [callback(progress) for callback in (*first, *job.callbacks)]
        return not any(answer is False for answer in answers)

    return report


def texts_of(folder: RunFolder) -> RunFolder:
    """The folder, with the texts of a run as its rows: step, and text."""
    return replace(folder, rows_file="samples.jsonl")


def _writing(job: Job, lm: DiffusionLM, data: Data, start: int) -> Callback:
    """Show, and keep, what the model writes after the beginning of a held-out document at each evaluation."""
    mask = None if lm.diffusion is None else lm.diffusion.mask_token_id
    prompts = beginnings([document.ids for document in data.held_out], mask, number=1)
    texts = texts_of(job.folder)
    texts.write_rows(row for row in texts.read_rows() if row["step"] <= start)

    def sample(progress: Progress) -> None:
        if not progress.evaluation or not len(prompts) or is_sharded(lm.model):  # one process cannot write alone then
            return
        lm.model.eval()
        written = write(lm, prompts)
        lm.model.train()
        texts.append({"step": progress.step, "text": written.text, "tokens_per_forward": written.tokens_per_forward})
        if job.show_progress:
            say(f"step {progress.step}: {lm.tokenizer.decode(prompts[0])!r} goes on {written.text!r}")

    return sample
