"""The command that writes tokens of data once: prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli.adapt import split_settings
from unmask.cli.app import Base, Json, TrustRemoteCode, app, name_of
from unmask.plain_json import to_json


@app.command(epilog="Example: unmask prepare corpus/ more.jsonl.gz --model Qwen/Qwen3-0.6B-Base --output prepared/q")
def prepare(
    data: Annotated[
        list[str],
        typer.Argument(help="Files, folders of them, or one hub id; and text_column, split, skip_invalid, end_token or "
                       "max_length as SETTING=VALUE."),
    ],
    model: Annotated[str, typer.Option("--model", **name_of("Whose tokenizer: a folder, hub id or .gguf file."))],
    output: Annotated[Path, typer.Option(help="Folder for the tokens, to be given to `unmask adapt --data`.")],
    processes: Annotated[
        int | None, typer.Option(help="How many tokenise side by side; by default as many as there are CPUs.")
    ] = None,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Tokenise data once, for runs and processes that share it."""
    names, chosen = split_settings(data)
    if not names:
        raise ValueError(f"no data in {' '.join(data)!r}: give at least one file, folder or hub id")

    import unmask

    sources = [Path(name) if name else name for name in names]
    record = unmask.prepare(
        sources, model, output, num_processes=processes, base=base, trust_remote_code=trust_remote_code, **chosen
    )
    shown = {name: record[name] for name in ("num_documents", "num_tokens", "num_bytes", "left_out")}
    if as_json:
        print(to_json({"output": str(output), **shown}))
        return
    print(f"{shown['num_documents']:,} documents, {shown['num_tokens']:,} tokens: give --data {output}")
