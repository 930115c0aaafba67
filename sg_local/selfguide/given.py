"""What people bring: real inputs without answers, and labelled rows. Pure functions over their texts.

    text_key("Where is it?!") == text_key("where  is it")
    without_known(["Pay me!", "Log me in."], {text_key("pay me")})     -> ["Log me in."]
    real_rows(...)  -> the rows of inputs.jsonl that are real: labelled ones, then given ones
    choose_examples(labelled, ["refund", "login"])  -> the first examples of a task that names none
    held_out_labelled(["labelled-1", ...], seed=0)  -> those to score on

Filters about made text (noise, form, length, near-duplicates) do not apply: what is real may look as it likes.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import median_low
from typing import TypeVar

from sg_local.files import row_seed
from sg_local.selfguide.filters import text_fault
from sg_local.selfguide.rows import DropReason, InputRow, Source, source_of
from sg_local.task import MAX_EXAMPLES, Example

# Of labelled rows, where there are no test rows. With fewer than 20 a score says nothing.
HELD_OUT_SHARE = 0.3
MIN_HELD_OUT = 20
MAX_HELD_OUT = 300

# What people and programs write in different ways, or what nobody sees: arrows and minus signs, accents that stand
# alone, also as apostrophes, skin tones; variation selectors, fillers and blanks that count as letters or signs.
_NOT_COMPARED = re.compile(
    "[\u00a8\u00af\u00b4\u00b8\u02b9-\u02df\u1fbd\u1fbf-\u1fc1\u1ffd\u1ffe\u2044\u2190\u2192\u2194\u21d0\u21d2\u21d4\u2212"
    "\U0001f3fb-\U0001f3ff\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\ufffc"
    "\U000e0100-\U000e01ef]"
)

Item = TypeVar("Item", str, Example)


def given_id(number: int) -> str:
    """The id of the real input in a line of given.jsonl, from 1."""
    return f"{Source.GIVEN}-{number}"


def labelled_id(number: int) -> str:
    """The id of the row in a line of labelled.jsonl, from 1."""
    return f"{Source.LABELLED}-{number}"


def text_key(text: str) -> str:
    """What two texts have in common that differ in case, white space and punctuation alone."""
    if text.isascii():
        key = re.sub("[^a-z0-9]", "", text.lower())
    else:
        folded = unicodedata.normalize("NFKC", _NOT_COMPARED.sub("", text)).casefold()
        folded = folded.replace("i\u0307", "i").replace("\u0131", "i")  # of Turkish, with a dot and without
        folded = _NOT_COMPARED.sub("", unicodedata.normalize("NFKC", folded))
        # Marks are vowel signs in many scripts, signs are emoji and currencies; those of ASCII count as punctuation.
        key = "".join(
            char
            for char in folded
            if char.isalnum() or (not char.isascii() and unicodedata.category(char)[0] in "MS")
        )
    return key or " ".join(text.lower().split())


def without_known(items: Iterable[Item], known: set[str]) -> list[Item]:
    """The texts, or examples by their inputs, whose key is not known."""
    return [item for item in items if text_key(item if isinstance(item, str) else item.input) not in known]


def first_of_each(rows: Iterable[Example]) -> list[Example]:
    """The rows without those that repeat the input of an earlier one."""
    return list({text_key(row.input): row for row in reversed(list(rows))}.values())[::-1]


def n_contradicting(rows: Iterable[Example]) -> int:
    """How many rows repeat the input of an earlier one with an output that is none of its right ones."""
    first: dict[str, Example] = {}
    return sum(row.output not in first.setdefault(text_key(row.input), row).outputs for row in rows)


def real_rows(
    examples: Sequence[Example],
    labelled: Sequence[str],
    given: Sequence[str],
    n_given: int,
    seed: int,
    fits: Callable[[str], bool],
) -> list[InputRow]:
    """The labelled rows, and given ones until n_given of them are kept: of more, drawn by the seed.

    fits: whether an input fits the context. Dropped are EMPTY, DUPLICATE (of an example, a labelled row or one before
    it) and OVER_CONTEXT ones. Rows are in the order of their files.
    """
    seen = {text_key(example.input) for example in examples}

    def row(row_id: str, text: str, source: Source) -> InputRow:
        drop = text_fault(text, (), None)
        if drop is None and text_key(text) in seen:
            drop = DropReason.DUPLICATE
        if drop is None and not fits(text):
            drop = DropReason.OVER_CONTEXT
        if drop is None:
            seen.add(text_key(text))
        return {
            "id": row_id,
            "input": text,
            "label": None,
            "prompt": None,
            "drop": drop,
            "seed": None,
            "source": source,
        }

    rows = [row(labelled_id(number), text, Source.LABELLED) for number, text in enumerate(labelled, 1)]
    places = list(range(len(given)))
    if len(given) > n_given:
        random.Random(seed).shuffle(places)
    drawn: dict[int, InputRow] = {}
    n_kept = 0
    for place in places:
        if n_kept == n_given:
            break
        drawn[place] = row(given_id(place + 1), given[place], Source.GIVEN)
        n_kept += drawn[place]["drop"] is None
    return rows + [drawn[place] for place in sorted(drawn)]


def made_like_real(rows: Iterable[InputRow]) -> set[int | str]:
    """The ids of made inputs that are the same as a real one."""
    rows = [row for row in rows if row["drop"] is None]
    real = {text_key(row["input"]) for row in rows if source_of(row) != Source.MADE}
    return {row["id"] for row in rows if source_of(row) == Source.MADE and text_key(row["input"]) in real}


def choose_examples(labelled: Sequence[Example], labels: Sequence[str]) -> list[Example]:
    """At most three of the labelled rows, to stand as the task's examples; of equal inputs the first counts.

    With labels one of each of the first three, in their order, else of the shortest, the middle and the longest third;
    each time the one whose input is of median length.
    """
    labelled = first_of_each(labelled)
    if labels:
        groups = [[row for row in labelled if row.output == label] for label in labels]
    else:
        ordered = sorted(labelled, key=lambda row: len(row.input))
        bounds = [round(part * len(ordered) / MAX_EXAMPLES) for part in range(MAX_EXAMPLES + 1)]
        groups = [ordered[start:end] for start, end in pairwise(bounds)]
    chosen = []
    for group in filter(None, groups):
        length = median_low([len(row.input) for row in group])
        chosen.append(next(row for row in group if len(row.input) == length))
    return chosen[:MAX_EXAMPLES]


def n_held_out_labelled(n_rows: int) -> int:
    """How many labelled rows are scored on: 30 %, 20 to 300 of them; 0 where fewer would be left to train on."""
    n_held_out = min(MAX_HELD_OUT, max(MIN_HELD_OUT, round(HELD_OUT_SHARE * n_rows)))
    return n_held_out if n_rows >= 2 * n_held_out else 0


def held_out_labelled(row_ids: Sequence[int | str], seed: int) -> set[int | str]:
    """The labelled rows that are scored on, drawn by the seed."""
    n_held_out = n_held_out_labelled(len(row_ids))
    return set(sorted(row_ids, key=lambda row_id: row_seed(seed, "held_out", row_id))[:n_held_out])
