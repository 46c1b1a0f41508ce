"""Autoregressive sampling: one token per forward on top of a cache, the mode every checkpoint has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unmask.core.attention import Layout, causal
from unmask.core.decoding import with_backlog
from unmask.core.network import Network
from unmask.sampling.constraint import restrict
from unmask.sampling.request import Request, SampledTokens
from unmask.sampling.scheduler import AutoregressiveRows, decode_all
from unmask.sampling.tokens import choose_by_row, token_noise


@torch.inference_mode()
def sample_autoregressive(network: Network, prompts: Sequence[Tensor], request: Request) -> SampledTokens:
    """Continue ragged `prompts`, each (length,) int64 of at least one token.

    The prefill ends before the last prompt token, so a row needs exactly one forward per new token that no constraint
    forces.
    """
    state = TokenRows(network, request, len(prompts))
    for row, prompt in enumerate(prompts):
        state.put(row, prompt)
    return decode_all(state, len(prompts), request.batch_size)


class TokenRows(AutoregressiveRows):
    """Rows that grow by a token a step."""

    def step(self) -> bool:
        """One forward of all rows in slots; False when no row is left."""
        self.admit_rows()
        scheduler, past = self.scheduler, self.scheduler.past
        if not scheduler.rows:
            return False
        backlog, known = self.take_backlog()
        position = (past.lengths + known)[:, None]
        past.set_columns(int(position.max()) + 1)
        ids, layout, slots = with_backlog(past, self.last, Layout.of(position), backlog)
        logits = self.network(ids, layout, causal, rows=torch.arange(len(position)), past=slots)
        past.lengths += 1 + known
        scored, logits = logits, restrict(logits, [self.allowed(row) for row in scheduler.rows])
        how = [self.request.sampling(row) for row in scheduler.rows]
        noise = None
        if any(of_row.temperature > 0 for of_row in how):
            rows = torch.tensor(scheduler.rows)
            noise = token_noise(logits.shape[-1], self.request.seed, rows, position + 1, device=logits.device)[:, 0]
        tokens = choose_by_row(logits, how, noise)
        self.last = tokens[:, None]
        observer = self.request.observer
        for slot, token in enumerate(tokens.cpu().tolist()):
            row = scheduler.rows[slot]
            if observer is not None:
                observer(row, scored[slot : slot + 1])
            if self.add(row, [token]):
                scheduler.release(slot)
        return True

    def sampled(self, rows: Sequence[int]) -> SampledTokens:
        """The new tokens of rows that have ended."""
        chosen = list(rows)
        new_tokens, forced = [self.new_tokens[row] for row in chosen], self.num_forced[chosen]
        counts = torch.tensor([len(tokens) for tokens in new_tokens]) - forced
        prefills, constrained = self.num_prefill_forwards[chosen], self.request.constraint is not None
        return SampledTokens(new_tokens, counts, prefills, num_forced=forced if constrained else None)
