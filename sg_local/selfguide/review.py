"""Which rows a person should look at first, and how often the model was right where somebody looked.

    review_order(rows, by_label=True, seed=0)      [7, 31, "given-2", ...]    ids, the first is asked about first
    summary(words, review_sample(ids, seed=0))
    -> {"reviewed": 60, "accepted": 41, "corrected": 15, "dropped": 4, "brought_back": 22,
        "agreement": {"mean": 0.73214, "interval_95": [0.60405, 0.83037]}, "n_drawn": 14,
        "drawn_agreement": {"mean": 0.85714, ...}}

Most rows come by information density (Settles and Craven 2008): unsure ones first, and of these the ones that many
others resemble, with labels in turn. So agreement on them is lower than on all rows. Every fourth row is therefore the
next of a random order of all rows. The longest beginning of that order in which every row was reviewed is a simple
random sample, however each of its rows came up: agreement on it holds for all rows.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple, TypedDict

from sg_local.files import row_seed
from sg_local.selfguide.metrics import words
from sg_local.selfguide.rows import DropReason, PairRow, ReviewRow, Source, Word, source_of
from sg_local.selfguide.selection import in_turns
from sg_local.selfguide.statistics import Mean, mean_of

DRAW_EVERY = 4  # of so many rows one is drawn at random, the others are the least sure
# A row that resembles no other counts this much, one in the middle of them all counts 1.
_LEAST_WEIGHT = 0.5
# Reasons of curate: the row has an answer. What another stage dropped has none, or was dropped by hand.
_DROPPED_BY_CURATE = {
    DropReason.EMPTY,
    DropReason.NOISE,
    DropReason.LENGTH,
    DropReason.MARKS,
    DropReason.REPETITION,
    DropReason.NO_LABEL,
    DropReason.LOW_SHARE,
    DropReason.COPY,
    DropReason.UNRELATED,
    DropReason.SHAPE,
    DropReason.DISAGREEMENT,
    DropReason.BY_CHANCE,
    DropReason.PROMPTS_DIFFER,
    DropReason.LOW_CONFIDENCE,
    DropReason.REVIEW,
    DropReason.HELD_OUT,
    DropReason.BALANCE,
}

RowId = int | str


class ModelAnswer(NamedTuple):
    """A row to be reviewed, with what curate chose."""

    id: RowId
    input: str
    output: str
    confidence: float | None
    drop: str | None


class ReviewSummary(TypedDict):
    """What a person's words come to; the manifest keeps it."""

    reviewed: int
    accepted: int
    corrected: int
    dropped: int
    brought_back: int  # accepted or corrected rows that curate had dropped
    agreement: Mean | None  # of accepted and corrected rows; None for none of them
    n_drawn: int  # rows of the random sample that were accepted or corrected
    drawn_agreement: Mean | None


def input_sha256(text: str) -> str:
    """What binds a word to a row: the hash of its input."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_reviewable(row: PairRow) -> bool:
    """Whether a row of train.jsonl is the model's answer to an input, taken or dropped by curate."""
    return (
        source_of(row) in {Source.MADE, Source.GIVEN}
        and row["output"] is not None
        and (row["drop"] is None or row["drop"] in _DROPPED_BY_CURATE)
    )


def last_words(rows: Iterable[ReviewRow], inputs: Mapping[RowId, str]) -> dict[RowId, ReviewRow]:
    """The last row of review.jsonl for each input that is still the same text; one that is taken back among them."""
    hashes = {row_id: input_sha256(text) for row_id, text in inputs.items()}
    found: dict[RowId, ReviewRow] = {}
    for row in rows:
        if hashes.get(row["id"]) == row["input_sha256"]:
            found.pop(row["id"], None)  # the order is that of the last words
            found[row["id"]] = row
    return found


def in_force(last: Mapping[RowId, ReviewRow]) -> dict[RowId, ReviewRow]:
    """Those that were not taken back."""
    return {row_id: row for row_id, row in last.items() if row["word"] != Word.UNDO}


