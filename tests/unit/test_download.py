"""Downloads in their own processes, from a hub and an index on loopback that send what they like."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from command_line import ROOT
from local_hub import (
    FILE,
    METADATA,
    OFFLINE,
    WEIGHTS,
    WHEEL,
    Server,
    hub_path,
    put_wheel,
    write_catalogue,
)
from messages import assert_says

import sg_local.download as download_module
from sg_local.errors import SgLocalError
from sg_local.models import model_store
from sg_local.pull import pull_model


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    return write_catalogue(tmp_path / "models.toml")


def visible() -> list[str]:
    return sorted(path.name for path in model_store().iterdir() if path.name != ".lock")


def silent(_line: str) -> None:
    pass


def test_a_pull_from_the_hub_brings_the_file_and_leaves_nothing_else(
    server: Server, catalogue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.bodies[hub_path()] = WEIGHTS
    assert pull_model("big", silent, catalogue).read_bytes() == WEIGHTS
    assert visible() == [FILE]
    assert_says(capsys.readouterr().err, "pull big", "MB")


@pytest.mark.parametrize("variable", OFFLINE)
def test_who_forbade_downloads_is_told_so(
    server: Server, catalogue: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    server.bodies[hub_path()] = WEIGHTS
    monkeypatch.setenv(variable, "1")
    with pytest.raises(SgLocalError) as caught:
        pull_model("big", silent, catalogue)
    assert_says(str(caught.value), f"{variable}=1 forbids downloads", "unset it")


def test_a_pull_from_an_index_brings_the_file_and_leaves_nothing_else(
    server: Server, catalogue: Path, tmp_path: Path
) -> None:
    put_wheel(server, tmp_path, METADATA)
    assert pull_model("tiny", silent, catalogue).read_bytes() == WEIGHTS
    assert visible() == ["tiny.gguf"]


@pytest.mark.parametrize("name", ["big", "tiny"])
def test_what_sends_more_than_is_listed_is_stopped_at_that_size(
    server: Server, catalogue: Path, tmp_path: Path, name: str
) -> None:
    put_wheel(server, tmp_path, METADATA)
    server.bodies[hub_path()] = server.bodies[f"/files/{WHEEL}"] = server.endless
    with pytest.raises(SgLocalError) as caught:
        pull_model(name, silent, catalogue)
    assert_says(str(caught.value), f"more than {len(WEIGHTS) + (1 << 20):,} bytes", "not kept")
    assert visible() == []
    assert server.n_sent < 40_000_000  # what stood in buffers


@pytest.mark.parametrize("name", ["big", "tiny"])
@pytest.mark.parametrize("way", ["dripping", "silent"])
def test_what_hardly_sends_anything_is_stopped_with_a_word(
    server: Server, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    monkeypatch.setattr(download_module, "STALL_SECONDS", 1.0)
    put_wheel(server, tmp_path, METADATA)
    server.bodies[hub_path()] = server.bodies[f"/files/{WHEEL}"] = getattr(server, way)
    started = time.monotonic()
    with pytest.raises(SgLocalError) as caught:
        pull_model(name, silent, catalogue)
    assert time.monotonic() - started < 20
    assert_says(str(caught.value), "bytes came in 1 s", "check the network")
    assert visible() == ([".pull-big"] if name == "big" else [])


def test_a_hub_that_begins_anew_again_and_again_is_left(
    server: Server, catalogue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cuts every answer off after 300 kB, and knows no ranges."""

    def cut_off(handler: BaseHTTPRequestHandler) -> None:
        handler.head(len(WEIGHTS))  # type: ignore[attr-defined]
        handler.wfile.write(WEIGHTS[:300_000])
        handler.wfile.flush()
        handler.close_connection = True

    monkeypatch.setattr(download_module, "STALL_SECONDS", 2.0)
    server.bodies[hub_path()] = cut_off
    with pytest.raises(SgLocalError, match=f"{FILE} could not be downloaded"):
        pull_model("big", silent, catalogue)


