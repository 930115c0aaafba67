"""The client of a chat server that the user names: any that speaks OpenAI's protocol.

    server = ChatServer("http://127.0.0.1:8080", seconds=60)
    server.answer([{"role": "user", "content": "My parcel is late."}], model="inbox", max_new_tokens=12)
    -> ServerAnswer("delivery", n_prompt_tokens=43, thinks=False)

Requests go to that host alone: no proxy, no redirection. A reply is
data: bounded in size and in time, also where it comes in drops, and checked. Sources: OpenAI's API reference,
/v1/chat/completions and /v1/models; llama.cpp's tools/server/README.md, /apply-template.
"""

import json
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sg_local.errors import InputError, SgLocalError
from sg_local.escape import one_line

MAX_REPLY_BYTES = 4 << 20
_SHOWN_CHARACTERS = 160
_ENDINGS = ("/chat/completions", "/v1")  # of addresses as people copy them

Messages = Sequence[dict[str, str]]


class ServerAnswer(NamedTuple):
    """An answer, how many tokens its prompt had if the server tells that, and whether the model thought before it."""

    text: str
    n_prompt_tokens: int | None
    thinks: bool


class ChatServer:
    """A server by its address. Raises SgLocalError, in one line, where it does not answer as such a server does."""

    def __init__(self, url: str, seconds: float) -> None:
        """seconds: that one request may take. Raises InputError where the address is none."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError(f"--server {url!r:.200} is no address: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise InputError(f"--server {url!r:.200} is no address: give one like http://127.0.0.1:8080")
        if parts.username is not None or not url.isascii() or not url.isprintable() or " " in url:
            raise InputError(
                f"--server {url!r:.200} may hold neither a name before @, nor spaces, nor other scripts"
            )
        path = parts.path.rstrip("/")
        for ending in _ENDINGS:
            path = path.removesuffix(ending)
        self._secure, self._host, self._port, self._path = parts.scheme == "https", parts.hostname, port, path
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self.seconds = seconds

    def answer(self, messages: Messages, *, model: str, max_new_tokens: int) -> ServerAnswer:
        """The greedy answer to a conversation."""
        request = {
            "model": model,
            "messages": list(messages),
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "stream": False,
        }
        reply = self._json("POST", "/v1/chat/completions", request)
        match reply:
            case {"choices": [{"message": {"content": str() | None as content, **message}}, *_], **rest}:
                thinks = bool(message.get("reasoning_content") or message.get("reasoning"))
                match rest.get("usage"):
                    case {"prompt_tokens": int(n_tokens)} if (
                        n_tokens > 0
                    ):  # some say 0 of a prompt that they kept
                        return ServerAnswer((content or "").strip(), n_tokens, thinks)
                return ServerAnswer((content or "").strip(), None, thinks)
        raise self._no_such_server(json.dumps(reply))

    def only_model(self) -> str:
        """The name of the model that it serves. Raises InputError where it serves several."""
        status, data = self._request("GET", "/v1/models")
        names: list[str] = []
        with suppress(ValueError, RecursionError):
            match json.loads(data):
                case {"data": list(models)} if status == 200:
                    names = [
                        model["id"]
                        for model in models
                        if isinstance(model, dict) and _is_text(model.get("id"))
                    ]
        if len(names) > 1:
            shown = ", ".join(one_line(name[:60]) for name in names[:10])
            raise InputError(
                f"{self.url} serves {len(names)} models: give one of {shown} with --server-model"
            )
        return names[0] if names else "default"

    def rendered(self, messages: Messages) -> str | None:
        """The prompt that it makes of a conversation; None where it does not tell that."""
        status, data = self._request("POST", "/apply-template", {"messages": list(messages)})
        with suppress(ValueError, RecursionError):
            match json.loads(data):
                case {"prompt": str(prompt)} if status == 200:
                    return prompt
        return None

    def _json(self, method: str, path: str, body: object) -> Any:
        status, data = self._request(method, path, body)
        text = data.decode("utf-8", "replace")
        if status != 200:
            raise SgLocalError(
                f"{self.url}{path} answers with status {status} ({_excerpt(text)}): "
                "correct --server and --server-model, or see what the server itself says"
            )
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._no_such_server(text) from None

    def _no_such_server(self, text: str) -> SgLocalError:
        return SgLocalError(
            f"{self.url} sends what is no chat completion ({_excerpt(text)}): "
            "give the address of a server that speaks OpenAI's protocol"
        )

    def _request(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """The status and the body of the reply."""
        connect = HTTPSConnection if self._secure else HTTPConnection
        connection = connect(self._host, self._port, timeout=self.seconds)
        is_over = threading.Event()

        def end() -> None:
            is_over.set()
            if connection.sock is not None:
                with suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

        timer = threading.Timer(self.seconds, end)  # a timeout alone is of one packet, and there may be many
        timer.daemon = True
        timer.start()
        try:
            data = None if body is None else json.dumps(body).encode()
            headers = {
                "Content-Type": "application/json",
                "Accept": "application/json",
                "Connection": "close",
            }
            connection.request(method, self._path + path, data, headers)
            response = connection.getresponse()
            reply = response.read(MAX_REPLY_BYTES + 1)
        except (OSError, HTTPException, ValueError) as error:
            if is_over.is_set() or isinstance(error, TimeoutError):
                raise self._too_slow() from error
            raise SgLocalError(
                f"{self.url} does not answer ({_excerpt(str(error)) or type(error).__name__}): "
                "start the server, or correct --server"
            ) from error
        finally:
            timer.cancel()
            connection.close()
        if is_over.is_set():
            raise self._too_slow()
        if len(reply) > MAX_REPLY_BYTES:
            raise SgLocalError(
                f"{self.url} sends more than {MAX_REPLY_BYTES} bytes for one answer: correct --server"
            )
        return response.status, reply

    def _too_slow(self) -> SgLocalError:
        return SgLocalError(
            f"{self.url} took over {self.seconds:g} seconds for one answer: wait until it has loaded its model, "
            "or allow more with --timeout"
        )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _excerpt(text: str) -> str:
    shown = " ".join(text.split())
    return one_line(shown if len(shown) <= _SHOWN_CHARACTERS else shown[: _SHOWN_CHARACTERS - 1] + "…")
