"""README and manuals say what is there: `.ci/readme.py --check` finds what is not, and `make readme` writes it."""

import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import pytest

from sg_local.report.scores import score_table
from sg_local.runs.directory import Run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme = _loaded()


def test_readme_and_manuals_are_as_the_program_is() -> None:
    assert readme.faults() == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("new run runs/", "new run /home/me/runs/", "path of a machine, /home/me/runs/support-inbox:"),
        ("--preset quick\n", "--preset paper\n", "the transcript is not of"),
        ("                   Exact Match", "Exact Match", "no table of scores"),
        ("## Limits", "## Limits" + "!" * 12_000, "characters, at most 12000"),
    ],
)
def test_a_wrong_transcript_and_a_long_readme_are_faults(before: str, after: str, fault: str) -> None:
    changed = README.replace(before, after)
    assert changed != README
    assert any(fault in line for line in readme.readme_faults(changed))


@pytest.mark.parametrize(
    ("check", "text", "fault"),
    [
        ("link_faults", "[a](gone.md)", "gone.md leads nowhere"),
        ("link_faults", "# One `x`, two\n\n[a](#one-x-two) [b](#one-x)", "#one-x leads nowhere"),
        ("command_faults", "```console\n$ sg-local run a.toml --n-input 7\n```", "No such option"),
        ("command_faults", "```console\n$ cd x && sg-local exprot RUN  # why\n```", "exprot"),
        ("command_faults", "```console\n$ sg-local models show\n```", "Missing argument"),
        ("command_faults", "```console\n$ sg-local run a.toml --preset slow\n```", "'slow' is not one of"),
        ("option_faults", "Try `--no-parity`, `--n-inputs 7`, or `--n-outputs`.", "--n-outputs"),
    ],
)
def test_dead_links_wrong_commands_and_unknown_options_are_faults(
    check: str, text: str, fault: str, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    found: Callable[[Path], Iterable[str]] = getattr(readme, check)
    (line,) = found(page)
    assert fault in line


def test_a_table_that_the_program_does_not_give_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("Before.\n<!-- make readme: commands -->\n<!-- end -->\nAfter.\n")
    monkeypatch.setattr(readme, "TABLES", {(page, "commands"): readme.command_table})
    assert len([*readme.stale_tables()]) == 1
    readme.write_part(page, "commands", readme.command_table())
    assert [*readme.stale_tables()] == []
    assert page.read_text().startswith("Before.\n<!-- make readme: commands -->\n| command | does |\n")
    assert page.read_text().endswith("|\n<!-- end -->\nAfter.\n")
    page.write_text(page.read_text().replace("`doctor`", "`nurse`"))
    assert len([*readme.stale_tables()]) == 1


def test_the_transcript_has_the_columns_and_contenders_of_the_table_of_scores(finished_run: Run) -> None:
    headings, contenders = readme.score_columns(readme.part_of(README, "transcript"))
    headings_today, contenders_today = readme.score_columns(score_table(finished_run) + "\n")
    assert headings == headings_today
    assert contenders_today
    sometimes = {"base_few_shot_first_line"}  # where the base goes on after its first line
    assert set(contenders) - sometimes == set(contenders_today)


def test_of_each_stage_the_transcript_has_its_last_message_and_its_time() -> None:
    lines = [
        "new run runs/a: a with m.gguf",
        "[1/6] generate",
        "llama.cpp: on the processor",
        "generate: asking by turns",
        "generate: 160 inputs",
        "generate: 96/160 inputs, 12.4 inputs/s, 5 s left",
        "[1/6] generate done in 61 s",
        "[3/6] curate",
        "     256 inputs were asked for",
        "curate: 161 rows with the demonstrations, 172 with repetitions",
        "curate: " + "a warning " * 20,
        "[3/6] curate done in 1 s",
        "[6/6] evaluate",
        "evaluate base_zero_shot: 100 rows",
        "[6/6] evaluate done in 40 s",
    ]
    first, *rest = readme.shortened(lines)
    assert first == lines[0]
    assert [rest[0], rest[1], rest[3], rest[4]] == [lines[3], lines[6], lines[11], lines[14]]
    assert rest[2].startswith("curate: a warning a warning")
    assert rest[2].endswith(" ...")
    assert len(rest[2]) <= readme.MAX_LINE_CHARACTERS


def test_no_page_has_marks_of_a_merge() -> None:
    for path in readme.PAGES:
        marks = re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", path.read_text("utf-8"), re.MULTILINE)
        assert not marks, (path, marks)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    pages = [path.read_text("utf-8") for path in readme.PAGES]
    targets = {
        target for page in pages for target in re.findall(r"(?:^\$ |`)make ([a-z-]+)", page, re.MULTILINE)
    }
    assert {"install", "readme", "tables", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_guide_for_contributors_names_every_folder_and_module_and_no_other() -> None:
    guide = (ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8")
    house = re.search(r"## The house\n.*?```\n(.*?)```", guide, re.DOTALL)
    assert house
    there = {f"{path.name}/" for path in (ROOT / "sg_local").iterdir() if path.is_dir()} - {"__pycache__/"}
    there |= {path.name for path in (ROOT / "sg_local").glob("*.py") if not path.name.startswith("__")}
    assert set(re.findall(r"(?<![\w/])(?:[a-z_]+/|[a-z_]+\.py)", house[1])) == there
