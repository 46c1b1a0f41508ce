"""The settings as keyword arguments, so that editors complete and check them: `adapt(**settings)`.

Kept equal to the table by `tests/test_settings.py`.
"""

from __future__ import annotations

from typing import TypedDict


class SettingsKeywords(TypedDict, total=False):
    """Names and types of all settings; `unmask recipes NAME --all` and docs/settings.md say what each is."""

    attention: str
    clean_attention: str | None
    noisy_attention: str
    shift: bool
    block_size: int | None
    anneal_steps: int
    anneal_redraw: bool
    objective: str
    alpha: float
    distance: str
    teacher: str | None
    teacher_top_k: int | None
    loss_normaliser: str
    drafter_rank: int
    drafter_scale: float
    drafter_targets: str
    noise: str
    mask_per_place: bool
    adapt_anchor: bool
    masking: str
    noise_level: str
    min_noise_level: float
    half_life: float | None
    complementary: bool
    num_masks: int
    first_block_size: int | None
    random_offset: bool
    mask_token: str | None
    mask_init: str | None
    mask_init_noise: bool
    predict_mask: bool
    max_length: int | None
    text_column: str
    split: str
    skip_invalid: bool
    end_token: str | None
    predict_padding: bool
    self_prompts: str | None
    self_tokens: int | None
    self_temperature: float
    self_mode: str
    self_steps: int | None
    self_end: bool
    self_every: int | None
    lora_rank: int | None
    lora_alpha: float | None
    lora_trainable: str
    lora_merge: bool
    max_tokens: int | None
    batch_size: int | None
    learning_rate: float | None
    min_learning_rate_ratio: float | None
    warmup_ratio: float
    optimizer: str
    weight_decay: float
    beta1: float
    beta2: float
    max_grad_norm: float
    max_nonfinite_steps: int
    eval_data: str | None
    eval_documents: int
    eval_samples: int
    eval_every: int | None
    sample_texts: bool
    seed: int
    micro_batch_size: int | None
    mixed_precision: str | None
    dtype: str | None
    quantize: str | None
    save_dtype: str | None
    attn_implementation: str | None
    gradient_checkpointing: bool
    compile_layers: bool
    sync_each_micro_batch: bool
    rank_timeout: float | None
    log_every: int
    save_every: int
    keep_checkpoints: int
    report_to: str | None
