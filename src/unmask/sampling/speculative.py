"""Self-speculation: draft a block in one diffusion forward, verify it in one causal forward, same weights and cache.

A cycle of a row, with `last` the newest verified token, not cached yet:
  draft    [last | k masks] -> the AR law of the next position (exact: `last` is an ordinary causal row) and a
           draft law for each masked position; the keys of `last` stay cached
  verify   the k drafts, causally -> the AR law after each of them; the longest valid prefix stays cached, row by row
The row gains the accepted drafts and one token more. What comes out has the law of AR decoding whatever the
drafter; how much a cycle yields is all that the drafter decides.

Refuses nothing about quality: an untrained drafter is slow, never wrong. Notation: k drafts d_1..d_k with draft
laws q_1..q_k, and AR laws p_1..p_(k+1), where p_j stands after d_1..d_(j-1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unmask.core.attention import PADDING, Layout
from unmask.core.decoding import draft, verify
from unmask.core.network import DiffusionConfig, Network
from unmask.core.noise import uniforms
from unmask.core.transfer import to_device
from unmask.sampling.request import Request, SampledTokens
from unmask.sampling.scheduler import AutoregressiveRows
from unmask.sampling.tokens import choose_tokens, token_noise, truncate

# --- acceptance rules


@dataclass(frozen=True)
class Noise:
    """Where the random numbers of some tokens come from: (seed, row, absolute position) of each.

    rows: (batch,). position: (batch, n) of the first n tokens after the verified ones.
    """

    seed: int
    rows: Tensor
    position: Tensor

    def gumbel(self, vocabulary: int, width: int, purpose: str = "token", device: torch.device | None = None) -> Tensor:
        return token_noise(vocabulary, self.seed, self.rows, self.position[:, :width], purpose, device)

    def accept(self, width: int) -> Tensor:
        """float64 uniforms (batch, width)."""
        places = self.position[:, :width].tolist()
        keys = [("accept", self.seed, row, p) for row, of in zip(self.rows.tolist(), places, strict=True) for p in of]
        return uniforms(keys, 1).view(len(places), -1)


class Acceptance(Protocol):
    """(drafts (b, k), q logits (b, k, v), p logits (b, k + 1, v), drafted (b, k) bool) -> (accepted, next).

    accepted (b,): how many drafts of each row's `drafted` prefix are kept; next (b,): the token after them.
    The logits are those of the laws that were sampled from: divided by the temperature, cut by top-p. Without
    noise, at temperature 0, a law is its likeliest token.
    """

    def __call__(
        self, drafts: Tensor, q: Tensor, p: Tensor, drafted: Tensor, noise: Noise | None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Coupled:
    """Accept a draft while it is the token that AR sampling would draw with the same noise (2408.07978).

    d_j = argmax(log q_j + g_j), a_j = argmax(log p_j + g_j), g_j the Gumbel noise of position j; every token
    that comes out is an a_j. So the output is AR sampling's own, token for token, whatever the drafter, and
    P(accept) >= (1 - TV) / (1 + TV).
    """

    def __call__(
        self, drafts: Tensor, q: Tensor, p: Tensor, drafted: Tensor, noise: Noise | None
    ) -> tuple[Tensor, Tensor]:
        del q  # the drafts were drawn with this noise, which is all that matters
        if noise is None:
            return accept_matching(drafts, p.argmax(-1), drafted)
        g = noise.gumbel(p.shape[-1], p.shape[1], device=p.device)
        return accept_matching(drafts, (p.double() + g).argmax(-1), drafted)


@dataclass(frozen=True)
class Rejection:
    """Accept d_j with probability min(1, p_j(d_j) / q_j(d_j)), else draw from max(p_j - q_j, 0), normalised.

    Leviathan et al. 2211.17192, algorithm 1: exact for any q_j that d_j was really drawn from; the rate is
    1 - TV(p_j, q_j). The output has AR's law and not AR's tokens: its noise is used differently.
    """

    def __call__(
        self, drafts: Tensor, q: Tensor, p: Tensor, drafted: Tensor, noise: Noise | None
    ) -> tuple[Tensor, Tensor]:
        if noise is None:
            return accept_matching(drafts, p.argmax(-1), drafted)
        q_probs, p_probs = q.double().softmax(-1), p.double().softmax(-1)
        q_draft, p_draft = (x[:, : drafts.shape[1]].gather(-1, drafts[..., None])[..., 0] for x in (q_probs, p_probs))
        passes = noise.accept(drafts.shape[1]).to(p.device) * q_draft < p_draft
        accepted = (drafted & passes).long().cumprod(-1).sum(-1)
        index = accepted[:, None, None].expand(-1, 1, p.shape[-1])
        residual = p_probs.gather(1, index)[:, 0]
        tried = torch.nn.functional.pad(drafted, (0, 1)).gather(1, accepted[:, None])  # a draft stood there, refused
        refused = torch.nn.functional.pad(q_probs, (0, 0, 0, 1)).gather(1, index)[:, 0]
        residual = torch.where(tried, (residual - refused).clamp_min(0), residual)
        g = noise.gumbel(p.shape[-1], p.shape[1], "residual", p.device).gather(1, index)[:, 0]
        return accepted, (residual.log() + g).argmax(-1)


def accept_matching(drafts: Tensor, targets: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Accept while draft and target agree; the target after them is the next token. targets: (b, k + 1)."""
    accepted = (drafted & (drafts == targets[:, :-1])).long().cumprod(-1).sum(-1)
    return accepted, targets.gather(1, accepted[:, None])[:, 0]


