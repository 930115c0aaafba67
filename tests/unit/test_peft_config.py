"""What of a stranger's adapter_config.json is taken, and what is refused by name; PEFT sees none of it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import ALPHA, LAYERS, RANK, adapter_arrays, write_model, write_peft
from messages import assert_says

from sg_local.errors import InputError
from sg_local.finetune.train import _clean_config
from sg_local.gguf_header import read_header
from sg_local.gguf_io.adapter import fields_for_peft, read_adapter_gguf, write_adapter_gguf
from sg_local.gguf_io.tensors import lora_targets

ALL = list(lora_targets("llama"))
# "(a+)+$" takes a time that doubles with every letter of a name that it does not fit.
ENDLESS = r"(.*[a-z_.]+)+$^"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf")


def export(tmp_path: Path, base: Path, config: dict[str, Any], arrays: dict[str, Any] | None = None) -> int:
    """How many tensors the exported adapter has."""
    write_adapter_gguf(write_peft(tmp_path / "peft", config, arrays), base, tmp_path / "adapter.gguf", {})
    return len(read_header(tmp_path / "adapter.gguf").tensors)


def of_layer(number: int) -> dict[str, Any]:
    return {name: values for name, values in adapter_arrays().items() if f".layers.{number}." in name}


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ENDLESS},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": "q_proj"},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": [1]},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": ["x" * 1000]},
        {"target_modules": ["x"] * 20_000},
        {"exclude_modules": ENDLESS},
        {"exclude_modules": {"q_proj": 1}},
        {"exclude_modules": ["q_proj"]},
        {"layers_pattern": ENDLESS},
        {"layers_pattern": [ENDLESS]},
        {"layers_pattern": "layers", "layers_to_transform": [0]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_to_transform": [99]},
        {"layers_to_transform": ["0"]},
        {"layers_to_transform": [[0]]},
        {"layers_to_transform": True},
        {"layers_to_transform": "0"},
        {"rank_pattern": {ENDLESS: 2}},
        {"alpha_pattern": {ENDLESS: 2}},
        {"rank_pattern": {"^q_proj": 4}},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"q_proj": 2}},  # and the tensors are of rank 4
        {"alpha_pattern": {"q_proj": "8"}},
        {"modules_to_save": [ENDLESS]},
        {"trainable_token_indices": {"embed_tokens": [1]}},
        {"target_parameters": ["q_proj.weight"]},
        {"use_dora": True},
        {"use_dora": "false"},
        {"use_rslora": 1},
        {"bias": "lora_only"},
        {"bias": ["none"]},
        {"fan_in_fan_out": True},
        {"megatron_config": {"hidden_size": 64}},
        {"init_lora_weights": {"pissa": 1}},
        {"some_new_option": 3},
        {"some_new_option": {"deep": [[[[1]]]]}},
        {"r": 10**400},
        {"r": True},
        {"r": 4.0},
        {"lora_alpha": 1e-300},  # 0 in a float32, which llama.cpp takes for scale 1
        {"lora_alpha": 10**400},
        {"lora_alpha": None},
    ],
    ids=lambda config: str(config)[:60],
)
def test_what_an_adapter_gguf_cannot_express_is_refused_by_name(
    config: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    begin = time.perf_counter()
    with pytest.raises(InputError) as caught:
        export(tmp_path, base, config)
    assert time.perf_counter() - begin < 5
    assert next(reversed(config)) in str(caught.value)
    assert str(tmp_path / "peft") in str(caught.value)
    assert len(str(caught.value)) < 6000
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_regular_expression_is_answered_with_the_names_to_write(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target_modules is .*: down_proj, gate_proj, k_proj, .*, v_proj"):
        export(tmp_path, base, {"target_modules": ENDLESS})


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": [*ALL, "lm_head_of_another_model"]},
        {"target_modules": [f"self_attn.{name}" for name in ALL[:4]] + [f"mlp.{name}" for name in ALL[4:]]},
        {"exclude_modules": ["vision_tower", "proj"]},
        {"layers_to_transform": list(range(LAYERS)), "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": RANK, "of.another_model": 2}, "alpha_pattern": {"x": 3}},
        {"layers_to_transform": []},
        {"init_lora_weights": "gaussian"},
        {
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
            "lora_dropout": 0.1,
            "megatron_core": "megatron.core",
        },
        {"auto_mapping": {"unsloth_fixed": True}, "peft_version": "0.18.0", "qalora_group_size": 16},
        {"some_new_option": None, "another": False, "a_third": []},
    ],
    ids=lambda config: str(config)[:60],
)
def test_what_changes_nothing_is_taken(config: dict[str, Any], base: Path, tmp_path: Path) -> None:
    assert export(tmp_path, base, config) == 2 * 7 * LAYERS


@pytest.mark.parametrize("layers", [1, [1], [1, 7]])
def test_an_adapter_of_some_layers_is_exported_as_it_is(layers: object, base: Path, tmp_path: Path) -> None:
    assert export(tmp_path, base, {"layers_to_transform": layers}, of_layer(1)) == 2 * 7


def test_fewer_layers_and_matrices_than_asked_for_are_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(tmp_path, base, {})
    assert capsys.readouterr().err == ""
    assert export(tmp_path, base, {"layers_to_transform": [0, LAYERS + 3]}, of_layer(0)) == 2 * 7
    assert (
        f"layers_to_transform names layer {LAYERS + 3}, and base.gguf has {LAYERS}" in capsys.readouterr().err
    )
    export(tmp_path, base, {}, of_layer(0))
    assert_says(capsys.readouterr().err, "no tensors of 7 matrices", "such as model.layers.1.mlp.down_proj")


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight"),
        lambda name: "base_model.model." + name,
        lambda name: name.replace("model.layers", "_orig_mod.model.layers"),
        lambda name: name.replace("model.layers", "model.language_model.layers"),
        lambda name: name.replace("model.layers", "language_model.model.layers"),
    ],
    ids=["default", "twice", "compiled", "text part", "old text part"],
)
def test_other_names_of_the_same_tensors_give_the_same_file(
    renamed: Callable[[str], str], base: Path, tmp_path: Path
) -> None:
    export(tmp_path, base, {})
    right = (tmp_path / "adapter.gguf").read_bytes()
    arrays = {renamed(name): values for name, values in adapter_arrays().items()}
    assert arrays.keys().isdisjoint(adapter_arrays())
    export(tmp_path, base, {}, arrays)
    assert (tmp_path / "adapter.gguf").read_bytes() == right
    with pytest.raises(InputError, match="is there twice, under two names"):
        export(tmp_path, base, {}, {**arrays, **of_layer(1)})


def test_an_alpha_of_its_own_scales_b(base: Path, tmp_path: Path) -> None:
    export(tmp_path, base, {})
    plain = read_adapter_gguf(tmp_path / "adapter.gguf")
    export(tmp_path, base, {"alpha_pattern": {"layers.1.self_attn.v_proj": 2 * ALPHA}})
    found = read_adapter_gguf(tmp_path / "adapter.gguf")
    assert found.alpha == ALPHA
    for name, (a, b) in plain.tensors.items():
        assert np.array_equal(found.tensors[name][0], a)
        assert np.array_equal(found.tensors[name][1], b * (2 if name == "blk.1.attn_v.weight" else 1)), name


def test_a_matrix_that_the_configuration_leaves_out_is_not_exported_as_if_it_were_in(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        export(tmp_path, base, {"target_modules": [name for name in ALL if name != "v_proj"]})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 * LAYERS
    assert all("v_proj" in line and "leaves out" in line for line in lines)


@pytest.mark.parametrize("begins", [False, None, "orthogonal"])
def test_a_matrix_without_values_is_refused_where_peft_would_fill_it_at_random(
    begins: object, base: Path, tmp_path: Path
) -> None:
    assert export(tmp_path, base, {"init_lora_weights": True}, of_layer(0)) == 2 * 7
    with pytest.raises(InputError, match=r"no tensor of model\.layers\.1\..*at random"):
        export(tmp_path, base, {"init_lora_weights": begins}, of_layer(0))


def test_peft_gets_fields_of_ours_alone(tmp_path: Path) -> None:
    strange = {"auto_mapping": {"a": 1}, "lora_dropout": "much", "task_type": [], "some_new_option": None}
    peft = write_peft(tmp_path / "peft", {**strange, "target_modules": "all-linear"}, of_layer(1))
    fields = fields_for_peft(peft)
    own = {"r", "lora_alpha", "target_modules", "lora_dropout", "bias", "task_type"}
    assert fields.keys() == own | {"rank_pattern", "alpha_pattern"}
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"]) == (RANK, ALPHA, 0.0)
    assert fields["task_type"] == "CAUSAL_LM"
    modules = fields["target_modules"]
    assert isinstance(modules, list)
    assert len(modules) == 7
    assert "model.layers.1.self_attn.q_proj" in modules
    assert modules == sorted(modules)


def test_the_same_training_writes_the_same_configuration(tmp_path: Path) -> None:
    texts = []
    for order in (["v_proj", "q_proj"], ["q_proj", "v_proj"]):  # PEFT writes a set
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({"r": 4, "base_model_name_or_path": "/tmp/x", "target_modules": order}))
        _clean_config(path, ("q_proj", "v_proj"))
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    assert json.loads(texts[0]) == {
        "r": 4,
        "base_model_name_or_path": None,
        "target_modules": ["q_proj", "v_proj"],
    }
