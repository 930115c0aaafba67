"""Which file makes the data: the base, or its 16-bit copy where that is faster; and one writer of copies."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from disk import Disk, files_in
from filelock import Timeout
from gguf_models import write_model
from messages import assert_says
from tiny_models import write_tiny_llama

import sg_local.gguf_io.base_weights as base_weights
import sg_local.llama.library as library
import sg_local.llama.quantize as quantize
import sg_local.llama.speed as speed
import sg_local.proof.working_copies as weights
from sg_local.errors import SgLocalError, outside_cause
from sg_local.files import atomic_path, find_leftovers, partial_directory
from sg_local.gguf_header import read_header
from sg_local.plan.times import Speed
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run
from sg_local.settings import Settings
from sg_local.task import load_task

Seconds = dict[str, float]


@pytest.fixture
def run(tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on a quantized model, and a copy that is made by writing a name."""
    monkeypatch.setenv("SG_LOCAL_HOME", str(tmp_path / "store"))
    monkeypatch.setattr(library, "supports_gpu", lambda: False)
    monkeypatch.setattr(
        quantize, "requantize", lambda _source, target, file_type, _n_threads: target.write_text(file_type)
    )
    model = write_model(tmp_path / "quantized.gguf")
    run, _ = create_or_open_run(
        tmp_path / "run", load_task(str(task)), model, Settings(prompt_format="vicuna")
    )
    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], list[str]]:
    """clock(base, copy) sets the seconds that both take, and returns the files that will be timed."""

    def set_to(base: float, copy: float) -> list[str]:
        timed: list[str] = []

        def measure(path: Path, **_engine: int) -> Speed:
            timed.append(path.name)
            tokens_per_second = 1 / (copy if path.name == "f16.gguf" else base)
            return Speed(tokens_per_second, tokens_per_second)

        monkeypatch.setattr(speed, "measure_speed", measure)
        return timed

    return set_to


