"""Logits of whole sequences, several in a batch: what the proof of an export compares with torch.

    sequences_logits(engine, [((1, 4093, ...), 6), ...])  -> [array (n_tokens - 6, n_vocab), ...]

Each batch goes through all weights once. Where they do not fit the memory they are read from disk for it, 13 GB for a
7B model in 16 bits, so short sequences go together.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from sg_local.llama.engine import BatchToken, Engine
from sg_local.llama.logits import Logits
from sg_local.llama.scoring import sequence_logits
from sg_local.llama.tree import TokenIds

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
        batch = [
            BatchToken(token, position, [number], position >= first)
            for number, (tokens, first) in enumerate(part)
            for position, token in enumerate(tokens)
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
        together = sum(len(tokens) for tokens, _ in [*part, sequence])
        if part and (together > n_tokens or len(part) == n_sequences):
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part
