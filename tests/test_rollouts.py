"""Text of the model's own: what AR decoding would write, made once."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import STORIES
from decode import sample_autoregressive

import unmask
from unmask.data.documents import Corpus, load_corpus
from unmask.data.packing import PackState
from unmask.training.batches import packed_documents
from unmask.training.rollouts import LONGEST_PROMPT, rewritten_text, roll_out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollouts_are_ar_continuations_and_are_made_once(
    temperature: float, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    lm = unmask.load(tokenizer_and_model, dtype=torch.float64)
    prompts = load_corpus([stories], lm.tokenizer)
    options = {"author": "x", "num_tokens": 1000, "max_length": 40, "temperature": temperature, "seed": 3}
    made = roll_out(lm.network, prompts, tmp_path, **options)
    assert made.num_tokens >= 1000
    assert {len(made[i]) for i in range(len(made))} == {40}
    if temperature == 0:
        for i in range(5):  # from its 32nd token on at the latest, a document is what greedy decoding makes of it
            start = torch.from_numpy(made[i][:LONGEST_PROMPT].astype("int64"))
            again = sample_autoregressive(lm.network, [start], max_new_tokens=8).new_tokens[0]
            assert again == made[i][LONGEST_PROMPT:].tolist()
            length = next(n for n in range(len(made[i])) if n == 39 or made[i][n] != prompts[i][n])
            assert made[i][:length].tolist() == prompts[i][:length].tolist()
    file = next(tmp_path.glob("rollouts-*.npz"))
    before = file.stat().st_mtime_ns
    again = roll_out(lm.network, prompts, tmp_path, **options)
    assert again.fingerprint == made.fingerprint
    assert file.stat().st_mtime_ns == before
    roll_out(lm.network, prompts, tmp_path, **(options | {"author": "y"}))
    assert len(list(tmp_path.glob("rollouts-*.npz"))) == 2


def test_end_tokens_end_a_rollout(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    lm = unmask.load(tokenizer_and_model)
    prompts = load_corpus([stories], lm.tokenizer)
    made = roll_out(lm.network, prompts, tmp_path, author="x", num_tokens=300, max_length=30, temperature=1.0,
                    end_token_ids=range(2, 150))  # fmt: skip
    assert min(len(made[i]) for i in range(len(made))) < 30


def test_text_is_written_anew_every_so_many_steps_and_goes_on_in_the_middle() -> None:
    model, written = torch.nn.Linear(1, 1), []
    settings = SimpleNamespace(self_every=3, max_tokens=1, max_length=4, batch_size=2, seed=0)

    def text(step: int) -> Corpus:
        return Corpus(np.arange(5, dtype=np.int32) + 10 * step, np.array([0, 5]), f"{step}")

    def write(step: int) -> Corpus:
        assert not model.training
        written.append(step)
        return text(step)

    data = rewritten_text(packed_documents(settings, text(0)), settings, model, write)
    straight = list(itertools.islice(data.batches(0, PackState()), 8))
    assert written == [0, 3, 6]
    assert [int(batch.x0[0, 0]) // 30 for batch, _ in straight] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert model.training
    for step in range(1, 8):
        resumed = next(data.batches(step, straight[step - 1][1]))
        assert written[-1] == step - step % 3
        assert torch.equal(resumed[0].x0, straight[step][0].x0)
        assert resumed[1] == straight[step][1]


def test_adapt_trains_on_the_models_own_text(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    options = {"show_progress": False, "max_tokens": 1500, "max_length": 32, "block_size": 4, "batch_size": 4}
    lm = unmask.adapt(tokenizer_and_model, "self", "drafter", tmp_path / "run", self_prompts=str(stories), **options)
    assert len(list(tmp_path.glob("rollouts-*.npz"))) == 1
    ar, fast = (lm.generate(STORIES[0][:9], mode=mode, max_new_tokens=8) for mode in ("ar", "speculative"))
    assert fast.texts == ar.texts
    for data, more, message in (
        ("self", {}, "self_prompts=None"),
        (stories, {"self_prompts": str(stories)}, "needs --data self alone"),
        ("self", {"self_prompts": str(stories), "max_tokens": None}, "--max-tokens or self_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            unmask.adapt(tokenizer_and_model, data, "drafter", tmp_path / "bad", **(options | more))
