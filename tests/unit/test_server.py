"""`sg-local verify RUN --server URL`, against servers that are right, wrong, down, slow, or send nonsense."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from command_line import Call, one_line
from finished_run import MODEL, TENSORS, write_stage
from gguf_bytes import tiny_gguf
from messages import assert_says

import sg_local.proof.chat_server as chat_server
from sg_local.chat.template import ChatTemplate, Message
from sg_local.files import read_rows
from sg_local.runs.directory import Run
from sg_local.selfguide.contenders import TUNED, Contender

N_ROWS = 20
N_RIGHT = 18  # by the tuned model; the base has half of them right
Reply = Callable[[str, dict[str, Any]], Any]  # (path, body) -> JSON, bytes, or (status, JSON)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        self.server.asked.append((self.path, body))  # type: ignore[attr-defined]
        reply = self.server.reply(self.path, body)  # type: ignore[attr-defined]
        status, reply = reply if isinstance(reply, tuple) else (200, reply)
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.asked: list[tuple[str, Any]] = []

    def handle_error(self, *_arguments: object) -> None:
        """A client that hangs up leaves a broken pipe here, whose traceback would be in another test's stderr."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Server]]:
    servers: list[Server] = []

    def start(reply: Reply) -> Server:
        servers.append(Server(reply))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Tokenizer:
    """A token is a byte."""

    adds_bos, bos = True, 1

    def __init__(self, _model: object) -> None:
        pass

    def text_of(self, _token: int) -> str:
        return "<s>"

    def chat_template(self, source: str) -> ChatTemplate:
        return ChatTemplate(source, "<s>", "</s>")

    def encode_plain(self, text: str) -> bytes:
        return text.encode()

    def encode_prompt(self, template: ChatTemplate, messages: list[Message]) -> bytes:
        return "".join(piece.text for piece in template.render(messages, add_generation_prompt=True)).encode()


