"""Libraries that are too old are named in one line, whatever is used first."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import unmask
from unmask.requirements import OLDEST, too_old

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
USES = {
    "a package": "import unmask.core",
    "transformers": "import unmask.hf",
    "a name": "from unmask import load",
    "training": "import unmask.conversion.learner",
}


def with_version(package: str, version: str, folder: Path) -> dict[str, str]:
    """The environment of a process that finds this version of a package installed."""
    about = folder / f"{package}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def ran(code: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("use", USES)
def test_old_libraries_are_refused_before_anything_else_fails(use: str, tmp_path: Path) -> None:
    done = ran(["-c", USES[use]], with_version("transformers", "4.57.6", tmp_path))
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: transformers 4.57.6 is too old for unmask, which needs {OLDEST['transformers']} or later: "
        f'pip install --upgrade "transformers>={OLDEST["transformers"]}"'
    )


def test_the_command_says_it_in_one_line_and_env_still_runs(tokenizer_and_model: Path, tmp_path: Path) -> None:
    env = with_version("torch", "2.8.0+cu128", tmp_path)
    done = ran(["-m", "unmask.cli", "generate", str(tokenizer_and_model), "Once"], env)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert "torch 2.8.0+cu128 is too old" in done.stderr
    shown = ran(["-m", "unmask.cli", "env"], env)
    assert shown.returncode == 0
    assert f"2.8.0+cu128 (too old: {OLDEST['torch']} or later is needed)" in shown.stdout


@pytest.mark.parametrize("package", OLDEST)
def test_the_oldest_are_those_of_the_package(package: str) -> None:
    required = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    assert any(f"{name},".startswith(f"{package}>={OLDEST[package]},") for name in required)


@pytest.mark.parametrize("version", ["2.9.0", "2.9.0a0+nv25", "2.10.0", "2.13.0+cpu", "3.0"])
def test_newer_versions_are_not_too_old(version: str) -> None:
    assert not too_old("torch", version)


def test_a_gguf_file_needs_a_later_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones put a begin token before every text, or write a tokenizer that nothing reads again."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr("unmask.hf.gguf.transformers.__version__", "5.4.0")
    with pytest.raises(ValueError, match=r"tiny\.gguf' needs transformers 5\.6 or later, and 5\.4\.0 is installed"):
        unmask.load(file)
