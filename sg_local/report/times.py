"""How long the stages of a run took, beside what was told before, as a table to read.

times_table({"generate": {"told_seconds": 51.0, "seconds": 48.2}, ...})
            told   took
generate    51 s   48 s
in all     6 min  5 min
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sg_local.progress import duration
from sg_local.report import tables

_WIDTHS = (9, 8, 8)


def times_table(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The lines of the table. entries: of the manifest, with what was told."""
    yield tables.aligned(["", "told", "took"], _WIDTHS)
    told = {stage: float(entry.get("told_seconds", 0.0)) for stage, entry in entries.items()}
    took = {stage: float(entry["seconds"]) for stage, entry in entries.items()}
    for stage in entries:
        yield tables.aligned([stage, duration(told[stage]), duration(took[stage])], _WIDTHS)
    yield tables.aligned(["in all", duration(sum(told.values())), duration(sum(took.values()))], _WIDTHS)
