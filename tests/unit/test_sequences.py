"""Whole sequences in one batch give the logits that each gives alone."""

from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_llama, write_tiny_model

from sg_local.llama.engine import Engine, open_engine
from sg_local.llama.scoring import sequence_logits
from sg_local.llama.sequences import From, sequences_logits

SEQUENCES: list[From] = [
    ((1, 5, 9, 12, 4), 2),
    ((1, 7, 3), 0),
    ((1, *range(3, 40)), 30),
    ((1, 8, 8, 8), 3),
    ((1, 9), 1),
]
PROMPT = tuple(range(1, 31))
WITH_PROMPT: list[From] = [
    ((*PROMPT, 5, 9), 30),
    ((*PROMPT[:29], 40, 7, 8), 31),  # the one in the middle shares least
    ((*PROMPT, 3), 28),  # its logits are wanted from within the prompt
]


# lfm2 and qwen35: a state for each sequence, which llama.cpp has to part where the shared tokens end
@pytest.mark.parametrize("architecture", ["llama", "lfm2", "qwen35"])
@pytest.mark.parametrize(
    ("sequences", "n_ctx", "batches"),
    [
        (SEQUENCES, 256, [52]),
        (SEQUENCES, 40, [8, 38, 5]),  # the last two share their first token
        (WITH_PROMPT, 256, [28 + 4 + 4 + 3]),
        ([*WITH_PROMPT[:2], WITH_PROMPT[0]], 256, [29 + 3 + 3 + 3]),
        (WITH_PROMPT, 35, [29 + 3 + 3, 31]),
    ],
)
def test_sequences_that_fit_a_batch_go_together_and_do_not_see_one_another(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    sequences: list[From],
    n_ctx: int,
    batches: list[int],
) -> None:
    path = tmp_path / "tiny.gguf"
    if architecture == "llama":
        write_tiny_llama(path)
    else:
        write_tiny_model(path, architecture, n_layers=4)
    with open_engine(path, n_ctx=256, n_parallel=1) as engine:
        alone = [sequence_logits(engine, *sequence) for sequence in sequences]
        engine.n_ctx = n_ctx
        sizes: list[int] = []
        decode = Engine.decode
        monkeypatch.setattr(
            Engine, "decode", lambda self, tokens: (sizes.append(len(tokens)), decode(self, tokens))[1]
        )
        together = sequences_logits(engine, sequences)
        assert sizes == batches
    assert [rows.shape for rows in together] == [rows.shape for rows in alone]
    for rows, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(rows, expected, atol=2e-2)
    assert max(float(np.abs(rows).max()) for rows in alone) > 1