def review_sample(ids: Iterable[RowId], seed: int) -> list[RowId]:
    """All rows in random order; where a row stands does not depend on which others there are."""
    return sorted(ids, key=lambda row_id: (row_seed(seed, "review", row_id), str(row_id)))


def review_order(rows: Sequence[ModelAnswer], *, by_label: bool, seed: int) -> list[RowId]:
    """The ids in the order in which a word changes most, with every fourth one drawn at random."""
    drawn = review_sample([row.id for row in rows], seed)
    chance = {row_id: place for place, row_id in enumerate(drawn)}
    values = information_density(rows)
    by_value = sorted(range(len(rows)), key=lambda place: (-values[place], chance[rows[place].id]))
    if by_label:
        turns = in_turns([rows[place].output for place in by_value])
        by_value = [by_value[turn] for turn in turns]
    queues = {True: iter(drawn), False: iter([rows[place].id for place in by_value])}
    order: dict[RowId, None] = {}
    for number in range(1, len(rows) + 1):
        queue = queues[number % DRAW_EVERY == 0]
        order[next(row_id for row_id in queue if row_id not in order)] = None
    return list(order)


def information_density(rows: Sequence[ModelAnswer]) -> list[float]:
    """How much a word on each row says, 0..1: how unsure it is beside the others, times how much these resemble it.

    Both by rank, since confidence is a probability for some tasks and nats for others.
    """
    unsure = _ranks([-(row.confidence or 0.0) for row in rows])
    central = _ranks(resemblance([row.input for row in rows]))
    lonely = _LEAST_WEIGHT
    return [one * (lonely + (1 - lonely) * other) for one, other in zip(unsure, central, strict=True)]


def resemblance(texts: Sequence[str]) -> list[float]:
    """Mean cosine of each text's words with those of all others; words that many texts have count less (tf-idf)."""
    counts = [Counter(words(text)) for text in texts]
    n_with = Counter(word for count in counts for word in count)
    vectors = []
    for count in counts:
        vector = {word: n * math.log((1 + len(texts)) / n_with[word]) for word, n in count.items()}
        length = math.sqrt(sum(value * value for value in vector.values())) or 1.0
        vectors.append({word: value / length for word, value in vector.items()})
    total: defaultdict[str, float] = defaultdict(float)
    for vector in vectors:
        for word, value in vector.items():
            total[word] += value
    return [
        sum(value * (total[word] - value) for word, value in vector.items()) / max(1, len(texts) - 1)
        for vector in vectors
    ]


def _ranks(values: Sequence[float]) -> list[float]:
    """The share of values that are not greater, over 0 to 1; equal ones have the same."""
    ordered = sorted(values)
    places = {value: place for place, value in enumerate(ordered, 1)}
    return [places[value] / len(values) for value in values]


def summary(words_in_force: Mapping[RowId, ReviewRow], sample: Sequence[RowId]) -> ReviewSummary:
    """Counts, and how often the model's answer was accepted. sample: all rows, as `review_sample` has them."""
    by_word = Counter(row["word"] for row in words_in_force.values())
    drawn = takewhile(lambda row_id: row_id in words_in_force, sample)
    all_answers = _agreements(words_in_force.values())
    drawn_answers = _agreements(words_in_force[row_id] for row_id in drawn)
    return {
        "reviewed": len(words_in_force),
        "accepted": by_word[Word.ACCEPT],
        "corrected": by_word[Word.ANSWER],
        "dropped": by_word[Word.DROP],
        "brought_back": sum(
            row["model_drop"] is not None and row["word"] != Word.DROP for row in words_in_force.values()
        ),
        "agreement": mean_of(all_answers) if all_answers else None,
        "n_drawn": len(drawn_answers),
        "drawn_agreement": mean_of(drawn_answers) if drawn_answers else None,
    }


def _agreements(said: Iterable[ReviewRow]) -> list[float]:
    """1 for each accepted row, 0 for each corrected one; a dropped row has no right answer."""
    return [float(row["word"] == Word.ACCEPT) for row in said if row["word"] != Word.DROP]