@pytest.mark.parametrize("where", ["METADATA", "many files"])
def test_a_wheel_whose_metadata_expands_is_refused_before_it_is_unpacked(
    server: Server, catalogue: Path, tmp_path: Path, where: str
) -> None:
    put_wheel(
        server, tmp_path, METADATA + (bytes(60_000_000) if where == "METADATA" else b""), weights=b"small"
    )
    if where == "many files":
        with zipfile.ZipFile(tmp_path / WHEEL, "a", zipfile.ZIP_DEFLATED) as archive:
            for number in range(30):
                archive.writestr(f"tiny_weights-1.0.dist-info/{number}.txt", bytes(2_000_000))
        server.bodies[f"/files/{WHEEL}"] = (tmp_path / WHEEL).read_bytes()
    with pytest.raises(SgLocalError) as caught:
        pull_model("tiny", silent, catalogue)
    if where == "METADATA":
        assert_says(str(caught.value), "METADATA expands to 60000054 bytes")
    assert visible() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such limits")
def test_a_page_of_the_index_takes_no_more_memory_than_allowed(
    server: Server, catalogue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "MAX_MEMORY_BYTES", 300 << 20)

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.head(None)  # type: ignore[attr-defined]
        for _ in range(4000):
            handler.wfile.write(b" " * 1_000_000)
            server.n_sent += 1_000_000

    server.bodies["/simple/tiny-weights/"] = page
    with pytest.raises(SgLocalError, match="too much memory"):
        pull_model("tiny", silent, catalogue)
    assert server.n_sent < 400_000_000
    assert visible() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_the_download_ends_with_the_pull_and_the_next_goes_on(
    server: Server, catalogue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = threading.Event()
    ended = threading.Event()

    def slow(handler: BaseHTTPRequestHandler) -> None:
        handler.head(len(WEIGHTS))  # type: ignore[attr-defined]
        handler.wfile.write(WEIGHTS[:700_000])
        handler.wfile.flush()
        began.set()
        try:
            while not server.is_closing.wait(0.05):
                handler.wfile.write(b"x")
        except OSError:
            ended.set()

    server.bodies[hub_path()] = slow
    code = (
        "import sys; from pathlib import Path; from sg_local.pull import pull_model; "
        "pull_model('big', print, Path(sys.argv[1]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pull = subprocess.Popen(
        [sys.executable, "-c", code, str(catalogue)], env=environment, stderr=subprocess.DEVNULL
    )
    assert began.wait(60)
    time.sleep(0.5)
    pull.send_signal(signal.SIGKILL)
    pull.wait(30)
    assert ended.wait(30)  # the connection: nobody writes to the store any more
    assert visible() == [".pull-big"]
    server.bodies[hub_path()] = WEIGHTS
    assert pull_model("big", silent, catalogue).read_bytes() == WEIGHTS
    assert visible() == [FILE]


def test_the_hubs_own_reason_is_passed_on(server: Server, catalogue: Path) -> None:
    with pytest.raises(SgLocalError, match=r"404.*check the network") as caught:
        pull_model("big", silent, catalogue)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["big", "tiny"])
def test_a_disk_that_is_full_is_no_matter_of_the_network(
    server: Server, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What huggingface_hub and pip said on a tmpfs without room."""
    program = tmp_path / "child.py"
    program.write_text("import sys; sys.exit('ERROR: ... [Errno 28] No space left on device')")
    monkeypatch.setattr(download_module, "_CHILD_PROGRAM", program)
    with pytest.raises(SgLocalError) as caught:
        pull_model(name, silent, catalogue)
    assert_says(str(caught.value), "No space left on device", "free some space and try again")
    assert "network" not in str(caught.value)


def test_a_download_reports_to_nobody_and_uses_no_cache_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process of a download is started with."""
    program = tmp_path / "child.py"
    program.write_text(
        "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ)]), file=sys.stderr); sys.exit(3)"
    )
    monkeypatch.setattr(download_module, "_CHILD_PROGRAM", program)
    monkeypatch.setattr(download_module, "MAX_REASON_CHARACTERS", 1 << 20)
    failure = download_module.download(
        ["hf", "a/b", "c.gguf"], tmp_path / "work", max_file_bytes=9, on_bytes=lambda _n_bytes: None
    )
    assert failure is not None
    arguments, environment = json.loads(failure.reason)
    assert arguments[1:] == [
        "hf",
        "a/b",
        "c.gguf",
        str(tmp_path / "work"),
        "9",
        str(download_module.MAX_MEMORY_BYTES),
    ]
    assert environment["HF_HUB_DISABLE_TELEMETRY"] == environment["HF_HUB_DISABLE_XET"] == "1"
    assert Path(environment["TMPDIR"]).is_relative_to(tmp_path / "work")
