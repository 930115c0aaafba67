"""Answers many requests side by side. What several of them share is evaluated once.

    Request(prompt=(1, 4093, ...), max_new_tokens=64, temperature=0.2, top_k=10, seed=7, stop=("\\n",))
    -> Completion(text="support", token_ids=(...), finish_reason="end")

The prompts form one tree (prefill.py). Requests with the same prompt form one branch as long as they choose the same
tokens: the branch's next token is evaluated once, and each request samples with its own seed. Where their choices
differ, the branch forks. So ten samples at a low temperature cost little more than one.

New prompts start as sequences end. Memory is reserved before a prompt is evaluated: it waits until there is room for it
and for its longest answer. A fork that finds no free sequence waits behind the branch that it left; where the engine
cannot go back to where they parted, it is evaluated anew from the prefix.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

from sg_local.errors import SgLocalError
from sg_local.llama.engine import BatchToken, Engine
from sg_local.llama.prefill import SPINE, Prefill
from sg_local.llama.sampling import Sampling, n_candidates, sample, sample_highest
from sg_local.llama.tree import Node, TokenIds, mark_wanted, release


@dataclass(frozen=True)
class Request:
    """One answer to be generated; an empty prompt stands for BOS, or what the model has in its place.

    temperature 0 is greedy. top_k 0 and min_p 0 switch these samplers off.
    """

    prompt: TokenIds
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to a request. text ends before the stop string; token_ids has every sampled token, also the last."""

    text: str
    token_ids: TokenIds
    finish_reason: Literal["end", "stop", "length"]


def generate(
    engine: Engine, requests: Sequence[Request], on_finished: Callable[[int], None] | None = None
) -> list[Completion]:
    """Answers all requests, in their order. `on_finished` gets the index of each answered request.

    Raises SgLocalError before anything runs if a request can never fit the context.
    """
    by_index: dict[int, Completion] = {}
    with closing(completions(engine, requests)) as finished:
        for index, completion in finished:
            by_index[index] = completion
            if on_finished:
                on_finished(index)
    return [by_index[index] for index in range(len(requests))]


def completions(engine: Engine, requests: Sequence[Request]) -> Generator[tuple[int, Completion], None, None]:
    """The same one by one, each with the index of its request, as soon as it is there."""
    prompts = [request.prompt or engine.tokenizer.beginning for request in requests]
    for prompt, request in zip(prompts, requests, strict=True):
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {request.max_new_tokens}, the least is 1")
        if not engine.fits(len(prompt), request.max_new_tokens):
            raise SgLocalError(
                f"a prompt of {len(prompt)} tokens and {request.max_new_tokens} new ones do not fit "
                f"{engine.longest_sequence} tokens: {engine.room_advice(len(prompt) + request.max_new_tokens)}"
            )
    if not requests:
        return
    engine.counters.prompt_tokens += sum(map(len, prompts))
    counts = {n_candidates(request) for request in requests}
    engine.use_backend_top_k(counts.pop() if len(counts) == 1 else 0)
    with engine.counters.timed(), closing(_Schedule(engine, prompts, requests).run()) as finished:
        yield from finished


@dataclass(eq=False)
class _Prompt:
    """A prompt, and all requests that have it."""

    tokens: TokenIds
    users: list[int]  # indices of requests
    end: Node
    max_new_tokens: int  # the longest answer that one of them may give
    n_unanswered: int  # of its users


@dataclass(eq=False)
class _Sequence:
    """A sequence in use, with cells reserved for one answer. Its forks wait here until sequences are free."""

    number: int
    cells: int
    forks: list["_Branch"] = field(default_factory=list)  # in the order in which they parted


@dataclass(eq=False)
class _Branch:
    """Requests with one prompt and the same tokens so far; the last of these tokens is not evaluated yet."""

    prompt: _Prompt
    users: list[int]
    tokens: list[int]
    text: bytes
    sequence: _Sequence
    n_held: int = (
        0  # of a branch that is evaluated anew: its first tokens, with those of its prompt, in memory
    )

    @property
    def position(self) -> int:
        """Of the token that is evaluated next."""
        return len(self.prompt.tokens) + len(self.tokens) - 1

    def part(self, users: list[int]) -> "_Branch":
        """A copy for some of its users, which go on with another token."""
        return _Branch(self.prompt, users, self.tokens.copy(), self.text, self.sequence)


