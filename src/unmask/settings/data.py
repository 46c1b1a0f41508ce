"""What is learnt from: text, and text that the model writes itself."""

from __future__ import annotations

from dataclasses import dataclass

from unmask.settings.field import SET, setting

# fmt: off


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
