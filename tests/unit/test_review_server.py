"""The review in a browser: who does not hold the address gets nothing, and no other page can say a word."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from finished_run import write_inputs, write_outputs

from sg_local.files import read_rows
from sg_local.review.server import MAX_BODY_BYTES, ReviewServer, serve
from sg_local.review.session import open_session
from sg_local.runs.directory import Run
from sg_local.stages.curate import run_curate

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202egnp.exe\u2066\x00"


@pytest.fixture
def run(new_run: Run) -> Run:
    write_inputs(
        new_run,
        [
            {"id": number, "input": f"{HOSTILE} {number}", "label": ["refund", "login"][number % 2]}
            for number in range(6)
        ],
    )
    scores = [{"refund": -0.1, "login": -3.0 + number / 9} for number in range(6)]
    write_outputs(
        new_run,
        [
            {"id": number, "label_logprobs": [score], "output": "refund"}
            for number, score in enumerate(scores)
        ],
    )
    run_curate(new_run)
    return new_run


@pytest.fixture
def server(run: Run) -> Iterator[ReviewServer]:
    with open_session(run.path) as session, ReviewServer(session) as server:
        thread = threading.Thread(target=lambda: server.serve_forever(0.01))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


Reply = tuple[int, dict[str, str], bytes]


def ask(server: ReviewServer, method: str, path: str, body: Any = None, **headers: str | None) -> Reply:
    """What the server answers; headers as_words, None: without it."""
    given = {"Host": server.host, "Content-Type": "application/json", "Origin": f"http://{server.host}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[dict-item]
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    connection.putrequest(method, path, skip_host=True)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    if data is not None and "Content_Length" not in headers:
        connection.putheader("Content-Length", str(len(data)))
    connection.endheaders(data)
    reply = connection.getresponse()
    found = reply.status, dict(reply.headers), reply.read()
    connection.close()
    return found


def act(server: ReviewServer, body: Any, **headers: str | None) -> Reply:
    return ask(server, "POST", f"/{server.token}/act", body, **headers)


def state(server: ReviewServer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ask(server, "GET", f"/{server.token}/state")[2])
    return found


def n_words(run: Run) -> int:
    path = run.file("review.jsonl")
    return len(read_rows(path)) if path.exists() else 0


def test_the_page_its_state_and_words(server: ReviewServer, run: Run) -> None:
    for name, kind in {"": "text/html", "page.js": "text/javascript", "page.css": "text/css"}.items():
        status, headers, body = ask(server, "GET", f"/{server.token}/{name}", Origin=None)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert b"alert(" not in body
    row = state(server)["row"]
    status, _, body = act(server, {"act": "accept", "id": row["id"]})
    assert (status, n_words(run)) == (200, 1)
    after = json.loads(body)
    assert (after["n_reviewed"], after["row"]["id"] != row["id"]) == (1, True)
    status, _, body = act(server, {"act": "answer", "id": after["row"]["id"], "output": "login"})
    assert (status, n_words(run)) == (200, 2)
    for move in ("undo", "back", "forward"):
        assert act(server, {"act": move})[0] == 200
    assert n_words(run) == 3  # undo is one


def test_it_listens_on_loopback_alone(server: ReviewServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url.startswith("http://127.0.0.1:")
    assert len(server.token) >= 40


@pytest.mark.parametrize("token", ["", "wrong", "x" * 43, "%2e%2e", "..", "%C3%A9"])
def test_without_the_token_there_is_nothing(server: ReviewServer, run: Run, token: str) -> None:
    row_id = state(server)["row"]["id"]
    for path in ("", "state", "page.js"):
        status, _, body = ask(server, "GET", f"/{token}/{path}")
        assert (status, b"inbox" in body) == (404, False)
    status, _, _ = ask(server, "POST", f"/{token}/act", {"act": "drop", "id": row_id})
    assert (status, n_words(run)) == (404, 0)


@pytest.mark.parametrize("path", ["page.html", "../session.py", "server.py", "state/", "act", "page.js?x"])
def test_there_are_no_other_paths(server: ReviewServer, path: str) -> None:
    assert ask(server, "GET", f"/{server.token}/{path}")[0] == 404
    assert ask(server, "GET", f"/{server.token}")[0] == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Origin": None},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_a_page_of_another_origin_cannot_post_though_it_knows_the_address(
    server: ReviewServer, run: Run, headers: dict[str, str | None]
) -> None:
    row_id = state(server)["row"]["id"]
    status, found, _ = act(server, {"act": "drop", "id": row_id}, **headers)
    assert (status, n_words(run)) == (403, 0)
    assert "Access-Control-Allow-Origin" not in found
    assert act(server, {"act": "drop", "id": row_id}, Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost:1", "127.0.0.1", None])
def test_another_host_is_refused_as_by_a_name_that_was_bound_anew(
    server: ReviewServer, run: Run, host: str | None
) -> None:
    row_id = state(server)["row"]["id"]
    assert ask(server, "GET", f"/{server.token}/state", Host=host)[0] == 421
    assert act(server, {"act": "drop", "id": row_id}, Host=host)[0] == 421
    assert n_words(run) == 0


def test_what_a_form_can_send_is_no_word(server: ReviewServer, run: Run) -> None:
    row_id = state(server)["row"]["id"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        assert act(server, {"act": "drop", "id": row_id}, Content_Type=kind)[0] == 415
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD"):
        assert ask(server, method, f"/{server.token}/act")[0] == 501
    assert n_words(run) == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        [],
        "drop",
        {},
        {"act": "accept"},
        {"act": "accept", "id": 0},
        {"act": "accept", "id": "0", "output": "x"},
        {"act": "answer", "id": "0"},
        {"act": "answer", "id": "0", "output": None},
        {"act": "undo", "id": "0"},
        {"act": "rm", "id": "0"},
        {"act": "drop", "id": "99"},
        b'{"act": "answer", "id": "5", "output": "\\ud800"}',
    ],
)
def test_other_bodies_are_refused_and_change_nothing(server: ReviewServer, run: Run, body: Any) -> None:
    before = state(server)
    status, _, reply = act(server, body)
    assert (status, n_words(run)) == (400, 0)
    assert json.loads(reply)["error"]
    assert state(server) == before


def test_a_label_that_is_not_in_the_list_is_refused(server: ReviewServer, run: Run) -> None:
    row_id = state(server)["row"]["id"]
    status, _, body = act(server, {"act": "answer", "id": row_id, "output": "delivery"})
    assert (status, n_words(run)) == (400, 0)
    assert "its labels are refund, login" in json.loads(body)["error"]


@pytest.mark.parametrize(
    ("length", "status"),
    [(None, 411), ("-1", 411), ("\u0661", 411), (str(MAX_BODY_BYTES + 1), 413), ("9" * 30, 413)],
)
def test_a_body_without_a_length_or_too_long_is_not_read(
    server: ReviewServer, length: str | None, status: int
) -> None:
    encoded = length and length.encode().decode("latin-1")
    assert act(server, b"{}", Content_Length=encoded)[0] == status


def test_an_earlier_page_cannot_say_a_word_on_the_row_that_came_after(server: ReviewServer, run: Run) -> None:
    row_id = state(server)["row"]["id"]
    assert act(server, {"act": "drop", "id": row_id})[0] == 200
    assert act(server, {"act": "drop", "id": row_id})[0] == 400
    assert n_words(run) == 1


def test_every_answer_forbids_what_the_page_does_not_need(server: ReviewServer) -> None:
    for path in (f"/{server.token}/", f"/{server.token}/state", "/wrong/"):
        _, headers, _ = ask(server, "GET", path)
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "frame-ancestors 'none'" in policy
        assert headers["Referrer-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "<script>"])
def test_what_the_library_refuses_is_no_page_of_its_own(server: ReviewServer, run: Run, method: str) -> None:
    status, headers, body = ask(server, method, f"/{server.token}/act")
    assert (status, n_words(run)) == (501, 0)
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert body == (b"" if method == "HEAD" else b'{"error": "Not Implemented"}')
    status, headers, body = ask(server, "GET", f"/{server.token}/{'a' * 70_000}")
    assert (status, headers["Content-Type"].partition(";")[0]) == (414, "application/json")


def test_hostile_text_is_data(server: ReviewServer) -> None:
    status, headers, body = ask(server, "GET", f"/{server.token}/state")
    assert status == 200
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    text = json.loads(body)["row"]["input"]
    assert "<script>alert(1)</script>" in text  # shown as it is: the page sets it as text
    assert "\\x1b[31m\\u202egnp.exe\\u2066\\x00" in text
    assert not {"\x1b", "\u202e", "\x00"} & {*body.decode()}


def test_the_script_sets_texts_as_text() -> None:
    from pathlib import Path

    import sg_local.review.server as module

    script = Path(module.__file__).with_name("page.js").read_text("utf-8")
    for way in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "http",
    ):
        assert way not in script


def test_a_person_who_hangs_up_in_the_middle_disturbs_nobody(server: ReviewServer, capsys: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)) as connection:
        connection.sendall(f"POST /{server.token}/act HTTP/1.1\r\nHost: {server.host}\r\n".encode())
    with socket.create_connection(("127.0.0.1", server.server_port)) as waiting:  # and one who says nothing
        assert state(server)["n_rows"] == 6
        waiting.shutdown(socket.SHUT_RDWR)
    assert server.token not in "".join(capsys.readouterr())


def test_words_of_two_windows_at_once_are_one_after_the_other(server: ReviewServer, run: Run) -> None:
    row_id = state(server)["row"]["id"]
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda: statuses.append(act(server, {"act": "drop", "id": row_id})[0]))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [400] * 7
    assert n_words(run) == 1


def test_the_person_ends_it(run: Run) -> None:
    urls: list[str] = []
    with open_session(run.path) as session:

        def end(url: str) -> None:
            urls.append(url)
            host, token = url.removeprefix("http://").rstrip("/").split("/")

            def post() -> None:
                connection = http.client.HTTPConnection(host, timeout=20)
                headers = {"Origin": f"http://{host}", "Content-Type": "application/json"}
                connection.request("POST", f"/{token}/act", b'{"act": "end"}', headers)
                assert json.loads(connection.getresponse().read())["is_over"] is True

            threading.Thread(target=post).start()

        serve(session, end)
    assert len(urls) == 1


def test_ctrl_c_is_an_end_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_server: ReviewServer, poll_interval: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ReviewServer, "serve_forever", interrupted)
    with open_session(run.path) as session:
        serve(session, lambda _url: None)
