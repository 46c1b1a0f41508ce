"""Teachers other than the text: a frozen AR model, truncated distributions, a student's trajectories, moved grids."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import (
    MASK,
    STORIES,
    SUPPORTED,
    Rows,
    block_config,
    network,
    random_tokens,
    tiny_llama,
    tiny_model,
)
from torch.distributed.fsdp import fully_shard

import unmask
from unmask import hf
from unmask.core import head_loss
from unmask.core.attention import Layout, dense
from unmask.core.batch import Batch
from unmask.core.corruption import Corruption, segments
from unmask.core.distances import DISTANCES, OF_BLOCKS, draft_distance
from unmask.core.objectives import ar_loss, distill_loss, joint_loss, predictable
from unmask.data.documents import load_corpus
from unmask.recipe import load_recipe
from unmask.resolve import resolve
from unmask.settings import Settings
from unmask.settings.method import DISTANCES as SETTINGS
from unmask.training.rollouts import roll_out
from unmask.training.step import corruptions, offset_blocks, step_loss

CONFIG = block_config(4, clean="causal")
RUN = {"show_progress": False, "max_tokens": 2000, "max_length": 64, "block_size": 4, "batch_size": 4}


def other_network() -> hf.HFNetwork:
    net = network()
    torch.manual_seed(1)
    with torch.no_grad():
        for p in net.model.parameters():
            p += 0.1 * torch.randn_like(p)
    return net


def text() -> tuple[torch.Tensor, Layout, Corruption]:
    layout = Layout.of(torch.arange(12).expand(3, 12))
    masked = predictable(layout) & (random_tokens(3, 12, seed=5) % 3 > 0)
    return random_tokens(3, 12), layout, Corruption(masked, 1.5 * masked.double())


# --- a frozen AR model


def test_a_teacher_that_equals_the_student_pulls_at_nothing_and_another_one_does() -> None:
    student, (x0, layout, corruption) = network(), text()
    loss = joint_loss(student, CONFIG, x0, layout, corruption, 0.0, teacher=network())
    loss.sum.backward()
    assert abs(loss.sum.item()) < 1e-10
    assert max(float(p.grad.abs().max()) for p in student.model.parameters()) < 1e-10
    assert joint_loss(student, CONFIG, x0, layout, corruption, 0.0, teacher=other_network()).sum.item() > 0.1


@pytest.mark.parametrize("distance", ["ce", "kl", "tv"])
@torch.no_grad()
def test_joint_loss_with_a_teacher_equals_its_parts_by_hand(distance: str) -> None:
    student, teacher, (x0, layout, corruption) = network(), other_network(), text()
    got = joint_loss(student, CONFIG, x0, layout, corruption, 0.3, teacher=teacher, distance=distance)
    p, own = (net.model(x0).logits[:, :-1, :MASK].log_softmax(-1) for net in (teacher, student))
    ar = (p.exp() * (p - own)).sum()
    both = layout._replace(noisy=~layout.noisy).concat(layout)
    xt = corruption.apply(x0, MASK)
    q = student(torch.cat([xt, x0], 1), both, CONFIG.pattern)[:, 1:12, :MASK].log_softmax(-1)
    each = {
        "ce": -q.gather(-1, x0[:, 1:, None])[..., 0],
        "kl": (p.exp() * (p - q)).sum(-1),
        "tv": 0.5 * (p.exp() - q.exp()).abs().sum(-1),
    }[distance]
    assert got.sum.item() == pytest.approx((ar + 0.3 * (corruption.weight[:, 1:] * each).sum()).item(), rel=1e-9)
    assert got.count == predictable(layout).sum()


BESIDE = [("teacher", d) for d in DISTANCES] + [("itself", d) for d in DISTANCES] + [
    ("base", d) for d in (*DISTANCES, *OF_BLOCKS)]  # fmt: skip


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize(("beside", "distance"), BESIDE)
def test_losses_beside_other_distributions_hold_few_logits_at_a_time(
    beside: str, distance: str, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "_AT_ONCE_CPU", 1)
    monkeypatch.setattr(head_loss, "_ROWS", 7)
    student, teacher, (x0, layout, corruption) = network(), other_network(), text()

    def learnt() -> tuple[int, list[torch.Tensor]]:
        student.model.zero_grad()
        with Rows() as rows:
            if beside == "base":
                loss = distill_loss(student, CONFIG, x0, layout, corruption, distance, top_k=top_k)
            else:
                loss = joint_loss(student, CONFIG, x0, layout, corruption, 0.3, distance=distance, top_k=top_k,
                                  teacher=teacher if beside == "teacher" else None)  # fmt: skip
            loss.sum.backward()
        return rows.most, [loss.sum.detach(), *(p.grad.clone() for p in student.model.parameters())]

    most, found = learnt()
    assert most <= 7
    student.fast_paths = teacher.fast_paths = hf.FastPaths()
    most, expected = learnt()
    assert most > 7
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("in_model", [False, True])
@pytest.mark.parametrize("gives_up", [False, True])
def test_a_sharded_teacher_has_few_logits_at_a_time(
    gives_up: bool, in_model: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gives_up: its head's matrix is spread over the ranks again where its pass ends. in_model: with the rest."""
    monkeypatch.setattr(head_loss, "_AT_ONCE_CPU", 1)
    monkeypatch.setattr(head_loss, "_ROWS", 7)
    config = SUPPORTED["llama"]()
    config.tie_word_embeddings = tied
    teacher = hf.as_network(tiny_model(config, torch.float64), MASK)
    student, (x0, layout, corruption) = network(), text()
    losses = []
    for sharded in (False, True):
        if sharded:
            model = teacher.model
            for layer in model.model.layers:
                fully_shard(layer)
            last = [model.model.norm, model.lm_head, *([model.model.embed_tokens] if tied else [])]
            if not in_model:
                fully_shard(last, reshard_after_forward=gives_up)
            fully_shard(model, reshard_after_forward=gives_up)
        for _ in range(2):
            with Rows() as rows:
                losses.append(joint_loss(student, CONFIG, x0, layout, corruption, 0.3, teacher=teacher, distance="kl"))
            assert rows.most <= 7
    assert {loss.sum.item() for loss in losses} == {losses[0].sum.item()}


