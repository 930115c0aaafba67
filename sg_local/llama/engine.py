"""One llama.cpp context: batches of tokens, sequences that fork, and a prefix that stays between calls.

    BatchToken(token=4093, position=17, sequences=[3, 4], wants_logits=False)    a token of sequences 3 and 4

A token may belong to several sequences. A fork shares the cells of another sequence in the unified KV cache
(`llama_memory_seq_cp`), so that what prompts share is evaluated once (see prefill.py). The engine knows token ids only:
generation.py answers requests with it, scoring.py scores labels.

Models with short convolutions (LFM2) or linear attention (Qwen 3.5) keep a state for each sequence, from which no token
can be taken back. There only the prefix of all prompts is shared, and what else prompts have in common is evaluated for
each.

When a call begins, the memory holds the prefix of its prompts, evaluated alone, and nothing else. If the call before
had the same prefix, it is still there, with the same values as in a fresh context. So the same call gives the same
tokens on the same machine, and a killed stage that repeats its last call ends with the same rows.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ctypes import addressof, string_at
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from sg_local.child_process import native_code_uses
from sg_local.errors import SgLocalError
from sg_local.llama.library import (
    LoadedModel,
    interrupt_later,
    last_messages,
    load_model,
    require_card_memory,
    tell_device,
    usable_cores,
)
from sg_local.llama.logits import Logits
from sg_local.llama.tokens import Tokenizer
from sg_local.llama.tree import TokenIds

Ids = np.ndarray[Any, np.dtype[np.int32]]

# Sequences for scoring labels, which reserve no cells for an answer; llama.cpp allows 256.
SCORING_SEQUENCES = 64
# Where each sequence has a state of its own: 150 MiB in Qwen 3.5 27B, 19 MiB in 0.8B.
STATE_SEQUENCES = 8


@dataclass(slots=True)
class BatchToken:
    """One token to evaluate, for all `sequences` that it belongs to."""

    token: int
    position: int
    sequences: list[int]
    wants_logits: bool


@dataclass
class Counters:
    """What the engine did, in tokens and seconds.

    prompt_tokens are the tokens of all prompts, generated_tokens were sampled, evaluated_tokens went through
    llama_decode. A token that several prompts or samples share is evaluated once. Lack of memory never costs a second
    evaluation.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    evaluated_tokens: int = 0
    evaluated_prompt_tokens: int = 0
    decode_seconds: float = 0.0
    in_flight: int = 0  # requests that are being answered now
    _seconds: float = 0.0
    _since: float | None = None

    @property
    def shared_prompt_tokens(self) -> int:
        """Prompt tokens that were in memory already, from another prompt or from the call before."""
        # Where the engine cannot go back, some are evaluated more than once.
        return max(0, self.prompt_tokens - self.evaluated_prompt_tokens)

    @property
    def seconds(self) -> float:
        """Seconds in the engine's calls, with decode_seconds."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def rates(self) -> dict[str, float]:
        """Evaluated prompt tokens and generated tokens, each per second in the engine's calls."""
        return {
            "prompt_tokens_per_second": round(self.evaluated_prompt_tokens / max(self.seconds, 1e-9), 1),
            "generated_tokens_per_second": round(self.generated_tokens / max(self.seconds, 1e-9), 1),
        }

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts the body's seconds as the engine's."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._seconds, self._since = self.seconds, None


def room_advice(needed: int, n_ctx: int, n_ctx_train: int) -> str:
    """What makes room for a prompt and its answer of so many tokens: more context only where the model has it."""
    if n_ctx < needed <= n_ctx_train:
        return (
            f"raise --n-ctx to {needed} or more (a run keeps its own: begin another one), or shorten the task"
        )
    return (
        f"--n-ctx does not help, the model itself ends at {n_ctx_train} tokens: shorten the instruction, the examples, "
        "the inputs or the answers, or take a model with a longer context"
    )


