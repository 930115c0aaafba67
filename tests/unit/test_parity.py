"""What the proof of an export opens where; nothing is computed here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from messages import assert_says
from scripted_engine import ScriptedEngine

import sg_local.finetune.reference as reference
import sg_local.gguf_io.adapter as adapter_module
import sg_local.gguf_io.base_weights as base_weights
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
    monkeypatch.setattr(base_weights, "BaseWeights", lambda path: path)
    monkeypatch.setattr(parity, "sequences_logits", lambda *_: [logits])
    monkeypatch.setattr(parity, "_merged_type", lambda _path: "Q4_K")
    monkeypatch.setattr(adapter_module, "fields_for_peft", lambda _dir: {"r": 4})
    monkeypatch.setattr(adapter_module, "directory_for_peft", lambda adapter_dir, _clean: adapter_dir)
    fields: list[object] = []
    monkeypatch.setattr(reference, "reference_logits", lambda *given: fields.append(given[3]) or [logits])
    run = finished_run
    files = [run.file(name) for name in ("adapter", "adapter.gguf")]
    trained = parity.Trained(run.model, run.settings, *files, [((1, 2, 3), 1)])
    trained.compare(run.file("model.gguf"))
    assert engine.opened == [
        ("f16.gguf", None, 0),
        ("f16.gguf", "adapter.gguf", 0),
        ("model.gguf", None, -1),
    ]
    assert fields == [{"r": 4}]  # and not the adapter's own file, which may be a stranger's


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_what_the_adapter_keeps_near_the_decision_is_measured_where_the_merged_file_keeps_too_little(
    noise: float, finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ScriptedEngine()
    engine.replace_llama_cpp(monkeypatch)
    rows, near = [((1, 2, 3), 1)], [((1, 2, 4), 1), ((1, 2, 0), 1)]
    # Of the near rows token 4 leads by 1 and token 0 by 2, or with noise token 3 leads in the first one.
    trained = [
        np.float32([[0, 0, 0, 5, 0]] * 2),
        np.float32([[0, 0, 0, 0, 1]] * 2),
        np.float32([[2, 0, 0, 0, 0]] * 2),
    ]

    def served(_engine: object, sequences: list[Any]) -> list[Any]:
        model, adapter, _ = engine.opened[-1]
        moved = [logits.copy() for logits in trained]
        if (model, adapter) == ("model.gguf", None):
            moved[1][:, 4] -= noise
        return moved[:1] if sequences == rows else moved[1:] if sequences == near else moved

    monkeypatch.setattr(parity, "f16_gguf", lambda *_: Path("f16.gguf"))
    monkeypatch.setattr(base_weights, "BaseWeights", lambda path: path)
    monkeypatch.setattr(parity, "sequences_logits", served)
    monkeypatch.setattr(parity, "_merged_type", lambda _path: "Q4_K")
    monkeypatch.setattr(adapter_module, "fields_for_peft", lambda _dir: {"r": 4})
    monkeypatch.setattr(adapter_module, "directory_for_peft", lambda adapter_dir, _clean: adapter_dir)
    monkeypatch.setattr(reference, "reference_logits", lambda *_: trained)
    run = finished_run
    files = [run.file(name) for name in ("adapter", "adapter.gguf")]
    compared = parity.Trained(run.model, run.settings, *files, rows, near)
    n_opened = len(engine.opened)
    measured = [compared.compare(run.file("model.gguf")) for _ in range(2)]
    assert measured[0] == measured[1]
    opened = [(model, adapter) for model, adapter, _ in engine.opened[n_opened:]]
    with_adapter = (run.model.path.name, "adapter.gguf")
    assert measured[0].n_near_choices == 2
    if noise:  # once for all files that are compared
        assert opened == [("model.gguf", None), with_adapter, ("model.gguf", None)]
        assert (measured[0].n_near_equal, measured[0].near_adapter_share) == (1, 1.0)
        assert not measured[0].keeps_choices
    else:
        assert opened == [("model.gguf", None)] * 2
        assert (measured[0].n_near_equal, measured[0].near_adapter_share) == (2, None)
        assert measured[0].keeps_choices
    assert replace(measured[0], near_expected_share=0.95, near_adapter_share=0.94).keeps_choices


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


def export_as(quant: str) -> str:
    return f"sg-local export runs/a --quant {quant}"


def test_a_merged_file_that_lost_something_is_passed_with_advice_and_one_that_lost_much_is_not() -> None:
    assert parity_of(0.04).advice(export_as) is None
    assert_says(parity_of(0.11).advice(export_as) or "", "adapter.gguf", export_as("Q8_0"))
    assert not parity_of(0.11).faults()
    assert parity_of(0.3).faults()


def test_a_merge_that_is_too_coarse_names_the_command_that_goes_on_and_is_not_called_a_defect(
    finished_run: Run,
) -> None:
    base = finished_run.model
    passing = {"Q8_0": replace(parity_of(0.008), merged_type="Q8_0")}
    with pytest.raises(SgLocalError) as too_coarse:
        parity.require_parity(parity_of(0.335), base, export_as, passing)
    assert_says(str(too_coarse.value), "0.335 nats", f"`{export_as('Q8_0')}`")
    assert "defect" not in str(too_coarse.value)

    # None is rounding: the adapter itself differs, no type holds it, or the logits are no numbers.
    for wrong, finer in (
        (replace(parity_of(0.335), max_logit_difference=0.3), passing),
        (replace(parity_of(0.335), merged_type="Q8_0"), {}),
        (replace(parity_of(0.335), merged_type="Q8_0"), {"F16": replace(parity_of(0.3), merged_type="F16")}),
        (parity_of(float("nan")), passing),
    ):
        with pytest.raises(SgLocalError, match="this is a defect"):
            parity.require_parity(wrong, base, export_as, finer)


def test_what_may_hold_more_than_a_type_is_finer_than_it() -> None:
    assert parity_of(0.3).finer_quants == ("Q8_0", "F16")
    assert replace(parity_of(0.3), merged_type="Q8_0").finer_quants == ("F16",)
    assert replace(parity_of(0.3), merged_type="F16").finer_quants == ()


def test_the_base_is_measured_alone_only_where_the_adapter_differs(
    finished_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ScriptedEngine().replace_llama_cpp(monkeypatch)
    zeros = np.zeros((2, 5), np.float32)
    asked: list[Path | None] = []
    torch_off_by = 0.0

    def in_torch(_weights: Path, adapter: Path | None, *_: object) -> list[Any]:
        asked.append(adapter)
        return [zeros + np.array([torch_off_by, 0, 0, 0, 0], np.float32)]

    monkeypatch.setattr(parity, "f16_gguf", lambda *_: Path("f16.gguf"))
    monkeypatch.setattr(base_weights, "BaseWeights", lambda path: path)
    monkeypatch.setattr(parity, "sequences_logits", lambda *_: [zeros])
    monkeypatch.setattr(parity, "_merged_type", lambda _path: "Q4_K")
    monkeypatch.setattr(adapter_module, "fields_for_peft", lambda _dir: {"r": 4})
    monkeypatch.setattr(adapter_module, "directory_for_peft", lambda adapter_dir, _clean: adapter_dir)
    monkeypatch.setattr(reference, "reference_logits", in_torch)
    run = finished_run
    files = [run.file(name) for name in ("adapter", "adapter.gguf")]

    def measured() -> parity.Parity:
        trained = parity.Trained(run.model, run.settings, *files, [((1, 2, 3), 1)])
        return trained.compare(run.file("model.gguf"))

    same = measured()
    assert (same.base_logit_difference, asked) == (None, [run.file("adapter")])
    assert "base_logit_difference" not in same.as_dict()
    torch_off_by = 2.0
    other = measured()
    assert other.base_logit_difference == 2.0
    assert other.is_another_model
    assert asked[-1] is None


def test_a_difference_is_judged_beside_what_the_adapter_does() -> None:
    # An adapter.gguf with a layer that PEFT left out: under the bound in logits, and a seventh of its effect.
    weak = replace(parity_of(0.01), max_logit_difference=0.084, adapter_effect=0.6)
    (fault,) = weak.faults()
    assert_says(fault, "adapter.gguf", "0.084", "0.600")
    assert weak.adapter_differs
    assert not weak.does_nothing
    assert not weak.only_merge_differs
    # Where torch and llama.cpp differ as much without it, it does too little to be compared.
    rounding = replace(weak, base_logit_difference=0.08)
    assert rounding.does_nothing
    assert not rounding.is_another_model
    assert replace(weak, base_logit_difference=0.01).faults()
    assert not replace(weak, base_logit_difference=0.01).does_nothing
    # What a right one of the same strength and of the weakest that can be seen differ by; measured.
    assert not replace(weak, max_logit_difference=0.0103, adapter_effect=0.52).faults()
    assert not replace(weak, max_logit_difference=0.0099, adapter_effect=0.106).faults()
    # The bound in logits stays for strong ones.
    assert replace(weak, max_logit_difference=0.11, adapter_effect=20.0).faults()
    assert replace(weak, max_logit_difference=float("nan")).faults()
    assert replace(weak, adapter_effect=float("nan")).faults()
