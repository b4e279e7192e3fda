"""A local HTTP server that stands in for an OpenAI-compatible endpoint."""

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace


@contextlib.contextmanager
def serving(answer: Callable[[str], str] | None = None):
    """A server with `base`, `asked` (path, headers, body) and `answers`, which are used up one per request.

    An answer is the text of a message, an HTTP status, (status, headers), bytes sent as they are, or ("sleep", seconds)
    before a text. Without answers left, `answer` is called with the last message.
    """
    state = SimpleNamespace(asked=[], answers=[], base="")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append((self.path, dict(self.headers), body))
            reply = state.answers.pop(0) if state.answers else answer(body["messages"][-1]["content"])
            status, headers = 200, {}
            if isinstance(reply, tuple) and reply[0] == "sleep":
                time.sleep(reply[1])
                reply = "late"
            elif isinstance(reply, tuple):
                status, headers = reply
            elif isinstance(reply, int):
                status = reply
            if isinstance(reply, str):
                reply = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may have given up
                self.wfile.write(reply if isinstance(reply, bytes) else b"")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.base = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
