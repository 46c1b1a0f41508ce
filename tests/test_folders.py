"""Folders that are not what they should be: one line that names the file, and no Python of theirs runs."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

import unmask
from unmask import cli, hf
from unmask.core.drafter import DrafterConfig
from unmask.core.network import DiffusionConfig

Damage = Callable[[Path], None]


def write(name: str, content: bytes | str) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())  # type: ignore[func-returns-value]


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(len(raw) * share)])

    return damage


def change(name: str, **values: object) -> Damage:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(raw | values))

    return damage


def diffusion(*without: str, **values: object) -> Damage:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        raw["diffusion"] = {k: v for k, v in (raw["diffusion"] | values).items() if k not in without}
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


def weights(edit: Callable[[dict[str, torch.Tensor]], object], name: str = "model.safetensors") -> Damage:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / name)
        edit(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return damage


def sharded(index: object, whole: bool = False) -> Damage:
    def damage(folder: Path) -> None:
        if not whole:
            (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))

    return damage


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


NORM = "model.layers.0.input_layernorm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"

DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing layer": (change("config.json", num_hidden_layers=3), "model.layers.2"),
    "layer too many": (change("config.json", num_hidden_layers=1), "model.layers.1"),
    "missing tensor": (weights(lambda t: t.pop(NORM)), NORM),
    "extra tensor": (weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})), "q_proj"),
    "tensor of another size": (weights(lambda t: t.update({NORM: torch.ones(7)})), "weights"),
    "config of another width": (change("config.json", hidden_size=64, head_dim=16), "weights"),
    "config of another vocabulary": (change("config.json", vocab_size=1000), "weights"),
    "config of another class": (change("config.json", model_type="gpt2"), "model"),
    "no weights": (remove("model.safetensors"), "weights"),
    "weights empty": (write("model.safetensors", b""), "model.safetensors"),
    "weights a pointer": (write("model.safetensors", POINTER), "model.safetensors"),
    "weights noise": (write("model.safetensors", bytes(range(256)) * 50), "model.safetensors"),
    "weights cut": (cut("model.safetensors", 0.5), "model.safetensors"),
    "weights cut in the header": (cut("model.safetensors", 0.001), "model.safetensors"),
    "weights of nothing": (weights(lambda t: t.clear()), "lack"),
    "index empty": (sharded(""), "index.json"),
    "index without map": (sharded({}), "weight_map"),
    "index with a list": (sharded({"weight_map": ["a"]}), "weight_map"),
    "index of a missing part": (sharded({"weight_map": {NORM: "model-9.safetensors"}}), "model-9.safetensors"),
    "index outside": (sharded({"weight_map": {NORM: "../model.safetensors"}}), "outside"),
    "index cut, beside whole weights": (sharded("{", whole=True), "index.json"),
    "config empty": (write("config.json", ""), "config.json"),
    "config cut": (cut("config.json", 0.6), "config.json"),
    "config a list": (write("config.json", "[]"), "config.json"),
    "config null": (write("config.json", "null"), "config.json"),
    "config binary": (write("config.json", b"\xff\xfe\x00"), "config.json"),
    "config without a type": (write("config.json", "{}"), "config.json"),
    "config of an unknown type": (change("config.json", model_type="nonsense"), "config.json"),
    "config with text for a size": (change("config.json", hidden_size="wide"), "config.json"),
    "config with a negative size": (change("config.json", num_hidden_layers=-1), "model"),
    "config with no heads": (change("config.json", num_attention_heads=0), "model"),
    "config with an odd dtype": (change("config.json", dtype="float99"), "model"),
    "config with no context": (change("config.json", max_position_embeddings=0), "max_position_embeddings"),
    "config with text for a context": (change("config.json", max_position_embeddings="x"), "config.json"),
    "config with an odd activation": (change("config.json", hidden_act="nonsense"), "nonsense"),
    "tokenizer empty": (write("tokenizer.json", ""), "tokenizer.json"),
    "tokenizer cut": (cut("tokenizer.json", 0.5), "tokenizer.json"),
    "tokenizer an object": (write("tokenizer.json", "{}"), "tokenizer.json"),
    "tokenizer a list": (write("tokenizer.json", "[1]"), "tokenizer.json"),
    "tokenizer missing": (remove("tokenizer.json"), "tokenizer"),
    "tokenizer config empty": (write("tokenizer_config.json", ""), "tokenizer_config.json"),
    "tokenizer config a list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    "tokenizer config of no class": (change("tokenizer_config.json", tokenizer_class=5), "tokenizer_config.json"),
    "tokenizer config with a number": (change("tokenizer_config.json", eos_token=5), "tokenizer_config.json"),
    "special tokens cut": (write("special_tokens_map.json", "{"), "special_tokens_map.json"),
    "added tokens a list": (write("added_tokens.json", "[]"), "added_tokens.json"),
    "generation empty": (write("generation_config.json", ""), "generation_config.json"),
    "generation a list": (write("generation_config.json", "[]"), "generation_config.json"),
    "generation with text for an end": (change("generation_config.json", eos_token_id="x"), "generation_config.json"),
    "generation with a foreign end": (change("generation_config.json", eos_token_id=[1, 9999]), "9999"),
    "generation with a negative end": (change("generation_config.json", eos_token_id=-1), "generation_config.json"),
    "diffusion a list": (change("config.json", diffusion=[1]), "diffusion"),
    "diffusion a text": (change("config.json", diffusion="x"), "diffusion"),
    "diffusion empty": (change("config.json", diffusion={}), "diffusion"),
    "diffusion without block size": (diffusion("block_size"), "block_size"),
    "diffusion mask text": (diffusion(mask_token_id="5"), "mask_token_id"),
    "diffusion mask null": (diffusion(mask_token_id=None), "mask_token_id"),
    "diffusion mask true": (diffusion(mask_token_id=True), "mask_token_id"),
    "diffusion mask negative": (diffusion(mask_token_id=-1), "mask_token_id"),
    "diffusion mask outside": (diffusion(mask_token_id=5000), "5000"),
    "diffusion block text": (diffusion(block_size="4"), "block_size"),
    "diffusion block real": (diffusion(block_size=4.0), "block_size"),
    "diffusion block zero": (diffusion(block_size=0), "block_size"),
    "diffusion block null": (diffusion(block_size=None), "block_size"),
    "diffusion block past the context": (diffusion(block_size=4096), "4096"),
    "diffusion shift text": (diffusion(shift="yes"), "shift"),
    "diffusion attention": (diffusion(attention="sideways"), "sideways"),
    "diffusion attention list": (diffusion(attention=["two_stream"]), "attention"),
    "diffusion clean attention": (diffusion(clean_attention="sideways"), "sideways"),
    "diffusion noisy attention": (diffusion(noisy_attention="sideways"), "sideways"),
    "diffusion mask rows": (diffusion(mask_rows=0), "mask_rows"),
    "diffusion mask rows outside": (diffusion(mask_rows=500), "mask_token_id"),
    "diffusion recipe": (diffusion(recipe=5), "recipe"),
    "diffusion base": (diffusion(base="x"), "base"),
    "diffusion base without a name": (diffusion(base={"fingerprint": "x"}), "name"),
    "adapter file empty": (write("adapter_config.json", ""), "adapter_config.json"),
    "adapter without a base": (write("adapter_config.json", "{}"), "base_model_name_or_path"),
    "adapter of a number": (write("adapter_config.json", '{"base_model_name_or_path": 5}'), "base_model_name_or_path"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(damage: str, converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    spoil, named = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=r".") as caught:
        unmask.load(folder)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_what_is_whole_loads(converted: Path, tokenizer_and_model: Path, tmp_path: Path) -> None:
    """Tied weights, shards and buffers that old versions saved are no damage."""
    assert unmask.load(tokenizer_and_model).diffusion is None  # tied: the file has no head
    lm = unmask.load(converted)
    lm.model.save_pretrained(tmp_path / "s", max_shard_size="20KB")
    lm.tokenizer.save_pretrained(tmp_path / "s")
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 1
    assert unmask.load(tmp_path / "s").diffusion == lm.diffusion
    folder = tmp_path / "old"
    shutil.copytree(tokenizer_and_model, folder)
    weights(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(folder)
    unmask.load(folder)


def drafter_folder(base: Path, folder: Path) -> Path:
    model, tokenizer = hf.load_pretrained(base, device="cpu")
    drafter = hf.add_drafter(model, tokenizer, DrafterConfig(rank=2))
    config = DiffusionConfig(drafter.mask_token_id, "two_stream", "causal", 4, False, "drafter", "0")
    hf.save_drafter(folder, drafter, tokenizer, config, hf.Base(str(base), hf.fingerprint(model)))
    return folder


def lora_value(**values: object) -> Damage:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        raw["diffusion"]["lora"] = raw["diffusion"]["lora"] | values
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


DRAFTER_DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights missing": (remove("drafter.safetensors"), "drafter.safetensors"),
    "weights empty": (write("drafter.safetensors", b""), "drafter.safetensors"),
    "weights cut": (cut("drafter.safetensors", 0.5), "drafter.safetensors"),
    "weights of another": (weights(lambda t: t.popitem(), "drafter.safetensors"), "drafter.safetensors"),
    "another rank": (lora_value(rank=3), "drafter.safetensors"),
    "text for a rank": (lora_value(rank="2"), "rank"),
    "rank zero": (lora_value(rank=0), "rank"),
    "scale infinite": (lora_value(scale=float("inf")), "scale"),
    "unknown key": (lora_value(more=1), "more"),
    "no lora": (diffusion("lora"), "lora"),
    "base of a number": (diffusion(base={"name": 5, "fingerprint": "x"}), "name"),
    "base gone": (diffusion(base={"name": "/nowhere", "fingerprint": "x"}), "/nowhere"),
    "mask of another": (diffusion(mask_token_id=3), "mask_token_id"),
    "tokenizer cut": (cut("tokenizer.json", 0.5), "tokenizer.json"),
}


@pytest.mark.parametrize("damage", DRAFTER_DAMAGES)
def test_a_damaged_drafter_is_refused_by_name(damage: str, tokenizer_and_model: Path, tmp_path: Path) -> None:
    folder = drafter_folder(tokenizer_and_model, tmp_path / "drafter")
    assert unmask.load(folder).drafter is not None
    spoil, named = DRAFTER_DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=r".") as caught:
        unmask.load(folder)
    assert named in str(caught.value)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process, with y on its standard input: (exit code, stderr)."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["unmask", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return call


def commands(folder: Path, data: Path, output: Path) -> dict[str, list[object]]:
    """Every command that loads a model."""
    return {
        "adapt": ["adapt", folder, "--data", data, "--output", output / "run", "--max-tokens", 100, "max_length=32"],
        "generate": ["generate", folder, "Once", "--max-new-tokens", 2],
        "chat": ["chat", folder],
        "infill": ["infill", folder, "--prefix", "a", "--suffix", "b", "--num-tokens", 2],
        "evaluate": ["evaluate", folder, "--data", data, "--max-documents", 1],
        "embed": ["embed", folder, data, "--output", output / "x.npy"],
        "frontier": ["frontier", folder, "--data", data, "--prompts", 1],
        "bench": ["bench", "train", folder, "--rounds", 1],
        "bench-decode": ["bench", "decode", folder, "--rounds", 1],
        "study": ["study", "attention", folder, "--data", data, "--eval", data, "--output", output / "study",
                  "--max-tokens", 100],
        "demo": ["demo", folder, "--data", data, "--output", output / "demo", "--max-tokens", 100],
    }  # fmt: skip


COMMANDS = tuple(commands(Path(), Path(), Path()))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", ["tensor of another size", "tokenizer an object", "missing tensor"])
def test_commands_refuse_in_one_line(
    run, command: str, damage: str, converted: Path, stories: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(converted, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    DAMAGES[damage][0](folder)
    code, err = run(*commands(folder, stories, tmp_path)[command])
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("unmask: error:")
    assert DAMAGES[damage][1] in last
    assert "Traceback" not in err


CODE = """
import os
from pathlib import Path
Path({trace!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OWN_CONFIG = {
    "model_type": "own-llama",
    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
}
OWN_TOKENIZER = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}


def with_code(source: Path, folder: Path, what: str) -> tuple[Path, Path]:
    """The folder with Python of its own, and the file that this Python leaves behind when it runs."""
    shutil.copytree(source, folder)
    trace = folder.parent / "trace"
    (folder / "own.py").write_text(CODE.format(trace=str(trace)))
    if what == "config":
        change("config.json", **OWN_CONFIG)(folder)
    else:
        change("tokenizer_config.json", **OWN_TOKENIZER)(folder)
    return folder, trace


@pytest.fixture(autouse=True)
def modules_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers copies remote code into a cache, from where it imports it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("what", ["config", "tokenizer"])
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_a_folders_python(
    run, command: str, what: str, tokenizer_and_model: Path, stories: Path, tmp_path: Path
) -> None:
    folder, trace = with_code(tokenizer_and_model, tmp_path / "model", what)
    if command.startswith("bench") and what == "tokenizer":
        pytest.skip("the benchmarks load no text")
    code, err = run(*commands(folder, stories, tmp_path)[command])
    assert not trace.exists()
    assert code == 2
    assert "--trust-remote-code" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_python_of_a_folder_runs_when_it_is_allowed(
    run, what: str, tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = with_code(tokenizer_and_model, tmp_path / "model", what)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    with pytest.raises(ValueError, match="--trust-remote-code"):
        unmask.load(folder)
    with pytest.raises(ValueError, match="--trust-remote-code"):
        hf.load_tokenizer(folder) if what == "tokenizer" else hf.load_pretrained(folder)
    assert not trace.exists()
    assert run("generate", folder, "Once", "--max-new-tokens", 2, "--trust-remote-code")[0] == 0
    assert trace.exists()
    assert unmask.load(folder, trust_remote_code=True).generate("Once", max_new_tokens=2).texts


def test_a_drafters_base_runs_no_python_either(
    tokenizer_and_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tokenizer_and_model, base)
    folder = drafter_folder(base, tmp_path / "drafter")
    trace = tmp_path / "trace"
    (base / "own.py").write_text(CODE.format(trace=str(trace)))
    change("config.json", **OWN_CONFIG)(base)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    with pytest.raises(ValueError, match="--trust-remote-code"):
        unmask.load(folder)
    assert not trace.exists()
    assert unmask.load(folder, trust_remote_code=True).drafter is not None


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickled_weights_are_read_as_weights_alone(tokenizer_and_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tokenizer_and_model, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(unmask.load(folder).model.state_dict()[NORM], state[NORM])
    trace = tmp_path / "trace"
    torch.save(state | {"trap": _Trap(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights"):
        unmask.load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(trace)))
    with pytest.raises(ValueError, match="weights"):
        unmask.load(folder)
    assert not trace.exists()


def test_weights_of_another_architecture_are_refused(tokenizer_and_model: Path, tmp_path: Path) -> None:
    from conftest import SUPPORTED, tiny_model

    folder = tmp_path / "model"
    shutil.copytree(tokenizer_and_model, folder)
    tiny_model(SUPPORTED["gpt2"]()).save_pretrained(tmp_path / "gpt2")
    shutil.copy(tmp_path / "gpt2" / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"weights lack .*model"):
        unmask.load(folder)


def test_a_foreign_tokenizer_is_refused(tokenizer_and_model: Path, tmp_path: Path) -> None:
    model = tiny_llama(torch.float32)
    _, tokenizer = hf.load_pretrained(tokenizer_and_model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of another model"):
        unmask.load(tmp_path)


ADAPTER_DAMAGES: dict[str, tuple[Damage, str]] = {
    "weights missing": (remove("adapter_model.safetensors"), "adapter_model.safetensors"),
    "weights cut": (cut("adapter_model.safetensors", 0.5), "adapter_model.safetensors"),
    "weights of nothing": (weights(lambda t: t.clear(), "adapter_model.safetensors"), "adapter"),
    "text for a rank": (change("adapter_config.json", r="x"), "adapter"),
    "config missing": (remove("config.json"), "config.json"),
    "config cut": (cut("config.json", 0.5), "config.json"),
    "mask outside": (diffusion(mask_token_id=5000), "5000"),
    "base gone": (change("adapter_config.json", base_model_name_or_path="/nowhere"), "/nowhere"),
    "itself as base": (lambda f: change("adapter_config.json", base_model_name_or_path=str(f))(f), "circle"),
}


@pytest.fixture(scope="module")
def adapter(tokenizer_and_model: Path, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    unmask.adapt(tokenizer_and_model, stories, "efficient-dlm", folder, show_progress=False, max_tokens=200,
                 max_length=64, block_size=4, batch_size=4, lora_rank=2, lora_merge=False)  # fmt: skip
    return folder


@pytest.mark.parametrize("damage", ADAPTER_DAMAGES)
def test_a_damaged_adapter_is_refused_by_name(damage: str, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(adapter, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    assert unmask.load(folder).diffusion is not None
    spoil, named = ADAPTER_DAMAGES[damage]
    spoil(folder)
    with pytest.raises(ValueError, match=r".") as caught:
        unmask.load(folder)
    assert named in str(caught.value)
