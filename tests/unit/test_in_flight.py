"""The record of what native code works on: whole calls, then single rows, then none."""

import pytest

from sg_local.errors import InputError
from sg_local.runs.directory import Run
from sg_local.runs.in_flight import forget, guarded_call, note_crash


def call(run: Run, part: str = "annotate", crash_on: int | None = None) -> list[str]:
    """Answers for the rows 10..13; raises as if the process ended where one of them crashes."""
    ids = [10, 11, 12, 13]

    def answer(places: "list[int] | range") -> list[str]:
        if any(ids[place] == crash_on for place in places):
            raise SystemExit
        return [f"{ids[place]} of {len(places)}" for place in places]

    return guarded_call(run, part, ids, answer, lambda place: f"{ids[place]} dropped")  # type: ignore[arg-type]


def test_rows_that_never_crashed_go_together_and_leave_no_record(new_run: Run) -> None:
    assert call(new_run) == ["10 of 4", "11 of 4", "12 of 4", "13 of 4"]
    assert not new_run.file(".in_flight.json").exists()
    assert note_crash(new_run) == []  # a crash now is nobody's


def test_after_a_crash_rows_go_alone_and_after_two_not_at_all(new_run: Run) -> None:
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)
    assert note_crash(new_run) == [10, 11, 12, 13]
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)
    assert note_crash(new_run) == [12]
    assert call(new_run, crash_on=12) == ["10 of 1", "11 of 1", "12 dropped", "13 of 1"]
    assert note_crash(new_run) == []


def test_crashes_count_for_their_own_part_alone(new_run: Run) -> None:
    with pytest.raises(SystemExit):
        call(new_run, "evaluate base_few_shot", crash_on=12)
    note_crash(new_run)
    assert call(new_run, "evaluate tuned_merged")[0] == "10 of 4"


def test_a_part_that_is_repeated_leaves_the_crashes_of_a_later_one_counted(new_run: Run) -> None:
    """As in the trials: each start of the stage goes through the first part again."""
    for _ in range(2):
        assert call(new_run, "first")[1] == "11 of 4"
        with pytest.raises(SystemExit):
            call(new_run, "second", crash_on=11)
        note_crash(new_run)
    assert call(new_run, "first")[1] == "11 of 4"
    assert call(new_run, "second", crash_on=11) == ["10 of 1", "11 dropped", "12 of 1", "13 of 1"]


def test_a_kill_is_no_crash(new_run: Run) -> None:
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)
    assert call(new_run)[0] == "10 of 4"  # nobody counted


@pytest.mark.parametrize(
    "text",
    [
        '{"part": 3}',
        '{"part": "a", "rows": [], "crashes": {"12": 1}}',
        '{"part": "a", "rows": ["b"], "crashes": {}}',
    ],
)
def test_a_damaged_record_says_what_to_do(new_run: Run, text: str) -> None:
    new_run.file(".in_flight.json").write_text(text)
    with pytest.raises(InputError, match="delete it"):
        call(new_run)
    forget(new_run)
    assert len(call(new_run)) == 4
