"""Tokenizers in GGUF files: libllama gives the tokens that ours give; what it cannot is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from conftest import STORIES
from libllama.library import needs_libllama, run
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from unmask.export.gguf_file import write_model
from unmask.export.gguf_tokenizer import PRE_TOKENIZERS, vocabulary_of


@pytest.fixture(scope="module")
def words(tokenizer_and_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tokenizer_and_model)


_PIECES = [
    *"abcXYZstd  \n\t\r.,'!?0123456789\"-/<>|", "'s", "'LL", " I'M", "  ", "\n\n", "<s>", "</s>", "<0x41>", "\u2581",
    *"\u00e9\u00df\u4e2d\u6587\u0627\u0915\u03a9\u01c5\u0663\u00bd\u00b2\u00a0\u200b\u3000", "\U0001f600",
    "\U0001f469\u200d\U0001f467",
]  # fmt: skip


def odd_texts(count: int) -> list[str]:
    chosen = random.Random(0)
    return ["".join(chosen.choices(_PIECES, k=chosen.randint(1, 40))) for _ in range(count)]


TEXTS = ["qqq", "a qqq,qqq 12qqq", *STORIES, *odd_texts(1000)]


def tokenizer_file(tokenizer: Any, file: Path) -> Path:
    """A file that holds nothing of a model but its tokenizer."""
    config = tf.LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1)  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    write_model(file, model, "llama", vocabulary_of(tokenizer, len(tokenizer)), None, None, None)
    return file


def tokenised_otherwise(tokenizer: Any, texts: list[str], folder: Path) -> list[str]:
    """The texts that libllama gives other tokens."""
    llama = run(tokenizer_file(tokenizer, folder / "tokenizer.gguf"), context=0)
    odd = [t for t in texts if llama.tokenize(t) != tokenizer(t, split_special_tokens=True)["input_ids"]]
    llama.close()
    return odd


def byte_level(expressions: tuple[str, ...], ignore_merges: bool) -> Any:
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    splits = [digits if e == r"\p{N}" else pre_tokenizers.Split(Regex(e), "isolated") for e in expressions]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    bpe.train_from_iterator(TEXTS[2:], trainer)
    parts = json.loads(bpe.to_str())
    parts["model"]["vocab"]["qqq"] = len(parts["model"]["vocab"])  # no merges make it
    whole = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>")


@needs_libllama
@pytest.mark.parametrize("key", PRE_TOKENIZERS, ids=PRE_TOKENIZERS.get)
def test_libllama_tokenises_with_every_known_pre_tokenizer(key: tuple[tuple[str, ...], bool], tmp_path: Path) -> None:
    assert tokenised_otherwise(byte_level(*key), TEXTS, tmp_path) == []


def pieces(normalizer: Any, splitting: Any = None, **changes: Any) -> Any:
    """A tokenizer of sentencepiece's kind, with every merge that its vocabulary allows."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(STORIES * 9 + odd_texts(200), trainers.BpeTrainer(vocab_size=500, show_progress=False))
    found = [
        name for name in sorted(trained.get_vocab(), key=trained.get_vocab().get) if not set(name) & {"<", ">"}
    ] + ["<", ">"]
    spaces = ["▁" * n for n in range(2, 9) if "▁" * n not in found]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *found, *spaces]
    vocabulary = {name: i for i, name in enumerate(names)}
    scores = {name: -float(i) for i, name in enumerate(names)} | dict.fromkeys(spaces, -1e9)
    merges = generate_merges({n: i for n, i in vocabulary.items() if i > 258}, scores)
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    parts = json.loads(Tokenizer(bpe).to_str())
    parts |= {"normalizer": normalizer, "pre_tokenizer": splitting} | changes
    made = Tokenizer.from_str(json.dumps(parts))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": "▁"}
PIECES: dict[str, tuple[Any, Any, str]] = {
    "llama": ({"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}, None, ""),
    "gemma": (
        _REPLACE, {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}, "",
    ),
    "metaspace": (
        None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "texts that begin with a space",
    ),
    "metaspace alone": (
        None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}, "",
    ),
}  # fmt: skip


@needs_libllama
@pytest.mark.parametrize("name", PIECES)
def test_libllama_tokenises_as_sentencepiece_does(name: str, tmp_path: Path) -> None:
    normalizer, splitting, note = PIECES[name]
    tokenizer = pieces(normalizer, splitting)
    notes = vocabulary_of(tokenizer, len(tokenizer)).notes
    texts = [text for text in TEXTS if not note or text[0] not in " ▁"]
    texts = [text for text in texts if " " * 9 not in text]
    assert any(note in said for said in notes)
    assert tokenised_otherwise(tokenizer, texts, tmp_path) == []


@needs_libllama
@pytest.mark.parametrize("kind", ["words", "llama", "gemma"])
def test_added_tokens_that_are_ordinary_text_are_found_alike(kind: str, words: Any, tmp_path: Path) -> None:
    names = ["@@", "<tool>", "<tool", "ool>X", "  \n"]

    def add(parts: dict[str, Any]) -> None:
        first = 1 + max(parts["model"]["vocab"].values())
        plain = dict(parts["added_tokens"][0], special=False, normalized=False)
        parts["added_tokens"] += [dict(plain, id=first + i, content=name) for i, name in enumerate(names)]

    tokenizer = changed(words if kind == "words" else pieces(*PIECES[kind][:2]), add)
    texts = ["a@@b", "x <tool> y", "hi<tool", "a @@ b@@", "@@@", "end <toolX", "  \n \n  \n", "<tool>X", "b  \nc"]
    assert tokenised_otherwise(tokenizer, texts, tmp_path) == []


@needs_libllama
@pytest.mark.parametrize("name", ["models/stories260k", "models/babyllama-1m", "tokenizers/gpt2", "tokenizers/llama2",
                                  "tokenizers/qwen2"])  # fmt: skip
def test_libllama_tokenises_real_texts_with_real_tokenizers(name: str, shared: Path, tmp_path: Path) -> None:
    texts = (shared / "corpora" / "tinystories" / "test.txt").read_text().split("<|endoftext|>")[:300]
    rows = (shared / "corpora" / "childrens-classics" / "test.jsonl").read_text().splitlines()
    texts += [json.loads(row)["text"][i : i + 400] for row in rows[:50] for i in range(0, 1200, 400)]
    texts += TEXTS[:700]
    assert len(texts) >= 1000
    assert tokenised_otherwise(AutoTokenizer.from_pretrained(shared / name), [t for t in texts if t], tmp_path) == []


def changed(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(parts)), bos_token="<s>",
                                   eos_token="</s>")  # fmt: skip


