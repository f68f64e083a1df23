"""A stand-in for the Hub on this machine: as much of its HTTP API as reading and writing a repository takes.

It keeps every commit, so that a revision means what it does on the Hub. Files that end in .safetensors travel by LFS.
`asked` lists what was requested, `tokens` the bearer tokens that were sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from attrs import field, mutable

Files = Mapping[str, bytes]


@mutable
class Repository:
    """Commits by their hash, newest last; `refs` are branches and tags."""

    private: bool = False
    commits: dict[str, Files] = field(factory=dict)
    refs: dict[str, str] = field(factory=dict)

    def commit(self, files: Files, *refs: str) -> str:
        listing = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in sorted(files.items())})
        name = hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[name] = dict(files)
        self.refs |= dict.fromkeys(("main", *refs), name)
        return name

    @property
    def files(self) -> Files:
        return self.commits[self.refs["main"]]


@mutable
class Hub:
    """The repositories, and what has been asked."""

    url: str = ""
    repositories: dict[str, Repository] = field(factory=dict)
    gated: set[str] = field(factory=set)
    read_only: bool = False  # a token that may not write
    requests: list[str] = field(factory=list)
    tokens: set[str] = field(factory=set)
    messages: list[str] = field(factory=list)
    blobs: dict[str, bytes] = field(factory=dict)

    def publish(self, name: str, folder: Path, *refs: str) -> str:
        """Put a folder up as a new commit of `name`; returns its hash."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.repositories.setdefault(name, Repository()).commit(files, *refs)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: Any = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what: str) -> None:
        self.answer(404, {"error": what}, X_Error_Code=what)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def begin(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.tokens |= {bearer} if bearer else set()
        return path.strip("/").split("/")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        words = self.begin()
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        name = "/".join(words[:2])
        repository = self.hub.repositories.get(name)
        if repository is None:
            return self.missing("RepoNotFound")
        if name in self.hub.gated and not (api and words[2:3] != ["tree"]):
            return self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        revision = words[3] if len(words) > 3 else "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self.missing("RevisionNotFound")
        files = repository.commits[commit]
        if api and words[2:3] == ["tree"]:
            return self.answer(200, [self.entry(path, data) for path, data in files.items()])
        if api:
            siblings = [{"rfilename": path} for path in files]
            return self.answer(
                200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []}
            )
        path = "/".join(words[4:])
        if path not in files:
            return self.missing("EntryNotFound")
        entry = self.entry(path, files[path])
        etag = f'"{entry.get("lfs", entry)["oid"]}"'
        return self.answer(200, files[path], ETag=etag, X_Repo_Commit=commit)

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        plain = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        lfs = {"lfs": large} if path.endswith(".safetensors") else {}
        return {"type": "file", "oid": plain, "size": len(data), "path": path, **lfs}

    def do_PUT(self) -> None:
        *_, oid = self.begin()
        data = self.read()
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400)
        self.hub.blobs[oid] = data
        return self.answer(200)

    def do_POST(self) -> None:
        words = self.begin()
        body = self.read()
        if self.hub.read_only or "Authorization" not in self.headers:
            said = f"not with {self.headers.get('Authorization')}"
            return self.answer(403 if self.hub.read_only else 401, {"error": said}, X_Error_Message=said)
        if words == ["api", "repos", "create"]:
            wish = json.loads(body)
            name = f"{wish['organization']}/{wish['name']}"
            answer = {"url": f"{self.hub.url}/{name}"}
            if name in self.hub.repositories:
                return self.answer(409, answer)
            fresh = self.hub.repositories[name] = Repository(private=wish.get("visibility") == "private")
            fresh.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            return self.answer(200, answer)
        if words == ["api", "validate-yaml"]:
            import yaml

            head = json.loads(body)["content"].split("---\n")
            sound = len(head) > 2 and isinstance(yaml.safe_load(head[1]), dict)
            return self.answer(200 if sound else 400, {"errors": [] if sound else [{"message": "bad"}]})
        if words[-3:] == ["lfs", "objects", "batch"]:
            wanted = [o for o in json.loads(body)["objects"] if o["oid"] not in self.hub.blobs]
            where = {o["oid"]: {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}} for o in wanted}
            return self.answer(200, {"objects": [o | {"actions": where[o["oid"]]} for o in wanted]})
        repository = self.hub.repositories["/".join(words[2:4])]
        if words[4] == "preupload":
            rows = [
                {"path": f["path"], "shouldIgnore": False}
                | {"uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": rows})
        parents = [json.loads(line)["value"].get("parentCommit") for line in body.splitlines() if b'"header"' in line]
        if parents[0] not in (None, repository.refs["main"]):
            return self.answer(412, {"error": "A commit has happened since"})
        files = dict(repository.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        name = "/".join(words[2:4])
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(hub: Hub, patch: pytest.MonkeyPatch, cache: Path, *, offline: bool = False) -> None:
    """Let huggingface_hub speak to `hub`, and keep its cache in `cache`: what the environment says at import."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # LFS is what the stand-in speaks
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.delenv("HF_TOKEN", raising=False)
