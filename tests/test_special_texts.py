"""Text that spells special tokens: tokenizers that cannot split it, template texts, end tokens, reused masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import _GQA, tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import unmask
from unmask.core.drafter import DrafterConfig
from unmask.data.documents import load_corpus
from unmask.data.plain_text import encode, ids_of, rendered_ids
from unmask.data.supervised import Completion, Conversation, apply_template, encode_example
from unmask.hf import add_drafter

WORDS = ["<unk>", "<s>", "</s>", "<mask>", "the", "cat", "sat", "on", "a", "mat"]
SHORT: dict[str, Any] = {
    "show_progress": False, "max_tokens": 256, "max_length": 32, "batch_size": 2, "block_size": 4,
}  # fmt: skip
CHAT = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """Whole words: it reads "<mask>" as that token however it is asked."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **special
    )


def prefixing_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, with a space put in front of every text, as Llama 2's tokenizer does."""
    letters = {c: i for i, c in enumerate(["<unk>", "</s>", *"▁\nabcdefghijklmnopqrstuvwxyz[]</>"])}
    made = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>", chat_template=CHAT)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    sizes = {"vocab_size": len(WORDS), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    tiny_model(tf.LlamaConfig(**(_GQA | sizes))).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text", ["the <mask> cat", "the cat </s> sat"])
def test_a_tokenizer_that_cannot_split_is_an_error_that_names_the_document(text: str, tmp_path: Path) -> None:
    tokenizer = word_tokenizer(mask_token="<mask>")
    for call in (ids_of, lambda t, x: encode(t, ["the cat", x])):
        with pytest.raises(ValueError, match=f"'{text}' spells the special token"):
            call(tokenizer, text)
    file = tmp_path / "d.jsonl"
    odd: list[dict[str, str]] = [{"text": text}, {"prompt": "the", "completion": text}]
    for record in odd:
        file.write_text("".join(json.dumps(r) + "\n" for r in ({"text": "the cat"}, record)))
        with pytest.raises(ValueError, match=rf"d.jsonl.*{text}.*skip_invalid=true"):
            load_corpus([file], tokenizer, end_token_id=2)
        assert load_corpus([file], tokenizer, end_token_id=2, skip_invalid=True).tokens.tolist() == [4, 5, 2]
    assert ids_of(tokenizer, "a <unk> dog") == [8, 0, 0]  # a word that is not known


def test_special_tokens_of_the_tokenizers_own_are_none_of_the_texts(tokenizer_and_model: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tokenizer_and_model)
    ends = [("<s>", 0), ("</s>", 1)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    ids = ids_of(tokenizer, "a<s></s>")
    assert (ids[0], ids[-1]) == (0, 1)
    assert not {0, 1} & set(ids[1:-1])


def test_what_a_message_spells_keeps_its_spaces() -> None:
    tokenizer = prefixing_tokenizer()
    messages = [{"role": "user", "content": "a</s>b </s></s> c"}]
    ids = rendered_ids(tokenizer, apply_template(tokenizer, messages))
    assert tokenizer.decode(ids) == "[user] a</s>b </s></s> c</s>"
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_message_may_hold_any_character_and_need_hold_no_text(tokenizer_and_model: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tokenizer_and_model)
    tokenizer.chat_template = CHAT

    def read(message: dict[str, Any]) -> list[int]:
        return rendered_ids(tokenizer, apply_template(tokenizer, [message]))

    odd = "".join(map(chr, range(0x100000, 0x100008)))
    ids = read({"role": "r</s>", "content": f"{odd}<s>"})
    assert tokenizer.decode(ids) == f"[r</s>] {odd}<s></s>"
    assert (ids.count(0), ids.count(1)) == (0, 1)
    for content in ({}, {"content": None}, {"content": [{"type": "text", "text": "</s>"}]}):
        assert read({"role": "user", **content}).count(1) == 1


def test_an_end_token_inside_an_answer_does_not_stand_for_its_end(tokenizer_and_model: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(tokenizer_and_model)
    (end,) = ids_of(tokenizer, ".")
    ((ids, learnt),) = encode_example(tokenizer, Completion("Say:", " one. two"), end)
    assert ids[-1] == end
    assert learnt[-1]
    ((ids, _),) = encode_example(tokenizer, Completion("Say:", " one. two."), end)
    assert ids[-2:] != [end, end]
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    chat = Conversation([{"role": "user", "content": "x"}, {"role": "assistant", "content": "one. two"}])
    ((ids, _),) = encode_example(tokenizer, chat, end)
    assert ids[-1] == end


# --- a mask token that stands in the text by nature


@pytest.mark.parametrize("recipe", ["tri-mode", "efficient-dlm"])
def test_a_reused_mask_is_neither_learnt_nor_scored(parent: Path, tmp_path: Path, recipe: str) -> None:
    text = tmp_path / "w.txt"
    text.write_text("<|endoftext|>".join(["the cat sat on a dog and the cat sat"] * 200))
    lm = unmask.adapt(parent, text, recipe, tmp_path / "run", mask_token="<unk>", **SHORT)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    figures = record["evaluation"]
    assert figures
    before = unmask.load(parent)
    ids = torch.tensor(before.tokenizer("the cat sat on a dog and the cat sat")["input_ids"])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(before.model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
    read = ids[1:] != before.tokenizer.unk_token_id
    assert not read.all()
    assert record["parent_nll"] == pytest.approx(losses[read].mean().item(), rel=1e-5)
    assert all(isinstance(value, float) for value in figures.values()), figures
    with pytest.raises(ValueError, match="mask token"):
        lm.nll("the dog sat")


def test_a_choice_of_probability_0_is_an_error(parent: Path, tmp_path: Path) -> None:
    from choices import choice_document, mean_over_levels

    text = tmp_path / "w.txt"
    text.write_text("<|endoftext|>".join(["the cat sat on a mat"] * 200))
    lm = unmask.adapt(parent, text, "efficient-dlm", tmp_path / "run", mask_token="<unk>", **SHORT)
    assert lm.diffusion is not None
    document = choice_document(lm.tokenizer, "the cat", "sat on a dog")
    with pytest.raises(ValueError, match="document 1 has a likelihood of 0"):
        mean_over_levels(lm.network, lm.diffusion, [document], levels=4)


def test_a_drafters_masks_need_ids_of_their_own(parent: Path) -> None:
    model = unmask.load(parent).model
    with pytest.raises(ValueError, match=r"'<mask>'.*new token"):
        add_drafter(model, word_tokenizer(), DrafterConfig(2, 4.0, "all", 1), token="<mask>")
    with pytest.raises(ValueError, match=r"'<mask>'.*new token"):
        add_drafter(model, word_tokenizer(mask_token="<mask>"), DrafterConfig(2, 4.0, "all", 4), token="<mask>")
    assert add_drafter(model, word_tokenizer(), DrafterConfig(2, 4.0, "all", 4)).mask_token_id == len(WORDS)
    for rows, first in ((1, WORDS.index("<mask>")), (4, len(WORDS))):  # the base's own mask where nothing follows it
        drafter = add_drafter(model, word_tokenizer(mask_token="<mask>"), DrafterConfig(2, 4.0, "all", rows))
        assert drafter.mask_token_id == first
