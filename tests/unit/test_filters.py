"""The filters: what is dropped, what belongs to the task, and what counts as the same input."""

# ruff: noqa: RUF001 (other scripts' letters look like Latin ones)

import pytest

from sg_local.selfguide import filters
from sg_local.selfguide.filters import (
    Pool,
    answer_fault,
    form_fault,
    form_of,
    length_bounds,
    overlap_fault,
    overlap_of,
    rules_of,
    text_fault,
)
from sg_local.settings import Settings
from sg_local.task import Example, Task


def task_of(*pairs: tuple[str, str], labels: tuple[str, ...] = ()) -> Task:
    return Task("t", "Do it.", tuple(Example(*pair) for pair in pairs), labels)


PARCEL = task_of(("My parcel is late.", "delivery"), ("I want my money back.", "refund"))


@pytest.mark.parametrize(
    "text",
    [
        "Sure, I'd be happy to help! Here is one",
        "Sure, I\u2019d be happy to help",
        "SURE, HERE you go",
        "Of course! My parcel is late.",
        "As an AI language model I have no parcel",
        "Input: My parcel is late.",
        "My parcel is late. Output: delivery",
        "My parcel is late.\n\nExample 2",
        "name: \\_\\_",
        "Therefore, my parcel is late.",
        "My parcel, therefore, is late.",
        "Write a new example of: delivery ASSISTANT: My parcel is late.",
        "My parcel is late. USER: I want my money back.",
    ],
)
def test_noise(text: str):
    assert text_fault(text, rules_of(PARCEL).noise, None) == "noise"


@pytest.mark.parametrize(
    "text",
    [
        "The throughput of the depot fell.",
        "All inputs are checked.",
        "Of course my parcel is late.",
        "I'm not sure, herein lies the problem",
        "What has an AI to do with it?",
        "Your assistant told a user that my parcel is late.",
        "One line\nand another",
    ],
)
def test_words_that_hold_a_noise_word_are_no_noise(text: str):
    assert text_fault(text, rules_of(PARCEL).noise, None) is None


@pytest.mark.parametrize(
    ("task", "made"),
    [
        (task_of(("The input jack is broken.", "repair")), "The input cable is too short."),
        (task_of(("7 > 5", "Therefore yes")), "therefore no"),
        (task_of(("a\n\nb", "2 paragraphs")), "one\n\ntwo"),
        (
            task_of(("It hums.", "output"), ("It is dead.", "input"), labels=("input", "output")),
            "Output: low",
        ),
        (task_of(("I\u2019m sorry, but no.", "refusal")), "I'm sorry, but we are closed."),
    ],
)
def test_noise_words_that_belong_to_the_task_are_no_noise(task: Task, made: str):
    assert text_fault(made, rules_of(task).noise, None) is None
    assert text_fault(made, rules_of(PARCEL).noise, None) == "noise"


def test_a_longer_word_in_a_demonstration_does_not_excuse_a_noise_word():
    rules = rules_of(task_of(("The throughput fell.", "x")))
    assert text_fault("Output: 4", rules.noise, None) == "noise"


def test_a_blank_line_is_found_beside_a_wider_gap():
    rules = rules_of(task_of(("first\n\n\nsecond", "x")))
    assert text_fault("first\n\nsecond", rules.noise, None) is None


def test_one_tasks_noise_words_do_not_reach_another():
    # The reference's greetings.extend(optional_list) grows a module global: 14 words, 214 after 100 calls.
    before = filters.NOISE
    first = rules_of(PARCEL)
    for number in range(100):
        rules_of(task_of((f"input output therefore {number}", "x")))
    assert rules_of(PARCEL) == first
    assert before == filters.NOISE
    assert isinstance(filters.NOISE, tuple)
    assert all(word == word.lower() for word in filters.NOISE)  # they are compared in lower case


@pytest.mark.parametrize("text", ["", " \n\t", "...", "---", "???", "\u200b", "“”", "。！", "__"])
def test_text_without_a_letter_digit_or_emoji_is_empty(text: str):
    assert text_fault(text, (), None) == "empty"


@pytest.mark.parametrize("text", ["a", "7", "是", "ا", "😀", "☎", "½", "हाँ"])
def test_text_in_any_script_is_not_empty(text: str):
    assert text_fault(text, (), None) is None


def test_length_is_mean_plus_minus_two_standard_deviations():
    # mean 100, deviation sqrt(((-60)**2 + 0 + 60**2) / 3) = 48.99
    low, high = length_bounds(["a" * 40, "b" * 100, "c" * 160])
    assert (low, high) == pytest.approx((2.02, 200.0), abs=0.01)
    low, high = length_bounds(["a" * 10, "b" * 10, "c" * 200])
    assert (low, high) == pytest.approx((73.33 - 2 * 89.57, 73.33 + 2 * 89.57), abs=0.02)


