"""What the proof of an export opens where; nothing is computed here."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from messages import assert_says
from scripted_engine import ScriptedEngine

import sg_local.finetune.reference as reference
import sg_local.proof.parity as parity
from sg_local.errors import SgLocalError
from sg_local.runs.directory import Run


def test_the_16_bit_copy_is_compared_on_the_cpu_and_the_merged_file_where_it_is_served(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A 7B model's 16-bit copy needs 13.5 GB: on the card that serves it in 4 bits, every export would have failed.
    engine = ScriptedEngine()
    engine.replace_llama_cpp(monkeypatch)
    logits = np.zeros((2, 5), np.float32)
    monkeypatch.setattr(parity, "f16_gguf", lambda *_: Path("f16.gguf"))
    monkeypatch.setattr(parity, "torch_weights", lambda _run: Path("hf"))
    monkeypatch.setattr(parity, "sequence_logits", lambda *_: logits)
    monkeypatch.setattr(parity, "_merged_type", lambda _path: "Q4_K")
    monkeypatch.setattr(reference, "reference_logits", lambda *_: [logits])
    run = finished_run
    files = [run.file(name) for name in ("adapter", "adapter.gguf", "model.gguf")]
    parity.measure(run.model, run.settings, *files, [((1, 2, 3), 1)])
    assert engine.opened == [
        ("f16.gguf", None, 0),
        ("f16.gguf", "adapter.gguf", 0),
        ("model.gguf", None, -1),
    ]


def parity_of(mean_kl_nats: float) -> parity.Parity:
    return parity.Parity(
        max_logit_difference=0.05,
        adapter_effect=20.0,
        mean_kl_nats=mean_kl_nats,
        base_mean_kl_nats=5.0,
        argmax_equal_share=0.9,
        merged_type="Q4_1",
        n_prompts=16,
        n_positions=50,
    )


def test_a_merged_file_that_lost_something_is_passed_with_advice_and_one_that_lost_much_is_not() -> None:
    assert parity_of(0.04).advice is None
    assert_says(parity_of(0.11).advice or "", "adapter.gguf", "--quant Q8_0")
    assert not parity_of(0.11).faults()
    assert parity_of(0.3).faults()


def test_a_merge_that_is_too_coarse_names_the_command_that_goes_on_and_is_not_called_a_defect() -> None:
    adapter, base = Path("runs/a/adapter"), Path("base.gguf")
    with pytest.raises(SgLocalError) as too_coarse:
        parity.require_parity(parity_of(0.335), adapter, base)
    assert "0.335 nats" in str(too_coarse.value)
    assert "`sg-local export-adapter --adapter runs/a/adapter --model base.gguf --quant Q8_0`" in str(
        too_coarse.value
    )
    assert "defect" not in str(too_coarse.value)

    # None is rounding: the adapter itself differs, the type is fine enough to hold it, or the logits are no numbers.
    for wrong in (
        replace(parity_of(0.335), max_logit_difference=0.3),
        replace(parity_of(0.335), merged_type="Q8_0"),
        parity_of(float("nan")),
    ):
        with pytest.raises(SgLocalError, match="this is a defect"):
            parity.require_parity(wrong, adapter, base)
