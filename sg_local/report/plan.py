"""What a run will need, as a table to read: a line for each stage, this machine, and what the numbers are made of.

plan_table(title, needs, machine, batch_size=16, batch_tokens=2100)
                GPU memory  host memory            disk    tokens
generate           1.2 GiB      0.4 GiB         1.0 MiB      71 k
this machine       6.0 GiB     31.2 GiB  102.4 GiB free
"""

from collections.abc import Callable, Mapping, Sequence

from sg_local.plan.machine import Machine
from sg_local.plan.memory import Need
from sg_local.progress import duration
from sg_local.report import tables

_WIDTHS = (14, 12, 13, 16, 10, 9)
_PARTS: tuple[tuple[str, Callable[[Need], dict[str, int]]], ...] = (
    ("GPU memory", lambda need: need.gpu),
    ("host memory", lambda need: need.host),
    ("pages of files in memory, which the system can take back", lambda need: need.cache),
    (
        "disk (16-bit copies: one at a time, shared by the model's runs)",
        lambda need: {**need.store_disk, **need.run_disk},
    ),
)


def plan_table(
    title: str,
    needs: Sequence[Need],
    machine: Machine,
    *,
    batch_size: int,
    batch_tokens: int,
    notes: Sequence[str] = (),
    seconds: Mapping[str, float] | None = None,
    timed_by: str = "",
) -> str:
    """The table, the parts, what this machine has, and the notes. batch_tokens: of a batch of batch_size rows.

    seconds: that each stage takes, told by what timed_by says.
    """
    heads = ["", "GPU memory", "host memory", "disk", "tokens", *(["time"] if seconds else [])]
    lines = [title, "", tables.aligned(heads, _WIDTHS)]
    for need in needs:
        sizes = map(tables.size, (need.gpu_bytes, need.host_bytes, need.disk_bytes))
        cells = [need.step, *sizes, f"{need.tokens / 1000:,.0f} k"]
        lines.append(tables.aligned([*cells, *([duration(seconds[need.step])] if seconds else [])], _WIDTHS))
    free = f"{tables.size(min(machine.run_disk_bytes, machine.store_disk_bytes))} free"
    sizes = map(tables.size, (machine.gpu_bytes, machine.host_bytes))
    lines.append(tables.aligned(["this machine", *sizes, free], _WIDTHS))
    if seconds:
        lines += [
            "",
            f"about {duration(sum(seconds.values()))} in all, {timed_by}; more where other work goes on beside",
        ]
    for heading, parts_of in _PARTS:
        groups = _grouped(needs, parts_of)
        lines += ["", heading] if groups else []
        for steps, parts in groups:
            sizes_of_parts = ", ".join(f"{name} {tables.size(n_bytes)}" for name, n_bytes in parts.items())
            lines.append(f"  {steps}: {sizes_of_parts}")
    lines += [
        "",
        f"a training batch of {tables.counted(batch_size, 'row')}: about {batch_tokens} tokens",
        *notes,
    ]
    return "\n".join(lines)


def _grouped(
    needs: Sequence[Need], parts_of: Callable[[Need], dict[str, int]]
) -> list[tuple[str, dict[str, int]]]:
    """Steps with the same parts under one heading; those without any left out."""
    groups: list[tuple[str, dict[str, int]]] = []
    for need in needs:
        parts = {name: n_bytes for name, n_bytes in parts_of(need).items() if n_bytes}
        if not parts:
            continue
        if groups and groups[-1][1] == parts:
            groups[-1] = (f"{groups[-1][0]}, {need.step}", parts)
        else:
            groups.append((need.step, parts))
    return groups
