"""A hub on the loopback, as far as huggingface_hub's own client asks for models.

Repositories are dictionaries of files per commit; large files go by the LFS calls.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_of_the_tests"


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; returns the commit."""
        before = self.commits.get(self.branches.get(branch, ""), {})
        sha = hashlib.sha1(repr((len(self.commits), branch)).encode()).hexdigest()
        self.commits[sha] = {**before, **files}
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class Hub:
    """The server's state: repositories by id, stored blobs, and the calls that were answered."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.refuses = ""
        """Calls whose path holds this text are answered with an error."""
        self.url = ""

    def add(self, name: str, folder: Path | dict[str, bytes], **settings: bool) -> str:
        """A commit of a folder's files to a repository, which is made; returns the commit."""
        if isinstance(folder, Path):
            files = [path for path in folder.rglob("*") if path.is_file()]
            folder = {str(path.relative_to(folder)): path.read_bytes() for path in files}
        self.repositories.setdefault(name, Repository(**settings))
        return self.repositories[name].commit(folder)

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.branches[branch]]

    def fetched(self) -> list[str]:
        """The files that were downloaded, sorted."""
        found = [re.fullmatch(r"GET /.*/resolve/[^/]*/(.*)", call) for call in self.calls]
        return sorted(match[1] for match in found if match)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code)

    def handle_call(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.calls.append(f"{self.command} {unquote(path)}")
        if self.hub.refuses and self.hub.refuses in path:
            self.answer(500, {"error": "out of order"})
            return
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                action(self, body, *map(unquote, match.groups()))
                return
        self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_call

    @property
    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def open(self, name: str, *, writes: bool = False) -> Repository | None:
        """The repository, or None after a refusal."""
        repository = self.hub.repositories.get(name)
        if repository is None or ((repository.private or writes) and not self.has_token):
            self.refuse(401, "RepoNotFound")
            return None
        if repository.gated and not self.has_token:
            self.refuse(403, "GatedRepo")
            return None
        return repository

    # -- reading

    def info(self, body: bytes, name: str, revision: str = "main") -> None:
        if (repository := self.open(name)) is None:
            return
        sha = repository.resolve(revision)
        if sha is None and repository.commits:
            self.refuse(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": path} for path in repository.commits.get(sha or "", {})]
        facts = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
        self.answer(200, facts)

    def tree(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self.open(name)) is None:
            return
        sha = repository.resolve(revision)
        if sha is None:
            self.refuse(404, "RevisionNotFound")
            return
        files = repository.commits[sha].items()
        self.answer(
            200,
            [{"type": "file", "path": p, "size": len(c), "oid": etag(c)} for p, c in files],
        )

    def refs(self, body: bytes, name: str) -> None:
        if (repository := self.open(name)) is not None:
            named = repository.branches.items()
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in named]
            self.answer(200, {"branches": branches, "tags": [], "converts": []})

    def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
        if (repository := self.open(name)) is None:
            return
        sha = repository.resolve(revision)
        content = repository.commits.get(sha or "", {}).get(file)
        if content is None:
            self.refuse(404, "EntryNotFound" if sha else "RevisionNotFound")
            return
        self.answer(200, content, ETag=f'"{etag(content)}"', X_Repo_Commit=str(sha))

    # -- writing

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        facts = {"url": f"{self.hub.url}/{name}", "name": name}
        if not self.has_token:
            self.answer(401, {"error": "no token"})
        elif name in self.hub.repositories:
            self.answer(409, {**facts, "error": "there is one"})
        else:
            repository = Repository(private=asked.get("visibility") == "private")
            repository.commit({".gitattributes": b""})
            self.hub.repositories[name] = repository
            self.answer(200, facts)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        if (repository := self.open(name, writes=True)) is not None:
            is_new = branch not in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self.answer(200 if is_new else 409, {})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self.open(name, writes=True) is None:
            return
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = ["lfs" if path.endswith((".safetensors", ".bin")) else "regular" for path in paths]
        self.answer(
            200,
            {
                "files": [
                    {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}
                    for path, mode in zip(paths, modes, strict=True)
                ]
            },
        )

    def lfs_batch(self, body: bytes, name: str) -> None:
        if self.open(name, writes=True) is None:
            return
        objects = []
        for one in json.loads(body)["objects"]:
            href = f"{self.hub.url}/blobs/{one['oid']}"
            is_there = one["oid"] in self.hub.blobs
            objects.append(one if is_there else {**one, "actions": {"upload": {"href": href}}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def blob(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.answer(200)

    def commit(self, body: bytes, name: str, revision: str) -> None:
        if (repository := self.open(name, writes=True)) is None:
            return
        files: dict[str, bytes] = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repository.commit(files, revision)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self.answer(200, {"commitUrl": url, "commitOid": sha})


def etag(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


ID = "([^/]+/[^/]+)"
ROUTES = [
    ("GET", f"/api/models/{ID}", Handler.info),
    ("GET", f"/api/models/{ID}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{ID}/tree/([^/]+)", Handler.tree),
    ("GET", f"/api/models/{ID}/refs", Handler.refs),
    (("GET", "HEAD"), f"/{ID}/resolve/([^/]+)/(.+)", Handler.resolve),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", f"/api/models/{ID}/branch/([^/]+)", Handler.branch),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{ID}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/{ID}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/blobs/(.+)", Handler.blob),
    ("POST", f"/api/models/{ID}/commit/([^/]+)", Handler.commit),
]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub of its own, at its `url`, until the block ends."""
    hub = Hub()
    handler = type("OwnHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def hub_at(url: str, cache: Path, token: str | None = TOKEN) -> Iterator[pytest.MonkeyPatch]:
    """Let huggingface_hub ask the hub at `url`, with a cache and a token of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        known = "huggingface_hub.constants"
        patch.setattr(f"{known}.ENDPOINT", url)
        patch.setattr(
            f"{known}.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(f"{known}.HF_HUB_CACHE", str(cache))
        patch.setattr(f"{known}.HF_HUB_OFFLINE", False)
        patch.setattr(f"{known}.HF_HUB_DISABLE_XET", True)
        patch.setattr(f"{known}.HF_HUB_DISABLE_PROGRESS_BARS", True)
        patch.setattr(f"{known}.HF_TOKEN_PATH", str(cache / "no token"))
        patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        patch.delenv("HF_TOKEN", raising=False)
        if token is not None:
            patch.setenv("HF_TOKEN", token)
        yield patch


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """The same for another process."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
