"""`sg-local verify`: what is as it was, and what is not."""

import pytest
from command_line import Call, one_line
from finished_run import HEADER, TENSORS
from gguf_bytes import tiny_gguf
from messages import assert_says

from sg_local.runs.directory import Run


@pytest.mark.usefixtures("without_torch")
def test_verify_without_torch_says_how_to_do_without(sg: Call, finished_run: Run) -> None:
    assert "--no-parity" in one_line(sg("verify", finished_run.path), 2)


def test_verify_lists_what_is_as_it_was(sg: Call, finished_run: Run) -> None:
    result = sg("verify", finished_run.path, "--no-parity")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    for name in ("inputs.jsonl", "adapter.gguf", "model.gguf", "Modelfile", "evaluation.json", "tiny.gguf"):
        assert any(line.split()[1] == name for line in lines), name


def test_verify_tells_everything_that_is_wrong(sg: Call, finished_run: Run) -> None:
    finished_run.file("Modelfile").write_text("FROM elsewhere\n")
    finished_run.file("outputs.jsonl").unlink()
    finished_run.file("task.toml").write_text(finished_run.file("task.toml").read_text() + "\n")
    settings = finished_run.file("settings.toml")
    settings.write_text(settings.read_text().replace("n_inputs = 7", "n_inputs = 8"))
    data = bytearray(finished_run.model.path.read_bytes())
    data[-1] ^= 1
    finished_run.model.path.write_bytes(data)
    result = sg("verify", finished_run.path, "--no-parity")
    assert result.exit_code == 1
    told = result.stderr.removeprefix("Error: ").splitlines()
    for name, stage in (
        ("Modelfile", "export wrote"),
        ("outputs.jsonl", "`sg-local annotate"),
        ("task.toml", "generate read"),
        ("settings.toml", "train ran with"),
        ("tiny.gguf", "the run began with"),
    ):
        assert any(name in line and stage in line for line in told), name
    assert "Modelfile" not in result.stdout.split()


def test_verify_of_an_export_for_another_base(sg: Call, finished_run: Run) -> None:
    with finished_run.stage("export"):
        finished_run.file("model.gguf").write_bytes(
            tiny_gguf({**HEADER, "sg_local.base_fingerprint": "\x1b[31m0000"}, TENSORS)
        )
    with finished_run.stage("evaluate"):
        pass
    result = sg("verify", finished_run.path, "--no-parity")
    assert result.exit_code == 1
    assert_says(result.stderr, "model.gguf", "another base", r"\x1b[31m0000")
    assert "\x1b" not in result.output