REFUSED_TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "expression": (
        lambda p: p["pre_tokenizer"].update(
            type="Sequence", pretokenizers=[{"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated",
                                             "invert": False}, dict(p["pre_tokenizer"], use_regex=False)]),
        r"it splits texts by \['a\|b'\].*known are the pre-tokenizers gpt-2, smollm",
    ),
    "words": (lambda p: p.update(pre_tokenizer={"type": "Whitespace"}), "its last splitting step is Whitespace"),
    "prefix": (lambda p: p["pre_tokenizer"].update(add_prefix_space=True), "without a space before a text"),
    "normalizer": (lambda p: p.update(normalizer={"type": "Lowercase"}), "it changes texts by Lowercase"),
    "merges": (lambda p: p["model"].update(ignore_merges=True), "ignore_merges True"),
    "added": (
        lambda p: p["added_tokens"].append(dict(p["added_tokens"][0], id=len(p["model"]["vocab"]), content="@@",
                                                special=False, lstrip=True)),
        "its added token '@@' takes the space beside it",
    ),
    "template": (
        lambda p: p.update(post_processor={
            "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}},
                                                     {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}}),
        r"it puts \[1, '...'\] around a text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TOKENIZERS)
def test_tokenizers_that_llama_cpp_lacks_are_refused(name: str, words: Any) -> None:
    change, message = REFUSED_TOKENIZERS[name]
    with pytest.raises(ValueError, match=message):
        vocabulary_of(changed(words, change), len(words))


REFUSED_PIECES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unmerged": (lambda p: p["model"]["merges"].pop(5), "spell the token '.*' but are never merged"),
    "order": (
        lambda p: p["model"]["merges"].append(p["model"]["merges"].pop(next(
            i for i, (a, b) in enumerate(zip(p["model"]["merges"], p["model"]["merges"][1:], strict=False))
            if "".join(a) == "".join(b) and len({*"".join(a)}) > 1))),
        "other merges lie between",
    ),
    "spelled byte": (
        lambda p: p["model"]["vocab"].update({"0x41>": len(p["model"]["vocab"])}),
        "'<' and '0x41>' spell the token '<0x41>' but are never merged",
    ),
    "bytes": (lambda p: p["model"]["vocab"].update({"<other>": p["model"]["vocab"].pop("<0x41>")}), "255 of the 256"),
    "normalizer": (lambda p: p.update(normalizer={"type": "NFKC"}), r"it prepares texts by \['NFKC'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_PIECES)
def test_pieces_that_scores_cannot_order_are_refused(name: str) -> None:
    change, message = REFUSED_PIECES[name]
    tokenizer = changed(pieces(PIECES["llama"][0]), change)
    with pytest.raises(ValueError, match=message):
        vocabulary_of(tokenizer, len(tokenizer))


def test_a_vocabulary_larger_than_the_embedding_is_refused(words: Any) -> None:
    with pytest.raises(ValueError, match=f"its vocabulary has the id {len(words) - 1}, and the embedding"):
        vocabulary_of(words, len(words) - 1)


@needs_libllama
@pytest.mark.parametrize("template", ["{{ messages }}", {"default": "{{ messages }}", "tool_use": "{{ tools }}"}])
def test_chat_templates_are_in_the_file(template: Any, words: Any, tmp_path: Path) -> None:
    tokenizer = changed(words, lambda _: None)
    tokenizer.chat_template = template
    llama = run(tokenizer_file(tokenizer, tmp_path / "tokenizer.gguf"), context=0)
    assert llama.meta("tokenizer.chat_template") == "{{ messages }}"
    if isinstance(template, dict):
        assert llama.meta("tokenizer.chat_template.tool_use") == "{{ tools }}"
    llama.close()


def test_texts_that_llama_cpp_does_not_normalise_are_noted(words: Any) -> None:
    vocabulary = vocabulary_of(changed(words, lambda p: p.update(normalizer={"type": "NFC"})), len(words))
    assert vocabulary.notes == ("texts that are not in Unicode's form NFC get other tokens in llama.cpp",)


def test_unused_rows_and_masks_are_no_text(words: Any) -> None:
    vocabulary = vocabulary_of(words, len(words) + 4, (1,), range(len(words) + 2, len(words) + 4))
    assert vocabulary.types[len(words) :] == [5, 5, 3, 3]
    assert vocabulary.ids == {"bos": 0, "eos": 1}
    assert vocabulary.masks == range(len(words) + 2, len(words) + 4)
