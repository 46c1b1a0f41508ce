"""Autoregressive sampling: one token per forward on top of a cache, the mode every checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.core.attention import Layout, causal
from unmask.core.denoiser import Network, prefill
from unmask.core.transfer import to_device
from unmask.sampling.output import Callback, SampledTokens, Stop
from unmask.sampling.scheduler import Seats
from unmask.sampling.tokens import check_sampling, choose_tokens, token_noise


@torch.inference_mode()
def sample_autoregressive(
    network: Network,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    batch_size: int | None = None,
    context_length: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    end_token_ids: Sequence[int] = (),
    stop: Stop | None = None,
    callback: Callback | None = None,
) -> SampledTokens:
    """Continue ragged `prompts` (each at least one token), `batch_size` at a time: a row that ends makes room.

    The prefill ends before the last prompt token, so a row needs exactly one forward per new token.
    """
    check_sampling(temperature, top_p, top_k)
    device = network.device
    longest = max(map(len, prompts)) + max_new_tokens
    seats = Seats(network, len(prompts), batch_size, min(longest, context_length or longest))
    past = seats.past
    new_tokens: list[list[int]] = [[] for _ in prompts]
    last = torch.zeros(len(seats.rows), 1, dtype=torch.long, device=device)
    while True:
        new, stay = seats.fill()
        if stay is not None:
            last = last[to_device(stay, device)]
        if not seats.rows:
            break
        if new:
            joining = [prompts[seats.rows[slot]] for slot in new]
            prefill(network, causal, past, new, [prompt[:-1] for prompt in joining])
            ends = torch.stack([prompt[-1].cpu() for prompt in joining])
            last[to_device(torch.tensor(new), device), 0] = to_device(ends, device)
        position = past.lengths[:, None].clone()
        past.reach(int(position.max()) + 1)
        logits = network(last, Layout.of(position), causal, rows=torch.arange(len(seats.rows)), past=past)
        past.lengths += 1
        noise = None
        if temperature > 0:
            where = torch.tensor(seats.rows), position + 1
            noise = token_noise(logits.shape[-1], seed, *where, device=logits.device)[:, 0]
        tokens = choose_tokens(logits, temperature, top_p, noise, top_k)
        last = tokens[:, None]
        for slot, (row, token) in enumerate(zip(seats.rows, tokens.cpu().tolist(), strict=True)):
            text, place = new_tokens[row], len(prompts[row]) + len(new_tokens[row])
            text.append(token)
            if callback is not None:
                callback(row, [place], [token])
            kept = len(text) if token in end_token_ids else None
            if kept is None and stop is not None:
                kept = stop(row, text)
            if kept is None and (place + 1 == context_length or len(text) == max_new_tokens):
                kept = len(text)
            if kept is not None:
                del text[kept:]
                seats.leave(slot)
    counts = torch.tensor([len(tokens) for tokens in new_tokens])
    prefilled = torch.tensor([int(len(prompt) > 1) for prompt in prompts])
    return SampledTokens(new_tokens, counts, prefilled)