@pytest.fixture
def run(finished_run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Of its 20 rows the tuned model has 18 right and the base 10; no llama.cpp reads its vocabulary."""

    @contextmanager
    def load_model(_path: Path, **_options: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace()

    monkeypatch.setattr("sg_local.llama.library.load_model", load_model)
    monkeypatch.setattr("sg_local.llama.tokens.Tokenizer", Tokenizer)
    tuned = {TUNED: N_RIGHT, Contender.TUNED_ADAPTER: N_RIGHT - 1}
    write_stage(finished_run, "evaluate", right=tuned, n_rows=N_ROWS)
    return finished_run


def user_text(run: Run, body: dict[str, Any]) -> str:
    """The input that was sent with its instruction, as a template without a system message has it."""
    message: str = "\n\n".join(message["content"] for message in body["messages"])
    return message.removeprefix(f"{run.task.instruction}\n\n")


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}], **more}


def answers_of(run: Run, contender: Contender, **more: Any) -> Reply:
    """A server that answers as a contender did."""
    rows = read_rows(run.file(f"predictions/{contender}.jsonl"))
    recorded = {row["input"]: row["prediction"] for row in rows}

    def reply(path: str, body: dict[str, Any]) -> Any:
        if path != "/v1/chat/completions":
            return 404, {"error": "no such path"}
        return completion(recorded[user_text(run, body)], **more)

    return reply


def verify(sg: Call, run: Run, url: str, *options: object) -> Result:
    return sg("verify", run.path, "--server", url, *options)


def test_a_server_with_the_tuned_model(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    server = serve(answers_of(run, TUNED))
    result = verify(sg, run, f"{server.url}/v1/", "--server-model", "inbox")
    assert result.exit_code == 0, result.stderr
    assert_says(result.stdout, server.url, "inbox", "20 recorded rows", "20 of 20 are those of tuned_merged")
    assert_says(result.stdout, "Exact Match", "0.900, recorded 0.900", "no difference shown", "not known")
    assert "row " not in result.stdout
    asked = [body for path, body in server.asked if path == "/v1/chat/completions"]
    assert len(asked) == N_ROWS
    assert (asked[0]["model"], asked[0]["temperature"], asked[0]["stream"]) == ("inbox", 0, False)
    assert asked[0]["max_tokens"] == len("refund") + 8


def test_only_so_many_rows_are_sent_and_the_only_model_is_asked(
    sg: Call, run: Run, serve: Callable[[Reply], Server]
) -> None:
    answer = answers_of(run, TUNED)

    def reply(path: str, body: dict[str, Any]) -> Any:
        return {"data": [{"id": "only"}]} if path == "/v1/models" else answer(path, body)

    server = serve(reply)
    assert "5 of 5" in verify(sg, run, server.url, "--rows", 5).stdout
    asked = [body["model"] for path, body in server.asked if path == "/v1/chat/completions"]
    assert asked == ["only"] * 5


def test_a_server_with_the_adapter_is_compared_with_that(
    sg: Call, run: Run, serve: Callable[[Reply], Server]
) -> None:
    result = verify(sg, run, serve(answers_of(run, Contender.TUNED_ADAPTER)).url)
    assert result.exit_code == 0
    assert_says(result.stdout, "20 of 20 are those of tuned_adapter", "0.850, recorded 0.850")


def test_rows_that_differ_are_shown(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    answer = answers_of(run, TUNED)

    def reply(path: str, body: dict[str, Any]) -> Any:
        return completion("a\x1b[2J") if path.endswith("completions") and body["messages"][-1]["content"].endswith(
            " 3"
        ) else answer(path, body)  # fmt: skip

    result = verify(sg, run, serve(reply).url)
    assert result.exit_code == 0  # one of 20 is no significant loss
    assert_says(result.stdout, "19 of 20", "row 4:", "'a\\\\x1b[2J' by the server, 'login' recorded")
    assert "\x1b" not in result.stdout


def test_a_server_with_the_base(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    result = verify(sg, run, serve(answers_of(run, Contender.ZERO_SHOT)).url)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert_says(line, "Exact Match 0.500, recorded 0.900", "20 of 20", "base_zero_shot", "adapter.gguf")


def test_a_server_with_another_model(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    def reply(path: str, _body: object) -> Any:
        return completion("As an AI, I cannot.") if path.endswith("completions") else (404, {})

    result = verify(sg, run, serve(reply).url)
    assert result.exit_code == 1
    assert_says(result.stderr, "0.000, recorded 0.900", "only 0 of 20", "another model")
    assert_says(result.stdout, "and 15 rows more")


def test_a_model_that_thinks_first(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    thought = {"choices": [{"message": {"content": None, "reasoning_content": "Let me see."}}]}
    result = verify(
        sg, run, serve(lambda path, _: thought if path.endswith("completions") else (404, {})).url
    )
    assert result.exit_code == 1
    assert_says(result.stderr, "thinks before 20 of 20 answers", "switch that off")


@pytest.mark.parametrize("is_worse", [True, False])
def test_a_wrong_template_is_seen_by_its_tokens(
    sg: Call, run: Run, serve: Callable[[Reply], Server], is_worse: bool
) -> None:
    contender = Contender.ZERO_SHOT if is_worse else TUNED
    result = verify(sg, run, serve(answers_of(run, contender, usage={"prompt_tokens": 9})).url)
    n_trained = len(f"{run.task.instruction}\n\nLog me in. 0")
    assert_says(
        result.stdout, "NOT the trained one", f"9 tokens where {n_trained} were trained", "20 of 20 rows"
    )
    assert result.exit_code == is_worse
    if is_worse:
        assert_says(result.stderr, "its prompt is not the trained one", "chat template")


def test_the_right_number_of_tokens_is_told(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    answer = answers_of(run, TUNED)

    def reply(path: str, body: dict[str, Any]) -> Any:
        reply = answer(path, body)
        if path.endswith("completions"):
            n_tokens = len("\n\n".join(message["content"] for message in body["messages"]))
            reply["usage"] = {"prompt_tokens": n_tokens}
        return reply

    assert_says(verify(sg, run, serve(reply).url).stdout, "ok   prompt", "as many tokens", "20 rows")


@pytest.mark.parametrize(
    ("rendered", "told"),
    [
        ("<s>Which box is this message for?\n\nLog me in. 0", ["ok   prompt", "/apply-template"]),
        ("Which box is this message for?\n\nLog me in. 0", ["ok   prompt", "/apply-template"]),
        ("system: Which box is this message for?\n\nLog me in. 0", ["NOT the trained one", "'system: Which"]),
    ],
)
def test_the_prompt_is_seen_where_the_server_shows_it(
    sg: Call, run: Run, serve: Callable[[Reply], Server], rendered: str, told: list[str]
) -> None:
    answer = answers_of(run, TUNED)

    def reply(path: str, body: dict[str, Any]) -> Any:
        return {"prompt": rendered} if path == "/apply-template" else answer(path, body)

    assert_says(verify(sg, run, serve(reply).url).stdout, *told)


def test_a_server_that_is_down(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    server = serve(lambda *_: {})
    server.shutdown()
    server.server_close()
    line = one_line(verify(sg, run, server.url), 1)
    assert_says(line, server.url, "does not answer", "refused", "start the server")


def test_a_server_that_is_slow(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    def reply(_path: str, _body: object) -> Any:
        time.sleep(5)
        return {}

    started = time.monotonic()
    line = one_line(verify(sg, run, serve(reply).url, "--timeout", "0.3"), 1)
    assert_says(line, "took over 0.3 seconds", "--timeout")
    assert time.monotonic() - started < 4


def test_a_server_that_answers_in_drops(sg: Call, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and all of them never."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(100):
                    connection.sendall(b"x")
                    time.sleep(0.05)
            except OSError:
                return

    threading.Thread(target=drip, daemon=True).start()
    started = time.monotonic()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert_says(one_line(verify(sg, run, url, "--timeout", "0.3"), 1), "took over 0.3 seconds")
    assert time.monotonic() - started < 3
    listener.close()


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (b"<html>\x1b[2J hello", ["no chat completion", "hello"]),
        (b"\xff\xfe", ["no chat completion"]),
        (b"[" * 100_000, ["no chat completion"]),
        ({"choices": []}, ["no chat completion"]),
        ({"choices": [{"message": {"content": 7}}]}, ["no chat completion"]),
        ([1], ["no chat completion"]),
        ((500, {"error": "out of memory"}), ["status 500", "out of memory"]),
        ((302, {}), ["status 302"]),
    ],
)
def test_nonsense_is_one_line(
    sg: Call, run: Run, serve: Callable[[Reply], Server], reply: Any, told: list[str]
) -> None:
    server = serve(lambda path, _: reply if path.endswith("completions") else (404, {}))
    result = verify(sg, run, server.url)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert_says(line, server.url, *told)
    assert (result.exit_code, result.stdout) == (1, "")
    assert len(line) < 400
    assert "\x1b" not in line


def test_a_reply_without_end_is_not_read_to_it(
    sg: Call, run: Run, serve: Callable[[Reply], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_server, "MAX_REPLY_BYTES", 1000)
    server = serve(lambda *_: b"x" * 5000)
    assert_says(one_line(verify(sg, run, server.url), 1), "more than 1000 bytes")


def test_several_models_need_a_name(sg: Call, run: Run, serve: Callable[[Reply], Server]) -> None:
    server = serve(lambda *_: {"data": [{"id": "a"}, {"id": "b\x1b"}, {"id": 7}, 7]})
    line = one_line(verify(sg, run, server.url), 2)
    assert_says(line, "2 models", "a, b\\x1b", "--server-model")


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8080",
        "ftp://a",
        "file:///etc/passwd",
        "http://",
        "http://a:b",
        "http://u:p@a",
        "http://a/?b",
        "http://a b",
    ],
)
def test_what_is_no_address(sg: Call, run: Run, url: str) -> None:
    assert "--server" in one_line(verify(sg, run, url), 2)


def test_a_run_that_was_not_scored_has_nothing_to_compare(sg: Call, new_run: Run) -> None:
    assert "evaluate" in one_line(verify(sg, new_run, "http://127.0.0.1:9"), 2)


def test_the_input_alone_is_sent_where_the_exported_file_writes_the_instruction_itself(
    sg: Call, run: Run, serve: Callable[[Reply], Server]
) -> None:
    template = "<s>Which box is this message for?\\n\\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
    source = template.replace("\\n", "{{ '\\n' }}")
    with run.stage("export"):
        run.file("model.gguf").write_bytes(
            tiny_gguf({**MODEL, "tokenizer.chat_template": source}, TENSORS[:1])
        )
    write_stage(run, "evaluate", right={TUNED: N_RIGHT}, n_rows=N_ROWS)
    server = serve(answers_of(run, TUNED))
    result = verify(sg, run, server.url)
    assert result.exit_code == 0, result.stderr
    assert "the input alone" in result.stdout
    asked = [body["messages"] for path, body in server.asked if path.endswith("completions")]
    assert asked[0] == [{"role": "user", "content": "Log me in. 0"}]
