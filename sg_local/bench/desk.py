"""What the bench's machine gives to the nodes of a cluster and takes from them: files of runs, piece by piece.

    desk.files("ablations/rank=8/sst2")                      [("task.toml", 812, "9f2c…"), …, ("manifest.json", …)]
    desk.piece("ablations/rank=8/sst2", "task.toml", 0)      b'name = "sst2"\n…'
    desk.take("sst2", "sst2 1", "train.jsonl", 0, b"…")      sst2/.arriving/train.jsonl
    desk.keep("sst2", "sst2 1", …)                           sst2/train.jsonl, manifest.json the last

A run goes to a node as its files are here, and comes back after each of its stages. So the bench's directory always has
what is finished, whatever becomes of the node. The desk works on the machine of the bench, in a process of its own. It
is told each try of a run, and takes files of the latest alone: a node that was given up may be alive.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sg_local.chat.modelfile import beside_base
from sg_local.errors import InputError, SgLocalError
from sg_local.files import read_json, read_text, remove_tree, sha256_file, write_json, write_text
from sg_local.runs.directory import KEPT_REMOTE, MAX_MANIFEST_BYTES, open_run
from sg_local.runs.lock import lock_run
from sg_local.runs.process import REASON_FILE
from sg_local.runs.stage_files import BEGUN_WITH, REVIEW, STAGE_FILES

PIECE_BYTES = 8 << 20
MAX_FILES = 100  # of a run: twice what one with all baselines has
MANIFEST = "manifest.json"
WEIGHTS = (".gguf", ".safetensors")
GIVEN = (*BEGUN_WITH, REVIEW)  # what no stage writes: it goes to a node, and does not come back
_ARRIVING = ".arriving"
_MAX_DEPTH = 3  # of a run in the bench: ablations/rank=8/sst2
_MAX_TEXT_BYTES = 1 << 20
# All that goes to a node and comes from it. Checkpoints stay where they are: they are of use to the same node alone.
_PATTERNS = (
    *GIVEN,
    *(
        name
        for files in STAGE_FILES.values()
        for name in (*files.writes, *files.pieces)
        if name != "checkpoints"
    ),
    ".in_flight.json",
    REASON_FILE,
    MANIFEST,
)


class FileFacts(NamedTuple):
    """A file of a run, by its name in the run's directory."""

    name: str
    size_bytes: int
    sha256: str


class News(NamedTuple):
    """What a node tells of a run."""

    attempt: str
    node_id: str
    what: str  # "began", or the stage that is finished


