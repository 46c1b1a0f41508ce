"""Drafters and joint checkpoints: the AR model stays what it was, on disk and in every pass."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    _GQA,
    MASK,
    STORIES,
    SUPPORTED,
    VOCABULARY,
    block_config,
    network,
    random_tokens,
    tiny_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import unmask
from unmask import hf
from unmask.core.attention import Layout
from unmask.core.batch import Batch
from unmask.core.corruption import Corruption
from unmask.core.decoding import begin, denoise, speculate
from unmask.core.distances import DISTANCES, OF_BLOCKS, draft_distance
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.objectives import (
    ar_loss,
    blocks_of,
    diffusion_loss,
    distill_loss,
    draft_failure,
    joint_loss,
    predictable,
)
from unmask.core.scoring import score, score_ar, score_distilled, score_joint
from unmask.recipe import load_recipe
from unmask.resolve import at_step, resolve
from unmask.settings import Settings
from unmask.training.step import step_loss

RUN = {"show_progress": False, "max_tokens": 3000, "max_length": 64, "block_size": 4, "batch_size": 4}


def causal_config(block_size: int = 4, *, shift: bool = False, noisy: str = "bidirectional"):
    return replace(block_config(block_size, shift=shift, clean="causal"), noisy_attention=noisy)


def gated(model, *, mask: int = MASK, noise: float = 0.3, targets: str = "all") -> tuple[hf.HFNetwork, Drafter]:
    """A drafter whose adapters do something."""
    drafter = Drafter(model, mask, DrafterConfig(4, 4.0, targets))
    torch.manual_seed(1)
    for up in drafter.up.values():
        torch.nn.init.normal_(up, std=noise)
    return hf.as_network(model, mask, gate=drafter.rows), drafter


def packed(rows: int = 6, length: int = 16) -> Batch:
    cut = torch.arange(rows)[:, None] + 3
    index = torch.arange(length).expand(rows, length)
    document = (index >= cut).long().masked_fill((index >= 13) & (cut % 2 == 0), -1)
    return Batch(random_tokens(rows, length), Layout.of(torch.where(index < cut, index, index - cut), document))


def masks_of(layout: Layout) -> Corruption:
    generator = torch.Generator().manual_seed(2)
    masked = predictable(layout) & (torch.rand(layout.position.shape, generator=generator) < 0.6)
    return Corruption(masked, masked * (1 + torch.rand(layout.position.shape, generator=generator)))


# --- the gate


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "opt", "bitnet", "phi3"])
@torch.no_grad()
def test_clean_rows_are_bit_identical_with_the_adapter_on_and_off(name: str) -> None:
    model, config = tiny_model(SUPPORTED[name]()), causal_config()
    clean = Layout.of(torch.arange(12).expand(2, 12))
    both = clean._replace(noisy=torch.ones_like(clean.noisy)).concat(clean)
    ids = torch.cat([torch.full((2, 12), MASK), random_tokens(2, 12)], dim=1)
    off = hf.as_network(model, MASK)(ids, both, config.pattern)
    net, drafter = gated(model)
    on = net(ids, both, config.pattern)
    assert torch.equal(on[:, 12:], off[:, 12:])
    assert (on[:, :12] - off[:, :12])[..., :MASK].abs().max() > 1e-2
    drafter.detach()
    assert torch.equal(net(ids, both, config.pattern), off)


@torch.no_grad()
def test_places_have_masks_of_their_own_in_every_pass() -> None:
    """Draft, denoise and the training pass read the same row for the same place of an aligned block."""
    model = tiny_model(SUPPORTED["llama"](), torch.float64)
    drafter = Drafter(model, VOCABULARY, DrafterConfig(4, 4.0, mask_rows=3))  # places 2 and 3 share the last
    torch.nn.init.normal_(drafter.masks)
    net = hf.as_network(model, VOCABULARY, gate=drafter.rows)
    config = replace(causal_config(), mask_token_id=VOCABULARY, mask_rows=3)
    x0, layout = random_tokens(1, 12), Layout.of(torch.arange(12)[None])
    wanted = layout.position >= 8
    xt = x0.masked_fill(wanted, VOCABULARY)
    one = score(net, config, xt, x0, layout, wanted)
    past = begin(net, config.pattern, x0[:, :8])
    past.columns = 12
    block = layout.subset(..., slice(8, 12))
    assert (denoise(net, config, past, xt[:, 8:], block, wanted[:, 8:]) - one).abs().max() < 1e-10
    past = begin(net, config.pattern, x0[:, :7])
    past.columns = 12
    drafted = speculate(net, config, past, x0[:, 7:8], layout.subset(..., slice(7, 8)), 3).drafts(torch.tensor([0]))
    assert (drafted[0] - one[1:]).abs().max() < 1e-10
    assert (score(net, replace(config, mask_rows=1), xt, x0, layout, wanted) - one).abs().max() > 1e-2


@torch.no_grad()
def test_gated_rows_equal_a_model_whose_weights_have_the_adapters_merged() -> None:
    model, merged = tiny_model(SUPPORTED["llama"](), torch.float64), tiny_model(SUPPORTED["llama"](), torch.float64)
    net, drafter = gated(model)
    for name, module in merged.named_modules():
        key = name.replace(".", "-")
        if key in drafter.up:
            module.weight += drafter.up[key] @ drafter.down[key]
    merged.get_input_embeddings().weight[MASK] = drafter.masks[0]
    layout = Layout.of(torch.arange(8)[None], noisy=True)
    ids = random_tokens(1, 8).masked_fill(torch.arange(8) % 3 == 0, MASK)
    pattern = causal_config(8).pattern
    got, expected = net(ids, layout, pattern), hf.as_network(merged, MASK)(ids, layout, pattern)
    assert (got - expected)[..., :MASK].abs().max() < 1e-10


@pytest.mark.parametrize("targets", ["o_proj", "q_proj, v_proj"])
def test_targets_choose_the_linear_maps(targets: str) -> None:
    _, drafter = gated(tiny_model(SUPPORTED["llama"]()), targets=targets)
    assert len(drafter.up) == 2 * len(targets.split(","))
    assert all(key.endswith(tuple(t.strip() for t in targets.split(","))) for key in drafter.up)


# --- objectives


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("noisy", ["bidirectional", "causal"])
def test_joint_loss_equals_the_two_passes_apart(shift: bool, noisy: str) -> None:
    net, config, batch = network(), causal_config(shift=shift, noisy=noisy), packed()
    corruption = masks_of(batch.layout)
    joint = joint_loss(net, config, batch.x0, batch.layout, corruption, 0.3)
    ar = ar_loss(net, batch.x0, batch.layout)
    diffusion = diffusion_loss(net, config, batch.x0, batch.layout, corruption)
    assert joint.sum.item() == pytest.approx((ar.sum + 0.3 * diffusion.sum).item(), rel=1e-10)
    assert joint.count == ar.count == diffusion.count


def test_joint_loss_without_diffusion_equals_the_stock_loss() -> None:
    net, ids = network(), random_tokens(2, 12)
    net.mask_token_id = None
    layout = Layout.of(torch.arange(12).expand(2, 12))
    loss = joint_loss(net, causal_config(), ids, layout, masks_of(layout), 0.0)
    stock = net.model(input_ids=ids, labels=ids).loss
    assert (loss.sum / loss.count).item() == pytest.approx(stock.item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["joint", "distill"])
@pytest.mark.parametrize("more", [{}, {"complementary": True}, {"masking": "all"}, {"shift": True}])
def test_step_is_the_same_for_every_split(objective: str, more: dict) -> None:
    net, batch = network(), packed(8)
    chosen = Settings("test", clean_attention="causal", objective=objective, block_size=4, batch_size=8, max_length=16,
                      **more)  # fmt: skip
    config = causal_config(shift=chosen.shift)

    def gradients(size: int) -> tuple[float, torch.Tensor]:
        net.model.zero_grad()
        total = 0.0
        for start in range(0, 8, size):
            rows = torch.arange(start, start + size)
            loss = step_loss(net, chosen, config, batch.rows(start, start + size), 3, rows)
            loss.sum.backward()
            total += float(loss.sum.detach())
        return total, torch.cat([p.grad.flatten() for p in net.model.parameters() if p.grad is not None])

    whole = gradients(8)
    for size in (1, 2, 4):
        parts = gradients(size)
        assert parts[0] == pytest.approx(whole[0], rel=1e-10)
        assert (parts[1] - whole[1]).abs().max() < 1e-9 * whole[1].abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("shift", [False, True])
def test_distilled_pass_equals_one_two_stream_pass_and_leaves_the_clean_half_no_graph(name: str, shift: bool) -> None:
    net, _ = gated(tiny_model(SUPPORTED[name](), torch.float64))
    config, batch = causal_config(shift=shift), packed()
    wanted = masks_of(batch.layout).masked & (batch.layout.position % 4 > 0)
    xt = batch.x0.masked_fill(wanted, MASK)
    q, p = score_distilled(net, config, xt, batch.x0, batch.layout, wanted)
    assert not p.requires_grad
    assert q.requires_grad
    one, ar = score_joint(net, config, xt, batch.x0, batch.layout, wanted, wanted)
    for got, expected in ((q, one), (p, ar), (q, score(net, config, xt, batch.x0, batch.layout, wanted)),
                          (p, score_ar(net, batch.x0, batch.layout, wanted))):  # fmt: skip
        assert (got - expected)[..., :MASK].abs().max() < 1e-10


def test_long_distilled_pass_in_chunks_equals_the_dense_one() -> None:
    net, _ = gated(tiny_model(SUPPORTED["llama"](), torch.float32))
    layout = Layout.of(torch.arange(128).repeat(3)[None, :320], (torch.arange(320) // 128)[None])
    x0, wanted = random_tokens(1, 320), predictable(layout)
    xt = x0.masked_fill(wanted, MASK)
    fast = score_distilled(net, causal_config(), xt, x0, layout, wanted)
    assert net.fast_paths.chunked
    net.fast_paths = hf.FastPaths()
    for a, b in zip(fast, score_distilled(net, causal_config(), xt, x0, layout, wanted), strict=True):
        assert (a - b)[..., :MASK].abs().max() < 1e-5 * b[..., :MASK].abs().max()


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_are_least_where_the_draft_is_the_teacher(distance: str) -> None:
    torch.manual_seed(0)
    p = torch.randn(5, 7, dtype=torch.float64)
    p[:, 6] = -math.inf
    q = torch.randn(5, 7, dtype=torch.float64)
    q[:, 6] = -math.inf
    target = p.argmax(-1)
    q.requires_grad_(True)
    values = draft_distance(p, q, target, distance)
    assert values.shape == (5,)
    values.sum().backward()
    assert torch.isfinite(q.grad[:, :6]).all()
    assert (draft_distance(p, p * 1.0, target, distance) < values).all() or distance in ("ce", "lk")
    p_law, q_law = p.softmax(-1), q.detach().softmax(-1)
    kl = (p_law[:, :6] * (p_law[:, :6] / q_law[:, :6]).log()).sum(-1)
    tv = 1 - torch.minimum(p_law, q_law).sum(-1)
    nearest = -q_law.gather(-1, target[:, None])[:, 0].log()
    lam = (-0.5 * (1 - tv)).exp()
    reference = {"ce": nearest, "kl": kl, "tv": tv, "kl+tv": 0.01 * kl + tv, "lk": lam * kl + (1 - lam) * tv + nearest}
    assert torch.allclose(values.detach(), reference[distance])


def test_draft_failure_equals_a_loop_over_blocks() -> None:
    batch = packed()
    layout, a = batch.layout, torch.rand(batch.x0.shape, generator=torch.Generator().manual_seed(0)).double()
    got = draft_failure(a.flatten(), blocks_of(layout, 4).flatten()).view(a.shape)
    for row in range(len(a)):
        for column in range(a.shape[1]):
            place = int(layout.position[row, column]) % 4
            if layout.document[row, column] >= 0:
                expected = 1 - float(a[row, column - place : column + 1].prod())
                assert float(got[row, column]) == pytest.approx(expected)


@pytest.mark.parametrize("distance", OF_BLOCKS)
def test_distances_of_blocks_count_no_first_place_and_learn_the_rest(distance: str) -> None:
    net, drafter = gated(tiny_model(SUPPORTED["llama"](), torch.float64))
    net.model.requires_grad_(False)
    batch = packed()
    everything = Corruption(predictable(batch.layout), predictable(batch.layout).double())
    loss = distill_loss(net, causal_config(), batch.x0, batch.layout, everything, distance)
    loss.sum.backward()
    assert drafter.masks.grad.abs().max() > 0
    assert loss.sum.detach() > 0
    assert float(distill_loss(net, causal_config(1), batch.x0, batch.layout, everything, distance).sum.detach()) == 0


@pytest.mark.parametrize("distance", OF_BLOCKS)
def test_distances_of_blocks_equal_a_loop_over_drafts(distance: str) -> None:
    net, _ = gated(tiny_model(SUPPORTED["llama"](), torch.float64))
    batch, config = packed(), causal_config()
    corruption = masks_of(batch.layout)
    wanted = corruption.masked & (batch.layout.position % 4 > 0)
    xt = corruption.apply(batch.x0, MASK)
    q, p = (logits.detach() for logits in score_distilled(net, config, xt, batch.x0, batch.layout, wanted))
    target, expected, reached, at = batch.x0[wanted], 0.0, 1.0, (-1, -1)
    mixed, tv, kl = (draft_distance(p, q, target, name) for name in ("kl+tv", "tv", "kl"))
    for i, (row, column) in enumerate(wanted.nonzero().tolist()):
        block = (row, int(column - batch.layout.position[row, column] % 4))
        reached, at = (reached if block == at else 1.0), block
        first = reached * float(tv[i])
        reached *= 1 - float(tv[i])
        value = 1 - reached + 0.1 * float(kl[i]) if distance == "reach" else (1 + 3 * first) / 2 * float(mixed[i])
        expected += float(corruption.weight[row, column]) * value
    loss = distill_loss(net, config, batch.x0, batch.layout, corruption, distance)
    assert loss.sum.item() == pytest.approx(expected)
    top = distill_loss(net, config, batch.x0, batch.layout, corruption, distance, top_k=VOCABULARY)
    assert top.sum.item() == pytest.approx(expected)


def test_distance_to_oneself_is_nothing() -> None:
    net, config, batch = network(), causal_config(1, shift=True), packed()
    everything = Corruption(predictable(batch.layout), predictable(batch.layout).float())
    loss = distill_loss(net, config, batch.x0, batch.layout, everything, "kl")  # blocks of 1: every row is the AR row
    assert loss.sum.item() == 0
    assert loss.count == predictable(batch.layout).sum()


# --- recipes and folders


def test_block_size_doubles_over_the_run() -> None:
    chosen = resolve(load_recipe("tri-mode-published", block_size=8, first_block_size=2), 10**6, 512)
    assert [at_step(chosen, step, 9).block_size for step in range(9)] == [2, 2, 2, 4, 4, 4, 8, 8, 8]


@pytest.fixture(scope="module")
def drafter(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "drafter"
    unmask.adapt(tokenizer_and_model, stories, "drafter", folder, **RUN, save_every=5, drafter_rank=4)
    return folder


@pytest.fixture(scope="module")
def tri_mode(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tri"
    unmask.adapt(tokenizer_and_model, stories, "tri-mode-published", folder, **RUN, first_block_size=2)
    return folder


def test_drafter_folder_holds_no_base_and_loads_to_the_same_logits(
    drafter: Path, tokenizer_and_model: Path, tmp_path: Path
) -> None:
    names = {path.name for path in drafter.iterdir()}
    assert "drafter.safetensors" in names
    assert not names & {"model.safetensors", "adapter_config.json"}
    written = json.loads((drafter / "config.json").read_text())["diffusion"]
    assert written["base"]["name"] == str(tokenizer_and_model)
    with pytest.raises(ValueError, match="unmask-drafter"):
        AutoModelForCausalLM.from_pretrained(drafter)

    lm, base = unmask.load(drafter, dtype=torch.float64), unmask.load(tokenizer_and_model, dtype=torch.float64)
    stock = base.generate(STORIES[:3], max_new_tokens=12, mode="ar").sequences
    assert torch.equal(lm.generate(STORIES[:3], max_new_tokens=12, mode="ar").sequences, stock)
    assert torch.equal(lm.generate(STORIES[:3], max_new_tokens=12, mode="speculative").sequences, stock)
    assert [o.nats for o in lm.nll(STORIES[:3])] == [o.nats for o in base.nll(STORIES[:3])]
    bound = [o.nats for o in lm.nelbo(STORIES[:3], seed=0)]
    lm.save_pretrained(tmp_path / "again")
    again = unmask.load(tmp_path / "again", dtype=torch.float64)
    assert [o.nats for o in again.nelbo(STORIES[:3], seed=0)] == bound
    assert any(float(up.detach().abs().max()) > 0 for up in again.drafter.up.values())


def test_without_a_tokenizer_of_its_own_a_drafter_uses_its_bases(drafter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lean"
    shutil.copytree(drafter, folder, ignore=shutil.ignore_patterns("checkpoint-*", "token*", "special*", "added*"))
    one, other = unmask.load(drafter), unmask.load(folder)
    assert other.tokenizer.mask_token_id == one.tokenizer.mask_token_id
    texts = [lm.generate("Once there was", mode="speculative", max_new_tokens=9).texts for lm in (one, other)]
    assert texts[0] == texts[1]


def test_drafter_training_leaves_the_base_alone_and_resumes_exactly(
    drafter: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    base = unmask.load(tokenizer_and_model, dtype=torch.float32)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    stopped = tmp_path / "stopped"
    lm = unmask.adapt(base, stories, "drafter", stopped, **RUN, save_every=5, drafter_rank=4)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in lm.model.named_parameters())
    expected = unmask.load(drafter).drafter.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in lm.drafter.state_dict().items())
    run = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(run | {"finished": False}))
    (stopped / "drafter.safetensors").unlink()
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-12"]
    shutil.rmtree(stopped / "checkpoint-12")
    resumed = unmask.adapt(tokenizer_and_model, stories, "drafter", stopped, resume=True, **RUN, save_every=5,
                           drafter_rank=4)  # fmt: skip
    assert all(torch.equal(value, expected[name]) for name, value in resumed.drafter.state_dict().items())


def test_drafter_of_a_missing_or_other_base_is_refused(
    drafter: Path, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:

    def moved(**base: str) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(drafter, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
        config = json.loads((folder / "config.json").read_text())
        config["diffusion"]["base"] |= base
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    with pytest.raises(ValueError, match=r"needs its base '/nowhere/base'.*give base=FOLDER"):
        unmask.load(moved(name="/nowhere/base"))
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tokenizer_and_model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1.5
    model.save_pretrained(other)
    unmask.load(tokenizer_and_model).tokenizer.save_pretrained(other)
    with pytest.raises(ValueError, match="was trained on another model"):
        unmask.load(moved(name=str(other)))
    with pytest.raises(ValueError, match="is a drafter on a frozen base"):
        unmask.adapt(drafter, stories, "tri-mode-published", tmp_path / "run")


def test_a_module_that_gets_other_rows_is_refused() -> None:
    net, drafter = gated(tiny_model(SUPPORTED["llama"]()))
    with drafter.rows(torch.ones(1, 4, dtype=torch.bool)), pytest.raises(ValueError, match="cannot be picked"):
        net.model.model.layers[0].mlp.up_proj(torch.zeros(3, 32))


def test_tri_mode_checkpoint_decodes_in_three_modes(tri_mode: Path) -> None:
    lm = unmask.load(tri_mode, dtype=torch.float64)
    ar = lm.generate(STORIES[:4], mode="ar", max_new_tokens=12)
    fast = lm.generate(STORIES[:4], mode="speculative", cycle="two", max_new_tokens=12)
    assert torch.equal(fast.sequences, ar.sequences)
    assert ar.tokens_per_cycle is None
    assert (fast.tokens_per_cycle >= 12 / 7).all()
    assert (fast.tokens_per_forward <= fast.tokens_per_cycle).all()
    sampled = {"temperature": 0.9, "top_p": 0.9, "seed": 4, "max_new_tokens": 12}
    ar, fast = (lm.generate(STORIES[:4], mode=mode, **sampled) for mode in ("ar", "speculative"))
    assert torch.equal(fast.sequences, ar.sequences)
    again = lm.generate(STORIES[:4], mode="speculative", draft_length="auto", **sampled)
    assert torch.equal(again.sequences, ar.sequences)
    assert lm.generate(STORIES[:2], max_new_tokens=8).num_forwards.min() >= 1  # diffusion mode on the causal cache


def test_without_a_recipe_the_ar_model_is_kept(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    parent = unmask.load(tokenizer_and_model)
    before = sum(document.nats for document in parent.nll(STORIES[:8]))
    run = {"max_tokens": 4000, "max_length": 64, "block_size": 4, "batch_size": 4, "show_progress": False}
    lm = unmask.adapt(tokenizer_and_model, stories, output_dir=tmp_path / "run", **run)
    assert lm.diffusion is not None
    assert (lm.diffusion.recipe, lm.default_mode) == ("tri-mode", "speculative")
    moved = abs(sum(document.nats for document in lm.nll(STORIES[:8])) / before - 1)
    fast, ar = lm.generate(STORIES[:3], max_new_tokens=12), lm.generate(STORIES[:3], "ar", max_new_tokens=12)
    assert torch.equal(fast.sequences, ar.sequences)
    assert fast.tokens_per_cycle is not None
    other = unmask.adapt(tokenizer_and_model, stories, "tri-mode-published", tmp_path / "published", **run)
    assert moved < 0.2 * abs(sum(document.nats for document in other.nll(STORIES[:8])) / before - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_length": 0}, "draft_length 0 must be at least 1"),
        ({"draft_length": "many"}, "draft_length 'many' must be a number of tokens or 'auto'"),
    ],
)
def test_bad_draft_lengths_are_named(tri_mode: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unmask.load(tri_mode).generate("x", mode="speculative", **options)
    with pytest.raises(ValueError, match=r"draft_length=4 is not read by .* or use mode='speculative'"):
        unmask.load(tri_mode).generate("x", "diffusion", draft_length=4)


def test_speculation_needs_a_causal_clean_half(converted: Path, tokenizer_and_model: Path) -> None:
    with pytest.raises(ValueError, match=r"clean attention 'block_causal' of this checkpoint is not 'causal'"):
        unmask.load(converted).generate("x", mode="speculative")
    with pytest.raises(ValueError, match="has no drafter"):
        unmask.load(tokenizer_and_model).generate("x", mode="speculative")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: load_recipe("tri-mode-published", clean_attention="block_causal"),
            "objective='joint' needs attention",
        ),
        (lambda: load_recipe("tri-mode-published", alpha=-1.0), "alpha=-1.0 must be at least 0"),
        (lambda: load_recipe("drafter", distance="l2"), "distance='l2' is unknown"),
        (
            lambda: load_recipe("tri-mode-published", mask_per_place=True),
            "mask_per_place=true needs objective='distill'",
        ),
        (lambda: load_recipe("drafter", compile_layers=True), "compile_layers=true needs objective="),
        (lambda: load_recipe("drafter", drafter_rank=0), "drafter_rank=0 must be above 0"),
        (
            lambda: resolve(load_recipe("tri-mode-published", block_size=12, first_block_size=5), 10**6, 512),
            "first_block_size=5 does not double to block_size=12",
        ),
        (lambda: DrafterConfig(rank=0), "drafter_rank 0 must be at least 1"),
        (lambda: DrafterConfig(scale=0), "drafter_scale 0 must be positive"),
        (
            lambda: gated(tiny_model(SUPPORTED["llama"]()), targets="z_proj"),
            "drafter_targets 'z_proj' is no linear map",
        ),
        (lambda: replace(block_config(), noisy_attention="left"), "noisy_attention 'left' is unknown"),
        (
            lambda: replace(block_config(attention="block_causal", clean=None), noisy_attention="causal"),
            "needs two_stream attention",
        ),
        (lambda: draft_distance(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), "l2"), "distance 'l2'"),
        (
            lambda: joint_loss(network(), block_config(), *_batch(), 0.3),
            "clean attention 'block_causal' of two_stream attention is not the AR model",
        ),
        (
            lambda: score_distilled(network(), causal_config(shift=True), *[_batch()[0]] * 2, _batch()[1], EVERYWHERE),
            "first position has no noisy row",
        ),
    ],
)
def test_bad_values_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


EVERYWHERE = torch.ones(1, 8, dtype=torch.bool)


def _batch() -> tuple[torch.Tensor, Layout, Corruption]:
    layout = Layout.of(torch.arange(8)[None])
    return random_tokens(1, 8), layout, masks_of(layout)


# --- real models


@pytest.mark.parametrize("name", ["stories260k", "babyllama-1m"])
@pytest.mark.parametrize("trained", [False, True])
def test_speculative_equals_ar_greedy_on_real_prompts(name: str, trained: bool, shared: Path, tmp_path: Path) -> None:
    from unmask.data.readers import read_documents

    test = shared / "corpora" / "tinystories" / "test.txt"
    prompts = [text[: 20 + 7 * i % 40] for i, text in zip(range(200), read_documents(test), strict=False)]
    parent, tokens = shared / "models" / name, 4000 if trained else 1
    unmask.adapt(parent, shared / "corpora" / "tinystories" / "valid.txt", "drafter", tmp_path / "d", max_tokens=tokens,
                 max_length=64, block_size=4, batch_size=8, eval_documents=1, show_progress=False)  # fmt: skip
    lm = unmask.load(tmp_path / "d", dtype=torch.float64)
    for start in range(0, 200, 8):
        few = prompts[start : start + 8]
        ar = lm.generate(few, mode="ar", max_new_tokens=10)
        fast = lm.generate(few, mode="speculative", max_new_tokens=10)
        assert torch.equal(fast.sequences, ar.sequences)
    for prompt in prompts[:20]:  # and batch 1
        ar = lm.generate(prompt, mode="ar", max_new_tokens=10)
        assert torch.equal(lm.generate(prompt, mode="speculative", max_new_tokens=10).sequences, ar.sequences)


@pytest.fixture(scope="module")
def roomy(tokenizer_and_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent whose vocabulary has 9 rows more than its tokenizer, as Qwen's has; the first of them is its padding."""
    folder = tmp_path_factory.mktemp("roomy")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    config = LlamaConfig(**_GQA | {"vocab_size": len(tokenizer) + 9, "bos_token_id": 0, "eos_token_id": 1,
                                   "pad_token_id": len(tokenizer)})  # fmt: skip
    tiny_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mask_per_place", [False, True])
