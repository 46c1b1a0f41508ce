"""The command serve."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from unmask.cli.app import Base, TrustRemoteCode, app, name_of
from unmask.cli.options import packed


@app.command(epilog="Example: unmask serve runs/q --port 8000")
def serve(
    model: Annotated[str, typer.Argument(**name_of("Folder, hub id or .gguf file."))],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="What clients must send; by default UNMASK_API_KEY, if it is set.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the model, for clients; by default its folder's or hub id.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Rows that may wait; more are answered with 429.")] = 256,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows that decode at a time.")] = 16,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer, at most.")] = None,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request, at most.")] = 4 * 2**20,
    deadline: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...")] = None,
    base: Base = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's interface has it."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"serve needs the package {error.name}: pip install 'unmask[serve]'") from error

    import unmask
    from unmask.serve.app import create_app
    from unmask.serve.options import ServeOptions

    known = name or (Path(model).name if os.path.exists(model) else model)
    options = ServeOptions(
        known, api_key=api_key or os.environ.get("UNMASK_API_KEY"), max_queue=max_queue, max_rows=max_rows,
        max_new_tokens=max_new_tokens, max_body=max_body, deadline=deadline,
    )  # fmt: skip
    with _listening(host, port) as listening:  # before the model is loaded, which takes longer
        lm = unmask.load(model, device=device, dtype=dtype, base=base, trust_remote_code=trust_remote_code)
        packed(lm)
        at = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        print(f"serving {known!r} at {at} (clients of OpenAI's: base_url={at}/v1)", file=sys.stderr, flush=True)
        application = create_app(lm, options)
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning"))
        _stop_at_once(server, application.state.server.engine.close)
        server.run(sockets=[listening])


def _stop_at_once(server: Any, close: Callable[[], None]) -> None:
    """Let the first Ctrl-C end the answers that are being written, for which uvicorn alone would wait."""
    go_on = server.handle_exit

    def handle_exit(signal: int, frame: Any) -> None:
        if server.should_exit:  # a second Ctrl-C: what is cut off now fails, and nobody needs to read how
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        else:
            print("stopping: answers that are not complete end here", file=sys.stderr, flush=True)
            threading.Thread(target=close, daemon=True).start()
        go_on(signal, frame)

    server.handle_exit = handle_exit


def _listening(host: str, port: int) -> socket.socket:
    """A socket at this address; ValueError where there can be none."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host {host!r} --port {port} cannot be listened on ({error}): give another") from error
