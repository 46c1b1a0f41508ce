"""The command `plan`: what a run takes before it starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unmask.cli.adapt import split_settings
from unmask.cli.app import Json, TrustRemoteCode, app, name_of
from unmask.plain_json import to_json
from unmask.tables import fitted, wrapped

if TYPE_CHECKING:
    from unmask.plan import Estimate

GB = 1e9


@app.command(epilog="Example: unmask plan Qwen/Qwen3-8B --gpus 8 --tokens 10B --recipe efficient-dlm")
def plan(
    model: Annotated[str, typer.Argument(**name_of("Folder, hub id or .gguf file; its configuration alone is read."))],
    tokens: Annotated[str, typer.Option(help="Training tokens, such as 50M or 10B.")],
    settings: Annotated[list[str] | None, typer.Argument(help="SETTING=VALUE, as for adapt.")] = None,
    gpus: Annotated[int, typer.Option(help="Devices.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of each, in GB.")] = 80.0,
    gpu_tflops: Annotated[
        float, typer.Option(help="Large matrix products in bfloat16, TFLOP/s; 685 were measured on an H200.")
    ] = 685.0,
    recipe: Annotated[str, typer.Option(help="Name of a recipe (see `unmask recipes`).")] = "tri-mode",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Estimate memory by part, tokens a second and hours of a run, and which layout fits."""
    from unmask.hf.sizes import sizes_of
    from unmask.limits import check_number, check_whole, number_of_tokens
    from unmask.model_name import locate
    from unmask.plan import estimates, fastest, trainable
    from unmask.recipe import load_recipe
    from unmask.resolve import resolve

    number = number_of_tokens(tokens, "--tokens")
    check_whole("--gpus", gpus)
    for name, value in (("--gpu-memory", gpu_memory), ("--gpu-tflops", gpu_tflops)):
        check_number(name, value)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} {value} must be positive and finite")
    files, chosen = split_settings(settings or [])
    if files:
        raise ValueError(f"{files[0]!r} is no SETTING=VALUE, and a plan needs no data")
    asked: dict[str, Any] = {"mixed_precision": "bf16"} | chosen
    run = load_recipe(recipe, **asked)
    sizes = sizes_of(locate(model), trust_remote_code=trust_remote_code)
    resolved = resolve(run, sizes.num_parameters, sizes.context, sizes.vocabulary)
    found = estimates(sizes, resolved, gpus, gpu_memory * GB, number, gpu_tflops)
    best = fastest(found)
    learning = trainable(sizes, resolved)
    if as_json:
        rows = [_plain(e) for e in found]
        print(to_json({"parameters": sizes.num_parameters, "trainable": learning, "tokens": number, "layouts": rows,
                       "choose": None if best is None else best.layout.name}))  # fmt: skip
        return
    print(wrapped(
        f"{model}: {sizes.num_parameters:,} parameters, {learning:,} learn; {recipe}, rows of {resolved.max_length:,} "
        f"tokens, batches of {resolved.batch_size}, {number:,.0f} tokens"
    ), end="\n\n")  # fmt: skip
    print(table(found))
    if best is None:
        print(f"\nnothing fits in {gpu_memory:g} GB: take more GPUs, lora_rank=N, or --recipe drafter", file=sys.stderr)
        return
    print()
    print(wrapped(
        f"take: {best.layout.name}, micro_batch_size={best.rows}. An estimate: memory within a fifth of what was "
        "measured, hours from one H200 and without what devices lose by waiting (docs/scale.md)"
    ))  # fmt: skip


def table(found: list[Estimate]) -> str:
    """A line for each layout, in GB."""
    head = ("layout", "rows", "weights", "gradients", "optimizer", "teacher", "activations", "gathered", "total GB",
            "fits", "tokens/s", "hours")  # fmt: skip
    lines: list[tuple[str, ...]] = [head]
    for e in found:
        parts = tuple(f"{value / GB:.1f}" for value in (*e.memory, e.total))
        speed = (f"{e.tokens_per_second:,.0f}", f"{e.hours:,.1f}")
        lines.append((e.layout.name, str(e.rows), *parts, "yes" if e.fits else "no", *speed))
    return fitted(lines)


def _plain(e: Estimate) -> dict[str, Any]:
    return {
        "layout": e.layout.name, "rows": e.rows, "bytes": {k: round(v) for k, v in e.memory._asdict().items()},
        "total_bytes": round(e.total), "fits": e.fits, "tokens_per_second": round(e.tokens_per_second, 1),
        "hours": round(e.hours, 3),
    }  # fmt: skip
