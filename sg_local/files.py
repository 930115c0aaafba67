"""Files of JSON lines, read within bounds and written so that nothing half-written ever has its final name.

    {"id": 7, "input": "claim: Uniforms cost too much.", "label": "undermine", "drop": null, "seed": 12}

Format: JSON Lines (https://jsonlines.org): UTF-8, one JSON object a line; no NaN, no infinities (RFC 8259).

    whole files    write_text  write_json  write_rows  atomic_path  aside in the same directory, then renamed
    growing files  append_rows  recover_rows                         whole lines; a torn last line is cut off
    directories    own_directory  place_directory  remove_tree   links are removed, never followed
    reading        read_rows  scan_rows  read_bytes  read_text  read_json  read_toml
    what was read  decoded  parse_json  parse_row  as_row        for who has bytes or a text, not a path
    TOML           toml_text                                     its one writer, beside read_toml

A kind of row is a TypedDict (selfguide/rows.py). Rows are checked against it as they are read, because a person may
have edited the file:

    read_rows(path, PairRow)  -> "train.jsonl, line 3: the row has no copies"
"""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    NamedTuple,
    NoReturn,
    TypeAlias,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

from sg_local.errors import InputError, SgLocalError
from sg_local.escape import json_text

MAX_LINE_BYTES = 1 << 20
MAX_FILE_BYTES = 2 << 30
MAX_TOML_BYTES = 1 << 20
SAMPLED_BYTES = 4 << 20  # of a large file, in _N_SAMPLES places
_N_SAMPLES = 64

# tomllib's time grows with the square of a dotted key's parts: 40 kB of `a.a.a…` took 6 s.
_LONG_DOTTED_KEY = re.compile(
    r"""(?<![\w-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""", re.ASCII
)
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\.[^.]+)?", re.DOTALL)  # the names that atomic_path gives

JsonObject: TypeAlias = dict[str, object]  # from outside: nobody has checked what its keys hold
Row = TypeVar("Row", bound=Mapping[str, object])  # a TypedDict


class Line(NamedTuple):
    """One line of a file of JSON lines: `row` is None where `fault` says what is wrong with it."""

    number: int  # from 1
    offset: int  # of its first byte in the file
    complete: bool  # ends with a newline
    row: JsonObject | None
    fault: str


@dataclass
class Faults:
    """The faults of one file, raised together: the first `n_shown`, then a count."""

    n_shown: int = 10
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, fault: str) -> None:
        self.count += 1
        if self.count <= self.n_shown:
            self.first.append(fault)

    def raise_any(self) -> None:
        """Raises InputError if a fault was added."""
        if self.count > self.n_shown:
            raise InputError("\n".join([*self.first, f"… and {self.count - self.n_shown} more"]))
        if self.count:
            raise InputError("\n".join(self.first))

    def add_of(self, error: InputError) -> None:
        """Adds the faults of an error, which are its lines."""
        for fault in str(error).splitlines():
            self.add(fault)


@overload
def read_rows(path: Path) -> list[dict[str, Any]]: ...
@overload
def read_rows(path: Path, kind: type[Row], *, is_growing: bool = ...) -> list[Row]: ...
def read_rows(path: Path, kind: type[Any] = dict, *, is_growing: bool = False) -> list[Any]:
    """The objects of a file of JSON lines, in order; blank lines are ignored.

    kind: the TypedDict that every row has to fit; further keys are allowed. is_growing: another process may be
    writing the last line, which is left out where it has no newline and is faulty.

    Raises InputError with path, line number and reason of broken lines (the first ten, then a count), and
    where the file is missing, is over 2 GiB or has a line over 1 MiB.
    """
    lines = scan_rows(path)
    if is_growing:
        lines = (line for line in lines if line.complete or not line.fault)
    return _checked_rows(path, lines, kind)


def scan_rows(path: Path) -> Iterator[Line]:
    """The lines of a file of JSON lines one by one, broken ones included and blank ones left out.

    A line over 1 MiB is a fault and ends the reading. Raises InputError where the file cannot be read.
    """
    path = Path(path)
    _check_file(path, MAX_FILE_BYTES)
    try:
        with open(path, "rb") as file:
            number = offset = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                complete = data.endswith(b"\n")
                if len(data) > MAX_LINE_BYTES:
                    fault = f"is longer than {MAX_LINE_BYTES} bytes: shorten it"
                    yield Line(number, offset, complete, None, fault)
                    return
                # Some editors put a byte order mark first.
                text = data.removeprefix(b"\xef\xbb\xbf") if number == 1 else data
                if text.strip():
                    row, fault = _parse_line(text)
                    yield Line(number, offset, complete, row, fault)
                offset += len(data)
    except OSError as error:
        _raise_unreadable(path, error)


