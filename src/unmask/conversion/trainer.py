"""Training with a training script of one's own: what the Trainer of transformers, or TRL's, needs to convert a model.

The Trainer runs the model once a micro-batch, and the model's forward then is a step of `adapt`: masks, passes and loss
of `training.step`. So everything that wraps a model (DDP, FSDP, PEFT, autocast) sees one ordinary forward.
"""

from __future__ import annotations

import functools
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from unmask import hf
from unmask.conversion.continuing import check_mask_stays, recipe_settings
from unmask.conversion.job import check_base, check_rank, name_of
from unmask.conversion.learner import mask_token_of, new_drafter
from unmask.core.attention import PADDING, Layout
from unmask.core.batch import Batch
from unmask.core.network import DiffusionConfig, Network
from unmask.core.objectives import LossOutput
from unmask.loading import load
from unmask.model import DiffusionLM
from unmask.resolve import Resolved, diffusion_config, resolve
from unmask.settings import GROUPS, SettingsKeywords
from unmask.training.step import step_loss
from unmask.training.teacher import freeze, load_teacher
from unmask.version import __version__

IGNORED = -100
"""The label of a token that is not learnt."""

OF_THE_TRAINER = ("DataSettings", "RolloutSettings", "LoraSettings", "OptimiserSettings", "EvaluationSettings",
                  "RunSettings")  # fmt: skip
"""Groups of settings that are the Trainer's own matter, but for `seed` and `max_length`."""


COLUMNS = ("completion_mask", "assistant_masks", "seq_lengths")
"""Columns of an example that say which of its tokens are learnt, and how long its documents are."""


@dataclass
class ForTrainer:
    """A model that becomes a diffusion model in another's training loop.

    lm: the converted model, to decode with and to save. model: what the Trainer gets, the stock model or a drafter
    alone. settings: of the recipe. teacher: of the joint objective.
    collator: `data_collator`, examples -> a batch. loss: `compute_loss_func`. step: micro-batches that were learnt so
    far, of which noise is a function: set it when a training is resumed.
    """

    lm: DiffusionLM
    settings: Resolved
    teacher: Network | None
    collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
    loss: Callable[..., Tensor]
    step: int = 0
    model: Any = None

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, with the mask token: the Trainer's `processing_class`."""
        return self.lm.tokenizer


def for_trainer(
    model: str | Path | DiffusionLM | Any,
    tokenizer: Any = None,
    recipe: str | None = None,
    **settings: Unpack[SettingsKeywords],
) -> ForTrainer:
    """Prepare a model for the Trainer of transformers or TRL: mask token, collator and loss of a recipe.

    model: folder, hub id, `DiffusionLM`, or a model of transformers with its `tokenizer`. recipe, settings: as in
    `adapt`; those of data, optimiser, evaluation and the run are the Trainer's, but for `seed` and `max_length`. The
    Trainer trains and saves a drafter alone, without its frozen base. Blocks that grow need `adapt`. Raises ValueError
    for what cannot work.
    """
    lm, overrides = _model(model, tokenizer), {**settings}
    ours = {"seed", "max_length"}
    for group in GROUPS:
        for name in (entry.name for entry in fields(group)):
            if name in overrides and name not in ours and group.__name__ in OF_THE_TRAINER:
                raise ValueError(f"{name}={overrides[name]!r} is the Trainer's: set it in its arguments or its data")
    chosen = recipe_settings(lm, recipe, overrides)
    if chosen.attention == "ar":
        raise ValueError(f"recipe {chosen.recipe!r} trains no diffusion model: the Trainer's own loss does that")
    if chosen.first_block_size is not None:
        raise ValueError(f"first_block_size={chosen.first_block_size} follows the steps of a run: use unmask.adapt")
    name = name_of(lm)
    check_base(lm, chosen, name)
    check_mask_stays(lm, chosen, name)
    if chosen.random_offset and not hf.sees_position_differences(lm.model):
        raise ValueError(f"random_offset=true needs rotary positions, which {type(lm.model).__name__} lacks")
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    resolved = resolve(chosen, lm.model.num_parameters(), lm.network.context_length, vocabulary)
    check_rank(lm, chosen)
    other = None if chosen.teacher in (None, "parent") else load_teacher(lm, resolved)
    adapted = _drafted(lm, resolved, name) if chosen.objective == "distill" else _converted(lm, resolved)
    assert adapted.diffusion is not None
    teacher = None if chosen.teacher is None else freeze(other, lm, adapted.diffusion.mask_token_id, resolved)
    hf.without_dropout(lm.model)
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else next(iter(adapted.end_token_ids), 0)
    collator = functools.partial(collate, pad=pad, max_length=resolved.max_length)
    parts = ForTrainer(adapted, resolved, teacher, collator, loss)
    if adapted.drafter is None:
        parts.model = lm.model
        _step_as_forward(parts)
    else:
        parts.model = DrafterStep(parts)
    return parts


