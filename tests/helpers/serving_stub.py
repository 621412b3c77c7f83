"""A stand-in for a server of `make serve`: an interpreter that runs a script of ours instead."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.serving.engine import Draft, Engine, Setting
from benchmarks.serving.server import Server

FRAME = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

words = sys.argv


class Handler(BaseHTTPRequestHandler):
    def reply(self, text, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def body(self):
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, *words):
        pass


ROUTES
assert words[words.index("--host") + 1] == "127.0.0.1"
ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Stub).serve_forever()
"""


def interpreter(folder: Path, routes: str) -> Path:
    """An interpreter that serves ``routes``, the source of a ``Handler`` called ``Stub``, whatever
    it is told to run."""
    (folder / "stub.py").write_text(FRAME.replace("ROUTES", routes))
    path = folder / "bin" / "python"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/stub.py "$@"\n')
    path.chmod(0o755)
    return path


def setting(folder: Path, python: Path, device: str = "cpu") -> Setting:
    """The draft and the base are ``folder``; two tokens are drafted."""
    draft = Draft(folder, "eagle3", 2)
    return Setting(python, folder, draft, device, "float32", requests=8)


def server(folder: Path, engine: type[Engine], routes: str, device: str = "cpu") -> Server:
    """The stand-in as a server of ``engine``."""
    return Server(engine(setting(folder, interpreter(folder, routes), device)), folder / "log")