# --- draft lengths


def adapted_length(length: int, gained: int, longest: int) -> int:
    """Next cycle's draft length: one more than the last cycle gained, twice as long where nothing was refused."""
    return min(longest, 2 * length if gained > length else max(2, gained + 1))


# --- the sampler


@torch.inference_mode()
def sample_speculative(
    network: Network,
    config: DiffusionConfig,
    prompts: Sequence[Tensor],
    request: Request,
    *,
    draft_length: int | None = None,
    adaptive: bool = False,
    acceptance: Acceptance | None = None,
    anchor: bool = True,
) -> SampledTokens:
    """Continue ragged `prompts` (each at least one token) with AR decoding's own output.

    draft_length: masks per draft, the block size unless given; with `adaptive` it is the longest, and each row
    drafts as long as its last cycle suggests. acceptance: `Coupled()` unless given; at temperature 0 all rules
    are the greedy one. anchor: take the first token of a cycle from the AR row of the draft forward instead of
    the drafter, so that a cycle gains at least two tokens; off only to measure that.
    """
    length = config.block_size if draft_length is None else draft_length
    assert length is not None
    acceptance = acceptance or Coupled()
    device = network.device
    state = AutoregressiveRows(network, prompts, request, room=length)
    seats, past = state.scheduler, state.scheduler.past
    starts = [0] * len(seats.rows)  # the first unverified position of each row
    lengths = [length] * len(seats.rows)
    num_forwards = torch.zeros(len(prompts), dtype=torch.long)
    gains: list[list[int]] = [[] for _ in prompts]

    while True:
        new, stay = state.admit()
        if stay is not None:
            starts, lengths = ([values[slot] for slot in stay.tolist()] for values in (starts, lengths))
        if not seats.rows:
            break
        for slot in new:
            starts[slot], lengths[slot] = len(prompts[seats.rows[slot]]), 2 if adaptive and length > 2 else length
        rows = torch.tensor(seats.rows)
        drafts_of = [
            n if request.context_length is None else min(n, request.context_length - start)
            for start, n in zip(starts, lengths, strict=True)
        ]
        start, width = torch.tensor(starts), max(drafts_of)
        position = start[:, None] + torch.arange(width)
        drafted = torch.arange(width) < torch.tensor(drafts_of)[:, None]
        past.set_columns(max(starts) + width)
        layout = _placed(position, drafted, start)
        ar_logits, q = draft(network, config, past, state.last, Layout.of(start[:, None] - 1), layout, anchor=anchor)
        num_forwards[rows] += 1
        noise = Noise(request.seed, rows, torch.cat([position, position[:, -1:] + 1], dim=1))
        drafts, q = _propose(q, request, noise)
        proposed = drafts.cpu().tolist()
        gained, done = [0] * len(rows), [False] * len(rows)
        if anchor:  # the first token is AR's own, and if it ends the row nothing is left to verify
            for slot, row in enumerate(seats.rows):
                gained[slot], done[slot] = 1, state.add(row, proposed[slot][:1])
        keep = [slot for slot, ended in enumerate(done) if not ended]
        if keep:
            # Nothing past the last wanted token needs verifying.
            wanted_of = [min(drafts_of[slot], state.end(seats.rows[slot]) - starts[slot]) for slot in keep]
            wide = max(wanted_of)
            wanted = torch.arange(wide) < torch.tensor(wanted_of)[:, None]
            some_rows = to_device(torch.tensor(keep), device)
            if len(keep) < len(rows):
                position, start = position[keep], start[keep]
                drafts, q, ar_logits = (x[some_rows] for x in (drafts, q, ar_logits))
            placed = _placed(position[:, :wide], wanted, start)
            after = verify(network, past.for_rows(keep if len(keep) < len(rows) else None), drafts[:, :wide], placed)
            num_forwards[rows[keep]] += 1
            p = torch.cat([ar_logits[:, None], after], dim=1)
            some = Noise(request.seed, rows[keep], noise.position[keep, : wide + 1])
            accepted, next_token = _accept(
                acceptance, drafts[:, :wide], q[:, :wide], p, to_device(wanted, device), request, some
            )
            state.last[some_rows, 0] = next_token
            decided = torch.stack([accepted, next_token], dim=-1).cpu()
            past.lengths[keep] += decided[:, 0]
            for slot, (n, token) in zip(keep, decided.tolist(), strict=True):
                row = seats.rows[slot]
                before = len(state.new_tokens[row])
                done[slot] = state.add(row, [*proposed[slot][:n], token][gained[slot] :])
                gained[slot] += len(state.new_tokens[row]) - before
                starts[slot] += n + 1
        for slot, row in enumerate(seats.rows):
            gains[row].append(gained[slot])
            if adaptive:
                lengths[slot] = adapted_length(lengths[slot], gained[slot], length)
        for slot, ended in enumerate(done):
            if ended:
                seats.release(slot)

    widest = max((gain for row in gains for gain in row), default=0)
    histogram = torch.stack([torch.bincount(torch.tensor(row), minlength=widest + 1) for row in gains])
    return SampledTokens(state.new_tokens, num_forwards, state.num_prefill_forwards, histogram)


def _placed(position: Tensor, drafted: Tensor, start: Tensor) -> Layout:
    """Tokens where they are drafted; padding elsewhere, at a position that exists."""
    here = torch.where(drafted, position, start[:, None] - 1)
    return Layout.of(here, torch.where(drafted, 0, PADDING))


def _propose(q: Tensor, request: Request, noise: Noise) -> tuple[Tensor, Tensor]:
    """Drafts (b, k), one of each law independently, and the logits of the laws they were drawn from."""
    if request.temperature == 0:
        return choose_tokens(q), q
    q = truncate(q.flatten(0, 1), request.temperature, request.top_p, request.top_k).view(q.shape)
    return (q + noise.gumbel(q.shape[-1], q.shape[1], device=q.device)).argmax(-1), q


def _accept(
    acceptance: Acceptance,
    drafts: Tensor,
    q: Tensor,
    p: Tensor,
    drafted: Tensor,
    request: Request,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    if request.temperature == 0:
        return acceptance(drafts, q, p, drafted, None)
    p = truncate(p.flatten(0, 1), request.temperature, request.top_p, request.top_k).view(p.shape)
    return acceptance(drafts, q, p, drafted, noise)