class Engine:
    """One context on one loaded model. Use `open_engine`, which closes what it opened."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        n_ctx: int,
        n_parallel: int,
        n_batch: int = 512,
        n_threads: int = 0,
        has_backend_top_k: bool = False,
    ) -> None:
        least = STATE_SEQUENCES if model.has_state else SCORING_SEQUENCES
        self.n_sequences = max(n_parallel, least) + 1  # sequence 0 is the common prefix
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = min(n_batch, 512)
        params.n_seq_max = self.n_sequences
        params.kv_unified = True  # forks share cells
        params.n_outputs_max_per_seq = 0  # as many as there are: a prompt may end within another one
        params.swa_full = True  # with a sliding window too, what a fork may need is kept
        params.no_perf = True
        params.n_threads = params.n_threads_batch = n_threads or usable_cores()
        self.model = model
        self.tokenizer = Tokenizer(model)
        self.n_ctx = n_ctx
        self.n_parallel = n_parallel
        self.n_batch = n_batch
        self.counters = Counters()
        with interrupt_later():
            self.context = llama_cpp.llama_init_from_model(model.pointer, params)
        if not self.context:
            require_card_memory()
            raise SgLocalError(
                f"llama.cpp could not make a context of {n_ctx} tokens ({last_messages()}): lower --n-ctx or "
                "--n-parallel, or take a smaller model"
            )
        self.memory = llama_cpp.llama_get_memory(self.context)
        # A state is that of the whole sequence: a fork gets all of it, and nothing is taken back from it.
        self.can_go_back = not model.has_state
        self._prefix: TokenIds = ()  # what sequence 0 holds between calls
        self._has_backend_top_k = has_backend_top_k
        self._samplers: list[Any] = []  # attached to the context
        self.backend_top_k = 0  # of these; 0: none
        self._outputs: list[int] = []  # of the last batch
        self._view: tuple[Any, Logits] = None, np.empty((0, 0), np.float32)  # of its logits
        batch = self._batch = llama_cpp.llama_batch_init(n_batch, 0, self.n_sequences)
        # Views of the batch's arrays; access through ctypes' pointers takes ten times as long.
        self._tokens = np.ctypeslib.as_array(batch.token, (n_batch,))
        self._positions = np.ctypeslib.as_array(batch.pos, (n_batch,))
        self._n_seq_id = np.ctypeslib.as_array(batch.n_seq_id, (n_batch,))
        self._seq_id = [batch.seq_id[index] for index in range(n_batch)]
        self._wants = np.ctypeslib.as_array(batch.logits, (n_batch,))

    def close(self) -> None:
        """Frees the context. Whoever loaded the model frees it."""
        self._detach_samplers()
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self.context)

    def attach_adapter(self, path: Path) -> Callable[[], None]:
        """Applies a LoRA adapter (GGUF) at scale 1 and returns the function that frees it."""
        adapter = llama_cpp.llama_adapter_lora_init(self.model.pointer, os.fsencode(path))
        if not adapter:
            raise SgLocalError(
                f"{path} does not fit this base ({last_messages()}): give the one it was trained on"
            )
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (llama_cpp.ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales) != 0:
            raise SgLocalError(f"{path} could not be applied: {last_messages()}")
        return lambda: llama_cpp.llama_adapter_lora_free(adapter)

    @property
    def longest_sequence(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.n_ctx, self.model.n_ctx_train)

    def room_advice(self, needed: int) -> str:
        """What makes room for a prompt and its answer of so many tokens, which do not fit."""
        return room_advice(needed, self.n_ctx, self.model.n_ctx_train)

    def fits(self, n_prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether a request of this size fits this context at all."""
        return n_prompt_tokens + max_new_tokens <= self.longest_sequence

    def is_over_context(self, text: str) -> bool:
        """Whether a text is surely too long, whatever its tokens are; told without making them."""
        return len(text.encode()) > self.longest_sequence * self.tokenizer.longest_token_bytes

    def clear(self) -> None:
        """Empties the memory."""
        llama_cpp.llama_memory_clear(self.memory, False)
        self._prefix = ()

    def fork(self, source: int, target: int, n_tokens: int) -> None:
        """Makes sequence `target` begin with the first tokens of `source`; both share the cells.

        Without can_go_back these are all tokens of `source`.
        """
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, 0, n_tokens)

    def cut(self, sequence: int, n_tokens: int) -> None:
        """Removes all but the first tokens of a sequence; cells that no other sequence holds become free.

        Without can_go_back n_tokens is 0.
        """
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, n_tokens, -1)

    def hold_prefix(self, prefix: TokenIds) -> int:
        """Makes sequence 0 this prefix, with nothing else in memory, and returns its length.

        To be called first in a call of the engine, when all other sequences are empty. The prefix is evaluated in
        separate batches, so its values do not depend on whether it was in memory before.
        """
        if self._prefix != prefix or not prefix:
            self.clear()
            for start in range(0, len(prefix), self.n_batch):
                part = prefix[start : start + self.n_batch]
                self.decode(
                    [BatchToken(token, start + index, [0], False) for index, token in enumerate(part)]
                )
            self.counters.evaluated_prompt_tokens += len(prefix)
            self._prefix = prefix
        return len(prefix)

    def use_backend_top_k(self, k: int) -> None:
        """Has llama.cpp choose the k highest logits of each output where it computes them; 0: all come here.

        Where it cannot, all come here as before, and `backend_top_k` stays 0. What is attached stays: each change has
        llama.cpp plan its work anew. The sequences of `generate` have samplers then, those above them none.
        """
        k = k if k < self.model.n_vocab else 0
        if k == self.backend_top_k or not self._has_backend_top_k:
            return
        self._detach_samplers()
        if not k:
            return
        for number in range(self.n_parallel + 1):  # with the prefix, whose last token may be a prompt's
            sampler = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
            top_k = llama_cpp.llama_sampler_init_top_k(k)
            llama_cpp.llama_sampler_chain_add(sampler, top_k)
            self._samplers.append(sampler)
            is_attached = llama_cpp.llama_set_sampler(self.context, number, sampler)
            # llama.cpp names it "+top-k" then, and "-top-k" where the device lacks an operation.
            if not is_attached or not llama_cpp.llama_sampler_name(top_k).startswith(b"+"):
                self._has_backend_top_k = False
                return self._detach_samplers()
        self.backend_top_k = k

    def _detach_samplers(self) -> None:
        for number, sampler in enumerate(self._samplers):
            llama_cpp.llama_set_sampler(self.context, number, None)
            llama_cpp.llama_sampler_free(sampler)
        self._samplers, self.backend_top_k = [], 0

    def decode(self, tokens: Sequence[BatchToken]) -> None:
        """Evaluates 1..n_batch tokens. Those that want logits are the outputs, to be read until the next call."""
        if not 0 < len(tokens) <= self.n_batch:
            raise ValueError(f"{len(tokens)} tokens do not make a batch of 1..{self.n_batch}")
        count = len(tokens)
        self._tokens[:count] = [item.token for item in tokens]
        self._positions[:count] = [item.position for item in tokens]
        self._n_seq_id[:count] = [len(item.sequences) for item in tokens]
        wants = [item.wants_logits for item in tokens]
        self._wants[:count] = wants
        self._outputs = [index for index, is_wanted in enumerate(wants) if is_wanted]
        for seq_ids, item in zip(self._seq_id, tokens, strict=False):
            for place, sequence in enumerate(item.sequences):
                seq_ids[place] = sequence
        self._batch.n_tokens = count
        started = time.perf_counter()
        result = llama_cpp.llama_decode(self.context, self._batch)
        llama_cpp.llama_synchronize(self.context)  # a GPU may still be at work
        self.counters.decode_seconds += time.perf_counter() - started
        self.counters.evaluated_tokens += count
        if result != 0:
            # llama.h: 1 is that no place was found in the key-value memory; anything else is no matter of its size
            advice = (
                "raise --n-ctx or lower --n-parallel"
                if result == 1
                else "`sg-local doctor` tries whether llama.cpp works here; if memory is short, take a smaller model"
            )
            raise SgLocalError(
                f"llama_decode failed with code {result} on {count} tokens in a context of {self.n_ctx} "
                f"({last_messages()}): {advice}"
            )

    def logits(self) -> Logits:
        """The logits of the last batch's outputs, (n_outputs, n_vocab), unless backend_top_k chose among them."""
        pointer = llama_cpp.llama_get_logits(self.context)
        shape = len(self._outputs), self.model.n_vocab
        key = addressof(pointer.contents), shape
        if self._view[0] != key:  # a view takes as long as 10 tokens' samplers; it is mostly the same
            self._view = key, np.ctypeslib.as_array(pointer, shape=shape)
        return self._view[1]

    def highest_logits(self) -> tuple[Ids, Logits]:
        """What backend_top_k chose of the last batch's outputs: ids and logits, (n_outputs, k), in any order."""
        context, size = self.context, 4 * self.backend_top_k
        ids, logits = llama_cpp.llama_get_sampled_candidates_ith, llama_cpp.llama_get_sampled_logits_ith
        shape = len(self._outputs), self.backend_top_k
        chosen = b"".join(string_at(ids(context, index), size) for index in self._outputs)
        values = b"".join(string_at(logits(context, index), size) for index in self._outputs)
        return np.frombuffer(chosen, np.int32).reshape(shape), np.frombuffer(values, np.float32).reshape(
            shape
        )


