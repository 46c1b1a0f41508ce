"""Decode a converted model with transformers alone; folders of format `hf` hold this as custom_generate/generate.py.

    model.generate(**inputs, custom_generate="FOLDER", trust_remote_code=True, max_new_tokens=64)

or any `generate` of a model that was loaded with trust_remote_code=True. It imports torch and transformers, and nothing
of unmask. Rows are decoded one after the other, block by block on a key-value cache: masked positions get a token where
the model is sure, at least one a forward. mode="speculative" gives the text of mode="ar" in fewer forwards.

Options beside those of `generate`: mode ("diffusion", "ar", "speculative"), block_size, confidence_threshold,
max_denoising_steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteriaList, StopStringCriteria

_NEUTRAL_AT_1 = ("num_beams", "num_beam_groups", "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
                 "typical_p", "guidance_scale")  # fmt: skip
_READ = ("max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id",
         "bos_token_id", "num_return_sequences", "stop_strings", "use_cache", "transformers_version")  # fmt: skip


@dataclass(frozen=True)
class _Options:
    """temperature: 0 is greedy. end: tokens that end a text. mask: the mask token. context: of positions, or None."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    end: tuple[int, ...]
    mask: int
    context: int | None
    block_size: int | None
    confidence_threshold: float
    max_denoising_steps: int | None


