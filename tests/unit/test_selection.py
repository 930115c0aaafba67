"""Votes, confidence and balancing."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.selfguide.filters import rules_of
from sg_local.selfguide.rows import OutputRow, Source
from sg_local.selfguide.selection import (
    agreed,
    answer_confidences,
    balancing_copies,
    consensus,
    in_turns,
    informed_candidates,
    likeness,
    most_confident,
    most_informed,
    most_said,
    repeated_answers,
    same_share,
    source_to_leave_out,
    vote,
    vote_margin,
)
from sg_local.settings import Settings
from sg_local.task import Example, Task


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (["at noon", "at noon", "12"], ("at noon", 2 / 3)),
        (["12", " 12 ", "at noon"], ("12", 2 / 3)),  # white space around an answer is none of it
        (["at noon", "12"], ("12", 1 / 2)),  # among equals the shortest
        (["bb", "aa", "aa", "bb"], ("bb", 1 / 2)),  # among equals of one length the first
        (["long answer", "long answer", "b", "c"], ("long answer", 1 / 2)),  # but the commonest before all
        (["one"], ("one", 1.0)),
    ],
)
def test_vote(samples: list[str], expected: tuple[str, float]):
    assert vote(samples) == expected


@pytest.mark.parametrize(
    ("samples", "margin_of_votes"),
    [(["a", "a", "b", "c"], 1 / 4), (["a", " a"], 1.0), (["a", "b"], 0.0), (["a"], 1.0)],
)
def test_vote_margin(samples: list[str], margin_of_votes: float):
    assert vote_margin(samples) == margin_of_votes


def test_consensus_is_the_answer_most_like_the_others():
    # No two are equal, so a vote is chance; three of them are about a café, and one says the most of what they say.
    samples = ["Aromi is a cheap café.", "Aromi is a café.", "I like food.", "Aromi, a cheap café."]
    best, agreement = consensus(samples)
    assert best == "Aromi is a cheap café."
    assert agreement == pytest.approx((8 / 9 + 8 / 9 + 0) / 3)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (["at noon", "at noon", "12"], ("at noon", 1 / 2)),
        (["one"], ("one", 1.0)),
        (["four words are here", "x"], ("x", 0.0)),  # nothing in common: the shortest
        ([" a", "a ", "a"], ("a", 1.0)),
    ],
)
def test_consensus_of_few(samples: list[str], expected: tuple[str, float]):
    assert consensus(samples) == expected


def test_likeness_is_the_mean_rouge_l_with_the_others():
    assert likeness("a b", ["a b", "a b", "a c", ""]) == pytest.approx((1.0 + 0.5 + 0.0) / 3)
    assert likeness("a", ["a"]) == 1.0


def test_the_answer_that_the_input_makes_likelier_most_is_chosen():
    # "no." is the likeliest with the input, and as likely without it
    best, information = most_informed([-2.0, -6.0, -12.0], [-2.2, -20.0, -24.0], [1, 2, 4])
    assert (best, information) == (1, 7.0)
    assert most_informed([-3.0], [-1.0], [2]) == (0, -1.0)


BLUE, RED = '{"item": "blue pens", "n": 10}', '{"item": "red pens", "n": 10}'


def test_what_many_samples_say_is_not_overruled() -> None:
    samples = [BLUE] * 5 + ['{"n":10,"item":"Blue pens"}'] * 3 + [RED, ""]
    assert same_share(BLUE, samples) == 0.8
    assert agreed(samples[:9]) == [BLUE, samples[5]]
    # of equal groups both are in question, and where no answer repeats all are
    assert agreed(["4", "5"] * 4 + ["6"] * 2) == ["4", "5"]
    sentences = [f"the {word} is red" for word in "abcdefghij"]
    assert agreed(sentences) == sentences
    assert agreed([*["the a is red"] * 3, *sentences[1:8]]) == sentences[:8]  # 3 of 10 are not many
    assert agreed([]) == []


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        (["10 pens", "pens", "10 Pens."], "10 pens"),  # two say the same, in other letters
        (['{"n": 1, "a": 2}', "x", '{"a": 2, "n": 1}'], '{"n": 1, "a": 2}'),
        (
            ["red pens", "ten pens now", "ten pens", "cups"],
            "ten pens",
        ),  # said once each: the most like the others
        (["b", "a long one"], "b"),
        (["only"], "only"),
    ],
)
def test_what_most_samples_say(samples: list[str], expected: str) -> None:
    assert most_said(samples) == expected


def chosen_row(samples: list[str], chosen: int) -> OutputRow:
    """A row as annotate writes it, with the sample that information chose."""
    share = round(likeness(samples[chosen], samples), 4)
    return OutputRow(id=0, output=samples[chosen], samples=samples, share=share, drop=None, information=1.0)


PENS = ["blue pens, 10"] * 3 + ["red pens, 10", "pens", "", "10 pens", "10"]
SENTENCES = ["The pens are blue.", "The pens are blue.", *(f"He wrote {n} letters." for n in range(8))]


def test_where_samples_repeat_in_most_rows_the_commonest_answer_counts() -> None:
    task = Task("t", "Write it.", (Example("I want two cups.", "cups, 2"), Example("Nine hats.", "hats, 9")))
    settings, rules = Settings(form_filter=False, length_filter=False), rules_of(task)
    texts = ["10 blue pens please"] * 3
    rows = [chosen_row(PENS, 3), chosen_row(PENS, 0), chosen_row(SENTENCES, 4)]
    assert repeated_answers(settings, rules, texts, rows) == [PENS[0], PENS[0], SENTENCES[0]]
    # Sentences: that two of ten are equal happens.
    assert repeated_answers(settings, rules, texts, [rows[0], rows[2], rows[2]]) is None
    assert repeated_answers(settings, rules, [], []) is None
    edited: list[OutputRow] = [{**rows[0], "output": text} for text in ("green pens, 10", "10 pens")]
    assert repeated_answers(settings, rules, texts, [*edited, rows[1]]) == [
        "green pens, 10",
        "10 pens",
        PENS[0],
    ]


def output_row(answer: str, samples: list[str], information: float) -> OutputRow:
    return OutputRow(id=0, output=answer, samples=samples, share=0.7, drop=None, information=information)


def test_where_samples_repeat_the_surest_rows_are_those_with_most_agreement() -> None:
    sure, unsure = ["4"] * 10, ["4", "4", "4", "4", "6", "7", "8", "9", "1", "2"]
    torn = [f"{word} it is" for word in "abcdefghij"]
    rows = [output_row("4", sure, 0.1), output_row("4", unsure, 2.0), output_row("a it is", torn, 3.0)]
    assert answer_confidences(rows, "information") == [1.0, 0.4, 0.1]
    # Where they hardly do, it is information, for all rows.
    assert answer_confidences([*rows[1:], rows[2]], "information") == [2.0, 3.0, 3.0]
    assert answer_confidences(rows, "consensus") == [0.7] * 3
    assert answer_confidences(rows, "votes") == pytest.approx([1.0, 0.3, 0.0])
    assert answer_confidences([], "information") == []


def test_samples_that_the_filters_drop_are_put_aside_before_the_choice() -> None:
    task = Task("t", "Do it.", (Example("4 mugs, please", '{"item": "mugs", "n": 4}'),))
    prose, text = "10 blue pens", "10 blue pens, please"
    samples = [prose] * 6 + [BLUE] * 3 + [RED]
    assert informed_candidates(Settings(), rules_of(task), text, samples) == [BLUE]
    assert informed_candidates(Settings(), rules_of(task), text, [prose] * 6 + ["pens"]) == [prose]
    asks_for_no_form = Settings(form_filter=False)
    assert informed_candidates(asks_for_no_form, rules_of(task), text, samples) == [prose]


def test_most_confident_is_chosen_for_each_label():
    labels = ["a", "a", "a", "a", "b", "b", "c"]
    margins = [0.1, 0.9, 0.5, 0.9, 0.01, 0.02, 0.0]
    assert most_confident(labels, margins, 0.5) == [False, True, False, True, False, True, True]
    assert most_confident(labels, margins, 1.0) == [True] * 7
    # One of each label stays, however small the share; of equals the first.
    assert most_confident(labels, margins, 0.05) == [False, True, False, False, False, True, True]
    assert most_confident([], [], 0.5) == []


def shown(labels: list[str], copies: list[int]) -> Counter[str]:
    return Counter(label for label, count in zip(labels, copies, strict=True) for _ in range(count))


def test_balancing_repeats_the_rarer_labels_rows():
    labels = ["a", "a", "b", "a", "b", "a", "a"]
    copies = balancing_copies(labels, 8)
    assert shown(labels, copies) == {"a": 5, "b": 5}
    assert copies == [1, 1, 3, 1, 2, 1, 1]  # the more confident of b's rows once more


def test_no_row_is_repeated_more_than_max_copies():
    labels = ["a"] * 10 + ["b"]
    copies = balancing_copies(labels, 3)
    assert shown(labels, copies) == {"a": 3, "b": 3}
    assert copies == [1, 1, 1] + [0] * 7 + [3]  # the least confident give way


def test_max_copies_of_one_drops_instead_of_repeating():
    assert balancing_copies(["a", "a", "a", "b"], 1) == [1, 0, 0, 1]


def test_a_label_that_never_occurs_does_not_empty_the_others():
    # Labels a, b and c, of which c was never annotated.
    assert balancing_copies(["a", "b", "a", "b"], 8) == [1, 1, 1, 1]
    assert balancing_copies(["a", "a", "a"], 8) == [1, 1, 1]
    assert balancing_copies([], 8) == []


def test_equal_labels_are_not_all_dropped():
    # In the reference the reason "random chosen" compares labels instead of rows, so it is always true.
    assert balancing_copies(["a"] * 5, 1) == [1] * 5


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(1, 9))
def test_balancing_makes_all_counts_equal_within_max_copies(labels: list[str], max_copies: int):
    copies = balancing_copies(labels, max_copies)
    counts = shown(labels, copies)
    assert set(counts) == set(labels)
    assert len(set(counts.values())) == 1
    assert max(copies) <= max_copies
    for label in set(labels):  # an earlier row is shown no less than a later one
        own = [count for other, count in zip(labels, copies, strict=True) if other == label]
        assert own == sorted(own, reverse=True)
        assert max(own) - min(own) <= 1


def test_labels_come_in_turn_as_long_as_they_last() -> None:
    assert in_turns(["a", "a", "b", "a", "c", "b"]) == [0, 2, 4, 1, 5, 3]
    assert in_turns(["", "", ""]) == [0, 1, 2]
    assert in_turns([]) == []


@pytest.mark.parametrize(
    ("n_made", "n_real", "p", "kappa", "left_out"),
    [
        (160, 160, 1e-9, 0.5, None),
        (160, 160, 1e-9, None, None),
        (160, 160, 1e-9, 0.1, Source.GIVEN),
        (160, 160, 0.9, 0.1, Source.GIVEN),  # what is made is what there was before
        (0, 160, 1.0, 0.1, None),  # nothing else is there
        (160, 160, 0.2, 0.5, Source.MADE),
        (160, 79, 0.2, 0.5, None),  # too few real ones
        (160, 0, 0.2, None, None),
    ],
)
def test_a_source_is_left_out_where_the_student_cannot_tell_its_labels(
    n_made: int, n_real: int, p: float, kappa: float | None, left_out: Source | None
) -> None:
    assert source_to_leave_out(n_made, n_real, 160, p, kappa) == left_out