def test_a_faster_copy_is_used_and_timed_once(
    run: Run, clock: Callable[[float, float], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    timed = clock(3.0, 2.0)
    assert weights.generating_model(run).name == "f16.gguf"
    assert "1.5 times as fast here; what is scored is the file itself" in capsys.readouterr().err
    assert weights.generating_model(run).name == "f16.gguf"
    assert timed == ["quantized.gguf", "f16.gguf"]


def test_a_copy_that_gains_little_is_not_used(run: Run, clock: Callable[[float, float], list[str]]) -> None:
    clock(2.2, 2.0)
    assert weights.generating_model(run) == run.model.path


def test_what_was_timed_on_another_machine_or_is_damaged_is_timed_again(
    run: Run, clock: Callable[[float, float], list[str]]
) -> None:
    timed = clock(3.0, 2.0)
    path = weights.generating_model(run).with_name("speed.json")
    told = json.loads(path.read_text())
    path.write_text(json.dumps({"another machine": next(iter(told.values()))}))
    weights.generating_model(run)
    assert set(json.loads(path.read_text())) == {"another machine", *told}
    path.write_text("{")
    weights.generating_model(run)
    assert len(timed) == 6


@pytest.mark.parametrize("reason", ["never", "gpu", "16 bits", "memory"])
def test_where_no_copy_can_pay_none_is_made(
    run: Run, clock: Callable[[float, float], list[str]], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    timed = clock(3.0, 1.0)
    if reason == "never":
        run = replace(run, settings=replace(run.settings, working_copy="never"))
    elif reason == "gpu":
        monkeypatch.setattr(library, "supports_gpu", lambda: True)
    elif reason == "16 bits":
        header = run.base_header
        run = replace(run)  # a run reads its header once
        plain = tuple(tensor for tensor in header.tensors if tensor.type_name in ("F32", "F16", "BF16"))
        monkeypatch.setattr(Run, "base_header", replace(header, tensors=plain))
    else:
        monkeypatch.setattr(weights, "total_memory_bytes", lambda: 1000)
    assert weights.generating_model(run) == run.model.path
    assert not timed


def place_of(run: Run) -> Path:
    return weights.copies_root() / run.model.sha256[:16]


def leave_behind(run: Run, make: Callable[[Path], None]) -> list[str]:
    """What a process leaves that is killed while `make` writes into the directory of the base's copies."""
    place_of(run).mkdir(parents=True, exist_ok=True)
    before = {path.name for path in place_of(run).iterdir()}
    child = os.fork()
    if child == 0:
        with weights.lock_copies(place_of(run)):
            make(place_of(run))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    return sorted({path.name for path in place_of(run).iterdir()} - before - {".lock"})


def killed_in_f16(place: Path) -> None:
    with atomic_path(place / weights.F16_COPY) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def killed_in_torch_copy(place: Path) -> None:
    partial = partial_directory(place / weights.TORCH_COPY)
    partial.mkdir()
    (partial / "0.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.parametrize("make", [killed_in_f16, killed_in_torch_copy])
@pytest.mark.parametrize("is_there", [False, True])
def test_what_a_killed_writer_left_is_cleared_by_the_next_holder_of_the_lock(
    run: Run, make: Callable[[Path], None], is_there: bool
) -> None:
    if is_there:  # then nothing is written anew
        weights.f16_gguf(run.model, 1)
    leftovers = [leave_behind(run, make) for _ in range(2 if make is killed_in_f16 else 1)]
    assert all(len(names) == 1 for names in leftovers)
    copy = weights.f16_gguf(run.model, 1)
    assert {path.name for path in place_of(run).iterdir()} == {".lock", "base.json", "f16.gguf"}
    assert copy.read_text() == "F16"


def test_a_link_in_the_place_of_a_leftover_is_not_followed(run: Run, tmp_path: Path) -> None:
    weights.f16_gguf(run.model, 1)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / ".a.0123abcd.tmp").write_text("theirs")
    partial_directory(place_of(run) / weights.TORCH_COPY).symlink_to(theirs)
    (place_of(run) / "archive").symlink_to(theirs)
    weights.f16_gguf(run.model, 1)
    assert (theirs / ".a.0123abcd.tmp").read_text() == "theirs"


def test_a_living_writers_temporary_stays(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run of the base waits for the copy that the first one writes."""
    writes, may_end = threading.Event(), threading.Event()
    made = []

    def requantize(_source: Path, target: Path, file_type: str, _n_threads: int) -> None:
        with atomic_path(target) as temporary:
            temporary.write_text(file_type)
            writes.set()
            assert may_end.wait(30)
            made.append(temporary)

    monkeypatch.setattr(quantize, "requantize", requantize)
    runs = [threading.Thread(target=weights.f16_gguf, args=(run.model, 1)) for _ in range(2)]
    runs[0].start()
    assert writes.wait(30)
    runs[1].start()
    time.sleep(0.2)
    assert len(find_leftovers(place_of(run))) == 1
    may_end.set()
    for thread in runs:
        thread.join(30)
    assert len(made) == 1
    assert (place_of(run) / "f16.gguf").read_text() == "F16"


def test_all_that_is_written_beside_the_copies_is_written_by_the_locks_holder(
    run: Run, clock: Callable[[float, float], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(3.0, 2.0)
    written = []
    write_json = weights.write_json

    def checked(path: Path, value: object) -> None:
        def take() -> None:
            with pytest.raises(Timeout), weights.lock_copies(path.parent, timeout_seconds=0):
                pass
            written.append(path.name)

        other = threading.Thread(target=take)
        other.start()
        other.join(30)
        write_json(path, value)

    monkeypatch.setattr(weights, "write_json", checked)
    weights.generating_model(run)
    assert written == ["base.json", "speed.json"]


def torch_weights(run: Run) -> object:
    with weights.training_weights(run) as path:
        return files_in(path)


COPIES: dict[str, Callable[[Run], object]] = {
    "hf": torch_weights,
    "f16.gguf": lambda run: weights.f16_gguf(run.model, 1).read_bytes(),
}


def fault_of(work: Callable[[], object]) -> str:
    """What a command says of its failure; "" where it has none."""
    try:
        work()
    except (SgLocalError, OSError) as error:
        return outside_cause(error) or str(error)
    return ""


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("way", ["killed", "no room"])
def test_a_copy_is_whole_or_not_there_and_made_by_the_next(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    """At every place where the directory of the copies is changed."""

    def requantize(_source: Path, target: Path, _file_type: str, _n_threads: int) -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"weights")

    monkeypatch.setattr(quantize, "requantize", requantize)
    disk = Disk(monkeypatch)
    failing = disk.killed_at if way == "killed" else disk.full_from
    with failing(None):
        whole = COPIES[name](run)
    unbroken, n_changes = files_in(weights.copies_root()), disk.count
    assert n_changes >= 6
    for number in range(1, n_changes + 1):
        shutil.rmtree(weights.copies_root().parent, ignore_errors=True)
        where = f"{way} at change {number} of {n_changes}"
        with failing(number):
            if way == "killed":
                COPIES[name](run)
            elif told := fault_of(lambda: COPIES[name](run)):
                assert_says(told, "No space left on device")
                assert any(remedy in told for remedy in ("free some space", "free space", "SG_LOCAL_HOME"))
            else:  # the copy served, and could not be removed
                assert (name, number) == ("hf", n_changes)
        if way == "no room":
            assert find_leftovers(weights.copies_root()) == [], where
            assert not list(weights.copies_root().rglob("*.partial")), where
        assert COPIES[name](run) == whole, where
        assert files_in(weights.copies_root()) == unbroken, where


def test_llama_cpp_without_room_for_a_copy_says_so(tmp_path: Path) -> None:
    """The system itself refuses to let the file grow."""
    resource = pytest.importorskip("resource")
    base = write_tiny_llama(tmp_path / "base.gguf")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(SgLocalError) as caught:
            quantize.requantize(base, tmp_path / "copy.gguf", "F16", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_says(str(caught.value), str(tmp_path), "free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_llama_cpp_is_given_paths_that_are_not_utf8_as_they_are(tmp_path: Path) -> None:
    base = write_tiny_llama(tmp_path / "base.gguf")
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.mkdir()
    base.rename(odd / "base.gguf")
    quantize.requantize(odd / "base.gguf", odd / "copy.gguf", "F16", 1)
    assert {tensor.type_name for tensor in read_header(odd / "copy.gguf").tensors} == {"F16", "F32"}


def torch_copy(_gguf: Path, path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_text("safetensors")


def test_one_copy_is_there_at_a_time(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B model has 13 GB of each: what a training loads is gone when it has loaded it."""
    monkeypatch.setattr(base_weights, "write_base_weights", torch_copy)
    names = {".lock", "base.json"}
    copy = weights.f16_gguf(run.model, 1)
    with weights.training_weights(run) as directory:
        assert (directory / "model.safetensors").read_text() == "safetensors"
        assert {path.name for path in place_of(run).iterdir()} == {*names, "hf"}
        with pytest.raises(Timeout), weights.lock_copies(place_of(run), timeout_seconds=0):
            pass  # another run of this base waits, and does not make room
    assert {path.name for path in place_of(run).iterdir()} == names

    with pytest.raises(ValueError, match="out of memory"), weights.training_weights(run):
        raise ValueError("out of memory")
    assert {path.name for path in place_of(run).iterdir()} == {*names, "hf"}  # for the next attempt
    assert weights.f16_gguf(run.model, 1) == copy
    assert {path.name for path in place_of(run).iterdir()} == {*names, "f16.gguf"}


def test_a_link_in_the_place_of_the_other_copy_stays(run: Run, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "model.safetensors").write_text("theirs")
    place_of(run).mkdir(parents=True)
    (place_of(run) / "hf").symlink_to(theirs)
    weights.f16_gguf(run.model, 1)
    assert (place_of(run) / "hf" / "model.safetensors").read_text() == "theirs"
