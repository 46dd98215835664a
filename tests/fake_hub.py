"""A Hugging Face hub on the loopback interface: repositories, commits, tags, large files, as far as MONAI uses them.

Written against what huggingface_hub 2.4 sends. Left out: Xet storage (set ``HF_HUB_DISABLE_XET=1``), pull requests,
branches besides main, and access rights: any token is accepted.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

#: What the hub's own .gitattributes sends to large-file storage.
LARGE = (".pt", ".ts", ".safetensors", ".onnx", ".zip", ".bin")
#: The hub begins every repository with this file.
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()


class NoEntry(Exception):
    """What the hub answers with 404; the argument is its X-Error-Code."""


class Repository:
    """Commits of one model: path -> bytes."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        self.tags: dict[str, str] = {}
        self.head = ""
        self.commit({".gitattributes": GITATTRIBUTES})

    def commit(self, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(self.head.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        self.head = digest.hexdigest()
        self.commits[self.head] = files
        return self.head

    def revision(self, name: str) -> str:
        oid = self.head if name == "main" else self.tags.get(name, name)
        if oid not in self.commits:
            raise NoEntry("RevisionNotFound")
        return oid


class FakeHub:
    """Serves until :meth:`close`; a context manager.

    Attributes:
        endpoint: for ``HF_ENDPOINT``.
        repositories: by ``OWNER/NAME``.
        requests: method and path of all requests, in order.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: str) -> dict[str, str]:
        """Variables that point a child process here, before it imports huggingface_hub."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": "hf_standin", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip

    def repository(self, name: str) -> Repository:
        if name not in self.repositories:
            raise NoEntry("RepoNotFound")
        return self.repositories[name]

    def post(self, words: list[str], body: bytes) -> tuple[int, Any]:
        """Answer what changes something."""
        match words:
            case ["api", "validate-yaml"]:
                return 200, {"warnings": [], "errors": []}
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                known = name in self.repositories
                self.repositories.setdefault(name, Repository())
                return 409 if known else 200, {"url": f"{self.endpoint}/{name}", "name": name}
            case ["api", "models", owner, name, "preupload", _]:
                self.repository(f"{owner}/{name}")
                paths = [file["path"] for file in json.loads(body)["files"]]
                mode = {True: "lfs", False: "regular"}
                return 200, {
                    "files": [{"path": p, "uploadMode": mode[p.endswith(LARGE)], "shouldIgnore": False} for p in paths]
                }
            case [_, _, "info", "lfs", "objects", "batch"]:
                return 200, {"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]}
            case ["api", "models", owner, name, "commit", _]:
                return 200, self._commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
            case ["api", "models", owner, name, "tag", revision]:
                repository = self.repository(f"{owner}/{name}")
                tag = json.loads(body)["tag"]
                if tag in repository.tags:
                    return 409, {"error": "tag exists"}
                repository.tags[tag] = repository.revision(revision)
                return 200, {}
        raise NoEntry("EntryNotFound")

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.large_files:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.endpoint}/lfs/{wanted['oid']}", "header": {}}}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        repository = self.repository(name)
        files = dict(repository.commits[repository.head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        oid = repository.commit(files)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{name}/commit/{oid}"}

    def get(self, words: list[str]) -> Any:
        """Answer what is asked about a repository."""
        match words:
            case ["api", "models", owner, name, "refs"]:
                repository = self.repository(f"{owner}/{name}")
                tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": c} for t, c in repository.tags.items()]
                main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}
                return {"branches": [main], "converts": [], "tags": tags}
            case ["api", "models", owner, name, "revision", revision]:
                oid = self.repository(f"{owner}/{name}").revision(revision)
                return {"id": f"{owner}/{name}", "sha": oid, "siblings": [], "tags": [], "private": True}
            case ["api", "models", owner, name, "tree", revision]:
                repository = self.repository(f"{owner}/{name}")
                return [_entry(p, c) for p, c in repository.commits[repository.revision(revision)].items()]
        raise NoEntry("EntryNotFound")

    def file(self, words: list[str]) -> tuple[str, bytes]:
        """Commit and content of ``OWNER/NAME/resolve/REVISION/PATH``."""
        match words:
            case [owner, name, "resolve", revision, *path]:
                repository = self.repository(f"{owner}/{name}")
                oid = repository.revision(revision)
                if "/".join(path) in repository.commits[oid]:
                    return oid, repository.commits[oid]["/".join(path)]
        raise NoEntry("EntryNotFound")


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_id(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_POST(self) -> None:
        body = self._body()
        self._answer(lambda: self.hub.post(self._words(), body))

    def do_PUT(self) -> None:
        body = self._body()
        oid = self._words()[-1]
        # Real storage compares as well: a file that was changed during the upload is not taken.
        if hashlib.sha256(body).hexdigest() == oid:
            self.hub.large_files[oid] = body
        self._answer(lambda: (200 if oid in self.hub.large_files else 400, {}))

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            self._answer(lambda: (200, self.hub.get(self._words())))
        else:
            self._send_file()

    def do_HEAD(self) -> None:
        self._send_file()

    def _words(self) -> list[str]:
        self.hub.requests.append(f"{self.command} {self.path}")
        return [unquote(word) for word in urlsplit(self.path).path.strip("/").split("/")]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, make: Callable[[], tuple[int, Any]]) -> None:
        try:
            status, content = make()
        except NoEntry as error:
            self._send(404, b"{}", {"X-Error-Code": str(error), "X-Error-Message": "not found"})
            return
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send_file(self) -> None:
        words = self._words()
        try:
            oid, content = self.hub.file(words)
        except NoEntry as error:
            self._send(404, b"", {"X-Error-Code": str(error), "X-Error-Message": "not found"})
            return
        large = words[-1].endswith(LARGE)
        etag = hashlib.sha256(content).hexdigest() if large else _git_id(content)
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
