"""A run of a bench on a node of a cluster: its files are fetched, its stages run as on one machine, each is sent back.

    work(desk, job, "sst2 1", "9f2c…", "10.0.0.7")
    -> {"error": None}  or  {"error": "train did not finish…", "exit_code": 1}  or  {"unfit": "training needs…", …}

    $SG_LOCAL_HOME/cluster/models/b179c9523d0e6a0f/SmolLM2-135M-Instruct.Q4_1.gguf     the base, where it was copied
                           <bench>/sst2/  <bench>/sst2.base/                          the run, and what it begins with

A run whose directory is still there from an earlier try goes on with the pieces and checkpoints in it. Nothing here
knows Ray: a desk is what answers (desk.py).
"""

import hashlib
import os
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Protocol

from sg_local.bench.desk import GIVEN, MANIFEST, PIECE_BYTES, WEIGHTS, FileFacts, run_files
from sg_local.bench.units import finish
from sg_local.errors import SgLocalError, outside_cause
from sg_local.files import atomic_path, parse_json, remove_tree, sha256_file, toml_text, write_text
from sg_local.finetune.environment import NEEDED, missing_packages
from sg_local.models import make_store_directory, store_root
from sg_local.plan.machine import nvidia_gpus, total_memory_bytes
from sg_local.report import tables
from sg_local.runs import process
from sg_local.runs.directory import Run, open_run
from sg_local.runs.process import StartStage
from sg_local.runs.process_facts import versions
from sg_local.runs.stage_files import BEGUN_WITH


class DeskLike(Protocol):
    """A Desk, or what passes calls on to one."""

    def files(self, place: str) -> list[FileFacts]: ...
    def settings(self, place: str) -> str: ...
    def piece(self, place: str, name: str, offset: int) -> bytes: ...
    def model_piece(self, offset: int) -> bytes: ...
    def take(self, place: str, attempt: str, name: str, offset: int, data: bytes) -> None: ...
    def keep(
        self,
        place: str,
        attempt: str,
        files: list[FileFacts],
        removed: list[str],
        kept: dict[str, Any] | None,
        is_model_here: bool,
    ) -> None: ...
    def tell(self, attempt: str, node_id: str, what: str) -> None: ...


@dataclass(frozen=True)
class Needs:
    """What every node has to have, and to be like, for the runs of one bench."""

    bench: str  # its directory
    bench_id: str
    probe: str  # name and content of a file in it: who sees that shares the file system
    model: str
    model_sha256: str
    model_bytes: int
    trainer: str
    base_weights: str
    disk_bytes: int
    versions: dict[str, str]  # those that rows depend on
    on_node_disk: bool
    keep_remote: bool


@dataclass(frozen=True)
class Job:
    """One run, by its place in the directory of the bench."""

    needs: Needs
    place: str
    base_place: str  # of the run that it begins with, "" for none
    n_threads: int
    n_gpus: int


@dataclass(frozen=True)
class NodeFacts:
    """What a node is, as far as runs depend on it. faults: why no run can be placed there."""

    versions: dict[str, str]
    host_bytes: int
    gpus: list[str]
    shares_bench: bool
    model: str  # "same": at the same path; "copied"; "missing"; "other bytes": at the same path
    faults: list[str]


def look_at_node(needs: Needs) -> NodeFacts:
    """What there is on the node that this is called on; nothing is written."""
    shares = _shares_bench(needs)
    model = where_is_model(needs)
    faults = []
    wanted = [name for name in NEEDED if name != "unsloth" or needs.trainer == "unsloth"]
    if missing := missing_packages(["llama_cpp", *wanted]):
        faults.append(f"it is without {', '.join(missing)}: `pip install 'sg-local[train]'` there")
    if needs.base_weights and not Path(needs.base_weights).is_dir():
        faults.append(f"--base-weights {needs.base_weights} is not there: copy it to the same path")
    if not (shares and model == "same"):
        needed = needs.disk_bytes + (needs.model_bytes if model in ("missing", "other bytes") else 0)
        free = shutil.disk_usage(_existing(cluster_root())).free
        if free < needed:
            faults.append(
                f"{tables.size(free) if free else 'nothing'} of disk is free for {cluster_root()}, and a run needs "
                f"{tables.size(needed)}: free some, or start Ray there with SG_LOCAL_HOME on another disk"
            )
    return NodeFacts(rows_depend_on(), total_memory_bytes(), nvidia_gpus(), shares, model, faults)


