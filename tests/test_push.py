"""`push_to_hub`, against a real server that answers as the hub does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import random_tokens
from fake_hub import Hub
from fake_hub import hub as hub

import unmask
from unmask.hf import push

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub to its own client


def test_a_pushed_model_is_loaded_from_the_hub(hub: Hub, converted: Path) -> None:
    lm = unmask.load(converted)
    address = lm.push_to_hub("me/pushed")
    assert address == f"{hub.address}/me/pushed/commit/{'a' * 40}"
    files = sorted(file.name for file in (hub.folder / "me" / "pushed").iterdir())
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    back = unmask.load("me/pushed")
    assert back.diffusion == lm.diffusion
    ids = random_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(back.model(ids).logits, lm.model(ids).logits)
    assert back.generate("Once").texts == lm.generate("Once").texts
    assert 'unmask.load("me/pushed")' in (hub.folder / "me" / "pushed" / "README.md").read_text()


def test_a_name_without_an_owner_is_ones_own(hub: Hub, tokenizer_and_model: Path) -> None:
    lm = unmask.load(tokenizer_and_model)
    lm.push_to_hub("plain", commit_message="First", private=True, token="hf_x", create_pr=False)
    assert [commit["summary"] for commit in hub.commits] == ["First"]
    assert "diffusion" not in (hub.folder / "me" / "plain" / "README.md").read_text()
    (hub.folder / "me" / "plain" / "README.md").write_text("mine")
    assert lm.push_to_hub("plain", create_pr=True, token="hf_x") == f"{hub.address}/me/plain/discussions/1"
    assert (hub.folder / "me" / "plain" / "README.md").read_text() == "mine"


def test_a_drafter_says_that_its_base_is_local(
    hub: Hub, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    lm = unmask.adapt(tokenizer_and_model, stories, "drafter", tmp_path / "drafter", drafter_rank=2, max_tokens=64,
                      max_length=32, block_size=4, batch_size=2, show_progress=False)  # fmt: skip
    with pytest.warns(UserWarning, match="the base .* of this drafter is a folder of this machine"):
        lm.push_to_hub("me/drafter")
    assert not (hub.folder / "me" / "drafter" / "model.safetensors").exists()
    back = unmask.load("me/drafter", base=tokenizer_and_model)
    assert back.generate("Once", max_new_tokens=8).texts == lm.generate("Once", max_new_tokens=8).texts


def test_what_the_hub_refuses_is_one_line_and_nothing_is_saved(hub: Hub, converted: Path) -> None:
    hub.token = "hf_right"
    lm = unmask.load(converted)
    with pytest.raises(ValueError, match=r"cannot be pushed to 'me/x': .*403.*; log in with `hf auth login`") as raised:
        lm.push_to_hub("me/x", token="hf_wrong")
    assert "\n" not in str(raised.value)
    assert hub.commits == []
    lm.push_to_hub("me/x", token="hf_right")
    assert len(hub.commits) == 1
    with pytest.raises(
        ValueError, match=r"cannot be pushed to 'a/b/c': HFValidationError.*give a name such as 'me/model'"
    ):
        lm.push_to_hub("a/b/c")
    with pytest.raises(ValueError, match="not finite"):
        push("me/y", lambda _: (_ for _ in ()).throw(ValueError("not finite")), None, None, token="hf_right")
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(ValueError, match="cannot be pushed to 'me/x': ConnectError"):
        lm.push_to_hub("me/x", token="hf_right")


def test_without_the_hub_it_says_how_to_go_on(converted: Path) -> None:
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE keeps from asking the hub: unset it, or write a folder with"):
        unmask.load(converted).push_to_hub("me/x")
