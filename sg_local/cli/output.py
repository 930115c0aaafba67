"""Standard output in whatever encoding it has: a character that it cannot show is an escape, as in JSON.

PYTHONIOENCODING=latin-1 sg-local predict ...   ->   {"input": "Caf\\u00e9 \\ud83d\\ude00", "output": "order"}
"""

import codecs
import sys

import click

from sg_local.escape import printable

_ESCAPE = "sg_local.escape"


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass")
    pairs = zip(units[::2], units[1::2], strict=True)
    return "".join(f"\\u{high:02x}{low:02x}" for high, low in pairs), error.end


codecs.register_error(_ESCAPE, _escape)


def escape_what_stdout_lacks() -> None:
    """From now on no text ends a command because stdout has no such character."""
    if hasattr(sys.stdout, "reconfigure"):  # it is None where it was closed
        sys.stdout.reconfigure(errors=_ESCAPE)


def echo_utf8(text: str, line_end: str = "\n") -> None:
    """Writes a line of data, at once: in UTF-8 whatever the locale; to a terminal as that shows it."""
    if sys.stdout is None:  # the caller closed it
        return
    stream = getattr(sys.stdout, "buffer", None)
    if stream is None or sys.stdout.isatty():
        click.echo(printable(text))
        return
    sys.stdout.flush()
    stream.write((text + line_end).encode())
    stream.flush()


def echo_json(text: str) -> None:
    """Writes JSON: in UTF-8, as it has to be, or in ASCII where stdout is something else."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if codecs.lookup(encoding).name != "utf-8":
        text = text.encode("ascii", _ESCAPE).decode()
    click.echo(text)
