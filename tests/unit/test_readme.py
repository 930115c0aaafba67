"""The README says what is there: every folder in its tree, every command in its table, every preset, no dead ones."""

import re
from pathlib import Path

from sg_local.cli import COMMANDS
from sg_local.settings import PRESETS, STAGES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def tree() -> str:
    return README[README.index("## How it is laid out") : README.index("A run directory:")]


def test_the_tree_names_every_folder_and_module_and_no_other() -> None:
    there = {f"{path.name}/" for path in (ROOT / "sg_local").iterdir() if path.is_dir()} - {"__pycache__/"}
    there |= {path.name for path in (ROOT / "sg_local").glob("*.py") if not path.name.startswith("__")}
    named = set(re.findall(r"\b[a-z_]+\.py\b", tree())) | set(
        re.findall(r"^  ([a-z_]+/)", tree(), re.MULTILINE)
    )
    assert named == there


def test_the_table_names_every_command() -> None:
    table = README[README.index("| command | does |") : README.index("Answers and data go to stdout")]
    named = set(re.findall(r"[a-z-]+", table))
    assert set(COMMANDS) | set(STAGES) <= named


def test_the_presets_are_those_of_the_settings() -> None:
    found = re.search(r"--preset ([a-z\\|]+)`", README)
    assert found
    assert found[1].split(r"\|") == list(PRESETS)


def test_the_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"\$ make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
