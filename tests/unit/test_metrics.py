"""Exact Match and ROUGE-L, by hand; intervals, by their formulas and their odds."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.errors import InputError
from sg_local.selfguide.metrics import (
    check_labels,
    exact_match,
    interval,
    interval_over_tasks,
    is_label,
    label_counts,
    label_distance,
    normalize,
    paired_difference,
    paired_test,
    rouge_l,
    verdict,
    words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Support. ", "support"),
        ("It's a \n\t test!", "its a test"),
        ("well-known", "wellknown"),
        ("支持。", "支持"),
        ("«Да», конечно…", "да конечно"),
        ("نعم؟", "نعم"),
        ("हाँ।", "हाँ"),
        ("¿Sí?", "sí"),
        ("5 €", "5 €"),  # a currency is no punctuation
        ("+", "+"),
        (" :-) ", ":-)"),
        ("", ""),
    ],
)
def test_normalize(text: str, expected: str):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Support.", "support", 1.0),
        ("support", "undermine", 0.0),
        ("", "support", 0.0),
        ("support because", "support", 0.0),
        ("ПОДДЕРЖИВАЕТ!", "поддерживает", 1.0),
        ("cafe\u0301", "caf\u00e9", 1.0),  # the same letter, written in two ways
        ("+", "-", 0.0),
        ("", "-", 0.0),
    ],
)
def test_exact_match(prediction: str, reference: str, expected: float):
    assert exact_match(prediction, reference) == expected


def test_a_label_inside_a_word_is_no_match():
    # The reference takes the last label that is a substring: "neutrally entailing" scores as neutral.
    assert exact_match("neutrally entailing", "neutral") == 0.0
    assert not is_label("neutrally entailing", ["neutral", "entails"])


def test_a_sentence_about_a_label_is_not_the_label():
    # The reference means to map "It entails." to "entails", and its mapping is lost. Here nothing is mapped: labels
    # are scored, not sampled, and an answer that goes on is counted as no label.
    labels = ["entails", "neutral"]
    assert is_label("Entails.", labels)
    assert not is_label("It entails.", labels)


def test_labels_are_the_tasks_and_not_those_of_the_test_answers():
    assert not is_label("contradicts", ["entails", "neutral"])
    assert is_label("contradicts", ["entails", "neutral", "contradicts"])


def test_no_answer_is_never_a_label():
    assert not is_label("", ["+", "-"])
    assert not is_label(" . ", ["+", "-"])
    assert is_label(" + ", ["+", "-"])


def test_labels_that_scoring_cannot_tell_apart_are_refused_all_at_once():
    check_labels(["yes", "no", "+", "-", "++"])
    check_labels([])
    with pytest.raises(InputError) as caught:
        check_labels(["C", "Java", "C++", "C#", "java."])
    lines = str(caught.value).splitlines()
    assert [line.split(" are ")[0] for line in lines] == [
        "labels 'C' and 'C++'",
        "labels 'C' and 'C#'",
        "labels 'Java' and 'java.'",
        "labels 'C++' and 'C#'",
    ]
    assert all("rename one" in line for line in lines)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("how many chapters", "how many chapters are there", 2 * 3 / (3 + 5)),
        ("how many chapters are there", "how many chapters", 2 * 3 / (3 + 5)),
        ("the cat sat on the mat", "the cat lay on the mat", 2 * 5 / 12),
        ("mat the on sat cat the", "the cat sat on the mat", 2 * 3 / 12),  # in order: the, on, the
        ("The CAT.", "the cat", 1.0),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, expected: float):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_rouge_l_compares_words_and_not_characters():
    # The reference's LCS runs over characters: 2/3 for these two words.
    assert rouge_l("acb", "abc") == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Моя посылка пришла", "моя посылка не пришла", 2 * 3 / 7),
        ("我喜欢猫", "我喜欢狗。", 3 / 4),  # four characters each
        ("猫が好き", "犬が好き", 3 / 4),
        ("मैं घर जाता हूँ", "मैं घर जाती हूँ", 3 / 4),  # जाता and जाती differ in a vowel sign
        ("나는 집에 간다", "나는 집에 왔다", 2 / 3),
        ("café crème", "cafe crème", 1 / 2),
        ("GPT-4 很好", "GPT-4 不好", 2 * 3 / 8),  # gpt, 4, and two characters
        ("😀👍", "😀👎", 1 / 2),
        ("😀", "😀", 1.0),
        ("+", "+", 1.0),  # no words at all: Exact Match
        ("+", "-", 0.0),
    ],
)
def test_rouge_l_in_other_scripts(prediction: str, reference: str, expected: float):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_words_keep_marks_with_their_letters():
    assert words("Ist's FERTIG? naïve e\u0301te\u0301_1") == ["ist", "s", "fertig", "naïve", "été", "1"]
    assert words("ที่บ้าน") == ["ที่", "บ้", "า", "น"]
    assert words("東京タワー2号") == ["東", "京", "タ", "ワ", "ー", "2", "号"]


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_english_scores_are_those_of_rouge_score(prediction: str, reference: str):
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    assert words(reference) == DefaultTokenizer(use_stemmer=False).tokenize(reference)
    if words(prediction) or words(reference):
        theirs = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
        assert rouge_l(prediction, reference) == theirs


def wilson(successes: int, n: int) -> tuple[float, float]:
    z, p = 1.959964, successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@pytest.mark.parametrize(("successes", "n"), [(8, 10), (0, 10), (10, 10), (150, 300), (1, 1)])
def test_interval_of_right_and_wrong_is_wilsons(successes: int, n: int):
    scores = [1.0] * successes + [0.0] * (n - successes)
    assert interval(scores) == pytest.approx(wilson(successes, n), abs=1e-6)


def test_interval_of_other_scores_is_about_two_standard_errors():
    rng = random.Random(0)
    scores = [rng.random() for _ in range(300)]
    mean = sum(scores) / 300
    error = math.sqrt(sum((score - mean) ** 2 for score in scores) / 300 / 300)
    low, high = interval(scores)
    # 10,000 resamples place a 2.5 % quantile within 0.03 standard errors; 0.15 is five times that.
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    assert interval(scores) == (low, high)


def test_interval_of_equal_scores_is_a_point():
    assert interval([0.25] * 50) == (0.25, 0.25)


def test_paired_difference():
    before = [0.0, 1.0] * 100
    mean, low, high = paired_difference([1.0] * 150 + [0.0] * 50, before)
    assert mean == pytest.approx(0.25)
    assert 0.1 < low < 0.25 < high < 0.4
    assert paired_difference(before, before) == (0, 0, 0)
    swapped = paired_difference(before, [1.0] * 150 + [0.0] * 50)
    assert swapped[0] == pytest.approx(-0.25)
    assert swapped[2] < 0


def test_pairs_make_the_interval_narrower():
    # Rows that differ much, and a gain of 0.1 on nearly every one: the means' own intervals overlap.
    rng = random.Random(1)
    before = [rng.random() * 0.8 for _ in range(60)]
    after = [value + 0.1 + rng.gauss(0, 0.02) for value in before]
    assert interval(after)[0] < interval(before)[1]
    assert paired_difference(after, before)[1] > 0.08


def test_paired_difference_needs_the_same_rows():
    with pytest.raises(ValueError, match="longer"):
        paired_difference([1.0], [1.0, 0.0])


LABELS = ["yes", "no", "maybe"]


def test_what_is_counted_for_a_label():
    answers = ["Refund.", "refund", "login", "I think login", "refund"]
    references = ["refund", "login", "login", "login", "REFUND"]
    assert label_counts(answers, references, ["refund", "login", "invoice"]) == {
        "refund": {"rows": 2, "given": 3, "right": 2},
        "login": {"rows": 3, "given": 1, "right": 1},
    }


@pytest.mark.parametrize(
    ("answers", "references", "expected"),
    [
        (["yes", "no"], ["no", "yes"], 0.0),  # the distribution, not the answers
        (["yes", "yes"], ["yes", "no"], 0.5),
        (["Yes.", " NO "], ["yes", "no"], 0.0),  # as Exact Match sees them
        (["I think yes", ""], ["yes", "no"], 1.0),
        (["yes", "I think no", "maybe", "maybe"], ["yes", "no", "maybe", "maybe"], 0.25),
    ],
)
def test_label_distance(answers: list[str], references: list[str], expected: float):
    assert label_distance(answers, references, LABELS) == pytest.approx(expected)


ANSWERS = st.lists(st.sampled_from([*LABELS, "neither", ""]), min_size=1)


@given(ANSWERS, st.lists(st.sampled_from(LABELS), min_size=1))
def test_label_distance_is_a_distance_between_shares(answers: list[str], references: list[str]):
    found = label_distance(answers, references, LABELS)
    assert 0 <= found <= 1 + 1e-9
    assert found == pytest.approx(label_distance(references, answers, LABELS))
    assert found == pytest.approx(label_distance(answers * 3, references[::-1], LABELS))
    assert label_distance(answers, answers, LABELS) == 0


def scores(right: int, wrong: int, same: int = 0) -> tuple[list[float], list[float]]:
    """Scores after and before where so many rows became right, became wrong, and stayed."""
    after = [1.0] * right + [0.0] * wrong + [1.0] * same
    return after, [0.0] * right + [1.0] * wrong + [1.0] * same


@pytest.mark.parametrize(
    ("right", "wrong", "p"),
    [
        (5, 0, 2 / 2**5),
        (6, 0, 2 / 2**6),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (3, 3, 1.0),
        (0, 0, 1.0),
        # Agresti, Categorical Data Analysis (2002), table 10.1: approval of a prime minister, asked twice
        (86, 150, 3.7e-5),
    ],
)
def test_paired_test_of_right_and_wrong_is_mcnemars_exact_one(right: int, wrong: int, p: float):
    assert paired_test(*scores(right, wrong)) == pytest.approx(p, rel=0.01)
    assert paired_test(*scores(wrong, right, same=500)) == pytest.approx(p, rel=0.01)


def test_paired_test_of_other_scores_is_the_same_test_by_simulation():
    # Halved scores are no longer 0 or 1, and the test does not depend on scale.
    for right, wrong in ((8, 2), (20, 12), (5, 0)):
        after, before = scores(right, wrong)
        simulated = paired_test([value / 2 for value in after], [value / 2 for value in before])
        # 10,000 draws: a standard error of at most 0.005; 0.025 is five of them.
        assert simulated == pytest.approx(paired_test(after, before), abs=0.025)


def test_paired_test_finds_a_small_steady_gain_and_not_a_large_unsteady_one():
    rng = random.Random(2)
    before = [rng.random() for _ in range(100)]
    assert paired_test([value + 0.05 + rng.gauss(0, 0.05) for value in before], before) < 0.001
    assert paired_test([value + rng.gauss(0, 1) for value in before], before) > 0.01
    after = [value + rng.gauss(0.03, 0.2) for value in before]
    assert paired_test(after, before) == paired_test(after, before)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20))
def test_paired_test_does_not_care_which_comes_first(pairs: list[tuple[float, float]]):
    after, before = zip(*pairs, strict=True)
    p = paired_test(after, before)
    assert 0 < p <= 1
    assert p == paired_test(before, after)


def test_the_test_decides_where_the_interval_is_too_narrow():
    after, before = scores(5, 0, same=295)
    mean, low, _ = paired_difference(after, before)
    assert low > 0
    assert verdict(paired_test(after, before), mean) == "no difference shown"
    after, before = scores(6, 0, same=294)
    assert verdict(paired_test(after, before), mean) == "better"
    assert verdict(paired_test(before, after), -mean) == "worse"


def test_interval_over_tasks_is_students():
    assert interval_over_tasks([0.4]) is None
    assert interval_over_tasks([0.3, 0.3]) == pytest.approx((0.3, 0.3))
    # Student's own data (1908): extra hours of sleep by one drug; mean 0.75, t(9) = 2.262, s = 1.789
    hours = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    assert interval_over_tasks(hours) == pytest.approx((0.75 - 1.28, 0.75 + 1.28), abs=0.005)
