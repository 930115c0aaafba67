"""`sg-local doctor`: what is here, what is missing, and how to get it."""

import builtins
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Call
from messages import assert_says

import sg_local.finetune.environment as environment
from sg_local.runs.directory import Run


def findings(sg: Call, *missing: str) -> dict[str, dict[str, Any]]:
    """What doctor finds; its exit code and its error say what is missing."""
    result = sg("doctor", "--json")
    error = f"Error: missing: {', '.join(missing)}; what to do is said beside each\n" if missing else ""
    assert (result.exit_code, result.stderr) == (1 if missing else 0, error)
    return {finding["what"]: finding for finding in json.loads(result.stdout)}


def test_doctor_on_a_machine_without_a_gpu(sg: Call, nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sg_local.llama.library.supports_gpu", lambda: False)
    found = findings(sg)
    assert set(found["GPU"]) == {"what", "ok", "needed", "found", "fix"}
    assert (found["GPU"]["ok"], found["GPU"]["needed"], found["GPU"]["fix"]) == (True, True, None)
    assert_says(found["GPU"]["found"], "no NVIDIA GPU", "1B", "CPU")
    assert found["llama.cpp"]["found"].endswith("built for the CPU")
    assert found["llama.cpp"]["ok"]
    text = sg("doctor").stdout
    assert re.search(r"^ok      python +3\.", text, re.MULTILINE)
    assert len([line for line in text.splitlines() if not line.startswith(" ")]) == len(found)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_doctor_where_a_gpu_lies_idle(sg: Call, nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = nvidia.with_name("cc")
    compiler.touch(mode=0o755)
    nvidia.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288 MiB'\n")
    nvidia.chmod(0o755)
    monkeypatch.setattr("sg_local.llama.library.supports_gpu", lambda: False)
    monkeypatch.setattr("sg_local.plan.doctor.version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr("sg_local.plan.doctor.find_present", lambda _model: None)
    found = findings(sg, "llama.cpp", "torch")
    assert found["GPU"]["found"] == "NVIDIA GeForce RTX 3060, 12288 MiB"
    assert "-DGGML_CUDA=on" in found["llama.cpp"]["fix"]
    assert "--force-reinstall" in found["torch"]["fix"]
    result = sg("doctor")
    assert result.exit_code == 1
    assert "missing torch" in result.stdout
    assert "advice  models" in result.stdout  # the machine lacks nothing for that
    nvidia.write_text("#!/bin/sh\nexit 9\n")  # as it ends where the driver is not loaded
    assert findings(sg)["GPU"]["found"].startswith("no NVIDIA GPU")
    assert sg("doctor").exit_code == 0


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_doctor_where_torch_cannot_use_the_card_and_nothing_compiles(
    sg: Call, nvidia: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288 MiB'\n")
    nvidia.chmod(0o755)
    monkeypatch.setattr("sg_local.llama.library.supports_gpu", lambda: True)
    monkeypatch.setattr("sg_local.plan.doctor.version", lambda name: "2.13.0")
    monkeypatch.setattr("sg_local.plan.doctor.find_present", lambda _model: None)
    monkeypatch.setattr("sg_local.plan.doctor.TRY_TORCH", "raise SystemExit('driver is too old')")
    found = findings(sg, "torch", "compiler")  # the stand-in's directory is all of PATH
    assert "driver is too old" in found["torch"]["found"]
    assert "driver" in found["torch"]["fix"]
    monkeypatch.setattr(
        "sg_local.plan.doctor.TRY_TORCH", "raise SystemExit('bitsandbytes: RuntimeError: it has no kernels')"
    )
    assert_says(findings(sg, "torch", "compiler")["torch"]["fix"], "bitsandbytes")
    assert "gcc" in (found["compiler"]["fix"] or "gcc")  # a machine may have both
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "nowhere"})
    monkeypatch.setattr("sg_local.plan.doctor.TRY_TORCH", "")
    found = findings(sg, "compiler")
    assert (found["torch"]["ok"], found["compiler"]["ok"]) == (True, False)
    assert "Python.h" in found["compiler"]["found"]
    assert "python3-dev" in found["compiler"]["fix"]


def test_doctor_says_how_to_install_what_is_missing(sg: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("sg_local.plan.doctor.version", nothing)
    packages = ("gguf", "rapidfuzz", "rouge-score", "scipy", "llama.cpp", *environment.NEEDED)
    found = findings(sg, *packages)
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirement = next(item for item in pyproject["dependencies"] if item.startswith("llama-cpp-python"))
    assert found["llama.cpp"]["fix"] == f"pip install {requirement}"
    for name in environment.NEEDED:
        assert not found[name]["ok"]
        assert "sg-local[train]" in found[name]["fix"]


def test_doctor_where_llama_cpp_cannot_be_loaded(sg: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "sg_local.llama.library":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    finding = findings(sg, "llama.cpp")["llama.cpp"]
    assert_says(finding["found"], "cannot be loaded", "libcudart.so.12")
    assert "--force-reinstall" in finding["fix"]


@pytest.mark.usefixtures("real_child")
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such signals")
def test_doctor_where_loading_llama_cpp_ends_the_process(
    sg: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama_cpp.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = findings(sg, "llama.cpp")["llama.cpp"]
    assert_says(finding["found"], "cannot be loaded", "SIGILL")
    assert "-DGGML_NATIVE=OFF" in finding["fix"]


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "SIGILL"),
        ("raise SystemExit('no such type')", "no such type"),
        ("raise SystemExit(7)", "exit code 7"),
        ("import time; time.sleep(60)", "more than 1 seconds"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows knows no such signals")
def test_doctor_where_llama_cpp_ends_its_process(
    sg: Call, new_run: Run, monkeypatch: pytest.MonkeyPatch, program: str, told: str
) -> None:
    """As one does that was built for a processor with other instructions."""
    monkeypatch.setattr("sg_local.plan.doctor.find_present", lambda _model: new_run.model.path)
    monkeypatch.setattr("sg_local.plan.doctor._TRY_PROGRAM", program)
    monkeypatch.setattr("sg_local.plan.doctor._TRY_SECONDS", 1)
    finding = findings(sg, "llama.cpp")["llama.cpp"]
    assert told in finding["found"]
    assert "-DGGML_NATIVE=OFF" in finding["fix"]


def test_doctor_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom sg_local.cli import cli\n"
        "assert CliRunner().invoke(cli, ['doctor']).exit_code == 0\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert not {"torch", "transformers", "trl", "peft", "unsloth", "datasets", "scipy"} & set(
        done.stdout.split()
    )
