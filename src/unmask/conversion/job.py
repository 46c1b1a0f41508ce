"""The first two steps of `adapt`: the job, checked without a model, and the parent model, checked against the job."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unmask import hf
from unmask.conversion.continuing import check_mask_stays, recipe_settings
from unmask.conversion.run_record import IN_MEMORY, read_earlier
from unmask.conversion.trackers import check_tracker
from unmask.data.readers import Records, suffix_of
from unmask.data.sources import Part, find_files, find_parts, in_memory, local_files
from unmask.data.streams import from_datasets, has_splits, hub_records, stream_name
from unmask.hf import lora
from unmask.limits import check_function
from unmask.loading import load, read_config
from unmask.model import DiffusionLM
from unmask.model_name import locate
from unmask.recipe import PREPARED_DATA, check_data_settings
from unmask.resolve import Resolved, against_shards, of_device, resolve
from unmask.run_folder import RunFolder
from unmask.settings import Settings
from unmask.training.devices import check_machine
from unmask.training.optimizer import check_optimizer
from unmask.training.ranks import asked_to_shard, capability_of, check_launcher, chosen_device, join, sharding
from unmask.training.structures import of_main
from unmask.training.teacher import load_teacher


@dataclass(frozen=True)
class Job:
    """The arguments of `adapt`, checked as far as possible without the model.

    sources: names for run.json. parts: what of the data makes one corpus, or with self_prompts the files whose
    documents the model continues; None for a hub id and a stream. stream: a `datasets.IterableDataset`.
    held_out_sources: those of eval_data. earlier: run.json of the run that this one continues, None for a new run.
    callbacks: called at log steps, see `reports`. began: when the job did, `time.perf_counter`.
    """

    model: str | Path | DiffusionLM
    settings: Settings
    sources: tuple[str, ...]
    parts: Sequence[Part] | None
    stream: Any
    held_out_sources: Sequence[Path | Records] | None
    folder: RunFolder
    earlier: dict[str, Any] | None
    resume: bool
    show_progress: bool
    base: str | Path | None
    trust_remote_code: bool
    callbacks: Sequence[Callable[..., object]]
    began: float


def plan(
    model: str | Path | DiffusionLM,
    data: Any,
    recipe: str | None,
    overrides: dict[str, Any],
    folder: RunFolder,
    resume: bool,
    show_progress: bool,
    base: str | Path | None,
    trust_remote_code: bool,
    callbacks: Sequence[Callable[..., object]] = (),
) -> Job:
    """Resolve the recipe, find the data files and read the folder; ValueError for an error in any of them.

    recipe: None keeps what a converted model is. overrides: settings that replace the recipe's.
    """
    settings = recipe_settings(_known(model, base), recipe, overrides)
    if not isinstance(callbacks, Iterable):
        raise ValueError(f"callbacks {callbacks!r} must be a list of functions of a `Progress`")
    for callback in callbacks:
        check_function("callback", callback, "lambda progress: print(progress.loss)")
    if settings.teacher not in (None, "parent"):
        locate(str(settings.teacher))
    sources, given = _sources(data, settings.split)
    check_tracker(settings.report_to)
    check_launcher()
    check_optimizer(settings.optimizer)
    reason = against_shards(settings) if asked_to_shard() else None
    if reason is not None:
        raise ValueError(reason)
    if settings.lora_rank is not None:
        lora.require_peft()
    own = sources == ("self",)
    if own != (settings.self_prompts is not None) or (own and not (settings.self_tokens or settings.max_tokens)):
        raise ValueError(
            f"data {list(sources)} with self_prompts={settings.self_prompts!r}: text of the "
            "model's own needs --data self alone, self_prompts=FILE for its beginnings, and --max-tokens or self_tokens"
        )
    parts: Sequence[Part] | None = None
    if settings.self_prompts is not None:
        parts = [Part(tuple(local_files([settings.self_prompts], "self_prompts")), settings.self_prompts)]
    elif isinstance(given, Records):
        parts = [Part((given,), str(given))]
    elif given is None:
        parts = find_parts(sources)
    held_out = None if settings.eval_data is None else _held_out(settings.eval_data)
    from_hub = given is None and (parts is None or not all(part.sources for part in parts))
    parts = parts and [_with_records(part, settings.split) for part in parts]
    kinds = {kind for part in parts or () for kind in _kinds(part)} | {_kind(source) for source in held_out or ()}
    kinds |= {"a hub data set"} if from_hub else {"a stream"} if parts is None else set()
    check_data_settings(overrides, kinds, from_hub or has_splits(data))
    earlier = read_earlier(folder, resume)
    shown = show_progress and join().is_main_process
    stream = None if isinstance(given, Records) else given
    return Job(
        model, settings, sources, parts, stream, held_out, folder, earlier, resume, shown, base, trust_remote_code,
        tuple(callbacks), time.perf_counter(),
    )  # fmt: skip


def _with_records(part: Part, split: str) -> Part:
    """The part, that of a hub id with its records."""
    return part if part.sources else replace(part, sources=(hub_records(part.name, split),))


def _known(model: str | Path | DiffusionLM, base: str | Path | None) -> DiffusionLM | dict[str, Any]:
    """What is known of a model before it is loaded: the object in its config.json."""
    if not isinstance(model, DiffusionLM):
        return read_config(model, base)
    if base is not None:
        raise ValueError(f"base={str(base)!r} is for a drafter's or adapter's folder, and this model is loaded already")
    return model


def _kinds(part: Part) -> set[str]:
    """Suffixes of files, and words for other data."""
    if part.prepared is not None:
        return {PREPARED_DATA}
    return set(map(_kind, part.sources))


def _kind(source: Path | Records) -> str:
    return suffix_of(source) if isinstance(source, Path) else str(source)


def _held_out(name: str) -> Sequence[Path | Records]:
    """The files of eval_data, or the records of a hub id, or of ID:SPLIT."""
    files = find_files([name])
    if files is not None:
        return files
    hub_id, _, split = name.partition(":")
    return [hub_records(hub_id, split or "validation", "eval_data")]


def _sources(data: Any, split: str) -> tuple[tuple[str, ...], Any]:
    """The names of the data for run.json, and what lies in memory or streams; None for files and a hub id."""
    given = from_datasets(data, split)
    given = in_memory(data) if given is None else given
    if given is not None:
        return (str(given) if isinstance(given, Records) else stream_name(given),), given
    sources = (str(data),) if isinstance(data, str | Path) else tuple(map(str, data))
    if not sources:
        raise ValueError("data is empty: give at least one file, folder, hub id, text or record")
    return sources, None


@dataclass(frozen=True)
class Parent:
    """The model to adapt, and the settings with the values that its size decides.

    class_name: of the model, which has another class while it is sharded. dtype: that its folder says its weights
    have, None where nothing does. fingerprint, teacher_fingerprint: hashes of weights. end_token_id: the token that
    ends a document. teacher: the AR model that the setting names, None if it names the parent itself or nothing.
    """

    lm: DiffusionLM
    name: str
    class_name: str
    dtype: str | None
    fingerprint: str
    settings: Resolved
    end_token_id: int | None
    teacher: DiffusionLM | None
    teacher_fingerprint: str | None


def load_parent(job: Job) -> Parent:
    """Load the model and resolve the settings; ValueError for settings that do not fit this model."""
    settings, ranks = job.settings, join()
    lm, fingerprint = _loaded(job)
    name = name_of(lm)
    if settings.lora_rank is not None and not settings.lora_merge and name == IN_MEMORY:
        raise ValueError("lora_merge=false: an adapter needs the name of its base, and this model is in memory only")
    _check_learns(lm, settings, name)
    check_mask_stays(lm, settings, name)
    if settings.mask_token is not None and lm.diffusion is None:
        hf.check_mask_token(lm.model, lm.tokenizer, settings.mask_token)
    if settings.random_offset and not hf.sees_position_differences(lm.model):
        raise ValueError(
            f"random_offset=true moves a document's positions, which {type(lm.model).__name__} sees as such: it needs "
            "a model with rotary positions"
        )
    if settings.block_size is None and lm.diffusion is not None:
        settings = replace(settings, block_size=lm.diffusion.block_size)
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    settings = replace(settings, **_of_device(job, lm, ranks.device))
    num_parameters = lm.model.num_parameters()  # packed weights hold several in one number
    resolved = resolve(settings, num_parameters, lm.network.context_length, vocabulary)
    check_rank(lm, settings)
    check_machine(resolved, ranks.num_processes, ranks.device)
    teacher, teacher_fingerprint = None, None if settings.teacher is None else fingerprint
    if settings.teacher not in (None, "parent"):
        own = job.trust_remote_code
        teacher, teacher_fingerprint = _once(lambda: load_teacher(lm, resolved, trust_remote_code=own), own)
    end_token_id = _end_token_id(lm, settings.end_token)
    class_name = type(lm.model).__name__
    return Parent(
        lm, name, class_name, _dtype_of(job), fingerprint, resolved, end_token_id, teacher, teacher_fingerprint
    )


def _of_device(job: Job, lm: DiffusionLM, device: torch.device) -> dict[str, Any]:
    """Values of settings that are unset: of the run that goes on, else what is fast on this device."""
    before = None if job.earlier is None else job.earlier["settings"]["mixed_precision"]
    settings = job.settings
    if settings.mixed_precision is None and before is not None:
        settings = replace(settings, mixed_precision=before)
    takes_flex = hf.takes_flex(lm.model) and importlib.util.find_spec("triton") is not None  # which it is compiled with
    fast = of_device(settings, device.type, capability_of(device), takes_flex=takes_flex)
    return {"mixed_precision": settings.mixed_precision} | fast


def _dtype_of(job: Job) -> str | None:
    """The type that the folder of the parent says its weights have."""
    if isinstance(job.model, DiffusionLM):
        return None
    config = read_config(job.model, job.base)
    found = config.get("dtype") or config.get("torch_dtype")
    return None if found is None else str(found)


def check_base(lm: DiffusionLM, settings: Settings, name: str) -> None:
    """Raise ValueError for a drafter where its base is wanted, and for a drafter on a converted model."""
    if lm.drafter is not None:
        raise ValueError(f"model {name!r} is a drafter on a frozen base: adapt the base itself")
    if settings.objective == "distill" and lm.diffusion is not None:
        raise ValueError(f"model {name!r} is converted already: a drafter needs an untouched AR model as its base")


def check_rank(lm: DiffusionLM, settings: Settings) -> None:
    """Raise ValueError for adapters of a rank above the sides of every weight matrix: more rank adds nothing."""
    widest = max(max(p.shape[-2:]) for n, p in lm.model.named_parameters() if p.ndim >= 2)
    name = "drafter_rank" if settings.objective == "distill" else "lora_rank"
    rank = getattr(settings, name)
    if rank is not None and rank > widest:
        raise ValueError(f"{name}={rank} exceeds the widest weight of this model, {widest}: use less")


def _loaded(job: Job) -> tuple[DiffusionLM, str]:
    """The model, and the hash of its weights."""
    settings, model = job.settings, job.model
    if not isinstance(model, DiffusionLM):

        def load_base() -> DiffusionLM:
            lm = load(model, dtype=settings.dtype or "float32", quantization_config=settings.quantize,
                      attn_implementation=settings.attn_implementation, base=job.base,
                      trust_remote_code=job.trust_remote_code, **_place(model))  # fmt: skip
            check_base(lm, settings, name_of(lm))
            return lm

        return _once(load_base, own=job.trust_remote_code)
    device = _device()
    _check_loaded(model, settings)
    check_base(model, settings, name_of(model))
    if device is not None and hf.quantisation_of(model.model) is None:
        model.model.to(device)
    return model, hf.fingerprint(model.model)


def _once(load: Callable[[], DiffusionLM], own: bool = False) -> tuple[DiffusionLM, str]:
    """An AR model and the hash of its weights; processes that will share its parameters have the main one load it.

    own: each loads it, since others could not make its class.
    """

    def load_whole() -> tuple[Any, Any, Any, str]:
        lm = load()
        if lm.drafter is not None:
            lm.drafter.detach()
        return lm.model, lm.tokenizer, lm.diffusion, hf.fingerprint(lm.model)

    model, tokenizer, diffusion, fingerprint = load_whole() if own else of_main(load_whole)
    return DiffusionLM(model, tokenizer, diffusion).known_finite(), fingerprint


def _place(model: str | Path) -> dict[str, Any]:
    """Where `load` puts a model. Several processes of one machine read weights straight to their devices: the copies
    that each would make on the CPU first may exceed the memory of the host."""
    device = _device()
    straight = isinstance(device, torch.device) and device.type == "cuda" and not str(model).endswith(".gguf")
    return {"device_map": {"": device}} if straight else {"device": device}


def _device() -> torch.device | str | None:
    """Where a model is loaded: on this process's device, or the CPU if processes share it out; None is the best."""
    ranks = join()
    if sharding():
        return "cpu"
    return ranks.device if ranks.num_processes > 1 or chosen_device() else None


