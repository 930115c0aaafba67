"""The record of what native code works on: whole calls, then single rows, then none."""

import importlib.util
import sys

import pytest

import sg_local.runs.in_flight as in_flight
from sg_local.errors import InputError
from sg_local.runs.directory import Run
from sg_local.runs.in_flight import forget, guarded_call, note_crash, recorded_by


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
    assert note_crash(new_run, None) == []  # a crash now is nobody's


def test_after_a_crash_rows_go_alone_and_after_two_not_at_all(new_run: Run) -> None:
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)
    assert note_crash(new_run, None) == [10, 11, 12, 13]
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)
    assert note_crash(new_run, None) == [12]
    assert call(new_run, crash_on=12) == ["10 of 1", "11 of 1", "12 dropped", "13 of 1"]
    assert note_crash(new_run, None) == []


def test_crashes_count_for_their_own_part_alone(new_run: Run) -> None:
    with pytest.raises(SystemExit):
        call(new_run, "evaluate base_few_shot", crash_on=12)
    note_crash(new_run, None)
    assert call(new_run, "evaluate tuned_merged")[0] == "10 of 4"


def test_a_part_that_is_repeated_leaves_the_crashes_of_a_later_one_counted(new_run: Run) -> None:
    """As in the trials: each start of the stage goes through the first part again."""
    for _ in range(2):
        assert call(new_run, "first")[1] == "11 of 4"
        with pytest.raises(SystemExit):
            call(new_run, "second", crash_on=11)
        note_crash(new_run, None)
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


def test_the_record_of_a_killed_process_is_not_about_a_later_crash(
    new_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)  # kill -9
    before = recorded_by(new_run)
    assert before
    for _ in range(2):  # two more, that die before they come to any row
        assert note_crash(new_run, before) == []
    assert call(new_run) == ["10 of 4", "11 of 4", "12 of 4", "13 of 4"]
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)
    monkeypatch.setattr(in_flight, "_THIS_PROCESS", "4711-another")
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)  # the same rows, by another process, which crashes
    assert note_crash(new_run, before) == [10, 11, 12, 13]


def test_the_record_of_a_version_that_named_no_process_counts_as_an_earlier_one(new_run: Run) -> None:
    new_run.file(".in_flight.json").write_text('{"part": "annotate", "rows": [11], "crashes": {}}')
    before = recorded_by(new_run)
    assert note_crash(new_run, before) == []
    with pytest.raises(SystemExit):
        call(new_run, crash_on=12)
    assert note_crash(new_run, before) == [10, 11, 12, 13]


def test_a_process_of_the_same_number_is_another_one(new_run: Run) -> None:
    """The system gives the number of one that is gone to a later one."""
    recorded = []
    for _ in range(2):
        spec = importlib.util.find_spec(in_flight.__name__)
        assert spec
        assert spec.loader
        as_in_another = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(as_in_another)
        with pytest.raises(SystemExit):
            as_in_another.guarded_call(new_run, "annotate", [11], lambda _: sys.exit(), lambda _: None)
        recorded.append(recorded_by(new_run))
    assert recorded[0] != recorded[1]
