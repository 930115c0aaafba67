"""Exact Match and ROUGE-L, by hand; what is counted of labels."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.errors import InputError
from sg_local.selfguide.metrics import (
    METRICS,
    Metric,
    check_labels,
    exact_match,
    is_label,
    label_counts,
    label_distance,
    metric_of,
    metrics_for,
    normalize,
    rouge_l,
    words,
)
from sg_local.task import Example, Task


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


def test_the_metric_follows_from_the_labels():
    free = Task("polite", "Say it politely.", (Example("Tea!", "Could I have some tea?"),))
    assert metric_of(free) == Metric.ROUGE_L == METRICS["rouge_l"]
    assert metric_of(replace(free, labels=("tea", "coffee"))) == Metric.EXACT_MATCH == METRICS["exact_match"]


@pytest.mark.parametrize(
    ("outputs", "metric"),
    [
        (['{"n": 1}', '{"n": 2.5}'], Metric.FIELDS_RIGHT),
        (['{"n": 1, "item": "cups"}', '{"item":"pens","n":2}'], Metric.FIELDS_RIGHT),
        (['["cups"]', "[]"], Metric.FIELDS_RIGHT),
        (["{}"], Metric.FIELDS_RIGHT),
        (['{"n": 1}', "none"], Metric.ROUGE_L),
        (['{"n": 1}', '{"m": 1}'], Metric.ROUGE_L),
        (["1", "2"], Metric.ROUGE_L),
        ([], Metric.ROUGE_L),  # they are yet to be chosen
    ],
)
def test_where_all_examples_are_json_of_one_shape_the_share_of_fields_right_judges(outputs, metric):
    asked = Task("order", "Write it as JSON.", tuple(Example("ten pens", output) for output in outputs))
    assert metric_of(asked) == metric
    assert metric_of(replace(asked, labels=('{"n": 1}', '{"n": 2}'))) == Metric.EXACT_MATCH


def test_fields_are_compared_where_every_right_output_is_json():
    assert metrics_for(['{"n": 1}', "[]"]) == list(Metric)
    assert metrics_for(['{"n": 1}', "one"]) == metrics_for(["1"]) == [Metric.EXACT_MATCH, Metric.ROUGE_L]
    # What judges a task scores all of its rows.
    assert metrics_for(["none"], Metric.FIELDS_RIGHT) == list(Metric)
    assert metrics_for(["none"], Metric.ROUGE_L) == [Metric.EXACT_MATCH, Metric.ROUGE_L]


def test_a_metric_says_how_it_scores():
    for metric in Metric:
        same, another = ('["the same"]', '["another"]') if metric.needs_json else ("the same", "another")
        assert metric.score(same, same) == 1
        assert metric.score(same, another) == 0
        assert metric.heading
    assert json.dumps({Metric.ROUGE_L: Metric.EXACT_MATCH}) == '{"rouge_l": "exact_match"}'
