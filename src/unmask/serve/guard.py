"""What is looked at before a request is read: its API key, and its size."""

from __future__ import annotations

import hmac
from typing import Any

from unmask.serve.errors import AUTHENTICATION, ApiError
from unmask.serve.options import ServeOptions

OPEN = ("/", "/health")
"""Paths that need no key."""


class Guard:
    """ASGI middleware that refuses requests without the key, and bodies that are too large."""

    def __init__(self, app: Any, options: ServeOptions) -> None:
        self.app, self.options = app, options

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        wrong = self._wrong_key(scope["path"], headers) or self._wrong_size(headers)
        if wrong is not None:
            await wrong.answer()(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.options.max_body:
                await self._too_large(len(body)).answer()(scope, receive, send)
                return
        read = False

        async def replay() -> Any:
            nonlocal read
            if read:
                return await receive()
            read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    def _wrong_key(self, path: str, headers: dict[bytes, str]) -> ApiError | None:
        key = self.options.api_key
        if key is None or path in OPEN:
            return None
        given = headers.get(b"authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            return None
        what = "the API key is wrong" if given else "there is no API key: send it as Authorization: Bearer KEY"
        return ApiError(401, what, AUTHENTICATION, code="invalid_api_key")

    def _wrong_size(self, headers: dict[bytes, str]) -> ApiError | None:
        length = headers.get(b"content-length", "0")
        return self._too_large(int(length)) if length.isdigit() and int(length) > self.options.max_body else None

    def _too_large(self, size: int) -> ApiError:
        return ApiError(413, f"the body of {size} bytes exceeds {self.options.max_body}: send less")