class _Schedule:
    """One call of `completions`."""

    def __init__(self, engine: Engine, prompts: list[TokenIds], requests: Sequence[Request]) -> None:
        self.engine = engine
        self.requests = requests
        self.finished: list[tuple[int, Completion]] = []  # in the last step
        self.samplings: dict[int, Sampling] = {}
        self.stops = [tuple(stop.encode() for stop in request.stop if stop) for request in requests]
        self.pieces: dict[int, bytes | None] = {}  # token -> its text, None if it ends an answer
        users: dict[TokenIds, list[int]] = {}
        for index, prompt in enumerate(prompts):
            users.setdefault(prompt, []).append(index)
        distinct = sorted(users)
        self.prefill = Prefill(engine, distinct, min(map(len, distinct)) - 1)
        self.prompts = []
        for tokens, end in zip(distinct, self.prefill.ends, strict=True):
            indices = users[tokens]
            longest = max(requests[index].max_new_tokens for index in indices)
            self.prompts.append(_Prompt(tokens, indices, end, longest, len(indices)))
            mark_wanted(end, len(tokens) - 1)
        self.running: list[_Branch] = []
        self.parted: list[_Branch] = []  # to be evaluated anew, as soon as there is a sequence for them
        self.renewed: list[_Branch] = []  # those that are
        self.sequences: dict[int, _Sequence] = {}  # in use, by number
        self.free_sequences = list(range(engine.n_parallel, 0, -1))
        self.free_cells = engine.n_ctx - self.prefill.n_prefix

    def run(self) -> Generator[tuple[int, Completion], None, None]:
        counters = self.engine.counters
        try:
            while self.running or self.parted or self.renewed or not self.prefill.is_done:
                self._step()
                finished, self.finished = self.finished, []
                yield from finished
        except BaseException:
            self.engine.clear()  # the remaining cells belong to no request
            raise
        finally:
            counters.in_flight = 0
            for sampling in self.samplings.values():
                sampling.close()

    def _step(self) -> None:
        """One llama_decode: the next token of each branch, and as much of the prompts as fits."""
        self._start_forks()
        batch = [
            BatchToken(branch.tokens[-1], branch.position, [branch.sequence.number], True)
            for branch in self.running
        ]
        n_grown = len(batch)
        branches = self.running + self._renew(batch)
        self.running = []
        ended, _ = self.prefill.fill(batch, self.engine.n_batch, self._admit)
        self.engine.decode(batch)
        self.prefill.settle()
        self.engine.counters.evaluated_prompt_tokens += len(batch) - n_grown
        for end in ended:
            prompt = self.prompts[end.prompt]
            branches.append(_Branch(prompt, prompt.users, [], b"", self.sequences[end.sequence]))
        if branches:
            self._choose(branches)

    def _admit(self, number: int) -> int | None:
        """A sequence for the next prompt; None if no sequence is free, or no memory for the prompt and an answer."""
        prompt = self.prompts[number]
        cells = self.prefill.n_next + prompt.max_new_tokens
        if not self.free_sequences or cells > self.free_cells:
            return None
        if self.engine.can_go_back:
            self.free_cells -= self.prefill.n_next
        self.engine.counters.in_flight += len(prompt.users)
        for index in prompt.users:
            self.samplings[index] = Sampling(self.requests[index])
        return self._take_sequence(self._cells(prompt)).number

    def _cells(self, prompt: _Prompt) -> int:
        """What a branch of this prompt is given: room for an answer, and where none is left behind, for the prompt."""
        own = 0 if self.engine.can_go_back else len(prompt.tokens) - self.prefill.n_prefix
        return own + prompt.max_new_tokens

    def _take_sequence(self, cells: int) -> _Sequence:
        self.free_cells -= cells
        sequence = _Sequence(self.free_sequences.pop(), cells)
        self.sequences[sequence.number] = sequence
        return sequence

    def _start_forks(self) -> None:
        """Gives sequences to waiting forks, as far as sequences and memory last."""
        for source in list(self.sequences.values()):
            while source.forks and self.free_sequences:
                branch = source.forks[0]
                # Cells for a whole answer: the part that it shares with its source may outlive the source.
                if self._cells(branch.prompt) > self.free_cells:
                    break
                branch.sequence = self._take_sequence(self._cells(branch.prompt))
                self.engine.fork(source.number, branch.sequence.number, branch.position)
                self.running.append(source.forks.pop(0))
            if (
                not self.engine.can_go_back
            ):  # with the next token the source has left the place where they parted
                self.parted += source.forks
                source.forks = []
        while self.parted and self.free_sequences and self._cells(self.parted[0].prompt) <= self.free_cells:
            branch = self.parted.pop(0)
            branch.sequence = self._take_sequence(self._cells(branch.prompt))
            branch.n_held = self.prefill.n_prefix
            self.engine.fork(SPINE, branch.sequence.number, branch.n_held)
            self.renewed.append(branch)

    def _renew(self, batch: list[BatchToken]) -> list[_Branch]:
        """Appends tokens of branches that are evaluated anew, and returns those whose last token is among them."""
        complete = []
        for branch in self.renewed:
            tokens = (*branch.prompt.tokens, *branch.tokens)
            stop = min(len(tokens), branch.n_held + self.engine.n_batch - len(batch))
            batch += [
                BatchToken(tokens[place], place, [branch.sequence.number], place == branch.position)
                for place in range(branch.n_held, stop)
            ]
            branch.n_held = stop
            if stop == len(tokens):
                complete.append(branch)
        self.renewed = [branch for branch in self.renewed if branch not in complete]
        return complete

    def _choose(self, branches: list[_Branch]) -> None:
        """Each user samples a token; branches are the outputs of the batch, in its order."""
        outputs = [output for output, branch in enumerate(branches) for _ in branch.users]
        samplings = [self.samplings[user] for branch in branches for user in branch.users]
        if self.engine.backend_top_k:
            tokens = iter(sample_highest(*self.engine.highest_logits(), outputs, samplings))
        else:
            tokens = iter(sample(self.engine.logits(), outputs, samplings))
        self.engine.counters.generated_tokens += len(samplings)
        for branch in branches:
            groups: dict[int, list[int]] = {}
            for user in branch.users:
                groups.setdefault(next(tokens), []).append(user)
            parts = [branch]
            if len(groups) > 1:
                parts += [branch.part(users) for users in [*groups.values()][1:]]
            going_on = [
                part
                for part, (token, users) in zip(parts, groups.items(), strict=True)
                if self._grow(part, token, users)
            ]
            branch.sequence.forks += going_on[1:]
            if going_on:
                self.running.append(going_on[0])
            else:
                self._leave(branch)

    def _grow(self, branch: _Branch, token: int, users: list[int]) -> bool:
        """Adds a token to the answers of these users, the branch's own from now on; whether one of them goes on."""
        piece = self._piece(token)
        branch.tokens.append(token)
        if piece is not None:
            branch.text += piece
        branch.users = [user for user in users if not self._finish(user, branch, piece is None)]
        return bool(branch.users)

    def _piece(self, token: int) -> bytes | None:
        """A token's text, None if it ends an answer."""
        if token not in self.pieces:
            tokenizer = self.engine.tokenizer
            self.pieces[token] = None if tokenizer.is_end(token) else tokenizer.piece_bytes(token)
        return self.pieces[token]

    def _leave(self, branch: _Branch) -> None:
        """Gives the sequence of a branch that has ended to the latest fork, which shares the most with it, or back."""
        sequence = branch.sequence
        if sequence.forks:
            fork = sequence.forks.pop()
            self.engine.cut(sequence.number, fork.position)
            self.running.append(fork)
            return
        self.engine.cut(sequence.number, 0)
        self.free_cells += sequence.cells
        del self.sequences[sequence.number]
        self.free_sequences.append(sequence.number)
        if self.engine.can_go_back and branch.prompt.n_unanswered == 0:
            self.free_cells += release(branch.prompt.end)

    def _finish(self, user: int, branch: _Branch, is_end: bool) -> bool:
        """Whether this token ends the answer to a request; if so, the answer is stored."""
        text, stops = branch.text, self.stops[user]
        reason: Literal["end", "stop", "length"]
        stop_place = _first_stop(text, stops) if stops and not is_end else -1
        if is_end:
            reason = "end"
        elif stop_place >= 0:
            reason, text = "stop", text[:stop_place]
        elif len(branch.tokens) >= self.requests[user].max_new_tokens:
            reason = "length"
        else:
            return False
        # A cut inside a multi-byte character leaves no half of it behind.
        answer = text.decode("utf-8", "ignore" if reason == "length" else "replace")
        self.finished.append((user, Completion(answer, tuple(branch.tokens), reason)))
        self.samplings.pop(user).close()
        branch.prompt.n_unanswered -= 1
        self.engine.counters.in_flight -= 1
        return True


def _first_stop(text: bytes, stops: Sequence[bytes]) -> int:
    """Where the first stop string begins, -1 if there is none. The whole text is searched: it is short."""
    return min((text.find(stop) for stop in stops if stop in text), default=-1)
