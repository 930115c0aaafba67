"""A person looks at rows, one at a time: which is next, what is said of it, and what that changed.

    with open_session(Path("runs/inbox")) as session:
        session.state()["row"]            {"id": "7", "input": "My parcel is late.", "output": "refund", ...}
        session.say_word("7", Word.ANSWER, "delivery")

A word is on the disk before the session goes on, so it may be killed at any moment. The run is held meanwhile: nothing
else writes to it. The words are taken in by `curate`, which is out of date from the first one on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from sg_local.errors import InputError
from sg_local.escape import one_line, printable
from sg_local.files import Faults, append_rows, recover_rows
from sg_local.report.review import review_lines
from sg_local.runs.directory import Run, open_run
from sg_local.runs.lock import lock_run
from sg_local.runs.review import words_on
from sg_local.runs.rows import read_inputs, read_pairs
from sg_local.runs.stage_files import REVIEW
from sg_local.selfguide.review import (
    ModelAnswer,
    ReviewSummary,
    RowId,
    in_force,
    input_sha256,
    is_reviewable,
    review_order,
    review_sample,
    summary,
)
from sg_local.selfguide.rows import DropReason, ReviewRow, Word
from sg_local.task_files.texts import Texts

MAX_ANSWER_CHARACTERS = 20_000


class ShownRow(TypedDict):
    """The row that is shown. `input` and `shown` are for the eye: what is not plain to see is an escape."""

    id: str
    input: str
    shown: str  # the model's answer
    output: str  # the same as it is, to be edited
    confidence: float | None
    drop: str | None
    word: str | None  # what was said of it, if it was
    said: str | None  # the output that was given, for the eye


class State(TypedDict):
    """All that a page shows."""

    task: str
    instruction: str
    labels: list[str]
    row: ShownRow | None  # None: every row was reviewed
    n_rows: int
    n_reviewed: int
    can_go_back: bool
    can_go_forward: bool
    can_undo: bool
    lines: list[str]  # what the words come to


class Session:
    """One sitting. For a holder of the run's lock."""

    def __init__(self, run: Run) -> None:
        """Reads the rows and what was said of them; a line that a kill tore is cut off."""
        self.run = run
        inputs = read_inputs(run)
        pairs = read_pairs(run)
        self._last = words_on(run, recover_rows(run.file(REVIEW), ReviewRow), inputs)
        taken = [row["id"] for row in pairs if row.get("reviewed") or row["drop"] == DropReason.REVIEW]
        if lost := [row_id for row_id in taken if row_id not in self._last]:
            raise InputError(
                f"{run.file(REVIEW)} has no word on row {lost[0]} any more, and curate had taken one in: "
                f"run `sg-local curate {run.path}` first"
            )
        texts = {row["id"]: row["input"] for row in inputs}
        answers = []
        for pair in pairs:
            if is_reviewable(pair) and pair["id"] in texts:
                text, output = texts[pair["id"]], pair["output"] or ""
                said = self._last.get(pair["id"])
                # train.jsonl may have taken a word in; what the model chose stands beside that word.
                answers.append(
                    ModelAnswer(pair["id"], text, output, pair["confidence"], pair["drop"])
                    if said is None
                    else ModelAnswer(
                        pair["id"], text, said["model_output"], said["model_confidence"], said["model_drop"]
                    )
                )
        self._answers = {answer.id: answer for answer in answers}
        self._last = {row_id: row for row_id, row in self._last.items() if row_id in self._answers}
        self._sample = review_sample(
            self._answers, run.settings.seed
        )  # once: of 5000 rows it takes a quarter second
        self._order = review_order(answers, by_label=run.task.is_classification, seed=run.settings.seed)
        self._visited: list[RowId] = [*in_force(self._last)]
        self._place = len(self._visited)
        self._visit_next()

    @property
    def summary(self) -> ReviewSummary:
        """What all words come to, those of earlier sittings among them."""
        return summary(in_force(self._last), self._sample)

    def state(self) -> State:
        """What there is to see now."""
        words = in_force(self._last)
        return {
            "task": self.run.task.name,
            "instruction": printable(self.run.task.instruction),
            "labels": [*self.run.task.labels],
            "row": self._shown_row(),
            "n_rows": len(self._answers),
            "n_reviewed": len(words),
            "can_go_back": self._place > 0,
            "can_go_forward": self._place < len(self._visited) - 1,
            "can_undo": bool(words),
            "lines": review_lines(self.summary),
        }

    def say_word(self, row_id: str, word: Word, output: str | None = None) -> None:
        """Writes a word on the row that is shown, and goes to the next one.

        output: by Word.ANSWER, the right one. Raises InputError where the row is not the one shown or the output is
        none, and SgLocalError where it cannot be written; nothing is changed then.
        """
        current = self._current()
        if current is None or str(current.id) != row_id:
            raise InputError(f"row {row_id!r:.40} is not the one that is shown: look at it first")
        if word == Word.ACCEPT:
            output = current.output
            if not output.strip():
                raise InputError("the model's answer is empty: give the right one, or drop the row")
            if self.run.task.labels and output not in self.run.task.labels:
                raise InputError(
                    f"the model's answer {output!r:.80} is no label of the task: give one, or drop it"
                )
        elif word == Word.ANSWER:
            output = self._checked(output)
            word = Word.ACCEPT if output == current.output else word
        else:
            output = None
        was_answered = current.id in in_force(self._last)
        self._write(current, word, output)
        self._go_on(was_answered)

    def back(self) -> None:
        """Shows the row before this one."""
        self._place = max(0, self._place - 1)

    def forward(self) -> None:
        """Shows the row after this one, of those that were seen."""
        if self._place < len(self._visited) - 1:
            self._place += 1

    def undo(self) -> None:
        """Takes the last word back that is in force, and shows its row."""
        words = in_force(self._last)
        if not words:
            return
        row_id = [*words][-1]
        self._write(self._answers[row_id], Word.UNDO, None)
        self._place = self._visited.index(row_id)

    def _current(self) -> ModelAnswer | None:
        return self._answers[self._visited[self._place]] if self._place < len(self._visited) else None

    def _shown_row(self) -> ShownRow | None:
        current = self._current()
        if current is None:
            return None
        said = in_force(self._last).get(current.id)
        return {
            "id": str(current.id),
            "input": printable(current.input),
            "shown": printable(current.output),
            "output": current.output,
            "confidence": current.confidence,
            "drop": one_line(current.drop) if current.drop else None,
            "word": said["word"] if said else None,
            "said": printable(said["output"]) if said and said["output"] is not None else None,
        }

    def _go_on(self, was_answered: bool) -> None:
        """Goes on after a word: who corrected an earlier one to the row after it, else to one that has no word."""
        words, later = in_force(self._last), range(self._place + 1, len(self._visited))
        found = [place for place in later if was_answered or self._visited[place] not in words]
        if found:
            self._place = found[0]
        else:
            self._visit_next()

    def _visit_next(self) -> None:
        """Goes to the first row of the order that nobody said a word on; to none where there is none."""
        words, seen = in_force(self._last), {*self._visited}
        found = next((row_id for row_id in self._order if row_id not in words and row_id not in seen), None)
        if found is None:  # what was seen and then taken back
            found = next((row_id for row_id in self._order if row_id not in words), None)
            if found is not None:
                self._place = self._visited.index(found)
                return
        else:
            self._visited.append(found)
        self._place = len(self._visited) - (found is not None)

    def _checked(self, output: str | None) -> str:
        """The output that a person gave. Raises InputError where it cannot be one."""
        labels = self.run.task.labels
        if labels:
            if output not in labels:
                listed = ", ".join(map(one_line, labels[:20]))
                raise InputError(f"{output!r:.80} is no label of the task: its labels are {listed}")
            return output
        if output is not None and len(output) > MAX_ANSWER_CHARACTERS:
            raise InputError(
                f"the answer has {len(output)} characters, at most {MAX_ANSWER_CHARACTERS} are taken: shorten it"
            )
        faults = Faults()
        text = Texts(faults, "").check(output, "the answer")
        faults.raise_any()
        return text

    def _write(self, answer: ModelAnswer, word: Word, output: str | None) -> None:
        row: ReviewRow = {
            "id": answer.id,
            "input_sha256": input_sha256(answer.input),
            "word": word,
            "output": output,
            "model_output": answer.output,
            "model_confidence": answer.confidence,
            "model_drop": answer.drop,
        }
        append_rows(self.run.file(REVIEW), [row])
        self._last.pop(answer.id, None)
        self._last[answer.id] = row


@contextmanager
def open_session(run_dir: Path) -> Iterator[Session]:
    """A sitting over the rows of a run, which is held meanwhile.

    Raises InputError where curate has not chosen answers yet, or another process works on the run.
    """
    run = open_run(run_dir)
    with lock_run(run.path):
        # Words make curate's rows out of date, and there may be more of them.
        if unfinished := run.first_unfinished("curate", but_for={REVIEW}):
            raise InputError(
                f"{unfinished.stage} {unfinished.reason}: run `sg-local {unfinished.stage} {run.path}` first"
            )
        yield Session(run)
