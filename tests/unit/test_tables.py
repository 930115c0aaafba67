"""Numbers and lines of the tables for people."""

import pytest

from sg_local.report import tables
from sg_local.report.checks import Finding, finding_lines, passed_line


def test_numbers_look_alike_in_all_tables() -> None:
    assert tables.score(0.34) == "0.340"
    assert tables.gain(0.2) == "+0.200"
    assert tables.gain(-0.05, [-0.1, 0.0]) == "-0.050 [-0.100, +0.000]"
    assert tables.p_value(0.0123) == "0.012"
    assert tables.share(0.256) == "25.6%"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "-"), (1, "1 MiB"), (100 * 2**20, "100 MiB"), (103 * 2**20, "0.1 GiB"), (3 * 2**29, "1.5 GiB")],
)
def test_sizes_are_rounded_up_below_a_tenth_of_a_gib(n_bytes: int, text: str) -> None:
    assert tables.size(n_bytes) == text


def test_columns_are_as_wide_as_they_are_said_to_be() -> None:
    assert tables.aligned(["label", "rows", "given"], [8, 6, 9]) == "label     rows    given"
    assert tables.aligned(["label", "rows"], [8, 6, 9]) == "label     rows"
    assert tables.name_width([]) == tables.LEAST_NAME_WIDTH
    assert tables.name_width(["x" * 30, "y"]) == 30


def test_a_value_breaks_no_markdown_row() -> None:
    assert tables.markdown_row(["a|b", ""]) == "| a\\|b |  |"
    assert tables.markdown_heads(["task", "setting", "p"], 2) == [
        "| task | setting | p |",
        "| --- | --- | ---: |",
    ]


def test_checks_say_what_to_do() -> None:
    there: Finding = {"what": "gguf", "ok": True, "needed": True, "found": "0.17", "fix": None}
    assert finding_lines(there) == ["ok      gguf               0.17"]
    gone: Finding = {**there, "ok": False, "found": "not installed", "fix": "install it"}
    first, second = finding_lines(gone)
    assert first == "missing gguf               not installed"
    assert second.split() == ["->", "install", "it"]
    assert finding_lines({**gone, "needed": False})[0] == "advice  gguf               not installed"
    assert passed_line("parity", "0.03").split() == ["ok", "parity", "0.03"]
