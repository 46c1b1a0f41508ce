"""Training scripts of the Trainer of transformers and of TRL convert a model as `adapt` does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import unmask
from unmask.conversion.trainer import _batch
from unmask.core.attention import PADDING
from unmask.requirements import is_before
from unmask.training.step import step_loss

SETTINGS = [
    ("efficient-dlm", {}),
    ("tri-mode", {}),
    ("tri-mode-published", {"num_masks": 2}),
    ("bd3lm", {}),
    ("tri-mode-published", {"complementary": True, "random_offset": True}),
    ("diffullama", {"anneal_steps": 9}),
    ("fast-dllm-v2", {}),
    ("drafter", {"drafter_rank": 2}),
    ("drafter", {"drafter_rank": 2, "noise": "uniform", "mask_per_place": False}),
]


NEW, OLD = "activation_checkpointing", "gradient_checkpointing"
AGAIN = NEW if NEW in TrainingArguments.__dataclass_fields__ else OLD
"""The Trainer's option, by its name in this version of transformers."""


@pytest.fixture(scope="module")
def examples(tokenizer_and_model: Path) -> list[dict[str, Any]]:
    ids = AutoTokenizer.from_pretrained(tokenizer_and_model)("Once upon a time there was a little dog. " * 9)[
        "input_ids"
    ]
    lengths = [31, 24, 17, 32, 9, 28, 32, 32]
    rows: list[dict[str, Any]] = [{"input_ids": ids[3 * i : 3 * i + n]} for i, n in enumerate(lengths)]
    rows[1]["labels"] = [-100] * 10 + rows[1]["input_ids"][10:]
    rows[2]["seq_lengths"] = [8, 9]
    rows[3]["completion_mask"] = [0] * 12 + [1] * 20
    return rows


def parts_of(folder: Path, recipe: str | None, **settings: Any) -> Any:
    size = {} if recipe == "diffullama" else {"block_size": 4}
    return unmask.for_trainer(folder, recipe=recipe, max_length=32, **size, **settings)


def arguments(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "max_steps": 3, "report_to": [],
            "learning_rate": 1e-3, "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
            "save_strategy": "no", "dataloader_num_workers": 0} | more  # fmt: skip


