"""Folders that are not what they should be: one ValueError of one line, which names the file or the weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import unmask


def written(name: str, text: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def changed(name: str, *keys: str, to: Any) -> Callable[[Path], None]:
    """Sets (or with to=... removes) an entry of a JSON file."""

    def change(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        place = raw
        for key in keys[:-1]:
            place = place[key]
        if to is ...:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to
        (folder / name).write_text(json.dumps(raw))

    return change


def tensors(
    change: Callable[[dict[str, torch.Tensor]], Any], name: str = "model.safetensors"
) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, metadata={"format": "pt"})

    return damage


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(share * len(whole))])

    return damage


def poisoned(held: dict[str, torch.Tensor], value: float) -> None:
    next(iter(held.values())).view(-1)[3] = value


def pickled(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


DIFFUSION: dict[str, Any] = {
    "mask_token_id": [-1, 10**6, "x", 1.5, None, True, ...],
    "attention": ["sideways", 3, None, ...],
    "clean_attention": ["sideways", None, 4],
    "block_size": [0, -4, "4", 2.5, None, 10**6],
    "shift": ["no", 0, None],
    "noisy_attention": ["sideways", 1],
    "mask_rows": [0, -1, "one"],
    "recipe": [7],
}
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "configuration, empty": (written("config.json", ""), "config.json"),
    "configuration, half": (cut("config.json", 0.5), "config.json"),
    "configuration, a list": (written("config.json", "[1]"), "config.json"),
    "configuration, bytes": (written("config.json", b"\xff\xfe\x00"), "config.json"),
    "configuration, deep": (written("config.json", "[" * 100_000), "config.json"),
    "configuration, model type": (changed("config.json", "model_type", to="nothing"), "nothing"),
    "configuration, width": (changed("config.json", "hidden_size", to=36), "cannot be loaded"),
    "configuration, text width": (changed("config.json", "hidden_size", to="wide"), "cannot be loaded"),
    "configuration, heads": (changed("config.json", "num_attention_heads", to=0), "cannot be loaded"),
    "configuration, layers": (changed("config.json", "num_hidden_layers", to=3), "layers.2"),
    "generation, empty": (written("generation_config.json", ""), "generation_config.json"),
    "generation, a list": (written("generation_config.json", "[]"), "generation_config.json"),
    "tokenizer, empty": (written("tokenizer.json", ""), "tokenizer.json"),
    "tokenizer, half": (cut("tokenizer.json", 0.5), "tokenizer.json"),
    "tokenizer, foreign": (written("tokenizer.json", "{}"), "cannot be loaded"),
    "tokenizer settings, empty": (written("tokenizer_config.json", ""), "tokenizer_config.json"),
    "tokenizer settings, a word": (written("tokenizer_config.json", '"x"'), "tokenizer_config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "weights, empty": (written("model.safetensors", b""), "model.safetensors"),
    "weights, half": (cut("model.safetensors", 0.5), "model.safetensors"),
    "weights, foreign": (written("model.safetensors", b"PK\x03\x04" * 99), "model.safetensors"),
    "weights, one missing": (tensors(lambda held: held.pop("model.layers.1.mlp.up_proj.weight")), "layers.1.mlp.up"),
    "weights, other names": (
        tensors(lambda held: [held.__setitem__("h." + name, held.pop(name)) for name in list(held)]), "lacks weights"
    ),
    "weights, another size": (
        tensors(lambda held: held.__setitem__("model.norm.weight", torch.ones(5))), "cannot be loaded"
    ),
    "weights, NaN": (tensors(lambda held: poisoned(held, float("nan"))), "not finite"),
    "weights, infinite": (tensors(lambda held: poisoned(held, float("-inf"))), "not finite"),
    "index, half": (written("model.safetensors.index.json", '{"weight_map": '), "model.safetensors.index.json"),
    "pickle": (lambda folder: pickled(folder, {"a": print}), "cannot be loaded"),
    "diffusion, a list": (changed("config.json", "diffusion", to=[1]), "diffusion"),
    "diffusion, empty": (changed("config.json", "diffusion", to={}), "mask_token_id"),
}  # fmt: skip
DAMAGE |= {
    f"diffusion, {key} {value!r}": (changed("config.json", "diffusion", key, to=value), key)
    for key, values in DIFFUSION.items() for value in values
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_one_line_that_names_the_damage(converted: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(converted, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    damage, named = DAMAGE[kind]
    damage(folder)
    with pytest.raises(ValueError, match=r"damaged|config") as raised:
        unmask.load(folder)
    assert named in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("command", [
    ["generate", "FOLDER", "Once"], ["chat", "FOLDER"],
    ["infill", "FOLDER", "--prefix", "a", "--suffix", "b", "--num-tokens", "2"],
    ["evaluate", "FOLDER", "--data", "STORIES"], ["frontier", "FOLDER", "--data", "STORIES"],
    ["embed", "FOLDER", "STORIES", "--output", "x.npy"], ["bench", "decode", "FOLDER"],
    ["adapt", "FOLDER", "--data", "STORIES", "--output", "x"],
    ["study", "blocks", "FOLDER", "--data", "STORIES", "--eval", "STORIES", "--output", "x"],
])  # fmt: skip
def test_every_command_says_so_and_exits_with_2(
    converted: Path, stories: Path, tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from unmask.cli import main

    folder = tmp_path / "damaged"
    shutil.copytree(converted, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    cut("model.safetensors", 0.5)(folder)
    words = [{"FOLDER": str(folder), "STORIES": str(stories)}.get(word, word) for word in command]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["unmask", *words])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("unmask: error:")
    assert "model.safetensors" in error


# --- code that a folder brings

CODE = """
from pathlib import Path
Path(__file__).with_name("TRACE").write_text("")
Path({trace!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def with_code(tokenizer_and_model: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder whose model and tokenizer are classes of its own, and the file that its code writes when it runs."""
    folder, trace = tmp_path / "own", tmp_path / "trace"
    shutil.copytree(tokenizer_and_model, folder)
    (folder / "own.py").write_text(CODE.replace("{trace!r}", repr(str(trace))))
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed("config.json", "auto_map", to=auto)(folder)
    changed("config.json", "model_type", to="own_llama")(folder)
    changed("tokenizer_config.json", "auto_map", to={"AutoTokenizer": [None, "own.OwnTokenizer"]})(folder)
    changed("tokenizer_config.json", "tokenizer_class", to="OwnTokenizer")(folder)
    return folder, trace


def test_code_of_a_folder_runs_only_where_it_is_allowed(
    with_code: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = with_code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ValueError, match="--trust-remote-code"):
        unmask.load(folder)
    assert not trace.exists()
    lm = unmask.load(folder, trust_remote_code=True)
    assert trace.exists()
    assert type(lm.model).__name__ == "OwnModel"
    assert lm.generate("Once", max_new_tokens=3).num_new_tokens.item() >= 1


def test_nothing_on_standard_input_makes_code_run(with_code: tuple[Path, Path], tmp_path: Path) -> None:
    folder, trace = with_code
    done = subprocess.run(
        [sys.executable, "-m", "unmask.cli", "generate", str(folder), "x", "--max-new-tokens", "2"],
        input="y\ny\ny\n", capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--trust-remote-code" in done.stderr
    assert not trace.exists()


def test_a_tokenizer_alone_may_not_run_code_either(with_code: tuple[Path, Path], tokenizer_and_model: Path) -> None:
    folder, trace = with_code
    shutil.copy(tokenizer_and_model / "config.json", folder / "config.json")
    try:
        unmask.load(folder)
    except ValueError as error:
        assert "--trust-remote-code" in str(error)  # noqa: PT017  (a library's own class is as good an answer)
    assert not trace.exists()
