"""The review in a browser: a page, its state, and what a person says, on this machine alone.

    http://127.0.0.1:PORT/TOKEN/          page.html, page.js and page.css, which hold no row
    http://127.0.0.1:PORT/TOKEN/state     GET: {"row": {"id": "7", "input": "My parcel is late.", ...}, ...}
    http://127.0.0.1:PORT/TOKEN/act       POST {"act": "answer", "id": "7", "output": "delivery"}: the next state

Who does not know the token gets nothing. Another site's page that runs in the same browser can neither read nor post:
the Host has to be this address (against DNS rebinding), a post has to come from this origin and be JSON. The standard
library's server: three paths for one person on loopback need no framework, and so `review` needs no extra package.
Sources: Fetch (the Origin header), CSP Level 3, OWASP's cheat sheet on cross-site request forgery.
"""

import hmac
import secrets
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from sg_local.errors import InputError, SgLocalError
from sg_local.escape import json_text
from sg_local.files import decoded, parse_json
from sg_local.review.session import Session
from sg_local.selfguide.rows import Word

MAX_BODY_BYTES = 1 << 18  # an answer of the greatest length, with every character as an escape
REQUEST_SECONDS = 10.0
_FILES = {
    "": ("page.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # The address holds the token. By "no-referrer", browsers may hide the origin of a post from us too.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class ReviewServer(ThreadingHTTPServer):
    """Serves one session until its person ends it."""

    daemon_threads = True

    def __init__(self, session: Session) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.session = session
        self.token = secrets.token_urlsafe(32)
        self.one_at_a_time = threading.Lock()
        self.host = f"127.0.0.1:{self.server_port}"

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's asks the resolver for a name
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    @property
    def url(self) -> str:
        """The address for the person, and for nobody else."""
        return f"http://{self.host}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of a request, or says nothing for long, is no error."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    timeout = REQUEST_SECONDS
    server_version, sys_version = "sg_local", ""

    def do_GET(self) -> None:
        name = self._asked_for()
        if name in _FILES:
            file, kind = _FILES[name]
            self._reply(HTTPStatus.OK, Path(__file__).with_name(file).read_bytes(), kind)
        elif name == "state":
            with self.server.one_at_a_time:
                self._reply_json(HTTPStatus.OK, self.server.session.state())
        elif name is not None:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if (name := self._asked_for()) is None:
            return
        is_ours = self.headers.get_all("Origin") == [f"http://{self.server.host}"]
        if not is_ours or self.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
            self._refuse(HTTPStatus.FORBIDDEN)
        elif self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        elif name != "act":
            self._refuse(HTTPStatus.NOT_FOUND)
        elif (body := self._body()) is not None:
            self._act(body)

    def _act(self, body: bytes) -> None:
        try:
            with self.server.one_at_a_time:
                is_over = _act(self.server.session, parse_json(decoded(body, "the request"), "the request"))
                state = self.server.session.state()
        except SgLocalError as error:
            status = (
                HTTPStatus.BAD_REQUEST if isinstance(error, InputError) else HTTPStatus.INSUFFICIENT_STORAGE
            )
            self._reply_json(status, {"error": str(error)})
            return
        self._reply_json(HTTPStatus.OK, {**state, "is_over": is_over})
        if is_over:  # from another thread: it waits for the loop that waits for this one
            threading.Thread(target=self.server.shutdown, daemon=True).start()

    def _asked_for(self) -> str | None:
        """What is asked for, after the token; None where that was refused."""
        if self.headers.get_all("Host") != [self.server.host]:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        _, _, rest = self.path.partition("/")
        token, slash, name = rest.partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return name

    def _body(self) -> bytes | None:
        """What was sent; None where that was refused."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or self.headers.get("Transfer-Encoding"):
            self._refuse(HTTPStatus.LENGTH_REQUIRED)
        elif len(length) > 9 or int(length) > MAX_BODY_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            return self.rfile.read(int(length))
        return None

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses: another method, or what is no request. Its own page has none of our headers."""
        self._refuse(HTTPStatus(code))

    def _refuse(self, status: HTTPStatus) -> None:
        self._reply_json(status, {"error": status.phrase})

    def _reply_json(self, status: HTTPStatus, value: object) -> None:
        self._reply(status, json_text(value).encode(), "application/json")

    def _reply(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a log would hold the token."""


def _act(session: Session, asked: object) -> bool:
    """Does what a page asked for; True where the person ends the review. Raises InputError for anything else."""
    moves: dict[str, Callable[[], None]] = {
        "back": session.back,
        "forward": session.forward,
        "undo": session.undo,
        "end": lambda: None,
    }
    match asked:
        case {"act": str(move), **rest} if move in moves and not rest:
            moves[move]()
            return move == "end"
        case {"act": "accept" | "drop" as word, "id": str(row_id), **rest} if not rest:
            session.say_word(row_id, Word(word))
        case {"act": "answer", "id": str(row_id), "output": str(output), **rest} if not rest:
            session.say_word(row_id, Word.ANSWER, output)
        case _:
            raise InputError("the page asks for what the review does not know: reload it")
    return False


def serve(session: Session, on_ready: Callable[[str], None]) -> None:
    """Serves a session until its person ends it, or Ctrl-C. on_ready: is told the address."""
    with ReviewServer(session) as server:
        on_ready(server.url)
        with suppress(KeyboardInterrupt):  # as good an end as any: all that was said is on the disk
            server.serve_forever(poll_interval=0.2)
        server.one_at_a_time.acquire()  # what is being written is whole before the run is let go; nothing comes after
