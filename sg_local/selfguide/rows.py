"""The rows of a run's files, and every reason to leave one out of training.

    .probe.jsonl   Trial       the trial of one way of asking for inputs
    inputs.jsonl   InputRow    an input: made by the model, or a real one that a person gave
    outputs.jsonl  OutputRow   the answers of the model to it
    review.jsonl   ReviewRow   a person's word on one of them
    train.jsonl    PairRow     an input with its answer, kept or dropped

A dropped row stays in its file. Its `drop` says why: a DropReason, or any word that a person wrote there.
"""

import re
from enum import StrEnum
from typing import NotRequired, Self, TypedDict, TypeGuard

DEMONSTRATION = "demonstration-"  # id of an example of the task among made rows, without its number


class Source(StrEnum):
    """Where a row's input is from: its origin, as the files have it."""

    MADE = "made"  # the model wrote it
    GIVEN = "given"  # a real input without an answer
    LABELLED = "labelled"  # a real input with its right output
    DEMONSTRATION = "demonstration"  # an example of the task


_REAL_ID = re.compile(f"({Source.GIVEN}|{Source.LABELLED})-[1-9][0-9]*")


class DropReason(StrEnum):
    """Why a row is dropped: the word in the files, what it says about the row, the setting that decides it."""

    meaning: str
    setting: str | None

    def __new__(cls, word: str, meaning: str = "", setting: str | None = None) -> Self:
        reason = str.__new__(cls, word)
        reason._value_ = word
        reason.meaning, reason.setting = meaning, setting
        return reason

    CRASH = "crash", "llama.cpp crashed on it twice"
    CUT_OFF = (
        "cut_off",
        "the input did not end within its limit of tokens (0: by the examples)",
        "max_input_tokens",
    )
    EMPTY = "empty", "it has no letter, digit or emoji"
    NOISE = "noise", "it talks about the task, or about being an assistant"
    LENGTH = "length", "it is far longer or shorter than the examples", "length_filter"
    MARKS = "marks", "it lacks marks that all examples have, or has too many", "form_filter"
    REPETITION = "repetition", "it repeats its words", "form_filter"
    LABEL = "label", "the input is a label"
    DUPLICATE = "duplicate", "an earlier input, or an example, is the same"
    NEAR_DUPLICATE = (
        "near_duplicate",
        "an earlier input, or an example, has its words",
        "near_duplicate_rouge_l",
    )
    OVER_CONTEXT = "over_context", "it does not fit the context with the examples", "n_ctx"
    UNFINISHED = "unfinished", "no sampled answer came to an end", "max_new_tokens"
    NO_LABEL = "no_label", "the most frequent sampled answer is no label"
    LOW_SHARE = "low_share", "too few of its samples agree", "min_share"
    COPY = "copy", "the answer copies its input", "form_filter"
    UNRELATED = "unrelated", "the answer takes too few words from its input", "form_filter"
    SHAPE = (
        "shape",
        "the answer is no JSON with the keys and kinds of values that all examples have",
        "form_filter",
    )
    DISAGREEMENT = "disagreement", "its answer is not the label that it was made for", "agreement"
    PROMPTS_DIFFER = (
        "prompts_differ",
        "the prompts that score its label hardly agree on real inputs, and there are made ones",
        "n_layouts",
    )
    BY_CHANCE = (
        "by_chance",
        "made inputs fit what they were made for no more often than by chance, and enough real ones are there",
        "agreement",
    )
    LOW_CONFIDENCE = (
        "low_confidence",
        "it is below the confidence cut-off",
        "keep_confident",
    )
    REVIEW = "review", "a person dropped it in `sg-local review`"
    HELD_OUT = "held_out", "it is kept for scoring, as the task has no test file"
    BALANCE = "balance", "its label has more rows than the rarest label can balance", "max_copies"


class Trial(TypedDict):
    """A row of .probe.jsonl: the result of a few trial inputs, asked for in one way.

    {"style": "turns", "made": 32, "good": 28, "agreement": 0.6429, "form_filter": true}
    """

    style: str  # one of INPUT_PROMPTS
    made: int
    good: int  # trial inputs that passed the filters
    agreement: float | None  # share of the good ones annotated with their made-for label; None without labels
    form_filter: bool  # whether the form filter was used


