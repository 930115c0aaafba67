"""What a run will need before it starts, beside what this machine has, and what to change where it does not fit.

    plan_run("support-inbox", "vicuna-7b-v1.5", None, settings, gpu_bytes=6 * GIB).faults
    -> ["train: 13.9 GiB of GPU memory needed, 5.5 GiB of 6.0 GiB can be used: add --load-in-4bit", ...]

The numbers are those of memory.py: estimated.
"""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from sg_local.gguf_io.check_base import FINER, about_merging, types_to_try
from sg_local.models import model_store, resolve_model
from sg_local.plan.machine import Machine, nvidia_gpus, total_memory_bytes
from sg_local.plan.memory import Need, batch_tokens, estimate, finer_disk_bytes, remedies
from sg_local.plan.sizes import ModelSizes, TaskTokens, model_sizes, task_tokens
from sg_local.report import tables
from sg_local.runs.begin import read_model, require_chat_base
from sg_local.runs.given import check_task
from sg_local.settings import Settings, as_flag

# The desktop and the driver hold some of a card, the system some of the memory.
USABLE_SHARE_OF_GPU = 0.92
USABLE_SHARE_OF_HOST = 0.9


@dataclass(frozen=True)
class Plan:
    """The needs of all steps, what this machine has, what is worth knowing, and what is too little, a line each."""

    title: str
    settings: Settings
    batch_tokens: int
    needs: list[Need]
    machine: Machine
    notes: list[str]
    faults: list[str]

    def as_dict(self) -> dict[str, object]:
        """For a program: bytes by part."""
        return {
            "estimated": True,
            "fits": not self.faults,
            "faults": self.faults,
            "notes": self.notes,
            "machine": vars(self.machine),
            "batch_tokens": self.batch_tokens,
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
    """Looks at the task, the model's header and this machine; nothing is computed or written.

    gpu_bytes: of the GPU to plan for, 0 for none; None is the first one here. Raises InputError where task or model
    is wrong.
    """
    task, rows = check_task(task_source)
    file = read_model(resolve_model(model_source))
    require_chat_base(file, settings, [task])
    notes = [note for note in [about_merging(file.header, settings)] if note]
    model = model_sizes(file.header)
    quants = types_to_try(file.header, settings)
    if len(quants) > 1:
        notes.append(
            f"if the types of {file.path.name} prove too coarse for what was trained, model.gguf is made in finer "
            f"ones, at most {FINER}: up to {tables.size(finer_disk_bytes(model))} of disk for it, "
            f"and not {tables.size(model.file_bytes)}"
        )
    settings = replace(settings, quant=quants[0])
    real_inputs = [*rows.inputs, *(row.input for row in rows.labelled)]
    context_tokens = min(settings.n_ctx, model.context_length)
    tokens = task_tokens(task, settings, len(rows.test), context_tokens, real_inputs)
    machine = look_at_machine(run_dir or Path("runs") / task.name, gpu_bytes)
    needs, faults = compare(model, settings, tokens, machine)
    place = f"on {machine.gpu}" if machine.gpu_bytes else "on the CPU"
    title = f"{task.name} with {file.path.name} {place}: estimated, not measured"
    return Plan(title, settings, batch_tokens(settings, tokens), needs, machine, notes, faults)


def look_at_machine(run_dir: Path, gpu_bytes: int | None) -> Machine:
    """The memory and the free disk of this machine, and its first NVIDIA GPU unless another is planned for."""
    gpu = "a planned GPU"
    if gpu_bytes is None:
        gpu, gpu_bytes = "", 0
        for line in nvidia_gpus()[:1]:  # "NVIDIA GeForce RTX 3060, 12288 MiB"; training uses the first
            if match := re.fullmatch(r"(.*), (\d+) MiB", line):
                gpu, gpu_bytes = match[1], int(match[2]) * 1024**2
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
