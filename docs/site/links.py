"""A hook of mkdocs: links of pages to files outside docs/ become the file's path, as the site has docs/ alone."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LOG = logging.getLogger("mkdocs.hooks")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`[text](../path)` -> "text (`path`)", or the path alone where the text says it.

    A path that does not exist is a warning, which --strict makes an error.
    """

    def path_of(found: re.Match[str]) -> str:
        if not (ROOT / found[2]).exists():
            LOG.warning("%s links to %s, which does not exist", page.file.src_path, found[2])
        named = found[1].strip("`/") == found[2].rstrip("/")
        return f"`{found[2]}`" if named else f"{found[1]} (`{found[2]}`)"

    return re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)", path_of, markdown)