def _model(model: Any, tokenizer: Any) -> DiffusionLM:
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ValueError(f"model {str(model)!r} is a name, which brings its tokenizer: leave tokenizer out")
        return load(model, dtype=torch.float32)
    if isinstance(model, DiffusionLM):
        return model
    if tokenizer is None:
        raise ValueError(f"a {type(model).__name__} needs its tokenizer: for_trainer(model, tokenizer, ...)")
    if getattr(model, "peft_config", None) is not None:
        raise ValueError("give the model before adapters are added, and peft_config to the Trainer")
    hf.probe(model)
    return DiffusionLM(model, tokenizer, hf.read_diffusion(model))


def _converted(lm: DiffusionLM, settings: Resolved) -> DiffusionLM:
    config = diffusion_config(settings, mask_token_of(lm, settings), __version__)
    hf.write_diffusion(lm.model, config)
    return DiffusionLM(lm.model, lm.tokenizer, config)


def _drafted(lm: DiffusionLM, settings: Resolved, name: str) -> DiffusionLM:
    """The model, frozen, with a new drafter."""
    base = hf.Base.of(name, lm.model)
    drafter, config = new_drafter(lm, settings)
    lm.model.requires_grad_(False)
    return DiffusionLM(lm.model, lm.tokenizer, config, drafter=drafter, base=base)


def collate(examples: Sequence[Mapping[str, Any]], *, pad: int, max_length: int) -> dict[str, Tensor]:
    """Rows of the model: examples of token ids, cut to max_length and filled up with `pad`.

    An example has `input_ids`, and may have `labels` (-100 is not learnt), `completion_mask` or `assistant_masks`
    (TRL's; 1 is learnt), and `seq_lengths` or `position_ids`, where it holds several documents. Returns input_ids,
    attention_mask, position_ids, loss_mask and labels, each (rows, longest): labels are the tokens that can be
    learnt, whose number the Trainer divides a step's loss by.
    """
    rows = [_row(example, max_length) for example in examples]
    longest = max(len(ids) for ids, _, _ in rows)
    shape = (len(rows), longest)
    out = {
        "input_ids": torch.full(shape, pad),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "loss_mask": torch.zeros(shape, dtype=torch.bool),
        "labels": torch.full(shape, IGNORED),
    }
    for i, (ids, position, learnt) in enumerate(rows):
        piece = (i, slice(0, len(ids)))
        out["input_ids"][piece], out["position_ids"][piece], out["loss_mask"][piece] = ids, position, learnt
        out["attention_mask"][piece] = 1
        out["labels"][piece] = ids.masked_fill(~learnt | (position == 0), IGNORED)
    return out