def recover_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The complete rows of a file that `append_rows` was writing; a line torn by a kill is cut off.

    A last line that has no newline or is not a JSON object is removed by truncating the file. A missing file
    holds no rows. kind: as in `read_rows`. Raises InputError for a broken line before the last or a line over
    1 MiB, and SgLocalError where the file cannot be truncated.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = list(scan_rows(path))
    torn = lines[-1] if lines and (lines[-1].row is None or not lines[-1].complete) else None
    # A longer line was not written by append_rows, and more lines may follow it.
    if torn is not None and path.stat().st_size - torn.offset > MAX_LINE_BYTES:
        torn = None
    if torn is not None:
        lines.pop()
    rows = _checked_rows(path, lines, kind)  # before the file is touched: it may be none of ours
    if path.is_symlink():  # what it points to is not ours: the rows are gone on with in a file of our own
        copy_file(path, path)
    if torn is not None:
        try:
            with open(path, "r+b") as file:
                file.truncate(torn.offset)
                os.fsync(file.fileno())
        except OSError as error:
            raise _write_error(path, error) from error
    return rows


def append_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Appends whole lines in one write and waits until they are on the disk; makes the file if it is missing.

    Call `recover_rows` once before the first append, so that no torn line is continued. Raises SgLocalError
    where the lines do not fit (the file is then as before) or one is over 1 MiB, ValueError for NaN.
    """
    data = _lines_of(path, rows)
    if not data:
        return
    path = Path(path)
    try:
        # Never through a link: Windows, which has no O_NOFOLLOW, gives links to administrators only.
        no_follow = getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | no_follow, 0o666)
        try:
            size_bytes = os.fstat(descriptor).st_size
            try:
                n_written = os.write(descriptor, data)
                if n_written < len(data):
                    raise OSError(errno.ENOSPC, f"only {n_written} of {len(data)} bytes fitted")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size_bytes)
                raise
        finally:
            os.close(descriptor)
        if size_bytes == 0:
            _sync(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes a whole file of JSON lines, keys in the rows' own order. Raises as `append_rows`."""
    write_bytes(path, _lines_of(path, rows))


def write_text(path: Path, text: str) -> None:
    """Writes a whole UTF-8 text file, newlines as they are. Raises as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Writes a whole file of one JSON value. Raises as `write_bytes`, and ValueError for NaN."""
    write_text(path, json_text(value, indent=1) + "\n")


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a whole file. Raises SgLocalError where that fails; an older file then stays as it was."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def copy_file(source: Path, path: Path) -> None:
    """Copies a whole file, whatever its size. Raises SgLocalError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` for the body to write; put on the disk and renamed to `path` at its end.

    If the body raises, the temporary is removed and an older file at `path` stays. Raises SgLocalError in
    place of the OSError of a full disk or missing permission; an OSError about another file passes.
    """
    path = Path(path)
    # The suffix is kept for writers that look at it.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) in {"None", str(temporary), str(path)}:
            raise _write_error(path, error) from error
        raise


def partial_directory(directory: Path) -> Path:
    """The name that a directory has until it is whole, beside its final one."""
    return directory.with_name(f".{directory.name}.partial")


def remove_leftovers(directory: Path) -> list[Path]:
    """Removes the temporaries that killed processes left under `directory`, and returns their paths.

    Only for a caller that holds the directory's lock: a living writer's temporaries look the same.
    """
    leftovers = find_leftovers(directory)
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def find_leftovers(directory: Path) -> list[Path]:
    """The temporaries under `directory`, of killed writers and of living ones; no link is followed."""
    return sorted(
        path
        for place, directories, names in os.walk(directory)
        for path in (Path(place, name) for name in (*directories, *names))
        if _LEFTOVER.fullmatch(path.name) and (path.is_symlink() or path.is_file())
    )


def remove_tree(path: Path) -> None:
    """Removes a directory with all that is in it, or a file, as far as possible. Of a link, the link alone."""
    with suppress(OSError):  # not there, or not allowed: whoever needs the place will say so
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def own_directory(path: Path) -> None:
    """Makes a directory, unless it is there; a link or a file in its place is removed, and what it points to stays.

    So nothing is written or removed in a directory that is not ours. Raises SgLocalError where it cannot be made.
    """
    try:
        if path.is_symlink() or path.is_file():
            path.unlink()
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _write_error(path, error) from error


