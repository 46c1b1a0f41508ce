"""The decoders with flat keywords, as the tests call them: those of the request and the decoder's own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from unmask import sampling
from unmask.sampling import Request, SampledTokens

_ASKED = {entry.name for entry in fields(Request)}


def _split(options: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
    asked = {name: value for name, value in options.items() if name in _ASKED}
    return Request(**asked), {name: value for name, value in options.items() if name not in _ASKED}


def sample_autoregressive(network: Any, prompts: Any, **options: Any) -> SampledTokens:
    request, own = _split(options)
    return sampling.sample_autoregressive(network, prompts, request, **own)


def sample_blocks(network: Any, config: Any, prompts: Any, **options: Any) -> SampledTokens:
    suffixes = options.pop("suffixes", None)
    request, own = _split(options)
    if suffixes is None:
        return sampling.Blocks(**own)(network, config, prompts, request)
    around = [sampling.Canvas.around(p, request.max_new_tokens, s) for p, s in zip(prompts, suffixes, strict=True)]
    return sampling.Blocks(**own).fill(network, config, around, request)


def sample_canvases(network: Any, config: Any, prompts: Any, **options: Any) -> SampledTokens:
    request, own = _split(options)
    return sampling.WholeCanvas(**own)(network, config, prompts, request)


def sample_bidirectional(network: Any, config: Any, canvases: Any, **options: Any) -> SampledTokens:
    request, own = _split({"max_new_tokens": 1} | options)
    return sampling.sample_bidirectional(network, config, canvases, request, **own)


def sample_speculative(network: Any, config: Any, prompts: Any, **options: Any) -> SampledTokens:
    request, own = _split(options)
    return sampling.Speculative(**({"cycle": "two"} | own))(network, config, prompts, request)
