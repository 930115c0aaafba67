"""Feeds the prompts of one call to llama_decode, depth first, each token of their tree once.

    prefill = Prefill(engine, [(1, 5, 6), (1, 5, 7)], max_prefix=2)
    batch = []
    prefill.fill(batch, 512, admit)     -> [EndedPrompt(prompt=0, sequence=9), ...], [(node, 1), ...]
    engine.decode(batch)
    prefill.settle()

Sequence 0, the spine, holds what the next prompt shares with the prompts before it. Prompts are sorted, so all tokens
in memory that later prompts need lie on this one path. Each prompt has its sequence, forked from the spine. The tokens
of the batch that is being filled are not in memory yet and cannot be forked; they get the new sequence as one more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sg_local.llama.engine import BatchToken, Engine
from sg_local.llama.tree import Node, TokenIds, build_star, build_tree, nodes_between, shared_lengths

SPINE = 0


@dataclass(frozen=True)
class EndedPrompt:
    """A prompt whose last token is in the batch."""

    prompt: int
    sequence: int


class Prefill:
    """The walk over one prompt tree. There is at least one prompt; prompts are sorted, distinct and not empty."""

    def __init__(self, engine: Engine, prompts: Sequence[TokenIds], max_prefix: int) -> None:
        """max_prefix: the most tokens that the prefix may have, since no logits are read inside it."""
        self.engine = engine
        self.prompts = prompts
        self.n_prefix = engine.hold_prefix(_common_prefix(prompts)[:max_prefix])
        if engine.can_go_back:
            self.ends = build_tree(prompts)
            self._shared = shared_lengths(prompts)
            self._shared[0] = self.n_prefix
        else:  # the spine stays the prefix
            self.ends = build_star(prompts, self.n_prefix)
            self._shared = [self.n_prefix] * len(prompts)
        self._next = 0  # the first prompt that has not begun
        self._sequence = -1  # of the current prompt, the one before _next; -1: none
        self._position = self.n_prefix  # of the current prompt's next token
        self._spine = self.n_prefix  # tokens of sequence 0 in memory
        self._in_batch: dict[int, BatchToken] = {}  # position -> token of the current path in this batch

    @property
    def is_done(self) -> bool:
        return self._sequence < 0 and self._next == len(self.prompts)

    @property
    def n_next(self) -> int:
        """Tokens that the next prompt adds to the memory."""
        return len(self.prompts[self._next]) - self._shared[self._next]

    def fill(
        self, batch: list[BatchToken], n_batch: int, admit: Callable[[int], int | None]
    ) -> tuple[list[EndedPrompt], list[tuple[Node, int]]]:
        """Appends tokens, up to n_batch. admit(prompt) returns a sequence for the next prompt; None: it has to wait.

        Returns the prompts whose last token is in the batch, and node and position of the tokens whose logits are
        wanted, both in the order of the batch.
        """
        ended: list[EndedPrompt] = []
        wanted: list[tuple[Node, int]] = []
        while len(batch) < n_batch:
            if self._sequence < 0:
                sequence = admit(self._next) if self._next < len(self.prompts) else None
                if sequence is None:
                    break
                self._begin(sequence)
            number = self._next - 1
            prompt = self.prompts[number]
            stop = min(len(prompt), self._position + n_batch - len(batch))
            spine = self._kept_of(number)
            for node, start, end in nodes_between(self.ends[number], self._position, stop):
                for position in range(start, end):
                    sequences = [self._sequence, SPINE] if position < spine else [self._sequence]
                    token = BatchToken(
                        prompt[position], position, sequences, position in node.wanted_positions
                    )
                    self._in_batch[position] = token
                    if token.wants_logits:
                        wanted.append((node, position))
                    batch.append(token)
            self._position = stop
            if stop == len(prompt):
                ended.append(EndedPrompt(number, self._sequence))
                self._sequence = -1
        return ended, wanted

    def settle(self) -> None:
        """To be called when the batch was evaluated: its tokens are in memory, and the spine keeps what is needed."""
        self._in_batch.clear()
        if self._next:
            self._cut_spine(min(self._position, self._kept_of(self._next - 1)))

    def _kept_of(self, number: int) -> int:
        """How many tokens of a prompt the next one shares. Of the last one, the prefix stays for the next call."""
        return self._shared[number + 1] if number + 1 < len(self.prompts) else self.n_prefix

    def _cut_spine(self, n_tokens: int) -> None:
        if self._spine > n_tokens:
            self.engine.cut(SPINE, n_tokens)
        self._spine = n_tokens

    def _begin(self, sequence: int) -> None:
        """Forks the next prompt's sequence from the path of the one before, and cuts the spine to what is shared."""
        shared = self._shared[self._next]
        self._cut_spine(min(self._spine, shared))
        # Later prompts need no more of the path than this.
        kept = min(shared, self._kept_of(self._next))
        for position, token in list(self._in_batch.items()):
            if position >= kept and SPINE in token.sequences:
                token.sequences.remove(SPINE)
            if position < shared:
                token.sequences.append(sequence)
            else:
                del self._in_batch[position]
        if self._spine:
            self.engine.fork(SPINE, sequence, self._spine)
        self._sequence = sequence
        self._position = shared
        self._next += 1


def _common_prefix(prompts: Sequence[TokenIds]) -> TokenIds:
    """What all prompts begin with. As they are sorted, it is what the first and the last one share."""
    return prompts[0][: shared_lengths([prompts[0], prompts[-1]])[1]]
