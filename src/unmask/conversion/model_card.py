"""README.md of a trained model: what it is, what the run measured, how it was made, and how to load it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache

from unmask import plots
from unmask.conversion.job import Job, Parent
from unmask.data.readers import Records
from unmask.model import DiffusionLM
from unmask.plain_json import to_json
from unmask.recipe import load_recipe, recipe_names
from unmask.settings import shown

_TAGS = ["diffusion-language-model", "block-diffusion", "unmask"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KEPT_OF_BASE = ("license", "license_name", "license_link", "language")


class Made(NamedTuple):
    """What a run made. figures: nats per token of held-out text, by name. samples: lines of text of both models.

    tokens, seconds: of training, seconds of its last session. rows: of metrics.jsonl. texts: of samples.jsonl. curve:
    file of the folder that shows the rows, None without one.
    """

    figures: dict[str, float]
    samples: str
    tokens: int
    seconds: float
    rows: Sequence[dict[str, Any]]
    texts: Sequence[dict[str, Any]] = ()
    curve: str | None = None


def model_card(job: Job, parent: Parent, lm: DiffusionLM, made: Made) -> str:
    """The text of the card."""
    parts = [
        _front_matter(job, parent.name, lm),
        _summary(lm),
        _result(made),
        _fenced(made.samples, "After the beginning of a held-out text, greedily:") if made.samples else "",
        _curve(made),
        _how(job, parent, lm, made),
        '```python\nimport unmask\n\nlm = unmask.load("this folder")\nprint(lm.generate("...").texts[0])\n```\n',
    ]
    return "\n\n".join(part for part in parts if part)


def _front_matter(job: Job, parent: str, lm: DiffusionLM) -> str:
    """What the hub reads. Texts are quoted as in JSON, which YAML reads: no name can break out of its line."""
    fields: dict[str, Any] = {"library_name": "transformers"}
    # A pipeline decodes from left to right: a drafter cannot, and others lost that unless their clean half is causal.
    if lm.drafter is None and (lm.diffusion is None or lm.diffusion.serves_ar):
        fields["pipeline_tag"] = "text-generation"
    if _on_the_hub(parent):
        fields["base_model"] = parent
    fields |= {name: value for name, value in front_matter_of(parent).items() if name in _KEPT_OF_BASE}
    datasets = [name for name in _hub_ids(job) if _on_the_hub(name)]
    if datasets:
        fields["datasets"] = datasets
    if lm.diffusion is not None:
        fields["tags"] = _TAGS
    return "---\n" + "".join(_yaml(name, value) for name, value in fields.items()) + "---"


def _hub_ids(job: Job) -> list[str]:
    """Names of the data that are no files here."""
    if job.parts is None:
        return [] if job.stream is not None else list(job.sources)
    return [part.name for part in job.parts if len(job.parts) > 1 and isinstance(part.sources[0], Records)]


def _yaml(name: str, value: Any) -> str:
    if isinstance(value, list):
        return f"{name}:\n" + "".join(f"- {to_json(str(item))}\n" for item in value)
    return f"{name}: {to_json(str(value))}\n"


def _on_the_hub(name: str) -> bool:
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def front_matter_of(name: str) -> dict[str, Any]:
    """The plain fields of the front matter of a model's card, in its folder or the hub's cache; empty without any."""
    found: Any = Path(name) / "README.md"
    if not found.is_file():
        found = try_to_load_from_cache(name, "README.md") if _on_the_hub(name) else None
    if not isinstance(found, str | Path):
        return {}
    match = re.match(r"---\r?\n(.*?)\r?\n---", Path(found).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    fields: dict[str, Any] = {}
    name_of_list = None
    for line in match[1].splitlines() if match else []:
        item, pair = re.match(r"\s*-\s+(.+)", line), re.match(r"(\w+):\s*(.*)", line)
        if item and name_of_list is not None:
            fields.setdefault(name_of_list, []).append(item[1].strip().strip("\"'"))
        elif pair:
            name_of_list = None if pair[2] else pair[1]
            if pair[2]:
                fields[pair[1]] = pair[2].strip().strip("\"'")
    return fields


def _summary(lm: DiffusionLM) -> str:
    if lm.diffusion is None:
        return "Next-token training of an autoregressive language model."
    if lm.drafter is not None:
        loading = "It holds the drafter alone; the `unmask` library loads it together with its base."
    else:
        loading = (
            "`AutoModelForCausalLM` loads the weights; the `unmask` library decodes it as a diffusion model, or "
            "transformers does, with the folder that `unmask export --format hf` writes."
        )
    return f"A masked diffusion language model made from an autoregressive one. {loading}"


def _result(made: Made) -> str:
    """Parent and result on held-out text."""
    if not made.figures:
        return ""
    rows = [("held-out text", "nats per token")]
    rows += [(name, f"{value:.4f}") for name, value in made.figures.items()]
    return _table(rows)


def draw_curve(folder: Path, rows: Sequence[dict[str, Any]], parent: Parent, parent_nll: float | None) -> str | None:
    """Draw a run into its folder; the figure's name, None for fewer than three losses and without matplotlib."""
    settings = parent.settings
    in_nats = settings.objective != "distill" or settings.distance == "ce"
    title = f"{Path(parent.name).name}, recipe {settings.recipe}"
    if sum(row.get("loss") is not None for row in rows) < 3:
        return None
    try:
        png, _svg = plots.training_curve(rows, folder / "training", parent_nll=parent_nll, in_nats=in_nats, title=title)
    except ValueError:  # matplotlib is an extra: the table does without
        return None
    return png.name


