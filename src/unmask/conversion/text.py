"""The text of a run: rows to train on, held-out documents, and text that the model writes itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.conversion.job import Job, Parent
from unmask.data.corpus import Corpus
from unmask.data.documents import Encoder, load_corpus
from unmask.data.mixture import Mixture, mixed
from unmask.data.prepared import cached, is_large, open_for
from unmask.data.readers import Faults, Records
from unmask.data.sources import Part
from unmask.data.streams import RecordStream, open_hub
from unmask.evaluation.held_out import held_out_documents
from unmask.evaluation.likelihood import Document
from unmask.model import DiffusionLM
from unmask.progress import note, progress, say, warn
from unmask.resolve import Resolved
from unmask.settings import Settings
from unmask.training.batches import TrainingData, packed_documents
from unmask.training.ranks import join
from unmask.training.rollouts import roll_out
from unmask.training.sharded import spread


def read_text(job: Job, parent: Parent) -> Corpus | Mixture | RecordStream:
    """The text before documents are held out: files, records, prepared data, a stream, or text that the parent writes.

    If the model writes while it trains, the documents whose beginnings it will continue.
    """
    settings = parent.settings
    if job.parts is None:
        return _stream(job, parent)
    with progress(
        "tokenise", bytes_of([source for part in job.parts for source in part.sources]), show=job.show_progress
    ) as advance:
        corpora = [_read_part(job, parent, part, advance) for part in job.parts]
    if settings.self_prompts is not None:
        (corpus,) = corpora
        if writes_while_learning(settings):
            return corpus
        return write_own_text(parent.lm, parent, corpus, job.folder.path.parent, parent.fingerprint, job.show_progress)
    if len(corpora) == 1:
        return corpora[0]
    weights = [part.weight for part in job.parts if part.weight is not None]
    return mixed(corpora, weights or None)


def bytes_of(files: Sequence[Path | Records]) -> int | None:
    """Bytes of text in files that are not compressed; None with others."""
    if any(isinstance(file, Records) or file.suffix not in (".txt", ".jsonl") for file in files):
        return None
    return sum(file.stat().st_size for file in files if isinstance(file, Path))


def _read_part(job: Job, parent: Parent, part: Part, progress: Callable[[int], None]) -> Corpus:
    """One corpus: prepared data, or files; large ones are prepared beside the run's folder, by the main process."""
    settings = parent.settings
    encoder = _encoder(job, parent)
    if part.prepared is not None:
        return open_for(part.prepared, encoder)
    if is_large(part.sources):
        with join().main_process_first():
            corpus = cached(job.folder.path.parent, part.sources, encoder, settings.text_column, progress, _noting(job))
        if corpus is not None:
            return corpus
    return _read_files(job, parent, part.sources, max_length=settings.max_length, progress=progress)


def _encoder(job: Job, parent: Parent) -> Encoder:
    """What makes documents of the run's text."""
    settings = parent.settings
    faults = Faults(settings.skip_invalid, _noting(job))
    return Encoder(parent.lm.tokenizer, parent.end_token_id, faults, settings.max_length)


def _stream(job: Job, parent: Parent) -> RecordStream:
    """The records of a hub data set, or of the stream that was given."""
    settings, (name,) = parent.settings, job.sources
    encoder = _encoder(job, parent)
    if job.stream is not None:
        return RecordStream(job.stream, name, encoder, text_column=settings.text_column, fingerprint=name)
    data, fingerprint = open_hub(name, settings.split), f"{name}:{settings.split}"
    return RecordStream(data, f"data {name!r}", encoder, text_column=settings.text_column, fingerprint=fingerprint)


def _read_files(job: Job, parent: Parent, files: Sequence[Path | Records], **limits: Any) -> Corpus:
    """`load_corpus` with the parent's tokens and the run's settings of data."""
    settings = parent.settings
    return load_corpus(
        files, parent.lm.tokenizer, end_token_id=parent.end_token_id, text_column=settings.text_column,
        skip_invalid=settings.skip_invalid, note=_noting(job), **limits,
    )  # fmt: skip


def _noting(job: Job) -> Callable[[str], None] | None:
    return note if job.show_progress else None


def writes_while_learning(settings: Settings) -> bool:
    """Whether the model writes text during training, with its current weights, and not once before it."""
    return settings.self_prompts is not None and (settings.self_mode == "diffusion" or settings.self_every is not None)


