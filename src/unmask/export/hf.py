"""Format `hf`: a stock folder whose `custom_generate/` decodes the model in transformers, without this library."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from unmask.export import custom_generate
from unmask.hf import write_diffusion
from unmask.model import DiffusionLM


def export_hf(lm: DiffusionLM, folder: Path, place: str) -> dict[str, Any]:
    """Write the model's folder, and beside it the code that decodes it; an AR model needs none."""
    if lm.drafter is not None:
        raise ValueError(
            "format 'hf' is for whole models, and this is a drafter, which changes its base while that runs: use "
            "format 'uno', or train the whole model (recipe tri-mode)"
        )
    lm.save_pretrained(folder)
    if lm.diffusion is None:
        _write_card(lm, folder, ["pipeline_tag: text-generation"], _PLAIN)
        return {"python": f"AutoModelForCausalLM.from_pretrained({place!r})", "serve": f"transformers serve {place}"}
    _check_decodes(lm)
    if not lm.network.per_layer_type:  # the model ignores the windows of its config
        lm.model.config.diffusion["windows"] = False
        lm.model.config.save_pretrained(folder)
        write_diffusion(lm.model, lm.diffusion)
    code = folder / "custom_generate" / "generate.py"
    code.parent.mkdir()
    code.write_text(Path(custom_generate.__file__).read_text())
    without = "" if lm.diffusion.serves_ar else ", which this model was not trained for"
    use = _USE.format(mode=lm.default_mode, without=without)
    _write_card(lm, folder, ["pipeline_tag: text-generation", "tags:", "- custom_generate"], use)
    return {
        "python": f"AutoModelForCausalLM.from_pretrained({place!r}, trust_remote_code=True).generate(...)",
        "serve": f"transformers serve {place} --trust-remote-code",
    }


def _check_decodes(lm: DiffusionLM) -> None:
    """Raise ValueError for a model whose passes need more than a mask and positions."""
    network, name = lm.network, type(lm.model).__name__
    reasons = {
        "rotates long texts by other factors (LongRoPE)": network.first_long_position is not None,
        "scales queries by their place in a pass": bool(network.with_temperature),
        f"cannot be decoded on a cache ({network.no_cache})": network.no_cache is not None,
        "attends in chunks": getattr(network.config, "attention_chunk_size", None) is not None,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"format 'hf' cannot decode {name}, which {reason}: serve it with this library")


def _write_card(lm: DiffusionLM, folder: Path, entries: list[str], use: str) -> None:
    """The README of the model's folder, if it has one, with these entries of its header, and how the model is used."""
    source = Path(getattr(lm.model.config, "_name_or_path", "")) / "README.md"
    body, header = source.read_text() if source.is_file() else "", []
    figure = source.with_name("training.png")
    if f"({figure.name})" in body and figure.is_file():
        shutil.copy(figure, folder)
    if body.startswith("---\n") and "\n---\n" in body:
        front, _, body = body[4:].partition("\n---\n")
        replaced = ("library_name:", "pipeline_tag:")
        header = [line for line in front.splitlines() if not line.startswith(replaced)]
    at = header.index("tags:") if "tags:" in header else len(header)
    header[at : at + 1] = entries if "tags:" in entries else [*entries, *header[at : at + 1]]
    lines = ["---", "library_name: transformers", *header, "---", "", *([body.strip(), ""] if body else []), use]
    (folder / "README.md").write_text("\n".join(lines))


_PLAIN = """## With transformers

```python
from transformers import pipeline

print(pipeline("text-generation", model="this folder")("...", max_new_tokens=64))
```
"""

_USE = """## With transformers alone

Decoding this model takes Python code in this folder, `custom_generate/generate.py`. transformers runs it only with
`trust_remote_code=True`; read it first.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("this folder")
inputs = tokenizer("...", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))

print(pipeline("text-generation", model=model, tokenizer=tokenizer)("...", max_new_tokens=64))
```

`transformers serve FOLDER --trust-remote-code` serves it. Options of `generate`: `mode` (by default `"{mode}"`),
`block_size`, `confidence_threshold`, `max_denoising_steps`, and those of plain sampling.

Without `trust_remote_code=True`, `generate` and `pipeline` write from left to right, one token a forward{without}.
"""
