"""The command export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli.app import Base, Json, TrustRemoteCode, app, name_of
from unmask.plain_json import to_json


@app.command(epilog="Example: unmask export runs/drafter --format uno --output served/drafter")
def export(
    model: Annotated[str, typer.Argument(**name_of("Folder or hub id of the model."))],
    format: Annotated[
        str,
        typer.Option(
            help="hf: for transformers alone. gguf: for llama.cpp. sglang: blocks of Qwen3, for SGLang and LMDeploy. "
            "uno: a drafter, for SGLang and vLLM."
        ),
    ],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    quantize: Annotated[
        str | None, typer.Option(help="How weights are packed: q8_0, q5_1, q5_0, q4_1 or q4_0 (gguf).")
    ] = None,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Write a model as a folder that other programs serve."""
    from unmask.export import export_model

    said = export_model(model, format, output, quantize=quantize, base=base, trust_remote_code=trust_remote_code)
    if as_json:
        print(to_json({"format": format, "output": str(output), **said}))
        return
    print(f"saved to {output}; its README.md says how it is served")
    for name, line in said.items():
        print(f"\n{name}:\n  {line}")
