"""Names of models: what is local, what is asked of the hub, adapters of PEFT's own, and bases that moved."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import random_tokens
from fake_hub import Hub
from fake_hub import hub as hub
from transformers import AutoModelForCausalLM

import unmask
from unmask import cli
from unmask.cli.app import app
from unmask.model_name import is_local, locate, permanent_name

RUN = {"max_tokens": 200, "max_length": 32, "block_size": 4, "batch_size": 2, "show_progress": False}


@pytest.fixture
def place(tmp_path: Path, tokenizer_and_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model, a folder without one, and what people mistake for a model."""
    shutil.copytree(tokenizer_and_model, tmp_path / "runs" / "model")
    (tmp_path / "runs" / "cut").mkdir()
    (tmp_path / "runs" / "cut" / "checkpoint-5").mkdir()
    (tmp_path / "runs" / "cut" / "checkpoint-5" / "config.json").write_text("{}")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "some.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["runs/model", "runs/model/", "./runs/model", "~/runs/model", "runs/../runs/model", "{}/runs/model"]
)
def test_a_folder_has_many_names(name: str, place: Path) -> None:
    found = locate(name.format(place))
    assert isinstance(found, Path)
    assert found.samefile(place / "runs" / "model")
    assert permanent_name(name.format(place)) == str((place / "runs" / "model").resolve())


@pytest.mark.usefixtures("place")
def test_a_folder_named_in_any_way_loads() -> None:
    lm = unmask.load("~/runs/model/")
    assert lm.model.config._name_or_path == "~/runs/model/"


LOCAL = [
    ("", "model name '' is empty"),
    ("  ", "model name '  ' is empty"),
    (".", "model folder '.' holds no config.json"),
    ("..", "holds no config.json"),
    ("../no", "model folder '../no' does not exist"),
    ("/no/such", "model folder '/no/such' does not exist"),
    ("~/no", r"model folder '~/no' \(/.*no\) does not exist"),
    ("~nobody-here/no", "model folder '~nobody-here/no' does not exist: no such user"),
    ("runs/no", "model folder 'runs/no' does not exist"),
    ("no/", "model folder 'no/' does not exist"),
    ("a/b/c", "model folder 'a/b/c' does not exist"),
    ("https://huggingface.co/a/b", "does not exist"),
    ("my model", "model folder 'my model' does not exist"),
    ("a--b", "model folder 'a--b' does not exist"),
    ("n" * 300, "does not exist"),
    ("a\0b", "does not exist"),
    ("no.gguf", "model file 'no.gguf' does not exist"),
    ("org/NO.GGUF", "model file 'org/NO.GGUF' does not exist"),
    ("no.safetensors", "model folder 'no.safetensors' does not exist"),
    ("runs", "model folder 'runs' holds no config.json: .*inside it are model/"),
    ("runs/cut", "model folder 'runs/cut' holds no config.json: .*inside it are checkpoint-5/"),
    ("files", "model folder 'files' holds no config.json: .*inside it are some.gguf"),
    ("runs/model/config.json", "'runs/model/config.json' is a file: give its folder, 'runs/model'"),
]


