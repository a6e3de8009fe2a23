"""A Hugging Face Hub on this machine that accepts uploads: it creates repositories and stores commits."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_the_owners"


class Hub:
    """Repositories as the Hub's API makes and fills them: with large files (LFS) uploaded separately."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        self.writers = {TOKEN}
        self.readers: set[str] = set()
        self.failing = ""  # requests whose path holds this are answered 400
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict]:
        self.requests.append(f"{method} {path}")
        if self.failing and self.failing in path:
            return 400, {"error": "out of order"}
        if path.startswith("/put/"):
            self.large[path.removeprefix("/put/")] = body
            return 200, {}
        if token not in self.writers | self.readers:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repository = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        if method == "GET" and not path.endswith("/write"):
            return 200, {"id": repository, "modelId": repository, "private": self.private[repository]}
        if token not in self.writers:
            return 403, {"error": "You have read access but not the required permissions"}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if path.endswith("/objects/batch"):
            return 200, self._places(json.loads(body))
        if "/commit/" in path:
            return self._commit(repository, [json.loads(line) for line in body.splitlines()])
        return 200, {}

    def _create(self, asked: dict, token: str) -> tuple[int, dict]:
        name = f"{asked['organization']}/{asked['name']}"
        if token not in self.writers:
            return 403, {"error": f"You don't have the rights to create a model under {name}"}
        found = {"url": f"{self.address}/{name}"}
        if name in self.repositories:
            return 409, found | {"error": "You already created this model repo"}
        self.repositories[name] = {}
        self.private[name] = asked.get("visibility") == "private"
        return 200, found

    def _mode(self, path: str) -> dict:
        mode = "lfs" if path.endswith((".safetensors", ".pt", ".mp4")) else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _places(self, asked: dict) -> dict:
        objects = [
            {"oid": each["oid"], "size": each["size"],
             "actions": {"upload": {"href": f"{self.address}/put/{each['oid']}"}}}
            for each in asked["objects"]
        ]  # fmt: skip
        return {"transfer": "basic", "objects": objects}

    def _commit(self, repository: str, entries: list[dict]) -> tuple[int, dict]:
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "header":
                self.messages.append(value["summary"])
            elif entry["key"] == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.repositories[repository][value["path"]] = content
            else:
                self.repositories[repository][value["path"]] = base64.b64decode(value["content"])
        commit = "0" * 40
        url = f"{self.address}/{repository}/commit/{commit}"
        return 200, {"success": True, "commitOid": commit, "commitUrl": url}

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status, content = hub.answer(self.command, self.path.partition("?")[0], token, body)
                reply = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                if status == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.end_headers()
                self.wfile.write(reply)

            do_GET = do_POST = do_PUT = _answer

            def log_message(self, *args: object) -> None:
                pass

        return Handler
