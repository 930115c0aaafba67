"""What a run will need before it starts, beside what this machine has, and what to change where it does not fit.

    plan_run("support-inbox", "vicuna-7b-v1.5", None, settings, gpu_bytes=6 * GIB).faults
    -> [..., "train: 13.8 GiB of GPU memory needed, 5.5 GiB of 6.0 GiB can be used: add --load-in-4bit"]

The numbers are those of memory.py: estimated.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sg_local.gguf_io.check_base import FINER, about_merging, types_to_try
from sg_local.models import find_absent, model_store, resolve_model
from sg_local.plan.machine import (
    Machine,
    card_bytes_in_use,
    card_in_use,
    memory_bytes,
    total_memory_bytes,
)
from sg_local.plan.memory import Need, batch_tokens, estimate, finer_disk_bytes, remedies
from sg_local.plan.sizes import ModelSizes, TaskTokens, listed_sizes, model_sizes, task_tokens
from sg_local.report import tables
from sg_local.runs.begin import ModelFile, describe_base, read_model, require_chat_base
from sg_local.runs.given import check_task
from sg_local.runs.times import Told, tell_before
from sg_local.settings import Settings, as_flag
from sg_local.task import Task

# The desktop and the driver hold some of a card, the system some of the memory.
USABLE_SHARE_OF_GPU = 0.92
USABLE_SHARE_OF_HOST = 0.9


# A task with short texts: what is told of a model without knowing the task.
SMALL_TASK = TaskTokens(instruction=100, demonstrations=200, input=60, answer=10, labels=20, test_rows=100)
# What may be changed so that a model fits, the least first.
_TRIED: dict[str, Any] = {"load_in_4bit": True, "n_ctx": 2048}
_TRIED_TO_FIT = (("load_in_4bit",), ("load_in_4bit", "n_ctx"))


@dataclass(frozen=True)
class Plan:
    """The needs of all stages, what this machine has, what is worth knowing, and what is too little, a line each."""

    title: str
    settings: Settings
    batch_tokens: int
    needs: list[Need]
    machine: Machine
    notes: list[str]
    faults: list[str]
    told: Told | None = (
        None  # how long the stages take; None where this machine was not measured with this model
    )

    def as_dict(self) -> dict[str, object]:
        """For a program: bytes by part."""
        return {
            "estimated": True,
            "fits": not self.faults,
            "faults": self.faults,
            "notes": self.notes,
            "machine": vars(self.machine),
            "batch_tokens": self.batch_tokens,
            "time": self.told.as_dict() if self.told else None,
            "steps": [
                {
                    "step": need.step,
                    "gpu_bytes": need.gpu_bytes,
                    "host_bytes": need.host_bytes,
                    "disk_bytes": need.disk_bytes,
                    "tokens": need.tokens,
                    "gpu": need.gpu,
                    "host": need.host,
                    "cache": need.cache,
                    "disk": {**need.store_disk, **need.run_disk},
                }
                for need in self.needs
            ],
        }


def plan_run(
    task_source: str, model_source: str, run_dir: Path | None, settings: Settings, gpu_bytes: int | None
) -> Plan:
    """Looks at the task, the model's header and this machine, and how fast that is with the model, measured once.

    gpu_bytes: of the GPU to plan for, 0 for none; None is the one that a run uses here. Only then time is
    told, of a model that is here.
    Raises InputError where task or model is wrong.
    """
    task, rows = check_task(task_source)
    base = _read_base(model_source, settings, task)
    notes, model = base.notes, base.sizes
    if len(base.quants) > 1:
        notes.append(
            f"if the types of {base.file_name} prove too coarse for what was trained, model.gguf is made in finer "
            f"ones, at most {FINER}: up to {tables.size(finer_disk_bytes(model))} of disk for it, "
            f"and not {tables.size(model.file_bytes)}"
        )
    settings = replace(settings, quant=base.quants[0])
    real_inputs = [*rows.inputs, *(row.input for row in rows.labelled)]
    context_tokens = min(settings.n_ctx, model.context_length)
    tokens = task_tokens(task, settings, len(rows.test), context_tokens, real_inputs)
    machine = look_at_machine(run_dir or Path("runs") / task.name, gpu_bytes)
    needs, faults = compare(model, settings, tokens, machine)
    if gpu_bytes is None and (held := card_bytes_in_use()) > (1 - USABLE_SHARE_OF_GPU) * machine.gpu_bytes:
        notes.append(
            f"other programs hold {tables.size(held)} of {machine.gpu} now: close them before the run, or it may lack "
            "what is told to fit here"
        )
    place = f"on {machine.gpu}" if machine.gpu_bytes else "on the CPU"
    title = f"{task.name} with {base.file_name} {place}: estimated, not measured"
    told = None
    if base.file and gpu_bytes is None and not faults:
        told = tell_before(describe_base(base.file, settings), base.file.header, settings, task, rows)
    return Plan(title, settings, batch_tokens(model, settings, tokens), needs, machine, notes, faults, told)


class _Base(NamedTuple):
    """A model as it is planned with: from its header, or from the list of models where its file is not here."""

    file_name: str
    sizes: ModelSizes
    quants: tuple[str, ...]  # types of model.gguf that an export tries
    notes: list[str]
    file: ModelFile | None


def _read_base(source: str, settings: Settings, task: Task) -> _Base:
    if absent := find_absent(source):
        note = (
            f"{absent.name} is not on this machine, and planned with by its sizes in the list of models; once "
            f"`sg-local models pull {absent.name}` has fetched it ({tables.size(absent.size_bytes)}), time is told too"
        )
        quants: tuple[str, ...] = ("base", FINER) if settings.quant == "auto" else (settings.quant,)
        return _Base(absent.file_name, listed_sizes(absent), quants, [note], None)
    file = read_model(resolve_model(source))
    require_chat_base(file, settings, [task])
    notes = [note for note in [about_merging(file.header, settings)] if note]
    quants = types_to_try(file.header, settings)
    return _Base(file.path.name, model_sizes(file.header), quants, notes, file)


def how_it_fits(model: ModelSizes, machine: Machine) -> str:
    """Whether a run of a small task fits this machine: "fits", "fits with --load-in-4bit", "too large"."""
    tried: dict[str, Settings] = {"fits": Settings()}
    for names in _TRIED_TO_FIT:
        changed = replace(Settings(), **{name: _TRIED[name] for name in names})
        tried[f"fits with {_changes(Settings(), changed)}"] = changed
    for words, settings in tried.items():
        needs = estimate(
            model,
            replace(settings, quant="base"),
            SMALL_TASK,
            on_gpu=machine.gpu_bytes > 0,
            memory_bytes=machine.host_bytes,
        )
        if all(_fits(need, machine) for need in needs):
            return "too little disk" if _disk_faults(needs, machine) else words
    return "too large"


def look_at_machine(run_dir: Path, gpu_bytes: int | None) -> Machine:
    """The memory and the free disk of this machine, and the NVIDIA GPU in use unless another is planned for."""
    gpu = "a planned GPU"
    if gpu_bytes is None:
        card = card_in_use()  # "NVIDIA GeForce RTX 3060, 12288 MiB"
        gpu, gpu_bytes = card.rpartition(", ")[0], memory_bytes(card)
    run_place, store_place = _existing(run_dir), _existing(model_store())
    return Machine(
        gpu=gpu if gpu_bytes else "",
        gpu_bytes=gpu_bytes,
        host_bytes=total_memory_bytes(),
        run_disk_bytes=shutil.disk_usage(run_place).free,
        store_disk_bytes=shutil.disk_usage(store_place).free,
        is_one_disk=run_place.stat().st_dev == store_place.stat().st_dev,
    )


def compare(
    model: ModelSizes, settings: Settings, tokens: TaskTokens, machine: Machine
) -> tuple[list[Need], list[str]]:
    """The needs on this machine, and a line for each that it does not have, with what to change."""

    def needs_of(changed: Settings) -> dict[str, Need]:
        estimated = estimate(
            model, changed, tokens, on_gpu=machine.gpu_bytes > 0, memory_bytes=machine.host_bytes
        )
        return {need.step: need for need in estimated}

    needs = list(needs_of(settings).values())
    steps: dict[str, list[str]] = {}  # what is lacking -> the steps that lack it
    for need in needs:
        if _fits(need, machine):
            continue
        advice = "no setting makes it fit: take a smaller model, or a machine with more"
        on_gpu = machine.gpu_bytes > 0
        for changed in remedies(need.step, model, settings, tokens, on_gpu=on_gpu):
            if _fits(needs_of(changed)[need.step], machine):
                advice = f"add {_changes(settings, changed)}"
                break
        steps.setdefault(f"{_lack(need, machine)}: {advice}", []).append(need.step)
    faults = [f"{', '.join(names)}: {lack}" for lack, names in steps.items()]
    return needs, faults + _disk_faults(needs, machine)


def _fits(need: Need, machine: Machine) -> bool:
    on_gpu = need.gpu_bytes <= USABLE_SHARE_OF_GPU * machine.gpu_bytes
    return on_gpu and (not machine.host_bytes or need.host_bytes <= USABLE_SHARE_OF_HOST * machine.host_bytes)


def _lack(need: Need, machine: Machine) -> str:
    lacking = []
    for what, needed, there, share in (
        ("GPU memory", need.gpu_bytes, machine.gpu_bytes, USABLE_SHARE_OF_GPU),
        ("host memory", need.host_bytes, machine.host_bytes, USABLE_SHARE_OF_HOST),
    ):
        if there and needed > share * there:
            usable = tables.size(int(share * there))
            lacking.append(
                f"{tables.size(needed)} of {what} needed, {usable} of {tables.size(there)} can be used"
            )
    return " and ".join(lacking)


def _changes(before: Settings, after: Settings) -> str:
    old = before.as_dict()
    return " ".join(as_flag(name, value) for name, value in after.as_dict().items() if value != old[name])


def _disk_faults(needs: list[Need], machine: Machine) -> list[str]:
    run_bytes = sum(sum(need.run_disk.values()) for need in needs)
    store_bytes = max(sum(need.store_disk.values()) for need in needs)  # one copy at a time
    places = [
        ("the run", run_bytes, machine.run_disk_bytes, "another --run DIR"),
        (
            "a 16-bit copy of the model",
            store_bytes,
            machine.store_disk_bytes,
            "SG_LOCAL_HOME on another disk",
        ),
    ]
    if machine.is_one_disk:
        places = [
            (
                "the run with a 16-bit copy of the model",
                run_bytes + store_bytes,
                machine.run_disk_bytes,
                "another disk",
            )
        ]
    return [
        f"{what} needs {tables.size(needed)} of disk, and {tables.size(free)} are free: free some, or take {remedy}"
        for what, needed, free, remedy in places
        if needed > free
    ]


def _existing(path: Path) -> Path:
    """The path or the nearest directory above it that there is."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
