"""tests/gpu/run, which proves a card where one is lent, does its work here too: on tiny models, on the processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

from command_line import ROOT

# Without the loop, which takes minutes: test_loop.py has it.
PARTS = ("training", "environment", "agreement", "speed", "proof")


def test_the_script_for_a_card_passes_on_the_processor(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "SG_LOCAL_HOME": ""}
    command = [str(ROOT / "tests/gpu/run"), "--cpu", "--only", *PARTS, "--work", str(tmp_path / "work")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    checks = {row["name"]: row["ok"] for row in json.loads((tmp_path / "acceptance.json").read_text())}
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(checks) >= len(PARTS)
    assert all(checks.values())