class Desk:
    """The bench's directory and its model, as the nodes of a cluster see them."""

    def __init__(self, bench: str, model: str) -> None:
        self._bench = Path(bench)
        self._model = Path(model)
        self._attempts: dict[str, str] = {}  # place of a run in the bench -> its latest try
        self._news: list[News] = []
        self._sums: dict[tuple[str, str], Any] = {}  # of files that are arriving

    def expect(self, place: str, attempt: str) -> None:
        """From now on a run is worked on by this try alone."""
        run = self._run(place)
        self._attempts[place] = attempt
        self._sums = {key: found for key, found in self._sums.items() if key[0] != place}
        remove_tree(run / _ARRIVING)

    def files(self, place: str) -> list[FileFacts]:
        """The files of a run as they are here, without weights that stayed on a node."""
        run = self._run(place)
        return [
            FileFacts(path.relative_to(run).as_posix(), path.stat().st_size, sha256_file(path))
            for path in run_files(run)
        ]

    def settings(self, place: str) -> str:
        """The settings of a run: with a path of this machine in it, it does not go as a file."""
        return read_text(self._run(place) / "settings.toml", _MAX_TEXT_BYTES)

    def piece(self, place: str, name: str, offset: int) -> bytes:
        """A piece of one of these files."""
        _require_name(name)
        return _piece(self._run(place) / name, offset)

    def model_piece(self, offset: int) -> bytes:
        """A piece of the base."""
        return _piece(self._model, offset)

    def take(self, place: str, attempt: str, name: str, offset: int, data: bytes) -> None:
        """Takes a piece of a file that a run wrote; the pieces come in their order."""
        path = self._latest(place, attempt) / _ARRIVING / name
        _require_written(name)
        if offset == 0:
            _require_so_many(
                sum(where == place for where, _ in self._sums.keys() - {(place, name)}) + 1, place
            )
            self._sums[place, name] = hashlib.sha256()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb" if offset == 0 else "r+b") as file:
                file.seek(offset)
                file.write(data)
        except OSError as error:
            raise SgLocalError(
                f"{path.parent}: {error.strerror}: free some space on the machine of the bench"
            ) from error
        self._sums[place, name].update(data)

    def keep(
        self,
        place: str,
        attempt: str,
        files: list[FileFacts],
        removed: list[str],
        kept: dict[str, Any] | None,
        is_model_here: bool,
    ) -> None:
        """Puts the files that arrived in their places, and removes those that the run has no longer.

        kept: where the run's weights are, if they stay on the node. is_model_here: the node has the base at the same
        path. Raises SgLocalError where a file is not what was sent; then all stays as it was.
        """
        run = self._latest(place, attempt)
        there = {path.relative_to(run).as_posix() for path in run_files(run)}
        _require_so_many(len((there | {item[0] for item in files}) - set(removed)), place)
        for name, _, sha256 in files:
            _require_written(name)
            if (place, name) not in self._sums or self._sums.pop((place, name)).hexdigest() != sha256:
                raise SgLocalError(f"{run / name} did not arrive whole: run the same command again")
        with lock_run(run):
            for name in removed:
                _require_written(name)
                (run / name).unlink(missing_ok=True)
            names = sorted((item[0] for item in files), key=lambda name: name == MANIFEST)
            if not is_model_here:
                _name_own_model(run, names)
            for name in names:
                (run / name).parent.mkdir(exist_ok=True)
                shutil.move(run / _ARRIVING / name, run / name)
            if kept:
                write_json(run / KEPT_REMOTE, kept)
            else:
                (run / KEPT_REMOTE).unlink(missing_ok=True)
        remove_tree(run / _ARRIVING)

    def tell(self, attempt: str, node_id: str, what: str) -> None:
        """Keeps a node's news for the bench."""
        self._news.append(News(attempt, node_id, what))

    def news(self) -> list[News]:
        """What came since the last call."""
        news, self._news = self._news, []
        return news

    def _run(self, place: str) -> Path:
        """The directory of a run that was begun here. Raises InputError for any other place: none is made."""
        parts = Path(place).parts
        run = self._bench / place
        is_below = not Path(place).is_absolute() and ".." not in parts and len(parts) <= _MAX_DEPTH
        if not is_below or not (run / "settings.toml").is_file():
            raise InputError(f"{place!r} is no run of the bench")
        return run

    def _latest(self, place: str, attempt: str) -> Path:
        """The same, for the latest try."""
        run = self._run(place)
        if self._attempts.get(place) != attempt:
            raise InputError(f"{place} is worked on elsewhere by now")
        return run


def run_files(run: Path) -> Iterator[Path]:
    """The files that make a run, the manifest last; no link is followed."""
    found = {path for pattern in _PATTERNS for path in run.glob(pattern) if path.is_file()}
    yield from sorted(
        (path for path in found if not path.is_symlink() and not path.parent.is_symlink()),
        key=lambda path: (path.name == MANIFEST, path),
    )


def _name_own_model(run: Path, names: Sequence[str]) -> None:
    """Lets Modelfile.adapter name the base where it lies here, not where it lay on the node."""
    arriving = run / _ARRIVING
    adapter = "Modelfile.adapter"
    if adapter in names:
        merged = arriving / "Modelfile"
        text = read_text(merged if merged.exists() else run / "Modelfile", _MAX_TEXT_BYTES)
        write_text(arriving / adapter, beside_base(text, open_run(run).model.path))
    if MANIFEST in names:
        manifest = read_json(arriving / MANIFEST, MAX_MANIFEST_BYTES)
        if "export" in manifest["stages"]:
            path = arriving / adapter if adapter in names else run / adapter
            manifest["stages"]["export"]["writes"][adapter] = sha256_file(path)
            write_json(arriving / MANIFEST, manifest)


def _require_name(name: str) -> None:
    path = Path(name)
    is_known = any(path.match(item) and len(path.parts) == len(Path(item).parts) for item in _PATTERNS)
    if path.is_absolute() or ".." in path.parts or not is_known:
        raise InputError(f"{name!r} is no file of a run")


def _require_so_many(n_files: int, place: str) -> None:
    if n_files > MAX_FILES:
        raise InputError(f"{place} has more than {MAX_FILES} files, which no run has")


def _require_written(name: str) -> None:
    _require_name(name)
    if name in GIVEN:
        raise InputError(f"{name!r} is no file of a run that a stage writes")


def _piece(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(PIECE_BYTES)
