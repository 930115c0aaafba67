"""Why a made input or answer is dropped: pure functions from a text to a DropReason.

    task = load_task("support-inbox"); rules = rules_of(task)
    text_fault("Sure, I'd be happy to help! Here is an input", rules.noise, None)   -> "noise"
    text_fault("Where is my parcel? It was due on Monday.", rules.noise, rules.input_characters)  -> None
    form_fault("Sports, sports, sports", rules.input_form)                          -> "repetition"
    overlap_fault("fire is hot", "Fact: fire is hot.", rules.overlap)               -> "copy"
    of_shape(['{"n": 1}', "one"], shape_of(['{"n": 5}']))                           -> ['{"n": 1}']
    Pool(task.examples, 0.7).fault("I can't sign in, it tells me that my password is wrong.")  -> "near_duplicate"

Sources: SELF-GUIDE section 3.3 (noise and length filters) and its reference code; the near-duplicate rule is
Self-Instruct's (arXiv 2212.10560: ROUGE-L under 0.7 to the pool). The filters for form and overlap apply the idea of
the length filter to marks, repeated words and copies: a text that departs from all examples is no example of the task.
No function here changes its arguments.
"""

import re
import statistics
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from rapidfuzz.distance import LCSseq

from sg_local.selfguide.exact_answers import Shape, fits, shape_of
from sg_local.selfguide.metrics import is_label, rouge_l, words
from sg_local.selfguide.rows import DropReason
from sg_local.settings import Settings
from sg_local.task import Example, Task

# SELF-GUIDE's noise words, and more of the same kind. Lower case.
NOISE = (
    "sure, i'd be happy to help",
    "sure, here",
    "i'd be happy to",
    "of course!",
    "here is an example",
    "here's an example",
    "as an ai",
    "i'm sorry, but",
    "input",
    "output",
    "\n\n",
    "\\_\\_",
    "therefore",
    # A model that continues the conversation writes these: turns of Vicuna's format, and the request for an input.
    "user:",
    "assistant:",
    "write a new example",
)
# If the examples have 3 characters ("Tom"), an answer may still have 20.
LENGTH_SLACK_CHARACTERS = 20
# What gives a text its parts: "Premise: ... Hypothesis: ...", "name[Aromi], food[English]", "_She_ was", questions.
MARKS = ":?[]()|_=\n"
# The least share of distinct words, relative to the lowest of the examples: "medical device medical" has 2 of 3.
DISTINCT_SLACK = 0.75


@dataclass(frozen=True)
class Form:
    """What a text needs to look like the examples: their marks, at most twice as many, and distinct words."""

    marks: tuple[tuple[str, int, int], ...]  # ("?", 1, 4): at least one, at most four
    distinct_words: float  # least share of distinct words among all words, 0..1


@dataclass(frozen=True)
class Overlap:
    """How much of the examples' answers is taken from their inputs, 0..1."""

    taken_words: float  # least share of an answer's words that stand in the input
    copied_rouge_l: float  # largest ROUGE-L of an answer with its input


@dataclass(frozen=True)
class Rules:
    """What the examples allow: noise words of this task, lengths in characters, form, overlap, shape of JSON."""

    noise: tuple[str, ...]
    input_characters: tuple[float, float]
    output_characters: tuple[float, float]
    input_form: Form
    output_form: Form
    overlap: Overlap
    output_shape: Shape | None  # of the examples' JSON; None where their outputs are no JSON of one shape
    answers_without_words: bool  # an example's output has no letter and no digit, such as []


def rules_of(task: Task) -> Rules:
    """The bounds of the filters for a task. A noise word in an example or a label is part of the task, and allowed."""
    inputs = [example.input for example in task.examples]
    outputs = [example.output for example in task.examples]
    known = [_plain(text) for text in (*inputs, *outputs, *task.labels)]
    return Rules(
        tuple(word for word in NOISE if not any(_pattern(word).search(text) for text in known)),
        length_bounds(inputs),
        length_bounds(outputs),
        form_of(inputs),
        form_of(outputs),
        overlap_of(task.examples),
        shape_of(outputs),
        not all(map(_has_words, outputs)),
    )


def length_bounds(texts: Sequence[str]) -> tuple[float, float]:
    """Least and most characters: mean ± 2 standard deviations of at least one example.

    Three texts of about equal length have a deviation near zero, which would drop almost everything. So the bounds
    are at least as wide as half to twice the mean, and as the mean ± LENGTH_SLACK_CHARACTERS.
    """
    lengths = [len(text) for text in texts]
    mean, deviation = statistics.fmean(lengths), statistics.pstdev(lengths)
    return (
        min(mean - 2 * deviation, mean / 2, mean - LENGTH_SLACK_CHARACTERS),
        max(mean + 2 * deviation, mean * 2, mean + LENGTH_SLACK_CHARACTERS),
    )


def text_fault(
    text: str, noise: Iterable[str], characters: tuple[float, float] | None, *, needs_words: bool = True
) -> DropReason | None:
    """The reason to drop a made text: EMPTY, NOISE or LENGTH; None for a good one.

    Text without a letter, a digit or an emoji is empty, unless it needs none. A noise word counts only as a whole word:
    "Output: 4" is noise, "throughput" and "inputs" are not.
    """
    if not (_has_words(text) if needs_words else text.strip()):
        return DropReason.EMPTY
    plain = _plain(text)
    if any(_pattern(word).search(plain) for word in noise):
        return DropReason.NOISE
    if characters and not characters[0] <= len(text) <= characters[1]:
        return DropReason.LENGTH
    return None


