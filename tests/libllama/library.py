"""libllama for tests, where `fetch.sh` put it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

LIBRARY = Path(os.environ.get("LIBLLAMA", Path.home() / ".cache" / "libllama"))
needs_libllama = pytest.mark.skipif(
    not any(LIBRARY.glob("libllama.*so")), reason="needs libllama: bash tests/libllama/fetch.sh"
)


def run(file: Path, adapter: Path | None = None, context: int = 128) -> Any:
    """The client of examples/llama_cpp.py on a file."""
    from llama_cpp import Llama

    return Llama(LIBRARY, file, adapter, context=context)
