"""Which rows native code is working on, so that a crash in it costs one row at most, and not the run.

    .in_flight.json   {"process": "4711-9f2c41d0", "part": "annotate", "rows": [12, 13, 14],
                       "crashes": {"annotate": {"12": 1, "13": 1, "14": 1}}}

llama.cpp can end the whole process (a failed assertion, a bad pointer). `run` notices: it names the rows in flight,
counts a crash for each and starts the stage again, which gives those rows to llama.cpp one at a time. A row that
crashes it again is dropped (DropReason.CRASH).

The record says which process wrote it. One that was killed leaves it behind; a crash of a later process that has not
come to any row, as while it loads the model, is counted for none.
"""

import json
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from sg_local.errors import InputError
from sg_local.files import read_json, write_text
from sg_local.runs.directory import Run
from sg_local.selfguide.rows import is_input_id

MAX_CRASHES = 2  # of one row, before it is dropped
_MAX_BYTES = 16 << 20
_THIS_PROCESS = f"{os.getpid()}-{secrets.token_hex(4)}"  # numbers of processes come again

Result = TypeVar("Result")
RowId = int | str
Crashes = dict[str, dict[RowId, int]]  # part -> row id -> how often the process ended with it in flight


def guarded_call(
    run: Run,
    part: str,
    row_ids: Sequence[RowId],
    answer: Callable[[Sequence[int]], list[Result]],
    dropped: Callable[[int], Result],
) -> list[Result]:
    """Results for some rows by one call of native code, or one by one where a call with them crashed before.

    answer: from places in row_ids to results; dropped: the result of a row that is not tried again. part names the
    stage, and what of it: crashes are counted for each part alone.
    """
    all_crashes = _read(run).crashes
    crashes = all_crashes.get(part, {})
    places = range(len(row_ids))
    if not any(crashes.get(row_id) for row_id in row_ids):
        groups: list[Sequence[int]] = [places]
    else:
        groups = [[place] for place in places]
    results: list[Result] = []
    for group in groups:
        if crashes.get(row_ids[group[0]], 0) >= MAX_CRASHES:
            results += [dropped(place) for place in group]
            continue
        _write(run, part, [row_ids[place] for place in group], all_crashes)
        results += answer(group)
    if all_crashes:
        _write(run, part, [], all_crashes)
    else:
        forget(run)
    return results


def recorded_by(run: Run) -> str | None:
    """The process that wrote the record, None where there is none."""
    return _read(run).process if _path(run).exists() else None


def note_crash(run: Run, before: str | None) -> list[RowId]:
    """Counts a crash for each row in flight and returns their ids; [] where the crash was elsewhere.

    before: `recorded_by` when the process was started that crashed. Where that is unchanged, the record is an
    earlier one's, and not about this crash.
    """
    process, part, rows, all_crashes = _read(run)
    if process == before:
        return []
    if rows:
        crashes = all_crashes.get(part, {})
        counted = crashes | {row_id: crashes.get(row_id, 0) + 1 for row_id in rows}
        _write(run, part, [], all_crashes | {part: counted})
    return rows


def forget(run: Run) -> None:
    """Nothing is in flight, and what crashed is settled or was never there."""
    _path(run).unlink(missing_ok=True)


def _path(run: Run) -> Path:
    return run.file(".in_flight.json")


class _Record(NamedTuple):
    process: str
    part: str
    rows: list[RowId]
    crashes: Crashes


def _read(run: Run) -> _Record:
    if not _path(run).exists():
        return _Record("", "", [], {})
    match read_json(_path(run), _MAX_BYTES):
        case {"part": str(part), "rows": list(rows), "crashes": dict(crashes), **rest} if all(
            is_input_id(row) for row in rows
        ) and all(map(_are_counts, crashes.values())):
            counted = {
                name: {int(row) if row.isdecimal() else row: n for row, n in counts.items()}
                for name, counts in crashes.items()
            }
            return _Record(str(rest.get("process", "")), part, rows, counted)
    raise InputError(f"{_path(run)} is damaged: delete it, and run the same command again")


def _are_counts(crashes: object) -> bool:
    return isinstance(crashes, dict) and all(
        (row.isdecimal() or is_input_id(row)) and isinstance(count, int) for row, count in crashes.items()
    )


def _write(run: Run, part: str, rows: list[RowId], crashes: Crashes) -> None:
    # json writes the row ids as texts
    record = {"process": _THIS_PROCESS, "part": part, "rows": rows, "crashes": crashes}
    write_text(_path(run), json.dumps(record) + "\n")


def whole_calls(rows: list[Result], rows_per_call: int) -> list[Result]:
    """The rows of the calls that were written whole."""
    return rows[: len(rows) // rows_per_call * rows_per_call]
