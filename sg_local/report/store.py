"""What lies in the store, as lines to read.

what                 model                              size      age   used by
working copy hf      SmolLM2-135M-Instruct.Q4_1.gguf  258 MiB   3 days  runs/support-inbox
"""

from collections.abc import Iterator, Sequence
from typing import TypedDict

from sg_local.report import tables

HEADS = ("what", "model", "sha256", "size", "age", "used by")
MAX_RUNS_SHOWN = 3


class StoreItem(TypedDict):
    """One thing that can be freed, or is not ours to free."""

    what: str  # "model", "working copy hf", "working copy f16.gguf", "leftover", "unfinished download", "not ours"
    path: str
    model: str | None  # its file's name
    sha256: str | None  # of the model, 16 digits at least
    size_bytes: int
    age_seconds: int  # since it was last written
    used_by: list[str]  # the runs here that have this model


def store_lines(items: Sequence[StoreItem]) -> Iterator[str]:
    """A table with a line for each item."""
    return tables.columns([HEADS, *(_cells(item) for item in items)], ("size", "age"))


def _cells(item: StoreItem) -> tuple[str, ...]:
    runs = item["used_by"]
    more = f" and {len(runs) - MAX_RUNS_SHOWN} more" if len(runs) > MAX_RUNS_SHOWN else ""
    name = item["model"] or item["path"].rsplit("/", 1)[-1]
    return (
        item["what"],
        name,
        (item["sha256"] or "-")[:8],
        tables.size(item["size_bytes"]),
        tables.age(item["age_seconds"]),
        ", ".join(runs[:MAX_RUNS_SHOWN]) + more or "-",
    )
