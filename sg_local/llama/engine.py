"""Many prompts through one llama.cpp context: what they share is evaluated once, and they run side by side.

    Request(prompt=(1, 4093, ...), max_new_tokens=64, temperature=0.2, top_k=10, seed=7, stop=("\\n",))
    -> Completion(text="support", token_ids=(...), finish_reason="end")

The prompts of one call form a tree: the prefix common to all (instruction and demonstrations) is sequence 0, each
distinct prompt grows from it, and the samples of one prompt fork from that (`llama_memory_seq_cp`, which shares
the cells of a unified KV memory). New requests start as others finish. The engine knows token ids only.

Every call begins with an empty memory and schedules in an order that depends on its requests alone, so the same
call gives the same tokens on the same machine: a killed stage that repeats its last call ends with the same rows.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import llama_cpp
import numpy as np

from sg_local.errors import SgLocalError
from sg_local.llama.library import LoadedModel, interrupt_later, last_messages, load_model
from sg_local.llama.tokens import Tokenizer

TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One answer to be generated. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those off."""

    prompt: TokenIds
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """text ends before the stop string; token_ids are all that were sampled, the end token too."""

    text: str
    token_ids: TokenIds
    finish_reason: Literal["end", "stop", "length"]


@dataclass
class Counters:
    """What the engine did: tokens given to llama_decode, tokens sampled, seconds inside llama_decode."""

    evaluated_tokens: int = 0
    generated_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass
class _Prompt:
    """A distinct prompt: where it grows, and who waits for its end."""

    tokens: TokenIds
    users: list[int]  # indices of requests
    max_new_tokens: int
    sequence: int = -1  # where the prompt lies; one user at a time extends it, the others fork from it
    is_extended: bool = False
    n_evaluated: int = 0  # tokens of the prompt in memory, the common prefix included
    cells: int = 0  # memory reserved: own tokens, and one user's new tokens
    ready: "deque[_Running]" = field(default_factory=deque)  # first token sampled, no sequence yet


@dataclass
class _Running:
    """A request whose sequence is being extended."""

    index: int
    prompt: _Prompt
    sequence: int
    sampler: Any
    cells: int
    token_ids: list[int] = field(default_factory=list)
    text: bytes = b""


