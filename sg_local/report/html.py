"""Values and a template become one HTML file that asks for nothing else, whatever the values' texts hold.

    small_page("page.html.j2", {"scores": ..., "made": ...})   -> "<!doctype html>...", at most MAX_PAGE_BYTES

Every text from a task, a model or a file goes through `printable` and then through Jinja's autoescape; the page's
Content-Security-Policy (W3C, CSP Level 3) lets no script run but its own, and nothing be loaded.
"""

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sg_local.escape import printable
from sg_local.report import tables

PAGE = "report.html"  # in the directory that it tells of
MAX_PAGE_BYTES = 2_000_000
# Characters of a text, and rows of a table: the first that make a page small enough.
_LIMITS = ((2000, 2000), (500, 2000), (150, 1000), (60, 300))


def small_page(template: str, values: Mapping[str, Any]) -> str:
    """The page as HTML. With very long or very many rows it shows less of each, and says so."""
    page = ""
    for max_characters, max_rows in _LIMITS:
        page = _rendered(template, values, max_characters, max_rows)
        if len(page.encode()) <= MAX_PAGE_BYTES:
            break
    return page


def _rendered(template: str, values: Mapping[str, Any], max_characters: int, max_rows: int) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {
        "score": tables.score,
        "share": tables.share,
        "p_value": tables.p_value,
        "gain": tables.gain,
        "size": tables.size,
        "shortened": partial(_shortened, max_characters=max_characters),
        "picture": Markup,  # of what charts.py drew; nothing else is let through
    }
    script = (here / "page.js").read_text("utf-8")
    return environment.get_template(template).render(
        **values,
        style=Markup((here / "page.css").read_text("utf-8")),
        script=Markup(script),
        script_sha256=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        max_rows=max_rows,
    )


def _shown(value: object) -> object:
    """What stands for a value in the page: of a plain text, what is not plain to see as an escape."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _shortened(text: str, max_characters: int) -> str:
    return text if len(text) <= max_characters else f"{text[:max_characters]}… ({len(text)} characters)"