def place_directory(source: Path, path: Path) -> None:
    """Puts a directory that is finished in the place of `path`, on the disk with all its files when this returns.

    Raises SgLocalError where that fails.
    """
    try:
        sync_tree(source)
        remove_tree(path)
        os.replace(source, path)
        _sync(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error


def sync_tree(directory: Path) -> None:
    """Waits until all files of a directory, and their names, are on the disk."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            _sync(path)


def read_text(
    path: Path, max_bytes: int, *, encoding: str = "utf-8", remedy: str = "save it as UTF-8"
) -> str:
    """A text file. Raises InputError where it is missing, over `max_bytes`, unreadable or not in the encoding.

    remedy: what helps where it is not.
    """
    return decoded(read_bytes(path, max_bytes), path, encoding=encoding, remedy=remedy)


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """A whole file. Raises InputError where it is missing, over `max_bytes` or unreadable."""
    path = Path(path)
    _check_file(path, max_bytes)
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        _raise_unreadable(path, error)
    if len(data) > max_bytes:
        raise InputError(f"{path} is over the limit of {max_bytes} bytes: make it smaller")
    return data


def decoded(
    data: bytes, name: str | Path, *, encoding: str = "utf-8", remedy: str = "save it as UTF-8"
) -> str:
    """The text of a file of this name, without a byte order mark. Raises InputError as `read_text`."""
    try:
        return data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is not {encoding.upper()} (byte {data[error.start]:#04x} at {error.start}): {remedy}"
        ) from error
    except UnicodeError as error:  # UTF-16 without its byte order mark, and the like
        raise InputError(f"{name} is not {encoding.upper()} ({error}): {remedy}") from error


def read_json(path: Path, max_bytes: int) -> Any:
    """A file that is one JSON value. Raises InputError as `read_text`, and with the line of a fault."""
    return parse_json(read_text(path, max_bytes), path)


def parse_json(text: str, name: str | Path) -> Any:
    """The JSON value that the text of a file of this name is. Raises InputError with the line of a fault."""
    try:
        return _parse_json(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from error
    except ValueError as error:
        raise InputError(f"{name}: not JSON: {error}") from error


def parse_row(line: str) -> tuple[JsonObject | None, str]:
    """The JSON object in a line, and ""; or None, and what is wrong with the line."""
    try:
        value = _parse_json(line)
    except json.JSONDecodeError as error:
        return None, f"not JSON: {error.msg} at column {error.colno}"
    except ValueError as error:
        return None, f"not JSON: {error}"
    return as_row(value)


def as_row(value: object) -> tuple[JsonObject | None, str]:
    """The same of a value that was read as JSON."""
    return (value, "") if isinstance(value, dict) else (None, "is not a JSON object: write it as {…}")


def read_toml(path: Path, max_bytes: int = MAX_TOML_BYTES) -> JsonObject:
    """A TOML file as nested dicts. Raises InputError as `read_text`, and with the line where it is broken."""
    text = read_text(path, max_bytes)
    if _LONG_DOTTED_KEY.search(text):
        raise InputError(f"{path}: invalid TOML: a dotted key has 64 parts or more")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise InputError(f"{path}: invalid TOML: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError is one; an integer of thousands of digits is another
        raise InputError(f"{path}: invalid TOML: {error}") from error


def toml_text(values: Mapping[str, Any]) -> str:
    """A TOML document that `read_toml` reads back.

    values: texts, numbers, true and false, lists of these; after them tables (dicts) and lists of tables. A text of
    several lines is written on several lines. Raises ValueError for NaN and infinities.
    """
    lines: list[str] = []
    for key, value in values.items():
        match value:
            case dict():
                lines += ["", f"[{key}]", *_toml_lines(value)]
            case [dict(), *_]:
                for table in value:
                    lines += ["", f"[[{key}]]", *_toml_lines(table)]
            case _:
                lines += _toml_lines({key: value})
    return "\n".join(lines).lstrip("\n") + "\n"


def canonical_json(obj: object) -> str:
    """One text for equal values, for hashing: sorted keys, no spaces, text unescaped. ValueError for NaN."""
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_file(path: Path) -> str:
    """The file's SHA-256 in hexadecimal. Raises InputError where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        _raise_unreadable(Path(path), error)


def sample_sha256(path: Path) -> str:
    """A hash of a file's size, its beginning, its end and some places between: for files that take long to hash.

    The whole of a file of up to SAMPLED_BYTES is in it. Raises InputError where it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size_bytes).encode())
            block_bytes = SAMPLED_BYTES // _N_SAMPLES
            # From the first block to the last; a small file is read through.
            last_offset = max(size_bytes, SAMPLED_BYTES) - block_bytes
            for number in range(_N_SAMPLES):
                file.seek(last_offset * number // (_N_SAMPLES - 1))
                digest.update(file.read(block_bytes))
            return digest.hexdigest()
    except OSError as error:
        _raise_unreadable(Path(path), error)


def row_seed(run_seed: int, stage: str, row_id: int | str) -> int:
    """The seed of one row, 0 <= seed < 2**31, the same wherever and in whatever order rows are computed.

    The first 31 bits of SHA-256 over the canonical JSON of `[run_seed, stage, row_id]`; 7 and "7" differ.
    31 bits, because llama.cpp takes 32 and reads 0xFFFFFFFF as "choose one at random".
    """
    digest = hashlib.sha256(canonical_json([run_seed, stage, row_id]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _lines_of(path: Path, rows: Iterable[Mapping[str, object]]) -> bytes:
    lines = []
    for row in rows:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:  # read_rows would refuse it
            raise SgLocalError(
                f"{path}: row {row.get('id')!r} takes {len(line)} bytes, the limit is {MAX_LINE_BYTES}: "
                "shorten its texts"
            )
        lines.append(line)
    return b"".join(lines)


def _toml_lines(table: Mapping[str, object]) -> list[str]:
    return [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items()]


def _toml_key(key: str) -> str:
    if re.fullmatch(r"[\w-]+", key, re.ASCII):
        return key
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{_escape_controls(escaped, keep="")}"'


def _toml_value(value: object) -> str:
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return json.dumps(value, allow_nan=False)  # a number, true or false is written as in JSON


def _toml_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\")
    if "\n" not in text:
        return '"' + _escape_controls(escaped.replace('"', '\\"'), keep="\t") + '"'
    # One or two quotes may stand as they are, before the closing ones too (TOML 1.0).
    escaped = re.sub(r'"{3,}', lambda quotes: '\\"' * len(quotes[0]), escaped)
    return '"""\n' + _escape_controls(escaped, keep="\t\n") + '"""'


def _escape_controls(text: str, keep: str) -> str:
    return re.sub(
        r"[\x00-\x1f\x7f]", lambda found: found[0] if found[0] in keep else f"\\u{ord(found[0]):04X}", text
    )


def _parse_line(data: bytes) -> tuple[JsonObject | None, str]:
    try:
        return parse_row(data.decode())
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {data[error.start]:#04x} at column {error.start + 1})"


def _checked_rows(path: Path, lines: Iterable[Line], kind: type[Row]) -> list[Row]:
    """The rows of these lines. Raises InputError where a line is broken, or its row is not of this kind."""
    # A TypedDict tells its keys; a plain dict has none, and any row fits it.
    types = get_type_hints(kind)
    required: Sequence[str] = sorted(getattr(kind, "__required_keys__", ()))
    rows: list[Any] = []
    faults = Faults()
    for line in lines:
        row_faults = [line.fault] if line.row is None else _row_faults(line.row, types, required)
        for fault in row_faults:
            faults.add(f"{path}, line {line.number}: {fault}")
        rows.append(line.row)
    faults.raise_any()
    return rows


def _row_faults(row: JsonObject, types: Mapping[str, Any], required: Sequence[str]) -> list[str]:
    """What a row lacks, and which of its values are of another type."""
    return [f"the row has no {key}" for key in required if key not in row] + [
        f"{key} is {row[key]!r:.40}, not {kind.__name__ if isinstance(kind, type) else kind}"
        for key, kind in types.items()
        if key in row and not _fits(row[key], kind)
    ]


def _fits(value: object, kind: Any) -> bool:
    """Whether a JSON value is of a type: str, int, float, bool, None, list[...], dict[str, ...] or a union."""
    if kind is float:  # JSON does not tell 1 from 1.0
        return type(value) in (float, int)
    if isinstance(kind, type):
        return type(value) is kind  # true is no int
    parts = get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(item, parts[1]) for item in value.values())
    return any(_fits(value, part) for part in parts)


def _parse_json(text: str) -> Any:
    """Raises ValueError, also for what Python's parser lets through and no later writer could write again."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(
                value, ensure_ascii=False
            ).encode()  # fails where half of a surrogate pair stands alone
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text holds half of a surrogate pair") from error
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large a number")
    return value


def _check_file(path: Path, max_bytes: int) -> None:
    try:
        if not path.is_file():
            if path.exists():
                raise InputError(f"{path} is not a file: give the path of a file")
            raise InputError(f"{path} is missing: check the path")
        size_bytes = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        _raise_unreadable(path, error)
    if size_bytes > max_bytes:
        raise InputError(f"{path} has {size_bytes} bytes, over the limit of {max_bytes}: make it smaller")


def _raise_unreadable(path: Path, error: OSError | ValueError) -> NoReturn:
    reason = getattr(error, "strerror", None) or str(error)
    raise InputError(f"{str(path)!r} cannot be read: {reason}: check the path and its permissions") from error


def _write_error(path: Path, error: OSError) -> SgLocalError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        remedy = "free some space on this disk"
    elif error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        remedy = "check the permissions, or choose another place"
    elif error.errno == errno.ENOENT:
        remedy = f"make the directory {path.parent} first"
    else:
        remedy = "check the path and the disk's free space and permissions"
    return SgLocalError(f"{path} could not be written: {error.strerror or error}: {remedy}")


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