def _row(example: Mapping[str, Any], max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, positions and which tokens are learnt of an example."""
    if "input_ids" not in example:
        raise ValueError(
            f"an example has {', '.join(sorted(example)) or 'no columns'} and no input_ids: tokenise the data set first"
        )
    ids = torch.as_tensor(example["input_ids"], dtype=torch.long)[:max_length]
    if not len(ids):
        raise ValueError("an example has no tokens: leave it out of the data set")
    position = torch.arange(len(ids))
    if example.get("seq_lengths") is not None:
        lengths = [int(n) for n in example["seq_lengths"]]
        position = torch.cat([torch.arange(n) for n in lengths])[: len(ids)]
    elif example.get("position_ids") is not None:
        position = torch.as_tensor(example["position_ids"], dtype=torch.long)[:max_length]
    learnt = torch.ones(len(ids), dtype=torch.bool)
    for column in ("completion_mask", "assistant_masks"):
        if example.get(column) is not None:
            learnt &= torch.as_tensor(example[column])[:max_length].bool()
    if example.get("labels") is not None:
        learnt &= torch.as_tensor(example["labels"])[:max_length] != IGNORED
    return ids, position, learnt


def loss(outputs: Mapping[str, Tensor], labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
    """Nats per token that can be learnt, of a micro-batch as a part of its optimiser step: `compute_loss_func`.

    num_items_in_batch: such tokens of the whole step, as the Trainer counts them; None for those of this batch.
    """
    del labels  # they are there to be counted
    if "loss_sum" not in outputs:
        raise ValueError("this batch is not of our collator: give the Trainer data_collator=parts.collator too")
    count = outputs["count"] if num_items_in_batch is None else num_items_in_batch
    return outputs["loss_sum"] / torch.as_tensor(count, device=outputs["loss_sum"].device).clamp(min=1)


def step_of(
    network: Network, settings: Resolved, config: DiffusionConfig, batch: Batch, step: int, teacher: Network | None
) -> LossOutput:
    """The loss of this rank's rows of a micro-batch that all ranks share."""
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    size = len(batch.x0)
    settings = replace(settings, batch_size=size * ranks)
    return step_loss(network, settings, config, batch, step, rank * size + torch.arange(size), teacher)


_EVALUATING = 2**40
"""The first step of the noise of evaluations, which is a function of the batch: the same in each of them."""


def _step_as_forward(parts: ForTrainer) -> None:
    """Give the model a forward that is a step where it gets a batch of `collate`, and what it was otherwise."""
    model = parts.lm.model
    plain = getattr(model.forward, "plain", model.forward)
    network = parts.lm._network(plain)

    @functools.wraps(plain)
    def forward(*arguments: Any, loss_mask: Tensor | None = None, **options: Any) -> Any:
        if (
            loss_mask is None or options.get("labels") is not None
        ):  # TRL has figures of the next token from a second one
            return plain(*arguments, **options)
        batch = _batch(options["input_ids"], options["position_ids"], options["attention_mask"], loss_mask)
        return _next_step(parts, network, batch, model.training)

    # The Trainer drops columns of the data that the forward does not name.
    columns = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in COLUMNS]
    own = inspect.signature(plain)
    parameters = sorted([*own.parameters.values(), *columns], key=lambda parameter: parameter.kind)
    forward.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    forward.plain = plain  # type: ignore[attr-defined]
    model.forward = forward


def _next_step(parts: ForTrainer, network: Network, batch: Batch, training: bool) -> dict[str, Tensor]:
    """The loss of a micro-batch, which is counted if it is learnt."""
    assert parts.lm.diffusion is not None
    if training:
        hf.take_checkpointing_over(parts.lm.model)  # that of the Trainer's option
    step = parts.step if training else _EVALUATING + zlib.crc32(batch.x0.numpy().tobytes())
    parts.step += training
    found = step_of(network, parts.settings, parts.lm.diffusion, batch, step, parts.teacher)
    return {"loss_sum": found.sum, "count": found.count.to(found.sum.device)}


class DrafterStep(torch.nn.Module):
    """A drafter alone as a model whose forward is a step: its base is no submodule, so nothing trains or saves it."""

    def __init__(self, parts: ForTrainer) -> None:
        super().__init__()
        self.drafter, self._parts = parts.lm.drafter, parts

    def activation_checkpointing_enable(self, **_how: Any) -> None:
        """What the Trainer calls for its option: the layers of the base run again in the backward pass."""
        hf.checkpoint_layers(self._parts.lm.model)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name until transformers 5.23

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        loss_mask: Tensor,
        labels: Tensor | None = None,
        *,
        completion_mask: Tensor | None = None,
        assistant_masks: Tensor | None = None,
        seq_lengths: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of a batch of `collate`; the other names keep columns that the Trainer would drop."""
        del labels, completion_mask, assistant_masks, seq_lengths
        lm, device = self._parts.lm, next(self.parameters()).device
        if lm.network.device != device:  # where the Trainer has moved this
            lm.to(device)
        return _next_step(
            self._parts, lm.network, _batch(input_ids, position_ids, attention_mask, loss_mask), self.training
        )


def _batch(ids: Tensor, position: Tensor, real: Tensor, learnt: Tensor) -> Batch:
    """The rows of `collate` on the host, where batches lie; a document begins at each position 0."""
    ids, position, real, learnt = (tensor.cpu() for tensor in (ids, position, real, learnt))
    document = ((position == 0).long().cumsum(-1) - 1).masked_fill(real == 0, PADDING)
    layout = Layout.of(torch.where(real == 0, torch.arange(ids.shape[1]), position), document)
    return Batch(ids, layout, None if bool((learnt | (real == 0)).all()) else learnt)
