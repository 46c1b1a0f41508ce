"""Tokenizers of several families, each with its habits: end tokens of its own, spaces in front, templates, bytes."""

from __future__ import annotations

import json
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import _GQA, STORIES, block_config, tiny_model
from test_special_texts import prefixing_tokenizer
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers.convert_slow_tokenizer import bytes_to_unicode

import unmask
from unmask.data.documents import tokenize
from unmask.data.plain_text import following_ids, num_added_after, open_ids, rendered_ids
from unmask.data.prompts import chat_text, prompt_rows
from unmask.data.supervised import Completion, Conversation, apply_template, encode_example
from unmask.data.token_bytes import bytes_of_tokens
from unmask.evaluation.likelihood import documents_of

FAMILIES = ["gpt2", "llama2", "qwen2", "qwen2-sdar"]
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
SILENT = NO_SYSTEM.replace("{{ raise_exception('System role not supported') }}", "").replace(
    "{% endif %}[{{ m.role }}] {{ m.content }}\n", "{% else %}[{{ m.role }}] {{ m.content }}\n{% endif %}"
)


def family(name: str, shared: Path) -> Any:
    """A tokenizer of shared/tokenizers; SDAR's is Qwen 2's with SDAR's added tokens and template."""
    folder = shared / "tokenizers" / name
    if name != "qwen2-sdar":
        return tf.AutoTokenizer.from_pretrained(folder)
    tokenizer = tf.AutoTokenizer.from_pretrained(shared / "tokenizers" / "qwen2")
    added = json.loads((folder / "added_tokens.json").read_text())
    tokenizer.add_tokens([tf.AddedToken(text, special=True) for text, _ in sorted(added.items(), key=lambda kv: kv[1])])
    tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="module", params=[*FAMILIES, "prefixing", "tiny"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """A tokenizer that the tests may change and then put back."""
    if request.param == "prefixing":
        return prefixing_tokenizer()
    if request.param == "tiny":
        return tf.AutoTokenizer.from_pretrained(request.getfixturevalue("tokenizer_and_model"))
    return family(request.param, request.getfixturevalue("shared"))


@pytest.fixture
def ending(tokenizer: Any) -> Any:
    """The tokenizer, which for now puts its end token after every text."""
    inner, end = tokenizer._tokenizer, tokenizer.eos_token
    before = inner.post_processor
    head = "<s> " if tokenizer.bos_token == "<s>" else ""
    special = [(text, tokenizer.convert_tokens_to_ids(text)) for text in {end, *head.split()}]
    inner.post_processor = TemplateProcessing(single=f"{head}$A {end}", special_tokens=special)
    yield tokenizer
    inner.post_processor = before


# --- an end token of the tokenizer's own


def test_a_prompt_goes_on_where_the_tokenizer_would_end_it(ending: Any) -> None:
    end = ending.eos_token_id
    assert ending("once a cat")["input_ids"][-1] == end
    assert num_added_after(ending) == 1
    [row] = prompt_rows(ending, "once a cat", None, 1 << 30)
    assert row.tolist() == ending("once a cat")["input_ids"][:-1]
    assert end not in open_ids(ending, "")[1:]
    assert end not in rendered_ids(ending, "once a cat", add_special_tokens=True)[1:]


def test_documents_and_examples_end_once(ending: Any) -> None:
    end = ending.eos_token_id
    for closing in (end, 5):
        assert [ids.tolist() for ids in tokenize(ending, ["a cat"], closing)] == [[*open_ids(ending, "a cat"), closing]]
    ((ids, learnt),) = encode_example(ending, Completion("once a", " cat sat"), end)
    prompt = open_ids(ending, "once a")
    assert ids[: len(prompt)] == prompt
    assert (ids[1:].count(end), ids[-1]) == (1, end)
    assert learnt.index(True) == len(prompt)


def test_the_harness_reads_open_prompts(ending: Any) -> None:
    pytest.importorskip("lm_eval")
    from unmask.evaluation.lm_eval import HarnessLM

    model = HarnessLM(unmask.DiffusionLM(tiny_llama_of(ending), ending))
    context, continuation = model._encode_pair("once a", " cat sat")
    assert context == open_ids(ending, "once a")
    assert [*context, *continuation] == open_ids(ending, "once a cat sat")


# --- a space that the tokenizer puts in front


def tiny_llama_of(tokenizer: Any) -> Any:
    sizes = {"vocab_size": len(tokenizer) + 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
             "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
             "pad_token_id": None, "tie_word_embeddings": True}  # fmt: skip
    return tiny_model(tf.LlamaConfig(**(_GQA | sizes)))


@pytest.mark.parametrize("suffix", ["ld and", " cat", "\n\n\ncat", "  cat", "", "cat"])
def test_a_suffix_stands_in_the_text_as_it_was_given(tokenizer: Any, suffix: str) -> None:
    ids = following_ids(tokenizer, suffix)
    before = open_ids(tokenizer, "once a wor")
    assert tokenizer.decode([*before, *ids], skip_special_tokens=True) == "once a wor" + suffix
    ((whole, _),) = encode_example(tokenizer, Completion("once a wor", suffix or "x"), None)
    assert tokenizer.decode(whole, skip_special_tokens=True) == "once a wor" + (suffix or "x")


@pytest.mark.parametrize("suffix", ["ld and", "\nld"])
def test_a_prefix_space_of_byte_level_tokenizers_is_left_out_too(tokenizer_and_model: Path, suffix: str) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tokenizer_and_model)
    tokenizer._tokenizer.pre_tokenizer.add_prefix_space = True
    assert tokenizer.convert_ids_to_tokens(tokenizer("ld")["input_ids"])[0].startswith("Ġ")
    assert tokenizer.decode(following_ids(tokenizer, suffix)) == suffix


