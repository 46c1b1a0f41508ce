"""`adapt`: from a causal LM and text to a converted checkpoint, and what a run leaves in its folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from unmask import hf
from unmask.core.drafter import Drafter, DrafterConfig
from unmask.core.finite import check_weights
from unmask.core.network import DiffusionConfig
from unmask.data.documents import Corpus, HubStream, find_files, load_corpus, local_files
from unmask.evaluation import likelihood
from unmask.hf import lora
from unmask.loading import load
from unmask.model import DiffusionLM
from unmask.plain_json import to_json
from unmask.progress import progress
from unmask.recipe import check_data_settings, load_recipe, under_current_names
from unmask.resolve import RULE_TEXT, Resolved, diffusion_config, resolve
from unmask.run_folder import claim, ordinary_permissions, releases_folders, write_text, writing
from unmask.settings import TABLE, CorruptionSettings, DataSettings, EvaluationSettings, Settings, to_plain, unmet
from unmask.training.batches import packed_documents
from unmask.training.checkpoints import append_metrics, latest_checkpoint, read_state
from unmask.training.loop import Evaluator, Progress, check_machine, in_training, train
from unmask.training.ranks import join
from unmask.training.rollouts import rewritten_text, roll_out
from unmask.training.teacher import freeze, load_teacher
from unmask.version import __version__

IN_MEMORY = "a model in memory"


@releases_folders
def adapt(
    model: str | Path | DiffusionLM,
    data: str | Path | Sequence[str | Path],
    recipe: str | None = None,
    output_dir: str | Path = "runs/adapted",
    *,
    resume: bool = False,
    show_progress: bool = True,
    trust_remote_code: bool = False,
    **settings: Any,
) -> DiffusionLM:
    """Turn a causal LM into what `recipe` says, by training it on `data`, and save it to `output_dir`.

    recipe: by default efficient-dlm; a converted model goes on as what it is (recipe, attention, shift, block size) but
    for what is set here, and a recipe sets all of it. model: folder, hub id or a loaded model (trained in place).
    data: .txt, .jsonl or .parquet files, folders of them, one hub id, or "self" (with self_prompts): text that the
    model itself writes. settings: any of the recipe's, overriding it. resume: go on from the newest checkpoint of the
    same run; a finished run is loaded and returned, or extended by a larger max_tokens. trust_remote_code: run Python
    code that the model's folder brings. Returns the adapted model, in eval mode.
    """
    kept = {} if recipe is not None else _kept(model)
    asked = load_recipe(recipe or kept.pop("recipe", "efficient-dlm"), kept, **settings)
    output_dir = Path(output_dir)
    sources = [data] if isinstance(data, str | Path) else list(data)
    if not sources:
        raise ValueError("data is empty: give at least one file, folder or hub id")
    if asked.lora_rank is not None:
        lora.require_peft()
    own = [str(source) for source in sources] == ["self"]
    if own != (asked.self_prompts is not None) or (own and not (asked.self_tokens or asked.max_tokens)):
        raise ValueError(
            f"data {[str(source) for source in sources]} with self_prompts={asked.self_prompts!r}: text of the "
            "model's own needs --data self alone, self_prompts=FILE for its beginnings, and --max-tokens or self_tokens"
        )
    # Before anything slow.
    files = local_files([asked.self_prompts], "self_prompts") if own and asked.self_prompts else find_files(sources)
    held_out_files = local_files([asked.eval_data], "eval_data") if asked.eval_data is not None else None
    check_data_settings(settings, [*(files or []), *(held_out_files or [])], from_hub=files is None)
    previous = _read_run(output_dir, resume)

    ranks = join()
    show_progress = show_progress and ranks.is_main_process
    device = ranks.device if ranks.num_processes > 1 else None
    if isinstance(model, DiffusionLM):
        lm = model
    else:
        lm = load(model, dtype=torch.float32, device=device, trust_remote_code=trust_remote_code)
    if device is not None:
        lm.model.to(device)
    name = str(getattr(lm.model.config, "_name_or_path", "") or IN_MEMORY)
    if asked.lora_rank is not None and not asked.lora_merge and name == IN_MEMORY:
        raise ValueError("lora_merge=false: an adapter needs the name of its base, and this model is in memory only")
    parent = {"name": name, "class": type(lm.model).__name__, "fingerprint": hf.fingerprint(lm.model)}
    if lm.drafter is not None:
        raise ValueError(f"model {name!r} is a drafter on a frozen base: adapt the base itself")
    _check_mask_stays(lm, asked, name)
    if asked.objective == "distill" and lm.diffusion is not None:
        raise ValueError(f"model {name!r} is converted already: a drafter needs an untouched AR model as its base")
    if asked.random_offset and not hf.sees_position_differences(lm.model):
        raise ValueError(
            f"random_offset=true moves a document's positions, which {type(lm.model).__name__} sees as such: it needs "
            "a model with rotary positions"
        )
    teacher = load_teacher(lm, asked.teacher, trust_remote_code=trust_remote_code)
    if asked.block_size is None and lm.diffusion is not None:
        asked = replace(asked, block_size=lm.diffusion.block_size)
    vocabulary = lm.model.get_input_embeddings().weight.shape[0]
    chosen = resolve(asked, sum(p.numel() for p in lm.model.parameters()), lm.network.context_length, vocabulary)
    check_machine(chosen, ranks.num_processes, ranks.device)
    end_token_id = _end_token_id(lm, chosen)

    source: Any
    if files is None:
        source = HubStream(
            str(sources[0]), lm.tokenizer, end_token_id=end_token_id, text_column=chosen.text_column, split=chosen.split
        )
    else:
        source = _tokenise(lm, chosen, files, end_token_id, show_progress)
    of_student = own and (chosen.self_mode == "diffusion" or chosen.self_every is not None)
    if own and not of_student:
        source = _roll_out(lm, chosen, source, output_dir.parent, parent["fingerprint"], end_token_id, show_progress)
    run: dict[str, Any] = {
        "parent": parent,
        "settings": to_plain(chosen),
        "data": {
            "sources": [str(s) for s in sources],
            "fingerprint": source.fingerprint,
            "held_out": _num_held_out(chosen, held_out_files, source),
        },
    }
    _check_same_run(output_dir, previous, run)
    longer = previous is not None and _goes_on(previous, chosen.max_tokens)
    if previous is not None and previous.get("finished") and not longer:
        return load(output_dir, trust_remote_code=trust_remote_code)
    if longer and latest_checkpoint(output_dir) is None:
        raise ValueError(f"output folder {str(output_dir)!r} holds no checkpoint from which max_tokens could be raised")

    held_out = _held_out(lm, chosen, held_out_files, source, end_token_id)
    if isinstance(held_out, int):
        source, tail = source.split(held_out) if held_out else (source, None)
        held_out = [] if tail is None else _as_documents(tail, end_token_id)
    if chosen.predict_padding:
        source = _filled_up(source, chosen, end_token_id)
    training_data = packed_documents(chosen, source)
    total_steps = training_data.num_steps

    config = lm.diffusion
    drafter = None
    if chosen.objective == "distill":
        assert chosen.block_size is not None
        mask_rows = chosen.block_size if chosen.mask_per_place else 1
        shape = DrafterConfig(chosen.drafter_rank, chosen.drafter_scale, chosen.drafter_targets, mask_rows)
        drafter = hf.add_drafter(lm.model, lm.tokenizer, shape, token=chosen.mask_token)
        config = diffusion_config(chosen, drafter.mask_token_id, __version__)
    elif chosen.attention != "ar":
        mask_token_id = (
            config.mask_token_id
            if config is not None
            else hf.add_mask_token(lm.model, lm.tokenizer, token=chosen.mask_token, like=chosen.mask_init)
        )
        config = diffusion_config(chosen, mask_token_id, __version__)
    changed = _changes(lm.diffusion, config)
    if changed and show_progress:
        print(f"note: this run changes what {name!r} was converted to: {changed}", file=sys.stderr)
    hf.without_dropout(lm.model)
    tuner = None
    if chosen.lora_rank is not None:
        alpha = 2.0 * chosen.lora_rank if chosen.lora_alpha is None else chosen.lora_alpha
        tuner = lora.add_lora(lm.model, chosen.lora_rank, alpha, chosen.trainable, chosen.seed)
    frozen = freeze(teacher or lm, lm, config.mask_token_id) if chosen.teacher is not None and config else None
    base = None if drafter is None else hf.Base(parent["name"], parent["fingerprint"])
    adapted = DiffusionLM(lm.model, lm.tokenizer, config, drafter=drafter, base=base)
    learning: Any = lm.model if drafter is None else drafter
    trained = sum(p.numel() for p in learning.parameters() if p.requires_grad)

    def write(step: int) -> Corpus:
        author = f"{parent['fingerprint']} after {step} steps"
        return _roll_out(adapted, chosen, source, output_dir / "rollouts", author, end_token_id, False, step)

    if of_student:
        training_data = rewritten_text(training_data, chosen, lm.model, write)

    ranks.wait_for_everyone()  # all have read the folder before one writes to it
    versions = {"unmask": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    run |= {"versions": versions, "rule": RULE_TEXT, "trained_parameters": trained, "finished": False}
    if ranks.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        claim(output_dir)
        if _read_run(output_dir, resume) != previous:
            raise ValueError(f"output folder {str(output_dir)!r} was changed by another run meanwhile: start again")
        _write_run(output_dir, run)
        if longer:
            print(f"note: the run goes on to max_tokens={chosen.max_tokens}; its learning rates and other schedules "
                  "are stretched over the new total, so that it differs from one run of that length",
                  file=sys.stderr)  # fmt: skip
    if show_progress:
        blocks = ("block_size",) if chosen.attention in ("two_stream", "block_causal") else ()
        shown = (*blocks, "max_length", "batch_size", "learning_rate", "min_learning_rate_ratio", "half_life")
        print(f"{RULE_TEXT}: " + ", ".join(f"{name}={run['settings'][name]}" for name in shown), file=sys.stderr)

        if chosen.anneal_steps > total_steps:
            print(f"note: anneal_steps={chosen.anneal_steps} is more than the {total_steps} steps of this run, which "
                  "ends before attention is fully open", file=sys.stderr)  # fmt: skip

    newest = latest_checkpoint(output_dir) if resume else None
    start = read_state(newest).step if newest is not None else 0
    with progress("train", total_steps, start=start, show=show_progress) as advance:
        done = start

        def report(p: Progress) -> None:
            nonlocal done
            figures = "".join(f"  {k} {v:.4g}" for k, v in p.evaluation.items() if k in ("nelbo", "nll"))
            note = (f"step {p.step}/{p.total_steps}  loss {p.loss:.4f}{figures}  lr {p.learning_rate:.2e}  "
                    f"{p.tokens_per_second:,.0f} tokens/s")  # fmt: skip
            advance(p.step - done, note)
            done = p.step

        evaluate = _evaluator(adapted, chosen, held_out) if held_out else None
        with _trained_alone(lm.model, drafter), in_training(lm.model, chosen):
            state = train(
                lm.model,
                adapted._network,
                chosen,
                config if chosen.attention != "ar" else None,
                training_data,
                output_dir,
                resume=resume,
                evaluate=evaluate,
                report=report,
                replicate=_replicate(lm, chosen),
                teacher=frozen,
            )
    if tuner is not None:
        if ranks.is_main_process and not chosen.lora_merge:
            hf.write_diffusion(lm.model, config)
            lora.save_adapter(output_dir, tuner, name)
            lm.tokenizer.save_pretrained(output_dir)
        lora.merge(tuner)
    if ranks.is_main_process:
        check_weights(adapted.model, f"the model after {state.step} steps at learning rate {chosen.learning_rate}")
        figures = evaluate(lm.model) if evaluate is not None else {}
        if figures:
            append_metrics(output_dir, {"step": state.step, "tokens": state.tokens, **figures})
        with writing(output_dir):
            if tuner is None or chosen.lora_merge:
                adapted.save_pretrained(output_dir)
            (output_dir / "README.md").write_text(_model_card(name, adapted, chosen, state.tokens, figures))
            ordinary_permissions(output_dir)
        _write_run(output_dir, run | {"finished": True, "tokens": state.tokens, "evaluation": figures})
    ranks.wait_for_everyone()
    lm.model.config._name_or_path = str(output_dir)
    return adapted


def _replicate(lm: DiffusionLM, settings: Settings) -> Callable[[Any], Any] | None:
    """How a small model is copied for the threads of a CPU; None where a copy would not be the model.

    Gated adapters hook into the one model and a teacher's head has one too, DiffuLLaMA's parity options speak of
    whole micro-batches, and a large model's operations fill all threads by themselves.
    """
    small = sum(p.numel() for p in lm.model.parameters()) < 20e6
    hooked = settings.objective == "distill" or settings.lora_rank is not None or settings.teacher is not None
    plain = not hooked and not settings.gradient_checkpointing and not settings.compile_layers
    split = settings.loss_normaliser == "tokens" and not settings.anneal_redraw
    return hf.replicate if small and plain and split and settings.mixed_precision == "no" else None


_KEPT = ("recipe", "attention", "clean_attention", "noisy_attention", "shift", "block_size")
"""What a converted model goes on as, unless it is set."""


def _kept(model: str | Path | DiffusionLM) -> dict[str, Any]:
    """The settings of `_KEPT` that a converted model was made with, read before it is loaded; none of an AR model."""
    if isinstance(model, DiffusionLM):
        raw: Any = None if model.diffusion is None else asdict(model.diffusion)
    else:
        raw = hf.read_config(model).get("diffusion")
    if not isinstance(raw, dict):  # what it is instead, loading will say
        return {}
    kept = {name: raw[name] for name in _KEPT if name in raw and (raw[name] is not None or name == "clean_attention")}
    return kept | ({"anneal_steps": 1} if kept.get("attention") == "bidirectional" else {})  # it is open already


def _check_mask_stays(lm: DiffusionLM, settings: CorruptionSettings, name: str) -> None:
    """A converted model has its mask token for good."""
    if lm.diffusion is None:
        return
    if settings.mask_token is not None and settings.mask_token != lm.tokenizer.mask_token:
        raise ValueError(
            f"mask_token={settings.mask_token!r}: model {name!r} is converted already, with "
            f"{lm.tokenizer.mask_token!r}, which cannot be changed: leave mask_token out, or adapt its AR parent"
        )
    if settings.mask_init is not None:
        raise ValueError(
            f"mask_init={settings.mask_init!r}: model {name!r} is converted already, and its mask token has learnt: "
            "leave mask_init out, or adapt its AR parent"
        )


def _changes(before: DiffusionConfig | None, after: DiffusionConfig | None) -> str:
    """What a run changes of what a converted model is, as "shift true -> false"; empty where nothing."""
    if before is None or after is None:
        return ""
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in _KEPT if name != "recipe"}
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in pairs.items() if old != new)


def _tokenise(
    lm: DiffusionLM, settings: DataSettings, files: list[Path], end_token_id: int | None, show_progress: bool
) -> Corpus:
    with progress("tokenise", sum(file.stat().st_size for file in files), show=show_progress) as advance:
        return load_corpus(
            files,
            lm.tokenizer,
            end_token_id=end_token_id,
            text_column=settings.text_column,
            skip_invalid=settings.skip_invalid,
            max_length=settings.max_length,
            progress=advance,
        )


def _roll_out(
    lm: DiffusionLM,
    settings: Resolved,
    prompts: Corpus,
    folder: Path,
    author: str,
    end_token_id: int | None,
    show_progress: bool,
    step: int = 0,
) -> Corpus:
    """Text of the model's own after the beginnings of `prompts`, as much as the steps until the next one need."""
    asked = settings.self_tokens or settings.max_tokens
    assert asked is not None
    if settings.self_every is not None:
        asked = min(asked, settings.self_every * settings.batch_size * settings.max_length)
    # The main process writes the file, the others read it.
    with join().main_process_first(), progress("roll out", asked, show=show_progress) as advance:
        return roll_out(
            lm.network, prompts, folder, author=author, num_tokens=asked,
            max_length=settings.max_length, temperature=settings.self_temperature,
            end_token_ids=() if end_token_id is None else (end_token_id,), seed=settings.seed,
            first=step * settings.batch_size, student=lm.diffusion if settings.self_mode == "diffusion" else None,
            progress=advance,
        )  # fmt: skip