class Engine:
    """One context on one loaded model. Use `open_engine`, which closes what it opened."""

    def __init__(
        self, model: LoadedModel, *, n_ctx: int, n_parallel: int, n_batch: int = 512, n_threads: int = 0
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = min(n_batch, 512)
        params.n_seq_max = n_parallel + 1  # and the common prefix
        params.kv_unified = True  # forks share the cells of what they have in common
        params.no_perf = True
        if n_threads > 0:
            params.n_threads = params.n_threads_batch = n_threads
        self.model = model
        self.tokenizer = Tokenizer(model)
        self.n_ctx = n_ctx
        self.n_parallel = n_parallel
        self.n_batch = n_batch
        self.counters = Counters()
        with interrupt_later():
            self.context = llama_cpp.llama_init_from_model(model.pointer, params)
        if not self.context:
            raise SgLocalError(
                f"llama.cpp could not make a context of {n_ctx} tokens ({last_messages()}): lower --n-ctx"
            )
        self.memory = llama_cpp.llama_get_memory(self.context)
        # A token may belong to every sequence at once: that is how a shared node is evaluated once.
        self._batch = llama_cpp.llama_batch_init(n_batch, 0, n_parallel + 1)

    def close(self) -> None:
        """Frees the context; the model is closed by whoever loaded it."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self.context)

    def attach_adapter(self, path: Path) -> Callable[[], None]:
        """Applies a LoRA adapter (GGUF) at scale 1 and returns the function that frees it."""
        adapter = llama_cpp.llama_adapter_lora_init(self.model.pointer, str(path).encode())
        if not adapter:
            raise SgLocalError(f"{path} does not fit this base model: {last_messages()}")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (llama_cpp.ctypes.c_float * 1)(1.0)
        if llama_cpp.llama_set_adapters_lora(self.context, adapters, 1, scales) != 0:
            raise SgLocalError(f"{path} could not be applied: {last_messages()}")
        return lambda: llama_cpp.llama_adapter_lora_free(adapter)

    def fits(self, n_prompt_tokens: int, max_new_tokens: int) -> bool:
        """Whether a request of this size can ever run in this context."""
        return n_prompt_tokens > 0 and n_prompt_tokens + max_new_tokens <= min(
            self.n_ctx, self.model.n_ctx_train
        )

    def clear(self) -> None:
        """Empties the memory."""
        llama_cpp.llama_memory_clear(self.memory, False)

    def decode(self, tokens: Sequence[tuple[int, int, Sequence[int], bool]]) -> None:
        """Evaluates 1..n_batch of (token, position, sequences, wants_logits); logits lie at the same index."""
        if not 0 < len(tokens) <= self.n_batch:
            raise ValueError(f"{len(tokens)} tokens do not make a batch of 1..{self.n_batch}")
        batch = self._batch
        for index, (token, position, sequences, wants_logits) in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = len(sequences)
            own = batch.seq_id[index]
            for place, sequence in enumerate(sequences):
                own[place] = sequence
            batch.logits[index] = wants_logits
        batch.n_tokens = len(tokens)
        started = time.perf_counter()
        result = llama_cpp.llama_decode(self.context, batch)
        self.counters.decode_seconds += time.perf_counter() - started
        self.counters.evaluated_tokens += len(tokens)
        if result != 0:
            raise SgLocalError(
                f"llama_decode failed with code {result} on {len(tokens)} tokens in a context of {self.n_ctx} "
                f"({last_messages()}): raise --n-ctx or lower --n-parallel"
            )

    def logits_at(self, index: int) -> "np.ndarray[Any, np.dtype[np.float32]]":
        """A copy of the logits (n_vocab,) of the token at this index of the last `decode`."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,)).copy()

    def evaluate_prefix(self, prompts: Sequence[TokenIds], *, reserve: int = 1) -> int:
        """Evaluates the prefix common to all prompts into sequence 0 and returns its length.

        At least `reserve` tokens of every prompt stay outside it, so that each has logits of its own.
        """
        shortest, longest = min(prompts), max(prompts)  # the common prefix of all is that of these two
        limit = min(len(prompt) for prompt in prompts) - reserve
        length = 0
        while length < limit and shortest[length] == longest[length]:
            length += 1
        for start in range(0, length, self.n_batch):
            stop = min(start + self.n_batch, length)
            self.decode([(shortest[position], position, (0,), False) for position in range(start, stop)])
        return length

    def generate(
        self, requests: Sequence[Request], on_finished: Callable[[int], None] | None = None
    ) -> list[Completion]:
        """Answers all requests, in their order. `on_finished` is told the number of tokens of each answer.

        Raises SgLocalError before anything runs when a request can never fit the context.
        """
        for request in requests:
            if not self.fits(len(request.prompt), request.max_new_tokens):
                raise SgLocalError(
                    f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones do not fit "
                    f"{min(self.n_ctx, self.model.n_ctx_train)} tokens: raise --n-ctx or shorten the task"
                )
        if not requests:
            return []
        return _Schedule(self, requests, on_finished).run()


class _Schedule:
    """One call of `Engine.generate`: prompts wait, grow, and hand over to running requests."""

    def __init__(
        self, engine: Engine, requests: Sequence[Request], on_finished: Callable[[int], None] | None
    ) -> None:
        self.engine = engine
        self.requests = requests
        self.on_finished = on_finished
        self.completions: list[Completion | None] = [None] * len(requests)
        users: dict[TokenIds, list[int]] = {}
        for index, request in enumerate(requests):
            users.setdefault(request.prompt, []).append(index)
        # Sorted, so that neighbours in time are neighbours in the tree.
        self.waiting = deque(
            _Prompt(tokens, users[tokens], max(requests[index].max_new_tokens for index in users[tokens]))
            for tokens in sorted(users)
        )
        self.growing: list[_Prompt] = []
        self.evaluated: list[_Prompt] = []  # with users that are ready
        self.running: list[_Running] = []
        self.free_sequences = list(range(engine.n_parallel, 0, -1))
        self.free_cells = engine.n_ctx

    def run(self) -> list[Completion]:
        self.engine.clear()
        self.n_common = self.engine.evaluate_prefix([prompt.tokens for prompt in self.waiting])
        self.free_cells -= self.n_common
        try:
            while self.waiting or self.growing or self.evaluated or self.running:
                self._start_ready()
                self._admit()
                self._step()
        finally:
            for item in (*self.running, *(item for prompt in self.evaluated for item in prompt.ready)):
                llama_cpp.llama_sampler_free(item.sampler)
        return [completion for completion in self.completions if completion is not None]

    def _start_ready(self) -> None:
        """Gives sequences to requests whose prompt is evaluated.

        One user extends the prompt's own sequence, so every prompt gets on however few sequences are free.
        """
        for prompt in self.evaluated:
            while prompt.ready:
                if not prompt.is_extended:
                    prompt.is_extended = True
                    self._start(prompt.ready.popleft(), prompt.sequence, prompt.cells)
                elif self.free_sequences and self.free_cells >= prompt.max_new_tokens:
                    self.free_cells -= prompt.max_new_tokens
                    sequence = self.free_sequences.pop()
                    self._fork(prompt.sequence, sequence, len(prompt.tokens))
                    self._start(prompt.ready.popleft(), sequence, prompt.max_new_tokens)
                else:
                    break
        self.evaluated = [prompt for prompt in self.evaluated if prompt.ready]

    def _start(self, item: _Running, sequence: int, cells: int) -> None:
        item.sequence, item.cells = sequence, cells
        self.running.append(item)

    def _admit(self) -> None:
        """Begins prompts while sequences and memory last; those with forks waiting go first."""
        while self.waiting and self.free_sequences and not self.evaluated:
            prompt = self.waiting[0]
            cells = len(prompt.tokens) - self.n_common + prompt.max_new_tokens
            if cells > self.free_cells:
                return
            self.waiting.popleft()
            prompt.cells = cells
            self.free_cells -= cells
            prompt.sequence = self.free_sequences.pop()
            prompt.n_evaluated = self.n_common
            if self.n_common:
                self._fork(0, prompt.sequence, self.n_common)
            self.growing.append(prompt)

    def _step(self) -> None:
        """One llama_decode: a new token of each running request, and as much of the prompts as fits."""
        tokens: list[tuple[int, int, tuple[int, ...], bool]] = []
        for item in self.running:
            position = len(item.prompt.tokens) + len(item.token_ids) - 1
            tokens.append((item.token_ids[-1], position, (item.sequence,), True))
        running = list(self.running)
        ends: list[tuple[int, _Prompt]] = []
        for prompt in self.growing:
            take = min(self.engine.n_batch - len(tokens), len(prompt.tokens) - prompt.n_evaluated)
            for position in range(prompt.n_evaluated, prompt.n_evaluated + take):
                is_last = position == len(prompt.tokens) - 1
                tokens.append((prompt.tokens[position], position, (prompt.sequence,), is_last))
            prompt.n_evaluated += take
            if prompt.n_evaluated == len(prompt.tokens) and take:
                ends.append((len(tokens) - 1, prompt))
        self.engine.decode(tokens)
        for index, item in enumerate(running):
            self._sample(item, index)
        for index, prompt in ends:
            self.growing.remove(prompt)
            for user in prompt.users:
                item = _Running(user, prompt, -1, _sampler(self.requests[user]), 0)
                self._sample(item, index)
            if prompt.ready:
                self.evaluated.append(prompt)
            else:  # all ended with their first token
                self._release(prompt.sequence, prompt.cells)

    def _sample(self, item: _Running, index: int) -> None:
        """Samples one token and moves the request on: to its end, or to where it waits for the next step."""
        token = llama_cpp.llama_sampler_sample(item.sampler, self.engine.context, index)
        request = self.requests[item.index]
        item.token_ids.append(token)
        self.engine.counters.generated_tokens += 1
        tokenizer = self.engine.tokenizer
        if tokenizer.is_end(token):
            return self._finish(item, item.text, "end")
        tail = len(item.text)
        item.text += tokenizer.piece_bytes(token)
        for stop in request.stop:
            # A stop string may cross token borders, so look back by its own length.
            found = item.text.find(stop.encode(), max(0, tail - len(stop.encode()) + 1))
            if found >= 0:
                return self._finish(item, item.text[:found], "stop")
        if len(item.token_ids) >= request.max_new_tokens:
            return self._finish(item, item.text, "length")
        if item.sequence < 0:
            item.prompt.ready.append(item)
        return None

    def _finish(self, item: _Running, text: bytes, reason: Literal["end", "stop", "length"]) -> None:
        # A cut inside a multi-byte character leaves no half of it behind.
        shown = text.decode("utf-8", "ignore" if reason == "length" else "replace")
        self.completions[item.index] = Completion(shown, tuple(item.token_ids), reason)
        llama_cpp.llama_sampler_free(item.sampler)
        if item.sequence >= 0:
            self.running.remove(item)
            prompt = item.prompt
            if item.sequence != prompt.sequence:
                self._release(item.sequence, item.cells)
            elif prompt.ready:  # cut back to the prompt, for the next user
                llama_cpp.llama_memory_seq_rm(self.engine.memory, prompt.sequence, len(prompt.tokens), -1)
                prompt.is_extended = False
            else:
                self._release(prompt.sequence, prompt.cells)
        if self.on_finished:
            self.on_finished(len(item.token_ids))

    def _release(self, sequence: int, cells: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.engine.memory, sequence, -1, -1)
        self.free_sequences.append(sequence)
        self.free_cells += cells

    def _fork(self, source: int, target: int, n_tokens: int) -> None:
        llama_cpp.llama_memory_seq_cp(self.engine.memory, source, target, 0, n_tokens)


def _sampler(request: Request) -> Any:
    """llama.cpp's sampler chain for a request, in llama.cpp's own order: top-k, top-p, min-p, temperature."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    if request.temperature <= 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    if request.top_k > 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_k(request.top_k))
    if request.top_p < 1:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_top_p(request.top_p, 1))
    if request.min_p > 0:
        llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_min_p(request.min_p, 1))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_temp(request.temperature))
    llama_cpp.llama_sampler_chain_add(chain, llama_cpp.llama_sampler_init_dist(request.seed))
    return chain


@contextmanager
def open_engine(
    model_path: Path,
    *,
    n_ctx: int,
    n_parallel: int,
    n_threads: int = 0,
    n_gpu_layers: int = -1,
    adapter_path: Path | None = None,
) -> Iterator[Engine]:
    """Loads a model, attaches an adapter where one is given, and closes everything in the right order."""
    with ExitStack() as stack:
        model = stack.enter_context(load_model(model_path, n_gpu_layers=n_gpu_layers))
        # Positions above the trained context are of no use.
        engine = Engine(
            model,
            n_ctx=min(n_ctx, model.n_ctx_train * n_parallel),
            n_parallel=n_parallel,
            n_threads=n_threads,
        )
        stack.callback(engine.close)
        if adapter_path is not None:
            stack.callback(engine.attach_adapter(adapter_path))
        yield engine
