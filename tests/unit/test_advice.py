"""What an error advises has to be able to help where it is given."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import Call
from finished_run import HEADER, TENSORS
from gguf_bytes import tiny_gguf
from gguf_models import adapter_arrays, write_model, write_peft
from messages import assert_says
from scripted_engine import ScriptedEngine

from sg_local.errors import InputError
from sg_local.gguf_io.adapter import write_adapter_gguf
from sg_local.llama.engine import room_advice


@pytest.mark.parametrize(("needed", "n_ctx"), [(600, 512), (600, 4096), (400, 4096)])
def test_more_context_is_no_advice_where_the_model_ends(needed: int, n_ctx: int) -> None:
    advice = room_advice(needed, n_ctx, n_ctx_train=512 if needed > 512 else 300)
    assert "raise --n-ctx" not in advice
    assert_says(advice, "model itself ends at", "shorten")


def test_more_context_is_advised_as_far_as_it_is_needed() -> None:
    assert_says(room_advice(600, 512, n_ctx_train=2048), "--n-ctx to 600")


@pytest.mark.parametrize(("n_ctx", "helps"), [(300, True), (512, False), (4096, False)])
def test_an_input_without_an_answer_says_what_makes_room(
    n_ctx: int,
    helps: bool,
    sg: Call,
    task: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ScriptedEngine().replace_llama_cpp(monkeypatch)
    (tmp_path / "long.txt").write_text("x" * 5000 + "\n")
    arguments = ["--model", model, "--task", task, "--n-ctx", n_ctx, "--max-new-tokens", 9]
    result = sg("predict", *arguments, tmp_path / "long.txt")
    assert result.exit_code == 0, result.output
    assert ("raise --n-ctx" in result.stdout) == helps
    assert ("ends at 512 tokens" in result.stdout) != helps


# what a model says of itself → whether Vicuna's format may be its own
NAMES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "mistral": ({"general.name": "mistralai_mistral-7b-instruct-v0.2"}, "llama", False),
    "basename": ({"general.basename": "SmolLM2"}, "llama", False),
    "qwen2": ({}, "qwen2", False),
    "qwen2 called vicuna": ({"general.name": "vicuna"}, "qwen2", False),
    "vicuna": ({"general.name": "lmsys_vicuna-7b-v1.5"}, "llama", True),
    "vicuna as converted": ({"general.name": "LLaMA v2"}, "llama", True),
    "nameless": ({}, "llama", True),
}


@pytest.mark.parametrize("what", NAMES)
def test_the_format_of_vicuna_is_advised_where_the_model_may_be_one(
    what: str, sg: Call, task: Path, tmp_path: Path
) -> None:
    metadata, architecture, may_be_vicuna = NAMES[what]
    header = {key.replace("llama.", f"{architecture}."): value for key, value in HEADER.items()}
    path = tmp_path / "file.gguf"
    path.write_bytes(tiny_gguf({**header, **metadata, "general.architecture": architecture}, TENSORS))
    (tmp_path / "inputs.txt").write_text("a\n")
    for command in (["run", task], ["plan", task], ["predict", "--task", task, tmp_path / "inputs.txt"]):
        result = sg(*command, "--model", path)
        assert result.exit_code == 2
        assert_says(result.stderr, "no chat template")
        assert ("--prompt-format vicuna" in result.stderr) == may_be_vicuna


# how an adapter's tensors are named → what helps
FOREIGN = {
    "base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight": "text part",
    "base_model.model.model.vision_tower.blocks.0.attn.lora_A.weight": "text part",
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight": "save_pretrained",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "save_pretrained",
    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": "--model",
    "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": "--model",
    "base_model.model.lm_head.lora_A.weight": "target_modules",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_tensor_without_a_place_says_where_it_comes_from(name: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf")
    arrays = adapter_arrays()
    adapter = write_peft(tmp_path / "adapter", arrays={**arrays, name: next(iter(arrays.values()))})
    with pytest.raises(InputError) as caught:
        write_adapter_gguf(adapter, base, tmp_path / "out.gguf", {})
    assert_says(str(caught.value), FOREIGN[name])
    helps_elsewhere = "train on this base" in str(caught.value)
    assert helps_elsewhere == (FOREIGN[name] == "--model")


@pytest.mark.parametrize(
    ("gradient_checkpointing", "has_gpu", "advised"),
    [("auto", True, False), ("auto", False, True), ("always", False, False), ("never", True, True)],
)
def test_memory_that_ran_out_is_not_met_with_what_is_on_already(
    gradient_checkpointing: str, has_gpu: bool, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sg_local.finetune.train as train
    from sg_local.errors import SgLocalError
    from sg_local.settings import Settings

    monkeypatch.setattr(train, "_torch_has_gpu", lambda: has_gpu)
    settings = replace(Settings(), gradient_checkpointing=gradient_checkpointing)
    with pytest.raises(SgLocalError) as caught, train.memory_error_explained(settings):
        raise RuntimeError("CUDA out of memory")
    assert ("--gradient-checkpointing" in str(caught.value)) == advised


def test_a_damaged_value_and_a_model_that_is_so_get_different_advice(
    sg: Call, task: Path, tmp_path: Path
) -> None:
    path = tmp_path / "file.gguf"
    for change, advice in (
        ({"llama.attention.layer_norm_rms_epsilon": 7.0}, "another conversion"),
        ({"llama.attention.key_length": 8, "llama.attention.value_length": 4}, "give another model"),
    ):
        path.write_bytes(tiny_gguf({**HEADER, **change}, TENSORS))
        assert_says(sg("plan", task, "--model", path, "--prompt-format=vicuna").stderr, advice)
