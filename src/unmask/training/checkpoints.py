"""What a training run leaves on disk: metrics.jsonl, a row a log step, and checkpoint-<step> folders."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate

from unmask.data.packing import PackState
from unmask.plain_json import to_json
from unmask.run_folder import newest_whole, put_in_place, seal, sync, write_text, writing


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


def append_metrics(output_dir: Path, row: dict[str, Any]) -> None:
    path = output_dir / "metrics.jsonl"
    with writing(path), path.open("a") as file:
        file.write(to_json(row) + "\n")


def count_rows(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def trim_metrics(path: Path, state: TrainState) -> None:
    """Drop rows that were written after `state`: they will be written again."""
    rows = path.read_text().splitlines() if path.exists() else []
    kept = []
    for row in rows[: state.rows]:
        try:
            if json.loads(row)["step"] <= state.step:
                kept.append(row)
        except json.JSONDecodeError:  # a line cut by the interruption
            continue
    write_text(path, "".join(row + "\n" for row in kept))


def save_checkpoint(accelerator: accelerate.Accelerator, output_dir: Path, state: TrainState, keep: int) -> None:
    """Write checkpoint-<step> whole or not at all, and drop the oldest beyond `keep`."""
    final = output_dir / f"checkpoint-{state.step}"
    partial = output_dir / f"checkpoint-{state.step}.partial"
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
    if accelerator.is_main_process:
        try:
            with writing(final):
                if (output_dir / "metrics.jsonl").exists():
                    sync(output_dir / "metrics.jsonl")
                write_text(partial / "state.json", to_json(asdict(state)))
                seal(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        put_in_place(partial, final, state.step, keep)
    accelerator.wait_for_everyone()


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    return newest_whole(output_dir, quiet=True)


def read_state(checkpoint: Path) -> TrainState:
    raw = json.loads((checkpoint / "state.json").read_text())
    return TrainState(**(raw | {"data": PackState(**raw["data"])}))