def generate(
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    streamer: Any = None,
    stopping_criteria: Any = None,
    tokenizer: Any = None,
    mode: str | None = None,
    block_size: int | None = None,
    confidence_threshold: float | None = None,
    max_denoising_steps: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Token ids (rows, prompt + new), padded on the right; rows of `input_ids` may be padded on the left."""
    diffusion = model.config.diffusion
    causal = diffusion["attention"] == "two_stream" and diffusion["clean_attention"] == "causal"
    mode = mode or ("speculative" if causal else "diffusion")
    for name in ("custom_generate", "trust_remote_code"):  # of the call that led here
        kwargs.pop(name, None)
    own = {"block_size": block_size, "confidence_threshold": confidence_threshold,
           "max_denoising_steps": max_denoising_steps}  # fmt: skip
    _check(mode, causal, diffusion, own)
    ids = inputs if input_ids is None else input_ids
    if mode == "ar":
        mask = [diffusion["mask_token_id"], *(kwargs.pop("suppress_tokens", None) or [])]
        return type(model).generate(
            model, ids, generation_config, attention_mask=attention_mask, streamer=streamer, tokenizer=tokenizer,
            stopping_criteria=stopping_criteria, suppress_tokens=mask, **kwargs,
        )  # fmt: skip
    read = _reader(model.generation_config, generation_config, kwargs)
    if ids is None or not ids.shape[1]:
        begin = read("bos_token_id") if read("bos_token_id") is not None else _ids(read("eos_token_id"))[0]
        ids, attention_mask = torch.tensor([[begin]], device=model.device), None
    ids = ids.to(model.device).repeat_interleave(read("num_return_sequences") or 1, dim=0)
    if streamer is not None and len(ids) > 1:
        raise ValueError(f"a streamer shows one row, not {len(ids)}")
    real = torch.ones_like(ids) if attention_mask is None else attention_mask.to(ids.device)
    real = real.repeat_interleave(len(ids) // len(real), dim=0).bool()
    options = _options(model, read, ids.shape[1], own)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if read("stop_strings"):
        if tokenizer is None:
            raise ValueError(f"stop_strings {read('stop_strings')!r} need tokenizer=")
        criteria.append(StopStringCriteria(tokenizer, read("stop_strings")))
    decode = _speculative if mode == "speculative" else _blocks
    new = [_row(decode(_Network(model), diffusion, ids[i][real[i]].tolist(), options), ids[i][real[i]], options,
                criteria, streamer) for i in range(len(ids))]  # fmt: skip
    pad = read("pad_token_id")
    pad = (options.end or (0,))[0] if pad is None else pad
    filled = [row + [pad] * (max(map(len, new)) - len(row)) for row in new]
    return torch.cat([ids, torch.tensor(filled, dtype=torch.long, device=ids.device)], dim=1)


def _check(mode: str, causal: bool, diffusion: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse a mode that the model lacks, and options that the mode does not read or that are out of range."""
    if mode not in ("ar", "diffusion", "speculative"):
        raise ValueError(f"mode {mode!r} is unknown: use 'diffusion', 'ar' or 'speculative'")
    if mode == "speculative" and not causal:
        raise ValueError("mode 'speculative' needs a model with a causal clean half: use 'diffusion'")
    for name, value in own.items():
        if value is None:
            continue
        if mode == "ar" or (mode == "speculative" and name != "block_size") or (
            name == "block_size" and diffusion["attention"] == "bidirectional"
        ):  # fmt: skip
            raise ValueError(f"{name}={value!r} is not read by mode {mode!r} of this model: leave it out")
        if name == "confidence_threshold" and not 0 <= value <= 1:
            raise ValueError(f"confidence_threshold {value} must lie in [0, 1]")
        if name != "confidence_threshold" and (type(value) is not int or value < 1):
            raise ValueError(f"{name} {value!r} must be a whole number from 1 on")


def _reader(own: Any, given: Any, kwargs: dict[str, Any]) -> Any:
    """name -> its value, of the call, its generation_config or the model's; ValueError for others that are set."""
    asked = {name: value for name, value in vars(given).items() if value != getattr(own, name, None)} if given else {}
    for name, value in (asked | kwargs).items():
        neutral = value is None or value is False or value == 0 or (name in _NEUTRAL_AT_1 and value == 1)
        if name.startswith("_") or name in _READ or neutral or (isinstance(value, list | tuple) and not value):
            continue
        raise ValueError(f"{name}={value!r} is not read when a diffusion model is decoded: leave it out, or use "
                         "mode='ar'")  # fmt: skip

    def read(name: str) -> Any:
        sources = (kwargs.get(name), getattr(given, name, None), getattr(own, name, None))
        return next((value for value in sources if value is not None), None)

    return read


def _options(model: Any, read: Any, prompt_length: int, own: dict[str, Any]) -> _Options:
    config = model.config.get_text_config()
    length, threshold = read("max_new_tokens"), own.pop("confidence_threshold")
    if length is None:
        length = 128 if read("max_length") is None else max(0, read("max_length") - prompt_length)
    sampled = bool(read("do_sample"))
    temperature = 1.0 if read("temperature") is None else read("temperature")
    return _Options(
        length, temperature if sampled else 0.0, read("top_k") or 0, 1.0 if read("top_p") is None else read("top_p"),
        _ids(read("eos_token_id")), model.config.diffusion["mask_token_id"],
        getattr(config, "max_position_embeddings", None),
        confidence_threshold=0.9 if threshold is None else threshold, **own,
    )  # fmt: skip


def _ids(ids: Any) -> tuple[int, ...]:
    return tuple(ids) if isinstance(ids, list | tuple) else () if ids is None else (int(ids),)


def _row(
    pieces: Iterator[tuple[list[int], list[int]]], prompt: Tensor, options: _Options, criteria: Any, streamer: Any
) -> list[int]:
    """The new tokens of a row from what its decoder gives: final tokens, and those after them as they are now."""
    limit = options.max_new_tokens
    if options.context is not None:
        if len(prompt) >= options.context:
            raise ValueError(f"a prompt of {len(prompt)} tokens fills the context of {options.context}: shorten it")
        limit = min(limit, options.context - len(prompt))
    if streamer is not None:
        streamer.put(prompt.cpu())
    new: list[int] = []
    for final, draft in pieces:
        before, ended = len(new), False
        for token in final[: limit - len(new)]:
            new.append(token)
            text = torch.cat([prompt, prompt.new_tensor(new)])[None]
            ended = token in options.end or (len(criteria) > 0 and bool(criteria(text, None).all()))
            if ended:
                break
        if streamer is not None and len(new) > before:
            streamer.put(torch.tensor(new[before:]))
        if ended or len(new) >= limit:
            break
        if hasattr(streamer, "put_draft") and draft:
            streamer.put_draft(torch.tensor(draft))
    if streamer is not None:
        streamer.end()
    return new


class _Network:
    """A stock model and a cache of the first `length` tokens of a text; later ones see these and what a mask says."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config.get_text_config()
        names = inspect.signature(model.forward).parameters
        self.keyword = "cache" if "cache" in names else "past_key_values"
        self.some_rows = "logits_to_keep" in names
        self.cache, self.length = DynamicCache(), 0

    @torch.inference_mode()
    def __call__(self, tokens: list[int], sees: Tensor, rows: list[int], keep: int) -> Tensor:
        """Logits (len(rows), vocabulary) of these rows; the first `keep` tokens stay cached.

        sees: (n, n) bool, True where a token attends to another one of this pass.
        """
        device, n = self.model.device, len(tokens)
        position = self.length + torch.arange(n)
        known = torch.arange(self.length + n)
        allowed = torch.cat([torch.ones(n, self.length, dtype=torch.bool), sees], dim=1)
        wanted = torch.tensor(rows, dtype=torch.long, device=device)
        logits = self.model(
            input_ids=torch.tensor([tokens], device=device), position_ids=position[None].to(device), use_cache=True,
            attention_mask=self._masks(allowed, (position[:, None] - known).abs()),
            **{self.keyword: self.cache}, **({"logits_to_keep": wanted} if self.some_rows else {}),
        ).logits[0]  # fmt: skip
        if self.cache.get_seq_length() != self.length + n:
            raise ValueError(f"{type(self.model).__name__} left its cache as it was, so it cannot be decoded")
        self.length += n
        self.remove(n - keep)
        logits = logits if self.some_rows else logits[wanted]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits[:, self.model.config.diffusion["mask_token_id"]] = -torch.inf
        return logits

    def remove(self, count: int) -> None:
        """Take the last tokens out of the cache."""
        self.length -= count
        if count:
            self.cache.crop(-count)  # since 5.24 a number of tokens to remove, before that a length if positive

    def _masks(self, allowed: Tensor, distance: Tensor) -> Any:
        """The model's attention_mask, one for each type of its layers if these differ."""
        window = getattr(self.config, "sliding_window", None)
        if not self.model.config.diffusion.get("windows", True):
            window = None
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if window is None or (kinds and "sliding_attention" not in kinds):
            return self._mask(allowed)
        near = self._mask(allowed & (distance < window))
        if not kinds:
            return near
        return {kind: near if kind == "sliding_attention" else self._mask(allowed)
                for kind in kinds | {"full_attention"}}  # fmt: skip

    def _mask(self, allowed: Tensor) -> Tensor:
        kind, mask = self.config._attn_implementation, allowed[None, None].to(self.model.device)
        if kind == "sdpa":
            return mask
        if kind != "eager":
            raise ValueError(f"attention {kind!r} takes no 4-D mask: load the model with attn_implementation='sdpa'")
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _blocks(
    network: _Network, config: dict[str, Any], prompt: list[int], options: _Options
) -> Iterator[tuple[list[int], list[int]]]:
    """Block after block; a whole canvas is one block that holds the prompt too."""
    end = len(prompt) + options.max_new_tokens
    end = end if options.context is None else min(end, options.context)
    canvas = config["attention"] == "bidirectional"
    size = end if canvas else options.block_size or config["block_size"]
    text, known = [*prompt, *[options.mask] * (end + size - len(prompt))], len(prompt)
    start, first = len(prompt) // size * size, None
    clean = "causal" if config["clean_attention"] == "causal" else "block_causal"
    if start and not canvas:
        block = torch.arange(start) // size
        sees = torch.ones(start, start).tril().bool() if clean == "causal" else block <= block[:, None]
        first = network(text[:start], sees, [start - 1], start)
    while start < end:
        width = size if options.context is None else min(size, options.context - start)
        full = torch.ones(width, width, dtype=torch.bool)
        sees = full.tril() if config.get("noisy_attention") == "causal" else full
        masked, step = [i for i in range(max(known, start) - start, width) if start + i < end], 0
        while masked:
            rows = [i - 1 for i in masked if i] if config["shift"] else masked
            logits = network(text[start : start + width], sees, rows, 0)
            if config["shift"] and masked[0] == 0:
                assert first is not None
                logits = torch.cat([first, logits])
            tokens = _choose(logits, options)
            at_least = 1
            if options.max_denoising_steps is not None:
                at_least = -(-len(masked) // max(1, options.max_denoising_steps - step))
            for i in _sure(logits, tokens, options.confidence_threshold, at_least):
                text[start + masked[i]] = int(tokens[i])
            masked, step = [i for i in masked if text[start + i] == options.mask], step + 1
            before, known = known, start + masked[0] if masked else min(start + width, end)
            yield text[before:known], text[known : min(start + width, end)]
        if start + size < end:
            sees = full.tril() if clean == "causal" else full
            first = network(text[start : start + width], sees, [width - 1], width)
        start += size


def _sure(logits: Tensor, tokens: Tensor, threshold: float, at_least: int) -> list[int]:
    """Which tokens become final: those of probability above the threshold, and the `at_least` likeliest ones."""
    largest = logits.amax(-1, keepdim=True)
    p = 1 / (logits - largest).exp().sum(-1, dtype=torch.float64)
    p = p * (logits.gather(-1, tokens[:, None]) - largest)[:, 0].double().exp()
    count = max(at_least, int((p > threshold).sum()))
    return p.argsort(descending=True, stable=True)[:count].tolist()


def _speculative(
    network: _Network, config: dict[str, Any], prompt: list[int], options: _Options
) -> Iterator[tuple[list[int], list[int]]]:
    """Cycles of two forwards: [last token | masks] gives the next token and drafts, [next | drafts] verifies these."""
    size, shift = options.block_size or config["block_size"], config["shift"]
    causal = config.get("noisy_attention") == "causal"
    spare = int(not (shift and causal))  # masks that draft nothing and are there for the others
    text = list(prompt)
    if len(prompt) > 1:
        triangle = torch.ones(len(prompt) - 1, len(prompt) - 1).tril().bool()
        network(text[:-1], triangle, [0], len(text) - 1)
    while True:
        room = size if options.context is None else min(size, options.context - len(text))
        if room < 1:
            return
        masks = room - 1 + spare if room > 1 else 0
        sees = torch.ones(1 + masks, 1 + masks, dtype=torch.bool)
        sees = sees.tril() if causal else sees
        sees[0, 1:] = False  # the last token is the AR model's
        rows = [0, *[i + int(not shift) for i in range(1, room)]]  # of the next token, and of the drafts after it
        logits = network([text[-1], *[options.mask] * masks], sees, rows, 1)
        tokens = _choose(logits, options)
        drafted = tokens[1:].tolist()
        passed = [int(tokens[0]), *drafted]
        triangle = torch.ones(len(passed), len(passed)).tril().bool()
        verified = network(passed, triangle, list(range(len(passed))), len(passed))
        accepted, following = _accept(drafted, logits[1:], verified, options)
        network.remove(len(drafted) - accepted)
        final = [passed[0], *drafted[:accepted], following]
        text += final
        yield final, []


def _accept(drafts: list[int], q: Tensor, p: Tensor, options: _Options) -> tuple[int, int]:
    """How many drafts are accepted, and the token after them (rejection sampling, 2211.17192).

    q: logits (k, vocabulary) that they were drawn from. p: the AR model's, (k + 1, vocabulary).
    """
    if not options.temperature:
        best = p.argmax(-1).tolist()
        accepted = next((i for i, draft in enumerate(drafts) if draft != best[i]), len(drafts))
        return accepted, best[accepted]
    drawn, target = _distribution(q, options), _distribution(p, options)
    for i, draft in enumerate(drafts):
        if float(torch.rand(())) * float(drawn[i, draft]) >= float(target[i, draft]):
            rest = (target[i] - drawn[i]).clamp_min(0)
            return i, int(torch.multinomial(rest / rest.sum(), 1))
    return len(drafts), int(torch.multinomial(target[-1], 1))


def _choose(logits: Tensor, options: _Options) -> Tensor:
    """Tokens (n,) of logits (n, vocabulary): the likeliest, or drawn."""
    if not options.temperature:
        return logits.argmax(-1)
    return torch.multinomial(_distribution(logits, options), 1)[:, 0]


def _distribution(logits: Tensor, options: _Options) -> Tensor:
    """Probabilities (n, vocabulary) at the temperature, of the top_k likeliest tokens and of those that hold top_p."""
    scores = logits.double() / options.temperature
    if 0 < options.top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(options.top_k, dim=-1).values[:, -1:], -torch.inf)
    p, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside = (p.cumsum(-1) - p) >= options.top_p if options.top_p < 1 else torch.zeros_like(p, dtype=torch.bool)
    p = p.masked_fill(outside, 0)
    return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))