@contextmanager
def _trained_alone(model: Any, drafter: Drafter | None) -> Iterator[None]:
    """Within the context the drafter is a part of the model, the only one that learns."""
    if drafter is None:
        yield
        return
    learning = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    model.add_module("drafter", drafter)
    try:
        yield
    finally:
        del model.drafter
        for parameter in learning:
            parameter.requires_grad_(True)


def _end_token_id(lm: DiffusionLM, settings: DataSettings) -> int | None:
    if settings.end_token is not None:
        ids = lm.tokenizer.get_vocab().get(settings.end_token)
        if ids is None:
            raise ValueError(f"end_token {settings.end_token!r} is no token of this vocabulary")
        lm.model.generation_config.eos_token_id = ids
        return int(ids)
    return next(iter(hf.end_token_ids(lm.model, lm.tokenizer)), None)


def _held_out(
    lm: DiffusionLM, settings: Settings, files: list[Path] | None, source: Any, end_token_id: int | None
) -> list[likelihood.Document] | int:
    """Documents to evaluate on, or how many to hold out of the end of the training corpus.

    Without eval_data, the last 1% of the documents, at most eval_documents; none from a stream.
    """
    if files is not None:
        corpus = load_corpus(
            files,
            lm.tokenizer,
            end_token_id=end_token_id,
            text_column=settings.text_column,
            skip_invalid=settings.skip_invalid,
            max_length=lm.network.context_length,
            max_documents=settings.eval_documents,
        )
        return _as_documents(corpus, end_token_id)
    return _num_held_out(settings, files, source)


