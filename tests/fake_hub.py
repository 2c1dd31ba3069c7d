"""A server on this machine that answers as Hugging Face's hub does, for uploads and downloads of small files."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_ThisIsTheSecretOfTheTests"
SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repository:
    """What the hub keeps of a repository."""

    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, bytes]] = field(default_factory=list)  # the files of each, oldest first


@dataclass
class FakeHub:
    """What the server keeps, and how it is to behave."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)  # "models/owner/name"
    requests: list[str] = field(default_factory=list)  # "POST /api/repos/create"
    tokens: set[str | None] = field(default_factory=set)
    failing_commits: int = 0  # so many of the next ones are answered with 500
    delay_s: float = 0.0  # of a commit

    def add(self, name: str, *, is_private: bool = True, repo_type: str = "model", **files: bytes) -> Repository:
        """Return a repository that is there from the start."""
        self.repositories[f"{repo_type}s/{name}"] = Repository(is_private, dict(files))
        return self.repositories[f"{repo_type}s/{name}"]

    def files(self, name: str, repo_type: str = "model") -> dict[str, bytes]:
        """Return a repository's files by path."""
        return self.repositories[f"{repo_type}s/{name}"].files


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.tokens.add(token)
        if token != TOKEN:
            self._send(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/(\w+)/([^/]+/[^/]+)(?:/(\w+)/(\w+)(?:/(.*))?)?", path):
            self._of_repository(*found.groups(), body=body)
        elif found := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            self._resolve(found[1] or "models", found[2], found[4])
        else:
            self._send(404, {"error": f"no such place: {path}"})

    def _create(self, wanted: dict[str, Any]) -> None:
        key = f"{wanted.get('type', 'model')}s/{wanted['organization']}/{wanted['name']}"
        is_private = wanted.get("private", wanted.get("visibility") == "private")
        self.hub.repositories[key] = Repository(is_private)
        self._send(200, {"url": f"{self.hub.url}/{key.removeprefix('models/')}"})

    def _of_repository(
        self, kind: str, name: str, verb: str | None, _: str | None, rest: str | None, body: bytes
    ) -> None:
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif verb in (None, "revision"):
            self._send(200, {"id": name, "sha": SHA, "private": repository.is_private, "siblings": [], "tags": []})
        elif verb == "tree":
            self._tree(repository, rest)
        elif verb == "preupload":
            wanted = json.loads(body)["files"]
            told = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in wanted]
            self._send(200, {"files": told})
        elif verb == "commit":
            self._commit(name, repository, [json.loads(line) for line in body.splitlines()])
        else:
            self._send(404, {"error": f"no such verb: {verb}"})

    def _tree(self, repository: Repository, folder: str | None) -> None:
        paths = [path for path in repository.files if not folder or path.startswith(f"{folder}/")]
        if folder and not paths:
            self._send(404, {"error": f"{folder} does not exist"}, {"X-Error-Code": "EntryNotFound"})
            return
        entries = [
            {"type": "file", "path": path, "size": len(repository.files[path]), "oid": etag(repository.files[path])}
            for path in paths
        ]
        self._send(200, entries)

    def _commit(self, name: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        time.sleep(self.hub.delay_s)
        if self.hub.failing_commits:
            self.hub.failing_commits -= 1
            self._send(500, {"error": "the hub is on fire"})
            return
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
        }
        repository.files.update(files)
        repository.commits.append(files)
        self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{SHA}", "commitOid": SHA, "success": True})

    def _resolve(self, kind: str, name: str, path: str) -> None:
        repository = self.hub.repositories.get(f"{kind}/{name}")
        if repository is None or path not in repository.files:
            self._send(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = repository.files[path]
        self._send(200, content, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": SHA})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def etag(content: bytes) -> str:
    """Return git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def connected(cache: Path) -> Iterator[FakeHub]:
    """Serve meanwhile, and let huggingface_hub take this for its hub; what is downloaded goes to cache.

    huggingface_hub reads HF_ENDPOINT and its like once, when it is imported.
    """
    with serving() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        patch.delenv("HF_TOKEN", raising=False)
        yield hub


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Answer on a free port of this machine meanwhile."""
    hub = FakeHub()
    handler = type("OfThisHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
