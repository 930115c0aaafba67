"""What was checked, as lines to read: of a machine (`doctor`) and of a run (`verify`).

finding_lines({"what": "torch", "ok": False, "needed": True, "found": "not installed", "fix": "pip install …"})
missing torch              not installed
                           -> pip install …
passed_line("adapter.gguf", "sha256 3f2a…")
ok   adapter.gguf                         sha256 3f2a…
"""

from typing import TypedDict


class Finding(TypedDict):
    """What a machine has of one thing, and what to do where that is too little."""

    what: str
    ok: bool
    needed: bool  # by every run
    found: str
    fix: str | None


def finding_lines(finding: Finding) -> list[str]:
    """What there is, and under it what to do."""
    mark = "ok" if finding["ok"] else "missing" if finding["needed"] else "advice"
    lines = [f"{mark:7} {finding['what']:18} {finding['found']}"]
    return [*lines, f"{'':26} -> {finding['fix']}"] if finding["fix"] else lines


def passed_line(what: str, evidence: str) -> str:
    """One check of a run that passes."""
    return f"ok   {what:36} {evidence}"
