"""Long texts in pieces: ids and bytes are those of `tokenizer(text)`, or the text is tokenised whole and said to be."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import STORIES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unmask.data import pieces
from unmask.data.documents import tokenize
from unmask.data.pieces import Cuts, cuts_of, long_ids, long_ids_and_bytes
from unmask.data.token_bytes import bytes_of_tokens
from unmask.evaluation.likelihood import documents_of
from unmask.progress import Note

NAMES = ("gpt2", "llama2", "qwen2", "stories260k", "babyllama-1m")
WORDS = [
    "the",
    " cat",
    "don't",
    "I'll ",
    "A",
    "ÀÉö",
    "дом ",
    "水の",
    "한글",
    "１２",
    "12345",
    " 7",
    "...",
    "!\n",
    "x = [1];",
]
BLANKS = [" ", "  ", "\n", "\r\n", "\n\n  ", "\t", "\u00a0", "\u2028", "\u3000", " \n", "a \n b"]
ODD = ["<|endoftext|>", "</s>", "<s>", "<unk>", "<|im_end|>", "▁", "▁the ", "<0x0A>", "Ġ", "e\u0301 ", "e ̈", "☂", "🙂 "]
PARTS = st.one_of(st.sampled_from(WORDS), st.sampled_from(BLANKS), st.sampled_from(ODD), st.text(max_size=5))
TEXTS = st.lists(PARTS, min_size=1, max_size=40).map("".join)


def load(shared: Path, name: str) -> Any:
    folder = "tokenizers" if name in ("gpt2", "llama2", "qwen2") else "models"
    return AutoTokenizer.from_pretrained(shared / folder / name)


def whole(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    encoded = tokenizer(text, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
    rows, offsets = [encoded["input_ids"]], [encoded["offset_mapping"]]
    return rows[0], bytes_of_tokens(tokenizer, [text], rows, offsets)[0]


@pytest.fixture(autouse=True)
def notes_are_errors(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(pieces, "PIECE", 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Note)
        yield


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_pieces_are_those_of_the_text(shared: Path, name: str) -> None:
    tokenizer = load(shared, name)

    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS)
    def check(text: str) -> None:
        text = text.encode("utf-8", "ignore").decode()
        ids, num_bytes = long_ids_and_bytes(tokenizer, text)
        expected = whole(tokenizer, text)
        assert ids.tolist() == expected[0] == long_ids(tokenizer, text).tolist()
        assert num_bytes.sum() == sum(expected[1]) == len(text.encode())
        if "▁" not in text:  # where a text has the letter that stands for a space, tokens may share it in two ways
            assert num_bytes.tolist() == expected[1]

    check()


@pytest.mark.parametrize("name", NAMES)
def test_real_text_is_cut_often_and_right(shared: Path, name: str) -> None:
    tokenizer = load(shared, name)
    text = (shared / "corpora" / "tinystories" / "valid.txt").read_text()[:60_000]
    cuts = cuts_of(tokenizer)
    assert isinstance(cuts, Cuts)
    assert max(map(len, cuts.pieces(text))) < 200
    assert long_ids(tokenizer, text).tolist() == whole(tokenizer, text)[0]


def test_a_tokenizer_of_the_tests_own_is_cut_too(tokenizer_and_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents of a corpus and of a likelihood are read in pieces above `LONG` characters."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    text = " ".join(STORIES)
    for long in (pieces.LONG, 10):
        for module in ("data.documents", "evaluation.likelihood"):
            monkeypatch.setattr(f"unmask.{module}.LONG", long)
        ids = [row.tolist() for row in tokenize(tokenizer, [text, "a", text], 1)]
        assert ids == [[*tokenizer(t)["input_ids"], 1] for t in (text, "a", text)]
        documents = documents_of(tokenizer, ["a", text], None)
        assert documents[1].ids.tolist() == ids[0][:-1]
        assert documents[1].num_bytes.tolist() == whole(tokenizer, text)[1]
        assert int(documents[1].num_bytes.sum()) == len(text.encode())


def built(vocab: list[str], pre: Any = None, normalizer: Any = None, merges: Any = (), **options: Any) -> Any:
    model = models.BPE({token: i for i, token in enumerate(vocab)}, list(merges), unk_token="?", **options)
    backend = Tokenizer(model)
    if pre is not None:
        backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def split(pattern: str, **options: Any) -> Any:
    return pre_tokenizers.Split(Regex(pattern), **({"behavior": "isolated"} | options))


CHARACTERS = ["?", "▁", "Ġ", *"abcdefghijklmnopqrstuvwxyz"]
SPACES = normalizers.Replace(" ", "▁")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (built(CHARACTERS, split(r'"[^"]*"|\s+')), "pre-tokenizer is unknown: Split"),
        (built(CHARACTERS, split(LLAMA3 + r"|(?<=a) b")), "pre-tokenizer is unknown"),
        (built(CHARACTERS, split(LLAMA3, behavior="merged_with_next")), "pre-tokenizer is unknown"),
        (built(CHARACTERS, split(r"\p{N}{1,3}|\s+")), "pre-tokenizer is unknown"),
        (built(CHARACTERS, pre_tokenizers.ByteLevel(use_regex=False)), "pre-tokenizer is unknown: ByteLevel"),
        (built(CHARACTERS, pre_tokenizers.ByteLevel(), normalizers.Lowercase()), "normaliser is unknown: Lowercase"),
        (built(CHARACTERS, pre_tokenizers.ByteLevel(), dropout=0.1), "drops merges"),
        (built([*"?▁ab", "a▁", "b▁"], None, SPACES, [("a", "▁"), ("b", "▁")]), "every letter has a token"),
    ],
)  # fmt: skip
def test_what_is_not_proved_is_tokenised_whole_and_said(tokenizer: Any, reason: str) -> None:
    text = 'the "cat sat" on a mat and b did not'
    with pytest.warns(Note, match=f"a text of {len(text)} characters is tokenised in one piece.*{reason}"):
        ids, num_bytes = long_ids_and_bytes(tokenizer, text)
    if "drops" not in reason:
        assert ids.tolist() == whole(tokenizer, text)[0]
        assert num_bytes.tolist() == whole(tokenizer, text)[1]


@pytest.mark.parametrize("token", [
    AddedToken("cat sat"), AddedToken("cat", rstrip=True), AddedToken("sat", single_word=True),
])  # fmt: skip
def test_an_added_token_that_may_reach_over_a_cut_forbids_cuts(token: AddedToken) -> None:
    tokenizer = built(CHARACTERS, pre_tokenizers.ByteLevel())
    assert isinstance(cuts_of(tokenizer), Cuts)
    tokenizer.add_tokens([token])
    assert f"added token {token.content!r}" in str(cuts_of(tokenizer))


@pytest.mark.parametrize(
    "tokenizer",
    [
        built(CHARACTERS, split(LLAMA3)),
        built(CHARACTERS, pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel()])),
        built(CHARACTERS, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        built(CHARACTERS, pre_tokenizers.WhitespaceSplit()),
        built(CHARACTERS, pre_tokenizers.Metaspace(split=False)),
        built(CHARACTERS, pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
        built([*CHARACTERS, "a▁", "▁b"], None, SPACES, [("a", "▁"), ("▁", "b")]),  # no cut behind an a
        built([*CHARACTERS, "a▁b", "a▁", "▁▁"], None, SPACES, [("a", "▁"), ("a▁", "b"), ("▁", "▁")]),
    ],
)
def test_other_tokenizers_of_known_parts_are_cut_right(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("  "), AddedToken("<x>", lstrip=True)])

    @settings(max_examples=60, deadline=None)
    @given(text=st.lists(st.sampled_from(["a", "b", "ab", "the ", " ", "  ", "\n", "1", ".", " <x>", "<x>", "'s "]),
                         min_size=1, max_size=40).map("".join))  # fmt: skip
    def check(text: str) -> None:
        assert long_ids(tokenizer, text).tolist() == whole(tokenizer, text)[0]

    assert isinstance(cuts_of(tokenizer), Cuts)
    check()


def test_memory_does_not_grow_with_a_text(tokenizer_and_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held beside text and ids, while a text is read: as much for one four times as long."""
    monkeypatch.setattr(pieces, "PIECE", 1 << 12)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_and_model)
    story = " ".join(STORIES)
    peaks = []
    for times in (1, 4):
        text = story * (300_000 * times // len(story))
        long_ids(tokenizer, text[:10_000])
        tracemalloc.start()
        ids = long_ids(tokenizer, text)
        peaks.append(tracemalloc.get_traced_memory()[1] - 2 * ids.nbytes)
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_the_patterns_of_the_real_tokenizers_are_known(shared: Path) -> None:
    for name in ("gpt2", "qwen2"):
        steps = json.loads(load(shared, name).backend_tokenizer.to_str())["pre_tokenizer"]
        assert any(map(pieces._splits_words, pieces._steps(steps, "pretokenizers")))
    assert np.issubdtype(long_ids(load(shared, "gpt2"), "a b").dtype, np.int32)
