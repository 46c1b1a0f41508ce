"""A server in a thread of this process, for tests and benchmarks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from unmask import DiffusionLM
from unmask.serve.app import create_app
from unmask.serve.options import ServeOptions


@contextmanager
def running(lm: DiffusionLM, name: str = "tiny", **options: Any) -> Iterator[str]:
    """The address of a server of `lm`, which ends with the context; options: of `ServeOptions`."""
    app = create_app(lm, ServeOptions(name, **options))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    (port,) = {socket.getsockname()[1] for of in server.servers for socket in of.sockets}
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
