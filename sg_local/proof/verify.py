"""Is a run still what its manifest says: hashes, the base's fingerprint, and the exported files beside torch.

    verify_run(run, with_parity=True)
    -> Passed("adapter.gguf", "sha256 3f2a..."), Passed("parity", "adapter within 0.031 logits of torch, ...")

Raises SgLocalError with every fault; changes nothing.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sg_local import child_process
from sg_local.errors import InputError, SgLocalError
from sg_local.files import sha256_file
from sg_local.gguf_header import read_header
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.runs.directory import Run, open_run
from sg_local.runs.handed_out import WAY_FILE, faults_of, read_fallback
from sg_local.settings import STAGES


class Passed(NamedTuple):
    """A check that passes, and what shows it."""

    what: str
    evidence: str


def verify_run(run: Run, *, with_parity: bool) -> Iterator[Passed]:
    """Yields each check that passes; raises at the end where one does not."""
    for what, evidence in child_process.values_from_child(
        "verify", f"{__name__}.checks", run_dir=str(run.path), with_parity=with_parity
    ):
        yield Passed(what, evidence)


def checks(run_dir: str, with_parity: bool) -> Iterator[Passed]:
    """The same, in the process where llama.cpp and torch work."""
    run = open_run(Path(run_dir))
    if with_parity:
        _require_packages()
    run.check_model()
    faults: list[str] = []
    yield from _files(run, faults)
    if sha256_file(run.model.path) != run.model.sha256:
        faults.append(f"the base model {run.model.path} is no longer the file that the run began with")
    else:
        yield Passed(run.model.path.name, f"sha256 {run.model.sha256[:16]}")
    if fallback := read_fallback(run):
        changed = list(faults_of(run, fallback))
        faults += changed
        if not changed:
            yield Passed(WAY_FILE, f"decided by these scores: {fallback.way}")
    if not faults:
        yield from _exported(run, faults)
    if with_parity and not faults:
        yield from _parity(run, faults)
    if faults:
        raise SgLocalError("\n".join(faults))


def _files(run: Run, faults: list[str]) -> Iterator[Passed]:
    """What every stage read and wrote, against its manifest entry."""

    @cache
    def sha256_of(name: str) -> str | None:
        return sha256_file(run.file(name)) if run.file(name).is_file() else None

    stages = run.manifest()["stages"]
    reported: set[str] = set()
    for stage in STAGES:
        if stage not in stages:
            faults.append(f"{stage} is not finished: `sg-local run` with the same arguments goes on")
            continue
        redo = f"`sg-local {stage} {run.path} --redo` makes it again"
        for name, expected in stages[stage]["writes"].items():
            if sha256_of(name) is None:
                faults.append(f"{run.file(name)} {run.left_on_node(name, expected) or f'is gone: {redo}'}")
            elif sha256_of(name) != expected:
                faults.append(f"{run.file(name)} is not what {stage} wrote: {redo}")
            else:
                yield Passed(name, f"sha256 {expected[:16]}")
        for name, expected in stages[stage]["reads"].items():
            is_left = sha256_of(name) is None and run.left_on_node(name, expected)
            if sha256_of(name) != expected and not is_left and name not in reported:
                reported.add(name)  # of the first stage that read it; those after it run again with it
                faults.append(
                    f"{run.file(name)} is not what {stage} read: `sg-local {stage} {run.path} --redo`"
                )
        for name, was_there in stages[stage].get("looks_for", {}).items():
            if run.file(name).exists() != was_there and name not in reported:
                reported.add(name)
                change = "is gone since" if was_there else "was not there when"
                faults.append(f"{run.file(name)} {change} {stage} ran: `sg-local {stage} {run.path} --redo`")
        if run.changed_settings(stage, stages[stage]):
            faults.append(f"{run.file('settings.toml')} is not what {stage} ran with: restore it")


def _exported(run: Run, faults: list[str]) -> Iterator[Passed]:
    expected = fingerprint(run.model.path)
    for name in ("adapter.gguf", "model.gguf"):
        carried = read_header(run.file(name)).metadata.get("sg_local.base_fingerprint")
        if carried != expected:
            faults.append(
                f"{run.file(name)} was made for another base (fingerprint {carried!r}, expected {expected}): "
                f"`sg-local export {run.path} --redo`"
            )
        else:
            yield Passed(name, f"made for this base, fingerprint {expected[:16]}")


def _parity(run: Run, faults: list[str]) -> Iterator[Passed]:
    from sg_local.proof.parity import trained_in_run

    parity = trained_in_run(run, run.file("adapter.gguf")).compare(run.file("model.gguf"))
    if parity.faults():
        faults += parity.faults()
        faults.append(
            "these files passed when they were exported, perhaps with other versions of llama.cpp or torch: "
            f"`sg-local export {run.path} --redo` makes and proves them anew"
        )
        return
    yield Passed(
        "parity",
        f"adapter within {parity.max_logit_difference:.3f} logits of torch, "
        f"model.gguf mean KL {parity.mean_kl_nats:.4f} nats, same first choice {parity.argmax_equal_share:.1%}",
    )


def _require_packages() -> None:
    from sg_local.finetune.environment import require_training_packages

    try:
        require_training_packages(("torch", "transformers", "peft"))
    except InputError as error:
        raise InputError(f"{error}; or leave the comparison with torch out: --no-parity") from error
