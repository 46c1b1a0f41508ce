"""Format `hf`: the code in the folder gives the tokens of `lm.generate`, with transformers alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import MASK, STORIES, SUPPORTED, block_config, random_tokens, tiny_model

import unmask
from unmask.export import export_model
from unmask.export.custom_generate import _accept, _choose, _Options, generate
from unmask.hf import as_network
from unmask.sampling import Autoregressive, Blocks, Request, Speculative, Threshold, WholeCanvas

SHAPES: dict[str, dict[str, Any]] = {
    "noisy context": {"attention": "block_causal", "clean": None},
    "noisy context, shifted": {"attention": "block_causal", "clean": None, "shift": True},
    "clean context": {},
    "clean context, shifted": {"shift": True},
    "tri-mode": {"clean": "causal"},
    "tri-mode, shifted": {"clean": "causal", "shift": True},
    "tri-mode, causal inside": {"clean": "causal", "shift": True, "noisy": "causal"},
    "whole canvas": {"attention": "bidirectional", "clean": None},
    "whole canvas, shifted": {"attention": "bidirectional", "clean": None, "shift": True},
}


def shaped(name: str, kind: str = "llama", dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """A random model whose config says that it was converted to one of the shapes, and that config."""
    options = dict(SHAPES[name])
    noisy = options.pop("noisy", "bidirectional")
    config = replace(block_config(4, **options), noisy_attention=noisy)
    model = tiny_model(SUPPORTED[kind](), dtype)
    model.config.diffusion = asdict(config)
    model.generation_config.eos_token_id = 2
    return model, config


def ours(
    model: Any, config: Any, prompts: list[torch.Tensor], decoder: Any, n: int, ends: tuple[int, ...] = (2,)
) -> Any:
    request = Request(max_new_tokens=n, end_token_ids=ends, seed=0, context_length=128)
    return decoder(as_network(model, MASK), config, prompts, request).new_tokens


def theirs(model: Any, prompts: list[torch.Tensor], **options: Any) -> list[list[int]]:
    """Of one left-padded batch; each row up to its padding."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long()
    out = generate(ids, model=model, attention_mask=mask, pad_token_id=MASK, **options)
    assert torch.equal(out[:, :longest], ids.repeat_interleave(len(out) // len(ids), dim=0))
    return [[token for token in row if token != MASK] for row in out[:, longest:].tolist()]


PROMPTS = [random_tokens(n, seed=n) for n in (1, 4, 7, 12)]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_writes_what_the_library_writes(name: str) -> None:
    model, config = shaped(name)
    canvas = config.attention == "bidirectional"
    for threshold, steps in ((0.02, None), (0.9, 3)):
        options = {"select": Threshold(threshold), "max_denoising_steps": steps}
        decoder = WholeCanvas(**options) if canvas else Blocks(**options)
        expected = ours(model, config, PROMPTS, decoder, 21)
        found = theirs(model, PROMPTS, mode="diffusion", max_new_tokens=21, confidence_threshold=threshold,
                       max_denoising_steps=steps)  # fmt: skip
        assert found == expected
    if not canvas:
        expected = ours(model, config, PROMPTS, Blocks(block_size=6), 13)
        assert theirs(model, PROMPTS, mode="diffusion", block_size=6, max_new_tokens=13) == expected
    expected = ours(model, config, PROMPTS, Autoregressive(), 21)
    assert theirs(model, PROMPTS, mode="ar", max_new_tokens=21) == expected
    if config.serves_ar:
        assert theirs(model, PROMPTS, max_new_tokens=21) == expected
        assert ours(model, config, PROMPTS, Speculative(cycle="two"), 21) == expected
        for size in (1, 9):
            assert theirs(model, PROMPTS, block_size=size, max_new_tokens=21) == expected


@pytest.mark.parametrize("kind", ["gpt2", "opt", "mistral_window", "qwen2_window", "gemma2", "gemma3", "phi3"])
def test_every_class_writes_what_the_library_writes(kind: str) -> None:
    """Windows among them, which are measured on positions and are of some layers."""
    model, config = shaped("clean context, shifted", kind)
    expected = ours(model, config, PROMPTS, Blocks(), 30)
    assert theirs(model, PROMPTS, max_new_tokens=30) == expected
    model, config = shaped("tri-mode", kind)
    expected = ours(model, config, PROMPTS, Autoregressive(), 30)
    assert theirs(model, PROMPTS, max_new_tokens=30) == expected


@pytest.mark.parametrize("name", ["clean context", "tri-mode, shifted", "whole canvas"])
def test_texts_end_at_the_context(name: str) -> None:
    model, config = shaped(name)
    prompt = [random_tokens(109)]
    decoder = {"clean context": Blocks(), "whole canvas": WholeCanvas()}.get(name, Autoregressive())
    expected = ours(model, config, prompt, decoder, 40, ends=())
    assert len(expected[0]) == 19
    assert theirs(model, prompt, max_new_tokens=40, eos_token_id=[]) == expected
    with pytest.raises(ValueError, match="a prompt of 128 tokens fills the context of 128"):
        theirs(model, [random_tokens(128)], max_new_tokens=4)


def test_eager_attention_gives_the_same() -> None:
    model, _ = shaped("clean context")
    expected = theirs(model, PROMPTS, max_new_tokens=12)
    model.config._attn_implementation = "eager"
    assert theirs(model, PROMPTS, max_new_tokens=12) == expected
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no 4-D mask"):
        theirs(model, PROMPTS, max_new_tokens=12)


def test_sampled_speculation_has_the_distribution_of_ar_sampling() -> None:
    """The third token's frequencies over 400 samples, against its exact probabilities, with top_k 4 and top_p 0.9."""
    model, _ = shaped("tri-mode, causal inside")
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 4, "top_p": 0.9, "eos_token_id": []}
    prompt = random_tokens(5)
    torch.manual_seed(0)
    out = theirs(model, [prompt], num_return_sequences=400, max_new_tokens=3, **options)
    counts: dict[tuple[int, ...], int] = {}
    for row in out:
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1

    def chances(text: torch.Tensor, left: int) -> dict[tuple[int, ...], float]:
        if not left:
            return {(): 1.0}
        with torch.no_grad():
            logits = model(text[None]).logits[0, -1].double() / 0.8
        logits[MASK] = -torch.inf
        best, order = logits.topk(4)
        p = best.softmax(-1)
        p = p * ((p.cumsum(-1) - p) < 0.9)
        found = {}
        for share, token in zip((p / p.sum()).tolist(), order.tolist(), strict=True):
            if share:
                rest = chances(torch.cat([text, torch.tensor([token])]), left - 1)
                found |= {(token, *more): share * q for more, q in rest.items()}
        return found

    expected = chances(prompt, 3)
    assert set(counts) <= set(expected)
    for text, q in expected.items():
        assert abs(counts.get(text, 0) - 400 * q) < 5 * (400 * q * (1 - q)) ** 0.5 + 1, text


def test_drafts_of_another_distribution_are_accepted_so_that_tokens_have_the_models() -> None:
    """The first token of 4000 cycles over 5 tokens, the second wherever the first draft was accepted."""
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q, p = logits[:1].expand(2, -1), torch.stack([logits[1], logits[2], logits[1]])
    options = _Options(9, 1.0, 0, 1.0, (), 4, None, None, 0.9, None)
    torch.manual_seed(0)
    first, second = torch.zeros(5), torch.zeros(5)
    for _ in range(4000):
        drafts = _choose(q, options).tolist()
        accepted, following = _accept(drafts, q, p, options)
        tokens = [*drafts[:accepted], following]
        first[tokens[0]] += 1
        if accepted:
            second[tokens[1]] += 1
    for counts, wanted in ((first, p[0].softmax(-1)), (second, p[1].softmax(-1))):
        n = counts.sum()
        assert ((counts - n * wanted).abs() < 4 * (n * wanted * (1 - wanted)).sqrt()).all(), (counts / n, wanted)


@pytest.mark.parametrize(("options", "message"), [
    ({"mode": "speculative"}, "needs a model with a causal clean half"),
    ({"mode": "fast"}, "mode 'fast' is unknown"),
    ({"confidence_threshold": 1.5}, r"confidence_threshold 1.5 must lie in \[0, 1\]"),
    ({"block_size": 0}, "block_size 0 must be a whole number"),
    ({"mode": "ar", "block_size": 4}, "block_size=4 is not read by mode 'ar'"),
    ({"num_beams": 3}, "num_beams=3 is not read"),
    ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not read"),
    ({"generation_config": tf.GenerationConfig(min_new_tokens=5)}, "min_new_tokens=5 is not read"),
    ({"confidence_treshold": 0.3}, "confidence_treshold=0.3 is not read"),
    ({"stop_strings": "the"}, "stop_strings 'the' need tokenizer="),
])  # fmt: skip
def test_what_is_not_read_is_refused(options: dict[str, Any], message: str) -> None:
    model, _ = shaped("clean context")
    with pytest.raises(ValueError, match=message):
        generate(PROMPTS[1][None], model=model, **({"max_new_tokens": 4} | options))


ALONE = """
import json, sys
sys.modules["unmask"] = None  # importing it is an error
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.cli.serving.utils import DirectStreamer

class Pieces:
    def __init__(self):
        self.pieces, self.ended = [], False
    def put(self, value):
        self.pieces.append(value)
    def end(self):
        self.ended = True

class Loop:
    def call_soon_threadsafe(self, call, *args):
        call(*args)

class Queue(list):
    put_nowait = list.append

def decoded(folder, prompt):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    given = stock.generate(**inputs, custom_generate=folder, trust_remote_code=True, max_new_tokens=24)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    pieces = Pieces()
    bound = model.generate(inputs["input_ids"], max_new_tokens=24, streamer=pieces)
    assert pieces.ended and all(piece.ndim == 1 for piece in pieces.pieces)
    assert torch.cat(pieces.pieces).tolist() == bound[0].tolist()
    served = Queue()
    model.generate(**inputs, max_new_tokens=24, streamer=DirectStreamer(tokenizer._tokenizer, Loop(), served))
    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    piped = pipe(prompt, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"]
    stops = model.generate(**inputs, max_new_tokens=24, stop_strings=["the"], tokenizer=tokenizer)
    return {
        "given": given[0].tolist(), "bound": bound[0].tolist(), "pieces": len(pieces.pieces) - 1, "pipeline": piped,
        "served": "".join(text for text in served if text),
        "stopped": tokenizer.decode(stops[0, inputs["input_ids"].shape[1]:]),
    }

found = [decoded(folder, sys.argv[1]) for folder in sys.argv[2:]]
assert not any(name.startswith("unmask.") for name in sys.modules)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(
    tokenizer_and_model: Path, stories: Path, converted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Runs of two recipes, and the folders that they were exported to."""
    home = tmp_path_factory.mktemp("exported")
    unmask.adapt(tokenizer_and_model, stories, "tri-mode", home / "run", max_tokens=4000, max_length=64, block_size=4,
                 batch_size=8, learning_rate=0.01, show_progress=False)  # fmt: skip
    runs = [(converted, home / "diffusion"), (home / "run", home / "tri-mode")]
    for run, folder in runs:
        said = export_model(run, "hf", folder)
        assert str(folder) in said["serve"]
    return runs


def test_transformers_alone_decodes_the_folders(exported: Any, tmp_path: Path) -> None:
    """In a process of its own, in which unmask cannot be imported."""
    prompt = STORIES[3][:30]
    command = [sys.executable, "-W", "ignore", "-c", ALONE, prompt, *(str(folder) for _, folder in exported)]
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    assert ran.returncode == 0, ran.stderr
    for (run, folder), found in zip(exported, json.loads(ran.stdout.splitlines()[-1]), strict=True):
        lm = unmask.load(run)
        out = lm.generate(prompt, max_new_tokens=24)
        assert found["given"] == found["bound"] == out.sequences[0].tolist()
        new = lm.tokenizer.decode(out.sequences[0, -int(out.num_new_tokens[0]) :], skip_special_tokens=True)
        assert found["served"].strip() == found["pipeline"].strip() == new.strip()
        stopped = lm.generate(prompt, max_new_tokens=24, stop_strings="the").texts[0]
        assert found["stopped"].startswith(stopped)
        assert found["pieces"] <= 12 or lm.default_mode == "diffusion"  # a cycle gains two tokens at least
        assert unmask.load(folder).generate(prompt, max_new_tokens=24).texts == out.texts


def test_cards_say_what_decodes_a_folder(exported: Any) -> None:
    for run, folder in exported:
        card, before = (folder / "README.md").read_text(), (run / "README.md").read_text()
        assert card.count("pipeline_tag: text-generation\n") == 1
        assert card.count("\n- custom_generate\n") == 1
        assert card.count("\nlibrary_name: transformers\n") == card.count("\ntags:\n") == 1
        assert "diffusion-language-model" in card
        for figure in re.findall(r"!\[[^]]+\]\((.+)\)", card):
            assert (folder / figure).is_file()
        assert "trust_remote_code=True" in card
        assert ("which this model was not trained for" in card) == ("pipeline_tag" not in before)
    assert "pipeline_tag" not in (exported[0][0] / "README.md").read_text()
    assert "pipeline_tag" in (exported[1][0] / "README.md").read_text()


def test_models_that_need_more_than_a_mask_are_refused_and_ar_models_need_no_code(
    tokenizer_and_model: Path, tmp_path: Path
) -> None:
    export_model(tokenizer_and_model, "hf", tmp_path / "ar")
    assert not (tmp_path / "ar" / "custom_generate").exists()
    assert (
        (tmp_path / "ar" / "README.md")
        .read_text()
        .startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n## With transformers\n")
    )
    lm = unmask.load(tokenizer_and_model)
    lm.diffusion = block_config(4)
    for name, value, reason in (("no_cache", "why", r"on a cache \(why\)"), ("first_long_position", 9, "LongRoPE")):
        network = as_network(lm.model)
        setattr(network, name, value)
        lm.network = network
        with pytest.raises(ValueError, match=f"cannot decode LlamaForCausalLM, which .*{reason}"):
            export_model(lm, "hf", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ar"]


def test_a_window_that_the_model_does_not_read_is_not_read_here(tokenizer_and_model: Path, tmp_path: Path) -> None:
    """Llama has no windows, whatever its config says."""
    lm = unmask.load(tokenizer_and_model)
    lm.model.config.sliding_window = 5
    lm.diffusion = replace(block_config(4), mask_token_id=lm.model.config.vocab_size - 1)
    lm.network = as_network(lm.model, lm.diffusion.mask_token_id)
    assert not lm.network.per_layer_type
    export_model(lm, "hf", tmp_path / "hf")
    assert "windows" not in lm.model.config.diffusion
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    assert model.config.sliding_window == 5
    lm.to(torch.float64)
    lm.network = as_network(lm.model, lm.diffusion.mask_token_id)
    ids = random_tokens(14)
    expected = lm.generate(ids, mode="diffusion", max_new_tokens=20).sequences
    assert generate(ids[None], model=model, max_new_tokens=20).tolist() == expected.tolist()
