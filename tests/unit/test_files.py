"""Files of JSON lines and safe writing, with errors of a full disk that the system itself raises."""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.errors import InputError, SgLocalError
from sg_local.files import (
    MAX_LINE_BYTES,
    append_rows,
    atomic_path,
    canonical_json,
    copy_file,
    read_json,
    read_rows,
    read_text,
    read_toml,
    recover_rows,
    remove_leftovers,
    row_seed,
    sha256_file,
    toml_text,
    write_bytes,
    write_json,
    write_rows,
    write_text,
)

ROWS: list[dict[str, Any]] = [
    {"id": 7, "input": "Ist das größer?\n\u2028\x85 😀", "drop": None},
    {"id": 8, "share": 0.25},
]


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """The system itself refuses to let files grow further, as on a full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    append_rows(path, ROWS[:1])
    assert read_rows(path) == [*ROWS, ROWS[0]]
    assert path.read_bytes().count(b"\n") == 3
    assert "größer" in path.read_text("utf-8")  # readable, not escaped
    assert names(tmp_path) == ["rows.jsonl"]


def test_read_rows_ignores_blank_lines_windows_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\r\n   \n{"id": 2}')
    assert read_rows(path) == [{"id": 1}, {"id": 2}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'id': 1}", "not JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b'{"id": NaN}', "NaN is no JSON number"),
        (b'{"id": -Infinity}', "Infinity is no JSON number"),
        (b'{"id": 1e999}', "1e999 is too large a number"),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"id": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"input": "\xff"}', "not UTF-8 (byte 0xff at column 12)"),
        (rb'{"input": "\ud83d"}', "half of a surrogate pair"),
    ],
)
def test_a_broken_line_is_named_with_path_number_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": 0}\n\n' + line + b"\n")
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_whole_surrogate_pair_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rb'{"input": "\ud83d\ude00"}')
    assert read_rows(path) == [{"input": "😀"}]


def test_all_broken_lines_are_reported_at_once_ten_of_them_in_words(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{}\n" + "broken\n" * 13, "utf-8")
    with pytest.raises(InputError) as caught:
        read_rows(path)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].rsplit(" ", 1)[1] for line in lines[:10]] == [str(n) for n in range(2, 12)]
    assert lines[10:] == ["… and 3 more"]


def test_line_length_is_bounded_alike_in_reading_and_writing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    fitting = {"x": "a" * (MAX_LINE_BYTES - len('{"x": ""}\n'))}
    write_rows(path, [fitting])
    assert read_rows(path) == [fitting]
    longer = {"x": fitting["x"] + "a"}
    with pytest.raises(SgLocalError, match="row None takes 1048577 bytes"):
        append_rows(path, [longer])
    path.write_text(json.dumps(longer) + "\n{}\n", "utf-8")
    with pytest.raises(InputError, match="line 1: is longer than 1048576 bytes"):
        read_rows(path)


def test_an_oversized_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.truncate((2 << 30) + 1)  # sparse
    with pytest.raises(InputError, match="over the limit of 2147483648"):
        read_rows(path)


def test_missing_files_and_what_is_no_file_are_input_errors(tmp_path: Path) -> None:
    for read in (read_rows, read_toml, sha256_file):
        with pytest.raises(InputError):
            read(tmp_path / "missing")
        with pytest.raises(InputError):
            read(tmp_path)
    fifo = tmp_path / "pipe"
    if hasattr(os, "mkfifo"):
        os.mkfifo(fifo)  # opening it would wait forever
        with pytest.raises(InputError, match="is not a file"):
            read_rows(fifo)
    with pytest.raises(InputError, match=r"cannot be read|is missing"):
        read_rows(Path("a\0b"))
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        read_rows(Path("a" * 5000))


def test_writing_replaces_the_whole_file_with_the_usual_permissions(tmp_path: Path) -> None:
    path, plain = tmp_path / "a.txt", tmp_path / "plain"
    plain.write_text("")
    path.write_text("something much longer")
    write_text(path, "ä\r\n")
    assert path.read_bytes() == b"\xc3\xa4\r\n"
    assert path.stat().st_mode == plain.stat().st_mode
    write_bytes(path, b"\x00")
    assert path.read_bytes() == b"\x00"


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, ROWS)
    before = path.read_bytes()
    with (
        largest_file(4096),
        pytest.raises(SgLocalError, match=r"a\.jsonl could not be written: .*: free some space"),
    ):
        write_bytes(path, bytes(10_000))
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.jsonl"]


def test_a_failing_fsync_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SgLocalError, match="No space left on device: free some space"):
        write_text(path, "new")
    with pytest.raises(SgLocalError, match="No space left on device: free some space"):
        append_rows(path, ROWS)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of descriptors are known on Linux")
@pytest.mark.parametrize("how", ["text", "json", "rows", "copy", "append"])
def test_a_new_file_and_its_name_are_on_the_disk_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """In this order: bytes, name, directory. Without the last, a power cut may take the name back."""
    source = tmp_path / "source"
    source.write_text("{}")
    place = tmp_path / "place"
    place.mkdir()
    path = place / "a.jsonl"
    events: list[tuple[str, str]] = []
    replace = os.replace

    def renamed(old: Path, new: Path) -> None:
        events.append(("rename", os.path.basename(new)))
        replace(old, new)

    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(
        os,
        "fsync",
        lambda number: events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{number}")))),
    )
    {
        "text": lambda: write_text(path, "a"),
        "json": lambda: write_json(path, {}),
        "rows": lambda: write_rows(path, ROWS),
        "copy": lambda: copy_file(source, path),
        "append": lambda: append_rows(path, ROWS),
    }[how]()
    if how == "append":
        assert events == [("sync", "a.jsonl"), ("sync", "place")]
        append_rows(path, ROWS)
        assert events[2:] == [("sync", "a.jsonl")]  # the name is there already
        return
    (first, temporary), *others = events
    assert first == "sync"
    assert temporary.startswith(".a.jsonl.")
    assert others == [("rename", "a.jsonl"), ("sync", "place")]


def test_a_missing_directory_says_what_to_do(tmp_path: Path) -> None:
    for write in (write_rows, append_rows):
        with pytest.raises(
            SgLocalError, match=r"No such file or directory: make the directory .*nowhere first"
        ):
            write(tmp_path / "nowhere" / "a.txt", ROWS)


def test_atomic_path_gives_a_name_that_keeps_the_suffix_and_removes_it_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".gguf"
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.gguf"]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["model.gguf"]


def test_atomic_path_lets_an_error_about_another_file_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a"):
        (tmp_path / "source").read_bytes()


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".hidden.tmp", "a.jsonl", ".lock", "notes.tmp"]
    (tmp_path / "sub").mkdir()
    with atomic_path(tmp_path / "sub" / "model.gguf") as temporary:
        temporary.write_bytes(b"")
        for name in kept:
            (tmp_path / name).touch()
        assert remove_leftovers(tmp_path) == [temporary]
        temporary.write_bytes(b"")
    assert names(tmp_path) == sorted([*kept, "sub"])


def test_appending_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    real_write = os.write

    def write(descriptor: int, data: bytes) -> int:
        written.append(data)
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    append_rows(tmp_path / "a.jsonl", ROWS)
    assert len(written) == 1
    assert written[0].count(b"\n") == 2


def test_rows_that_do_not_fit_are_not_appended_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    append_rows(path, ROWS)
    before = path.read_bytes()
    with largest_file(4096), pytest.raises(SgLocalError, match=r"could not be written: .*: free some space"):
        append_rows(path, [{"id": i, "input": "x" * 100} for i in range(100)])
    assert path.read_bytes() == before


def test_no_rows_make_no_file(tmp_path: Path) -> None:
    append_rows(tmp_path / "a.jsonl", [])
    assert names(tmp_path) == []
    assert recover_rows(tmp_path / "a.jsonl", dict) == []


def test_recovery_at_every_byte_gives_the_complete_rows_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, ROWS)
    whole = path.read_bytes()
    first_end = whole.index(b"\n") + 1
    for n_bytes in range(len(whole) + 1):
        path.write_bytes(whole[:n_bytes])
        expected = ROWS[: (n_bytes >= first_end) + (n_bytes == len(whole))]
        assert recover_rows(path, dict) == expected
        append_rows(path, ROWS)
        assert read_rows(path) == expected + ROWS


@pytest.mark.parametrize("torn", [b"\0" * 300, b'{"id": 9}', b"{\n", b"{" * 100_000, b'"\xff'])
def test_recovery_cuts_off_a_torn_last_line(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n' + torn)
    assert recover_rows(path, dict) == [{"id": 1}]
    assert path.read_bytes() == b'{"id": 1}\n'


@pytest.mark.parametrize(
    "middle", [b"broken\n", b"x" * (MAX_LINE_BYTES + 1) + b"\n", b"x" * (MAX_LINE_BYTES + 1)]
)
def test_recovery_refuses_what_no_kill_leaves_behind_and_keeps_it(tmp_path: Path, middle: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 1}\n' + middle + b'{"id": 2}\n')
    before = path.read_bytes()
    with pytest.raises(InputError, match="line 2"):
        recover_rows(path, dict)
    assert path.read_bytes() == before


def test_nan_is_never_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    for value in (math.nan, math.inf):
        for write in (write_rows, append_rows):
            with pytest.raises(ValueError, match="JSON compliant"):
                write(tmp_path / "a.jsonl", [{"score": value}])
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json(value)
    assert read_rows(tmp_path / "a.jsonl") == ROWS


def test_canonical_json_and_sha256(tmp_path: Path) -> None:
    assert canonical_json({"b": [1, None], "a": "ä"}) == '{"a":"ä","b":[1,null]}'
    write_bytes(tmp_path / "abc", b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "abc") == expected


def test_row_seeds_are_fixed_in_range_and_depend_on_each_part() -> None:
    # Computed with `printf '[0,"generate",7]' | sha256sum`: 4c2fdc9a..., halved.
    assert row_seed(0, "generate", 7) == 0x4C2FDC9A >> 1
    seeds = {row_seed(run, stage, i) for run in (0, 1) for stage in ("a", "b") for i in range(500)}
    assert all(0 <= seed < 2**31 for seed in seeds)
    # 2000 draws from 2**31: the chance of any collision is 0.1 %, and this set is always the same.
    assert len(seeds) == 2000
    assert row_seed(1, "a", "7") != row_seed(1, "a", 7)


def test_toml_and_json_files_are_read_within_bounds_and_name_the_line_of_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text('\ufeffname = "x"\r\n', "utf-8")
    assert read_toml(path) == {"name": "x"}
    path.write_text("a = 1\nb = = 2\n")
    with pytest.raises(InputError, match=r"invalid TOML: .*line 2"):
        read_toml(path)
    for text in ("a = " + "[" * 100_000, "a = " + "9" * 5000):
        path.write_text(text)
        with pytest.raises(InputError, match="invalid TOML"):
            read_toml(path)
    path.write_text('{"a":\n nul}')
    with pytest.raises(InputError, match="line 2, column 2: not JSON"):
        read_json(path, 100)
    path.write_text('{"a": NaN}')
    with pytest.raises(InputError, match="NaN is no JSON number"):
        read_json(path, 100)
    with pytest.raises(InputError, match="has 10 bytes, over the limit of 9"):
        read_json(path, 9)
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match="byte 0xff at 2"):
        read_text(path, 100)


@pytest.mark.parametrize("part", ["a.", '"x y".', r'"\"".', "'q' . ", 'a."b".'])
def test_long_dotted_keys_are_refused_in_a_moment(tmp_path: Path, part: str) -> None:
    path = tmp_path / "a.toml"
    for start, end in (("", "a = 1"), ("[", "a]"), ("t = {", "a = 1}")):
        path.write_text(start + part * (1_000_000 // len(part)) + end)
        began = time.process_time()
        with pytest.raises(InputError, match="dotted key"):
            read_toml(path)
        assert time.process_time() - began < 2  # tomllib would take hours


def test_text_with_many_dots_is_no_dotted_key(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("name" + '= """' + "Total ........................................ = 1.\n" * 9000 + '"""')
    assert read_toml(path)["name"].startswith("Total ....")
    for text in ("a" * 1_000_000, "a " * 500_000, '"' * 999_999, "'a" * 500_000, "a" + " " * 900_000):
        path.write_text(text)
        began = time.process_time()
        with pytest.raises(InputError, match="invalid TOML"):
            read_toml(path)
        assert time.process_time() - began < 2


@given(
    st.lists(
        st.dictionaries(
            st.text(),
            st.none() | st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
        )
    )
)
def test_any_rows_survive_the_disk(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert recover_rows(path, dict) == rows


class Reading(TypedDict):
    """A kind of row with every type that rows have."""

    id: int | str
    share: float
    drop: str | None
    samples: NotRequired[list[str]]
    logprobs: NotRequired[dict[str, float] | None]


GOOD: dict[str, Any] = {"id": 7, "share": 1, "drop": None}


def test_rows_of_a_kind_may_hold_more_and_lack_what_is_not_required(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"id": "a", "samples": ["x"], "logprobs": {"a": -1.5}, "note": [1]}]
    for path in (tmp_path / "a.jsonl", tmp_path / "b.jsonl"):
        write_rows(path, rows)
    assert read_rows(tmp_path / "a.jsonl", Reading) == rows
    assert recover_rows(tmp_path / "b.jsonl", Reading) == rows


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"id": True}, "id is True, not int | str"),
        ({"share": "0.5"}, "share is '0.5', not float"),
        ({"share": None}, "share is None, not float"),
        ({"drop": 0}, "drop is 0, not str | None"),
        ({"samples": [1]}, "samples is [1], not list[str]"),
        ({"samples": None}, "samples is None, not list[str]"),
        ({"logprobs": {"a": [0.5]}}, "logprobs is {'a': [0.5]}, not dict[str, float] | None"),
    ],
)
def test_a_row_of_another_kind_is_refused_with_its_line(tmp_path: Path, wrong: Any, fault: str) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, [GOOD, GOOD | wrong, {"id": 8}])
    for read in (read_rows, recover_rows):
        with pytest.raises(InputError) as error:
            read(path, Reading)
        assert str(error.value).splitlines() == [
            f"{path}, line 2: {fault}",
            f"{path}, line 3: the row has no drop",
            f"{path}, line 3: the row has no share",
        ]


def test_the_last_line_of_a_growing_file_may_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for torn in ('{"id": 8, "sha', '{"id": '):
        path.write_text(json.dumps(GOOD) + "\n" + torn)
        assert read_rows(path, Reading, is_growing=True) == [GOOD]
        with pytest.raises(InputError, match="line 2"):
            read_rows(path, Reading)
    path.write_text(json.dumps(GOOD))  # whole, and only the newline is missing
    assert read_rows(path, Reading, is_growing=True) == [GOOD]
    path.write_text('{"id": \n' + json.dumps(GOOD))
    with pytest.raises(InputError, match="line 1"):
        read_rows(path, Reading, is_growing=True)


SCALARS = (
    st.text()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)
KEYS = st.text("abcxyz_-", min_size=1, max_size=8)
TABLES = st.dictionaries(KEYS, SCALARS | st.lists(SCALARS, max_size=3), max_size=4)


@given(
    st.dictionaries(KEYS, SCALARS | st.lists(SCALARS, max_size=3), max_size=4),
    st.dictionaries(KEYS, TABLES | st.lists(TABLES, min_size=1, max_size=3), max_size=4),
)
def test_what_is_written_as_toml_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object], tables: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    written = {**{key: value for key, value in values.items() if key not in tables}, **tables}
    path.write_bytes(toml_text(written).encode())
    assert read_toml(path) == written


def test_a_written_toml_file_has_its_tables_last_and_its_lines_as_they_are() -> None:
    values = {"a": 'say "x"\x7f', "b": [1, 2.5, True], "c": "two\nlines", "d": {"e": 1e-5}, "f": [{"g": "h"}]}
    assert toml_text(values) == (
        'a = "say \\"x\\"\\u007F"\nb = [1, 2.5, true]\nc = """\ntwo\nlines"""\n\n[d]\ne = 1e-05\n\n[[f]]\ng = "h"\n'
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        toml_text({"a": float("nan")})