def write_own_text(
    lm: DiffusionLM, parent: Parent, prompts: Corpus, folder: Path, author: str, show_progress: bool, step: int = 0
) -> Corpus:
    """Continuations of the beginnings of `prompts`: all that the run needs, or what self_every steps need.

    folder: of the cache. author: identifies the weights in the cache. step: the training step at which it is written.
    """
    settings = parent.settings
    num_tokens = settings.self_tokens or settings.max_tokens
    assert num_tokens is not None  # checked by `plan`
    if settings.self_every is not None:
        num_tokens = min(num_tokens, settings.self_every * settings.batch_size * settings.max_length)
    with progress("roll out", num_tokens, show=show_progress) as advance:
        return roll_out(
            lm.network, prompts, folder, author=author, num_tokens=num_tokens,
            max_length=settings.max_length, temperature=settings.self_temperature,
            end_token_ids=lm.end_token_ids, seed=settings.seed, first=step * settings.batch_size,
            student=lm.diffusion if settings.self_mode == "diffusion" else None, num_steps=settings.self_steps,
            learn_end=settings.self_end, progress=advance, spread=functools.partial(spread, lm.model),
        )  # fmt: skip


@dataclass(frozen=True)
class Data:
    """The training text, the rows that its steps read, and the held-out documents."""

    text: Corpus | Mixture | RecordStream
    rows: TrainingData
    held_out: list[Document]


def hold_out(job: Job, parent: Parent, text: Corpus | Mixture | RecordStream) -> Data:
    """Take the held-out documents from eval_data, or from the end of the text, and pack the rest into rows."""
    settings, held_out = parent.settings, []
    if job.held_out_sources is not None:
        context, number = parent.lm.network.context_length, settings.eval_documents
        corpus = _read_files(job, parent, job.held_out_sources, max_length=context, max_documents=number)
        held_out = held_out_documents(corpus, parent.end_token_id)
    cut = num_held_out(job, text)
    if cut and isinstance(text, Corpus | Mixture):
        text, last = text.split(cut)
        held_out = held_out_documents(last, parent.end_token_id)
    if settings.predict_padding:
        text = _filled_up(text, settings, parent.end_token_id)
    to_write = (settings.self_tokens or settings.max_tokens) if writes_while_learning(settings) else None
    if to_write is None and isinstance(text, Corpus | Mixture):
        _check_length(text, settings)
    data = Data(text, packed_documents(settings, text, to_write=to_write), held_out)
    if job.show_progress:
        for line in _said_of(job, data, settings.max_length):
            say(line)
    return data


def _said_of(job: Job, data: Data, max_length: int) -> Iterator[str]:
    """Lines about the training text: how much it is, how far its rows are filled, what a mixture is made of."""
    text, per_row = data.text, data.rows.tokens_per_row
    if isinstance(text, RecordStream) and not data.held_out and job.settings.eval_documents:
        yield "data: nothing is held out of a stream; eval_data=FILE, or ID:SPLIT of the hub, evaluates the model"
    if isinstance(text, RecordStream) or per_row is None:
        return
    filled = f"rows of {max_length} are filled to {100 * per_row / max_length:.1f}%"
    yield f"data: {len(text):,} documents, {text.num_tokens:,} tokens an epoch; {filled}"
    if isinstance(text, Mixture):
        for part, share, passes in zip(job.parts or (), text.shares, text.passes, strict=True):
            yield f"  {part.name}: {100 * share:.1f}% of the tokens, read {passes:.2f} times an epoch"


def _check_length(text: Corpus | Mixture, settings: Resolved) -> None:
    """Warn of a text that does not fill a row."""
    if text.num_tokens < settings.max_length and join().is_main_process:
        effect = "the rest of the row is padding" if settings.max_tokens is None else "each row repeats it"
        warn(
            f"the training text has {text.num_tokens} tokens, less than a row of max_length={settings.max_length}: "
            f"{effect}; give more text or a smaller max_length"
        )


def num_held_out(job: Job, text: Corpus | Mixture | RecordStream) -> int:
    """Documents to hold out from the end of the text: 1%, at most eval_documents; 0 with eval_data or a hub stream."""
    if job.held_out_sources is not None or not isinstance(text, Corpus | Mixture):
        return 0
    return min(job.settings.eval_documents, len(text) // 100)


def _filled_up(text: Corpus | Mixture | RecordStream, settings: Resolved, end_token_id: int | None) -> Corpus | Mixture:
    """One document in each row, as predict_padding asks; ValueError if that is not possible."""
    if not isinstance(text, Corpus | Mixture) or end_token_id is None:
        lacks = "an end token, which this model lacks" if end_token_id is None else "files, not a streamed data set"
        raise ValueError(f"predict_padding=true needs {lacks}")
    longest = text.longest()
    if longest > settings.max_length:
        raise ValueError(
            f"predict_padding=true puts each document in a row of its own, and one of {longest} tokens exceeds "
            f"max_length={settings.max_length}: raise max_length"
        )
    return text.filled_up(settings.max_length, end_token_id)
