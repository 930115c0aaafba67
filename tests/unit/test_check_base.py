"""What a base's header says against a whole run, told before it begins: by run, plan, bench and export-adapter."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Call
from finished_run import HEADER, TENSORS, ScriptedStages
from gguf_bytes import TinyTensor, tiny_gguf
from gguf_models import write_peft
from messages import assert_says
from tiny_models import write_tiny_model

import sg_local.runs.begin as begin
from sg_local.errors import InputError
from sg_local.files import sha256_file
from sg_local.gguf_header import read_header
from sg_local.gguf_io.check_base import MIXED, about_merging, finer_types, require_base, types_to_try
from sg_local.settings import Settings


def write_base(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    return write_tiny_model(path, architecture, **changes)


def write_with(base: Path, replaced: TinyTensor, path: Path) -> Path:
    """The base with one tensor of another type, by hand: the gguf package cannot write all of them."""
    header = read_header(base)
    data = base.read_bytes()
    tensors = [
        TinyTensor(
            tensor.name,
            tensor.shape,
            0,
            data[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes],
        )
        for tensor in header.tensors
    ]
    wanted = {
        key: value for key, value in header.metadata.items() if "." in key and not isinstance(value, list)
    }
    path.write_bytes(
        tiny_gguf(wanted, [replaced if tensor.name == replaced.name else tensor for tensor in tensors])  # type: ignore[arg-type]
    )
    return path


# IQ4_NL, which llama.cpp chooses where rows are no multiple of 256: 18 bytes for 32 values.
def in_iq4_nl(name: str, rows: int, columns: int) -> TinyTensor:
    return TinyTensor(name, (columns, rows), 20, bytes(rows * columns // 32 * 18))


def write_unmergeable(path: Path) -> Path:
    return write_with(write_base(path), in_iq4_nl("blk.0.ffn_up.weight", 96, 64), path)


# what is wrong with the base → how it is written, the settings, what is said
LATE: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "longrope": (
        {"metadata": {"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}},
        [],
        "llama.rope.scaling.type is 'longrope'",
    ),
    "no context": ({"metadata": {"context_length": None}}, [], "llama.context_length is None"),
    "no epsilon": ({"metadata": {"attention.layer_norm_rms_epsilon": None}}, [], "rms_epsilon is None"),
    "experts": ({"metadata": {"expert_count": 8}}, [], "mixture of 8 experts"),
    "a tensor that is gone": (
        {"without": "blk.1.ffn_up.weight"},
        [],
        "tensor blk.1.ffn_up.weight is missing",
    ),
    "rotation in part": ({"metadata": {"rope.dimension_count": 8}}, [], "rotates 8 of 16"),
    "heads of two sizes": ({"metadata": {"attention.value_length": 8}}, [], "differ in length"),
    "a module of another architecture": ({}, ["--target-modules", "q_proj,qkv_proj"], "'qkv_proj'"),
    "no room": ({}, ["--max-input-tokens", "512"], "--max-input-tokens 256"),
}


@pytest.mark.parametrize("what", LATE)
def test_what_would_be_refused_after_hours_is_refused_before(
    what: str, sg: Call, task: Path, tmp_path: Path
) -> None:
    written, flags, expected = LATE[what]
    base = write_base(tmp_path / "base.gguf", **written)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/inbox.toml").write_text(task.read_text().replace("inbox.test", "../inbox.test"))
    for command in (
        ["plan", task],
        ["run", task, "--run", tmp_path / "run"],
        ["bench", tmp_path / "tasks", "--out", tmp_path / "bench"],
    ):
        result = sg(*command, "--model", base, "--prompt-format", "vicuna", *flags)
        assert (result.exit_code, result.stdout) == (2, "")
        assert_says(result.stderr, expected)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize("what", [key for key, (written, _, _) in LATE.items() if written])
def test_an_adapter_for_a_base_that_cannot_be_proved_is_refused_before_anything_is_written(
    what: str, sg: Call, tmp_path: Path
) -> None:
    written, _, expected = LATE[what]
    base = write_base(tmp_path / "base.gguf", **written)
    adapter = write_peft(tmp_path / "adapter")
    result = sg("export-adapter", "--adapter", adapter, "--model", base)
    assert (result.exit_code, result.stdout) == (2, "")
    assert_says(result.stderr, expected)
    assert not (tmp_path / "adapter-gguf").exists()


def test_all_faults_are_told_at_once(sg: Call, task: Path, tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base.gguf",
        metadata={"rope.scaling.type": "longrope", "attention.layer_norm_rms_epsilon": 2.0},
        without="output_norm.weight",
    )
    flags = ["--target-modules", "qkv_proj", "--max-input-tokens", "600"]
    result = sg("run", task, "--model", base, *flags)
    assert_says(
        result.stderr,
        "longrope",
        "rms_epsilon is 2.0",
        "output_norm.weight",
        "qkv_proj",
        "chat template",
        "600",
    )


def test_a_base_that_is_refused_is_not_hashed(
    sg: Call, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base.gguf", metadata={"rope.scaling.type": "longrope"})
    hashed = []
    monkeypatch.setattr(begin, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    assert sg("run", task, "--model", base).exit_code == 2
    assert not hashed


def test_an_ablation_that_the_base_cannot_take_stops_the_bench_before_its_first_run(
    sg: Call, task: Path, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base.gguf")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/inbox.toml").write_text(task.read_text().replace("inbox.test", "../inbox.test"))
    result = sg(
        "bench", tmp_path / "tasks", "--out", tmp_path / "bench", "--model", base, "--prompt-format=vicuna",
        "--ablate", "target_modules=qkv_proj",
    )  # fmt: skip
    assert result.exit_code == 2
    assert_says(result.stderr, "qkv_proj")
    assert not (tmp_path / "bench").exists()


def test_the_type_of_the_export_is_said_where_the_bases_own_cannot_be_merged(
    sg: Call, task: Path, tmp_path: Path, stages: ScriptedStages
) -> None:
    base = write_unmergeable(tmp_path / "base.gguf")
    arguments = [task, "--model", base, "--prompt-format", "vicuna"]
    begun = sg("run", *arguments, "--until", "generate")
    assert begun.exit_code == 0, begun.output
    assert_says(begun.stderr, "Q8_0", "IQ4_NL")
    planned = sg("plan", *arguments, "--gpu-memory", 0)
    assert_says(planned.stdout, "Q8_0", "IQ4_NL")
    for command in ("plan", "run"):
        refused = sg(
            command, *arguments, "--quant", "base", *(["--run", "other"] if command == "run" else [])
        )
        assert refused.exit_code == 2
        assert_says(refused.stderr, "IQ4_NL", "--quant Q8_0")
    facts = {
        quant: json.loads(sg("plan", *arguments, "--quant", quant, "--gpu-memory", 0, "--json").stdout)
        for quant in ("auto", "Q8_0", "Q4_K_M")
    }
    disk = {
        quant: next(step["disk"] for step in fact["steps"] if step["step"] == "export")
        for quant, fact in facts.items()
    }
    assert disk["auto"] == disk["Q8_0"] != disk["Q4_K_M"]
    assert [bool(fact["notes"]) for fact in facts.values()] == [True, False, False]


def test_only_matrices_that_get_lora_decide(tmp_path: Path) -> None:
    header = read_header(write_unmergeable(tmp_path / "base.gguf"))
    auto = Settings()
    assert types_to_try(header, auto) == ("Q8_0",)
    assert_says(about_merging(header, auto) or "", "IQ4_NL", "Q8_0")
    with pytest.raises(InputError, match="IQ4_NL"):
        require_base(header, replace(auto, quant="base"))
    attention = replace(auto, target_modules="q_proj, v_proj")
    assert types_to_try(header, attention) == ("base",)
    assert about_merging(header, attention) is None
    require_base(header, replace(attention, quant="base"))
    require_base(header, replace(auto, quant="F16"))
    # An adapter from elsewhere says by itself what it changes.
    assert types_to_try(header, auto, ["blk.0.ffn_down.weight"]) == ("base",)
    assert types_to_try(header, attention, ["blk.0.ffn_up.weight"]) == ("Q8_0",)


def test_auto_tries_finer_types_only_for_a_base_that_rounds_much(tmp_path: Path) -> None:
    fine, coarse, auto = tmp_path / "fine.gguf", tmp_path / "coarse.gguf", Settings()
    fine.write_bytes(tiny_gguf(HEADER, TENSORS))
    in_q4_1 = ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")
    tensors = [tensor._replace(tensor_type=3) if tensor.name in in_q4_1 else tensor for tensor in TENSORS]
    coarse.write_bytes(tiny_gguf(HEADER, tensors))
    header = read_header(coarse)
    assert types_to_try(read_header(fine), auto) == ("base",)
    assert types_to_try(header, auto) == ("base", MIXED, "Q8_0")
    assert types_to_try(header, replace(auto, quant="Q6_K")) == ("Q6_K",)
    assert finer_types(header, ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_up.weight"]) == {
        "blk.0.attn_q.weight": "Q8_0"
    }
    # Where the mixture is the base, or all of it, it is not tried.
    for names in (["blk.0.attn_q.weight"], ["blk.0.ffn_up.weight"]):
        assert types_to_try(header, auto, names) == ("base", "Q8_0")
    assert types_to_try(header, auto, ["blk.0.attn_k.weight"]) == ("base",)


def test_a_type_that_torch_cannot_be_given_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.gguf")
    integers = TinyTensor("blk.0.ffn_up.weight", (64, 96), 26, bytes(4 * 64 * 96))
    header = read_header(write_with(base, integers, tmp_path / "integers.gguf"))
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight in the type I32"):
        require_base(header, Settings(quant="F16"))


def test_a_context_with_other_rotation_factors_is_refused(tmp_path: Path) -> None:
    factors = {f"rope_factors_{name}.weight": [1.0] * 8 for name in ("long", "short")}

    def phi3(original: int) -> Path:
        scaling: dict[str, Any] = {"rope.scaling.original_context_length": original}
        return write_base(tmp_path / "phi3.gguf", "phi3", metadata=scaling, vectors=factors)

    header = read_header(phi3(4096))
    require_base(header, Settings(n_ctx=4096))
    with pytest.raises(InputError, match=r"other rotation factors above 4096 tokens.* take --n-ctx 4096"):
        require_base(header, Settings(n_ctx=4097))
    # What is advised has to be a value that the setting takes.
    with pytest.raises(InputError, match=r"above 128 tokens.* give another model"):
        require_base(read_header(phi3(128)), Settings())