class InputRow(TypedDict):
    """A row of inputs.jsonl, by `generate`: an input that the model made, or a real one.

    {"id": 3, "input": "Can you please provide me with the invoice?", "label": "invoice", "prompt": "turns",
     "drop": null, "seed": 1628583180, "source": "made"}
    {"id": "given-12", "input": "were is my parcel", "label": null, "prompt": null, "drop": null, "seed": null,
     "source": "given"}
    """

    id: (
        int | str
    )  # of made ones from 0, in the order of the file; of real ones by their line: given-1, labelled-1
    input: str
    label: str | None  # the made-for label; None where the task has no labels, and of real inputs
    prompt: str | None  # the way of asking, one of INPUT_PROMPTS
    drop: str | None
    seed: int | None
    source: NotRequired[str]  # a Source; earlier versions did not write it


class OutputRow(TypedDict):
    """A row of outputs.jsonl, by `annotate`: the model's answer to an input that `generate` kept.

    {"id": 3, "label_logprobs": [{"delivery": -6.52449, "refund": -3.19471, "login": -1.73958, "invoice": -1.51562},
     {"delivery": -5.07138, ...}, ...], "output": "invoice", "drop": null}
    {"id": 7, "samples": ["Could you please let me know tomorrow?", "Let's talk about it?", ... 8 more],
     "output": "Could you please let's discuss it?", "share": 0.6017, "drop": null, "information": 2.3601}
    """

    id: int | str  # of the input
    output: str | None  # None if there is no answer
    drop: str | None
    label_logprobs: NotRequired[list[dict[str, float]]]  # by prompt; if label_answers is "scores"
    samples: NotRequired[list[str]]  # otherwise; "" for a sample that did not end
    share: NotRequired[float]  # 0..1, how far the samples agree with the output
    information: NotRequired[float]  # nats per token; if choose_by is "information"
    made_from: NotRequired[str]  # a key of the input's text, the task, the base and the settings


class Word(StrEnum):
    """What a person says of a row in `review`."""

    ACCEPT = "accept"  # the model's answer is right
    ANSWER = "answer"  # another one is
    DROP = "drop"  # it is no row to train on
    UNDO = "undo"  # what was said of it before is taken back


class ReviewRow(TypedDict):
    """A row of review.jsonl, by `review`: a person's word on a row. Of an id the last one holds.

    {"id": 7, "input_sha256": "9f2c41d07ab35e66...", "word": "answer", "output": "refund", "model_output": "delivery",
     "model_confidence": 0.0312, "model_drop": "low_confidence"}
    """

    id: int | str
    input_sha256: str  # of the input's text: the word is on this text alone
    word: str  # a Word
    output: str | None  # the right one, by accept and answer
    model_output: str  # what curate chose before anybody said a word
    model_confidence: float | None
    model_drop: str | None


class _Pair(TypedDict):
    id: int | str  # of the input, or demonstration-1
    input: str
    targets: dict[str, float] | None  # label -> probability; if label_targets is "soft"
    copies: int  # how often it is in the training rows
    drop: str | None
    source: NotRequired[str]  # a Source; earlier versions did not write it
    reviewed: NotRequired[bool]  # if so: the output is a person's word


class PairRow(_Pair):
    """A row of train.jsonl, by `curate`: an example of the task, a labelled row or an annotated input, also if dropped.

    {"id": 3, "input": "Can you please provide me with the invoice?", "output": "invoice", "confidence": 0.9793,
     "targets": null, "copies": 1, "drop": null, "source": "made"}
    """

    output: str | None
    # 0..1; nats per token if answers were chosen by information where few samples agree; None if nothing was scored
    confidence: float | None


class KeptPair(_Pair):
    """A PairRow that is not dropped: it has an answer, and a confidence."""

    output: str
    confidence: float


def is_input_id(row_id: object) -> bool:
    """Whether an id is one of inputs.jsonl: a number, or of a real input given-1, labelled-1."""
    return type(row_id) is int or (isinstance(row_id, str) and bool(_REAL_ID.fullmatch(row_id)))


def source_of(row: InputRow | PairRow | KeptPair) -> Source:
    """The origin of a row."""
    is_example = str(row["id"]).startswith(DEMONSTRATION)
    return Source(row.get("source") or (Source.DEMONSTRATION if is_example else Source.MADE))


def is_gold(row: PairRow | KeptPair) -> bool:
    """Whether the output of an input is a person's: a labelled row, or a reviewed one."""
    return source_of(row) == Source.LABELLED or row.get("reviewed", False)


def is_kept(row: PairRow) -> TypeGuard[KeptPair]:
    """Whether a row of train.jsonl is not dropped."""
    return row["drop"] is None
