"""A training step asks a GPU for nothing, where there is one, and masks are made once.

on_emulated_device.py runs the same steps, and decoding, on an accelerator that is emulated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, random_tokens, tiny_model

from unmask import hf
from unmask.core.attention import PADDING, Layout, causal
from unmask.core.batch import Batch
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.objectives import LossOutput
from unmask.settings import Settings
from unmask.training.step import step_loss

CAUSAL = block_config(clean="causal")
SHIFTED = block_config(clean="causal", shift=True)
ONE_STREAM = block_config(attention="bidirectional", clean=None)
GATED = replace(CAUSAL, mask_rows=3)

STEPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ar": (None, {}),
    "two streams": (block_config(), {}),
    "two streams, shift": (block_config(shift=True), {}),
    "two streams, Bernoulli masks": (block_config(), {"masking": "bernoulli", "noise_level": "sequence"}),
    "two streams, block offsets": (CAUSAL, {"random_offset": True}),
    "two streams, checkpointed": (block_config(), {"gradient_checkpointing": True}),
    "complementary": (block_config(), {"complementary": True}),
    "complementary, shift": (block_config(shift=True), {"complementary": True}),
    "two masks": (block_config(), {"num_masks": 2}),
    "two masks, joint": (CAUSAL, {"num_masks": 2, "objective": "joint"}),
    "block-causal": (block_config(attention="block_causal", clean=None), {}),
    "block-causal, shift": (block_config(attention="block_causal", clean=None, shift=True), {}),
    "bidirectional": (ONE_STREAM, {}),
    "bidirectional, shift": (replace(ONE_STREAM, shift=True), {}),
    "annealed": (replace(ONE_STREAM, shift=True), {"anneal_steps": 9, "loss_normaliser": "masked"}),
    "joint": (CAUSAL, {"objective": "joint"}),
    "joint, kl": (CAUSAL, {"objective": "joint", "distance": "kl", "teacher_top_k": 5}),
    "joint, teacher": (SHIFTED, {"objective": "joint", "teacher": "parent"}),
    "joint, teacher, kl": (CAUSAL, {"objective": "joint", "distance": "kl", "teacher": "parent"}),
    "joint, drafter": (GATED, {"objective": "joint"}),
    "distill, ce": (GATED, {"objective": "distill", "distance": "ce"}),
    "distill, tv": (GATED, {"objective": "distill", "distance": "tv"}),
    "distill, tv, shift": (SHIFTED, {"objective": "distill", "distance": "tv"}),
    "distill, reach": (GATED, {"objective": "distill", "distance": "reach"}),
}  # fmt: skip


def batch() -> Batch:
    """Packed documents, padding, and prompts without a loss."""
    index, cut = torch.arange(16).expand(4, 16), torch.arange(4)[:, None] + 3
    document = (index >= cut).long().masked_fill((index >= 13) & (cut % 2 == 0), PADDING)
    loss_mask = index % 7 != 2
    return Batch(random_tokens(4, 16), Layout.of(torch.where(index < cut, index, index - cut), document), loss_mask)


@dataclass
class Step:
    """A training step of a tiny model on `device`: `run` does it, `trained` are the parameters that learn."""

    name: str
    device: str = "cpu"
    architecture: str = "llama"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.config, more = STEPS[self.name]
        about = {} if self.config is None else {
            field: getattr(self.config, field) for field in ("attention", "clean_attention", "shift")
        }  # fmt: skip
        self.settings = Settings("test", block_size=4, batch_size=4, max_length=16, **(about | more))
        model, self.teacher = self._model(), None
        if self.settings.teacher:
            self.teacher = hf.as_network(self._model().requires_grad_(False), MASK)
        if self.settings.gradient_checkpointing:
            hf.checkpoint_layers(model)
        drafter = None
        if self.config is GATED or self.settings.objective == "distill":
            drafter_config = DrafterConfig(4, mask_rows=1 if self.config is None else self.config.mask_rows)
            drafter = Drafter(model.requires_grad_(False), MASK, drafter_config).to(self.device)
            # Drawn on the CPU and copied, since each device's generator draws numbers of its own.
            generator = torch.Generator().manual_seed(0)
            for matrix in (*drafter.down.values(), *drafter.up.values()):
                matrix.data.copy_(torch.randn(matrix.shape, generator=generator) * 0.3)
        self.network = hf.as_network(model, MASK, gate=None if drafter is None else drafter.rows)
        self.trained = list((drafter or model).parameters())

    def _model(self) -> Any:
        model = tiny_model(SUPPORTED[self.architecture](), self.dtype).train().to(self.device)
        hf.without_dropout(model)
        return model

    def run(self) -> LossOutput:
        loss = step_loss(self.network, self.settings, self.config, batch(), 3, torch.arange(4), self.teacher)
        loss.sum.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        return loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_on_a_gpu_never_waits_and_matches_the_cpu(name: str) -> None:
    expected, step = Step(name).run(), Step(name, "cuda")
    step.run()  # what is allocated once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.sum.item() == pytest.approx(expected.sum.item(), rel=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_a_layout_that_comes_again_gets_the_same_mask_on_its_device(implementation: str) -> None:
    step, layout, device = Step("two streams", "meta"), batch().layout, torch.device("meta")
    step.network.config._attn_implementation = implementation

    def argument(layout: Layout) -> Any:
        there = layout.to(device)
        assert all(field.device == device for field in there)
        return step.network.masks(causal, there, layout.to(device))

    first = argument(layout)
    assert argument(layout) is first
    for changed in ("position", "document", "noisy"):
        assert argument(layout._replace(**{changed: getattr(layout, changed).clone()})) is not first
    assert layout.to(torch.device("cpu")) is layout


@pytest.mark.parametrize(("name", "masks"), [("complementary, shift", 1), ("two masks", 2), ("two masks, joint", 2)])
def test_masks_of_a_step_share_their_attention_masks(name: str, masks: int) -> None:
    """With the shift each draw is a pass over both streams, else one over the noisy stream after a clean pass."""
    step, made = Step(name), []
    original = step.network.make_masks
    step.network.make_masks = lambda *arguments: made.append(arguments) or original(*arguments)
    step.run()
    assert len(made) == masks