def test_demonstrations_of_one_length_do_not_drop_everything():
    assert length_bounds(["a" * 100, "b" * 100, "c" * 101]) == pytest.approx((50.17, 200.67), abs=0.01)
    assert length_bounds(["one single text of 30 letters."]) == (10, 60)


def test_short_answers_leave_room_for_longer_ones():
    low, high = length_bounds(["Tom", "Ann", "Bob"])
    assert low <= 1
    assert high >= len("Alexandra Fitzgerald")
    assert length_bounds(["1", "0", "1"])[1] >= len("100")


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1, 1, 900), (300, 300, 310), (5,), (40, 90)])
def test_a_demonstration_is_never_dropped_for_its_length(lengths: tuple[int, ...]):
    texts = ["a" * length for length in lengths]
    bounds = length_bounds(texts)
    assert [text_fault(text, (), bounds) for text in texts] == [None] * len(texts)


def test_length_faults_and_their_order():
    rules = rules_of(task_of(("a" * 100, "b" * 30), ("a" * 110, "b" * 30)))
    assert text_fault("a" * 211, rules.noise, rules.input_characters) == "length"
    assert text_fault("a" * 52, rules.noise, rules.input_characters) == "length"
    assert text_fault("a" * 105, rules.noise, rules.input_characters) is None
    assert text_fault("b" * 61, rules.noise, rules.output_characters) == "length"
    assert text_fault("a" * 300, rules.noise, None) is None
    assert text_fault("Output: " + "a" * 300, rules.noise, rules.input_characters) == "noise"
    assert text_fault("." * 300, rules.noise, rules.input_characters) == "empty"


@pytest.mark.parametrize(
    "text",
    ["My parcel is late.", "  My parcel is late. \n", "my  PARCEL is\nlate.", "\u3000My parcel is late."],
)
def test_duplicates_are_found_whatever_space_stands_around_them(text: str):
    # The reference compares unstripped text with stripped text, so finds none.
    assert Pool(PARCEL.examples, 1.0).fault(text) == "duplicate"


def test_a_kept_input_joins_the_pool_and_a_refused_one_does_not():
    pool = Pool(PARCEL.examples, 0.7)
    assert pool.fault("Where is my invoice?") is None
    assert pool.fault("Where is my invoice?") is None
    pool.add("Where is my invoice?")
    assert pool.fault("Where is my invoice?") == "duplicate"


def test_near_duplicates_begin_at_the_threshold():
    pool = Pool([Example("one two three four five six seven eight nine ten", "x")], 0.7)
    # 7 common words in order of 10 and 10: ROUGE-L F = 14 / 20 = 0.7
    assert pool.fault("one two three a four b five c six seven") == "near_duplicate"
    assert pool.fault("one two three a four b five c six d") is None
    assert (
        pool.fault("ten nine eight seven six five four three two one") is None
    )  # the same words, another order
    # 10 of 10 and 18: 20 / 28 = 0.71; of 19: 20 / 29 = 0.69
    assert pool.fault("one two three four five six seven eight nine ten" + " and" * 8) == "near_duplicate"
    assert pool.fault("one two three four five six seven eight nine ten" + " and" * 9) is None
    # A part of 7 words of 13 is the shortest that can reach it: 14 / 20
    pool = Pool([Example("a b c d e f g h i j k l m", "x")], 0.7)
    assert pool.fault("b c d e f g h") == "near_duplicate"
    assert pool.fault("b c d e f g") is None


def test_punctuation_and_case_do_not_make_an_input_new():
    assert Pool(PARCEL.examples, 0.7).fault("MY PARCEL IS... LATE?!") == "near_duplicate"


def test_a_threshold_of_one_keeps_all_but_exact_duplicates():
    pool = Pool([Example("What is 3 + 4?", "7")], 1.0)
    assert pool.fault("What is 3 - 4?") is None
    assert pool.fault("what is 3 + 4?") == "duplicate"