def test_settings_and_losses_know_the_same_distances() -> None:
    assert (*DISTANCES, *OF_BLOCKS) == SETTINGS


def test_rows_come_in_whole_groups() -> None:
    def parts(groups: list[int], size: int) -> list[tuple[int, int]]:
        loss = head_loss.GroupLoss(lambda logits, _: logits[:, 0], torch.tensor(groups))
        return [(part.start, part.stop) for part in head_loss._parts(len(groups), size, loss)]

    assert parts([3, 3, 5, 5, 5, 5, 3, 9], 3) == [(0, 2), (2, 6), (6, 8)]
    assert parts([1, 1, 1, 1], 3) == [(0, 4)]
    assert parts([1, 2, 3, 4], 3) == [(0, 3), (3, 4)]
    assert parts([], 3) == []


def test_without_a_teacher_the_noisy_rows_follow_the_clean_ones_without_moving_them() -> None:
    student, (x0, layout, corruption) = network(), text()
    both = joint_loss(student, CONFIG, x0, layout, corruption, 0.3, distance="kl")
    alone = ar_loss(student, x0, layout)
    itself = joint_loss(student, CONFIG, x0, layout, corruption, 0.3, teacher=network(), distance="kl")
    assert (both.sum - alone.sum).item() == pytest.approx(itself.sum.item(), rel=1e-9)


def test_adapt_keeps_the_ar_mode_nearer_to_the_parent_with_it_as_teacher(
    tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    parent = unmask.load(tokenizer_and_model, dtype=torch.float32)
    expected = sum(o.nats for o in parent.nll(STORIES))
    teachers = {"text": None, "parent": "parent", "path": str(tokenizer_and_model)}
    runs = {
        name: unmask.adapt(tokenizer_and_model, stories, "tri-mode-published", tmp_path / name, teacher=teacher, **RUN)
        for name, teacher in teachers.items()
    }
    moved = {name: abs(sum(o.nats for o in lm.nll(STORIES)) - expected) for name, lm in runs.items()}
    assert moved["parent"] < 0.5 * moved["text"]
    assert moved["path"] == pytest.approx(moved["parent"], rel=1e-3)


# --- truncated distributions


@pytest.mark.parametrize("distance", ["kl", "tv", "kl+tv", "lk"])
def test_top_k_of_the_whole_vocabulary_equals_the_full_distance(distance: str) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 6, 11, generator=generator, dtype=torch.float64)
    p[:, 10] = q[:, 10] = -math.inf
    q.requires_grad_(True)
    target = torch.zeros(6, dtype=torch.long)
    full = draft_distance(p, q, target, distance)
    (gradient,) = torch.autograd.grad(full.sum(), q)
    for k in (11, 50, 10):  # 10: all but the mask token
        got = draft_distance(p, q, target, distance, k)
        assert torch.allclose(got, full, atol=1e-10)
        (g,) = torch.autograd.grad(got.sum(), q)
        assert torch.allclose(g, gradient, atol=1e-9)


