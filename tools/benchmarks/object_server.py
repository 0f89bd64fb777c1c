"""A web server on loopback that answers requests for ranges, and counts what it is asked for and sends."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class ObjectServer(ThreadingHTTPServer):
    """Serves the files of a folder on a free port while the block lasts; an ETag tells their versions."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.requests, self.bytes = folder, Counter[str](), 0
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def hurt(self, handler: _Handler) -> bool:
        """Called before each answer; True if it has been given. Tests put faults here."""
        return False

    def __enter__(self) -> ObjectServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ObjectServer
    cut = False
    """Whether the next answer ends in its middle."""

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        if self.server.hurt(self):
            return
        file = self.server.folder / self.path.partition("?")[0].lstrip("/")
        if not file.is_file():
            self.answer(404, b"")
            return
        begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        with file.open("rb") as opened:
            state = os.fstat(opened.fileno())
            part = os.pread(opened.fileno(), end + 1 - begin, begin)
        if begin >= state.st_size:
            self.answer(416, b"", {"Content-Range": f"bytes */{state.st_size}"})
            return
        span = f"bytes {begin}-{begin + len(part) - 1}/{state.st_size}"
        self.answer(206, part, {"Content-Range": span, "ETag": f'"{state.st_mtime_ns:x}-{state.st_size:x}"'})

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.server.bytes += len(content)
        self.wfile.write(content[: len(content) // 2] if self.cut else content)
        self.close_connection |= self.cut

    def log_message(self, *_) -> None:
        pass