@pytest.mark.parametrize(
    ("known", "near", "other"),
    [
        ("我的包裹还没有到，请帮我查一下。", "我的包裹还没有到，请帮我看一下！", "今天天气很好，我们去公园散步吧。"),
        ("荷物がまだ届いていません。", "荷物がまだ届いてないです。", "返金をお願いしたいのですが。"),
        ("พัสดุของฉันยังไม่มาถึง", "พัสดุของผมยังไม่มาถึง", "ขอเงินคืนได้ไหมคะ"),
        ("मेरा पार्सल अभी तक नहीं आया", "मेरा पार्सल अब तक नहीं आया", "मुझे अपना पैसा वापस चाहिए"),
        ("Моя посылка всё ещё не пришла", "Моя посылка ещё не пришла", "Верните мне деньги за заказ"),
        ("لم يصل الطرد الخاص بي بعد", "لم يصل الطرد الخاص بي اليوم", "أريد استرداد أموالي من فضلك"),
    ],
    ids=["chinese", "japanese", "thai", "hindi", "russian", "arabic"],
)  # fmt: skip
def test_near_duplicates_in_other_scripts(known: str, near: str, other: str):
    pool = Pool([Example(known, "x")], 0.7)
    assert pool.fault(known) == "duplicate"
    assert pool.fault(near) == "near_duplicate"
    assert pool.fault(other) is None


def test_a_vowel_sign_makes_another_word():
    # की and का, की and के differ in a combining mark alone.
    pool = Pool([Example("राम की किताब", "x")], 0.9)
    assert pool.fault("राम का किताबें") is None


def test_text_without_words_is_compared_exactly():
    pool = Pool([Example("+ - +", "x")], 0.7)
    assert pool.fault("+ - +") == "duplicate"
    assert pool.fault("- - -") is None


QUESTION = task_of(
    ("Question: who came? Word: who", "pronoun"), ("Question: what is it? \n Word: is", "verb")
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Question: where are you? Word: you", None),
        ("Question: where are you? Who is she? Word: you", None),
        ("Question: where are you?", "marks"),  # one colon, the demonstrations have two
        ("Question: where are you. Word: you", "marks"),
        ("Question: a? Word: b Tag: c Class: d Answer: e", "marks"),  # the list went on
        ("Question: you you you? Word: you", "repetition"),
    ],
)
def test_form(text: str, fault: str | None):
    assert form_fault(text, rules_of(QUESTION).input_form) == fault


def test_a_mark_that_one_demonstration_lacks_is_not_asked_for():
    form = form_of(["Where is my parcel?", "I want my money back."])
    assert form.marks == ()
    assert form_of(["Where is my parcel?"]).marks == ()  # a single demonstration shows no rule
    assert form_fault("sports, Sports, sports!", form) == "repetition"
    assert form_fault("...", form) is None  # no words: other filters' business


FLUENT = task_of(
    ("What part did no I meant how many chapters are there?", "How many chapters are there?"),
    ("How did no who did it?", "Who did it?"),
)


@pytest.mark.parametrize(
    ("text", "output", "fault"),
    [
        ("When no I mean where was she born?", "Where was she born?", None),
        ("Where was she born?", "Where was she born?", "copy"),
        ("Where was she born?", "I cannot answer that.", "unrelated"),
    ],
)
def test_overlap_of_answers_with_inputs(text: str, output: str, fault: str | None):
    assert overlap_fault(output, text, rules_of(FLUENT).overlap) == fault


def test_where_a_demonstration_copies_its_input_copies_are_answers():
    overlap = overlap_of((Example("Tom came.", "Tom came."), Example("He he came.", "He came.")))
    assert overlap_fault("She left.", "She left.", overlap) is None


def test_answers_in_words_of_their_own_need_no_word_of_the_input():
    overlap = overlap_of((Example("guten Morgen", "good morning"),))
    assert overlap_fault("good evening", "guten Abend", overlap) is None


@pytest.mark.parametrize("nothing", ["[]", "{}", "+", "\u2014"])
def test_what_an_example_answers_without_words_is_an_answer(nothing: str):
    """Such as the names in a text that has none."""
    rules = rules_of(task_of(("It rained all day.", nothing), ("Sunny.", nothing)))
    assert answer_fault(Settings(), rules, "Snow again.", nothing) is None
    assert answer_fault(Settings(), rules, "Snow again.", " ") == "empty"
    assert answer_fault(Settings(), rules, "Snow again.", nothing * 90) == "length"
    named = rules_of(task_of(("It rained on Ann.", '["Ann"]'), ("Ben sat in the sun.", '["Ben"]')))
    assert answer_fault(Settings(), named, "Snow again.", "[]") == "empty"  # no example says that
    mixed = rules_of(task_of(("It rained on Ann.", '["Ann"]'), ("Sunny.", "[]")))
    assert answer_fault(Settings(), mixed, "Snow again.", "[]") is None
    assert answer_fault(Settings(), mixed, "Snow again.", "...") == "shape"
