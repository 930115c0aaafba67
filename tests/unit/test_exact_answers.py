"""Which answers are the same, what JSON an answer may be, and how many of its fields are right."""

import json
import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.selfguide.exact_answers import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    all_fields_right,
    answer_key,
    fits,
    parsed,
    shape_of,
    share_of_fields_right,
)

ORDERS = ['{"item": "blue pens", "n": 10}', '{"item": "cups", "n": 2.5}']


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Blue  pens.", " blue pens"),
        ('"62"', "62"),
        ('{"item": "pens", "n": 10}', '{"n":10.0,"item":"Pens."}'),
        ("[1, 2]", "[1,2]"),
        ("no JSON {", "No JSON {"),
    ],
)
def test_the_same_said_in_another_way(one: str, other: str) -> None:
    assert answer_key(one) == answer_key(other)


def test_accents_are_the_same_however_they_are_written() -> None:
    right = '{"caf\u00e9": "cr\u00e8me", "n": 1}'
    apart = unicodedata.normalize("NFD", right)
    assert apart != right
    for other in (apart, json.dumps(json.loads(apart))):
        assert share_of_fields_right(other, right) == 1
        assert answer_key(other) == answer_key(right)
        assert fits(shape_of([right]) or pytest.fail("no shape"), other)
    assert answer_key(unicodedata.normalize("NFD", "Caf\u00e9")) == answer_key("caf\u00e9")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("3.5", "35"),
        ("-5", "5"),
        ('{"n": 1}', '{"n": true}'),
        ('{"n": "1"}', '{"n": 1}'),
        ('{"n": null}', "{}"),
        ('{"n": []}', '{"n": {}}'),
        ("[1, 2]", "[2, 1]"),
        ('{"n": {"m": 1}}', '{"n.m": 1}'),
    ],
)
def test_what_is_not_the_same(one: str, other: str) -> None:
    assert answer_key(one) != answer_key(other)


@pytest.mark.parametrize(
    "text",
    [
        "10",
        '"pens"',
        '{"n": NaN}',
        '{"n": -Infinity}',
        '{"n": 1e999}',
        '{"n": 1, "n": 2}',
        '{"n": 1} and more',
        "{'n': 1}",
        '{"n": ' + "9" * 5000 + "}",
        "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
        "[" * 60_000,
        json.dumps(["a" * MAX_CHARACTERS]),
    ],
)
def test_what_is_no_answer_in_json(text: str) -> None:
    assert parsed(text) is None
    assert share_of_fields_right(text, '{"n": 1}') == 0


def test_a_text_that_does_not_end_is_read_once() -> None:
    """To look for its end from each of its quotes took a minute."""
    text = '{"' + '\\"' * 30_000
    started = time.process_time()
    assert parsed(text) is None
    assert time.process_time() - started < 2


def test_brackets_in_a_text_do_not_nest() -> None:
    assert parsed(json.dumps(['[{"' * 50])) == ['[{"' * 50]


@given(st.text(alphabet='{}[]":,\\ \n0123456789eE+-.truefalsnNa', max_size=60))
def test_any_text_has_a_key(text: str) -> None:
    assert answer_key(text) == answer_key(text)


@pytest.mark.parametrize(
    ("answer", "is_fitting"),
    [
        ('{"n": 7, "item": ""}', True),
        ('{"item": "cups", "n": "seven"}', False),
        ('{"item": "cups", "n": true}', False),
        ('{"item": "cups", "n": null}', False),
        ('{"item": "cups"}', False),
        ('{"item": "cups", "n": 7, "colour": "red"}', False),
        ('[{"item": "cups", "n": 7}]', False),
        ("cups, 7", False),
    ],
)
def test_an_answer_has_the_keys_and_kinds_of_the_examples(answer: str, is_fitting: bool) -> None:
    shape = shape_of(ORDERS)
    assert shape
    assert fits(shape, answer) is is_fitting


def test_shapes_of_lists_and_of_what_may_be_missing() -> None:
    listed = shape_of(
        ['[{"to": "Ann", "cc": null}]', '[{"to": "Ben", "cc": "Cleo"}, {"to": "Dan", "cc": null}]']
    )
    assert listed
    assert fits(listed, "[]")
    assert fits(listed, '[{"to": "Eve", "cc": "Fay"}]')
    assert not fits(listed, '[{"to": null, "cc": null}]')
    assert not fits(listed, '[{"to": "Eve", "cc": "Fay"}, 3]')
    # What no example says may be anything.
    unknown = shape_of(['{"tags": []}'])
    assert unknown
    assert fits(unknown, '{"tags": [1, {"a": "b"}]}')


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        ["62", "31"],
        [ORDERS[0], "none"],
        [ORDERS[0], '{"item": "cups"}'],
        [ORDERS[0], '{"item": 3, "n": 3}'],
        ['[1, "a"]'],
    ],
)
def test_examples_without_one_shape_ask_for_none(outputs: list[str]) -> None:
    assert shape_of(outputs) is None


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ('{"n":10,"item":"Blue pens"}', 1.0),
        ('{"item": "red pens", "n": 10}', 0.5),
        ('{"item": "blue pens"}', 0.5),
        (
            '{"item": "blue pens", "n": 10, "colour": "blue", "size": null}',
            0.5,
        ),  # what nobody asked for is wrong
        ("[]", 0.0),
        ("blue pens, 10", 0.0),
    ],
)
def test_fields_that_are_right(answer: str, share: float) -> None:
    assert share_of_fields_right(answer, ORDERS[0]) == share
    assert all_fields_right(answer, ORDERS[0]) == float(share == 1)


def test_fields_lie_in_lists_and_objects() -> None:
    right = '{"guests": [{"name": "Ann", "age": 3}, {"name": "Ben", "age": 4}]}'
    assert share_of_fields_right('{"guests": [{"name": "Ann", "age": 3}]}', right) == 0.5
    assert share_of_fields_right(right.replace("Ben", "Bea"), right) == 0.75


@pytest.mark.parametrize("reference", ["none", "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), '{"n": NaN}'])
def test_a_right_output_that_is_no_json_is_one_field(reference: str) -> None:
    assert share_of_fields_right(f" {reference.upper()}. ", reference) == 1
    assert share_of_fields_right('{"n": 1}', reference) == 0
    assert share_of_fields_right("", reference) == 0
    assert all_fields_right(reference, reference) == 1