def test_infill_gives_prefix_and_suffix_back(tokenizer: Any) -> None:
    config = replace(block_config(clean=None, attention="bidirectional"), mask_token_id=len(tokenizer), block_size=None)
    lm = unmask.DiffusionLM(tiny_llama_of(tokenizer), tokenizer, config)
    out = lm.infill("once a wor", "ld and", 3, seed=0)
    ids = out.sequences[0].tolist()
    before = open_ids(tokenizer, "once a wor")
    assert ids[: len(before)] == before
    assert tokenizer.decode([*before, *ids[len(before) + 3 :]], skip_special_tokens=True) == "once a world and"


# --- chat templates


ASKED = [{"role": "system", "content": "speak in verse"}, {"role": "user", "content": "hello"}]
TALK = [*ASKED, {"role": "assistant", "content": "a b"}, {"role": "user", "content": "more"},
        {"role": "assistant", "content": "c d"}]  # fmt: skip


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT])
def test_a_template_without_a_system_role_loses_nothing(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    asked = "[user] speak in verse\n\nhello\n[assistant] "
    assert chat_text(tokenizer, ASKED) == asked
    [row] = prompt_rows(tokenizer, ASKED, None, 1 << 30)
    ((ids, learnt),) = encode_example(tokenizer, Conversation(TALK), tokenizer.eos_token_id)
    assert ids[: len(row)] == row.tolist()  # what is learnt follows what `generate` reads
    assert learnt.index(True) == len(row)
    assert apply_template(tokenizer, ASKED[:1]) == "[user] speak in verse\n"
    answered = [ASKED[0], {"role": "assistant", "content": "x"}]
    assert apply_template(tokenizer, answered) == "[user] speak in verse\n[assistant] x\n"


def test_a_system_role_that_the_template_has_stays(shared: Path) -> None:
    text = chat_text(family("qwen2-sdar", shared), ASKED)
    assert text.startswith("<|im_start|>system\nspeak in verse<|im_end|>\n<|im_start|>user\nhello<|im_end|>")


def test_a_template_that_raises_is_one_line_everywhere(tokenizer_and_model: Path, tmp_path: Path) -> None:
    lm = unmask.load(tokenizer_and_model)
    lm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"^the prompt holds messages that the chat template refuses \(roles must"):
        lm.generate(ASKED)
    data = tmp_path / "talk.jsonl"
    data.write_text(json.dumps({"messages": TALK}) + "\n")
    with pytest.raises(ValueError, match=r"talk\.jsonl.*refuses \(roles must alternate\)"):
        unmask.adapt(lm, data, "tri-mode", tmp_path / "run", show_progress=False)
    pytest.importorskip("lm_eval")
    from unmask.evaluation.lm_eval import HarnessLM

    with pytest.raises(ValueError, match="roles must alternate"):
        HarnessLM(lm).apply_chat_template(ASKED)


