"""The Python interface as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import STORIES

import unmask
from unmask.sampling import Confidence, Threshold


@pytest.fixture(scope="module")
def lm(converted: Path) -> unmask.DiffusionLM:
    return unmask.load(converted)


@pytest.fixture(scope="module")
def parent(tokenizer_and_model: Path) -> unmask.DiffusionLM:
    return unmask.load(tokenizer_and_model)


def test_an_untouched_model_decodes_as_ar(parent: unmask.DiffusionLM) -> None:
    assert parent.diffusion is None
    out = parent.generate("Once there was", max_new_tokens=12)
    assert out.tokens_per_forward.tolist() == [1.0]
    assert out.tokens_per_cycle is None
    stock = parent.model.generate(**parent.tokenizer("Once there was", return_tensors="pt"), max_new_tokens=12,
                                  do_sample=False)  # fmt: skip
    n = int(out.num_new_tokens[0])
    assert torch.equal(out.sequences[0, : 3 + n], stock[0, : 3 + n])


def test_output_fields_agree_with_each_other(lm: unmask.DiffusionLM) -> None:
    prompts = ["Once", "Once there was a cat who liked", STORIES[3][:30]]
    out = lm.generate(prompts, max_new_tokens=10, select=Confidence(2))
    for row, prompt in enumerate(prompts):
        ids = lm.tokenizer(prompt)["input_ids"]
        n = int(out.num_new_tokens[row])
        assert out.sequences[row, : len(ids)].tolist() == ids
        new = out.sequences[row, len(ids) : len(ids) + n]
        assert (out.sequences[row, len(ids) + n :] == 1).all()  # no pad token: the end id
        text = lm.tokenizer.decode(torch.cat([torch.tensor(ids), new]), skip_special_tokens=True)
        assert prompt + out.texts[row] == text
    torch.testing.assert_close(out.tokens_per_forward, out.num_new_tokens / out.num_forwards)


def test_many_prompts_on_few_seats_and_a_window(lm: unmask.DiffusionLM, parent: unmask.DiffusionLM) -> None:
    prompts = ["Once", "Once there was a cat who liked", STORIES[3][:30], "The", "The grey mouse"]
    for model, mode in ((lm, "diffusion"), (lm, "ar"), (parent, "ar")):
        together = model.generate(prompts, mode=mode, max_new_tokens=10)
        queued = model.generate(prompts, mode=mode, max_new_tokens=10, batch_size=2)
        assert queued.texts == together.texts
        assert torch.equal(queued.num_forwards, together.num_forwards)
    whole = lm.generate(prompts, max_new_tokens=10, select=Confidence(2))
    assert lm.generate(prompts, max_new_tokens=10, select=Confidence(2), window=4).texts == whole.texts  # block of 4
    assert torch.equal(lm.generate("Once", max_new_tokens=9, window=1).num_forwards, torch.tensor([9]))
    with pytest.raises(
        ValueError, match=r"window=4 is not read by mode 'ar' \(Autoregressive\), .* or use mode='diffusion'"
    ):
        parent.generate("Once", window=4)
    with pytest.raises(ValueError, match="window 0 must be at least 1"):
        lm.generate("Once", window=0)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        lm.generate("Once", batch_size=0)


def test_prompts_come_as_text_ids_or_messages(lm: unmask.DiffusionLM) -> None:
    texts = ["Once there", "The grey mouse was"]
    by_text = lm.generate(texts, max_new_tokens=6)
    encoded = [lm.tokenizer(t)["input_ids"] for t in texts]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(e)) + e for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
    by_ids = lm.generate(ids, max_new_tokens=6, attention_mask=mask)
    assert by_ids.texts == by_text.texts
    assert torch.equal(by_ids.sequences, by_text.sequences)
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    try:
        by_messages = lm.generate([{"role": "user", "content": texts[0]}], max_new_tokens=6)
    finally:
        lm.tokenizer.chat_template = None
    assert by_messages.texts == by_text.texts[:1]


def test_an_empty_prompt_starts_from_the_begin_token(lm: unmask.DiffusionLM) -> None:
    out = lm.generate("", max_new_tokens=4)
    assert out.sequences[0, 0] == lm.tokenizer.bos_token_id


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_the_same_seed_gives_the_same_text_whoever_else_is_in_the_batch(lm: unmask.DiffusionLM, mode: str) -> None:
    options = {"mode": mode, "max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95}
    a = lm.generate("Once", seed=4, **options)
    assert lm.generate("Once", seed=4, **options).texts == a.texts
    assert lm.generate(["Once", "The cat"], seed=4, **options).texts[0] == a.texts[0]
    others = {lm.generate("Once", seed=s, **options).texts[0] for s in range(5, 10)}
    assert others != {a.texts[0]}
    assert len({lm.generate("Once", **options).texts[0] for _ in range(6)}) > 1  # no seed: a fresh one each time


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_stop_strings_end_a_row_and_leave_the_text(lm: unmask.DiffusionLM, mode: str) -> None:
    free = lm.generate("Once there was", mode=mode, max_new_tokens=20)
    stop = free.texts[0][3:5]
    out = lm.generate(["Once there was", "cat"], mode=mode, max_new_tokens=20, stop_strings=[stop, "never seen"])
    at = free.texts[0].index(stop)
    assert out.texts[0] == free.texts[0][:at]
    ids = lm.tokenizer("Once there was")["input_ids"]
    n = int(out.num_new_tokens[0])
    kept = lm.new_text(torch.tensor(ids), out.sequences[0, len(ids) : len(ids) + n].tolist())
    shorter = lm.new_text(torch.tensor(ids), out.sequences[0, len(ids) : len(ids) + n - 1].tolist())
    assert stop in kept
    assert stop not in shorter


def test_callback_sees_every_commit_once(lm: unmask.DiffusionLM) -> None:
    seen: dict[int, int] = {}

    def callback(row: int, positions: list[int], tokens: list[int]) -> None:
        assert row == 0
        assert not set(positions) & set(seen)
        seen.update(zip(positions, tokens, strict=True))

    out = lm.generate("Once there was", max_new_tokens=9, callback=callback, select=Threshold(0.3))
    n = int(out.num_new_tokens[0])
    start = out.sequences.shape[1] - n
    assert [seen[start + i] for i in range(n)] == out.sequences[0, start:].tolist()


def test_decoding_in_another_block_size(lm: unmask.DiffusionLM) -> None:
    out = lm.generate("Once there was", max_new_tokens=16, block_size=8, select=Threshold(0.0))
    start = len(lm.tokenizer("Once there was")["input_ids"])
    assert out.num_forwards[0] <= (start + 15) // 8 - start // 8 + 1


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_the_context_ends_a_row(lm: unmask.DiffusionLM, mode: str) -> None:
    prompts = ["Once there was", STORIES[0]]
    out = lm.generate(prompts, mode=mode, max_new_tokens=1000, block_size=None if mode == "ar" else 24)
    for prompt, n in zip(prompts, out.num_new_tokens.tolist(), strict=True):
        assert n <= 128 - len(lm.tokenizer(prompt)["input_ids"])
    assert out.sequences.shape[1] <= 128


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sideways"}, "mode 'sideways' is unknown"),
        ({"mode": "speculative"}, "mode 'speculative' is not available"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"block_size": 0}, "block_size 0"),
        ({"stop_strings": ""}, "stop string ''"),
    ],
)
def test_bad_requests_are_named(lm: unmask.DiffusionLM, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lm.generate("Once", **options)


def test_more_bad_requests(lm: unmask.DiffusionLM, parent: unmask.DiffusionLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'diffusion' is not available: this is an untouched AR model"):
        parent.generate("Once", mode="diffusion")
    with pytest.raises(ValueError, match="leaves no room in the model's context of 128: shorten it"):
        lm.generate("Once there was a cat " * 60)
    with pytest.raises(ValueError, match="messages need a chat template"):
        lm.generate([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="prompts is empty"):
        lm.generate([])
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        unmask.load(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        unmask.load("./nowhere")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        unmask.nothing  # noqa: B018
