"""The table of settings: everything that defines a run besides the model and the data.

A line says of each setting its default, what it is, which values it takes, and what other settings must be for a run
to read it. Groups are dataclasses that `Settings` inherits: names are unique, so that `adapt(**settings)`,
SETTING=VALUE, recipes and run.json are flat, and a function may ask for one group. Imports no torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from unmask.limits import LARGEST, MOST_SAMPLES

# --- how a setting is described


class Need(NamedTuple):
    """What another setting must be. says: what follows its name in a message, such as "='joint'"."""

    says: str
    holds: Callable[[Any], bool]


def above(bound: float) -> Need:
    """The other setting is above this number."""
    return Need(f" above {bound}", lambda value: value is not None and value > bound)


SET = Need("", lambda value: value is not None)
"""The other setting has a value."""

LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "above": ("above", operator.gt), "least": ("at least", operator.ge),
    "most": ("at most", operator.le), "below": ("below", operator.lt),
}  # fmt: skip
"""A limit's name -> its words and what it asks of value and bound."""


def setting(
    default: Any,
    says: str,
    *,
    one_of: tuple[str, ...] = (),
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
    of_size: bool = False,
    either: tuple[dict[str, Any], ...] = (),
    **needs: str | tuple[str, ...] | Need,
) -> Any:
    """A dataclass field with its description.

    says: what it is. one_of: the texts that it may be. above, least, most, below: limits of a number. infinite: it may
    be infinity. of_size: where it is None, the parent's size decides. needs: other settings, which come earlier in the
    table -> a value, several values, or a `Need`; a run reads this setting only if all of them hold, and one of
    `either` where that is given.
    """
    bounds = {"above": above, "least": least, "most": most, "below": below}
    metadata = {
        "says": says,
        "one_of": one_of,
        "limits": {name: bound for name, bound in bounds.items() if bound is not None},
        "infinite": infinite,
        "of_size": of_size,
        "needs": _needs(needs),
        "either": tuple(map(_needs, either)),
    }
    return field(default=default, metadata=metadata)


def _needs(named: dict[str, Any]) -> dict[str, Need]:
    return {name: need if isinstance(need, Need) else _value_in(need) for name, need in named.items()}


def _value_in(values: str | tuple[str, ...]) -> Need:
    *others, last = (values,) if isinstance(values, str) else values
    says = f"={', '.join(map(repr, others))} or {last!r}" if others else f"={last!r}"
    return Need(says, lambda value: value == last or value in others)


DIFFUSION = Need(" other than 'ar'", lambda attention: attention != "ar")
DISTANCES = ("ce", "kl", "tv", "kl+tv", "lk", "reach", "first-error")
LORA_TRAINABLE = ("embeddings", "norms", "head")

# --- the table
# fmt: off


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """What a token sees, and which row predicts it."""

    attention: str = setting(
        "two_stream", "two_stream: noisy blocks after clean tokens; block_causal: after noisy tokens; bidirectional: "
        "the whole row is one canvas; ar: next-token training",
        one_of=("two_stream", "block_causal", "bidirectional", "ar"))
    clean_attention: str | None = setting(
        None, "attention among clean tokens", one_of=("causal", "block_causal"), attention="two_stream")
    noisy_attention: str = setting(
        "bidirectional", "attention inside a noisy block", one_of=("bidirectional", "causal"), attention="two_stream")
    shift: bool = setting(
        False, "row i - 1 predicts token i, as in an AR model, instead of row i", attention=DIFFUSION)
    block_size: int | None = setting(
        None, "tokens of a block, of which max_length is a multiple", above=0, of_size=True)
    anneal_steps: int = setting(
        1, "steps over which causal attention opens to bidirectional; 1 opens it at once", above=0,
        attention="bidirectional")
    anneal_redraw: bool = setting(
        False, "draw which entries are open for each micro-batch instead of each step", attention="bidirectional",
        anneal_steps=above(1))


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """The loss, and whose predictions it follows."""

    objective: str = setting(
        "diffusion", "diffusion; joint: next-token loss + alpha x diffusion; distill: a drafter on the frozen model, "
        "which is its teacher", one_of=("diffusion", "joint", "distill"))
    alpha: float = setting(0.3, "weight of the diffusion term", least=0, objective="joint")
    distance: str = setting(
        "ce", "what noisy rows minimise: ce, the text's cross-entropy, or a distance from the teacher's distribution; "
        "reach and first-error are for drafters", one_of=DISTANCES, objective=("joint", "distill"))
    teacher: str | None = setting(
        None, 'frozen AR model whose distribution the clean rows keep to: "parent" or a folder', objective="joint")
    teacher_top_k: int | None = setting(
        None, "likeliest tokens that a distance compares, the rest in one bucket: 64 for vocabularies above 65,536, "
        "else all", above=0, of_size=True, objective=("joint", "distill"),
        either=({"teacher": SET}, {"distance": DISTANCES[1:]}))
    loss_normaliser: str = setting(
        "tokens", "divide the loss by all predictable tokens (unbiased), or the masked ones of a micro-batch, as "
        "DiffuLLaMA's code does", one_of=("tokens", "masked"), attention=DIFFUSION,
        objective="diffusion")