@pytest.mark.parametrize(("name", "message"), LOCAL)
def test_a_local_name_without_a_model_is_an_error_that_asks_nobody(
    name: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place == Path.cwd()
    monkeypatch.setattr("unmask.model_name._of_hub", lambda name: pytest.fail(f"asks the hub for {name!r}"))
    with pytest.raises(ValueError, match=f"(?s){message}") as raised:
        locate(name)
    assert "\n" not in str(raised.value)
    if "does not exist" in message:
        assert is_local(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B-Base", "no/such", "model.v2"])
def test_other_names_are_read_both_ways(name: str, place: Path) -> None:
    assert not is_local(name)
    with pytest.raises(ValueError, match="no hub id that can be read: HF_HUB_OFFLINE keeps from asking") as raised:
        locate(name)
    assert re.search(rf"model '{name}' is no folder \('{place}/{name}' does not exist\)", str(raised.value))


@pytest.mark.parametrize("name", [None, 5, b"runs/model", ["runs/model"]])
def test_what_is_no_text_is_no_name(name: object, place: Path) -> None:
    assert place == Path.cwd()
    for act in (lambda: unmask.load(name), lambda: unmask.load("runs/model", base=name or 5), lambda: locate(name)):
        with pytest.raises(ValueError, match=f"is no text but {type(name or 5).__name__}|is no text but NoneType"):
            act()


# --- every command


def names_of_commands() -> dict[str, list[str]]:
    """Command -> the rest of a command line whose model is wrong; all other values may be wrong too, but later."""
    rest = {
        "adapt": ["MODEL", "--data", "no.txt", "--output", "out"],
        "generate": ["MODEL", "hi"],
        "chat": ["MODEL"],
        "infill": ["MODEL", "--prefix", "a", "--suffix", "b", "--num-tokens", "2"],
        "evaluate": ["MODEL", "--data", "no.txt"],
        "embed": ["MODEL", "no.txt", "--output", "no/out.npy"],
        "frontier": ["MODEL", "--data", "no.txt"],
        "bench": ["decode", "MODEL"],
        "study": ["attention", "MODEL", "--data", "no.txt", "--eval", "no.txt", "--output", "out"],
        "demo": ["MODEL"],
        "prepare": ["no.txt", "--model", "MODEL", "--output", "out"],
        "plan": ["MODEL", "--tokens", "1M"],
        "serve": ["MODEL"],
        "export": ["MODEL", "--format", "uno", "--output", "out"],
    }
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} == {
        *rest, "recipes", "env", "merge",
    }  # fmt: skip
    return rest


@pytest.mark.parametrize("command", names_of_commands())
@pytest.mark.parametrize("option", ["", "--base", "--parent"])
def test_every_command_refuses_a_name_at_once_and_in_one_line(
    command: str, option: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if option == "--parent" and command not in ("frontier", "evaluate"):
        pytest.skip("nothing beside its model")
    if option == "--base" and command == "plan":
        pytest.skip("reads a configuration, which a drafter's folder has not")
    line = [
        ("./no" if not option else "runs/model") if word == "MODEL" else word for word in names_of_commands()[command]
    ]
    line += [option, "./no"] if option else []
    monkeypatch.setattr(sys, "argv", ["unmask", command, *line])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr("unmask.load", lambda *_, **__: pytest.fail("loads"), raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = capsys.readouterr()
    assert (ended.value.code, out.out) == (2, "")
    assert out.err.startswith("unmask: error: model folder './no' does not exist")
    assert out.err.count("\n") == 1
    assert not (place / "out").exists()


@pytest.mark.usefixtures("place")
def test_a_wrong_name_costs_no_import_of_torch() -> None:
    code = (
        "import sys; from unmask.cli import main; sys.argv = ['unmask', 'generate', 'no/such', 'hi']\n"
        "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"]
    assert "is no folder" in done.stderr


@pytest.mark.usefixtures("place")
def test_python_names_the_model_before_the_data() -> None:
    with pytest.raises(ValueError, match=r"model folder '\./no' does not exist"):
        unmask.adapt("./no", "no.txt", "tri-mode", "out")
    with pytest.raises(ValueError, match=r"model folder '\./teacher' does not exist"):
        unmask.adapt("runs/model", "no.txt", "tri-mode", "out", teacher="./teacher")
    with pytest.raises(ValueError, match="base='x' is for a drafter's or adapter's folder"):
        unmask.adapt(unmask.load("runs/model"), "no.txt", base="x")


# --- the hub


def test_the_hub_is_asked_once(hub: Hub, tmp_path: Path, tokenizer_and_model: Path) -> None:
    with pytest.raises(ValueError, match="the hub has none of this name"):
        locate("no/such")
    assert len(hub.asked) == 1
    shutil.copytree(tokenizer_and_model, tmp_path / "hub" / "org" / "model")
    hub.asked.clear()
    assert locate("org/model") == "org/model"
    assert len(hub.asked) == 1
    (tmp_path / "hub" / "org" / "model" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the hub's has no config\.json"):
        locate("org/model")
    hub.server.shutdown()
    hub.server.server_close()
    began = time.perf_counter()
    with pytest.raises(ValueError, match="the hub cannot be asked"):
        locate("no/such")
    assert time.perf_counter() - began < 5


def test_what_was_downloaded_stays_a_model_of_its_hub_id(
    tmp_path: Path, tokenizer_and_model: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    shutil.copytree(tokenizer_and_model, tmp_path / "models--org--model" / "snapshots" / commit)
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text(commit)
    found = locate("org/model")
    assert isinstance(found, Path)
    assert permanent_name(str(found)) == "org/model"
    lm = unmask.load("org/model")
    assert lm.model.config._name_or_path == "org/model"
    lm = unmask.adapt(found, stories, "drafter", tmp_path / "drafter", drafter_rank=2, **RUN)
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["diffusion"]["base"]["name"] == "org/model"
    assert unmask.load(tmp_path / "drafter").base == replace(lm.base, name="org/model")


@pytest.mark.usefixtures("hub")
def test_an_adapter_of_the_hub_is_downloaded(tmp_path: Path, tokenizer_and_model: Path) -> None:
    want, ids = stock_adapter(tokenizer_and_model, tmp_path / "hub" / "org" / "adapter"), random_tokens(2, 9)
    lm = unmask.load("org/adapter")
    torch.testing.assert_close(lm.model(input_ids=ids).logits, want)
    assert lm.model.config._name_or_path == "org/adapter"


# --- adapters that PEFT wrote


@torch.no_grad()
def stock_adapter(
    base: Path, folder: Path, *, rows: int = 0, named: str | None = None, **options: object
) -> torch.Tensor:
    """A folder of PEFT's own, with random values; the logits that PEFT gives. rows: that the embedding grows by."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] + rows, mean_resizing=False)
    asked = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | options
    tuned = peft.get_peft_model(model, peft.LoraConfig(**asked))
    generator = torch.Generator().manual_seed(5)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    tuned.peft_config["default"].base_model_name_or_path = str(base) if named is None else named
    tuned.save_pretrained(folder)
    return tuned.eval()(input_ids=random_tokens(2, 9)).logits


KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "rank-stabilised, of some layers": {"use_rslora": True, "layers_to_transform": [1], "lora_alpha": 3},
    "weight-decomposed": {"use_dora": True, "target_modules": "all-linear"},
    "with biases": {"bias": "all"},
    "head trained whole": {"modules_to_save": ["lm_head"]},
    "embedding trained whole": {"modules_to_save": ["embed_tokens"]},
    "both trained whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "on the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "on the head": {"target_modules": ["lm_head", "q_proj"]},
    "some rows": {"trainable_token_indices": [3, 4]},
    "new rows": {"rows": 3, "modules_to_save": ["embed_tokens", "lm_head"]},
    "ranks of their own": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_peft_wrote_loads_merged(
    kind: str, tied: bool, tokenizer_and_model: Path, tmp_path: Path
) -> None:
    base, ids = tmp_path / "base", random_tokens(2, 9)
    shutil.copytree(tokenizer_and_model, base)
    if not tied:
        model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
        model.save_pretrained(base)
    want = stock_adapter(base, tmp_path / "adapter", **KINDS[kind])  # type: ignore[arg-type]
    lm = unmask.load(tmp_path / "adapter")
    assert type(lm.model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(lm.model(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)
    # As a stock model on disk it is the same.
    lm.save_pretrained(tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(stock(input_ids=ids).logits, want, atol=1e-5, rtol=1e-5)


def test_the_base_of_an_adapter_may_have_moved(tokenizer_and_model: Path, tmp_path: Path) -> None:
    for named in ("/nowhere/base", ""):
        stock_adapter(tokenizer_and_model, tmp_path / "adapter", named=named)
        message = (
            "needs its base '/nowhere/base', which does not load: give base=FOLDER" if named else "give base=FOLDER"
        )
        with pytest.raises(ValueError, match=message):
            unmask.load(tmp_path / "adapter")
        assert unmask.load(tmp_path / "adapter", base=tokenizer_and_model).diffusion is None


def test_an_old_file_of_weights_is_read(tokenizer_and_model: Path, tmp_path: Path) -> None:
    want = stock_adapter(tokenizer_and_model, tmp_path)
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(unmask.load(tmp_path).model(input_ids=random_tokens(2, 9)).logits, want)


def test_a_converted_base_stays_converted_under_an_adapter(converted: Path, stories: Path, tmp_path: Path) -> None:
    stock_adapter(converted, tmp_path / "adapter")
    lm = unmask.load(tmp_path / "adapter")
    assert lm.diffusion == unmask.load(converted).diffusion
    again = unmask.adapt(tmp_path / "adapter", stories, None, tmp_path / "again", **(RUN | {"block_size": None}))
    assert again.diffusion is not None
    assert again.diffusion.recipe == "efficient-dlm"


def test_adapters_that_do_not_fit_are_named(tokenizer_and_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"

    def refused(message: str, **config: object) -> None:
        if config:
            raw = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(raw | config))
        with pytest.raises(ValueError, match=message) as raised:
            unmask.load(folder)
        assert "\n" not in str(raised.value)

    stock_adapter(tokenizer_and_model, folder)
    refused(
        "does not fit the model it names as its base: it lacks .*k_proj", target_modules=["q_proj", "k_proj", "v_proj"]
    )
    refused("does not fit the model it names as its base: .*v_proj.* is none of its weights", target_modules=["q_proj"])
    refused("does not fit the model it names as its base: .*size mismatch", target_modules=["q_proj", "v_proj"], r=3)
    refused("adapter_config.json.*cannot be read", target_modules=["nothing"], r=2)
    refused("peft_type 'IA3': only LORA", peft_type="IA3", target_modules=["q_proj"], feedforward_modules=[])
    stock_adapter(tokenizer_and_model, folder)
    (folder / "adapter_model.safetensors").unlink()
    refused("adapter_model.safetensors")


# --- drafters


def test_a_drafter_names_its_base_for_good(place: Path, stories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmask.adapt("runs/model", stories, "drafter", "runs/drafter", drafter_rank=2, **RUN)
    base = json.loads(Path("runs/drafter/config.json").read_text())["diffusion"]["base"]
    assert base["name"] == str((place / "runs" / "model").resolve())
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    texts = unmask.load("../runs/drafter").generate("Once", max_new_tokens=5).texts
    (place / "runs" / "model").rename(place / "moved")
    with pytest.raises(ValueError, match=r"drafter '\.\./runs/drafter' needs its base .* give base=FOLDER"):
        unmask.load("../runs/drafter")
    lm = unmask.load("../runs/drafter", base="../moved")
    assert lm.generate("Once", max_new_tokens=5).texts == texts
    lm.save_pretrained(place / "again")  # which names the base where it is now
    assert unmask.load(place / "again").generate("Once", max_new_tokens=5).texts == texts
    with pytest.raises(ValueError, match=r"stands on '\.\./again', which is a drafter"):
        unmask.load("../runs/drafter", base="../again")


def test_a_drafter_on_an_adapter(tokenizer_and_model: Path, stories: Path, tmp_path: Path) -> None:
    """Its base is the merged model, also when it is loaded again."""
    stock_adapter(tokenizer_and_model, tmp_path / "adapter")
    lm = unmask.adapt(tmp_path / "adapter", stories, "drafter", tmp_path / "drafter", drafter_rank=2, **RUN)
    loaded, ids = unmask.load(tmp_path / "drafter"), random_tokens(2, 9)
    assert torch.equal(loaded.model(input_ids=ids).logits, lm.model(input_ids=ids).logits)
    with pytest.raises(ValueError, match="was trained on another model"):
        unmask.load(tmp_path / "drafter", base=tokenizer_and_model)


@pytest.mark.usefixtures("place")
def test_commands_take_a_base(
    stories: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unmask.adapt("runs/model", stories, "drafter", "runs/drafter", drafter_rank=2, **RUN)
    Path("runs/model").rename("moved")
    for line in (
        ["generate", "runs/drafter", "Once", "--max-new-tokens", "4"],
        ["evaluate", "runs/drafter", "--data", str(stories), "--max-documents", "1"],
        ["frontier", "runs/drafter", "--data", str(stories), "--prompts", "1", "--prompt-tokens", "4",
         "--max-new-tokens", "4", "--thresholds", "0.9", "--batch-sizes", "1", "--rounds", "1"],
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["unmask", *line, "--base", "moved"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, capsys.readouterr().err
