"""A training step asks the network's device for nothing, a decoding pass once: on a GPU each time is a wait.

The network stands on torch's "meta" device, which has shapes and no values: whatever needs one (`item`, `bool`,
`nonzero`, a copy to the host) raises there. `NoWaits` refuses what meta allows and a GPU waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import MASK, SUPPORTED, block_config, random_tokens, tiny_model
from decode import sample_autoregressive, sample_blocks, sample_speculative
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unmask import hf
from unmask.core.attention import PADDING, Layout, causal
from unmask.core.batch import Batch
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.objectives import LossOutput
from unmask.sampling import Candidates, Rejection, Threshold
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


INDEXING = [torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_,
            torch.ops.aten._unsafe_index_put, torch.ops.aten._index_put_impl_]  # fmt: skip


class NoWaits(TorchDispatchMode):
    """Fails on boolean indices, and on operations between host and device other than copies that nobody waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # in this mode a composite operation arrives whole: take it apart
            with self:
                done = func.decompose(*args, **kwargs)
            if done is not NotImplemented:
                return done
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        devices = {x.device.type for x in tensors if x.ndim or x.device.type == "meta"}
        if func.overloadpacket in INDEXING and devices == {"meta"}:
            assert all(x is None or x.dtype != torch.bool for x in tree_leaves(args[1])), f"{func} needs nonzero"
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and torch.device(target).type == "meta":
            assert devices == {"meta"} or kwargs.get("non_blocking"), f"{func} waits for its copy"
        else:
            assert len(devices) <= 1, f"{func} copies from the host"
        return func(*args, **kwargs)


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


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_never_waits_for_the_device(name: str) -> None:
    step = Step(name, "meta")
    with NoWaits():
        loss = step.run()
    assert loss.sum.device.type == "meta"
    assert any(parameter.grad is not None for parameter in step.trained)


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


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_no_architecture_waits_in_a_pass_over_two_streams(architecture: str) -> None:
    step = Step("two streams", "meta", architecture, torch.bfloat16)  # experts' products have shapes in no other type
    with NoWaits():
        assert step.run().sum.device.type == "meta"


@pytest.mark.parametrize("read", [
    lambda x: x.nonzero(), lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.cpu(), lambda x: x[x > 0],
    lambda x: x.index_put((x > 0,), x.new_ones(())), lambda x: x[torch.zeros(3, dtype=torch.long)],
    lambda x: x + torch.ones(5), lambda x: torch.ones(5).to(x.device),
])  # fmt: skip
def test_whatever_waits_is_noticed(read: Callable[[Tensor], Any]) -> None:
    with NoWaits(), pytest.raises((NotImplementedError, RuntimeError, AssertionError)):
        read(torch.zeros(5, device="meta"))


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_a_layout_that_comes_again_gets_the_same_mask_on_its_device(implementation: str) -> None:
    step, layout, device = Step("two streams", "meta"), batch().layout, torch.device("meta")
    step.network.config._attn_implementation = implementation

    def argument(layout: Layout) -> Any:
        there = layout.to(device)
        assert all(field.device == device for field in there)
        return step.network.masks(causal, there, layout.to(device))

    with NoWaits():
        first = argument(layout)
    assert argument(layout) is first
    for changed in ("position", "document", "noisy"):
        assert argument(layout._replace(**{changed: getattr(layout, changed).clone()})) is not first
    assert layout.to(torch.device("cpu")) is layout


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("name", "masks"), [("complementary, shift", 1), ("two masks", 2), ("two masks, joint", 2)])
def test_masks_of_a_step_share_their_attention_masks(name: str, masks: int, device: str) -> None:
    """With the shift each draw is a pass over both streams, else one over the noisy stream after a clean pass."""
    step, made = Step(name, device), []
    original = step.network.make_masks
    step.network.make_masks = lambda *arguments: made.append(arguments) or original(*arguments)
    step.run()
    assert len(made) == masks


# --- decoding


class DeviceReads:
    """Replaces `Tensor.cpu`: counts copies from the device, and returns zeros."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count, plain = 0, Tensor.cpu

        def cpu(x: Tensor) -> Tensor:
            if x.device.type != "meta":
                return plain(x)
            self.count += 1
            return torch.zeros(x.shape, dtype=x.dtype)

        patch.setattr(Tensor, "cpu", cpu)


MODES: dict[str, dict[str, Any]] = {
    "blocks": {}, "shift": {}, "window": {"window": 2}, "temperature": {"temperature": 1.0},
    "guided": {"guidance_scale": 2.0}, "steps": {"max_denoising_steps": 2}, "ar": {}, "speculative": {},
    "speculative, coupled": {"temperature": 1.0},
    "speculative, rejection": {"temperature": 1.0, "acceptance": Rejection()},
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_decoding_waits_for_one_decision_a_pass(mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(SUPPORTED["gemma3" if mode == "blocks" else "llama"]()).to("meta")
    drafter = Drafter(model, MASK, DrafterConfig(4)).to("meta") if mode.startswith("speculative") else None
    net = hf.as_network(model, MASK, gate=None if drafter is None else drafter.rows)
    if compiled:  # what is compiled, run as it is: a compiler would trace it with values
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        net.compile()
    reads, prompts = DeviceReads(monkeypatch), [random_tokens(n, seed=n) for n in (5, 6, 9)]
    options: dict[str, Any] = {"max_new_tokens": 8, "batch_size": 2} | MODES[mode]
    select = Counted(Threshold())
    with NoWaits():
        if mode == "ar":
            sample_autoregressive(net, prompts, **options)
        elif mode.startswith("speculative"):
            sample_speculative(net, block_config(clean="causal"), prompts, **options)
        else:
            sample_blocks(net, block_config(shift=mode == "shift"), prompts, select=select, **options)
    # Two rows side by side, then the third alone. Every read is zeros: a block is whole at once, and a forward of
    # speculation gains one token.
    assert reads.count == {"ar": 2 * 8, "speculative": 2 * 8}.get(mode.split(",")[0], select.count)


class Counted:
    """A commit rule that counts its calls."""

    def __init__(self, rule: Threshold) -> None:
        self.rule, self.count = rule, 0

    def __call__(self, candidates: Candidates, at_least: Tensor) -> Tensor:
        self.count += 1
        return self.rule(candidates, at_least)
