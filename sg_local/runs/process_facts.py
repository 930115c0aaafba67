"""What a manifest says of the process that did a stage: versions, and the peak of its memory.

    versions()           {"python": "3.11.9", "sg-local": "0.1.0", "torch": "2.13.0", ...}
    peak_memory_bytes()  1812348928

Nothing is imported for it.
"""

import sys


def versions() -> dict[str, str]:
    """Versions of what this process could have used, without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in (
        "sg-local",
        "llama-cpp-python",
        "gguf",
        "torch",
        "transformers",
        "trl",
        "peft",
        "unsloth",
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