@dataclass(frozen=True, kw_only=True)
class DrafterSettings:
    """The drafter: gated low-rank adapters that act on noisy rows alone."""

    drafter_rank: int = setting(32, "rank of the adapters", above=0, objective="distill")
    drafter_scale: float = setting(64.0, "the adapters' output is scaled by this / rank", above=0, objective="distill")
    drafter_targets: str = setting(
        "all", "linear maps with an adapter: all, or endings of their names with commas between", objective="distill")
    noise: str = setting(
        "mask", "what draft rows read: mask, an embedding that learns; uniform, random tokens of the vocabulary, as "
        "Uno's do and as engines serve them", one_of=("mask", "uniform"), objective="distill")
    mask_per_place: bool = setting(
        False, "give each place of a block a mask embedding of its own", objective="distill", noise="mask")
    adapt_anchor: bool = setting(
        False, "adapt the row before the drafts too, as engines without a gate for rows need it", objective="distill")


@dataclass(frozen=True, kw_only=True)
class CorruptionSettings:
    """Which tokens are masked in a step, and by what."""

    masking: str = setting(
        "exact", "exact: ceil(t n) of n tokens; bernoulli: each with probability t; all: every token",
        one_of=("exact", "bernoulli", "all"), attention=DIFFUSION)
    noise_level: str = setting(
        "block", "what shares one noise level t: each block, or the whole sequence", one_of=("block", "sequence"),
        attention=DIFFUSION, masking=("exact", "bernoulli"))
    min_noise_level: float = setting(
        0.0, "t is drawn from (this, 1]; exact masks take 0 alone, since their weights need every t", least=0, below=1,
        attention=DIFFUSION, masking="bernoulli")
    half_life: float | None = setting(
        math.inf, "masks prefer the end of a block, the more so the smaller this is; inf is uniform", above=0,
        infinite=True, of_size=True, attention=DIFFUSION, masking="exact")
    complementary: bool = setting(
        False, "draw masks in pairs, a mask and its complement", attention=DIFFUSION, masking="exact")
    num_masks: int = setting(
        1, "masks (or pairs) of the same rows in a step; two streams without shift run over the clean tokens once for "
        "all of them", above=0, most=64, attention=DIFFUSION, masking=("exact", "bernoulli"))
    first_block_size: int | None = setting(
        None, "blocks double from this size to block_size over the run", above=0,
        either=({"attention": ("two_stream", "block_causal")}, {"attention": "bidirectional", "noise_level": "block"}))
    random_offset: bool = setting(
        False, "begin the block grid of each document at a random place, as drafts do; needs rotary positions",
        attention="two_stream", clean_attention="causal")
    mask_token: str | None = setting(
        None, "text of the mask token; one that the vocabulary has is reused; unset adds one", attention=DIFFUSION)
    mask_init: str | None = setting(
        None, "token whose embedding the mask token begins with; unset: the mean of all", attention=DIFFUSION,
        objective=("diffusion", "joint"))
    mask_init_noise: bool = setting(
        False, "add normal noise of variance 1 / width to what the mask token begins with, as for DiffuGPT-M",
        attention=DIFFUSION, objective=("diffusion", "joint"))
    predict_mask: bool = setting(
        False, "the loss counts the mask token among the tokens that may be predicted, and predicts it wherever the "
        "text has it, as DiffuLLaMA's code does; sampling and evaluation never do", attention=DIFFUSION,
        objective="diffusion", masking="bernoulli")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Text to rows of tokens."""

    max_length: int | None = setting(None, "tokens of a row", above=0, most=2**20, of_size=True)
    text_column: str = setting("text", "column of the text in records")
    split: str = setting("train", "split of a data set of the hub or of `datasets`")
    skip_invalid: bool = setting(False, "leave out records that cannot be used, instead of stopping")
    end_token: str | None = setting(None, "token that ends a document and any text; unset: the model's first end token")
    predict_padding: bool = setting(
        False, "one document a row, filled up with end tokens that are masked and predicted; needs files")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Text that the model writes itself (--data self)."""

    self_prompts: str | None = setting(None, "file whose documents' beginnings the model continues; needs --data self")
    self_tokens: int | None = setting(None, "tokens to write (and learn); unset: max_tokens", above=0, self_prompts=SET)
    self_temperature: float = setting(0.0, "temperature of the writing", least=0, self_prompts=SET)
    self_mode: str = setting(
        "ar", "ar, or diffusion: masks are then what was still masked at a random step of the writing",
        one_of=("ar", "diffusion"), self_prompts=SET)
    self_steps: int | None = setting(
        None, "forwards in which the model writes a block, the surest tokens first, evenly shared out; unset: as "
        "many as it takes to commit what is surer than 0.9", above=0, self_prompts=SET, self_mode="diffusion")
    self_end: bool = setting(True, "learn the end token of what the model writes too", self_prompts=SET)
    self_every: int | None = setting(
        None, "write anew with the current weights after every so many steps; unset: once", above=0, self_prompts=SET)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters that are trained instead of the weights (PEFT)."""

    lora_rank: int | None = setting(
        None, "rank of the adapters; unset: all weights are trained", above=0, objective=("diffusion", "joint"))
    lora_alpha: float | None = setting(
        None, "the adapters' output is scaled by this / rank; unset: twice the rank", above=0, lora_rank=SET)
    lora_trainable: str = setting(
        ",".join(LORA_TRAINABLE), "parts that are trained beside the adapters, with commas between", lora_rank=SET)
    lora_merge: bool = setting(True, "save a whole model; false saves a PEFT adapter", lora_rank=SET)


@dataclass(frozen=True, kw_only=True)
class OptimiserSettings:
    """AdamW, its learning rate and its batches."""

    max_tokens: int | None = setting(
        None, "clean, unpadded tokens to train on; unset: one pass over the data", above=0, most=10**15)
    batch_size: int | None = setting(
        None, "rows of max_length tokens in an optimiser step", above=0, most=2**16, of_size=True)
    learning_rate: float | None = setting(None, "highest learning rate, after the warm-up", above=0, of_size=True)
    min_learning_rate_ratio: float | None = setting(
        None, "a cosine falls to this part of the learning rate", least=0, most=1, of_size=True)
    warmup_ratio: float = setting(0.02, "part of the steps in which the learning rate rises", least=0, most=1)
    weight_decay: float = setting(0.01, "decay of matrices; vectors have none", least=0)
    beta1: float = setting(0.9, "AdamW's decay of the mean", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of the variance", least=0, below=1)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm", above=0)
    max_nonfinite_steps: int = setting(
        0, "steps that may be skipped because their loss or gradient is not finite; one more ends the run", least=0)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Figures on held-out documents during the run."""

    eval_data: str | None = setting(
        None, "file or folder to evaluate on; unset: the last 1% of the documents, held out of training")
    eval_documents: int = setting(32, "documents to evaluate on, at most; 0 evaluates nothing", least=0)
    eval_samples: int = setting(
        2, "masks of each document", above=0, most=MOST_SAMPLES, attention=DIFFUSION, eval_documents=above(0))
    eval_every: int | None = setting(
        None, "steps between evaluations; unset: a tenth of the run", above=0, eval_documents=above(0))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Speed, memory, and what the run leaves in its folder."""

    seed: int = setting(0, "of the order of the data, the noise and new weights")
    micro_batch_size: int | None = setting(None, "rows that run at once on one device", above=0, of_size=True)
    mixed_precision: str = setting(
        "no", "no (float32), or the type that passes compute in", one_of=("no", "bf16", "fp16"))
    quantize: str | None = setting(
        None, "pack the frozen weights of the parent: nf4 (4 bits) or int8, both of bitsandbytes; adapters beside them "
        "learn", one_of=("nf4", "int8"), either=({"objective": "distill"}, {"lora_rank": SET}))
    gradient_checkpointing: bool = setting(
        False, "compute layers again in the backward pass, for memory", objective=("diffusion", "joint"))
    compile_layers: bool = setting(False, "compile the layers with torch.compile", objective=("diffusion", "joint"))
    log_every: int = setting(10, "steps between rows of metrics.jsonl", above=0)
    save_every: int = setting(500, "steps between checkpoints", above=0)
    keep_checkpoints: int = setting(2, "checkpoints to keep, the newest", above=0)
    report_to: str | None = setting(None, "a tracker that Accelerate knows, such as tensorboard or wandb")


# fmt: on


# A dataclass takes the fields of its last base first.
@dataclass(frozen=True, repr=False)
class Settings(
    RunSettings,
    EvaluationSettings,
    OptimiserSettings,
    LoraSettings,
    RolloutSettings,
    DataSettings,
    CorruptionSettings,
    DrafterSettings,
    ObjectiveSettings,
    AttentionSettings,
):
    """All groups, and the recipe's name. Values are in range and go together; some of them a run may not read."""

    recipe: str

    def __post_init__(self) -> None:
        for name in TABLE:
            check_value(name, getattr(self, name))
        for check in (_check_lora_trainable, _check_clean_half, _check_reach, _check_own_states, _check_anchor):
            check(self)

    def __repr__(self) -> str:
        """The recipe, and what differs from the defaults of the table; all of it: `to_plain`."""
        own = [f"{n}={getattr(self, n)!r}" for n, entry in TABLE.items() if getattr(self, n) != entry.default]
        return f"{type(self).__name__}({', '.join([f'recipe={self.recipe!r}', *own])})"

    @property
    def trainable(self) -> tuple[str, ...]:
        """The parts named in lora_trainable."""
        return tuple(name.strip() for name in self.lora_trainable.split(",") if name.strip())


