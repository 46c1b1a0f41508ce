"""Acceptance rules: how many drafts are accepted, and the token after them, so that the output is AR sampling's.

Notation: k drafts d_1..d_k drawn from draft distributions q_1..q_k, and AR distributions p_1..p_(k+1), where p_j
follows d_1..d_(j-1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unmask.core.noise import uniforms
from unmask.core.transfer import to_device
from unmask.sampling.tokens import Seed, row_key, token_noise


@dataclass(frozen=True)
class Noise:
    """Random numbers of one cycle, each a function of (seed, row, absolute position).

    rows: (batch,). position: (batch, n) of the first n tokens after the verified ones. drafts: (batch, k, vocabulary)
    Gumbel noise that the first k of them were drafted with; what is not kept is drawn again.
    """

    seed: Seed
    rows: Tensor
    position: Tensor
    drafts: Tensor | None = None

    def tokens(self, vocabulary: int, device: torch.device | None = None) -> Tensor:
        """Gumbel noise (batch, n, vocabulary) of the tokens: what AR sampling draws them with."""
        count = self.position.shape[1]
        kept = 0 if self.drafts is None else min(count, self.drafts.shape[1])
        new = token_noise(vocabulary, self.seed, self.rows, self.position[:, kept:], device=device)
        return new if self.drafts is None else torch.cat([self.drafts[:, :kept], new], dim=1)

    def residual(self, vocabulary: int, device: torch.device | None = None) -> Tensor:
        """Gumbel noise (batch, vocabulary) of the cycle's last token, which needs no other wherever it falls."""
        return token_noise(vocabulary, self.seed, self.rows, self.position[:, :1], "residual", device)[:, 0]

    def accept(self, count: int, device: torch.device) -> Tensor:
        """float64 uniforms (batch, count) of the first tokens."""
        position = self.position[:, :count].tolist()
        rows = [row_key(self.seed, row) for row in self.rows.tolist()]
        keys = [("accept", *row, p) for row, of_row in zip(rows, position, strict=True) for p in of_row]
        return to_device(uniforms(keys, 1).view(len(position), -1), device)


class Acceptance(Protocol):
    """(drafts (b, k), q logits (b, k, v), p logits (b, k + 1, v), drafted (b, k) bool) -> (accepted, next).

    accepted (b,): how many drafts of each row's `drafted` prefix are kept; next (b,): the token after them.
    The logits are those of the distributions to sample from: divided by the temperature, cut by top-p and top-k.
    Without noise, at temperature 0, each token is its distribution's likeliest.
    """

    def __call__(
        self, drafts: Tensor, q: Tensor, p: Tensor, drafted: Tensor, noise: Noise | None
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Coupled:
    """Accept a draft while it is the token that AR sampling would draw with the same noise (2408.07978).

    d_j = argmax(log q_j + g_j), a_j = argmax(log p_j + g_j), g_j the Gumbel noise of position j; every token
    that comes out is an a_j. So the output is AR sampling's own, token for token, for any drafter, and
    P(accept) >= (1 - TV) / (1 + TV).
    """

    def __call__(
        self, drafts: Tensor, q: Tensor, p: Tensor, drafted: Tensor, noise: Noise | None
    ) -> tuple[Tensor, Tensor]:
        del q  # that the drafts were drawn with the same noise is enough
        if noise is None:
            return accept_matching(drafts, p.argmax(-1), drafted)
        g = noise.tokens(p.shape[-1], p.device)
        return accept_matching(drafts, (p.double() + g).argmax(-1), drafted)


@dataclass(frozen=True)
class Rejection:
    """Accept d_j with probability min(1, p_j(d_j) / q_j(d_j)), else draw from max(p_j - q_j, 0), normalised.

    Leviathan et al. 2211.17192, algorithm 1: exact for any q_j that d_j was really drawn from; the rate is
    1 - TV(p_j, q_j). The output has AR's distribution, but not AR's tokens for a seed.
    """

    def __call__(
        self, drafts: Tensor, q: Tensor, p: Tensor, drafted: Tensor, noise: Noise | None
    ) -> tuple[Tensor, Tensor]:
        if noise is None:
            return accept_matching(drafts, p.argmax(-1), drafted)
        q_probs, p_probs = q.double().softmax(-1), p.double().softmax(-1)
        q_draft, p_draft = (x[:, : drafts.shape[1]].gather(-1, drafts[..., None])[..., 0] for x in (q_probs, p_probs))
        passes = noise.accept(drafts.shape[1], p.device) * q_draft < p_draft
        accepted = (drafted & passes).long().cumprod(-1).sum(-1)
        index = accepted[:, None, None].expand(-1, 1, p.shape[-1])
        residual = p_probs.gather(1, index)[:, 0]
        tried = torch.nn.functional.pad(drafted, (0, 1)).gather(1, accepted[:, None])  # a draft was refused
        refused = torch.nn.functional.pad(q_probs, (0, 0, 0, 1)).gather(1, index)[:, 0]
        residual = torch.where(tried, (residual - refused).clamp_min(0), residual)
        return accepted, (residual.log() + noise.residual(p.shape[-1], p.device)).argmax(-1)


def accept_matching(drafts: Tensor, targets: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Accept while draft and target agree; the target after them is the next token. targets: (b, k + 1)."""
    accepted = (drafted & (drafts == targets[:, :-1])).long().cumprod(-1).sum(-1)
    return accepted, targets.gather(1, accepted[:, None])[:, 0]