def _num_held_out(settings: EvaluationSettings, files: list[Path] | None, source: Any) -> int:
    """Documents that are cut off the end of the training data to evaluate on; a part of what the run trains on."""
    if files is not None or isinstance(source, HubStream):
        return 0
    return min(settings.eval_documents, len(source) // 100)


def _as_documents(corpus: Corpus, end_token_id: int | None) -> list[likelihood.Document]:
    """Held-out documents as the likelihood wants them; their bytes are not asked for.

    Texts without their end token. Supervised examples whole, since where an answer ends is part of it.
    """
    documents = []
    for i in range(len(corpus)):
        ids, loss_mask = corpus.document(i)
        if loss_mask is None and end_token_id is not None:
            ids = ids[:-1]
        tokens = torch.from_numpy(ids.astype("int64"))
        learnt = None if loss_mask is None else torch.from_numpy(loss_mask)
        documents.append(likelihood.Document(tokens, torch.zeros_like(tokens), learnt))
    return documents


def _without_masks(document: likelihood.Document, mask_token_id: int) -> likelihood.Document:
    """The document with a reused mask token, which has probability 0, given where it stands: as training has it."""
    natural = document.ids == mask_token_id
    if not bool(natural.any()):
        return document
    return replace(document, loss_mask=~natural if document.loss_mask is None else document.loss_mask & ~natural)


def _filled_up(source: Any, settings: Resolved, end_token_id: int | None) -> Corpus:
    if not isinstance(source, Corpus) or end_token_id is None:
        lacks = "an end token, which this model lacks" if end_token_id is None else "files, not a streamed data set"
        raise ValueError(f"predict_padding=true needs {lacks}")
    longest = int(np.diff(source.offsets).max())
    if longest > settings.max_length:
        raise ValueError(
            f"predict_padding=true puts each document in a row of its own, and one of {longest} tokens exceeds "
            f"max_length={settings.max_length}: raise max_length"
        )
    return source.filled_up(settings.max_length, end_token_id)


def _evaluator(lm: DiffusionLM, settings: Settings, documents: list[likelihood.Document]) -> Evaluator:
    """Held-out figures, nats per predicted token, always with the same masks."""

    if lm.diffusion is not None:
        documents = [_without_masks(document, lm.diffusion.mask_token_id) for document in documents]

    def evaluate(_model: Any) -> dict[str, float]:
        context = lm.network.context_length
        if lm.diffusion is None:
            summary = likelihood.summarise(likelihood.nll(lm.network, documents, context_length=context))
            return {"nll": summary.nats_per_token}
        outputs = likelihood.nelbo(
            lm.network, lm.diffusion, documents, num_samples=settings.eval_samples, context_length=context
        )
        summary = likelihood.summarise(outputs)
        figures = {"nelbo": summary.nats_per_token, "nelbo_standard_error": summary.standard_error or 0.0}
        if settings.objective == "joint":  # the AR model is meant to stay what it was
            exact = likelihood.summarise(likelihood.nll(lm.network, documents, context_length=context))
            figures["nll"] = exact.nats_per_token
        return figures

    return evaluate


# --- the run's folder


def _read_run(output_dir: Path, resume: bool) -> dict[str, Any] | None:
    """run.json of an earlier run here; a folder that holds anything else is left alone."""
    path = output_dir / "run.json"
    if path.is_file():
        if not resume:
            raise ValueError(
                f"output folder {str(output_dir)!r} already holds a run: continue it with --resume, or choose another"
            )
        try:
            run: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no JSON ({error}): choose another output folder") from error
        return run | {"settings": under_current_names(run["settings"])}
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"output folder {str(output_dir)!r} holds something else: choose an empty or new one")
    return None


