"""`prepare`: write the tokens of a data set to a folder once, which any number of runs and processes read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unmask import hf
from unmask.conversion.text import bytes_of
from unmask.data import prepared
from unmask.data.documents import Encoder
from unmask.data.readers import Faults, Records, suffix_of
from unmask.data.sources import find_files, in_memory, is_prepared
from unmask.data.streams import from_datasets, has_splits, hub_records, records_of, stream_name
from unmask.data.workers import check_processes, default_processes
from unmask.loading import load_tokenizer
from unmask.model import DiffusionLM
from unmask.progress import note, progress
from unmask.recipe import check_data_settings, load_recipe
from unmask.settings import Settings

SETTINGS = ("text_column", "split", "skip_invalid", "end_token", "max_length")


def prepare(
    data: str | Path | Iterable[Any],
    model: str | Path | DiffusionLM,
    output_dir: str | Path,
    *,
    num_processes: int | None = None,
    show_progress: bool = True,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Tokenise data for a model into a folder, which `adapt` takes as data; return what its prepared.json says.

    data: as for `adapt`; a hub id is read to its end. model: of it the tokenizer and end tokens are read, no weights.
    num_processes: how many tokenise side by side; unset: as many as there are CPUs, for larger data.
    settings: those of `adapt` that say how data is read (`SETTINGS`); max_length is needed with skip_invalid alone, to
    leave out supervised examples that are longer. The rows that `adapt` packs from the folder are those of the data
    themselves. A folder that holds these data already is left as it is. Raises ValueError for what `adapt` would refuse
    and for a folder that holds something else.
    """
    place, chosen = Path(output_dir), _chosen(settings)
    check_processes(num_processes)
    if isinstance(model, DiffusionLM):
        tokenizer, ends = model.tokenizer, model.end_token_ids
    else:
        tokenizer, ends = load_tokenizer(model, base, trust_remote_code)
    sources = _sources(data, chosen.split, settings)
    end = next(iter(ends), None) if chosen.end_token is None else hf.end_token_id(tokenizer, chosen.end_token)
    encoder = Encoder(tokenizer, end, Faults(chosen.skip_invalid, note if show_progress else None), chosen.max_length)
    if place.exists() and not is_prepared(place) and (not place.is_dir() or any(place.iterdir())):
        raise ValueError(f"output folder {str(place)!r} holds something else: choose an empty or new one")
    if is_prepared(place):
        record = prepared.read_record(place)
        if record["made_of"] != prepared.made_of(sources, encoder, chosen.text_column):
            raise ValueError(f"output folder {str(place)!r} holds other prepared data: choose an empty or new one")
        return record
    if num_processes is None:
        num_processes = default_processes() if prepared.is_large(sources) else 1
    with progress("tokenise", bytes_of(sources), show=show_progress) as advance:
        prepared.prepare(
            place, sources, encoder, chosen.text_column, model=_name(model), processes=num_processes, progress=advance
        )
    return prepared.read_record(place)


def _chosen(settings: dict[str, Any]) -> Settings:
    """The settings, checked; ValueError for one that says nothing of data."""
    chosen = load_recipe("ar", **settings)
    other = next((name for name in settings if name not in SETTINGS), None)
    if other is not None:
        raise ValueError(f"{other}={settings[other]!r} is read by `adapt` alone; here: {', '.join(SETTINGS)}")
    if settings.get("max_length") is not None and not chosen.skip_invalid:
        raise ValueError(
            f"max_length={chosen.max_length} needs skip_invalid=true, which leaves out longer examples: without it all "
            "are kept, and `adapt` has a max_length of its own"
        )
    return chosen


def _sources(data: Any, split: str, settings: dict[str, Any]) -> list[Path | Records]:
    """Files or records of the data, a stream as records that are read once."""
    given = from_datasets(data, split)
    given = in_memory(data) if given is None else given
    found: list[Path] | None = None
    from_hub = False
    if given is None:
        names = [data] if isinstance(data, str | Path) else list(data)
        if not names:
            raise ValueError("data is empty: give at least one file, folder, hub id, text or record")
        found = find_files(names)
        from_hub = found is None
        if from_hub:
            given = hub_records(str(names[0]), split)
    elif not isinstance(given, Records):
        name = stream_name(given)
        given = Records(records_of(given, name), name)
    kinds = {suffix_of(file) for file in found} if found is not None else {str(given)}
    check_data_settings(settings, kinds, has_splits(data) or from_hub)
    return [given] if found is None else list(found)


def _name(model: str | Path | DiffusionLM) -> str:
    return str(getattr(model.model.config, "_name_or_path", "")) if isinstance(model, DiffusionLM) else str(model)
