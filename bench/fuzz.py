"""Hostile requests to every predictor through the front, drawn from its schema.

script/bench fuzz [--requests 3000] [--seed 0] [--predictor t2v] [--only N]

Most requests are the reference request of a predictor with one thing wrong. After each hundred the reference
must give the bytes that it gave at first. Prints the replies by status; ends with status 1 if a reply was a
5xx, the worker process ended, a file stayed, or a message repeated more than 300 characters of a request or
named a folder of this machine. `--only N` sends one request and prints its reply. Needs no GPU.
"""

import argparse
import base64
import copy
import hashlib
import http.client
import io
import json
import os
import random
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

from bench._arguments import at_least_one
from lib.serving.inputs import input_properties
from lib.serving.registry import predictors
from lib.serving.server import Server
from lib.video.writer import write_video

ROOT = Path(__file__).resolve().parent.parent
SAT = ROOT / "tests" / "data" / "sat" / "sat"
HUNDRED = 100
REPEATED_CHARACTERS = 300
TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "\u202e\u0007\x1b[2J", "\U0001f98a" * 50, "null", "NaN", "../" * 40,
    "{}", "%s%n", "{0.__class__}", "$(touch canary)", "x" * 199, "x" * 5_000, "x" * 10_001, "e\u0301" * 5_000,
    "\n" * 9_999,
)  # fmt: skip
ADDRESSES = (
    "https://[", "https://]", "HTTPS://127.0.0.1/a.mp4", "http://169.254.169.254/latest", "https://127.0.0.1:1/a",
    "https://user:secret@127.0.0.1/a", "https://[::1]/a", "https://0x7f000001/a", "https://invalid.invalid/a.png",
    "ftp://example.com/a", "file:///etc/passwd", "/etc/passwd", "s3://bucket/a", "javascript:alert(1)",
    "a" * 3_000, "data:", "data:,", "data:image/png;base64", "data:image/png;base64,A",
    "data:image/png;base64,!!!!",
    "data:;base64," + "QUFB" * 20_000, "DATA:text/plain;base64,aGVsbG8=", "data:text/plain,hello",
    base64.b64encode(bytes(3_000)).decode(),
)  # fmt: skip
NUMBERS = (0, -1, 2**31, 2**63, 10**40, 1e308, 0.5, -0.0)
OTHERS = (None, True, False, [], {}, [[[[]]]], {"a": {"b": []}}, ["x"], {"__class__": "x"})
IDS = ("a", "A-b_9" * 8, "..", "%2e%2e", "a%2fb", "a%00", "a" * 65, "a" * 5_000, "%E2%80%AE", "a b", "~")
WEBHOOKS = (
    "http://127.0.0.1:1/",
    "https://[",
    "ftp://a/b",
    "",
    3,
    {"a": 1},
    "https://169.254.169.254/",
    "x" * 9_000,
)
HEADERS = (
    {"Host": "evil.example"}, {"Host": ""}, {"Origin": "https://evil.example"}, {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"}, {"Content-Type": "text/plain"}, {"Content-Type": "application/jsonx"},
    {"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Encoding": "gzip"}, {"Prefer": "wait=-1"},
    {"Prefer": "respond-sync" * 500}, {"Transfer-Encoding": "chunked"}, {"Traceparent": "x" * 1_000},
)  # fmt: skip
PATHS = (
    "/", "/docs", "/predictions/", "/predictions/a/b", "/predictions/a/cancel", "/trainings", "/shutdown",
    "/webhooks/x", "/openapi.json", "/health-check", "/../../etc/passwd", "//predictions",
    "/predictions?x=" + "y" * 3_000,
    "/%00",
)  # fmt: skip
METHODS = ("GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW")


class Sent(NamedTuple):
    """A request as it goes over the wire."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]


class Reply(NamedTuple):
    status: int
    body: bytes
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="script/bench fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=at_least_one, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--predictor", choices=list(predictors()))
    parser.add_argument("--only", type=int, help="the number of a request of one predictor")
    options = parser.parse_args()
    names = [options.predictor] if options.predictor else list(predictors())
    faults = []
    with tempfile.TemporaryDirectory() as temporary:
        os.environ |= {"TMPDIR": temporary, "COGVIDEOX_CACHE": f"{temporary}/cache", "COGVIDEOX_MODEL": ""}
        tempfile.tempdir = temporary
        print("| predictor | requests | replies by status | longest | memory |\n|---|---|---|---|---|")
        for place, name in enumerate(names):
            numbers = range(place, options.requests, len(names))
            faults += fuzz(name, numbers if options.only is None else [options.only], options.seed)
            left = [path.name for path in Path(temporary).iterdir() if path.name != "cache"]
            faults += [f"{name}: left {left}"] if left else []
    print("\n".join(faults) or "no faults")
    sys.exit(bool(faults))


def fuzz(name: str, numbers: range | list[int], seed: int) -> list[str]:
    """Send the requests of these numbers to a server of one predictor; return the faults."""
    faults, statuses, longest, reference = [], Counter[int](), 0.0, REFERENCES[name]()
    lines: list[str] = []
    with Server(name, environment={"CUDA_VISIBLE_DEVICES": ""}, on_log=lines.append) as server:
        assert server.backend is not None and server.backend.process is not None
        properties = input_properties(server.config.openapi("predict"))
        process, scratch = server.backend.process.pid, server.backend.scratch
        wanted, kept = output(server, reference), files(scratch)
        if ":" in wanted:
            return [f"{name}: the reference request {wanted}"]
        memory = resident(process)
        for count, number in enumerate(numbers, start=1):
            sent = draw(random.Random(f"{seed} {name} {number}"), reference, properties)
            reply = send(server, sent)
            statuses[reply.status] += 1
            longest = max(longest, reply.seconds)
            found = list(problems(sent, reply, str(scratch)))
            faults += [
                f"{name}, number {number}: {each}: {shown(sent)} -> {reply.body[:300]!r}" for each in found
            ]
            if len(numbers) == 1:
                print(shown(sent), reply.status, reply.body[:2_000])
            if count % HUNDRED == 0 or count == len(numbers):
                if output(server, reference) != wanted:
                    faults.append(f"{name}: the reference differs after number {number}")
                if (now := files(scratch)) != kept:
                    faults.append(f"{name}: after number {number} there are {sorted(now - kept)[:5]}")
                if server.backend.process.pid != process:
                    faults.append(f"{name}: the server's process ended before number {number}")
                    process = server.backend.process.pid
        grown = resident(process) - memory
    faults += [f"{name}: {line}" for line in lines if "started again" in line or "Traceback" in line]
    replies = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(f"| {name} | {len(numbers)} | {replies} | {longest:.1f} s | {grown / 1e6:+.0f} MB |", flush=True)
    return faults


def draw(rng: random.Random, reference: dict[str, Any], properties: dict[str, dict[str, Any]]) -> Sent:
    """Return a request with one thing wrong, sometimes none."""
    body: Any = {"input": copy.deepcopy(reference)}
    sent = Sent("POST", "/predictions", b"", {"Content-Type": "application/json"})
    kind = rng.choices(
        (
            "value",
            "unknown",
            "missing",
            "body",
            "broken",
            "header",
            "id",
            "path",
            "webhook",
            "cancel",
            "none",
        ),
        (50, 4, 4, 4, 6, 8, 8, 6, 4, 2, 4),
    )[0]
    if kind == "value":
        name = rng.choice(list(properties))
        body["input"][name] = hostile_value(rng, properties[name])
    elif kind == "unknown":
        body["input"][rng.choice(("nonsense", "__proto__", "x" * 3_000, "\ud800", ""))] = rng.choice(OTHERS)
    elif kind == "missing":
        body["input"].pop(rng.choice(list(reference)))
    elif kind == "body":
        body = rng.choice(([], "text", 3, None, {}, {"input": []}, {"input": None}, {"input": "x" * 3_000}))
    elif kind == "header":
        sent = sent._replace(headers=sent.headers | rng.choice(HEADERS))
    elif kind == "id":
        identifier = rng.choice(IDS)
        sent = sent._replace(method="PUT", path=f"/predictions/{identifier.replace(' ', '%20')}")
        if rng.random() < 0.4:
            sent, body["id"] = (
                sent._replace(method="POST", path="/predictions"),
                rng.choice((identifier, 7, {}, None)),
            )
    elif kind == "path":
        sent = sent._replace(method=rng.choice(METHODS), path=rng.choice(PATHS))
        body["input"] = []  # an asynchronous prediction would still run when the next request comes
    elif kind == "webhook":
        body |= {
            "webhook": rng.choice(WEBHOOKS),
            "webhook_events_filter": rng.choice((["completed"], ["x"], 3, None)),
        }
    elif kind == "cancel":
        sent = sent._replace(path=f"/predictions/{rng.choice(IDS).replace(' ', '%20')}/cancel")
    content = json.dumps(body).encode()
    if kind == "value" and rng.random() < 0.05:
        content = content.replace(b": 1", rng.choice((b": NaN", b": Infinity", b": 1e999", b": 01")), 1)
    return sent._replace(body=broken(rng, content) if kind == "broken" else content)


def hostile_value(rng: random.Random, shape: dict[str, Any]) -> Any:
    """Return a value for an input, mostly of its own type."""
    if rng.random() < 0.15:
        return rng.choice(OTHERS)
    if shape.get("type") in ("integer", "number") and rng.random() < 0.9:
        bounds = [shape[name] + step for name, step in (("minimum", -1), ("maximum", 1)) if name in shape]
        return rng.choice((*NUMBERS, *bounds))
    if shape.get("format") == "uri" or rng.random() < 0.2:
        return rng.choice(ADDRESSES)
    return rng.choice((*TEXTS, *NUMBERS))


def broken(rng: random.Random, content: bytes) -> bytes:
    """Return JSON that is damaged."""
    place = rng.randrange(len(content))
    return rng.choice(
        (
            b"", content[:place], content[:place] + b"\xff" + content[place:], b"[" * 100_000, b"\0" * 100,
            b'{"input": {"a": ' + b'{"a": ' * 5_000 + b"1" + b"}" * 5_002,
            b"\xef\xbb\xbf" + content, content * 2,
            b'{"input": {}, "input": []}', b"1" * 5_000,
        )
    )  # fmt: skip


def problems(sent: Sent, reply: Reply, scratch: str) -> Iterator[str]:
    """Yield what is wrong with a reply."""
    if reply.status >= 500:
        yield f"status {reply.status}"
    try:
        document = json.loads(reply.body)
    except ValueError:
        document = reply.body.decode(errors="replace")
    is_document = isinstance(document, dict) and "openapi" in document
    said = document.get("error") or document.get("detail") or "" if isinstance(document, dict) else document
    message = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    if scratch in message or tempfile.gettempdir() in message or "Traceback" in message:
        yield "it shows the inside"
    given = sent.path + sent.body.decode(errors="replace")
    size = REPEATED_CHARACTERS
    pieces = {given[start : start + size] for start in range(0, len(given) - size, 50)}
    if not is_document and any(piece in message for piece in pieces):
        yield f"it repeats more than {size} characters"


def send(server: Server, sent: Sent) -> Reply:
    """Send a request. A server that is still at the one before is asked again."""
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        started = time.monotonic()
        try:
            connection.putrequest(sent.method, sent.path, skip_host="Host" in sent.headers)
            for name, value in {"Content-Length": str(len(sent.body)), **sent.headers}.items():
                if not (name == "Content-Length" and "Transfer-Encoding" in sent.headers):
                    connection.putheader(name, value)
            chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(sent.body), sent.body)
            connection.endheaders(chunked if "Transfer-Encoding" in sent.headers else sent.body)
            response = connection.getresponse()
            reply = Reply(response.status, response.read(), time.monotonic() - started)
        finally:
            connection.close()
        if reply.status != 409:
            return reply
        time.sleep(0.05)


def output(server: Server, inputs: dict[str, Any]) -> str:
    """Return the hash of what the reference request gives."""
    body = json.dumps({"input": inputs}).encode()
    reply = send(server, Sent("POST", "/predictions", body, {"Content-Type": "application/json"}))
    document = json.loads(reply.body)
    if document.get("status") != "succeeded":
        return f"{document.get('status')}: {document.get('error')}"
    return hashlib.sha256(json.dumps(document["output"]).encode()).hexdigest()


def files(folder: Path) -> Counter[str]:
    """Return the files and folders in a server's scratch directory, without what is random in their names."""
    names = ("/".join(part[:10] for part in path.relative_to(folder).parts[:2]) for path in folder.rglob("*"))
    return Counter(names)


def resident(process: int) -> int:
    """Return the memory of a process and its children in bytes."""
    root = psutil.Process(process)
    return sum(each.memory_info().rss for each in (root, *root.children(recursive=True)))


def shown(sent: Sent) -> str:
    return f"{sent.method} {sent.path[:80]} {sent.headers} {sent.body[:200]!r}"


def uri(content: bytes, kind: str = "application/octet-stream") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def clip() -> bytes:
    """Return a small video."""
    frames = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        return write_video(frames, Path(folder) / "clip.mp4", fps=8, format="mp4", metadata={}).read_bytes()


def picture() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 48), 50).convert("RGB").save(file, "PNG")
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr("clip.mp4", clip())
    return file.getvalue()


QUICK = {"prompt": "a red circle", "num_inference_steps": 1, "num_frames": 9, "seed": 1}
REFERENCES: dict[str, Callable[[], dict[str, Any]]] = {
    "t2v": lambda: dict(QUICK),
    "i2v": lambda: QUICK | {"image": uri(picture(), "image/png")},
    "caption": lambda: {"video": uri(clip(), "video/mp4"), "max_new_tokens": 4},
    "caption_dataset": lambda: {"input_videos": uri(archive(), "application/zip"), "max_new_tokens": 4},
    "convert": lambda: {
        "vae": uri((SAT / "vae.pt").read_bytes()),
        "family": "cogvideox-2b",
        "overrides": "norm_num_groups=2",
    },
    "export_lora": lambda: {"lora": uri((SAT / "lora-t2v-2b.pt").read_bytes())},
}
"""A small request for each predictor."""


if __name__ == "__main__":
    main()