GROUPS = Settings.__bases__[::-1]
"""The groups in the order of the table."""
TABLE = {entry.name: entry for group in GROUPS for entry in fields(group)}
"""Name -> field of every setting, in order."""


def to_plain(settings: Settings) -> dict[str, Any]:
    """Flat values for JSON: infinity is "inf"."""
    return {name: "inf" if value == math.inf else value for name, value in asdict(settings).items()}


# --- values


def shown(value: Any) -> str:
    """A value as SETTING=VALUE takes it, texts in quotes."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def limits_of(name: str) -> str:
    """A setting's limits in words, such as "at least 0 and below 1"."""
    return " and ".join(f"{LIMITS[limit][0]} {bound:,}" for limit, bound in TABLE[name].metadata["limits"].items())


def check_value(name: str, value: Any) -> None:
    """Raise ValueError for a value of the right type that the setting does not take."""
    if value is None:
        return
    metadata = TABLE[name].metadata
    if metadata["one_of"] and value not in metadata["one_of"]:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(metadata['one_of'])}")
    if isinstance(value, str) and not value.strip() and name not in ("lora_trainable", "self_prompts"):
        raise ValueError(f"{name}={value!r} is empty: give a text, or leave it out")
    if isinstance(value, float) and not math.isfinite(value) and not (metadata["infinite"] and value == math.inf):
        raise ValueError(f"{name}={value} must be finite")
    if not all(LIMITS[limit][1](value, bound) for limit, bound in metadata["limits"].items()):
        raise ValueError(f"{name}={value} must be {limits_of(name)}")
    if name != "seed" and "most" not in metadata["limits"] and isinstance(value, int) and value > LARGEST:
        raise ValueError(f"{name}={value} must be at most {LARGEST:,}")


