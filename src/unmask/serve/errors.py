"""What goes wrong, as OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

BAD, AUTHENTICATION, BUSY, BROKEN = "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
"""Types of errors, as clients of OpenAI know them."""


class ErrorBody(BaseModel):
    """message: what is wrong, with the value and the fix. param: the field that it is about. code: for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorBody


ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": what}
    for status, what in {
        "400": "Bad input: a field that is unknown, out of range, or not read here.",
        "401": "No API key, or a wrong one.",
        "404": "No such model, or no such path.",
        "405": "The path has other methods.",
        "413": "The body is too large.",
        "429": "The queue is full: try again later.",
        "500": "A fault of the server.",
        "503": "The server is stopping.",
        "504": "The deadline has passed.",
        "4XX": "Bad input.",
    }.items()
}
"""Of the OpenAPI schema: every error that a route may answer with."""


class ApiError(Exception):
    """An answer that is not 200."""

    def __init__(
        self, status: int, message: str, kind: str = BAD, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.body = status, ErrorBody(message=message, type=kind, param=param, code=code)

    def as_json(self) -> dict[str, Any]:
        """The body of the answer."""
        return ErrorAnswer(error=self.body).model_dump()

    def answer(self) -> JSONResponse:
        """The answer."""
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.status == 429:
            headers["Retry-After"] = "1"
        return JSONResponse(self.as_json(), self.status, headers)


class StoppingError(ApiError):
    """The server ends, and gives no answer that is not complete by then."""

    def __init__(self) -> None:
        super().__init__(503, "the server is stopping: ask again when it is back", BROKEN, code="stopping")


def api_error(error: BaseException, fields: Sequence[str] = ()) -> ApiError:
    """An exception as an answer: what the library refuses is bad input, about the first field that it names."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError | TypeError):
        message = " ".join(str(error).split()) or "bad input"
        words = re.findall(r"\w+", message[:200])
        return ApiError(400, message, param=next((word for word in words if word in fields), None))
    return ApiError(500, f"{type(error).__name__}: a fault of the server, which its log describes", BROKEN)


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body, in one line."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(place)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"field {name!r} is unknown: leave it out", param=name, code="unknown_parameter")
    given = "" if first["type"] == "missing" else f" (got {_short(first.get('input'))})"
    message = f"{name or 'the body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{given}"
    return ApiError(400, message.removesuffix("."), param=name or None)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def add_handlers(app: FastAPI) -> None:
    """Answer every error with OpenAI's object."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.answer()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).answer()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        what = {404: f"there is no path {request.url.path!r}", 405: f"{request.url.path} takes no {request.method}"}
        answer = ApiError(error.status_code, what.get(error.status_code, str(error.detail))).answer()
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def _other(_: Request, error: Exception) -> JSONResponse:
        return api_error(RuntimeError(type(error).__name__)).answer()
