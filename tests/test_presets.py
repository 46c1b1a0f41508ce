"""The published variants that docs/speculation.md lists: each is a line of settings, and each line trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import unmask

DOCS = Path(__file__).resolve().parents[1] / "docs" / "speculation.md"
VARIANTS = re.findall(r"^\| (.+?) \| `--recipe ([\w-]+)((?: \w+=\S+)*)`", DOCS.read_text(), re.MULTILINE)


def settings_of(line: str) -> dict[str, object]:
    from unmask.cli.adapt import split_settings

    return split_settings(line.split())[1]


@pytest.mark.parametrize(("recipe", "line"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_a_documented_variant_trains_and_decodes(
    recipe: str, line: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    run = {"show_progress": False, "max_tokens": 300, "max_length": 32, "block_size": 4, "batch_size": 2}
    settings, data = run | settings_of(line), stories
    if settings.get("self_prompts") == "FILE":
        settings, data = settings | {"self_prompts": str(stories)}, "self"
    lm = unmask.adapt(tokenizer_and_model, data, recipe, tmp_path / "run", **settings)
    modes = ("diffusion", "speculative") if lm.diffusion.serves_ar else ("diffusion",)
    for mode in modes:
        assert int(lm.generate("Once there", mode=mode, max_new_tokens=5, seed=0).num_new_tokens[0]) >= 1


def test_the_documented_variants_are_found() -> None:
    assert len(VARIANTS) >= 10
    assert sum("self_steps=4" in line for _, _, line in VARIANTS) == 1
    assert {"bd3lm", "fast-dllm-v2", "tri-mode-published", "drafter"} <= {recipe for _, recipe, _ in VARIANTS}
