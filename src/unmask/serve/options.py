"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.limits import check_number, check_whole


@dataclass(frozen=True)
class ServeOptions:
    """name: of the model, for clients. api_key: what clients must send, None for no key.

    max_queue: rows that may wait for their turn. max_rows: rows that decode at a time. max_new_tokens: of a row, None
    for what the model's context holds. max_choices: n of a request, and prompts of one. max_body: bytes of a request.
    deadline: seconds that a request may take.
    """

    name: str
    api_key: str | None = None
    max_queue: int = 256
    max_rows: int = 16
    max_new_tokens: int | None = None
    max_choices: int = 128
    max_body: int = 4 * 2**20
    deadline: float = 600.0

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_rows", "max_new_tokens", "max_choices", "max_body"):
            check_whole(name, getattr(self, name))
        check_number("deadline", self.deadline)
        if not 0 < self.deadline < 1e9:
            raise ValueError(f"deadline {self.deadline} must be a positive number of seconds")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError(f"api_key {self.api_key!r} must be printable ASCII, as HTTP headers are")
