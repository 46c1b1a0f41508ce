"""Text that spells a special token is ordinary text, wherever text comes in; chat templates alone make special ones."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from choices import choice_document
from transformers import AutoTokenizer

import unmask
from unmask.cli.app import main
from unmask.data.documents import load_corpus
from unmask.data.plain_text import encode, ids_of, rendered_ids
from unmask.data.supervised import Completion, Conversation, apply_template, encode_example

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def lm(converted: Path) -> unmask.DiffusionLM:
    lm = unmask.load(converted)
    lm.tokenizer.chat_template = CHAT
    return lm


def spelt(lm: unmask.DiffusionLM) -> str:
    return f"The cat {lm.tokenizer.mask_token} sang</s> and <s> ran."


def special(lm: unmask.DiffusionLM, ids: Any) -> list[int]:
    return [int(i) for i in ids if int(i) in lm.tokenizer.all_special_ids]


def test_documents_prompts_answers_and_choices_hold_no_special_tokens(lm: unmask.DiffusionLM, tmp_path: Path) -> None:
    text, tokenizer = spelt(lm), lm.tokenizer
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    corpus = load_corpus([tmp_path / "a.jsonl"], tokenizer, end_token_id=1)
    ids, _ = corpus.document(0)
    assert special(lm, ids) == [1]  # the end token, where the document ends
    assert tokenizer.decode(ids[:-1]) == text
    assert special(lm, lm.prompt_ids(text)[0]) == []
    ((ids_, mask),) = encode_example(tokenizer, Completion("Say: ", text), 1)
    assert special(lm, ids_) == [1]
    assert mask[-1]
    assert special(lm, choice_document(tokenizer, "Once", " " + text).ids) == []


def test_scores_of_such_texts_are_finite_and_count_every_byte(lm: unmask.DiffusionLM) -> None:
    text = spelt(lm)
    nll, nelbo = lm.nll(text)[0], lm.nelbo(text, num_samples=2, seed=0)[0]
    assert 0 < nll.nats < float("inf")
    assert 0 < nelbo.nats < float("inf")
    assert torch.isfinite(lm.embed([text])).all()
    out = lm.infill(text, text, 3, seed=0)
    assert lm.tokenizer.decode(out.sequences[0]).count(lm.tokenizer.mask_token) == 2


def test_a_message_cannot_end_its_turn(lm: unmask.DiffusionLM) -> None:
    tokenizer = lm.tokenizer
    plain = [{"role": "user", "content": " Sing. "}, {"role": "assistant", "content": "La."}]
    odd = [{"role": "user", "content": spelt(lm)}, {"role": "assistant", "content": "La </s> la."}]
    expected = tokenizer.apply_chat_template(plain, tokenize=True, return_dict=True)["input_ids"]
    assert rendered_ids(tokenizer, apply_template(tokenizer, plain)) == expected
    ids = rendered_ids(tokenizer, apply_template(tokenizer, odd))
    assert special(lm, ids) == special(lm, expected)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(odd, tokenize=False)
    ((ids, mask),) = encode_example(tokenizer, Conversation(odd), 1)
    assert special(lm, ids) == special(lm, expected)
    learnt = [i for i, keep in zip(ids, mask, strict=True) if keep]
    assert tokenizer.decode(learnt) == "La </s> la.</s>"
    assert special(lm, lm.prompt_ids(odd[:1])[0]) == special(lm, expected)[:3]


def test_a_tokenizer_goes_on_reading_special_tokens_for_others(lm: unmask.DiffusionLM) -> None:
    before = lm.tokenizer("a</s>")["input_ids"]
    ids_of(lm.tokenizer, "a</s>")
    assert lm.tokenizer("a</s>")["input_ids"] == before


@pytest.mark.parametrize("name", ["gpt2", "llama2", "qwen2"])
def test_real_tokenizers_split_what_they_would_join(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    text = f"a <|mask|>b {tokenizer.eos_token} c"
    own = len(tokenizer("")["input_ids"])
    for ids in (ids_of(tokenizer, text), encode(tokenizer, [text, "x"])["input_ids"][0]):
        assert not set(ids[own:]) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids[own:]) == text
    assert ids_of(tokenizer, "no such thing") == tokenizer("no such thing")["input_ids"]


# --- a drafter, whose base has no row for the mask


@pytest.fixture(scope="module")
def drafter(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> unmask.DiffusionLM:
    folder = tmp_path_factory.mktemp("drafter") / "run"
    return unmask.adapt(tokenizer_and_model, stories, "drafter", folder, show_progress=False, max_tokens=256,
                        max_length=32, batch_size=2, block_size=4, drafter_rank=2)  # fmt: skip


def test_a_drafter_reads_the_masks_text_as_text(drafter: unmask.DiffusionLM) -> None:
    text = spelt(drafter)
    assert (
        drafter.generate(text, max_new_tokens=5, mode="speculative").texts
        == drafter.generate(text, max_new_tokens=5, mode="ar").texts
    )
    assert drafter.nll(text)[0].nats < float("inf")
    assert drafter.nelbo(text, num_samples=1, seed=0)[0].nats < float("inf")


def test_what_a_drafters_base_cannot_read_is_refused(drafter: unmask.DiffusionLM) -> None:
    assert drafter.diffusion is not None
    with pytest.raises(ValueError, match="guidance_scale"):
        drafter.generate("Once", mode="diffusion", guidance_scale=2.0, max_new_tokens=3)
    with pytest.raises(ValueError, match="attention 'bidirectional'"):
        drafter.infill("Once", "end", 3, attention="bidirectional")
    with pytest.raises(ValueError, match=f"token id {drafter.diffusion.mask_token_id}"):
        drafter.generate(torch.tensor([[3, drafter.diffusion.mask_token_id]]), max_new_tokens=3)


# --- text that is no text


def test_half_a_character_is_refused_wherever_text_comes_in(lm: unmask.DiffusionLM) -> None:
    odd = "The cat \ud83d sang"
    calls: list[Any] = [
        lambda: lm.generate(odd, max_new_tokens=2), lambda: lm.generate(["The", odd], max_new_tokens=2),
        lambda: lm.generate([{"role": "user", "content": odd}], max_new_tokens=2), lambda: lm.infill("The", odd, 2),
        lambda: lm.nll([odd]), lambda: lm.nelbo(odd, num_samples=1), lambda: lm.embed([odd]),
        lambda: choice_document(lm.tokenizer, "Once", odd),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"lone surrogate '\\ud83d' at character \d+ of "):
            call()


def test_standard_input_is_utf8_in_every_locale(
    converted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(given: bytes, locale: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding=locale))
        monkeypatch.setattr(sys, "argv", ["unmask", "generate", str(converted), "-", "--max-new-tokens", "2", "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    texts = set()
    for locale in ("ascii", "latin-1", "utf-8"):
        for given in (b"Once \xe2\x98\x82", b"\xef\xbb\xbfOnce \xe2\x98\x82"):
            texts.add(generate(given, locale)[1])
        code, out, err = generate(b"Once \xff", locale)
        assert (code, out) == (2, "")
        assert r"lone surrogate '\udcff' at character 6" in err.splitlines()[-1]
    assert len(texts) == 1
    assert json.loads(texts.pop())["num_new_tokens"] == 2
