"""Uploads to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from unmask.core.network import DiffusionConfig
from unmask.hf.checkpoint import Base
from unmask.hf.folders import first_line
from unmask.model_name import is_local
from unmask.progress import warn

CARD = "README.md"


def push(
    repo_id: str,
    save: Callable[[Path], None],
    diffusion: DiffusionConfig | None,
    base: Base | None,
    *,
    commit_message: str = "Upload the model",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload what `save` writes to a folder; returns the address of the commit, or of the pull request.

    repo_id: a repository, made if there is none. save: called once the hub has said yes to it. diffusion, base: what
    the model was converted to, and what a drafter stands on. The others are those of `push_to_hub` in transformers.
    Raises ValueError for a name that is none, without the hub, and where the hub says no.
    """
    from huggingface_hub import HfApi

    if base is not None and is_local(base.name):
        warn(
            f"the base {base.name!r} of this drafter is a folder of this machine: push that too, and tell others to "
            "load the drafter with base=, the hub id that it has then"
        )
    api = HfApi(token=token)
    with _asking(repo_id):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        has_card = api.file_exists(repo, CARD, revision=revision)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        if not has_card:
            (Path(folder) / CARD).write_text(_card(repo, diffusion), encoding="utf-8")
        with _asking(repo_id):
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message=commit_message, revision=revision, create_pr=create_pr
            )
    return done.pr_url or done.commit_url


def _card(name: str, diffusion: DiffusionConfig | None) -> str:
    """A short README.md for the hub, where the model is called `name`."""
    tags = "unmask" if diffusion is None else "unmask, diffusion-language-model"
    kind = (
        "An autoregressive language model" if diffusion is None else f"A diffusion language model ({diffusion.recipe})"
    )
    return (
        f"---\nlibrary_name: unmask\ntags: [{tags}]\n---\n\n{kind}.\n\n"
        f'```python\nimport unmask\n\nlm = unmask.load("{name}")\nprint(lm.generate("...").texts[0])\n```\n'
    )


@contextmanager
def _asking(repo_id: str) -> Iterator[None]:
    """Any error inside becomes a ValueError that names the repository, and says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except Exception as error:  # whatever the network, a proxy or the hub did
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        reason = first_line(error)
        if isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE keeps from asking the hub: unset it, or write a folder with save_pretrained"
        elif isinstance(error, HFValidationError):
            reason += "; give a name such as 'me/model'"
        elif isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
            reason += "; log in with `hf auth login`, or give token=..., one that may write there"
        raise ValueError(f"model cannot be pushed to {repo_id!r}: {reason}") from error
