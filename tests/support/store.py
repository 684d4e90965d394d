"""An S3 server for tests (moto's, speaking HTTP), behind a proxy that counts what it carries, and fails on request."""

from __future__ import annotations

import contextlib
import http.client
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bucket"
FAULTS = ("error", "refused", "cut", "slow")  # 500; closed without a word; closed amid the answer; a pause amid it
_ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>injected</Message></Error>"
_NOT_FORWARDED = ("connection", "transfer-encoding", "keep-alive")


class Proxy(ThreadingHTTPServer):
    """Between a client and a server.

    Attributes
    ----------
    url : str
    sent : int
        Bytes of objects that it gave to clients.
    requests : list of (str, str)
        Method and path of each request.
    fault : callable
        From a request's number, method and path to one of `FAULTS`, or None.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = port
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.sent = 0
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[int, str, str], str | None] = lambda number, method, path: None
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        """Say nothing: clients are cut off, and killed, on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else answers wait for the client to acknowledge the one before, some 40 ms
    server: Proxy

    def _answer(self) -> None:
        length = self.headers.get("Content-Length")
        body = self._chunks() if length is None and self.headers.get("Transfer-Encoding") else None
        body = self.rfile.read(int(length or 0)) if body is None else body
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.command, self.path))
        fault = self.server.fault(number, self.command, self.path)
        if fault == "refused":
            self.close_connection = True
            return
        if fault == "error":
            self._send(500, [("Content-Type", "application/xml")], _ERROR, None)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _NOT_FORWARDED}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        kept = [(name, value) for name, value in answer.getheaders() if name.lower() not in _NOT_FORWARDED]
        connection.close()
        self._send(answer.status, kept, content, fault)

    def _chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return found

    def _send(self, status: int, headers: list[tuple[str, str]], content: bytes, fault: str | None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2 if fault in ("cut", "slow") else len(content)
        self.wfile.write(content[:half])
        if self.command == "GET":
            with self.server.lock:
                self.server.sent += half
        if fault == "cut":
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(1.0)
        self.wfile.write(content[half:])

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer


@contextlib.contextmanager
def serving() -> Iterator[Proxy]:
    """Start an empty store and its proxy."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()


def environment(proxy: Proxy) -> dict[str, str]:
    """What tells clients where the store is."""
    return {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
