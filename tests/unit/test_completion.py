"""What a shell completes: commands, shipped tasks, listed models, and files; asked as bash asks."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from sg_local.cli import cli


def completed(*words: str) -> list[str]:
    """The lines that bash is given for a line with these words, of which the last is being typed."""
    environment = {
        "_SG_LOCAL_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(["sg-local", *words]),
        "COMP_CWORD": str(len(words)),
    }
    result = CliRunner().invoke(cli, [], env=environment, prog_name="sg-local")
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["comp"], ["plain,compare"]),
        (["models", "p"], ["plain,pull"]),
        (["run", "support"], ["plain,support-inbox"]),
        (["run", "my"], ["plain,my.toml"]),
        (["run", "elsewhere/a"], ["file,elsewhere/a"]),
        (["plan", "guest"], ["plain,guest-feedback"]),
        (["task", "check", "polite"], ["plain,polite-request"]),
        (["run", "my.toml", "--model", "smollm2-135"], ["plain,smollm2-135m"]),
        (["run", "my.toml", "--model", "own"], ["plain,own.gguf"]),
        (["chat", "own"], ["plain,own.gguf"]),
        (["report", "runs/a"], ["file,runs/a"]),
        (["run", "my.toml", "--from", "runs/a"], ["file,runs/a"]),
        (["run", "my.toml", "--preset", "q"], ["plain,quick"]),
        (["predict", "--model", "own"], ["plain,own.gguf"]),
        (["predict", "--model", "own.gguf", "--task", "polite"], ["plain,polite-request"]),
        (["predict", "--model", "own.gguf", "notes"], ["file,notes"]),
        (["models", "show", "vicuna"], ["plain,vicuna-7b-v1.5"]),
        (["export-adapter", "--model", "own"], ["plain,own.gguf"]),
        (["verify", "runs/a"], ["file,runs/a"]),
        (["compare", "runs/a", "runs/b"], ["file,runs/b"]),
    ],
    ids=" ".join,
)
def test_what_is_completed(words: list[str], lines: list[str]) -> None:
    Path("my.toml").touch()
    Path("own.gguf").touch()
    Path("my\nplain,forged.toml").touch()
    assert completed(*words) == lines
