"""Which types an export is tried in, why a failed proof failed, and that a finished training is exported anew.

The proof's numbers are scripted: a Parity for each type. Nothing is computed.
"""

import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import Call, Contents, given
from finished_run import HEADER, MODEL, MODEL_TEMPLATE, TENSORS, finish_run
from gguf_bytes import TinyTensor, tiny_gguf
from messages import assert_says
from stand_ins import replace_export

import sg_local.finetune.environment as environment
import sg_local.stages.export as export
from sg_local.errors import InputError, SgLocalError
from sg_local.gguf_header import read_header
from sg_local.gguf_io.check_base import MIXED
from sg_local.proof.parity import Parity, diagnosis
from sg_local.runs.begin import create_or_open_run
from sg_local.runs.directory import Run, open_run
from sg_local.runs.stage import run_stage
from sg_local.settings import Settings
from sg_local.task import carried_task, load_task

PASSES = Parity(
    max_logit_difference=0.05,
    adapter_effect=20.0,
    mean_kl_nats=0.001,
    base_mean_kl_nats=5.0,
    argmax_equal_share=0.9,
    merged_type="F32",
    n_prompts=16,
    n_positions=50,
)
# Of a file → of its coarsest matrix.
TYPES = {"base": "Q4_1", MIXED: "Q4_1", "Q4_K_M": "Q4_K", "Q6_K": "Q6_K"}
Scripted = Callable[..., list[str]]


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """scripted({"base": 0.3, "Q8_0": 0.001}): the distances as measured; returns the types that are written.

    near_shares: what each type keeps near the decision, and "adapter"; without it too few rows are there.
    """
    monkeypatch.setattr(environment, "find_spec", lambda _name: object())

    right_types = export.types_to_try

    def script(
        mean_kl_nats: Mapping[str, float], near_shares: Mapping[str, float] | None = None, **numbers: float
    ) -> list[str]:
        tried: list[str] = []

        def write_adapter(_dir: Path, _base: Path, out: Path, _metadata: object) -> None:
            halves = [TinyTensor(f"blk.0.ffn_up.weight.lora_{half}", (2, 2)) for half in "ab"]
            out.write_bytes(tiny_gguf({"general.architecture": "llama", "general.type": "adapter"}, halves))

        def write_merged(
            _base: object, _settings: object, _adapter: Path, out: Path, quant: str, *_: Any
        ) -> None:
            assert not out.exists()
            out.write_text(quant)
            tried.append(quant)

        def compare(merged: Path) -> Parity:
            quant = merged.read_text()
            name = TYPES.get(quant, quant)
            measured = replace(PASSES, mean_kl_nats=mean_kl_nats[quant], merged_type=name, **numbers)
            if near_shares is None:
                return measured
            share = {
                "near_expected_share": near_shares[quant],
                "near_adapter_share": near_shares.get("adapter"),
            }
            return replace(measured, n_near_choices=48, n_near_equal=47, **share)

        def types_to_try(*arguments: Any) -> tuple[str, ...]:
            # The tiny base is F32, which nothing is too coarse for; here it passes for one in Q4_1.
            types = right_types(*arguments)
            return ("base", MIXED, "Q8_0") if types == ("base",) and arguments[1].quant == "auto" else types

        monkeypatch.setattr(export, "write_adapter_gguf", write_adapter)
        monkeypatch.setattr(export, "_write_merged", write_merged)
        monkeypatch.setattr(export, "types_to_try", types_to_try)
        monkeypatch.setattr(export, "trained_in_run", lambda *_: SimpleNamespace(compare=compare))
        monkeypatch.setattr(export, "_chat_files", lambda _run: ("{{ messages }}", "FROM ./model.gguf\n"))
        return tried

    return script


def test_auto_takes_a_finer_type_where_the_bases_is_too_coarse(finished_run: Run, scripted: Scripted) -> None:
    tried = scripted({"base": 0.3, MIXED: 0.26, "Q8_0": 0.01})
    assert run_stage(finished_run, "export", redo=True)
    assert tried == ["base", MIXED, "Q8_0"]
    entry = finished_run.manifest()["stages"]["export"]
    assert (entry["parity"]["merged_type"], entry["too_coarse"]["merged_type"]) == ("Q8_0", "Q4_1")
    assert entry["made_in"] == "Q8_0"


KEEPS = dict.fromkeys(("base", MIXED, "Q8_0"), 0.01)  # nats: all are near enough, away from the decision


