"""Texts out of a table that somebody wrote: checked, and every fault named with its place.

texts = Texts(faults, "task.toml: ")
texts.required({"name": 3}, "name")      "", and the fault "task.toml: name must be a text in quotes, not a number"
suggestion("Refunds", ["refund"])        ", did you mean 'refund'?"
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sg_local.files import Faults

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f]")  # C0 without tab and newline
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True)
class Texts:
    """Reads texts out of a table and notes what is wrong with them; a faulty text is read as an empty one."""

    faults: Faults
    prefix: str  # which file, line or table

    def add(self, fault: str) -> None:
        self.faults.add(self.prefix + fault)

    def check_keys(self, table: Mapping[str, object], known: Sequence[str]) -> None:
        for key in [key for key in table if key not in known][: self.faults.n_shown]:
            self.add(f"unknown key {show(key)}{suggestion(key, known)}: the keys are {', '.join(known)}")

    def required(self, table: Mapping[str, object], key: str, check_controls: bool = True) -> str:
        if key not in table:
            self.add(f"{_cut(key)} is missing")
            return ""
        return self.check(table[key], key, check_controls)

    def optional(self, table: Mapping[str, object], key: str) -> str | None:
        return self.check(table[key], key) or None if key in table else None

    def check(self, value: object, key: str, check_controls: bool = True) -> str:
        key = _cut(key)
        if not isinstance(value, str):
            self.add(f"{key} must be a text in quotes, not {kind_of(value)}")
            return ""
        if check_controls and (control := _CONTROL.search(value)):
            self.add(f"{key} holds the control character U+{ord(control[0]):04X}: remove it")
            return ""
        if _SURROGATE.search(value):
            self.add(f"{key} holds half of a surrogate pair: remove it")
            return ""
        if not value.strip():
            self.add(f"{key} is empty")
        return value.strip()


def normal_label(label: str) -> str:
    """As labels are compared: without case and surrounding white space, accents as one character with their letter."""
    return unicodedata.normalize("NFC", label).strip().lower()


def suggestion(word: str, known: Sequence[str]) -> str:
    """Looks past case."""
    by_lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(word.strip().lower(), by_lower, n=1)
    return f", did you mean {show(by_lower[close[0]])}?" if close else ""


def listing(labels: Sequence[str]) -> str:
    more = f", … {len(labels) - 10} more" if len(labels) > 10 else ""
    return ", ".join(show(label) for label in labels[:10]) + more


def show(text: str) -> str:
    return repr(_cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def kind_of(value: object) -> str:
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    names |= {list: "a list", tuple: "a list"}
    return names.get(
        type(value), "nothing" if value is None else "a table" if isinstance(value, dict) else "a date"
    )
