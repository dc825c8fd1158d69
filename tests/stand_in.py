"""A stand-in for the Hugging Face Hub: a real HTTP server on this machine that the real client talks to.

It has what a `hf:` source needs: a data set at a revision, the tree of a commit in pages, and files by byte range, of
which the large ones are redirected to another host as the Hub does; and of a model its files, with what the client's
cache asks of each, and commits. It counts what it sends, and does on demand what networks do: `fault` is asked at each
request.

    truncate   half of the body, then the connection is closed
    429, 503   and any other status, with Retry-After: 0, or what stands behind it ("429 60")
    reset      the connection is reset where the body should be
    stall      half of the body, then nothing until the server closes
    no json    a page for people where JSON should be
    no ranges  the whole file, whatever range was asked for
    page       a page for people where a file should be, with status 200 and no length
    sized page the same, with its length
    longer     the whole body, but more was announced; then the connection is closed
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

LARGE_BYTES = 10_000  # from here on a file is large, as git-lfs has it
PAGE = 3
SLOW_CHUNK = 1 << 14


class Request(NamedTuple):
    number: int
    kind: str
    """info, tree, resolve, or content of a large file; file or head of a model."""
    path: str
    range: str
    token: str


@dataclass
class Repository:
    """Commits, and a branch that can move."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cards: dict[str, Any] = field(default_factory=dict)
    main: str = ""
    gated: bool = False

    def commit(self, files: dict[str, bytes], card: Any = None) -> str:
        self.main = hashlib.sha1(json.dumps([len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits[self.main], self.cards[self.main] = files, card
        return self.main


class StandIn(http.server.ThreadingHTTPServer):
    """The server; `with StandIn() as hub` runs it."""

    daemon_threads = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self.put: dict[str, bytes] = {}
        """Large files of a commit that is to come, by their SHA-256."""
        self.connections = 0
        self.fault: Callable[[Request], str | None] = lambda request: None
        self.rate: float | None = None
        """Bytes of bodies a second, of each connection."""
        self.closing = threading.Event()
        self.counting = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes], card: Any = None) -> Repository:
        repository = self.repositories[name] = Repository()
        repository.commit(files, card)
        return repository

    def forget(self) -> None:
        """Counts from nothing again."""
        with self.counting:
            self.requests.clear()
            self.sent.clear()

    def asked(self, kind: str) -> list[Request]:
        return [request for request in self.requests if request.kind == kind]

    def verify_request(self, request: object, address: object) -> bool:
        self.connections += 1
        return True

    def __enter__(self) -> StandIn:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, request: object, address: object) -> None:
        """A client that goes away in the middle of an answer is what the tests are about."""


@contextlib.contextmanager
def standing_in() -> Iterator[StandIn]:
    """A stand-in that the client of this process takes for the Hub, which it otherwise knows from its import on."""
    with StandIn() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setenv("no_proxy", "127.0.0.1,localhost")
        patch.delenv("HF_TOKEN", raising=False)
        close_session()
        try:
            yield hub
        finally:
            close_session()


MODEL_TREE = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/tree/main")
COMMIT = re.compile(r"/api/models/(?P<name>[^/]+/[^/]+)/(?P<what>preupload|commit)/main")
ROUTE = re.compile(
    r"/api/datasets/(?P<info>[^/]+/[^/]+)(/revision/(?P<at>[^/]+))?"
    r"|/api/datasets/(?P<tree>[^/]+/[^/]+)/tree/(?P<tree_at>[^/]+)(/(?P<folder>.+))?"
    r"|/datasets/(?P<resolve>[^/]+/[^/]+)/resolve/(?P<resolve_at>[^/]+)/(?P<path>.+)"
    r"|/(?P<file>[^/]+/[^/]+)/resolve/(?P<file_at>[^/]+)/(?P<file_path>.+)"
    r"|/content/(?P<content>[^/]+/[^/]+)/(?P<content_at>[^/]+)/(?P<content_path>.+)"
)


