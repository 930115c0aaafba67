"""What a person said of a run's rows, as later stages and pages read it.

review.jsonl    {"id": 7, "input_sha256": "9f2c...", "word": "answer", "output": "refund", ...}

    read_review(run, read_inputs(run))    {7: {"word": "answer", "output": "refund", ...}}

A word holds for a row of that id with that input alone; a word on anything else is passed over. The last line may be
one that is being written, or was torn by a kill.
"""

from collections.abc import Mapping, Sequence

from sg_local.files import Faults, read_rows
from sg_local.runs.directory import Run
from sg_local.runs.stage_files import REVIEW
from sg_local.selfguide.review import (
    ReviewSummary,
    RowId,
    in_force,
    is_reviewable,
    last_words,
    review_sample,
    summary,
)
from sg_local.selfguide.rows import InputRow, PairRow, ReviewRow, Word


def read_review(run: Run, inputs: Sequence[InputRow]) -> dict[RowId, ReviewRow]:
    """The words that are in force. Raises InputError with all faults of the file, which a person may have edited."""
    path = run.file(REVIEW)
    rows = read_rows(path, ReviewRow, is_growing=True) if path.exists() else []
    return in_force(words_on(run, rows, inputs))


def words_on(run: Run, rows: Sequence[ReviewRow], inputs: Sequence[InputRow]) -> dict[RowId, ReviewRow]:
    """The last word on each of the inputs, one that is taken back among them; checked."""
    last = last_words(rows, {row["id"]: row["input"] for row in inputs})
    faults = Faults()
    for row in last.values():
        if fault := _fault_of(run, row):
            faults.add(f"{run.file(REVIEW)}: row {row['id']} {fault}")
    faults.raise_any()
    return last


def _fault_of(run: Run, row: ReviewRow) -> str:
    if row["word"] not in [*Word]:
        return f"has the word {row['word']!r:.40}; write {' or '.join(Word)}"
    if row["word"] not in {Word.ACCEPT, Word.ANSWER}:
        return ""
    if not (row["output"] or "").strip():
        return "has no output; write the right one"
    if run.task.labels and row["output"] not in run.task.labels:
        return f"has the output {row['output']!r:.80}, no label of the task; write one"
    return ""


def summary_of(run: Run, words: Mapping[RowId, ReviewRow], pairs: Sequence[PairRow]) -> ReviewSummary:
    """What the words that are in force come to, among all rows that could be reviewed."""
    ids = [row["id"] for row in pairs if is_reviewable(row)]
    on_these = {row_id: words[row_id] for row_id in ids if row_id in words}
    return summary(on_these, review_sample(ids, run.settings.seed))
