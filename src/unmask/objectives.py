"""Training objectives, as sums and counts.

Every loss comes back as (sum, count) so that a mean over micro-batches, accumulation steps and ranks is
one division of two totals, the same for every split. Knows a network only through `denoiser`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from unmask.attention import Layout, Pattern
from unmask.corruption import Corruption
from unmask.denoiser import DiffusionConfig, Network, score, score_ar


@dataclass(frozen=True)
class LossOutput:
    """sum: scalar, nats. count: scalar int64, the predicted tokens that the sum speaks for."""

    sum: Tensor
    count: Tensor

    def __add__(self, other: LossOutput) -> LossOutput:
        return LossOutput(self.sum + other.sum, self.count + other.count)


def predictable(layout: Layout, loss_mask: Tensor | None = None) -> Tensor:
    """Tokens that can be in a loss: neither padding nor the given first token of a document.

    loss_mask: bool like the layout, False on what is given besides (prompts); None gives nothing more.
    """
    tokens = layout.real & (layout.position > 0)
    return tokens if loss_mask is None else tokens & loss_mask


def token_nll(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruption: Corruption,
    pattern: Pattern | None = None,
) -> Tensor:
    """-log p(x0_i | xt) on the masked positions, (masked.sum(),) in row-major order."""
    masked = corruption.masked
    xt = corruption.apply(x0, config.mask_token_id)
    logits = score(network, config, xt, x0, layout, masked, pattern)
    return cross_entropy(logits, x0[masked], reduction="none")


def diffusion_loss(
    network: Network,
    config: DiffusionConfig,
    x0: Tensor,
    layout: Layout,
    corruption: Corruption,
    pattern: Pattern | None = None,
    loss_mask: Tensor | None = None,
) -> LossOutput:
    """sum_i w_i * -log p(x0_i | xt, clean context), over masked i (Efficient-DLM 2512.14067, eq. 1).

    The count is that of all predictable tokens, masked or not, so that sum / count is, in expectation, the
    NELBO in nats per predicted token when masks are uniform. `pattern`: an annealed mask, else the config's.
    """
    nll = token_nll(network, config, x0, layout, corruption, pattern)
    return LossOutput((corruption.weight[corruption.masked] * nll).sum(), predictable(layout, loss_mask).sum())


def ar_loss(network: Network, x0: Tensor, layout: Layout, loss_mask: Tensor | None = None) -> LossOutput:
    """Next-token cross-entropy over the predictable tokens, each document on its own."""
    wanted = predictable(layout, loss_mask)
    logits = score_ar(network, x0, layout, wanted)
    return LossOutput(cross_entropy(logits, x0[wanted], reduction="sum"), wanted.sum())