def _curve(made: Made) -> str:
    """The loss along training, at most a dozen rows, and what the model wrote meanwhile."""
    losses = [row for row in made.rows if row.get("loss") is not None]
    chosen = losses[:: max(1, -(-len(losses) // 12))]
    if losses and chosen[-1] is not losses[-1]:
        chosen.append(losses[-1])
    names = [name for name in ("nll", "nelbo") if any(name in row for row in made.rows)]
    evaluated = {name: {row["step"]: row[name] for row in made.rows if name in row} for name in names}
    rows = [("step", "tokens", "loss, nats per token", *(f"held-out {name}" for name in names))]
    for row in chosen:
        of_step = [evaluated[name].get(row["step"]) for name in names]
        figures = ["" if value is None else f"{value:.4f}" for value in of_step]
        rows.append((f"{row['step']:,}", f"{row['tokens']:,}", f"{row['loss']:.4f}", *figures))
    text = f"![Loss and held-out figures over training tokens]({made.curve})\n\n" if made.curve else ""
    text += _table(rows) if losses else ""
    if made.texts:
        lines = "\n".join(f"step {row['step']}: {row['text']!r}" for row in made.texts)
        text += "\n\n" + _fenced(lines, "What it wrote while it learnt:")
    return text


def _how(job: Job, parent: Parent, lm: DiffusionLM, made: Made) -> str:
    """The run in a table, and its command."""
    settings, config = parent.settings, lm.diffusion
    rows: list[tuple[str, Any]] = [("how it was made", ""), ("parent", parent.name), ("data", ", ".join(job.sources))]
    if config is not None:
        clean = f", clean half {config.clean_attention}" if config.clean_attention else ""
        rows += [
            ("attention", config.attention + clean),
            ("block size", config.block_size or "whole canvas"),
            ("token shift", "yes" if config.shift else "no"),
            ("mask token", f"{lm.tokenizer.mask_token} (id {config.mask_token_id})"),
        ]
    of_parent = "" if parent.dtype in (None, _name(lm.model.dtype)) else f" (the parent's are {parent.dtype})"
    rows += [
        ("weights", _name(lm.model.dtype) + of_parent),
        ("recipe", settings.recipe),
        ("training tokens", f"{made.tokens:,}"),
        ("learning rate", settings.learning_rate),
        ("rows per step x length", f"{settings.batch_size} x {settings.max_length}"),
        ("device", _device(lm.network.device)),
        ("time of the last session", f"{made.seconds / 60:.1f} min"),
    ]
    return _table(rows) + "\n\n" + _fenced(command_of(job, parent.name), "")


def command_of(job: Job, parent: str) -> str:
    """The command that repeats the run."""
    settings = asdict(job.settings)
    known = settings.pop("recipe") in recipe_names()
    plain = asdict(load_recipe(job.settings.recipe if known else "tri-mode"))
    chosen = {name: value for name, value in settings.items() if value != plain[name]}
    data = [word for name in job.sources for word in ("--data", name)]
    words = ["unmask", "adapt", parent, *data, "--output", str(job.folder.path), "--recipe"]
    words.append(job.settings.recipe if known else "tri-mode")
    for name, value in chosen.items():
        words.append(f"{name}={value if isinstance(value, str) else 'none' if value is None else shown(value)}")
    return shlex.join(words)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(rows: Sequence[tuple[Any, ...]]) -> str:
    """A table in Markdown, whatever its cells hold."""
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(value: Any) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _fenced(text: str, heading: str) -> str:
    """A block that no text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return (f"{heading}\n\n" if heading else "") + f"{fence}\n{text}\n{fence}"
