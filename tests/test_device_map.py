"""Maps of devices: to one device they load as without, and several are refused in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import unmask
from unmask.conversion import job

SPREAD = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
          "lm_head": "cpu"}  # fmt: skip


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"])
def test_a_map_to_one_device_changes_nothing(device_map: Any, tokenizer_and_model: Path) -> None:
    if device_map == "auto" and torch.accelerator.is_available():
        pytest.skip("takes what this machine has")
    mapped, plain = unmask.load(tokenizer_and_model, device_map=device_map), unmask.load(tokenizer_and_model, "cpu")
    for lm in (mapped, plain):
        assert lm.network.device.type == "cpu"
    texts = [lm.generate("Once upon", max_new_tokens=6).texts for lm in (mapped, plain)]
    assert texts[0] == texts[1]


def test_a_map_to_several_is_refused_before_weights_are_read(
    tokenizer_and_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unmask.hf.checkpoint.AutoModelForCausalLM", None)
    with pytest.raises(ValueError, match=r"device_map spreads it over cpu, disk, .*give device=, .*FSDP2") as refused:
        unmask.load(tokenizer_and_model, device_map=SPREAD)
    assert str(tokenizer_and_model) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_word_that_spreads_a_model_is_refused_too(tokenizer_and_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As "auto" does where a model does not fit on the first device."""
    load = unmask.hf.checkpoint.AutoModelForCausalLM.from_pretrained

    def spreading(*given: Any, **named: Any) -> Any:
        assert named.pop("device_map") == "auto"
        model, info = load(*given, **named)
        model.hf_device_map = {"model": 0, "lm_head": 1}
        return model, info

    monkeypatch.setattr("unmask.hf.checkpoint.AutoModelForCausalLM.from_pretrained", spreading)
    with pytest.raises(ValueError, match="device_map spreads it over 0, 1, and masks"):
        unmask.load(tokenizer_and_model, device_map="auto")


@pytest.mark.parametrize(
    ("device", "name", "expected"),
    [
        (torch.device("cuda", 1), "folder", {"device_map": {"": torch.device("cuda", 1)}}),
        (torch.device("cuda", 1), "file.gguf", {"device": torch.device("cuda", 1)}),
        (torch.device("cpu"), "folder", {"device": torch.device("cpu")}),
        ("cpu", "folder", {"device": "cpu"}),
        (None, "folder", {"device": None}),
    ],
)
def test_a_process_reads_weights_straight_to_its_gpu(
    device: Any, name: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_device", lambda: device)
    assert job._place(name) == expected


def test_each_process_has_the_device_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate's, which is that of LOCAL_RANK; the CPU where the processes share the weights out."""
    own = torch.device("cuda", 3)
    monkeypatch.setattr(job, "join", lambda: SimpleNamespace(num_processes=8, device=own))
    assert job._device() == own
    monkeypatch.setattr(job, "sharding", lambda: True)
    assert job._device() == "cpu"
