"""Logits of whole sequences, several in a batch: what the proof of an export compares with torch.

    sequences_logits(engine, [((1, 4093, ...), 6), ...])  -> [array (n_tokens - 6, n_vocab), ...]

Each batch goes through all weights once. Where they do not fit the memory they are read from disk for it, 13 GB for a
7B model in 16 bits, so short sequences go together. What they begin with, an instruction, is computed once in a batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from sg_local.llama.engine import BatchToken, Engine
from sg_local.llama.logits import Logits
from sg_local.llama.scoring import sequence_logits
from sg_local.llama.tree import TokenIds, shared_lengths

From = tuple[TokenIds, int]  # token ids, and the first position whose logits are wanted


def sequences_logits(engine: Engine, sequences: Sequence[From]) -> list[Logits]:
    """Logits (len(tokens) - first, n_vocab) of each sequence from its position `first` on."""
    found: list[Logits] = []
    for part in _parts(sequences, min(engine.n_batch, engine.n_ctx), engine.n_sequences):
        if len(part) == 1:
            found.append(sequence_logits(engine, *part[0]))
            continue
        engine.use_backend_top_k(0)
        engine.clear()
        n_shared = _n_shared(part)
        prefix = part[0][0][:n_shared]
        batch = [
            BatchToken(token, place, list(range(len(part))), False) for place, token in enumerate(prefix)
        ]
        batch += [
            BatchToken(token, position, [number], position >= first)
            for number, (tokens, first) in enumerate(part)
            for position, token in enumerate(tokens[n_shared:], n_shared)
        ]
        engine.decode(batch)
        ends = np.cumsum([len(tokens) - first for tokens, first in part])
        found += np.split(engine.logits().copy(), ends[:-1])
        engine.clear()
    return found


def _parts(sequences: Sequence[From], n_tokens: int, n_sequences: int) -> Iterator[list[From]]:
    """The sequences in their order, those together that fit into a batch."""
    part: list[From] = []
    for sequence in sequences:
        with_it = [*part, sequence]
        n_shared = _n_shared(with_it)
        together = n_shared + sum(len(tokens) - n_shared for tokens, _ in with_it)
        if part and (together > n_tokens or len(part) == n_sequences):
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part


def _n_shared(part: Sequence[From]) -> int:
    """How many tokens all of these sequences begin with whose logits none of them wants."""
    tokens = [tokens for tokens, _ in part]
    # What the first and the last one in order begin with, all between them begin with.
    _, n_equal = shared_lengths([min(tokens), max(tokens)])
    return min(n_equal, *(first for _, first in part))