def rows_depend_on() -> dict[str, str]:
    """Versions that have to be the same for rows to compare. A build for another card (+cu126) is no other version."""
    found = {
        name: version.partition("+")[0]
        for name, version in versions().items()
        if name not in ("python", "sg-local", "gguf")
    }
    return {**found, "sg-local": code_sha256()}


@cache
def code_sha256() -> str:
    """A name for the code of this package: a checkout may differ from the version that it is called by."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def differences_of(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What differs: "torch 2.12.0 (here 2.13.0)"; "" for nothing. What one of them lacks is no difference."""
    return ", ".join(
        f"{name} {theirs[name]} (here {version})"
        for name, version in ours.items()
        if theirs.get(name, version) != version
    )


def work(desk: DeskLike, job: Job, attempt: str, node_id: str, node: str) -> dict[str, Any]:
    """Works on one run; says what became of it. Raises what is a bug, or what the desk raises."""
    facts = look_at_node(job.needs)
    wrong = differences_of(job.needs.versions, facts.versions)
    if facts.faults or wrong:
        reasons = [*facts.faults, *([f"it has {wrong}"] if wrong else [])]
        return {"unfit": "; ".join(reasons), "node_id": node_id}
    with _environment(job):
        try:
            if facts.shares_bench and facts.model == "same" and not job.needs.on_node_disk:
                desk.tell(attempt, node_id, "began")
                _work_in_place(desk, job, attempt, node_id)
            else:
                _Copy(desk, job, attempt, node_id, node).work()
        except SgLocalError as error:
            return {"error": str(error), "exit_code": error.exit_code}
        except OSError as error:
            if (cause := outside_cause(error)) is None:
                raise
            return {"error": cause, "exit_code": 1}
    return {"error": None}


@contextmanager
def _environment(job: Job) -> Iterator[None]:
    """What the processes of the stages inherit. Ray uses a worker again for other work."""
    changed = {"OMP_NUM_THREADS": str(job.n_threads)}
    if not job.n_gpus:
        changed["CUDA_VISIBLE_DEVICES"] = ""  # a card that Ray did not give may be another run's
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _telling(desk: DeskLike, attempt: str, node_id: str) -> StartStage:
    def start_stage(run: Run, stage: str) -> int:
        code = process.in_child_process(run, stage)
        if code == 0:
            desk.tell(attempt, node_id, stage)
        return code

    return start_stage


def _work_in_place(desk: DeskLike, job: Job, attempt: str, node_id: str) -> None:
    bench = Path(job.needs.bench)
    base = open_run(bench / job.base_place) if job.base_place else None
    finish(open_run(bench / job.place), base, _telling(desk, attempt, node_id))


