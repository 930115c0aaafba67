"""What ends a call from outside, in any command: one line, no traceback, unless it is a bug."""

import errno
import io
import os
from pathlib import Path

import pytest
from command_line import Call, given, in_a_process, one_line
from messages import assert_says

from sg_local.models import store_root
from sg_local.runs.directory import Run


def test_an_interruption_is_one_line(
    sg: Call, new_run: Run, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sg_local.runs.process.in_child_process", interrupt)
    result = sg(*given(new_run, task), "--until=generate")
    assert (result.exit_code, result.stdout) == (130, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: interrupted")
    assert_says(last, "kept", "same command")
    monkeypatch.setattr("sg_local.plan.doctor.examine", interrupt)
    assert one_line(sg("doctor"), 130) == "Error: interrupted"


class Keyboard(io.RawIOBase):
    """What somebody types who answers so much, and then presses Ctrl-C."""

    def __init__(self, typed: bytes = b"") -> None:
        self.typed = typed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        if not self.typed:
            raise KeyboardInterrupt
        part, self.typed = self.typed[: len(buffer)], self.typed[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)


@pytest.mark.parametrize("command", [["init", "new.toml"], ["cache", "--all"]], ids=" ".join)
def test_ctrl_c_at_a_question_ends_as_an_interruption(sg: Call, command: list[str]) -> None:
    copy = store_root() / "weights" / "0123456789abcdef" / "f16.gguf"
    copy.parent.mkdir(parents=True)
    copy.touch()
    result = sg(*command, input=io.BufferedReader(Keyboard()))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "Error: interrupted"
    # Nobody is there: the question stays without an answer, which is no interruption.
    result = sg(*command, input="")
    assert result.exit_code == 1
    assert "interrupted" not in result.stderr
    assert copy.exists()
    assert os.listdir() == []


def test_ctrl_c_in_the_middle_of_the_questions_writes_nothing(sg: Call) -> None:
    result = sg("init", "new.toml", input=io.BufferedReader(Keyboard(b"new\nSay it politely.\n\nSend it!\n")))
    assert result.exit_code == 130
    assert "Example 1, its right output" in result.stderr
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.bin"),
            ["a.bin", "No space left on device", "free some space"],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.bin"),
            ["a.bin", "Permission denied", "permissions"],
        ),
        (MemoryError(), ["memory", "smaller model", "--n-ctx"]),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    sg: Call, new_run: Run, task: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: list[str]
) -> None:
    def refuse(*_arguments: object) -> None:
        raise error

    monkeypatch.setattr("sg_local.stages.generate.run_generate", refuse)
    line = one_line(sg("generate", new_run.path), 1)
    assert_says(line, *told, "same command")


def test_a_bug_keeps_its_traceback(sg: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "ours")

    monkeypatch.setattr("sg_local.plan.doctor.examine", wrong)
    result = sg("doctor")
    assert isinstance(result.exception, FileNotFoundError)


def test_a_reader_that_leaves_is_no_bug() -> None:
    """As in `sg-local models list | head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        result = in_a_process("models", "list", "--json", stdout=write_end)
    finally:
        os.close(write_end)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_stage_whose_reader_leaves_does_not_pass_for_done(
    sg: Call, new_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sg-local run ... 2>&1 | head -3`: the next stage must not begin."""

    def say(*_arguments: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("sg_local.stages.generate.run_generate", say)
    result = sg("generate", new_run.path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