_FREE = ("log_every", "eval_every", "save_every", "keep_checkpoints", "report_to", "micro_batch_size",
         "max_nonfinite_steps", "eval_data", "eval_documents", "eval_samples")  # fmt: skip
"""Settings that may change from one part of a run to the next."""


def _check_same_run(output_dir: Path, previous: dict[str, Any] | None, run: dict[str, Any]) -> None:
    if previous is None:
        return
    cut = "number of documents held out of training (eval_documents, eval_data)"
    before = previous["settings"] | {"model": previous["parent"], "data": previous["data"]["fingerprint"]}
    now = run["settings"] | {"model": run["parent"], "data": run["data"]["fingerprint"]}
    before[cut], now[cut] = previous["data"].get("held_out"), run["data"]["held_out"]
    for key in now:
        if key == "max_tokens" and _goes_on(previous, now[key]):
            continue
        if key == "model" and before[key].get("fingerprint") == now[key]["fingerprint"]:
            continue  # the same weights, wherever they lie
        if key in TABLE and unmet(key, run["settings"]) is not None:
            continue  # neither run reads it
        if key not in _FREE and before.get(key) != now[key]:
            raise ValueError(
                f"output folder {str(output_dir)!r} holds a different run: its {key} is {before.get(key)!r}, "
                f"not {now[key]!r}; choose another folder"
            )