def _check_lora_trainable(settings: Settings) -> None:
    for part in settings.trainable:
        if part not in LORA_TRAINABLE:
            raise ValueError(
                f"lora_trainable={settings.lora_trainable!r}: {part!r} is unknown: use any of "
                f"{', '.join(LORA_TRAINABLE)}, with commas between"
            )


def _check_clean_half(settings: Settings) -> None:
    """Other objectives than diffusion read AR rows off the clean stream."""
    attention = (settings.attention, settings.clean_attention)
    if settings.objective != "diffusion" and attention != ("two_stream", "causal"):
        raise ValueError(
            f"objective={settings.objective!r} needs attention='two_stream' with clean_attention='causal', "
            f"not {settings.attention!r} with {settings.clean_attention!r}"
        )


def _check_reach(settings: Settings) -> None:
    """How far a draft reaches is the drafter's measure alone."""
    if settings.objective == "joint" and settings.distance in DISTANCES[-2:]:
        raise ValueError(f"distance={settings.distance!r} needs objective='distill', not 'joint'")


def _check_own_states(settings: Settings) -> None:
    """Masks of self_mode="diffusion" are states of the student's own decoding, which the text does not answer."""
    if settings.self_mode != "diffusion":
        return
    if settings.masking != "all" or settings.random_offset:
        raise ValueError(
            f"self_mode='diffusion' brings masks of its own: use masking='all', not {settings.masking!r}, and no "
            "random_offset"
        )
    if settings.objective != "distill" and settings.teacher is None:
        raise ValueError(
            "self_mode='diffusion' teaches another model's distribution, not the student's own words: with objective="
            f"{settings.objective!r} it needs objective='joint' and teacher=FOLDER, the AR model"
        )


