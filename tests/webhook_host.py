"""A real HTTP server on this machine that records the webhooks it is sent."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WebhookHost:
    """Listens on 127.0.0.1 while entered; `events` are the JSON bodies in the order they arrived."""

    def __init__(self) -> None:
        self.events: list[dict] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"

    def __enter__(self) -> "WebhookHost":
        options = {"poll_interval": 0.02}
        threading.Thread(target=self._server.serve_forever, kwargs=options, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, identifier: str, status: str, *, seconds: float = 15.0) -> dict:
        """The event that says a prediction has `status`.

        It arrives a moment after the reply, and not always last: coglet sends each by itself, and one about
        progress may be overtaken by the final one.
        """
        deadline = time.monotonic() + seconds
        while True:
            events = [event for event in list(self.events) if event["id"] == identifier]
            for event in events:
                if event["status"] == status:
                    return event
            seen = [event["status"] for event in events]
            assert time.monotonic() < deadline, f"no webhook says {status} after {seconds:g} s, only {seen}"
            time.sleep(0.02)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                host.events.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        return Handler
