"""The table of architectures: its names are those of the gguf package, which llama.cpp's conversion goes by.

Shapes, row order and config.json are compared with llama.cpp and torch in tests/model/test_architectures.py.
"""

import gguf
import pytest

from sg_local.architectures import ARCHITECTURES
from sg_local.gguf_io.tensors import lora_targets


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_names_of_a_tensor_are_those_of_the_gguf_package(name: str) -> None:
    number = next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    gguf_names = {gguf.TENSOR_NAMES[tensor].format(bid=1) for tensor in gguf.MODEL_TENSORS[number]}
    name_map = gguf.get_tensor_name_map(number, n_blocks=2)
    pairs = [(spec.gguf, spec.hf) for spec in ARCHITECTURES[name].tensors]
    pairs += [
        (f"blk.1.{spec.gguf}", f"model.layers.1.{spec.hf}") for spec in ARCHITECTURES[name].layer_tensors
    ]
    for gguf_name, hf_name in pairs:
        assert gguf_name.removesuffix(".weight").removesuffix(".bias") in gguf_names
        if hf_name:
            named_there = hf_name.replace("dt_bias", "dt_proj.bias")  # as the conversion calls it first
            assert name_map.get_name(named_there, try_suffixes=(".weight", ".bias")) == gguf_name


def test_lora_targets_are_the_matrices_of_a_layer() -> None:
    seven = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for architecture in ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "granite", "smollm3", "mistral3"):
        assert lora_targets(architecture) == seven
    hybrid = ("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w3", "w2")
    assert lora_targets("lfm2") == hybrid
    of_linear_attention = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
    assert lora_targets("qwen35") == (*seven[:4], *of_linear_attention, *seven[4:])
    assert lora_targets("phi3") == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
