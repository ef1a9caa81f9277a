"""A small hub on loopback: the endpoints from which models are fetched, and faults on demand.

    GET  /api/models/org/name[/revision/REV]         commit, files, sizes, hashes
    GET  /api/models/org/name/tree/REV               the files alone
    HEAD, GET /org/name/resolve/REV/FILE             bytes, whole or a range; large files elsewhere
    GET  /stored/HASH                                where large files lead to

Nothing here is of huggingface_hub: what it is asked is what its documentation says.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".onnx")


@dataclass(slots=True)
class Fault:
    """Answers the next `times` requests whose path has `part` in it."""

    part: str
    status: int = 0  # 0: the answer is the right one, but see below
    headers: dict[str, str] = field(default_factory=dict)
    cut_after_bytes: int | None = None  # then the connection is closed
    stalls: bool = False  # before that, until the hub stops
    flips_a_bit: bool = False
    ignores_range: bool = False
    times: int = 1


@dataclass(frozen=True, slots=True)
class Asked:
    method: str
    path: str
    range: str | None
    token: str | None


class FakeHub:
    """Repositories are folders: `org/name` to where its files are, all at COMMIT."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        self.repositories = repositories
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.gate: str | None = None  # the token without which files are refused
        self.stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Idempotent; afterwards nobody answers at the endpoint."""
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fault_for(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times > 0 and fault.part in path:
                fault.times -= 1
                return fault
        return None

    def fetched(self) -> list[str]:
        """The files of which bytes were asked for, in that order."""
        return [
            one.path.rpartition("/")[2]
            for one in self.asked
            if one.method == "GET" and "/resolve/" in one.path
        ]


@contextmanager
def fake_hub(repositories: dict[str, Path]) -> Iterator[FakeHub]:
    hub = FakeHub(repositories)
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


def blob_of(path: Path) -> str:
    """The name of its bytes: SHA-256 of what is large, else what git says."""
    data = path.read_bytes()
    if path.name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(folder: Path) -> list[tuple[str, Path]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path) for path in found]


def _sibling(name: str, path: Path) -> dict[str, object]:
    size_bytes, blob = path.stat().st_size, blob_of(path)
    if not path.name.endswith(LARGE):
        return {"rfilename": name, "size": size_bytes, "blobId": blob}
    stored = {"sha256": blob, "size": size_bytes, "pointerSize": 130}
    return {"rfilename": name, "size": size_bytes, "blobId": "f" * 40, "lfs": stored}


def _in_tree(name: str, path: Path) -> dict[str, object]:
    size_bytes, blob = path.stat().st_size, blob_of(path)
    found = {"type": "file", "path": name, "size": size_bytes}
    if not path.name.endswith(LARGE):
        return found | {"oid": blob}
    return found | {"oid": "f" * 40, "lfs": {"oid": blob, "size": size_bytes, "pointerSize": 130}}


class _Server(ThreadingHTTPServer):
    hub: FakeHub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def _hub(self) -> FakeHub:
        assert isinstance(self.server, _Server)
        return self.server.hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self._hub.asked.append(Asked(self.command, path, self.headers.get("Range"), token))
        fault = self._hub.fault_for(path)
        if fault is not None and fault.status:
            self._send(fault.status, b"{}", fault.headers)
        elif path.startswith("/api/models/"):
            self._list(path.removeprefix("/api/models/"))
        elif path.startswith("/stored/"):
            self._stored(path.removeprefix("/stored/"), fault)
        else:
            self._resolve(path, fault)

    def _list(self, rest: str) -> None:
        words = rest.split("/")
        folder = self._hub.repositories.get("/".join(words[:2]))
        revision = words[3] if len(words) > 3 else "main"
        if folder is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            siblings = [_sibling(*entry) for entry in _entries(folder)]
            found = {"id": "/".join(words[:2]), "sha": COMMIT, "siblings": siblings}
            tree = [_in_tree(*entry) for entry in _entries(folder)]
            whole: object = tree if words[2:3] == ["tree"] else found
            self._send(200, json.dumps(whole).encode(), {"Content-Type": "application/json"})

    def _resolve(self, path: str, fault: Fault | None) -> None:
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        folder = self._hub.repositories.get(repository)
        file = None if folder is None else folder / rest.partition("/")[2]
        token = None if self._hub.gate is None else f"Bearer {self._hub.gate}"
        if token is not None and self.headers.get("Authorization") != token:
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        elif file is None or not file.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        elif file.name.endswith(LARGE):
            blob, size = blob_of(file), str(file.stat().st_size)
            # another host name of the same server, as a hub's storage has: no token for it
            port = self._hub.endpoint.rpartition(":")[2]
            linked = {"X-Linked-Etag": f'"{blob}"', "X-Linked-Size": size}
            place = {"Location": f"http://localhost:{port}/stored/{blob}"}
            self._send(302, b"", {"X-Repo-Commit": COMMIT, **linked, **place})
        else:
            self._bytes(file.read_bytes(), blob_of(file), fault)

    def _stored(self, blob: str, fault: Fault | None) -> None:
        for folder in self._hub.repositories.values():
            for _, path in _entries(folder):
                if path.name.endswith(LARGE) and blob_of(path) == blob:
                    self._bytes(path.read_bytes(), blob, fault)
                    return
        self._send(404, b"", {})

    def _bytes(self, data: bytes, etag: str, fault: Fault | None) -> None:
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}
        asked, status, whole = self.headers.get("Range"), 200, len(data)
        if fault is not None and fault.flips_a_bit:
            data = bytes([data[0] ^ 1]) + data[1:]
        if asked is not None and not (fault is not None and fault.ignores_range):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            data, status = data[start:], 206
            headers["Content-Range"] = f"bytes {start}-{whole - 1}/{whole}"
        cut = None if fault is None else fault.cut_after_bytes
        self._send(status, data, headers, cut)
        if fault is not None and fault.stalls:
            self._hub.stopping.wait()

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # none is left when the hub has stopped
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        self.close_connection = True
