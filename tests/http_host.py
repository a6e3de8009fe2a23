"""A real HTTP server on this machine with faults on demand, and a Hugging Face Hub served by it."""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Served:
    """One file, and the faults with which it is served, in bytes and seconds."""

    body: bytes
    ranges: bool = True
    length: bool = True  # announce Content-Length
    etag: str | None = '"first"'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    fail_first: int = 0  # so many requests are answered 503
    truncate_at: int | None = None  # every body ends here
    drop_first_at: int | None = None  # the first body ends here, later ones are complete
    stall_at: int | None = None  # silence after so many bytes of a body
    pause: float = 0.0  # between pieces
    permits: threading.Semaphore | None = None  # each piece of a body takes one, and waits for it
    piece: int = 1 << 16


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 makes the kernel drop some of several connections at once
    daemon_threads = True


class Host:
    """Serves `files` by path on 127.0.0.1; `requests` lists (path, range, headers), `sent` counts bytes."""

    def __init__(self, files: dict[str, Served] | None = None) -> None:
        self.files = files or {}
        self.requests: list[tuple[str, str | None, dict[str, str]]] = []
        self.sent: dict[str, int] = {}
        self.lock = threading.Lock()
        self.released = threading.Event()  # ends every stall
        self.server = _Server(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Host":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    def url(self, path: str) -> str:
        return self.address + path

    def bodies(self, path: str) -> list[str | None]:
        """Return the ranges asked of a path, without the one-byte probes."""
        return [asked for at, asked, _ in self.requests if at == path and asked != "bytes=0-0"]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host._answer(self)

            def do_HEAD(self) -> None:
                host._answer(self, body=False)

            def log_message(self, *args: object) -> None:
                pass

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool = True) -> None:
        path, asked = unquote(urlsplit(request.path).path), request.headers.get("Range")
        with self.lock:
            self.requests.append((path, asked, dict(request.headers)))
            served = self.files.get(path)
            refused = served is not None and served.fail_first > 0
            if refused:
                served.fail_first -= 1
        if served is None or refused or served.status != 200:
            request.send_response(404 if served is None else 503 if refused else served.status)
            for name, value in (served.headers if served else {}).items():
                request.send_header(name, value)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content, start, end = served.body, 0, len(served.body)
        if asked and served.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else end, end)
            if start >= len(content):
                request.send_response(416)
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            request.send_response(200)
        if served.length:
            request.send_header("Content-Length", str(end - start))
        if served.etag:
            request.send_header("ETag", served.etag)
        for name, value in served.headers.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            self._send(request, path, served, content[start:end])

    def _send(self, request: BaseHTTPRequestHandler, path: str, served: Served, content: bytes) -> None:
        limit = served.truncate_at
        with self.lock:
            if served.drop_first_at is not None and len(content) > 1:
                limit, served.drop_first_at = served.drop_first_at, None
        at = 0
        for at in range(0, len(content), served.piece):
            if served.stall_at is not None and at >= served.stall_at:
                self.released.wait(30)
                break
            if served.permits is not None and len(content) > 1:  # a probe does not count as a body
                served.permits.acquire(timeout=30)
            block = content[at : at + served.piece]
            if limit is not None and at + len(block) > limit:
                block = block[: max(limit - at, 0)]
            try:
                request.wfile.write(block)
            except OSError:  # the client left, or was killed
                break
            with self.lock:
                self.sent[path] = self.sent.get(path, 0) + len(block)
            if limit is not None and at + len(block) >= limit:
                break
            if served.pause:
                time.sleep(served.pause)
        request.close_connection = True


def hub_of(
    repository: str, files: dict[str, bytes], *, commit: str, branch: str = "main", kind: str = "models"
) -> dict[str, Served]:
    """Return what a Hub serves for one repository: the listing with sizes and checksums, and the files.

    Only what a client needs to list and download; files over 1 kB are listed as large ones (LFS), as the
    Hub does with weights.
    """
    siblings = []
    for path, body in sorted(files.items()):
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        entry: dict[str, object] = {"rfilename": path, "size": len(body), "blobId": blob}
        if len(body) > 1000:
            entry["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
        siblings.append(entry)
    listing = {
        "_id": "1",
        "id": repository,
        "modelId": repository,
        "private": False,
        "sha": commit,
        "siblings": siblings,
    }
    pages = "" if kind == "models" else f"/{kind}"
    served = {
        f"{pages}/{repository}/resolve/{commit}/{path}": Served(body, headers={"X-Repo-Commit": commit})
        for path, body in files.items()
    }
    for revision in (branch, commit):
        served[f"/api/{kind}/{repository}/revision/{revision}"] = Served(
            json.dumps(listing).encode(), ranges=False, headers={"Content-Type": "application/json"}
        )
    return served
