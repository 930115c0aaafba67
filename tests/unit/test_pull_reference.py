"""Models by their place on the hub: pulled from one on loopback, refused as soon as their header shows why.

hf:someone/big-GGUF:q4/big.Q4_K_M.gguf -> models/someone+big-GGUF+q4+big.Q4_K_M.gguf and its facts beside it
"""

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Call
from finished_run import MODEL, TENSORS
from gguf_bytes import STRING, TinyTensor, Value, array, string, tiny_gguf
from local_hub import FILE, WEIGHTS, Send, Server, hub_path, says
from messages import assert_says

import sg_local.download as download_module
from sg_local.errors import InputError, SgLocalError
from sg_local.models import find_by_path, model_store, resolve_model
from sg_local.pull import pull_model
from sg_local.runs.begin import describe_base, read_model
from sg_local.settings import Settings
from sg_local.stages.export import _origin

LICENSED: dict[str, Value] = {**MODEL, "general.license": "apache-2.0"}
SMALL = tiny_gguf(LICENSED, TENSORS)
# 4 MB of weights behind a header of 1 kB, or of 2 MB
LARGE_TENSORS = [TinyTensor("token_embd.weight", (32, 32_000)), *TENSORS[1:]]
LARGE = tiny_gguf(LICENSED, LARGE_TENSORS)
LONG_TEXTS = array(STRING, b"".join(string("x" * 56) for _ in range(32_000)), 32_000)
REFERENCE = f"hf:someone/big-GGUF:{FILE}"
IN_STORE = f"someone+big-GGUF+{FILE}"


def of_architecture(name: str, **more: Value) -> bytes:
    return tiny_gguf({**more, **LICENSED, "general.architecture": name}, LARGE_TENSORS)


def visible() -> list[str]:
    return sorted(path.name for path in model_store().iterdir() if path.name != ".lock")


def silent(_line: str) -> None:
    pass