def test_rows_without_a_token_stay_the_bases(roomy: Path, stories: Path, tmp_path: Path, mask_per_place: bool) -> None:
    """They have logits: masks with their ids would take these from the AR model, or read what it writes as masks."""
    base = unmask.load(roomy)
    nats = [o.nats for o in base.nll(STORIES[:3])]
    written = base.generate(STORIES[:8], max_new_tokens=20).sequences
    rows = len(base.tokenizer) + 9
    assert bool((written >= len(base.tokenizer)).any())  # random weights write such ids too
    unmask.adapt(roomy, stories, "drafter", tmp_path / "run", **RUN, drafter_rank=4, mask_per_place=mask_per_place)
    for _ in range(2):
        lm = unmask.load(tmp_path / "run")
        assert lm.diffusion.mask_token_id == rows
        assert [o.nats for o in lm.nll(STORIES[:3])] == nats
        for mode in ("ar", "speculative"):
            assert torch.equal(lm.generate(STORIES[:8], max_new_tokens=20, mode=mode).sequences, written)
        lm.generate(STORIES[:1], max_new_tokens=8, mode="diffusion")
        for path in (tmp_path / "run").glob("token*"):  # a folder without a tokenizer of its own uses its base's
            path.unlink()


def test_a_mask_on_the_row_of_padding_learns(roomy: Path, stories: Path, tmp_path: Path) -> None:
    lm = unmask.adapt(roomy, stories, "efficient-dlm", tmp_path / "run", **RUN)
    mask = lm.diffusion.mask_token_id
    assert mask == len(lm.tokenizer) - 1
    again = unmask.load(tmp_path / "run")
    assert again.model.config.pad_token_id is None
    before = again.model.get_input_embeddings().weight[mask].clone()
    assert again.model.get_input_embeddings().padding_idx is None
    mean = unmask.load(roomy).model.get_input_embeddings().weight[: len(lm.tokenizer) - 1].mean(0)
    assert (before - mean).abs().max() > 1e-4
    again.generate(STORIES[:1], max_new_tokens=8)