class _Copy:
    """A run on the node's own disk, as far as it was sent."""

    def __init__(self, desk: DeskLike, job: Job, attempt: str, node_id: str, node: str) -> None:
        self.desk, self.job, self.attempt, self.node_id, self.node = desk, job, attempt, node_id, node
        self.path = cluster_root() / job.needs.bench_id / job.place
        self.base_path = self.path.with_name(f"{self.path.name}.base") if job.base_place else None
        self.is_model_here = False
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and time of its last change
        self._start = _telling(desk, attempt, node_id)

    def work(self) -> None:
        """Fetches the run, finishes it, and sends what is there after each stage, also after a failed one."""
        make_store_directory(cluster_root())
        model = fetch_model(self.desk, self.job.needs)
        self.is_model_here = str(model) == self.job.needs.model
        self._fetch_run(model)
        base = self._fetch_base(self.base_path, model) if self.base_path else None
        self.desk.tell(self.attempt, self.node_id, "began")
        try:
            finish(open_run(self.path), base, self._run_stage)
        finally:
            self._send()
        if self.base_path:
            remove_tree(self.base_path)
        if not self.job.needs.keep_remote:
            remove_tree(self.path)

    def _run_stage(self, run: Run, stage: str) -> int:
        code = process.in_child_process(run, stage)
        if code == 0:
            self._send()
            self.desk.tell(self.attempt, self.node_id, stage)
        return code

    def _fetch_run(self, model: Path) -> None:
        """Brings the directory to what the bench has. What was made here beyond that stays, if the run is the same."""
        wanted = {facts.name: facts for facts in _facts(self.desk.files(self.job.place))}
        settings = _with_model(self.desk.settings(self.job.place), model)
        is_same = _text_or_none(self.path / "settings.toml") == settings and all(
            _is_as_wanted(self.path, wanted[name]) for name in wanted if name in BEGUN_WITH
        )
        if not is_same:
            remove_tree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for name in GIVEN:  # a review may have been taken back
            if name not in wanted:
                (self.path / name).unlink(missing_ok=True)
        for name, facts in wanted.items():  # the manifest is the last
            if _is_as_wanted(self.path, facts) or (name == MANIFEST and self._is_ahead()):
                continue
            self._fetch_file(self.job.place, facts, self.path)
        write_text(self.path / "settings.toml", settings)
        self._sent = {
            name: stamp
            for name, stamp in self._stamps().items()
            if name in wanted and _is_as_wanted(self.path, wanted[name])
        }

    def _is_ahead(self) -> bool:
        """Whether this directory has all the stages that the bench has, and more."""
        text = b"".join(pieces(partial(self.desk.piece, self.job.place, MANIFEST)))
        theirs = parse_json(text.decode(), MANIFEST)["stages"]
        ours = open_run(self.path).manifest()["stages"] if (self.path / "settings.toml").exists() else {}
        return len(ours) > len(theirs) and all(_is_same(ours.get(stage), theirs[stage]) for stage in theirs)

    def _fetch_base(self, path: Path, model: Path) -> Run:
        """Of the run that this one begins with: what is known of it, and the answers of the base."""
        remove_tree(path)
        path.mkdir(parents=True)
        for facts in _facts(self.desk.files(self.job.base_place)):
            if facts.name == "task.toml" or facts.name.startswith("predictions/"):
                self._fetch_file(self.job.base_place, facts, path)
        write_text(path / "settings.toml", _with_model(self.desk.settings(self.job.base_place), model))
        return open_run(path)

    def _fetch_file(self, place: str, facts: FileFacts, path: Path) -> None:
        (path / facts.name).parent.mkdir(exist_ok=True)
        write_pieces(path / facts.name, pieces(partial(self.desk.piece, place, facts.name)), facts.sha256)

    def _stamps(self) -> dict[str, tuple[int, int]]:
        stats = {path.relative_to(self.path).as_posix(): path.stat() for path in run_files(self.path)}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def _send(self) -> None:
        """Sends what changed since the last time."""
        stamps = self._stamps()
        stays = {name for name in stamps if self.job.needs.keep_remote and name.endswith(WEIGHTS)}
        changed = [
            name for name, stamp in stamps.items() if self._sent.get(name) != stamp and name not in stays
        ]
        removed = [name for name in self._sent if name not in stamps]
        if not changed and not removed:
            return
        sent = [self._send_file(name) for name in changed]
        kept = {
            "node": self.node,
            "directory": str(self.path),
            "files": {name: sha256_file(self.path / name) for name in sorted(stays)},
        }
        self.desk.keep(
            self.job.place, self.attempt, sent, removed, kept if stays else None, self.is_model_here
        )
        self._sent = stamps

    def _send_file(self, name: str) -> FileFacts:
        digest, offset = hashlib.sha256(), 0
        with (self.path / name).open("rb") as file:
            while (data := file.read(PIECE_BYTES)) or offset == 0:
                self.desk.take(self.job.place, self.attempt, name, offset, data)
                digest.update(data)
                offset += len(data)
                if not data:
                    break
        return FileFacts(name, offset, digest.hexdigest())