def _check_anchor(settings: Settings) -> None:
    """A block of one token is an anchor without drafts."""
    for name in ("block_size", "first_block_size"):
        if settings.adapt_anchor and getattr(settings, name) == 1:
            raise ValueError(f"adapt_anchor=true with {name}=1 leaves nothing to draft: use blocks of at least 2")


# --- conditions


def unmet(name: str, values: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """What keeps a run with these values (of all settings) from reading a setting; None if it reads it.

    Returns the failed condition in words, such as "objective='joint'", and the names of the settings in it.
    """
    needs, either = TABLE[name].metadata["needs"], TABLE[name].metadata["either"]
    failed = {other: need for other, need in needs.items() if not need.holds(values[other])}
    if failed:
        return _in_words(failed), tuple(failed)
    if not either or any(all(need.holds(values[other]) for other, need in part.items()) for part in either):
        return None
    return ", or ".join(map(_in_words, either)), tuple(dict.fromkeys(other for part in either for other in part))


def condition(name: str) -> str:
    """The condition under which a run reads a setting, in words; empty if every run does."""
    needs, either = TABLE[name].metadata["needs"], TABLE[name].metadata["either"]
    alternatives = "either " + ", or ".join(map(_in_words, either)) if either else ""
    return ", and ".join(part for part in (_in_words(needs), alternatives) if part)


def _in_words(needs: Mapping[str, Need]) -> str:
    return " and ".join(other + need.says for other, need in needs.items())