def name_of(lm: DiffusionLM) -> str:
    """What run.json calls a model: its folder or hub id, or that it is in memory."""
    return str(getattr(lm.model.config, "_name_or_path", "") or IN_MEMORY)


def _check_loaded(lm: DiffusionLM, settings: Settings) -> None:
    """Raise ValueError for settings of loading that a model in memory does not have."""
    present = {
        "attn_implementation": lm.model.config.get_text_config()._attn_implementation,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
    }
    for name, loaded in present.items():
        asked = getattr(settings, name)
        if asked not in (None, loaded):
            raise ValueError(
                f"{name}={asked!r} is chosen when a model is loaded, and this one is in memory with {loaded!r}: give "
                f"its folder or hub id, or load it with {name}"
            )
    if settings.quantize is not None:
        raise ValueError(
            f"quantize={settings.quantize!r} packs weights while they are read, and this model is in memory: "
            "give its folder or hub id, or load it with quantization_config"
        )


def _check_learns(lm: DiffusionLM, settings: Settings, name: str) -> None:
    """Raise ValueError if packed weights would have to change."""
    quantised = hf.quantisation_of(lm.model)
    if quantised is None or settings.objective == "distill":
        return
    if settings.lora_rank is None:
        raise ValueError(
            f"model {name!r} is quantised ({quantised}), and packed weights cannot learn: add lora_rank=N "
            "lora_merge=false, use the recipe 'drafter', or load it unquantised"
        )
    if settings.lora_merge:
        raise ValueError(
            f"lora_merge=true: adapters merged into packed weights ({quantised}) would be rounded away: set "
            "lora_merge=false, and load the folder on the unquantised base to merge them"
        )


def _end_token_id(lm: DiffusionLM, end_token: str | None) -> int | None:
    """The token that ends a document: the one named, which becomes an end token of the model, or the model's own."""
    if end_token is not None:
        return hf.add_end_token(lm.model, lm.tokenizer, end_token)
    return next(iter(lm.end_token_ids), None)
