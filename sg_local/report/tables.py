"""How tables for people are written: numbers, columns and lines, in all of them alike.

score(0.34)                              -> "0.340"
gain(0.2, [0.1, 0.3])                    -> "+0.200 [+0.100, +0.300]"
aligned(["refund", "25", "31"], [12, 6, 9]) -> "refund          25       31"
markdown_row(["sst2", "0.340"])          -> "| sst2 | 0.340 |"
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence

from sg_local.escape import markdown
from sg_local.plan.memory import GIB

MAX_LABELS_IN_TABLE = 30
LEAST_NAME_WIDTH = 18


def score(mean: float) -> str:
    """A metric's mean."""
    return f"{mean:.3f}"


def gain(mean: float, interval_95: Sequence[float] | None = None) -> str:
    """A difference of two means, with its interval where there is one."""
    if interval_95 is None:
        return f"{mean:+.3f}"
    low, high = interval_95
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def p_value(p: float) -> str:
    """The p of a test."""
    return f"{p:.2g}"


def share(part: float) -> str:
    """A share, 0..1."""
    return f"{part:.1%}"


def size(n_bytes: int) -> str:
    """Bytes of memory or disk; "-" for none."""
    if not n_bytes:
        return "-"
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB / 10 else f"{math.ceil(n_bytes / 1024**2)} MiB"


def counted(n: int, noun: str) -> str:
    """A number with its noun: "1 row", "2 rows", "0 rows"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def age(seconds: int) -> str:
    """How long ago something was: "3 days", "40 s"."""
    for name, length in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {name}"
    return f"{max(0, seconds)} s"


def columns(rows: Sequence[Sequence[str]], to_the_right: Collection[str] = ()) -> Iterator[str]:
    """The lines of a plain table as wide as its cells. The first row are the heads; some columns end at the right."""
    heads = rows[0]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        cells = [
            cell.rjust(width) if head in to_the_right else cell.ljust(width)
            for head, cell, width in zip(heads, row, widths, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def name_width(names: Iterable[str]) -> int:
    """Characters of a first column of names."""
    return max([LEAST_NAME_WIDTH, *map(len, names)])


def aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """A line of a plain table: the first cell to the left, the others to the right. Last cells may be left out."""
    name, *numbers = cells
    return f"{name:{widths[0]}}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(numbers, widths[1:], strict=False)
    )


def markdown_heads(heads: Sequence[str], n_texts: int = 1) -> list[str]:
    """The first two lines of a Markdown table: `n_texts` columns of text, then columns of numbers."""
    rules = ["---"] * n_texts + ["---:"] * (len(heads) - n_texts)
    return [markdown_row(heads), markdown_row(rules)]


def markdown_row(cells: Sequence[str], *, is_total: bool = False) -> str:
    """A line of a Markdown table; the name of a total is bold."""
    name, *numbers = map(markdown, cells)
    return "| " + " | ".join([f"**{name}**" if is_total else name, *numbers]) + " |"