def _has_words(text: str) -> bool:
    return any(character.isalnum() or unicodedata.category(character) == "So" for character in text)


def form_of(texts: Sequence[str]) -> Form:
    """The form that the texts of the examples share. A single text defines no marks, for other texts may lack them."""
    marks = []
    for mark in MARKS:
        counts = [text.strip().count(mark) for text in texts]
        if len(texts) > 1 and min(counts) > 0:
            marks.append((mark, min(counts), 2 * max(counts)))
    return Form(tuple(marks), DISTINCT_SLACK * min(map(_distinct_share, texts)))


def overlap_of(examples: Sequence[Example]) -> Overlap:
    """Least words taken: half the least of the examples. Most ROUGE-L: half-way from the highest of them to a copy."""
    taken = min(_taken_share(example.output, example.input) for example in examples)
    copied = max(rouge_l(example.output, example.input) for example in examples)
    return Overlap(taken / 2, (1 + copied) / 2)


def form_fault(text: str, form: Form) -> DropReason | None:
    """The reason to drop a made text: MARKS or REPETITION; None for a text with the examples' form."""
    plain = text.strip()
    if any(not least <= plain.count(mark) <= most for mark, least, most in form.marks):
        return DropReason.MARKS
    return DropReason.REPETITION if _distinct_share(text) < form.distinct_words else None


def overlap_fault(answer: str, text: str, overlap: Overlap) -> DropReason | None:
    """The reason to drop a made answer: COPY of its input, or UNRELATED to it; None for a good answer."""
    if overlap.copied_rouge_l < 1 and rouge_l(answer, text) > overlap.copied_rouge_l:
        return DropReason.COPY
    return DropReason.UNRELATED if _taken_share(answer, text) < overlap.taken_words else None


def _distinct_share(text: str) -> float:
    text_words = words(text)
    return len(set(text_words)) / len(text_words) if text_words else 1.0


def _taken_share(answer: str, text: str) -> float:
    """Share of the answer's words that stand in the input."""
    answer_words, input_words = words(answer), set(words(text))
    return sum(word in input_words for word in answer_words) / len(answer_words) if answer_words else 1.0


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")  # models write both apostrophes


@cache
def _pattern(word: str) -> re.Pattern[str]:
    """Finds a noise word that is not part of a longer word."""
    before = r"\b" if word[0].isalnum() else ""
    after = r"\b" if word[-1].isalnum() else ""
    return re.compile(before + re.escape(word) + after)


class Pool:
    """The examples' inputs and the made inputs so far, to find duplicates."""

    def __init__(self, examples: Sequence[Example], near_rouge_l: float) -> None:
        """near_rouge_l: the ROUGE-L F-measure from which an input is a near-duplicate; 1: no input is."""
        self._near = near_rouge_l
        self._exact: set[str] = set()
        self._words: list[list[str]] = []
        for example in examples:
            self.add(example.input)

    def add(self, text: str) -> None:
        """Adds a kept input."""
        self._exact.add(_collapsed(text))
        self._words.append(words(text))

    def fault(self, text: str) -> DropReason | None:
        """DUPLICATE (apart from case and white space), NEAR_DUPLICATE, or None for an input unlike the others."""
        if _collapsed(text) in self._exact:
            return DropReason.DUPLICATE
        text_words = words(text)
        if text_words and self._near < 1 and any(self._is_near(text_words, other) for other in self._words):
            return DropReason.NEAR_DUPLICATE
        return None

    def _is_near(self, one: list[str], other: list[str]) -> bool:
        needed = self._near * (len(one) + len(other))  # ROUGE-L F is 2 LCS / (n + m)
        # The LCS is no longer than the shorter text, which decides most pairs.
        return 2 * min(len(one), len(other)) >= needed and 2 * LCSseq.similarity(one, other) >= needed


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


def input_fault(
    settings: Settings, rules: Rules, labels: Sequence[str], pool: Pool, text: str, *, needs_form: bool
) -> DropReason | None:
    """The reason to drop a made input; None if the examples allow it and it is unlike all inputs of the pool."""
    return (
        text_fault(text, rules.noise, rules.input_characters if settings.length_filter else None)
        or (form_fault(text, rules.input_form) if needs_form else None)
        or (DropReason.LABEL if is_label(text, labels) else None)
        or pool.fault(text)
    )


def answer_fault(settings: Settings, rules: Rules, text: str, answer: str) -> DropReason | None:
    """The reason to drop a free answer to an input; None if the examples allow it."""
    fault = text_fault(
        answer,
        rules.noise,
        rules.output_characters if settings.length_filter else None,
        needs_words=not rules.answers_without_words,
    )
    if fault is None and settings.form_filter:
        if rules.output_shape and not fits(rules.output_shape, answer):
            return DropReason.SHAPE
        return form_fault(answer, rules.output_form) or overlap_fault(answer, text, rules.overlap)
    return fault


def of_shape(answers: Sequence[str], shape: Shape | None) -> list[str]:
    """The answers of the examples' shape; all where none has it, or where the examples have no common shape."""
    return [answer for answer in answers if shape and fits(shape, answer)] or list(answers)
