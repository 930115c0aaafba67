"""How varied texts are, and how long: of made inputs, and of real ones beside them.

    distinct_share(["Pay me.", "Pay now."], 1)      -> 0.75    three words of four are different ones
    nearest_rouge_l(["Pay me now.", "Pay me."])     -> (0.8, 2)
    spread(["Pay me.", "Where is the bill?"])       -> {"min": 7, "quartiles": [7, 7, 18], "max": 18}

Sources: distinct-n is the share of distinct n-grams among all (Li et al. 2016, arXiv 1510.03055), which falls as rows
grow, so compare it between runs of one size; likeness to the nearest other input is Self-Instruct's measure of
diversity (arXiv 2212.10560, figure 4).
"""

import random
import statistics
from collections.abc import Sequence
from typing import TypedDict

from rapidfuzz.distance import LCSseq

from sg_local.selfguide.metrics import words

# Pairs grow with the square of the rows. So many take about a second; of more rows a sample is taken, drawn by
# a fixed seed, each against all the others. 50 of them tell the mean to 0.02 or 0.03.
MAX_COMPARISONS = 500_000
MIN_COMPARED = 50


class Spread(TypedDict):
    """Lengths in characters."""

    min: int
    quartiles: list[int]
    max: int


def distinct_share(texts: Sequence[str], n: int) -> float:
    """Share of distinct n-grams of words among all of the texts' (distinct-n)."""
    grams = [
        tuple(text_words[start : start + n])
        for text_words in map(words, texts)
        for start in range(len(text_words) - n + 1)
    ]
    return share_of(len(set(grams)), len(grams))


def nearest_rouge_l(texts: Sequence[str]) -> tuple[float, int]:
    """Mean ROUGE-L with the nearest other text, and of how many texts it is the mean."""
    pool = [words(text) for text in texts]
    n_compared = min(len(pool), max(MIN_COMPARED, MAX_COMPARISONS // max(1, len(pool))))
    nearest = []
    for index in random.Random(0).sample(range(len(pool)), n_compared):
        one, best = pool[index], 0.0
        for place, other in enumerate(pool):
            # The LCS is at most the shorter of the two, which settles many pairs.
            if place != index and 2 * min(len(one), len(other)) > best * (len(one) + len(other)):
                best = max(best, rouge_l(one, other))
        nearest.append(best)
    return round(statistics.fmean(nearest), 4) if nearest else 0.0, n_compared


def rouge_l(one: list[str], other: list[str]) -> float:
    """ROUGE-L F-measure of two lists of words."""
    total = len(one) + len(other)
    return 2 * LCSseq.similarity(one, other) / total if total else 0.0


def spread(texts: Sequence[str]) -> Spread:
    """Least, quartiles and most of the lengths in characters; zeros without texts."""
    lengths = sorted(map(len, texts)) or [0]
    least, *quartiles, most = (lengths[round(part * (len(lengths) - 1) / 4)] for part in range(5))
    return {"min": least, "quartiles": quartiles, "max": most}


def share_of(part: int, total: int) -> float:
    """The part of a total, 0..1; 0 of nothing."""
    return round(part / total, 4) if total else 0.0
