"""The checkpoint-<step> folders of a training run: written whole, checked against a manifest, the newest whole one."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from unmask.data.packing import PackState
from unmask.plain_json import to_json
from unmask.progress import note
from unmask.run_folder import RunFolder, ordinary_permissions, sync, write_text, writing
from unmask.training.ranks import main_alone

# Tied weights are saved once, and tied again when they are loaded.
logging.getLogger("accelerate.utils.other").addFilter(lambda line: "Removed shared tensor" not in line.getMessage())

MANIFEST = "files.json"
"""In a checkpoint: size and CRC-32 of each of its files."""


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds besides weights and optimiser.

    loss, counted: sums over the steps since the last row of metrics.jsonl. rows: how many rows that file has, None in
    checkpoints that do not say. skipped: steps without an update, whose loss or gradient was not finite.
    """

    step: int = 0
    tokens: int = 0
    data: PackState = field(default_factory=PackState)
    loss: float = 0.0
    counted: float = 0.0
    rows: int | None = None
    skipped: int = 0


def drop_later_rows(folder: RunFolder, state: TrainState) -> None:
    """Drop rows that were written after `state`: they will be written again."""
    folder.write_rows(row for row in folder.read_rows()[: state.rows] if row["step"] <= state.step)


def save_checkpoint(accelerator: accelerate.Accelerator, folder: RunFolder, state: TrainState, keep: int) -> None:
    """Write checkpoint-<step> whole or not at all, and drop the oldest beyond `keep`."""
    final = folder.path / f"checkpoint-{state.step}"
    partial = folder.path / f"checkpoint-{state.step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        with writing(final):
            accelerator.save_state(str(partial))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # its space may be what is lacking
        raise
    accelerator.wait_for_everyone()  # each wrote a file of its own into the folder
    with main_alone() as is_main:
        if is_main:
            try:
                with writing(final):
                    folder.sync_rows()
                    write_text(partial / "state.json", to_json(asdict(state)))
                    seal(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            put_in_place(partial, final, state.step, keep)


def hold_learnt_alone(accelerator: accelerate.Accelerator) -> None:
    """Leave frozen weights out of the checkpoints: packed ones have forms that are not written or read back."""

    def save(models: list[Any], weights: list[dict[str, Any]], _folder: str) -> None:
        for model, state in zip(models, weights, strict=True):
            for name in set(state) - _learnt(model):
                del state[name]

    def load(models: list[Any], folder: str) -> None:
        (model,) = models
        state = load_file(Path(folder) / "model.safetensors")
        if set(state) != _learnt(model):
            raise ValueError("it holds other parameters than those that learn")
        model.load_state_dict(state, strict=False)
        models.clear()  # nothing is left for Accelerate to load

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _learnt(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return newest_whole(output_dir, quiet=True)


def read_state(checkpoint: Path) -> TrainState:
    raw = json.loads((checkpoint / "state.json").read_text())
    return TrainState(**(raw | {"data": PackState(**raw["data"])}))


# --- whole checkpoints


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-<step>, oldest first; copies, half-written ones and files are none."""
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name)
        if match is not None and path.is_dir():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def newest_whole(output_dir: Path, *, quiet: bool = False) -> Path | None:
    """The newest checkpoint that is as it was written; a line on stderr for each one passed over unless `quiet`."""
    for path in reversed(checkpoints(output_dir)):
        fault = damage(path)
        if fault is None:
            return path
        if not quiet:
            note(f"{path} is damaged ({fault}) and passed over")
    return None


def seal(checkpoint: Path) -> None:
    """Write the manifest of a new checkpoint, give its files ordinary permissions, and have all on the disk."""
    ordinary_permissions(checkpoint)
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    write_text(checkpoint / MANIFEST, to_json({name: _sum(checkpoint / name) for name in names}))
    for path in checkpoint.rglob("*"):
        sync(path)
    sync(checkpoint)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if nothing is."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if not isinstance(state, dict) or not {"step", "tokens", "data"} <= set(state):
            return "state.json is no training state"
        if (checkpoint / MANIFEST).is_file():
            for name, known in json.loads((checkpoint / MANIFEST).read_text()).items():
                if _sum(checkpoint / name) != known:
                    return f"{name} is not what was written"
            return None
        return _unreadable(checkpoint)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _sum(path: Path) -> list[int]:
    """[size in bytes, CRC-32]"""
    size = total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, total = size + len(block), zlib.crc32(block, total)
    return [size, total]


def _unreadable(checkpoint: Path) -> str | None:
    """The first file of a checkpoint without a manifest that its format says is cut or spoilt."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    for kind in ("model", "optimizer"):
        if not any(kind in path.name for path in files):
            return f"its {kind} is missing"
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as opened:
                    opened.keys()
            elif path.suffix in (".bin", ".pkl", ".pt"):
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        return f"{path.name} is not what was written"
        except (SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.name}: {error}"
    return None


def put_in_place(partial: Path, final: Path, step: int, keep: int) -> None:
    """Make the whole checkpoint `partial` the one of `step`, and drop all but the newest `keep` up to it.

    Later ones belong to a past that did not happen: the run went on from before them, as they were damaged.
    """
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    sync(final.parent)
    found = checkpoints(final.parent)
    steps = [int(path.name.removeprefix("checkpoint-")) for path in found]
    present = [path for path, at in zip(found, steps, strict=True) if at <= step]
    for old in [path for path in found if path not in present[-keep:]]:
        shutil.rmtree(old)