@contextmanager
def open_engine(
    model_path: Path,
    *,
    n_ctx: int,
    n_parallel: int,
    n_threads: int = 0,
    n_gpu_layers: int = -1,
    adapter_path: Path | None = None,
    is_silent: bool = False,
    is_repacked: bool = True,
    has_backend_top_k: bool = False,
) -> Iterator[Engine]:
    """Loads a model, attaches the adapter if one is given, and closes all of it in the right order.

    is_silent: do not say on which device. is_repacked: see `load_model`.
    has_backend_top_k: whether llama.cpp chooses the highest logits where it computes them. Off: on the CPU a step takes
    twice as long with it; CUDA with CCCL before 3.2 (the toolkit 13.0 has 3.0) sorts the vocabulary of each output for
    it, one after the other. tests/gpu/run compares both on a card.
    """
    with ExitStack() as stack:
        model = stack.enter_context(
            load_model(model_path, n_gpu_layers=n_gpu_layers, is_repacked=is_repacked)
        )
        if not is_silent:
            tell_device(model.device, n_gpu_layers != 0)
        # No sequence is longer than the trained context.
        engine = Engine(
            model,
            n_ctx=min(n_ctx, model.n_ctx_train * n_parallel),
            n_parallel=n_parallel,
            n_threads=n_threads,
            has_backend_top_k=has_backend_top_k,
        )
        stack.callback(engine.close)
        if adapter_path is not None:
            stack.enter_context(native_code_uses(adapter_path))
            stack.callback(engine.attach_adapter(adapter_path))
        yield engine
