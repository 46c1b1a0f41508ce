"""Convert the parent into the model that learns, train it, and save it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from unmask import hf
from unmask.conversion.continuing import changes
from unmask.conversion.job import Job, Parent
from unmask.conversion.model_card import Made, draw_curve, model_card
from unmask.conversion.reports import reports, texts_of
from unmask.conversion.text import Data, write_own_text, writes_while_learning
from unmask.conversion.trackers import Track
from unmask.core.drafter import HALF, Drafter, DrafterConfig
from unmask.core.finite import check_weights
from unmask.core.network import DiffusionConfig, Network
from unmask.data.corpus import Corpus
from unmask.evaluation.beside import beginnings, write
from unmask.evaluation.held_out import Spread, evaluator, held_out_nll
from unmask.goals import too_few
from unmask.hf import lora
from unmask.model import DiffusionLM
from unmask.progress import note, progress, say
from unmask.resolve import RULE_TEXT, Resolved, diffusion_config, uses_tf32
from unmask.run_folder import ordinary_permissions, writing
from unmask.training import ranks
from unmask.training.batches import TrainingData
from unmask.training.checkpoints import TrainState, latest_checkpoint, read_state
from unmask.training.console import announce, reporter
from unmask.training.loop import Evaluator, in_training, train
from unmask.training.ranks import agreeing, capability_of, join, main_alone
from unmask.training.rollouts import rewritten_text
from unmask.training.sharded import assemble, by_main, is_sharded, spread
from unmask.training.structures import of_main
from unmask.training.teacher import freeze
from unmask.training.threads import replication
from unmask.version import __version__


@dataclass(frozen=True)
class Learner:
    """The converted model. All of it learns, or adapters do (`tuner`, the model of PEFT), or its drafter alone.

    teacher: the frozen network of the joint objective. record: what the conversion adds to run.json.
    """

    lm: DiffusionLM
    tuner: Any
    teacher: hf.HFNetwork | None
    record: dict[str, Any]


def convert(job: Job, parent: Parent) -> Learner:
    """Add the mask token and adapters, or a drafter, and the `DiffusionConfig` of what the model becomes."""
    lm, settings = parent.lm, parent.settings
    config, drafter = lm.diffusion, None
    if settings.objective == "distill":
        drafter, config = new_drafter(lm, settings)
    elif settings.attention != "ar":
        config = diffusion_config(settings, mask_token_of(lm, settings), __version__)
    changed = changes(lm.diffusion, config)
    if changed and job.show_progress:
        note(f"this run changes what {parent.name!r} was converted to: {changed}")
    hf.without_dropout(lm.model)
    tuner = _add_lora(lm, settings)
    teacher = None
    if settings.teacher is not None and config is not None:
        teacher = freeze(parent.teacher, lm, config.mask_token_id, settings)
    base = None if drafter is None else of_main(lambda: hf.Base.of(parent.name, lm.model))
    adapted = DiffusionLM(lm.model, lm.tokenizer, config, drafter=drafter, base=base)
    learning = lm.model if drafter is None else drafter
    return Learner(adapted, tuner, teacher, _record(learning))


def mask_token_of(lm: DiffusionLM, settings: Resolved) -> int:
    """The mask token of the model, which gets one if it has none yet."""
    if lm.diffusion is not None:
        return lm.diffusion.mask_token_id
    noise = ("mask init", settings.seed) if settings.mask_init_noise else None
    return hf.add_mask_token(lm.model, lm.tokenizer, token=settings.mask_token, like=settings.mask_init, noise=noise)


def drafter_shape(settings: Resolved) -> DrafterConfig:
    """The size of a run's drafter, and how many embeddings its masks have."""
    of_mask = settings.block_size if settings.mask_per_place else 1
    mask_rows = of_mask if settings.noise == "mask" else 0
    return DrafterConfig(settings.drafter_rank, settings.drafter_scale, settings.drafter_targets, mask_rows)


def new_drafter(lm: DiffusionLM, settings: Resolved) -> tuple[Drafter, DiffusionConfig]:
    """A drafter that has learnt nothing yet, hooked on the model, and what the model becomes with it."""
    parts = of_main(lambda: hf.gateable(lm.model))
    drafter = hf.add_drafter(lm.model, lm.tokenizer, drafter_shape(settings), token=settings.mask_token, parts=parts)
    if lm.model.dtype in HALF:
        drafter.float()
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    return drafter, diffusion_config(settings, drafter.mask_token_id, __version__, vocabulary)


def _add_lora(lm: DiffusionLM, settings: Resolved) -> Any:
    if settings.lora_rank is None:
        return None
    alpha = 2.0 * settings.lora_rank if settings.lora_alpha is None else settings.lora_alpha
    return lora.add_lora(lm.model, settings.lora_rank, alpha, settings.trainable, settings.seed)