def refusal(reference: str = REFERENCE, kind: type[SgLocalError] = SgLocalError) -> str:
    """What a pull says that fails, on one line."""
    with pytest.raises(kind) as caught:
        pull_model(reference, silent)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def arriving(parts: list[bytes], wait: Callable[[int], object], size_bytes: int) -> Send:
    """Sends one part after another; between them it waits."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.head(size_bytes)  # type: ignore[attr-defined]
        for number, part in enumerate(parts):
            handler.wfile.write(part)
            handler.wfile.flush()
            wait(number)

    return send


@pytest.fixture
def pulled(server: Server) -> Path:
    server.bodies[hub_path()] = SMALL
    path = pull_model(REFERENCE, silent)
    server.bodies.clear()
    server.heads[hub_path()] = says(500)
    return path


def test_a_file_of_the_hub_becomes_a_model_with_its_facts(sg: Call, server: Server, pulled: Path) -> None:
    assert pulled.read_bytes() == SMALL
    assert visible() == [IN_STORE, f"{IN_STORE}.toml"]
    assert resolve_model(REFERENCE) == pulled
    model = find_by_path(pulled)
    assert model is not None
    assert (model.source, model.licence, model.prompt_format) == (REFERENCE, "apache-2.0", "gguf")
    assert model.sha256 == hashlib.sha256(SMALL).hexdigest()
    (row,) = (row for row in json.loads(sg("models", "list", "--json").stdout) if row["name"] == REFERENCE)
    assert (row["is_present"], row["size_bytes"], row["architecture"]) == (True, len(SMALL), "llama")
    listed = next(line for line in sg("models", "list").stdout.splitlines() if line.endswith(REFERENCE))
    assert_says(listed, "here ", " apache-2.0  ")
    assert json.loads(sg("models", "show", REFERENCE, "--json").stdout)["licence"] == "apache-2.0"


def test_what_is_there_is_not_asked_for_again(sg: Call, pulled: Path) -> None:
    """The hub fails by now."""
    result = sg("models", "pull", REFERENCE)
    assert (result.exit_code, result.stdout) == (0, f"{pulled}\n")
    assert_says(result.stderr, "already there")
    pulled.write_bytes(b"X" + SMALL[1:])
    result = sg("models", "pull", REFERENCE)
    assert result.exit_code == 1
    assert_says(result.stderr, "has the sha256", "downloaded again", "500")


def test_a_run_and_what_it_exports_carry_licence_and_source(
    sg: Call, pulled: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = describe_base(read_model(resolve_model(REFERENCE)), Settings())
    assert (base.licence, base.prompt_format) == ("apache-2.0", "gguf")
    assert _origin(base)["general.license"] == "apache-2.0"
    assert _origin(base)["sg_local.base_source"] == REFERENCE
    started: list[str] = []
    monkeypatch.setattr(
        "sg_local.runs.process.in_child_process", lambda _run, name: started.append(name) or 1
    )
    sg("run", task, "--model", REFERENCE, "--run", "run")
    assert started == ["generate"]
    assert IN_STORE in Path("run/settings.toml").read_text()
    assert sg("plan", task, "--model", REFERENCE).exit_code == 0


def test_the_cache_lists_it_and_frees_it_with_its_facts(sg: Call, pulled: Path) -> None:
    (item,) = json.loads(sg("cache", "--json").stdout)
    assert (item["what"], item["model"]) == ("model", IN_STORE)
    assert item["sha256"] == hashlib.sha256(SMALL).hexdigest()
    assert sg("cache", "--all", "--yes").exit_code == 0
    assert visible() == []
    assert_says(sg("models", "show", REFERENCE).stderr, f"`sg-local models pull {REFERENCE}`")


def test_facts_without_their_file_are_a_leftover(sg: Call, pulled: Path) -> None:
    pulled.unlink()
    assert REFERENCE not in sg("models", "list").stdout
    (item,) = json.loads(sg("cache", "--json").stdout)
    assert item["what"] == "leftover"
    assert sg("cache", "--unused", "--yes").exit_code == 0
    assert visible() == []


@pytest.mark.parametrize("facts", ["", "[", 'source = "hf:a/b:c.gguf"', None])
def test_a_file_with_damaged_facts_counts_as_not_pulled(sg: Call, pulled: Path, facts: str | None) -> None:
    beside = pulled.with_name(f"{pulled.name}.toml")
    beside.write_text(beside.read_text().replace(FILE, "other.gguf") if facts is None else facts)
    with pytest.raises(InputError, match="is not on this machine"):
        resolve_model(REFERENCE)
    assert find_by_path(pulled) is None
    assert sg("cache", "--all", "--yes").exit_code == 0
    assert pulled.exists()  # nobody knows whose it is


@pytest.mark.parametrize("command", [["plan"], ["run"], ["bench"]], ids=" ".join)
def test_no_other_command_fetches_it(sg: Call, server: Server, task: Path, command: list[str]) -> None:
    server.bodies[hub_path()] = SMALL
    result = sg(*command, task if command != ["bench"] else task.parent, "--model", REFERENCE)
    assert result.exit_code == 2
    assert_says(result.stderr, f"{REFERENCE} is not on this machine", f"`sg-local models pull {REFERENCE}`")
    assert not model_store().exists()


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("hf:someone/x:../../etc/a.gguf", "leads outside of its repository"),
        ("hf:someone/x:q4/../../a.gguf", "leads outside of its repository"),
        ("hf:someone/x:/etc/a.gguf", "leads outside of its repository"),
        ("hf:someone/x:..\\a.gguf", "names no model"),
        ("hf:../x:a.gguf", "names no model"),
        ("hf:someone:a.gguf", "names no model"),
        ("hf:someone/x", "names no model"),
        ("hf:someone/x@:a.gguf", "names no model"),
        ("hf:someone/x:model.safetensors", "names no model"),
        ("hf:someone/x:a+b.gguf", "names no model"),
        ("hf:someone/x:a-00001-of-00003.gguf", "one part of a split model"),
        (f"hf:someone/x:{'a' * 200}.gguf", "over the limit of 200"),
    ],
)
def test_what_can_be_no_reference_is_refused_before_the_network(
    sg: Call, server: Server, reference: str, expected: str
) -> None:
    assert_says(refusal(reference, InputError), expected)
    assert not model_store().exists()
    with pytest.raises(InputError, match=expected):
        resolve_model(reference)


def test_a_revision_has_its_own_place(server: Server) -> None:
    server.bodies[hub_path()] = SMALL
    server.bodies[hub_path("q4/a.gguf", revision="v2")] = LARGE
    first = pull_model(REFERENCE, silent)
    second = pull_model("hf:someone/big-GGUF@v2:q4/a.gguf", silent)
    assert second.name == "someone+big-GGUF@v2+q4+a.gguf"
    assert (first.read_bytes(), second.read_bytes()) == (SMALL, LARGE)
    model = find_by_path(second)
    assert model is not None
    assert model.source == "hf:someone/big-GGUF@v2:q4/a.gguf"


@pytest.mark.parametrize("is_right", [True, False])
def test_a_redirect_is_followed_and_the_sum_that_it_tells_is_checked(server: Server, is_right: bool) -> None:
    sha256 = hashlib.sha256(SMALL if is_right else LARGE).hexdigest()
    redirect = says(
        302,
        Location=f"{server.url.replace('127.0.0.1', 'localhost')}/store/blob",  # another host
        ETag='"0123456789abcdef"',
        X_Repo_Commit="0" * 40,
        X_Linked_Size=len(SMALL),
        X_Linked_Etag=f'"{sha256}"',
    )
    server.heads[hub_path()] = server.bodies[hub_path()] = redirect
    server.bodies["/store/blob"] = SMALL
    if is_right:
        assert pull_model(REFERENCE, silent).read_bytes() == SMALL
    else:
        assert_says(refusal(), f"expected {sha256}", "not kept")
        assert visible() == []


def test_a_token_goes_to_the_hub_alone(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    elsewhere = f"{server.url.replace('127.0.0.1', 'localhost')}/store/blob"
    seen: dict[str, str | None] = {}

    def noted(answer: Send) -> Send:
        def send(handler: BaseHTTPRequestHandler) -> None:
            seen[handler.path] = handler.headers.get("Authorization")
            answer(handler)

        return send

    answer = says(302, Location=elsewhere, ETag='"a"', X_Repo_Commit="0" * 40, X_Linked_Size=len(SMALL))
    server.heads[hub_path()] = noted(answer)
    server.bodies["/store/blob"] = noted(server.ranged(SMALL))
    assert pull_model(REFERENCE, silent).read_bytes() == SMALL
    assert seen == {hub_path(): "Bearer hf_secret", "/store/blob": None}


@pytest.mark.parametrize("n_header_bytes", [1_000, 2_000_000])
def test_what_cannot_be_tuned_is_refused_before_the_rest_is_sent(server: Server, n_header_bytes: int) -> None:
    """The header is whole in the first part, or in the second."""
    texts = {"other.texts": LONG_TEXTS} if n_header_bytes > 1_000 else {}
    data = of_architecture("mamba", **texts)
    server.heads[hub_path()] = lambda handler: handler.head(len(data))  # type: ignore[attr-defined]
    reached = []

    def wait(number: int) -> None:
        reached.append(number)
        time.sleep(1.0 if number < len(parts) - 1 else 0)
        if number == len(parts) - 1:
            server.is_closing.wait(60)

    parts = [data[:1_200_000], data[1_200_000:3_000_000]] if texts else [data[:1_200_000]]
    server.bodies[hub_path()] = arriving(parts, wait, len(data))
    assert_says(refusal(kind=InputError), REFERENCE, "'mamba'", "not supported", "was not kept")
    assert reached == list(range(len(parts)))
    assert visible() == []


def test_licence_and_architecture_are_told_while_the_rest_comes(server: Server) -> None:
    data = LARGE
    server.heads[hub_path()] = lambda handler: handler.head(len(data))  # type: ignore[attr-defined]
    is_told = threading.Event()
    said = []

    def report(line: str) -> None:
        said.append(line)
        if "apache-2.0" in line:
            is_told.set()

    parts = [data[:1_200_000], data[1_200_000:]]
    server.bodies[hub_path()] = arriving(parts, lambda _number: is_told.wait(60), len(data))
    assert pull_model(REFERENCE, report).read_bytes() == data
    assert_says(said[0], f"downloading {REFERENCE} (4 MB)")
    assert_says(said[1], "architecture llama", "licence apache-2.0")


def without(key: str) -> bytes:
    return tiny_gguf({name: value for name, value in LICENSED.items() if name != key}, TENSORS)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"<html>Sign in</html>" + bytes(2_000_000), ["is not a GGUF file", "web page"]),
        (b"<html>Sign in</html>", ["is not a GGUF file", "web page"]),
        (WEIGHTS, ["is GGUF version"]),
        (SMALL[:-2000], ["is truncated"]),
        (tiny_gguf({**LICENSED, "general.type": "adapter"}, TENSORS), ["is a LoRA adapter"]),
        (tiny_gguf({**LICENSED, "split.count": 3}, TENSORS), ["one of 3 parts of a split model"]),
        (tiny_gguf(LICENSED), ["vocabulary only"]),
        (of_architecture("mamba"), ["'mamba'", "not supported"]),
        (without("llama.embedding_length"), ["llama.embedding_length"]),
    ],
)
def test_what_is_no_model_is_not_kept(server: Server, data: bytes, expected: list[str]) -> None:
    server.bodies[hub_path()] = data
    message = refusal(kind=InputError)
    assert_says(message, REFERENCE, *expected, "was not kept")
    assert str(model_store()) not in message
    assert visible() == []


def test_a_header_without_a_licence_says_where_to_look(server: Server) -> None:
    server.bodies[hub_path()] = without("general.license")
    said: list[str] = []
    pull_model(REFERENCE, said.append)
    assert_says(said[1], "not named in its header", "https://huggingface.co/someone/big-GGUF")


def test_texts_of_a_header_steer_no_terminal(sg: Call, server: Server) -> None:
    server.bodies[hub_path()] = tiny_gguf({**MODEL, "general.license": "\x1b[2J\nfree" * 100}, TENSORS)
    result = sg("models", "pull", REFERENCE)
    assert result.exit_code == 0
    assert "\x1b" not in result.output
    listed = sg("models", "list").stdout
    assert r"\x1b[2J\nfree" in listed
    assert len(max(listed.splitlines(), key=len)) < 600


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (says(403, X_Error_Code="GatedRepo"), ["403", "https://huggingface.co/someone/big-GGUF", "HF_TOKEN"]),
        (says(401, X_Error_Code="GatedRepo"), ["401", "https://huggingface.co/someone/big-GGUF", "HF_TOKEN"]),
        (says(403), ["403", "HF_TOKEN"]),
        (says(401, X_Error_Code="RepoNotFound"), ["401", "check owner, repository"]),
        (says(404, X_Error_Code="EntryNotFound"), ["404", "check owner, repository"]),
        (says(404, X_Error_Code="RevisionNotFound"), ["404", "check owner, repository"]),
        (says(500), ["500", "check the network and try again"]),
        (says(302, Location="ftp://elsewhere/blob"), ["does not tell size and version"]),
        (says(302, Location="/x"), ["redirects", "check the network and try again"]),
        (says(200, ETag='"a"', Content_Length=0), ["does not tell size and version"]),
        (says(200, ETag='"a"', Content_Length=99 * 10**9), ["99 GB", "over the limit of 50"]),
    ],
)
def test_what_the_hub_does_not_give_is_told_in_one_line(
    server: Server, answer: Send, expected: list[str]
) -> None:
    server.heads[hub_path()] = server.heads["/x"] = answer
    message = refusal()
    assert_says(message, REFERENCE, *expected)
    assert len(message) < 450
    assert visible() == []


def test_a_full_disk_is_noticed_when_the_hub_told_the_size(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.bodies[hub_path()] = SMALL
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2_000_000))
    assert_says(refusal(), "67 MB", "has 2: free some space")


def test_who_forbade_downloads_is_told_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_says(refusal(), "HF_HUB_OFFLINE=1 forbids downloads")


@pytest.mark.parametrize("is_same", [True, False])
def test_a_broken_download_goes_on_unless_the_hub_has_another_file_now(
    server: Server, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    def told(data: bytes) -> Send:
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return says(200, ETag=etag, X_Repo_Commit="0" * 40, Content_Length=len(data))

    server.heads[hub_path()] = told(LARGE)
    send_a_part = server.ranged(LARGE, at_most=2_500_000)

    def break_off(handler: BaseHTTPRequestHandler) -> None:
        monkeypatch.setattr(download_module, "STALL_SECONDS", 1.0)  # to start the process may take longer
        send_a_part(handler)

    server.bodies[hub_path()] = break_off
    assert_says(refusal(), "came in 1 s", "try again, what has arrived is kept")
    assert visible() == [f".pull-{IN_STORE}"]
    monkeypatch.setattr(download_module, "STALL_SECONDS", 60.0)
    server.heads["/someone/other/resolve/main/a.gguf"] = says(404)
    assert_says(refusal("hf:someone/other:a.gguf"), "404")  # another pull leaves it
    assert visible() == [f".pull-{IN_STORE}"]
    server.ranges.clear()
    now = (
        LARGE
        if is_same
        else tiny_gguf(LICENSED, [TinyTensor("token_embd.weight", (32, 31_000)), *TENSORS[1:]])
    )
    server.heads[hub_path()] = told(now)
    server.bodies[hub_path()] = server.ranged(now)
    if is_same:  # there is room for the rest
        free_bytes = (64 << 20) + len(LARGE) - 1_500_000
        monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=free_bytes))
    assert pull_model(REFERENCE, silent).read_bytes() == now
    assert [asked is not None for asked in server.ranges] == [is_same]
    assert visible() == [IN_STORE, f"{IN_STORE}.toml"]


def test_what_sends_more_than_the_hub_told_is_stopped(server: Server) -> None:
    def more(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + SMALL)
        for _ in range(400):
            handler.wfile.write(bytes(1_000_000))
            server.n_sent += 1_000_000

    server.heads[hub_path()] = lambda handler: handler.head(len(SMALL))  # type: ignore[attr-defined]
    server.bodies[hub_path()] = more
    assert_says(refusal(), f"more than {len(SMALL) + (1 << 20):,} bytes came", "not kept")
    assert visible() == []
    assert server.n_sent < 40_000_000


def test_the_place_of_a_listed_model_is_that_model(tmp_path: Path, server: Server) -> None:
    from local_hub import write_catalogue

    catalogue = write_catalogue(tmp_path / "models.toml")
    server.bodies[hub_path()] = WEIGHTS
    assert pull_model(REFERENCE, silent, catalogue) == model_store() / FILE
    assert resolve_model(REFERENCE, catalogue) == model_store() / FILE
