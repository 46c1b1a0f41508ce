"""One model object serves calls from several threads at once, each with the answer that it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import unmask

TEXT = "Once there was a grey mouse who liked to sing. "
CALLS: dict[str, Callable[[unmask.DiffusionLM], Any]] = {
    "blocks": lambda lm: lm.generate(TEXT, max_new_tokens=9, seed=1, temperature=1.0).sequences,
    "ar": lambda lm: lm.generate([TEXT, "Once"], mode="ar", max_new_tokens=7).sequences,
    "guided": lambda lm: lm.generate("The cat", max_new_tokens=6, guidance_scale=2.0).sequences,
    "infill": lambda lm: lm.infill("Once there", "in the sun.", 5).sequences,
    "nll": lambda lm: torch.tensor([out.nats for out in lm.nll([TEXT, TEXT * 2])]),
    "nelbo": lambda lm: torch.tensor([out.nats for out in lm.nelbo(TEXT * 2, num_samples=2, seed=0)]),
    "embed": lambda lm: lm.embed([TEXT, "The dog sang."]),
}


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_from_several_threads_get_their_own_answers(
    converted: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = unmask.load(converted)
    if compiled:
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        lm.compile()
    alone = {name: call(lm) for name, call in CALLS.items()}
    with ThreadPoolExecutor(4) as threads:
        results = [(name, threads.submit(CALLS[name], lm)) for _ in range(6) for name in CALLS]
    for name, result in results:
        assert torch.equal(result.result(), alone[name]), name


def test_a_callback_may_call_the_model_again(converted: Path) -> None:
    lm, seen = unmask.load(converted), []
    lm.generate(TEXT, max_new_tokens=3, callback=lambda *_: seen.append(lm.generate(TEXT, max_new_tokens=2).texts))
    assert seen
