"""The rows of `gpu.py` as a page of tables. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_COLUMNS: dict[str, tuple[str, dict[str, str]]] = {
    "device": ("Rates of one large matrix product, TFLOP/s", {
        "bf16": "bf16", "tf32": "TF32", "float32": "float32", "nominal_bf16": "bf16 by the data sheet"}),
    "train": ("Training steps", {
        "tokens_per_second": "tokens/s", "seconds_per_step": "s per step", "mfu": "MFU", "of_matmul": "of matmul rate",
        "peak_gib": "peak GiB", "waits_per_step": "waits per step", "first_step_seconds": "first step, s",
        "second_step_seconds": "second step, s",
        "rows": "rows", "length": "length", "micro_batch_size": "rows at once", "steps": "steps"}),
    "decode": ("Decoding", {
        "tokens_per_second": "tokens/s", "milliseconds_per_forward": "ms per forward",
        "tokens_per_forward": "tokens per forward", "equal": "texts equal", "waits_per_forward": "waits per forward",
        "peak_gib": "peak GiB", "first_seconds": "first time, s", "rounds": "rounds"}),
    "forward": ("One denoising forward beside reading the weights", {
        "milliseconds": "ms", "milliseconds_of_weights": "ms of reading the weights", "ratio": "ratio"}),
    "embed": ("Embeddings", {
        "tokens_per_second": "tokens/s", "texts_per_second": "texts/s", "mfu": "MFU", "of_matmul": "of matmul rate",
        "peak_gib": "peak GiB", "waits": "waits", "rounds": "rounds"}),
}  # fmt: skip


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a table for each part, and what failed."""
    if not rows:
        return "# No rows yet\n"
    made = rows[0]["made"]
    about = ", ".join(f"{name} {value}" for name, value in made.items() if name not in ("device", "new"))
    lines = [f"# {made.get('device')}", "", "    PYTHONPATH=src python benchmarks/gpu.py RESULTS", "",
             f"{about}. Random weights and text; {made.get('new')} new tokens a text. `docs/performance.md` says what "
             "the rows mean."]  # fmt: skip
    for part, (title, columns) in _COLUMNS.items():
        of_part = [row for row in rows if row["case"].startswith(f"{part}/") and "error" not in row]
        if of_part:
            lines += [
                "",
                f"## {title}",
                "",
                f"| case | {' | '.join(columns.values())} |",
                "|---" * (len(columns) + 1) + "|",
            ]
            for row in of_part:
                cells = [_cell(row.get(name)) for name in columns]
                lines.append(f"| {row['case'].removeprefix(f'{part}/')} | {' | '.join(cells)} |")
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["", "## Failed", "", "| case | error |", "|---|---|"]
        lines += [f"| {row['case']} | {row['error'].replace('|', '/')} |" for row in failed]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
