"""How it is learnt: weights, optimiser, evaluation, and what a run costs and leaves."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.limits import MOST_SAMPLES
from unmask.settings.field import DIFFUSION, SET, Need, above, setting

LORA_TRAINABLE = ("embeddings", "norms", "head")

# fmt: off


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
    optimizer: str = setting(
        "adamw", "adamw, or adamw-8bit: its two moments take 2 bytes a parameter instead of 8 (bitsandbytes)",
        one_of=("adamw", "adamw-8bit"))
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
        None, "file, folder or hub id, ID:SPLIT, to evaluate on; unset: the last 1% of the documents, not trained on")
    eval_documents: int = setting(32, "documents to evaluate on, at most; 0 evaluates nothing", least=0)
    eval_samples: int = setting(
        2, "masks of each document", above=0, most=MOST_SAMPLES, attention=DIFFUSION, eval_documents=above(0))
    eval_every: int | None = setting(
        None, "steps between evaluations; unset: a tenth of the run", above=0, eval_documents=above(0))
    sample_texts: bool = setting(
        False, "at each evaluation write on from the beginning of a held-out document: shown, kept in samples.jsonl",
        eval_documents=above(0))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Speed, memory, and what the run leaves in its folder."""

    seed: int = setting(0, "of the order of the data, the noise and new weights")
    micro_batch_size: int | None = setting(None, "rows that run at once on one device", above=0, of_size=True)
    mixed_precision: str | None = setting(
        None, "no (float32), or the type that passes compute in, what stays float32 then in TF32; unset: bf16 on GPUs "
        "from capability 8.0 on, else no", one_of=("no", "bf16", "fp16"))
    dtype: str | None = setting(
        None, "type of the weights during the run; unset: float32, or that of a model in memory. bfloat16 is half the "
        "memory, and weights that learn lose updates below about 1/256 of them, for want of a float32 copy; adapters "
        "are float32", one_of=("float32", "bfloat16"))
    quantize: str | None = setting(
        None, "pack the frozen weights of the parent: nf4 (4 bits) or int8, both of bitsandbytes; adapters beside them "
        "learn", one_of=("nf4", "int8"), either=({"objective": "distill"}, {"lora_rank": SET}))
    save_dtype: str | None = setting(
        None, "type of the final weights; unset: that in which they learnt",
        one_of=("float32", "bfloat16", "float16"), quantize=Need(" unset", lambda value: value is None))
    attn_implementation: str | None = setting(
        None, "how attention is computed; flex_attention skips the pairs that a mask hides, for GPUs; unset: what the "
        "model is loaded with, mostly sdpa, and on GPUs from capability 8.0 on flex_attention in training steps",
        one_of=("sdpa", "eager", "flex_attention"))
    gradient_checkpointing: bool = setting(False, "compute layers again in the backward pass, for memory")
    compile_layers: bool = setting(False, "compile the layers with torch.compile", objective=("diffusion", "joint"))
    sync_each_micro_batch: bool = setting(
        False, "exchange gradients after each micro-batch, not once a step: with FSDP2 no process holds whole ones")
    rank_timeout: float | None = setting(
        1800.0, "seconds that a step may take on several processes before those that lag are named and the run ends",
        above=0)
    log_every: int = setting(10, "steps between rows of metrics.jsonl", above=0)
    save_every: int = setting(500, "steps between checkpoints", above=0)
    keep_checkpoints: int = setting(2, "checkpoints to keep, the newest", above=0)
    report_to: str | None = setting(None, "tensorboard, wandb, mlflow or another tracker of Accelerate, or all")