@pytest.mark.parametrize(("recipe", "settings"), SETTINGS)
def test_the_loss_of_a_batch_is_that_of_adapt(
    tokenizer_and_model: Path, examples: list[dict[str, Any]], tmp_path: Path, recipe: str, settings: dict[str, Any]
) -> None:
    """The slow twin: `step_loss` on the same rows and key, on a network made anew."""
    parts = parts_of(tokenizer_and_model, recipe, **settings)
    trainer = Trainer(
        parts.model, TrainingArguments(**arguments(tmp_path)), train_dataset=examples,
        data_collator=parts.collator, compute_loss_func=parts.loss,
    )  # fmt: skip
    inputs = parts.collator(examples[:4])
    batch = _batch(*(inputs[name] for name in ("input_ids", "position_ids", "attention_mask", "loss_mask")))
    assert batch.layout.document.tolist()[2] == [0] * 8 + [1] * 9 + [PADDING] * 15
    parts.model.train()
    for step in range(3):
        mine = trainer.compute_loss(parts.model, dict(inputs))
        mine.backward()
        gradient = [p.grad.clone() for p in parts.model.parameters() if p.grad is not None]
        parts.model.zero_grad()
        network = parts.lm._network(None)
        of_batch = replace(parts.settings, batch_size=4)
        theirs = step_loss(network, of_batch, parts.lm.diffusion, batch, step, torch.arange(4), parts.teacher)
        (theirs.sum / theirs.count).backward()
        assert mine.item() == (theirs.sum / theirs.count).item()
        for a, b in zip(gradient, (p.grad for p in parts.model.parameters() if p.grad is not None), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        parts.model.zero_grad()
    assert (inputs["labels"] != -100).sum() == theirs.count
    assert (inputs["labels"][:, 1:] != -100).sum() == theirs.count  # the Trainer may leave out the first


@pytest.mark.skipif(
    is_before(transformers.__version__, "5.2"), reason="the examples' order can be chosen from transformers 5.2 on"
)
def test_a_step_does_not_depend_on_how_often_gradients_are_added_up(
    tokenizer_and_model: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The Trainer divides by the tokens of the whole step: two micro-batches give the mean over their tokens."""
    parts = parts_of(tokenizer_and_model, "tri-mode-published")
    batches = [parts.collator(examples[:4]), parts.collator(examples[4:])]
    total = sum((b["labels"] != -100).sum() for b in batches)
    parts.model.train()
    sums = [parts.model(**{k: v for k, v in b.items() if k != "labels"})["loss_sum"].item() for b in batches]
    parts.step = 0
    trainer = Trainer(
        parts.model, TrainingArguments(**arguments(tmp_path, gradient_accumulation_steps=2, max_steps=1,
                                                   train_sampling_strategy="sequential")),
        train_dataset=examples, data_collator=parts.collator, compute_loss_func=parts.loss,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(sum(sums) / float(total), rel=1e-4)


def test_a_script_of_the_trainer_makes_a_model_that_loads(
    tokenizer_and_model: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tokenizer_and_model)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    parts = unmask.for_trainer(model, tokenizer, recipe="tri-mode", max_length=32, block_size=4)
    before = [p.clone() for p in model.parameters()]
    trainer = Trainer(
        parts.model, TrainingArguments(**arguments(tmp_path / "t", save_strategy="steps", save_steps=3,
                                                   eval_strategy="steps", eval_steps=1)),
        train_dataset=examples, eval_dataset=examples[:4], data_collator=parts.collator,
        compute_loss_func=parts.loss, processing_class=parts.tokenizer,
    )  # fmt: skip
    first = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == first  # the same masks again
    trainer.train()
    assert parts.step == 3
    assert trainer.evaluate()["eval_loss"] != first
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=False))
    lm = unmask.load(tmp_path / "t" / "checkpoint-3")
    assert lm.diffusion == parts.lm.diffusion
    wanted = parts.lm.generate("Once", max_new_tokens=6).texts
    assert lm.generate("Once", max_new_tokens=6).texts == wanted
    parts.lm.save_pretrained(tmp_path / "saved")
    assert unmask.load(tmp_path / "saved").generate("Once", max_new_tokens=6).texts == wanted


def test_a_script_of_the_trainer_makes_a_drafter(
    tokenizer_and_model: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The Trainer trains and saves the drafter alone, and goes on from what it saved."""

    def trained(folder: str, steps: int, resume: Path | None = None) -> Any:
        parts = parts_of(tokenizer_and_model, "drafter", drafter_rank=2)
        before = {name: p.clone() for name, p in parts.lm.model.named_parameters()}
        trainer = Trainer(
            parts.model, TrainingArguments(**arguments(tmp_path / folder, save_strategy="steps", save_steps=1,
                                                       max_steps=2, lr_scheduler_type="constant")),
            train_dataset=examples, eval_dataset=examples[:4], data_collator=parts.collator,
            compute_loss_func=parts.loss, processing_class=parts.tokenizer,
        )  # fmt: skip
        trainer.args.max_steps = steps
        parts.step = 0 if resume is None else 1
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        assert parts.step == steps
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
        assert all(torch.equal(p, before[name]) for name, p in parts.lm.model.named_parameters())
        return parts

    parts = trained("a", 2)
    assert all(p.any() for p in parts.lm.drafter.up.values())
    saved = tmp_path / "a" / "checkpoint-2" / "model.safetensors"
    assert saved.stat().st_size < sum(4 * p.numel() for p in parts.lm.drafter.parameters()) + 10_000
    again = trained("b", 2, tmp_path / "a" / "checkpoint-1")
    for a, b in zip(parts.lm.drafter.parameters(), again.lm.drafter.parameters(), strict=True):
        assert torch.equal(a, b)
    parts.lm.save_pretrained(tmp_path / "saved")
    lm = unmask.load(tmp_path / "saved")
    mine, loaded = (each.generate("Once", max_new_tokens=6) for each in (parts.lm, lm))
    assert loaded.num_forwards == mine.num_forwards
    assert loaded.texts == lm.generate("Once", "ar", max_new_tokens=6).texts
    for folder, says in ((tmp_path / "saved", "is a drafter on a frozen base"), (tmp_path / "blocks", "is converted")):
        if folder.name == "blocks":
            parts_of(tokenizer_and_model, "bd3lm").lm.save_pretrained(folder)
        with pytest.raises(ValueError, match=says):
            unmask.for_trainer(folder, recipe="drafter", max_length=32)


@pytest.mark.parametrize(
    ("recipe", "settings"), [("efficient-dlm", {"complementary": True}), ("drafter", {"drafter_rank": 2})]
)
def test_layers_that_the_trainer_has_run_again_learn_the_same(
    recipe: str, settings: dict[str, Any], tokenizer_and_model: Path, examples: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Also where passes stand on a cache, which the way of transformers takes away."""
    losses = []
    for again in (False, True):
        parts = parts_of(tokenizer_and_model, recipe, **settings)
        trainer = Trainer(
            parts.model, TrainingArguments(**arguments(tmp_path, **{AGAIN: again})), train_dataset=examples,
            data_collator=parts.collator, compute_loss_func=parts.loss, processing_class=parts.tokenizer,
        )  # fmt: skip
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert not any(getattr(module, "gradient_checkpointing", False) for module in parts.lm.model.modules())
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's, of transformers
def test_a_script_of_trl_converts_with_adapters(tokenizer_and_model: Path, tmp_path: Path) -> None:
    trl, datasets, peft = (pytest.importorskip(name) for name in ("trl", "datasets", "peft"))
    parts = parts_of(tokenizer_and_model, "tri-mode-published")
    data = datasets.Dataset.from_list([{"text": "Once upon a time there was a dog."}] * 8)
    trainer = trl.SFTTrainer(
        parts.model, trl.SFTConfig(**arguments(tmp_path / "t"), max_length=32), train_dataset=data,
        data_collator=parts.collator, compute_loss_func=parts.loss, processing_class=parts.tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    assert parts.step == 3
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 3
    assert all(0 < loss < 20 for loss in losses)
    trainer.model.merge_and_unload()
    assert parts.lm.generate("Once", max_new_tokens=6).texts


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rate": 1e-3}, "learning_rate=0.001 is the Trainer's"),
        ({"lora_rank": 4}, "lora_rank=4 is the Trainer's"),
        ({"recipe": "drafter", "drafter_rank": 999}, "drafter_rank=999 exceeds the widest weight"),
        ({"recipe": "ar"}, "trains no diffusion model"),
        ({"recipe": "bd3m"}, "did you mean 'bd3lm'"),
        ({"blok_size": 4}, "did you mean 'block_size'"),
        ({"tokenizer": "x"}, "leave tokenizer out"),
    ],
)
def test_what_is_not_for_the_trainer_is_refused(tokenizer_and_model: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        unmask.for_trainer(tokenizer_and_model, **settings)


def test_examples_that_cannot_be_rows_are_refused(tokenizer_and_model: Path) -> None:
    parts = parts_of(tokenizer_and_model, "bd3lm")
    with pytest.raises(ValueError, match="has text and no input_ids: tokenise"):
        parts.collator([{"text": "Once"}])
    with pytest.raises(ValueError, match="no tokens"):
        parts.collator([{"input_ids": []}])
    with pytest.raises(ValueError, match="not of our collator"):
        parts.loss({"logits": torch.zeros(1)}, None)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        unmask.for_trainer(parts.model)