def _goes_on(previous: dict[str, Any], max_tokens: int | None) -> bool:
    """Whether max_tokens asks for more than the run in this folder, which was to stop at its own or has."""
    before = previous["settings"].get("max_tokens") or previous.get("tokens")
    return max_tokens is not None and before is not None and max_tokens > before


def _write_run(output_dir: Path, run: dict[str, Any]) -> None:
    write_text(output_dir / "run.json", to_json(run, indent=2) + "\n")


def _model_card(parent: str, lm: DiffusionLM, settings: Settings, tokens: int, figures: dict[str, float]) -> str:
    config = lm.diffusion
    if lm.drafter is not None:
        loading = "It holds the drafter alone; the `unmask` library loads it together with its base."
    else:
        loading = "`AutoModelForCausalLM` loads the weights; decoding as a diffusion model needs the `unmask` library."
    if config is None:
        what = "Next-token training of an autoregressive language model."
        rows: list[tuple[str, Any]] = []
    else:
        what = f"A masked diffusion language model made from an autoregressive one. {loading}"
        rows = [
            (
                "attention",
                config.attention + (f", clean half {config.clean_attention}" if config.clean_attention else ""),
            ),
            ("block size", config.block_size or "whole canvas"),
            ("token shift", "yes" if config.shift else "no"),
            ("mask token", f"`{lm.tokenizer.mask_token}` (id {config.mask_token_id})"),
        ]
    rows += [
        ("recipe", settings.recipe),
        ("training tokens", f"{tokens:,}"),
        ("learning rate", settings.learning_rate),
        ("rows per step x length", f"{settings.batch_size} x {settings.max_length}"),
        *((f"held-out {name} (nats per token)", f"{value:.4f}") for name, value in figures.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    tags = "tags:\n- diffusion-language-model\n- block-diffusion\n- unmask\n" if config is not None else ""
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\nbase_model: {parent}\n{tags}---\n\n"
        f"{what}\n\n| | |\n|---|---|\n| parent | {parent} |\n{table}\n\n"
        '```python\nimport unmask\n\nlm = unmask.load("this folder")\nprint(lm.generate("...").texts[0])\n```\n'
    )
