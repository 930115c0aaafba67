"""Loads and frees llama.cpp's models. Only here a GGUF is opened for computing.

    with load_model(Path("smollm2.gguf")) as model:
        model.pointer, model.vocab      # handles for llama_cpp's low-level functions

Source: llama.h of the llama.cpp that llama-cpp-python carries. Its high-level class `Llama` is not used: it
holds one sequence and ignores unknown arguments in silence.
"""

import ctypes
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp

from sg_local.child_process import card_is_full, native_code_uses, no_card_memory, tell_native_error
from sg_local.errors import InputError
from sg_local.escape import one_line
from sg_local.gguf_header import GgufHeader, read_model_header, require_supported
from sg_local.plan.machine import card_in_use
from sg_local.progress import say

_last_messages: deque[str] = deque(maxlen=8)
_devices: list[str] = []  # of the model that is being loaded, as llama.cpp names them
_DEVICE = re.compile(
    r"using device \S+ \((.*?)\) \("
)  # "using device CUDA0 (NVIDIA H200) (0000:01:00.0) - 140 MiB free"


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_message(level: int, text: bytes, _user_data: Any) -> None:
    message = one_line(text.decode("utf-8", "replace").strip())
    if match := _DEVICE.search(message):
        _devices.append(match[1])
    if level >= 3:  # GGML_LOG_LEVEL_WARN
        _last_messages.append(message)
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        tell_native_error(message)


@cache
def start_library() -> None:
    """Initialises llama.cpp once in this process, and keeps its messages off the user's terminal."""
    llama_cpp.llama_log_set(_keep_message, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


@cache
def usable_cores() -> int:
    """Physical cores that this process may run on, and no more than OMP_NUM_THREADS, as Ray and Slurm set it.

    llama.cpp's default is 4 threads. They wait for one another by spinning: more threads than cores take up to three
    times as long (measured on 2 cores), and fewer leave cores idle.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    limit = int(given) if given.isdecimal() and int(given) else sys.maxsize
    return min(_physical_cores(), limit)


def _physical_cores() -> int:
    if not hasattr(os, "sched_getaffinity"):  # macOS and Windows
        return os.cpu_count() or 1
    processors = os.sched_getaffinity(0)
    cores = set()
    for processor in processors:
        siblings = Path(f"/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text())
        except OSError:  # a container without /sys
            return len(processors)
    return len(cores)


def last_messages() -> str:
    """The latest warnings and errors of llama.cpp in one line, for an error message."""
    return "; ".join(m for m in _last_messages if m) or "llama.cpp gave no reason"


def require_card_memory() -> None:
    """Raises SgLocalError where llama.cpp said that it could not allocate on a card."""
    for message in _last_messages:
        if no_card_memory(message):
            raise card_is_full(message)


@dataclass(frozen=True)
class LoadedModel:
    """Handles of one loaded model; valid inside `load_model` only."""

    path: Path
    pointer: Any
    vocab: Any
    n_vocab: int
    n_ctx_train: int
    device: str  # "NVIDIA H200", or "" for the processor
    has_state: (
        bool  # some layers hold a state of the whole sequence in place of keys and values for each token
    )


def _context_length(header: GgufHeader) -> int:
    key = f"{header.architecture}.context_length"
    value = header.metadata.get(key)
    if not isinstance(value, int) or value < 1:
        raise InputError(
            f"{header.path} does not say its context length ({key}): get another copy of the model"
        )
    return value


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Holds back Ctrl-C while llama.cpp may call back into Python, where a KeyboardInterrupt would be lost.

    SIGUSR1 is the Ctrl-C of a child process.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def load_model(
    path: Path, *, n_gpu_layers: int = -1, vocab_only: bool = False, is_repacked: bool = True
) -> Iterator[LoadedModel]:
    """Loads a GGUF model after the bounded header check, and frees it at the end.

    n_gpu_layers: layers to offload where llama.cpp was built with a GPU backend; -1 means all.
    is_repacked: llama.cpp may hold quantized weights in another order too, which is faster on some processors, and
    takes as much memory as they do. Else they stay pages of the file, which the system can take back.
    Raises InputError when the file is no model that can be run here.
    """
    header = read_model_header(path)
    require_supported(header)
    start_library()
    _last_messages.clear()
    _devices.clear()
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = 999 if n_gpu_layers < 0 else n_gpu_layers
    # One card, as `plan` and the training expect. With 0 layers none, or llama.cpp would still compute large products
    # on a card, and round them there.
    params.split_mode = llama_cpp.LLAMA_SPLIT_MODE_NONE
    params.main_gpu = -1 if vocab_only or params.n_gpu_layers == 0 else 0
    params.vocab_only = vocab_only
    params.use_extra_bufts = is_repacked
    with native_code_uses(path):
        with interrupt_later():
            pointer = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not pointer:
            require_card_memory()
            raise InputError(f"{path} could not be loaded by llama.cpp: {last_messages()}")
        vocab = llama_cpp.llama_model_get_vocab(pointer)
        try:
            yield LoadedModel(
                path=path,
                pointer=pointer,
                vocab=vocab,
                n_vocab=llama_cpp.llama_vocab_n_tokens(vocab),
                # from the header: with vocab_only, llama.cpp does not read it
                n_ctx_train=_context_length(header),
                device=_devices[-1] if _devices else "",
                has_state=llama_cpp.llama_model_is_recurrent(pointer)
                or llama_cpp.llama_model_is_hybrid(pointer),
            )
        finally:
            llama_cpp.llama_model_free(pointer)


@cache  # it asks nvidia-smi
def tell_device(device: str, is_wanted: bool) -> None:
    """Says once in a process on which device llama.cpp computes; is_wanted: a card should be used, if there is one."""
    card = card_in_use() if is_wanted and not device else ""
    if card:
        _say_once(
            f"llama.cpp: on the processor, though this machine has {card}: `sg-local doctor` names the fix"
        )
    else:
        _say_once(f"llama.cpp: on {device or 'the processor'}")


@cache
def _say_once(text: str) -> None:
    say(text)


def supports_gpu() -> bool:
    """Whether this llama.cpp was built with a GPU backend."""
    return bool(llama_cpp.llama_supports_gpu_offload())