@pytest.mark.parametrize(
    ("near_shares", "written", "made_in"),
    [
        ({"base": 0.98}, ["base"], "base"),
        ({"base": 0.96, MIXED: 0.975, "adapter": 1.0}, ["base", MIXED], MIXED),
        ({"base": 0.92, MIXED: 0.94, "Q8_0": 0.98, "adapter": 0.98}, ["base", MIXED, "Q8_0"], "Q8_0"),
        # No type has to keep what base + adapter.gguf does not.
        ({"base": 0.92, MIXED: 0.95, "adapter": 0.95}, ["base", MIXED], MIXED),
        # None is enough: what keeps most; of two that keep the same, the smaller one.
        ({"base": 0.92, MIXED: 0.96, "Q8_0": 0.95, "adapter": 0.97}, ["base", MIXED, "Q8_0", MIXED], MIXED),
        ({"base": 0.92, MIXED: 0.96, "Q8_0": 0.96, "adapter": 0.97}, ["base", MIXED, "Q8_0", MIXED], MIXED),
    ],
)
def test_auto_takes_the_coarsest_type_that_keeps_the_choices_near_the_decision(
    near_shares: dict[str, float],
    written: list[str],
    made_in: str,
    finished_run: Run,
    scripted: Scripted,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tried = scripted(KEEPS, near_shares)
    assert run_stage(finished_run, "export", redo=True)
    assert tried == written
    assert finished_run.file("model.gguf").read_text() == made_in
    entry = finished_run.manifest()["stages"]["export"]
    assert (entry["made_in"], entry["parity"]["near_expected_share"]) == (made_in, near_shares[made_in])
    told = capsys.readouterr().err
    for quant in written:
        assert (
            f"near the decision 47 of 48 choices are kept, by the noise on all of them {near_shares[quant]:.1%}"
            in told
        )
    listed = [(attempt["quant"], attempt["near_expected_share"]) for attempt in entry.get("tried", [])]
    measured = list(dict.fromkeys(written))
    assert listed == ([(quant, near_shares[quant]) for quant in measured] if len(measured) > 1 else [])


def test_a_type_that_was_asked_for_is_not_left_for_what_it_loses_near_the_decision(
    finished_run: Run, scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = scripted(KEEPS, {"base": 0.8, "adapter": 1.0})
    assert run_stage(finished_run.with_given({"quant": "base"}), "export", redo=True)
    assert tried == ["base"]
    assert_says(capsys.readouterr().err, "on all of them 80.0% (base + adapter.gguf: 100.0%)")


def test_where_a_finer_type_cannot_be_written_the_best_of_the_others_is_exported(
    finished_run: Run, scripted: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted(KEEPS, {"base": 0.92, MIXED: 0.9, "adapter": 1.0})
    write = export._write_merged

    def full_for_q8(*arguments: Any) -> None:
        if arguments[4] == "Q8_0":
            raise SgLocalError("model.gguf: No space left on device: free some space")
        write(*arguments)

    monkeypatch.setattr(export, "_write_merged", full_for_q8)
    assert run_stage(finished_run, "export", redo=True)
    assert finished_run.file("model.gguf").read_text() == "base"
    assert_says(capsys.readouterr().err, "No space left", "92.0%")


def test_auto_begins_with_the_finer_type_where_nothing_can_be_merged_in_the_bases(
    finished_run: Run, scripted: Scripted
) -> None:
    # The adapter changes this matrix alone; it is IQ4_NL in the base now.
    replaced = TinyTensor("blk.0.ffn_up.weight", (32, 2), 20, bytes(2 * 18))
    tensors = [replaced if tensor.name == replaced.name else tensor for tensor in TENSORS]
    finished_run.model.path.write_bytes(tiny_gguf(HEADER, tensors))
    assert read_header(finished_run.model.path).tensor("blk.0.ffn_up.weight").type_name == "IQ4_NL"  # type: ignore[union-attr]
    run = replace(
        finished_run, model=replace(finished_run.model, size_bytes=finished_run.model.path.stat().st_size)
    )
    tried = scripted({"Q8_0": 0.01})
    assert run_stage(run, "export", redo=True)
    assert tried == ["Q8_0"]
    assert "too_coarse" not in run.manifest()["stages"]["export"]


@pytest.mark.parametrize(
    ("quant", "mean_kl_nats", "tried", "passing"),
    [
        ("base", {"base": 0.3, "Q8_0": 0.01}, ["base", "Q8_0"], "Q8_0"),
        ("Q4_K_M", {"Q4_K_M": 0.3, "Q8_0": 0.07, "F16": 0.001}, ["Q4_K_M", "Q8_0", "F16"], "F16"),
        ("Q8_0", {"Q8_0": 0.4, "F16": 0.001}, ["Q8_0", "F16"], "F16"),
        (
            "auto",
            {"base": 0.3, MIXED: 0.3, "Q8_0": 0.07, "F16": 0.001},
            ["base", MIXED, "Q8_0", "F16"],
            "F16",
        ),
    ],
)
def test_an_adapter_that_is_too_strong_for_a_type_is_told_which_type_passes(
    quant: str,
    mean_kl_nats: dict[str, float],
    tried: list[str],
    passing: str,
    finished_run: Run,
    scripted: Scripted,
) -> None:
    ran = scripted(mean_kl_nats)
    with pytest.raises(SgLocalError) as caught:
        run_stage(finished_run.with_given({"quant": quant}), "export", redo=True)
    assert ran == tried
    message = str(caught.value)
    command = shlex.join(["sg-local", "export", str(finished_run.path), "--quant", passing])
    assert_says(message, "too coarse", f"{passing} passes", f"`{command}`")
    assert "defect" not in message
    assert "Nothing was exported" in message


def test_where_no_type_holds_it_the_merge_is_called_defect_with_all_numbers(
    finished_run: Run, scripted: Scripted
) -> None:
    scripted({"base": 0.3, MIXED: 0.3, "Q8_0": 0.29, "F16": 0.28})
    with pytest.raises(SgLocalError, match="this is a defect") as caught:
        run_stage(finished_run, "export", redo=True)
    assert_says(str(caught.value), "0.290", "0.280")


def test_a_type_that_cannot_be_tried_does_not_hide_the_diagnosis(
    finished_run: Run, scripted: Scripted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted({"Q6_K": 0.3, "F16": 0.001})
    write = export._write_merged

    def full_for_q8(*arguments: Any) -> None:
        if arguments[4] == "Q8_0":
            raise SgLocalError("model.gguf: No space left on device: free some space")
        write(*arguments)

    monkeypatch.setattr(export, "_write_merged", full_for_q8)
    with pytest.raises(SgLocalError, match="F16 passes"):
        run_stage(finished_run.with_given({"quant": "Q6_K"}), "export", redo=True)
    assert "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("effect", [0.0, 0.05])
def test_an_adapter_that_does_nothing_is_no_defect(
    effect: float, finished_run: Run, scripted: Scripted
) -> None:
    # A coarse type is further from torch than the base is, as the base is the trained model.
    tried = scripted({"base": 0.1}, adapter_effect=effect, base_mean_kl_nats=0.001)  # type: ignore[call-arg]
    with pytest.raises(SgLocalError) as caught:
        run_stage(finished_run, "export", redo=True)
    assert tried == ["base"]  # no type would help
    assert_says(str(caught.value), f"{effect:.3f}", "nothing", "learning rate")
    assert "defect" not in str(caught.value)


def test_a_base_that_differs_without_the_adapter_is_another_model(finished_run: Run) -> None:
    differing = replace(PASSES, max_logit_difference=3.0, base_logit_difference=2.8)
    told = diagnosis(differing, finished_run.model, str, {})
    assert_says(told, "2.800", "do not compute the same model", finished_run.model.sha256[:16])
    # Where the base agrees, the adapter is at fault: a writer's defect.
    told = diagnosis(replace(differing, base_logit_difference=0.05), finished_run.model, str, {})
    assert "this is a defect" in told


def test_a_finished_training_is_exported_in_another_type(
    sg: Call, finished_run: Run, task: Path, contents: Contents, scripted: Scripted
) -> None:
    tried = scripted({"base": 0.01, "Q8_0": 0.001, "F16": 0.0005})
    settings = contents(finished_run.path)["settings.toml"]
    result = sg("export", finished_run.path, "--quant", "Q8_0")
    assert (result.exit_code, tried) == (0, ["Q8_0"]), result.output
    entry = finished_run.manifest()["stages"]["export"]
    assert (entry["settings"]["quant"], entry["given"]) == ("Q8_0", ["quant"])
    assert contents(finished_run.path)["settings.toml"] == settings
    # It stands: for the same call, for one without the flag, and for `run` as it was begun.
    for again in (["--quant", "Q8_0"], []):
        assert_says(sg("export", finished_run.path, *again).stderr, "is finished")
    run = open_run(finished_run.path)
    unfinished = run.first_unfinished()
    assert unfinished is not None
    assert unfinished.stage == "evaluate"  # it scored the file that was there before
    assert not run.changed_settings("export", entry)  # verify agrees
    assert sg(*given(finished_run, task), "--until", "export").exit_code == 0
    assert tried == ["Q8_0"]
    # Another type is another export, and auto goes back.
    assert sg("export", finished_run.path, "--quant", "F16").exit_code == 0
    assert sg("export", finished_run.path, "--quant", "auto").exit_code == 0
    assert tried == ["Q8_0", "F16", "base"]
    assert_says(sg("export", finished_run.path).stderr, "is finished")
    # No other stage has settings of its own.
    assert sg("train", finished_run.path, "--quant", "F16").exit_code == 2


def test_run_with_another_type_says_how_a_finished_training_gets_it(
    sg: Call, finished_run: Run, task: Path
) -> None:
    result = sg(*given(finished_run, task), "--quant", "F16")
    assert result.exit_code == 2
    command = shlex.join(["sg-local", "export", str(finished_run.path), "--quant", "F16"])
    assert_says(result.stderr, f"`{command}`", "--run DIR")
    # With another change it would not help.
    assert command not in sg(*given(finished_run, task), "--quant", "F16", "--rank", 8).stderr


def test_the_merged_model_carries_the_template_for_other_programs_beside_that_of_its_base(
    finished_run: Run, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted({"base": 0.01})
    carried: list[Mapping[str, str]] = []
    write_merged, write_adapter = export._write_merged, export.write_adapter_gguf

    def merged(*arguments: Any) -> None:
        carried.append(arguments[-1])
        write_merged(*arguments)

    def adapter(*arguments: Any) -> None:
        carried.append(arguments[-1])
        write_adapter(*arguments)

    monkeypatch.setattr(export, "_write_merged", merged)
    monkeypatch.setattr(export, "write_adapter_gguf", adapter)
    assert run_stage(finished_run, "export", redo=True)
    of_adapter, of_model = carried
    assert not [key for key in of_adapter if "chat_template" in key]
    assert of_model["tokenizer.chat_template"] == finished_run.file("chat_template.jinja").read_text()
    assert of_model["tokenizer.chat_template.base"] == MODEL_TEMPLATE


def test_the_template_of_a_tuned_model_is_its_bases(tmp_path: Path) -> None:
    templates = {"tokenizer.chat_template": "for others", "tokenizer.chat_template.base": "the base's"}
    for more, expected in (({}, "for others"), ({"sg_local.task": "{}"}, "the base's")):
        path = tmp_path / "model.gguf"
        path.write_bytes(tiny_gguf({**HEADER, **templates, **more}, TENSORS))
        assert read_header(path).chat_template == expected


def test_the_adapter_of_a_run_carries_its_task_wherever_it_is_exported(
    finished_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_export(monkeypatch)
    written: list[dict[str, str]] = []
    write = export.write_adapter_gguf

    def keep(adapter: Path, base: Path, out: Path, metadata: dict[str, str]) -> None:
        written.append(metadata)
        write(adapter, base, out, metadata)

    monkeypatch.setattr(export, "write_adapter_gguf", keep)
    merged: list[dict[str, str]] = []
    merge = export._write_merged
    monkeypatch.setattr(export, "_write_merged", lambda *args: (merged.append(args[-1]), merge(*args)))
    call = (str(finished_run.model.path), tmp_path / "out", finished_run.settings)
    export.export_adapter(finished_run.file("adapter"), *call)
    carried = carried_task(written[0]["sg_local.task"], tmp_path)
    assert carried.task.instruction == finished_run.task.instruction
    assert (carried.task.examples, carried.max_new_tokens) == ((), 128)
    assert_says(capsys.readouterr().err, "carry its task", finished_run.task.name)
    # One that is no run's is of no task.
    shutil.copytree(finished_run.file("adapter"), tmp_path / "adapter")
    export.export_adapter(tmp_path / "adapter", call[0], tmp_path / "other", call[2])
    assert "sg_local.task" not in written[1]
    assert ["tokenizer.chat_template" in metadata for metadata in merged] == [True, False]
    # What was put in the place of a run's adapter is not what the task was trained into.
    finished_run.file("adapter/adapter_config.json").write_text("{ }")
    with pytest.raises(InputError, match="not as it was written"):
        export.export_adapter(finished_run.file("adapter"), call[0], tmp_path / "third", call[2])


@pytest.mark.parametrize(
    ("file_name", "general_name", "expected"),
    [
        ("Tiny.Q4_1.gguf", "tiny", "Tiny.Q4_1 tuned for inbox"),
        ("Phi-3-mini.gguf", "Phi3 Mini", "Phi-3-mini tuned for inbox"),
        ("Phi-3-mini.gguf", "tiny", "tiny"),
        ("mini.gguf", "Phi3 Mini", "Phi3 Mini"),
        ("Phi-3-mini.gguf", None, "tuned"),
    ],
)
def test_the_exported_name_changes_nothing_of_how_llama_cpp_tokenizes(
    file_name: str, general_name: str | None, expected: str, tmp_path: Path, task: Path
) -> None:
    """Its rule for Phi 3 goes by general.name, and would drop spaces, or fail on another vocabulary."""
    path = tmp_path / file_name
    metadata = {key: value for key, value in MODEL.items() if key != "general.name"}
    if general_name:
        metadata["general.name"] = general_name
    path.write_bytes(tiny_gguf(metadata, TENSORS))
    run, _ = create_or_open_run(tmp_path / "run", load_task(str(task)), path, Settings())
    finish_run(run)
    assert export._metadata(run)["general.name"] == expected