# --- bytes


TEXTS = [
    "Hello wörld 👩\u200d🚀 e\u0301 漢字\n  x",
    "👍👍 ok",
    " a  b ",
    "\n\n",
    "naïve — “quoted”…",
    "é",
    "",
    "ab\u0301 c👩\u200d🚀",
]


def spelled(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token, by the tokenizer's own way of writing them."""
    if token in tokenizer.all_special_ids:
        return b""
    piece = tokenizer.convert_ids_to_tokens(token)
    if "ByteLevel" in type(tokenizer._tokenizer.decoder).__name__:
        table = bytes_to_unicode()
        back = {character: byte for byte, character in table.items()}
        return bytes(back[character] for character in piece)
    if piece.startswith("<0x"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_those_that_tokens_spell(tokenizer: Any, text: str) -> None:
    if tokenizer.unk_token_id in tokenizer(text)["input_ids"][1:] and tokenizer.unk_token != tokenizer.eos_token:
        pytest.skip("the tokenizer does not know these characters")
    [document] = documents_of(tokenizer, [text], None)
    counts = document.num_bytes.tolist()
    pieces = [spelled(tokenizer, token) for token in document.ids.tolist()]
    whole = b"".join(pieces)
    assert sum(counts) == len(text.encode()) or not counts
    if whole == text.encode():
        assert counts == [len(piece) for piece in pieces]
    elif whole == b" " + text.encode():
        assert sum(counts) == len(whole) - 1
        assert all(n in (len(p), len(p) - 1) for n, p in zip(counts, pieces, strict=True))
    else:  # normalised: the bytes of a character of the text go to the tokens that spell its normal form
        assert whole == unicodedata.normalize("NFC", text).encode()
        assert all(n >= len(p) for n, p in zip(counts, pieces, strict=True))


def test_offsets_that_leave_spaces_out_lose_no_byte(tokenizer_and_model: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tokenizer_and_model)
    tokenizer._tokenizer.post_processor = ByteLevel(trim_offsets=True)
    text = STORIES[0] + " 👩\u200d🚀!"
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    expected = [len(tokenizer.convert_ids_to_tokens(token)) for token in ids]
    assert bytes_of_tokens(tokenizer, [text], [ids], [offsets]) == [expected]
    assert bytes_of_tokens(tokenizer, [text], [ids], None) == [expected]


def test_unknown_words_have_the_bytes_of_the_text() -> None:
    from test_special_texts import word_tokenizer

    [document] = documents_of(word_tokenizer(), ["the zebra  sat "], None)
    assert document.num_bytes.tolist() == [3, 6, 6]


# --- end tokens and mask tokens


def test_a_text_ends_at_any_end_token_of_model_and_tokenizer(tokenizer_and_model: Path) -> None:
    lm = unmask.load(tokenizer_and_model)
    lm.model.generation_config.eos_token_id = [7, 0]
    assert lm.end_token_ids == (7, 0, lm.tokenizer.eos_token_id)
    lm.model.generation_config.eos_token_id = None
    assert lm.end_token_ids == (lm.tokenizer.eos_token_id,)
    new = lm.generate(STORIES[0], "ar", 24).sequences[0, len(lm.tokenizer(STORIES[0])["input_ids"]) :].tolist()
    lm.model.generation_config.eos_token_id = [new[10]]
    out = lm.generate(STORIES[0], "ar", 24)
    stock = lm.model.generate(
        torch.tensor([lm.tokenizer(STORIES[0])["input_ids"]]), max_new_tokens=24, do_sample=False,
        eos_token_id=list(lm.end_token_ids), pad_token_id=0,
    )  # fmt: skip
    assert out.sequences.tolist() == stock.tolist()
    assert int(out.num_new_tokens[0]) == new.index(new[10]) + 1


def test_a_named_end_token_is_added(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "show_progress": False, "max_tokens": 256, "max_length": 32, "batch_size": 2, "block_size": 4,
    }  # fmt: skip
    lm = unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "run", end_token=".", **settings)
    dot = lm.tokenizer.convert_tokens_to_ids(".")
    assert lm.end_token_ids == (dot, lm.tokenizer.eos_token_id)
    assert unmask.load(tmp_path / "run").end_token_ids == lm.end_token_ids
    with pytest.raises(ValueError, match="'zebra' is no token"):
        unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", tmp_path / "no", end_token="zebra", **settings)


def test_a_token_with_a_meaning_is_no_mask_token(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    lm = unmask.load(tokenizer_and_model)
    lm.tokenizer.add_tokens([tf.AddedToken("<|im_end|>", special=True), tf.AddedToken("<|spare|>", special=True)])
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    lm.tokenizer.pad_token = "Ġwas"
    lm.model.generation_config.eos_token_id = [lm.tokenizer.convert_tokens_to_ids("Ġthe")]
    for recipe in ("efficient-dlm", "drafter"):
        for token in ("<s>", "</s>", "Ġwas", "Ġthe", "<|im_end|>"):
            with pytest.raises(ValueError, match=rf"mask_token '{token}' has a meaning already".replace("|", r"\|")):
                unmask.adapt(lm, stories, recipe, tmp_path / "run", show_progress=False, mask_token=token)
            assert not (tmp_path / "run").exists()
    for token in ("<|spare|>", "Ġday", "<|new|>"):
        unmask.hf.check_mask_token(lm.model, lm.tokenizer, token)


# --- what a block-wise model does not see


def test_infill_says_what_a_block_does_not_see(converted: Path) -> None:
    lm = unmask.load(converted)
    prefix, suffix = STORIES[0][:20], STORIES[0][30:60]
    before, after = (len(lm.tokenizer(text)["input_ids"]) for text in (prefix, suffix))
    length = 4 - before % 4 + 3
    seen = -(before + length) % 4
    with pytest.warns(
        UserWarning, match=rf"^{after - seen} of the {after} tokens of the suffix are not seen.*of 4, and"
    ):
        lm.infill(prefix, suffix, length, seed=0)
    with pytest.warns(UserWarning, match=r"of row 2 \(1 of 2 rows"):
        lm.infill([prefix, prefix], ["", suffix], length, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.infill(prefix, suffix, length, seed=0, attention="bidirectional")
        lm.infill(prefix, "", length, seed=0)


# --- seeds of rows


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_a_row_with_its_own_seed_is_sampled_as_alone(converted: Path, mode: str) -> None:
    lm = unmask.load(converted, dtype="float64")
    prompts = [STORIES[0][:20], STORIES[5][:31], STORIES[0][:20]]
    out = lm.generate(prompts, mode, 12, temperature=1.5, seed=[5, 6, 7])
    for text, prompt, seed in zip(out.texts, prompts, (5, 6, 7), strict=True):
        assert text == lm.generate(prompt, mode, 12, temperature=1.5, seed=seed).texts[0]
    assert len({out.texts[0], out.texts[2]}) == 2
    with pytest.raises(ValueError, match="seed has 2 numbers for 3 prompts"):
        lm.generate(prompts, mode, 12, seed=[1, 2])