def fetch_model(desk: DeskLike, needs: Needs) -> Path:
    """The base on this node: where it is on the machine of the bench, or a copy in the store. Others are left alone."""
    match where_is_model(needs):
        case "same":
            return Path(needs.model)
        case "copied":
            return _model_copy(needs)
    from filelock import FileLock

    path = _model_copy(needs)
    make_store_directory(path.parent)
    with FileLock(path.parent / ".lock"):  # of several runs that begin here at once, one copies
        if where_is_model(needs) != "copied":
            write_pieces(path, pieces(desk.model_piece), needs.model_sha256)
    return path


def where_is_model(needs: Needs) -> str:
    """ "same": at the same path; "copied": in the store; "other bytes": at the same path; "missing"."""
    given = Path(needs.model)
    if _has_bytes(given, needs):
        return "same"
    if _has_bytes(_model_copy(needs), needs):
        return "copied"
    return "other bytes" if given.is_file() else "missing"


def cluster_root() -> Path:
    """Where a node keeps runs and copies of models, in its store."""
    return store_root().absolute() / "cluster"


def pieces(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """All of a file that is read piece by piece."""
    offset = 0
    while data := read(offset):
        yield data
        offset += len(data)


def write_pieces(path: Path, data: Iterator[bytes], sha256: str) -> None:
    """Writes a file of this content. Raises SgLocalError where that fails, or other bytes came."""
    digest = hashlib.sha256()
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            for piece in data:
                digest.update(piece)
                file.write(piece)
        if digest.hexdigest() != sha256:
            raise SgLocalError(
                f"{path} did not arrive whole: it was changed meanwhile; run the same command again"
            )


def _model_copy(needs: Needs) -> Path:
    return cluster_root() / "models" / needs.model_sha256[:16] / Path(needs.model).name


def _has_bytes(path: Path, needs: Needs) -> bool:
    if not path.is_file() or (stat := path.stat()).st_size != needs.model_bytes:
        return False
    return _sha256_once(path, stat.st_size, stat.st_mtime_ns) == needs.model_sha256


@cache
def _sha256_once(path: Path, _size_bytes: int, _changed_ns: int) -> str:
    return sha256_file(path)


def _facts(rows: Iterable[Iterable[Any]]) -> list[FileFacts]:
    return [FileFacts(*row) for row in rows]


def _with_model(settings_text: str, model: Path) -> str:
    """A run's settings.toml with the model's path on this node."""
    values = tomllib.loads(settings_text)
    values["model"]["path"] = str(model)
    return toml_text(values)


def _is_same(ours: dict[str, Any] | None, theirs: dict[str, Any]) -> bool:
    """Whether two manifest entries are of the same work; the desk changes the hash of what names the base's path."""
    return ours is not None and ours["seconds"] == theirs["seconds"] and ours["reads"] == theirs["reads"]


def _text_or_none(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None


def _is_as_wanted(run: Path, facts: FileFacts) -> bool:
    path = run / facts.name
    return path.is_file() and path.stat().st_size == facts.size_bytes and sha256_file(path) == facts.sha256


def _shares_bench(needs: Needs) -> bool:
    try:
        return (Path(needs.bench) / needs.probe).read_text("utf-8") == needs.probe
    except (OSError, UnicodeDecodeError):
        return False


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.parents) if place.exists())
