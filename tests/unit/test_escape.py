"""Texts that mean harm in each kind of output, and those that must stay as they are."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.escape import json_text, markdown, one_line, printable

CONTROLS = "\x00\x07\x1b\x7f\x85\x9b\xad\u200b\u200f\u2028\u2029\u202e\u2066\ufeff\U000e0041"


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: f"{ord(control):x}")
def test_what_is_not_plain_to_see_stands_as_an_escape(control: str) -> None:
    for escaped in (printable, one_line, markdown):
        shown = escaped(f"a{control}b")
        assert re.fullmatch(r"a\\{1,2}[xuU][0-9a-f]+b", shown), shown
    shown = json_text({control: [f"a{control}b"]})
    assert shown.isascii()
    assert shown.isprintable()
    assert json.loads(shown) == {control: [f"a{control}b"]}


def test_line_ends_stay_where_lines_may_be() -> None:
    assert printable("a\nb\r\n") == "a\nb\\r\n"
    assert one_line("a\nError: b") == "a\\nError: b"
    assert markdown("a\n# b\n- c") == "a\\\\n# b\\\\n- c"
    assert json_text({"a": "b\nc"}, indent=1) == '{\n "a": "b\\nc"\n}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("&lt;b&#62;", "&amp;lt;b&amp;#62;"),
        ("[a](javascript:b)", "[a\\](javascript:b)"),
        ("![a][b] [c]: d", "![a\\][b] [c\\]: d"),
        ("https://a.b www.a.b WWW.a", "https:\\//a.b www\\.a.b WWW\\.a"),
        ("mail a@b.c", "mail a\\@b.c"),
        ("`a` **b** _c_ ~~d~~ a|b $e$", "\\`a\\` \\*\\*b\\*\\* \\_c\\_ \\~\\~d\\~\\~ a\\|b \\$e\\$"),
        ("a\\|b\\", "a\\\\\\|b\\\\"),
    ],
)
def test_markdown_shows_the_text_itself(text: str, expected: str) -> None:
    assert markdown(text) == expected


@pytest.mark.parametrize(
    "text",
    ["task190_snli", "+0.200 [+0.100, +0.300]", "n_layouts=1", "1.0% → 2.0%", "AT&T & co", "x - y; z."],
)
def test_markdown_leaves_plain_text_as_it_is(text: str) -> None:
    assert markdown(text) == text


def test_plain_text_of_any_language_stays_readable() -> None:
    text = "Grüße, 你好 שלום مرحبا 🙂 é"
    assert printable(text) == one_line(text) == markdown(text) == json.loads(json_text(text)) == text
    assert text in json_text(text)


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_comes_back_out_of_json(text: str) -> None:
    shown = json_text(text)
    assert shown.isprintable()
    assert json.loads(shown.encode()) == text
