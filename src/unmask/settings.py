"""Settings: everything that defines a run besides the model and the data; recipes; what resolves from a size.

A recipe is a TOML file of settings. It knows no model and no text: numbers in, numbers out.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any

from unmask.core.distances import DISTANCES
from unmask.core.network import DiffusionConfig

LORA_TRAINABLE = ("embeddings", "norms", "head")


@dataclass(frozen=True)
class Settings:
    """Everything that defines a run besides the model and the data. None means: resolved from the model.

    attention "ar" trains the next-token loss instead. noise_level: "block" | "sequence" shares t. masking: "exact"
    draws ceil(t n) of n tokens, "bernoulli" each with probability t, "all" is t = 1. objective: "diffusion", "joint"
    (next-token loss + alpha * diffusion) or "distill" (a drafter: gated adapters of drafter_rank on a frozen base,
    pulled by `distance` to the base's next-token law; mask_per_place gives each place in the block a mask embedding of
    its own). teacher: "parent" or a folder, a frozen AR model whose law the "joint" clean rows keep to, instead of the
    text's tokens; with a `distance` other than "ce" the noisy rows as well. teacher_top_k: distances on that many
    tokens and a bucket for the rest (None: 64 for vocabularies beyond 65,536, else all). first_block_size: double the
    block from there to block_size over the run. random_offset: the block grid of each document begins at a random
    place of a block, as drafts do. half_life: of position-dependent masking, inf is uniform. min_noise_level: t is
    drawn from (it, 1]. loss_normaliser: divide by the predictable "tokens" (unbiased) or the "masked" ones of the
    micro-batch (DiffuLLaMA's code). anneal_steps, anneal_redraw: see `annealing`; 1 is full attention at
    once. self_prompts, self_tokens, self_temperature: of --data self, the file whose documents' beginnings the model
    continues, how many tokens it writes (max_tokens unless given), and how. self_mode: "ar", or "diffusion", where
    masks are what was still masked at a random step of the text's own making (OPDLM). self_every: write anew with the
    current weights every so many steps. predict_padding: one document a row, filled up with end tokens that are
    corrupted and predicted (DiffuLLaMA's fine-tuning), instead of packed rows. lora_rank: train adapters of this rank
    instead of the weights, scaled by lora_alpha / lora_rank (lora_alpha None: twice the rank); lora_trainable: what is
    trained beside them; lora_merge=false saves a PEFT adapter, not a model. batch_size counts rows of max_length in
    one optimiser step, micro_batch_size those that run at once on one device. eval_every: steps, by default a tenth of
    the run. num_masks: that many masks of the same rows in every step (pairs of masks with complementary); two streams
    without shift run over the clean tokens once for all of them. max_nonfinite_steps: so many steps whose loss or
    gradient is not finite are skipped, one more ends the run.
    """

    recipe: str
    # what is learnt
    attention: str = "two_stream"
    clean_attention: str | None = None
    block_size: int | None = None
    shift: bool = False
    noisy_attention: str = "bidirectional"
    objective: str = "diffusion"
    alpha: float = 0.3
    distance: str = "ce"
    teacher: str | None = None
    teacher_top_k: int | None = None
    drafter_rank: int = 32
    drafter_scale: float = 64.0
    drafter_targets: str = "all"
    mask_per_place: bool = False
    first_block_size: int | None = None
    random_offset: bool = False
    noise_level: str = "block"
    masking: str = "exact"
    complementary: bool = False
    num_masks: int = 1
    min_noise_level: float = 0.0
    loss_normaliser: str = "tokens"
    anneal_steps: int = 1
    anneal_redraw: bool = False
    half_life: float | None = None
    mask_token: str | None = None
    mask_init: str | None = None
    # data
    max_length: int | None = None
    text_column: str = "text"
    split: str = "train"
    skip_invalid: bool = False
    end_token: str | None = None
    predict_padding: bool = False
    self_prompts: str | None = None
    self_tokens: int | None = None
    self_temperature: float = 0.0
    self_mode: str = "ar"
    self_every: int | None = None
    eval_data: str | None = None
    eval_documents: int = 32
    eval_samples: int = 2
    # adapters
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_trainable: str = "embeddings,norms,head"
    lora_merge: bool = True
    # optimisation
    max_tokens: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    min_learning_rate_ratio: float | None = None
    warmup_ratio: float = 0.02
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    max_nonfinite_steps: int = 0
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile_layers: bool = False
    seed: int = 0
    # bookkeeping
    log_every: int = 10
    eval_every: int | None = None
    save_every: int = 500
    keep_checkpoints: int = 2
    report_to: str | None = None

    def __post_init__(self) -> None:
        choices = {
            "attention": ("two_stream", "block_causal", "bidirectional", "ar"),
            "noise_level": ("block", "sequence"),
            "noisy_attention": ("bidirectional", "causal"),
            "objective": ("diffusion", "joint", "distill"),
            "distance": DISTANCES,
            "masking": ("exact", "bernoulli", "all"),
            "loss_normaliser": ("tokens", "masked"),
            "self_mode": ("ar", "diffusion"),
            "mixed_precision": ("no", "bf16", "fp16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(allowed)}")
        for name in ("block_size", "max_length", "batch_size", "micro_batch_size", "log_every", "eval_every",
                     "save_every", "keep_checkpoints", "eval_samples", "max_tokens", "learning_rate", "half_life",
                     "max_grad_norm", "anneal_steps", "lora_rank", "lora_alpha", "drafter_rank", "drafter_scale",
                     "first_block_size", "self_tokens", "self_every", "teacher_top_k", "num_masks"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive")
        _check_floats(self)
        for name in self.trainable:
            if name not in LORA_TRAINABLE:
                raise ValueError(
                    f"lora_trainable={self.lora_trainable!r}: {name!r} is unknown: use any of "
                    f"{', '.join(LORA_TRAINABLE)}, with commas between"
                )
        if not 0 <= self.min_noise_level < 1:
            raise ValueError(f"min_noise_level={self.min_noise_level} must lie in [0, 1)")
        if self.min_noise_level > 0 and self.masking == "exact":
            raise ValueError(
                f"min_noise_level={self.min_noise_level} makes the weights n / k of masking='exact' wrong, for few "
                "masks are drawn too seldom: use masking='bernoulli', or min_noise_level=0"
            )
        if self.loss_normaliser == "masked" and self.objective == "joint":
            raise ValueError(
                "loss_normaliser='masked' would divide the AR term of objective='joint' by masked tokens, which it "
                "does not speak of: use loss_normaliser='tokens'"
            )
        if self.anneal_steps > 1 and self.attention != "bidirectional":
            raise ValueError(
                f"anneal_steps={self.anneal_steps} opens a causal mask towards attention='bidirectional', "
                f"not towards {self.attention!r}: use anneal_steps=1"
            )
        if not self.alpha >= 0:
            raise ValueError(f"alpha={self.alpha} must not be negative")
        if self.objective != "diffusion" and (self.attention, self.clean_attention) != ("two_stream", "causal"):
            raise ValueError(
                f"objective={self.objective!r} needs attention='two_stream' with clean_attention='causal', "
                f"not {self.attention!r} with {self.clean_attention!r}"
            )
        if self.mask_per_place and self.objective != "distill":
            raise ValueError(f"mask_per_place=true needs objective='distill', not {self.objective!r}")
        for name in ("gradient_checkpointing", "compile_layers"):  # layers on top of a cache are each another function
            if self.objective == "distill" and getattr(self, name):
                raise ValueError(f"{name}=true does not go with objective='distill': leave it out")
        if self.teacher is not None and self.objective != "joint":
            raise ValueError(
                f"teacher={self.teacher!r} needs objective='joint', not {self.objective!r} "
                "(a drafter's teacher is its base)"
            )
        if self.objective == "joint" and self.distance == "reach":
            raise ValueError(f"distance={self.distance!r} needs objective='distill', not 'joint'")
        if self.random_offset and self.clean_attention != "causal":
            raise ValueError(
                f"random_offset=true needs clean_attention='causal', not {self.clean_attention!r}: only drafts begin "
                "anywhere in a block"
            )
        if self.self_mode == "diffusion" and (self.masking, self.random_offset) != ("all", False):
            raise ValueError(
                f"self_mode='diffusion' brings masks of its own: use masking='all', not {self.masking!r}, and no "
                "random_offset"
            )
        if self.self_mode == "diffusion" and self.objective != "distill" and self.teacher is None:
            raise ValueError(
                f"self_mode='diffusion' teaches another model's law, not the student's own words: with objective="
                f"{self.objective!r} it needs objective='joint' and teacher=FOLDER, the AR model"
            )
        if self.self_every is not None and self.self_prompts is None:
            raise ValueError(f"self_every={self.self_every} needs --data self with self_prompts=FILE")
        if self.complementary and self.masking != "exact":
            raise ValueError("complementary=true needs masking='exact'")
        if self.half_life is not None and math.isfinite(self.half_life) and self.masking != "exact":
            raise ValueError(f"half_life={self.half_life} needs masking='exact': Bernoulli masks have no order")

    @property
    def trainable(self) -> tuple[str, ...]:
        """The parts named in lora_trainable."""
        return tuple(name.strip() for name in self.lora_trainable.split(",") if name.strip())


def _check_floats(settings: Settings) -> None:
    """Every float finite (but half_life, where infinity is uniform masking) and in its range."""
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if isinstance(value, float) and not math.isfinite(value) and (entry.name, value) != ("half_life", math.inf):
            raise ValueError(f"{entry.name}={value} must be finite")
    for name, high in (("beta1", 1.0), ("beta2", 1.0)):
        if not 0 <= getattr(settings, name) < high:
            raise ValueError(f"{name}={getattr(settings, name)} must lie in [0, 1)")
    for name in ("warmup_ratio", "min_learning_rate_ratio"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must lie in [0, 1]")
    for name in ("weight_decay", "alpha", "self_temperature", "eval_documents", "max_nonfinite_steps"):
        if not getattr(settings, name) >= 0:
            raise ValueError(f"{name}={getattr(settings, name)} must not be negative")


def recipe_names() -> list[str]:
    """Names of the recipes shipped with the package."""
    folder = resources.files("unmask") / "recipes"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def recipe_summary(name: str) -> str:
    """A recipe's first line: what it reproduces."""
    text = (resources.files("unmask") / "recipes" / f"{name}.toml").read_text()
    return text.splitlines()[0].removeprefix("# ")


def load_recipe(name: str, **overrides: Any) -> Settings:
    """Settings of a recipe with overrides; unknown names and values of the wrong type are errors."""
    if name not in recipe_names():
        raise ValueError(f"recipe {name!r} is unknown: use one of {', '.join(recipe_names())}")
    text = (resources.files("unmask") / "recipes" / f"{name}.toml").read_text()
    values = tomllib.loads(text) | overrides
    known = {f.name: str(f.type) for f in fields(Settings)}
    for key, value in values.items():
        if key not in known or key == "recipe":
            raise ValueError(f"setting {key!r} is unknown: use one of {', '.join(k for k in known if k != 'recipe')}")
        values[key] = _typed(key, value, known[key])
    return Settings(recipe=name, **values)


def _typed(name: str, value: Any, annotation: str) -> Any:
    kinds = [kind.strip() for kind in annotation.split("|")]
    if value is None and "None" in kinds:
        return None
    if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    for kind, python in (("bool", bool), ("int", int), ("float", float), ("str", str)):
        if kind in kinds and type(value) is python:
            return value
    raise ValueError(f"setting {name}={value!r} has the wrong type: it takes {annotation}")


def under_current_names(stored: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older run.json under their names of today; ValueError for a run that used a retired one."""
    if stored.get("anneal_form", "entries") != "entries":
        raise ValueError(
            f"anneal_form={stored['anneal_form']!r} is not offered now: finish this run with the version that began it"
        )
    renamed = {"draws": "num_masks"}
    return {renamed.get(name, name): value for name, value in stored.items() if name != "anneal_form"}


_SMALL, _LARGE = 100e6, 1e9
_RULE: dict[str, tuple[float, float]] = {
    # measured on parents below 100M parameters; published for parents from 1B
    "learning_rate": (4e-3, 1e-5),
    "joint_learning_rate": (1e-3, 1e-5),  # faster, and the AR model wanders off (results/tri-mode)
    "min_learning_rate_ratio": (0.02, 0.3),
    "batch_tokens": (1024, 2**21),
    "max_length": (512, 4096),
    "block_size": (8, 16),
    "micro_batch_tokens": (16384, 4096),
}


FULL_VOCABULARY, TEACHER_TOP_K = 65_536, 64
"""Up to so many tokens a teacher's whole law is compared, beyond them its likeliest ones."""


def resolve(
    settings: Settings, num_parameters: int, context_length: int | None, vocabulary: int | None = None
) -> Settings:
    """Fill what depends on the parent's size.

    Up to 100M parameters our measured values, from 1B the published ones, between them interpolated in the
    logarithms of size and value: value = small * (large / small)^s, s = log(N / 100M) / log(10) in [0, 1].
    half_life, infinite for small parents and 0.1 for large ones, is 0.1 / s.
    """
    s = min(1.0, max(0.0, math.log(num_parameters / _SMALL) / math.log(_LARGE / _SMALL)))
    ruled = {name: small * (large / small) ** s for name, (small, large) in _RULE.items()}
    block = settings.block_size or 2 ** round(math.log2(ruled["block_size"]))
    if settings.attention == "bidirectional" and settings.noise_level == "sequence":
        block = settings.block_size or 1  # no blocks: any length will do
    length = settings.max_length
    if length is None:
        length = 2 ** round(math.log2(ruled["max_length"]))
        if context_length is not None:
            length = min(length, context_length)
        length = length // block * block
    elif length % block:
        raise ValueError(f"max_length={length} is no multiple of block_size={block}")
    if context_length is not None and length > context_length:
        raise ValueError(f"max_length={length} exceeds the model's context of {context_length}")
    if length < block:
        raise ValueError(f"block_size={block} exceeds max_length={length}")
    first = settings.first_block_size
    if first is not None and block not in (first << n for n in range(block.bit_length())):
        raise ValueError(f"first_block_size={first} does not double to block_size={block}")
    batch = settings.batch_size or max(1, round(ruled["batch_tokens"] / length))
    rate = "joint_learning_rate" if settings.objective == "joint" else "learning_rate"
    top_k = settings.teacher_top_k
    if top_k is None and vocabulary is not None and vocabulary > FULL_VOCABULARY:
        top_k = TEACHER_TOP_K
    return replace(
        settings,
        teacher_top_k=top_k,
        block_size=block,
        max_length=length,
        batch_size=batch,
        micro_batch_size=min(settings.micro_batch_size or max(1, round(ruled["micro_batch_tokens"] / length)), batch),
        half_life=(0.1 / s if s else math.inf) if settings.half_life is None else settings.half_life,
        learning_rate=settings.learning_rate or float(f"{ruled[rate]:.2g}"),
        min_learning_rate_ratio=(
            ruled["min_learning_rate_ratio"]
            if settings.min_learning_rate_ratio is None
            else settings.min_learning_rate_ratio
        ),
    )


RULE_TEXT = (
    "learning rate, batch and length: our measured values up to 100M parameters, the paper's from 1B, "
    "log-interpolated between"
)


def diffusion_config(settings: Settings, mask_token_id: int, version: str) -> DiffusionConfig:
    """What a checkpoint trained with these (resolved) settings says of itself."""
    return DiffusionConfig(
        mask_token_id=mask_token_id,
        attention=settings.attention,
        clean_attention=settings.clean_attention,
        block_size=None if settings.attention == "bidirectional" else settings.block_size,
        shift=settings.shift,
        recipe=settings.recipe,
        version=version,
        noisy_attention=settings.noisy_attention,
        mask_rows=settings.block_size if settings.mask_per_place and settings.block_size else 1,
    )


def at_step(settings: Settings, step: int, total_steps: int) -> Settings:
    """The settings of one step: with first_block_size, blocks double in equal parts of the run."""
    if settings.first_block_size is None:
        return settings
    assert settings.block_size is not None
    stages = (settings.block_size // settings.first_block_size).bit_length()
    stage = min(stages - 1, step * stages // max(1, total_steps))
    return replace(settings, block_size=settings.first_block_size << stage, first_block_size=None)