def test_total_variation_and_its_closed_gradient_match_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 5, 2**17, generator=generator, dtype=torch.float64)  # two rows at a time
    p[:, 10] = q[:, 10] = -math.inf
    q.requires_grad_(True)
    weight = torch.rand(5, generator=generator, dtype=torch.float64)
    got, expected = draft_distance(p, q, torch.zeros(5), "tv"), 0.5 * (p.softmax(-1) - q.softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    gradients = [torch.autograd.grad((weight * x).sum(), q)[0] for x in (got, expected)]
    torch.testing.assert_close(*gradients, atol=1e-10 * float(gradients[1].abs().max()), rtol=0)
    assert len(draft_distance(p[:0], q[:0], torch.zeros(0), "tv")) == 0


@pytest.mark.parametrize("distance", ["kl", "tv"])
def test_top_k_bounds_the_distance_from_below_and_grows_with_k(distance: str) -> None:
    p, q = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = torch.zeros(50, dtype=torch.long)
    values = [draft_distance(p, q, target, distance, k) for k in (1, 4, 16, 39, 40)]
    for fewer, more in pairwise(values):
        assert (fewer <= more + 1e-12).all()
    assert draft_distance(p, p, target, distance, 4).abs().max() < 1e-12


def test_large_vocabularies_get_a_truncated_teacher_unless_asked_otherwise() -> None:
    recipe = load_recipe("drafter")
    assert resolve(recipe, 10**6, 512, 65_536).teacher_top_k is None
    assert resolve(recipe, 10**6, 512, 65_537).teacher_top_k == 64
    assert resolve(replace(recipe, teacher_top_k=16), 10**6, 512, 151_936).teacher_top_k == 16


# --- a block grid of each document's own


def packed() -> Batch:
    position = torch.cat([torch.arange(5), torch.arange(9), torch.arange(2)]).expand(8, 16)
    document = torch.tensor([0] * 5 + [1] * 9 + [-1] * 2).expand(8, 16)
    return Batch(random_tokens(8, 16), Layout.of(position, document))


CHOSEN = Settings("test", clean_attention="causal", objective="joint", block_size=4, batch_size=8, max_length=16,
                  random_offset=True)  # fmt: skip


def test_offsets_cut_each_document_at_any_place_and_leave_everything_else() -> None:
    batch, rows = packed(), torch.arange(8)
    moved = offset_blocks(batch, CHOSEN, 3, rows)
    offset = moved.layout.position - batch.layout.position
    assert torch.equal(moved.x0, batch.x0)
    assert torch.equal(predictable(moved.layout, moved.loss_mask), predictable(batch.layout))
    for document in (0, 1):
        inside = offset[:, batch.layout.document[0] == document]
        assert (inside == inside[:, :1]).all()
    drawn = {int(o) for step in range(9) for o in offset_blocks(batch, CHOSEN, step, rows).layout.position[:, 0]}
    assert drawn == {0, 1, 2, 3}
    for row in range(8):  # blocks are as the offset says, and everything masked is in one
        segment = segments(moved.layout, 4)[row]
        for column in range(1, 14):
            new = (
                batch.layout.position[row, column] == 0
                or (batch.layout.position[row, column] + offset[row, column]) % 4 == 0
            )
            assert bool(segment[column] != segment[column - 1]) == bool(new)
    part = offset_blocks(batch.rows(2, 5), CHOSEN, 3, torch.arange(2, 5))
    assert torch.equal(part.layout.position, moved.layout.position[2:5])
    (corruption,) = corruptions(CHOSEN, moved.layout, 3, rows, moved.loss_mask)
    assert not (corruption.masked & ~predictable(batch.layout)).any()


@pytest.mark.parametrize("shift", [False, True])
@torch.no_grad()
def test_offset_step_equals_each_document_behind_its_own_padding(shift: bool) -> None:
    """The same loss where every document is scored alone, blocks written out as a mask from its offset."""
    net, batch = network(), packed()
    chosen, config = replace(CHOSEN, shift=shift, masking="all"), replace(CONFIG, shift=shift)
    got = step_loss(net, chosen, config, batch, 3, torch.arange(8))
    moved = offset_blocks(batch, chosen, 3, torch.arange(8))
    total = 0.0
    for row in range(8):
        for start, length in ((0, 5), (5, 9)):
            x0, offset = batch.x0[row, start : start + length][None], int(moved.layout.position[row, start])
            layout = Layout.of(torch.arange(length)[None])

            def pattern(q: Layout, kv: Layout, offset: int = offset) -> torch.Tensor:
                def on_grid(x: Layout) -> Layout:
                    return Layout(x.position + offset, x.document, x.noisy)

                return config.pattern(on_grid(q), on_grid(kv))

            both = layout._replace(noisy=~layout.noisy).concat(layout)
            xt = x0.clone()
            xt[:, 1:] = MASK
            logits = net(torch.cat([xt, x0], 1), both, pattern)[0, :, :MASK].log_softmax(-1)
            for i in range(1, length):
                scoring = i
                if shift:
                    scoring = i - 1 + (length if (i + offset) % 4 == 0 else 0)
                total += float(-logits[length + i - 1, x0[0, i]] - 0.3 * logits[scoring, x0[0, i]])
    assert got.sum.item() == pytest.approx(total, rel=1e-6)  # rotary tables are float32 in every model
    assert dense(config.pattern, both, both).any()


@pytest.mark.parametrize(
    ("name", "rotary"), [("llama", True), ("bitnet", True), ("gemma3", True), ("gpt2", False), ("opt", False)]
)
def test_position_differences_are_told_from_positions(name: str, rotary: bool) -> None:
    assert hf.sees_position_differences(tiny_model(SUPPORTED[name]())) == rotary


# --- trajectories of the student


@pytest.fixture(scope="module")
def student(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "student"
    unmask.adapt(tokenizer_and_model, stories, "tri-mode-published", folder, **RUN)
    return folder


def test_trajectories_mask_what_was_still_masked_at_one_step_of_each_block(
    student: Path, stories: Path, tmp_path: Path
) -> None:
    lm = unmask.load(student, dtype=torch.float64)
    prompts = load_corpus([stories], lm.tokenizer)
    made = roll_out(lm.network, prompts, tmp_path, author="x", num_tokens=900, max_length=40, temperature=1.0,
                    student=lm.diffusion, seed=2)  # fmt: skip
    again = roll_out(lm.network, prompts, tmp_path, author="x", num_tokens=900, max_length=40, temperature=1.0,
                     student=lm.diffusion, seed=2)  # fmt: skip
    assert again.fingerprint == made.fingerprint
    assert np.array_equal(again.loss_mask, made.loss_mask)
    assert made.num_tokens >= 900
    partly = 0
    for i in range(len(made)):
        ids, learnt = made.document(i)
        common = next(n for n in range(len(ids) + 1) if n == len(ids) or ids[n] != prompts[i % len(prompts)][n])
        first = int(np.flatnonzero(learnt)[0])
        assert 1 <= first <= common + 4
        for block in range((first // 4 + 1) * 4, len(ids), 4):
            assert learnt[block : block + 4].any()  # a step leaves at least one token to make
            partly += not learnt[block : block + 4].all()
        # Written block by block from left to right with threshold 0.9: a lone token a step, so all counts occur.
    assert partly > 10


@pytest.mark.parametrize(("steps", "sizes"), [(1, {4}), (2, {4, 2}), (3, {4, 2, 1}), (4, {4, 3, 2, 1})])
def test_trajectories_of_a_step_budget_take_that_many_forwards_a_block(
    steps: int, sizes: set[int], student: Path, stories: Path, tmp_path: Path
) -> None:
    """With T steps a block of 4 is written in shares of ceil(remaining / steps left): what is masked before each."""
    lm = unmask.load(student)
    with torch.no_grad():  # so sure of everything that a threshold would commit a block at once
        lm.model.get_output_embeddings().weight.mul_(50)
    prompts = load_corpus([stories], lm.tokenizer)
    made = roll_out(lm.network, prompts, tmp_path, author="x", num_tokens=2000, max_length=40, temperature=1.0,
                    student=lm.diffusion, num_steps=steps, seed=2)  # fmt: skip
    found = set()
    for i in range(len(made)):
        _, learnt = made.document(i)
        first = int(np.flatnonzero(learnt)[0])
        found |= {int(learnt[k : k + 4].sum()) for k in range((first // 4 + 1) * 4, len(learnt) - 3, 4)}
    assert found == sizes


@pytest.mark.parametrize("by_diffusion", [True, False])
def test_the_end_token_of_own_text_leaves_the_loss_alone(
    by_diffusion: bool, student: Path, stories: Path, tmp_path: Path
) -> None:
    lm = unmask.load(student)
    prompts, ends = load_corpus([stories], lm.tokenizer), range(2, 150)
    options = {"author": "x", "num_tokens": 400, "max_length": 30, "temperature": 1.0, "end_token_ids": ends,
               "student": lm.diffusion if by_diffusion else None}  # fmt: skip
    whole, without = (roll_out(lm.network, prompts, tmp_path, learn_end=end, **options) for end in (True, False))
    assert len(list(tmp_path.glob("rollouts-*.npz"))) == 2  # of another content, so in another file
    assert np.array_equal(whole.tokens, without.tokens)
    changed = ended = 0
    for i in range(len(whole)):
        (ids, learnt), (_, rest) = whole.document(i), without.document(i)
        learnt = np.ones(len(ids), bool) if learnt is None else learnt
        rest = np.ones(len(ids), bool) if rest is None else rest
        ended += int(ids[-1] in ends)
        changed += int(learnt[-1] and not rest[-1])
        assert np.array_equal(learnt[:-1], rest[:-1])
        assert not (rest[-1] and ids[-1] in ends)
    assert ended >= changed > 0
    assert (ended == changed) or by_diffusion  # there the end token may be no mask of the step that was drawn


@pytest.mark.parametrize("recipe", ["drafter", "tri-mode"])
def test_adapt_on_trajectories_rolls_out_anew_and_resumes_exactly(
    recipe: str, tokenizer_and_model: Path, student: Path, stories: Path, tmp_path: Path
) -> None:
    model, more = (tokenizer_and_model, {}) if recipe == "drafter" else (
        student, {"teacher": str(tokenizer_and_model), "distance": "kl", "masking": "all"})  # fmt: skip
    options = RUN | more | {"self_prompts": str(stories), "self_mode": "diffusion", "self_temperature": 1.0,
                            "self_every": 3, "save_every": 4, "max_tokens": 1500}  # fmt: skip
    lm = unmask.adapt(model, "self", recipe, tmp_path / "run", **options)
    rollouts = sorted((tmp_path / "run" / "rollouts").glob("*.npz"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert len(rollouts) == -(-steps // 3)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(run | {"finished": False}))
    again = unmask.adapt(model, "self", recipe, tmp_path / "run", resume=True, **options)
    learnt = [x.model if x.drafter is None else x.drafter for x in (lm, again)]
    for a, b in zip(*(m.state_dict().values() for m in learnt), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: load_recipe("drafter", teacher="parent"), "teacher='parent' needs objective='joint'; recipe"),
        (lambda: load_recipe("tri-mode-published", distance="reach"), "distance='reach' needs objective='distill'"),
        (lambda: load_recipe("tri-mode-published", distance="first-error"), "distance='first-error' needs"),
        (lambda: load_recipe("tri-mode-published", teacher_top_k=0), "teacher_top_k=0 must be above 0"),
        (lambda: load_recipe("efficient-dlm", random_offset=True), "random_offset=true needs clean_attention='causal'"),
        (
            lambda: load_recipe("tri-mode-published", self_mode="diffusion", self_prompts="x"),
            "use masking='all', not 'exact'",
        ),
        (
            lambda: load_recipe("tri-mode-published", self_mode="diffusion", self_prompts="x", masking="all"),
            "it needs objective='joint' and teacher=FOLDER",
        ),
        (lambda: load_recipe("tri-mode-published", self_mode="flow"), "self_mode='flow' is unknown"),
        (lambda: load_recipe("tri-mode-published", self_every=3), "self_every=3 needs self_prompts"),
    ],
)
def test_bad_values_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_teachers_and_absolute_positions_are_named(
    tokenizer_and_model: Path, converted: Path, stories: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is no AR model any more"):
        unmask.adapt(tokenizer_and_model, stories, "tri-mode-published", tmp_path / "a", teacher=str(converted), **RUN)
    tokenizer = unmask.load(tokenizer_and_model).tokenizer
    tokenizer.add_tokens(["zebra"])
    tiny_llama(torch.float32, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has another vocabulary"):
        unmask.adapt(
            tmp_path / "other", stories, "tri-mode-published", tmp_path / "b", teacher=str(tokenizer_and_model), **RUN
        )
    lm = unmask.load(tokenizer_and_model)
    gpt = unmask.DiffusionLM(tiny_model(SUPPORTED["gpt2"]()), lm.tokenizer)
    with pytest.raises(ValueError, match="random_offset=true moves a document's positions"):
        unmask.adapt(gpt, stories, "tri-mode-published", tmp_path / "c", random_offset=True, **RUN)