def _record(learning: torch.nn.Module) -> dict[str, Any]:
    return {
        "versions": {"unmask": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "rule": RULE_TEXT,
        "trained_parameters": sum(p.numel() for p in learning.parameters() if p.requires_grad),
        "finished": False,
    }


def begins_at(job: Job) -> int:
    """The step of the newest checkpoint that the run goes on from, or 0; the main process alone reads it whole."""

    def step() -> int:
        newest = latest_checkpoint(job.folder.path)
        return 0 if newest is None else read_state(newest).step

    return ranks.by_main(step) if job.resume else 0


def learn(job: Job, parent: Parent, learner: Learner, data: Data, start: int, track: Track) -> TrainState:
    """Train from the newest checkpoint, that of step `start`, or from the beginning; the state after the last step."""
    lm, settings, num_steps = learner.lm, parent.settings, data.rows.num_steps
    if job.show_progress:
        say(f"{parent.name}: {type(lm.model).__name__}, recipe {settings.recipe}, on {join().device}, "
            f"weights {_dtypes(parent, lm)}, {_passes(lm, settings)}")  # fmt: skip
        announce(settings, num_steps)
        num_parameters = sum(p.numel() for p in parent.lm.model.parameters())
        few = too_few(settings.recipe, num_parameters, data.rows.num_tokens) if parent.lm.diffusion is None else None
        if few is not None:
            note(few)
    if start and job.show_progress:
        say(f"resuming from step {start}")
    with (
        progress("train", num_steps, start=start, show=job.show_progress) as advance,
        in_training(lm.model, settings, lm.drafter),
    ):
        return train(
            lm.model,
            functools.partial(_training_network, lm, settings),
            settings,
            lm.diffusion if settings.attention != "ar" else None,
            _rows(job, parent, learner, data),
            job.folder,
            resume=job.resume,
            evaluate=_evaluator(learner, settings, data),
            report=reports(job, lm, data, reporter(advance, start), track, start),
            replicate=replication(lm.model, settings),
            teacher=learner.teacher,
        )


def _dtypes(parent: Parent, lm: DiffusionLM) -> str:
    """In words, the type in which the weights are, were and will be."""
    settings, here = parent.settings, str(lm.model.dtype).removeprefix("torch.")
    words = [here, *([f"{parent.dtype} in the parent"] if parent.dtype else [])]
    if lm.model.dtype in HALF and settings.objective != "distill":
        kept = "adapters in float32" if settings.lora_rank is not None else "no float32 copy, small updates are lost"
        words.append(kept)
    return ", ".join([*words, *([f"saved as {settings.save_dtype}"] if settings.save_dtype else [])])


def _passes(lm: DiffusionLM, settings: Resolved) -> str:
    """In words, how passes of training compute."""
    precision, device = settings.mixed_precision, join().device
    words = "passes in the type of the weights" if precision == "no" else f"passes in {precision}"
    if uses_tf32(settings, device.type, capability_of(device)):
        words += ", what stays float32 in TF32"
    own = lm.model.config.get_text_config()._attn_implementation
    return f"{words}, attention by {settings.attn_implementation or own}"


def _training_network(lm: DiffusionLM, settings: Resolved, forward: Any) -> Network:
    """The network that learns: with predict_mask one whose mask token has a logit like any other."""
    if settings.predict_mask:
        return hf.as_network(lm.model, None, forward=forward)
    return lm._network(forward)


def _rows(job: Job, parent: Parent, learner: Learner, data: Data) -> TrainingData:
    """The rows of the text, or of text that the model writes during training."""
    if not writes_while_learning(parent.settings):
        return data.rows

    def write(step: int) -> Corpus:
        assert isinstance(data.text, Corpus)  # checked by `plan`
        author = f"{parent.fingerprint} after {step} steps"
        return write_own_text(learner.lm, parent, data.text, job.folder.path / "rollouts", author, False, step)

    return rewritten_text(data.rows, parent.settings, learner.lm.model, write)


def parent_nll(job: Job, parent: Parent, data: Data) -> float | None:
    """Nats per token of the parent in AR mode on the held-out documents, measured once a run; None without them."""
    if job.earlier is not None and "parent_nll" in job.earlier:
        return job.earlier["parent_nll"]
    if not data.held_out:
        return None
    return _nll(parent.lm, data, _reused_mask(parent))


def _reused_mask(parent: Parent) -> int | None:
    """The token of the parent's vocabulary that the run makes its mask token, None for a token of its own.

    The converted model never predicts it, so the parent's figure leaves it out too.
    """
    lm, settings = parent.lm, parent.settings
    if lm.diffusion is not None:
        return lm.diffusion.mask_token_id
    if settings.attention == "ar":
        return None
    shape = drafter_shape(settings) if settings.objective == "distill" else None
    return hf.reused_mask_token(lm.model, lm.tokenizer, settings.mask_token, shape)


def parent_text(job: Job, parent: Parent, data: Data) -> dict[str, Any] | None:
    """The beginning of a held-out document, and what the parent writes after it in AR mode; None without one."""
    if job.earlier is not None and "parent_text" in job.earlier:
        return job.earlier["parent_text"]
    prompts = beginnings([document.ids for document in data.held_out], number=1)
    if not len(prompts):
        return None
    text = by_main(parent.lm.model, lambda: write(parent.lm, prompts, "ar").text)
    return {"ids": prompts[0].tolist(), "text": text}


def _nll(lm: DiffusionLM, data: Data, mask_token_id: int | None) -> float:
    """Nats per token in AR mode on the held-out documents, of which each rank measures its share."""
    network = lm.network
    return held_out_nll(network, mask_token_id, data.held_out, network.context_length, _spread(lm))


def _spread(lm: DiffusionLM) -> Spread:
    return functools.partial(spread, lm.model)


def _samples(lm: DiffusionLM, before: dict[str, Any] | None) -> str:
    """What the parent and this model write, as lines of the model card; empty without a beginning to go on from."""
    if before is None or (lm.diffusion is not None and lm.diffusion.mask_token_id in before["ids"]):
        return ""
    after = by_main(lm.model, lambda: write(lm, torch.tensor([before["ids"]])))
    return (
        f"prompt  {lm.tokenizer.decode(before['ids'])!r}\nparent  {before['text']!r}\n"
        f"this    {after.text!r}\n        ({after.tokens_per_forward:.2f} tokens per forward, mode {lm.default_mode})"
    )


def _compared(learner: Learner, data: Data, figures: dict[str, float], before: float | None) -> dict[str, float]:
    """The parent's NLL and this model's on the held-out documents, and the bound where there is one."""
    if before is None:
        return {}
    after = figures.get("nll")
    if after is None:
        mask = None if learner.lm.diffusion is None else learner.lm.diffusion.mask_token_id
        after = _nll(learner.lm, data, mask)
    compared = {"parent, AR mode": before, "this model, AR mode": after}
    return compared | ({"diffusion mode, bound": figures["nelbo"]} if "nelbo" in figures else {})


def _evaluator(learner: Learner, settings: Resolved, data: Data) -> Evaluator | None:
    if not data.held_out:
        return None
    network = learner.lm.network
    return evaluator(network, learner.lm.diffusion, settings, data.held_out, network.context_length,
                     _spread(learner.lm))  # fmt: skip


def finish(
    job: Job, parent: Parent, learner: Learner, data: Data, state: TrainState, run: dict[str, Any], track: Track
) -> None:
    """Evaluate once more, merge adapters, save the model and its card, and mark the run as finished."""
    lm, settings, folder = learner.lm, parent.settings, job.folder
    if settings.save_dtype is not None and not is_sharded(lm.model):
        lm.to(getattr(torch, settings.save_dtype))  # before figures are taken: they are of what is saved
    with agreeing():
        check_weights(lm.model, f"the model after {state.step} steps at learning rate {settings.learning_rate}")
    evaluate = _evaluator(learner, settings, data)
    figures = {} if evaluate is None else evaluate()
    compared = _compared(learner, data, figures, run["parent_nll"])
    if compared and job.show_progress:
        values = ", ".join(f"{value:.4f} ({name})" for name, value in compared.items())
        say(f"held-out text, nats per token: {values}")
    written = _samples(lm, run["parent_text"])
    if is_sharded(lm.model):
        assemble(lm.model, *([] if lm.drafter is None else [lm.drafter]))
        if settings.save_dtype is not None:
            lm.to(getattr(torch, settings.save_dtype))
    as_adapter = learner.tuner is not None and not settings.lora_merge
    with main_alone() as is_main:
        if is_main and as_adapter:
            hf.write_diffusion(lm.model, lm.diffusion)
            lora.save_adapter(folder.path, learner.tuner, parent.name)
            lm.tokenizer.save_pretrained(folder.path)
    if learner.tuner is not None and hf.quantisation_of(lm.model) is None:
        lora.merge(learner.tuner)
    with main_alone() as is_main:
        if not is_main:
            return
        if figures:
            folder.append({"step": state.step, "tokens": state.tokens, **figures})
            track(state.step, figures)
        with writing(folder.path):
            if not as_adapter:
                lm.save_pretrained(folder.path)
            rows, texts = folder.read_rows(), texts_of(folder).read_rows() if settings.sample_texts else ()
            curve = draw_curve(folder.path, rows, parent, run["parent_nll"])
            made = Made(compared, written, state.tokens, time.perf_counter() - job.began, rows, texts, curve)
            (folder.path / "README.md").write_text(model_card(job, parent, lm, made), encoding="utf-8")
            ordinary_permissions(folder.path)
        folder.write(run | {"finished": True, "tokens": state.tokens, "evaluation": figures})