class Handler(http.server.BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    # --- a commit: what is small comes inside it, what is large was put before

    def do_POST(self) -> None:
        body = self.body()
        with self.server.counting:
            words = [self.headers.get(name, "") for name in ("Range", "Authorization")]
            self.server.requests.append(Request(len(self.server.requests) + 1, "post", self.path, *words))
        self.fault = None
        if status := self.server.fault(self.server.requests[-1]):
            self.answer(int(status), b"", {})
        elif self.path == "/api/repos/create":
            name = json.loads(body)["name"], json.loads(body).get("organization")
            if (joined := "/".join(filter(None, reversed(name)))) not in self.server.repositories:
                self.server.add(joined, {})
            self.answer_json({"url": f"{self.server.url}/{'/'.join(filter(None, reversed(name)))}"})
        elif self.path == "/api/validate-yaml":
            self.answer_json({"errors": [], "warnings": []})
        elif self.path.endswith("/objects/batch"):
            self.answer_json({"transfer": "basic", "objects": list(map(self.place, json.loads(body)["objects"]))})
        elif (match := COMMIT.fullmatch(self.path)) and match["what"] == "preupload":
            modes = {True: "lfs", False: "regular"}
            files = json.loads(body)["files"]
            modes_of = [{"path": one["path"], "uploadMode": modes[one["size"] >= LARGE_BYTES]} for one in files]
            self.answer_json({"files": [one | {"shouldIgnore": False} for one in modes_of]})
        else:
            assert match, self.path
            oid = self.server.add(match["name"], self.committed(match["name"], body)).main
            url = f"{self.server.url}/{match['name']}/commit/{oid}"
            self.answer_json({"success": True, "commitUrl": url, "commitOid": oid})

    def body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def place(self, large: dict[str, Any]) -> dict[str, Any]:
        return large | {"actions": {"upload": {"href": f"{self.server.url}/put/{large['oid']}"}}}

    def do_PUT(self) -> None:
        data = self.body()
        assert self.path == f"/put/{hashlib.sha256(data).hexdigest()}"
        self.server.put[self.path.rpartition("/")[2]] = data
        self.fault = None
        self.answer(200, b"", {})

    def committed(self, name: str, body: bytes) -> dict[str, bytes]:
        """All files after a commit: what it brings, and what was there and is not taken away."""
        lines = [json.loads(line) for line in body.splitlines()]
        small = [line["value"] for line in lines if line["key"] == "file"]
        large = [line["value"] for line in lines if line["key"] == "lfsFile"]
        gone = {line["value"]["path"] for line in lines if line["key"] == "deletedFile"}
        before = self.server.repositories.get(name)
        kept = before.commits[before.main].items() if before else ()
        files = {path: data for path, data in kept if path not in gone}
        files |= {one["path"]: base64.b64decode(one["content"]) for one in small}
        return files | {one["path"]: self.server.put[one["oid"]] for one in large}

    def do_GET(self) -> None:
        split = urlsplit(self.path)
        if (match := MODEL_TREE.fullmatch(split.path)) and (there := self.server.repositories.get(match["name"])):
            self.fault = None
            files = there.commits[there.main]
            self.answer_json([{"type": "file", "path": p, "size": len(files[p]), "oid": "0"} for p in sorted(files)])
            return
        if split.path.startswith(("/api/agent-harnesses", "/api/models/")):  # what the client asks for by the way
            self.fault = None
            self.answer(404, b"", {})
            return
        match = ROUTE.fullmatch(split.path)
        assert match, self.path
        kind = next(name for name in ("info", "tree", "resolve", "content", "file") if match[name])
        path = unquote(match["path"] or match["content_path"] or match["folder"] or match["file_path"] or "")
        with self.server.counting:
            number = len(self.server.requests) + 1
            words = [self.headers.get(name, "") for name in ("Range", "Authorization")]
            request = Request(number, "head" if self.command == "HEAD" else kind, path, *words)
            self.server.requests.append(request)
        self.fault = self.server.fault(request)
        if self.fault and self.fault[:3].isdecimal():
            status, _, after_s = self.fault.partition(" ")
            self.answer(int(status), b"", {"Retry-After": after_s or "0"})
            return
        repository = self.server.repositories.get(match[kind])
        if repository is None:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        if repository.gated and not request.token:
            self.answer(401, b"", {"X-Error-Code": "GatedRepo"})
            return
        given = [match[name] for name in ("at", "tree_at", "resolve_at", "content_at", "file_at") if match[name]]
        revision = unquote(given[0] if given else "main")
        commit = repository.main if revision == "main" else revision
        if commit not in repository.commits:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return
        getattr(self, kind)(repository, match[kind], commit, path, parse_qs(split.query))

    def info(self, repository: Repository, name: str, commit: str, path: str, query: dict[str, list[str]]) -> None:
        assert set(query["expand"]) == {"sha", "cardData"}
        card = repository.cards[commit]
        self.answer_json({"id": name, "sha": commit, "_id": "0"} | ({"cardData": card} if card else {}))

    def tree(self, repository: Repository, name: str, commit: str, path: str, query: dict[str, list[str]]) -> None:
        files = repository.commits[commit]
        below = sorted(file for file in files if not path or file.startswith(path + "/"))
        if path and not below:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        first = int(query.get("cursor", ["0"])[0])
        entries = [{"type": "directory", "path": "a folder", "oid": "0" * 40, "size": 0}] if first == 0 else []
        entries += [self.entry(file, files[file]) for file in below[first : first + PAGE]]
        more = first + PAGE < len(below)
        url = f"{self.server.url}{urlsplit(self.path).path}?recursive=true&cursor={first + PAGE}"
        self.answer_json(entries, {"Link": f'<{url}>; rel="next"'} if more else {})

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": git}
        if len(data) >= LARGE_BYTES:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def resolve(self, repository: Repository, name: str, commit: str, path: str, query: dict[str, list[str]]) -> None:
        data = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        elif len(data) >= LARGE_BYTES:
            location = f"http://localhost:{self.server.server_port}/content/{name}/{commit}/{path}"
            self.answer(302, b"", headers | {"Location": location})
        else:
            self.answer_range(path, data, headers)

    def content(self, repository: Repository, name: str, commit: str, path: str, query: dict[str, list[str]]) -> None:
        self.answer_range(path, repository.commits[commit][path], {})

    def file(self, repository: Repository, name: str, commit: str, path: str, query: dict[str, list[str]]) -> None:
        """Of a model: the cache asks for the ETag first, and for the file from where it broke off."""
        data = repository.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if data is None:
            self.answer(404, b"", headers | {"X-Error-Code": "EntryNotFound"})
            return
        headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.answer(206 if start else 200, data[start:], headers, path)

    def answer_range(self, path: str, data: bytes, headers: dict[str, str]) -> None:
        assert self.headers["Accept-Encoding"] == "identity", "what is packed on the way has other offsets"
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert match
        first, last = int(match[1]), int(match[2])
        assert first <= last < len(data)
        if self.fault in ("page", "sized page"):
            self.answer(200, b"<html>log in first</html>" * 200, headers)
        elif self.fault == "no ranges":
            self.answer(200, data, headers, path)
        else:
            wide = headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            self.answer(206, data[first : last + 1], wide, path)

    def answer_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        body = b"<html>" if self.fault == "no json" else json.dumps(value).encode()
        self.answer(200, body, {"Content-Type": "application/json"} | (headers or {}))

    def send(self, body: bytes) -> None:
        rate, began_at = self.server.rate, time.monotonic()
        if rate is None:
            self.wfile.write(body)
            return
        for sent in range(0, len(body), SLOW_CHUNK):
            self.wfile.write(body[sent : sent + SLOW_CHUNK])
            time.sleep(max(0.0, began_at + (sent + SLOW_CHUNK) / rate - time.monotonic()))

    def answer(self, status: int, body: bytes, headers: dict[str, str], path: str = "") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.fault != "page":
            self.send_header("Content-Length", str(len(body) + (self.fault == "longer")))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True
            return
        broken = self.fault in ("truncate", "stall")
        part = body[: len(body) // 2] if broken else body
        with self.server.counting:
            self.server.sent[path] += len(part)
        self.send(part)
        if self.fault == "stall":
            self.server.closing.wait()
        self.close_connection = self.close_connection or broken or self.fault in ("page", "longer")
