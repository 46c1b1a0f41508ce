"""A real HTTP server that answers as the hub does."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """A server of the hub's own addresses, for the folders of one folder; counts what it is asked.

    token: what a request needs to write, if set. Files named in `stored` are uploaded apart from the commit, as large
    ones are.
    """

    def __init__(self, folder: Path) -> None:
        hub, self.folder, self.asked = self, folder, []
        self.token: str | None = None
        self.commits: list[dict[str, Any]] = []
        self.stored: dict[str, bytes] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.asked.append(self.path)
                allowed = hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"
                self.say(*(hub.written(self.path, body) if allowed else (403, {"error": "no right to write"})))

            def do_PUT(self) -> None:
                hub.stored[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
                self.say(200, {})

            def say(self, status: int, answer: dict[str, Any]) -> None:
                body = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                hub.asked.append(self.path)
                found, kind = b"", None
                path = self.path.split("?")[0]
                if api := re.fullmatch(r"/api/models/(\w+/[\w-]+)(/revision/.*)?", path):
                    files = sorted(p.name for p in (folder / api[1]).glob("*") if p.is_file())
                    about = {"id": api[1], "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
                    found, kind = json.dumps(about).encode(), "application/json" if files else None
                elif one := re.fullmatch(r"/(\w+/[\w-]+)/resolve/[^/]+/(.*)", path):
                    file = folder / one[1] / one[2]
                    if file.is_file():
                        found, kind = file.read_bytes(), "application/octet-stream"
                self.send_response(200 if kind else 404)
                if not kind:
                    inside = path.split("/tree/")[0].removeprefix("/api/models")  # no repository here has folders
                    lacks = "/tree/" not in path and path.startswith("/api")
                    lacks = lacks or not (folder / "/".join(inside.split("/")[1:3])).is_dir()
                    self.send_header("X-Error-Code", "RepoNotFound" if lacks else "EntryNotFound")
                self.send_header("Content-Type", kind or "text/plain")
                self.send_header("Content-Length", str(len(found)))
                self.send_header("X-Repo-Commit", "a" * 40)
                self.send_header("ETag", f'"{hash(path)}"')
                self.end_headers()
                if body:
                    self.wfile.write(found)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def written(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """The answer to a POST: status and object."""
        where = path.split("?")[0]
        if where == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            return 200, {"url": f"{self.address}/{name}", "name": name}
        if where == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if preupload := re.fullmatch(r"/api/models/(\w+/[\w-]+)/preupload/.*", where):
            assert (self.folder / preupload[1]).is_dir()
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False} for file in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": files}
        if where.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.address}/put/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if commit := re.fullmatch(r"/api/models/(\w+/[\w-]+)/commit/(.*)", where):
            self._commit(self.folder / commit[1], [json.loads(line) for line in body.splitlines()])
            answer = {"commitUrl": f"{self.address}/{commit[1]}/commit/{'a' * 40}", "commitOid": "a" * 40}
            return 200, answer | (
                {"pullRequestUrl": f"{self.address}/{commit[1]}/discussions/1"} if "create_pr" in path else {}
            )
        return 404, {"error": f"no {where}"}

    def _commit(self, repo: Path, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value)
            elif line["key"] == "file":
                (repo / value["path"]).write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                (repo / value["path"]).write_bytes(self.stored[value["oid"]])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    (tmp_path / "hub").mkdir()
    server = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.server.shutdown()
    server.server.server_close()
