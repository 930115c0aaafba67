"""Why a made input or answer is dropped: pure functions from a text to a reason.

    rules = rules_of(task)
    text_fault("Sure, I'd be happy to help! Here is an input", rules.noise, None)   -> "noise"
    text_fault("My parcel is late.", rules.noise, rules.input_characters)           -> None
    Pool(task.examples, 0.7).fault("My parcel is late again.")                      -> "near_duplicate"

Sources: SELF-GUIDE section 3.3 (noise and length filters) and its reference code; the near-duplicate rule is
Self-Instruct's (arXiv 2212.10560: ROUGE-L under 0.7 to the pool). Nothing here changes its arguments.
"""

import re
import statistics
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from rapidfuzz.distance import LCSseq

from sg_local.selfguide.metrics import words
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
)
# Demonstrations of 3 characters ("Tom") do not rule out an answer of 20.
LENGTH_SLACK_CHARACTERS = 20


@dataclass(frozen=True)
class Rules:
    """What the demonstrations allow: the words that are noise in this task, and lengths in characters, from..to."""

    noise: tuple[str, ...]
    input_characters: tuple[float, float]
    output_characters: tuple[float, float]


def rules_of(task: Task) -> Rules:
    """The filters' bounds for a task. A noise word that a demonstration or a label holds belongs to the task."""
    texts = [text for example in task.examples for text in (example.input, example.output)]
    known = [_plain(text) for text in (*texts, *task.labels)]
    return Rules(
        tuple(word for word in NOISE if not any(_pattern(word).search(text) for text in known)),
        length_bounds([example.input for example in task.examples]),
        length_bounds([example.output for example in task.examples]),
    )


def length_bounds(texts: Sequence[str]) -> tuple[float, float]:
    """Characters within mean ± 2 standard deviations of the demonstrations, of which there is at least one.

    Three texts of nearly one length have a deviation near zero, which would drop almost everything: the bounds are
    at least from half the mean to twice the mean, and LENGTH_SLACK_CHARACTERS to either side of it.
    """
    lengths = [len(text) for text in texts]
    mean, deviation = statistics.fmean(lengths), statistics.pstdev(lengths)
    return (
        min(mean - 2 * deviation, mean / 2, mean - LENGTH_SLACK_CHARACTERS),
        max(mean + 2 * deviation, mean * 2, mean + LENGTH_SLACK_CHARACTERS),
    )


def text_fault(text: str, noise: Iterable[str], characters: tuple[float, float] | None) -> str | None:
    """The reason to drop a made text: "empty", "noise" or "length"; None for a good one.

    Text without a letter, a digit or an emoji is empty. A noise word counts where it stands as a word of its own:
    "Output: 4" is noise, "throughput" and "inputs" are not.
    """
    if not any(character.isalnum() or unicodedata.category(character) == "So" for character in text):
        return "empty"
    plain = _plain(text)
    if any(_pattern(word).search(plain) for word in noise):
        return "noise"
    if characters and not characters[0] <= len(text) <= characters[1]:
        return "length"
    return None


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")  # models write either apostrophe


@cache
def _pattern(word: str) -> re.Pattern[str]:
    """Finds a noise word that is not part of a longer word."""
    before = r"\b" if word[0].isalnum() else ""
    after = r"\b" if word[-1].isalnum() else ""
    return re.compile(before + re.escape(word) + after)


class Pool:
    """The inputs that are already there, demonstrations first, for finding duplicates."""

    def __init__(self, examples: Sequence[Example], near_rouge_l: float) -> None:
        """near_rouge_l is the ROUGE-L F-measure from which an input is a near-duplicate; 1 looks for none."""
        self._near = near_rouge_l
        self._exact: set[str] = set()
        self._words: list[list[str]] = []
        for example in examples:
            self.add(example.input)

    def add(self, text: str) -> None:
        """Takes a kept input into the pool."""
        self._exact.add(_collapsed(text))
        self._words.append(words(text))

    def fault(self, text: str) -> str | None:
        """ "duplicate" (but for case and white space), "near_duplicate", or None for an input unlike the others."""
        if _collapsed(text) in self._exact:
            return "duplicate"
        own = words(text)
        if own and self._near < 1 and any(self._is_near(own, other) for other in self._words):
            return "near_duplicate"
        return None

    def _is_near(self, own: list[str], other: list[str]) -> bool:
        needed = self._near * (len(own) + len(other))  # ROUGE-L F is 2 LCS / (n + m)
        # The LCS is at most the shorter of the two, which settles most pairs.
        return 2 * min(len(own), len(other)) >= needed and 2 * LCSseq.similarity(own, other) >= needed


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())
