"""Qwen 3.5: linear attention beside attention, value heads in another order, layers that are left alone.

    blk.0.ssm_a [-2.1, -0.4, ...]: value heads 0, 3, 1, 4, 2, 5 -> model.layers.0.linear_attn.A_log [0.74, ...] in order

llama.cpp, torch and llama.cpp's converters are compared in tests/model/test_architectures.py and
tests/benchmarks/converters.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import bytes_of, write_safetensors
from test_hf_config import COMMON, config_of
from tiny_models import HIDDEN, LAYERS, WIDE_HEAD_DIM, integers, write_tiny_model

from sg_local.dimensions import read_dimensions
from sg_local.errors import InputError
from sg_local.gguf_header import read_header
from sg_local.gguf_io.adapter import read_adapter_gguf, write_adapter_gguf
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.check_weights import check_base_weights
from sg_local.gguf_io.merge import merge_gguf
from sg_local.gguf_io.tensors import row_blocks

pytest.importorskip("safetensors")  # comes with the extra "train"

# Three value heads for each of two key heads, 16 wide
THREE_VALUES = {"ssm.time_step_rank": 6, "ssm.inner_size": 96}
HEAD_DIM, KEY_ROWS = 16, 2 * 2 * 16
# Where Hugging Face's value heads (0..2 are of the first key head) are in llama.cpp's order, which alternates
PLACES = [0, 2, 4, 1, 3, 5]
LAYER = "model.layers.0.linear_attn."
MTP = {"nextn_predict_layers": 1, "block_count": LAYERS + 1}
MTP_TENSORS: dict[str, Any] = {
    f"blk.{LAYERS}.nextn.enorm.weight": np.ones(HIDDEN),
    f"blk.{LAYERS}.attn_k.weight": np.full((64, HIDDEN), 0.25),
}


def values_of(path: Path) -> dict[str, Any]:
    header = read_header(path)
    return {
        tensor.name: np.concatenate([block for _, block in row_blocks(header, tensor)])
        for tensor in header.tensors
    }


def weights_of(base: Path, out_dir: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    write_base_weights(base, out_dir)
    return load_file(out_dir / "model-00001-of-00001.safetensors")


def heads(values: Any, width: int = HEAD_DIM) -> Any:
    """llama.cpp's rows in Hugging Face's order: what is before the value heads, then these."""
    first = len(values) - len(PLACES) * width
    return np.concatenate([values[:first], *(values[first:].reshape(6, width, -1)[PLACES])])


def test_config(tmp_path: Path) -> None:
    assert config_of(tmp_path, "qwen35", THREE_VALUES) == {
        **COMMON,
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "rms_norm_eps": 1e-6,
        "head_dim": WIDE_HEAD_DIM,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    }


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"full_attention_interval": 4}, "LLLALL"),
        ({"full_attention_interval": 3}, "LLALLA"),
        ({"full_attention_interval": None}, "LLLALL"),  # llama.cpp's default
        ({"attention.recurrent_layers": integers([0, 1, 1, 1, 0, 1])}, "ALLLAL"),
        ({"nextn_predict_layers": 2}, "LALA"),
        ({"nextn_predict_layers": 2, "attention.recurrent_layers": integers([0, 1, 1, 1, 0, 0])}, "ALLL"),
    ],
)
def test_which_layers_have_linear_attention(metadata: Any, expected: str, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "qwen35", metadata, n_layers=6)
    kinds = read_dimensions(read_header(base)).layer_kinds
    assert "".join("L" if kind == "linear_attention" else "A" for kind in kinds) == expected


def test_value_heads_and_norms_of_the_checkpoint(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "qwen35", THREE_VALUES)
    loaded, stored = weights_of(base, tmp_path / "weights"), values_of(base)

    def of_gguf(name: str) -> Any:
        return stored[f"blk.0.{name}"]

    assert np.array_equal(loaded[f"{LAYER}in_proj_qkv.weight"], heads(of_gguf("attn_qkv.weight")))
    assert np.array_equal(
        loaded[f"{LAYER}in_proj_qkv.weight"][:KEY_ROWS], of_gguf("attn_qkv.weight")[:KEY_ROWS]
    )
    assert np.array_equal(loaded[f"{LAYER}in_proj_z.weight"], heads(of_gguf("attn_gate.weight")))
    assert np.array_equal(loaded[f"{LAYER}in_proj_a.weight"], of_gguf("ssm_alpha.weight")[PLACES])
    assert np.array_equal(loaded[f"{LAYER}in_proj_b.weight"], of_gguf("ssm_beta.weight")[PLACES])
    assert np.array_equal(loaded[f"{LAYER}out_proj.weight"], heads(of_gguf("ssm_out.weight").T).T)
    assert np.array_equal(loaded[f"{LAYER}conv1d.weight"][:, 0], heads(of_gguf("ssm_conv1d.weight")))
    np.testing.assert_allclose(-np.exp(loaded[f"{LAYER}A_log"]), of_gguf("ssm_a").ravel()[PLACES], rtol=1e-6)
    assert np.array_equal(loaded[f"{LAYER}dt_bias"], of_gguf("ssm_dt.bias").ravel()[PLACES])
    # One is added to all norms but that of linear attention.
    assert np.array_equal(loaded[f"{LAYER}norm.weight"], of_gguf("ssm_norm.weight").ravel())
    one = np.float32(1)
    assert np.array_equal(loaded["model.norm.weight"], stored["output_norm.weight"].ravel() - one)
    for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
        gguf = {
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
        }[name]
        got = loaded[f"model.layers.1.{name}.weight"]
        assert np.array_equal(got, stored[f"blk.1.{gguf}.weight"].ravel() - one)


def test_rows_and_columns_of_an_adapter(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "qwen35", THREE_VALUES)
    draw = np.random.default_rng(0)
    shapes = {"in_proj_z": (96, HIDDEN), "out_proj": (HIDDEN, 96), "in_proj_a": (6, HIDDEN)}
    arrays = {}
    for module, (rows, columns) in shapes.items():
        prefix = f"base_model.model.{LAYER}{module}.lora_"
        arrays[f"{prefix}A.weight"] = draw.normal(size=(2, columns)).astype(np.float32)
        arrays[f"{prefix}B.weight"] = draw.normal(size=(rows, 2)).astype(np.float32)
    (tmp_path / "peft").mkdir()
    write_safetensors(tmp_path / "peft" / "adapter_model.safetensors", arrays, "F32")
    (tmp_path / "peft" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["in_proj_z", "out_proj", "in_proj_a"]}'
    )
    write_adapter_gguf(tmp_path / "peft", base, tmp_path / "adapter.gguf", {})
    found = read_adapter_gguf(tmp_path / "adapter.gguf").tensors

    def of_peft(module: str, half: str) -> Any:
        return arrays[f"base_model.model.{LAYER}{module}.lora_{half}.weight"]

    a, b = found["blk.0.attn_gate.weight"]
    assert np.array_equal(a, of_peft("in_proj_z", "A"))
    assert np.array_equal(heads(b), of_peft("in_proj_z", "B"))
    a, b = found["blk.0.ssm_out.weight"]
    assert np.array_equal(heads(a.T).T, of_peft("out_proj", "A"))
    assert np.array_equal(b, of_peft("out_proj", "B"))
    _, b = found["blk.0.ssm_alpha.weight"]
    assert np.array_equal(b[PLACES], of_peft("in_proj_a", "B"))

    merge_gguf(base, tmp_path / "adapter.gguf", tmp_path / "merged.gguf", metadata={})
    merged = weights_of(tmp_path / "merged.gguf", tmp_path / "merged")
    unmerged = weights_of(base, tmp_path / "weights")
    for module in shapes:
        change = 2 * of_peft(module, "B") @ of_peft(module, "A")
        name = f"{LAYER}{module}.weight"
        np.testing.assert_allclose(merged[name], unmerged[name] + change, atol=1e-2)


def test_layers_for_speculative_decoding_are_left_alone(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "qwen35", MTP, vectors=MTP_TENSORS)
    plain = write_tiny_model(tmp_path / "plain.gguf", "qwen35")
    weights, of_plain = weights_of(base, tmp_path / "weights"), weights_of(plain, tmp_path / "of-plain")
    assert weights.keys() == of_plain.keys()
    assert (tmp_path / "weights" / "config.json").read_bytes() == (
        tmp_path / "of-plain" / "config.json"
    ).read_bytes()
    # 16-bit weights as Qwen publishes them have such layers too
    arrays = {**weights, "mtp.fc.weight": np.ones((HIDDEN, 2 * HIDDEN), np.float32)}
    for path in (tmp_path / "weights").glob("model*"):
        path.unlink()
    write_safetensors(tmp_path / "weights" / "model.safetensors", arrays, "F16")
    check_base_weights(base, tmp_path / "weights")

    b, a = np.ones((64, 2), np.float32), np.ones((2, HIDDEN), np.float32)
    (tmp_path / "peft").mkdir()
    prefix = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    write_safetensors(
        tmp_path / "peft" / "adapter_model.safetensors",
        {f"{prefix}A.weight": a, f"{prefix}B.weight": b},
        "F32",
    )
    (tmp_path / "peft" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["v_proj"]}'
    )
    write_adapter_gguf(tmp_path / "peft", base, tmp_path / "adapter.gguf", {})
    merge_gguf(base, tmp_path / "adapter.gguf", tmp_path / "merged.gguf", metadata={})
    changed = {
        tensor.name
        for tensor in read_header(base).tensors
        if bytes_of(base, tensor.name) != bytes_of(tmp_path / "merged.gguf", tensor.name)
    }
    assert changed == {"blk.1.attn_v.weight"}


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "heads of several widths": (
        {"metadata": {"ssm.inner_size": 128}},
        r"qwen35\.ssm\.inner_size is 128, not 4 value heads of 16",
    ),
    "half a key head": (
        {"metadata": {"ssm.time_step_rank": 3, "ssm.inner_size": 48}},
        "3 value heads of linear attention are not a multiple of 2 key heads",
    ),
    "no size of its state": ({"metadata": {"ssm.state_size": None}}, r"qwen35\.ssm\.state_size is missing"),
    "another norm of queries and keys": (
        {"metadata": {"attention.layer_norm_rms_epsilon": 1e-5}},
        r"layer_norm_rms_epsilon is 1e-05, with which llama\.cpp norms queries and keys",
    ),
    "no sections of the rotation": (
        {"metadata": {"rope.dimension_sections": None}},
        r"qwen35\.rope\.dimension_sections is None",
    ),
    "sections that leave out a pair": (
        {"metadata": {"rope.dimension_sections": integers([5, 4, 3, 0])}},
        r"dimension_sections is \[5, 4, 3, 0\], with which text is not rotated as transformers does",
    ),
    "an odd rotation": ({"metadata": {"rope.dimension_count": 33}}, "rotates 33 of 32 dimensions of a head"),
    "a list of other layers": (
        {"metadata": {"attention.recurrent_layers": integers([1, 0, 1])}},
        r"recurrent_layers is \[1, 0, 1\], not a list of 2 layers",
    ),
    "layers for speculative decoding alone": (
        {"metadata": {"nextn_predict_layers": 2}},
        r"nextn_predict_layers is 2, not a number below that of all layers, 2",
    ),
    "a layer behind the others that nothing tells of": (
        {"vectors": MTP_TENSORS},
        r"'blk\.2\.attn_k\.weight' has no place in a qwen35 model",
    ),
    "a tensor of a picture": (
        {"vectors": {"v.patch_embd.bias": [0.0] * 4}},
        r"'v\.patch_embd\.bias' has no place in a qwen35 model of text",
    ),
    "a decay that grows": (
        {"vectors": {"blk.0.ssm_a": [-1.0, 0.5, -1.0, -1.0]}},
        r"tensor blk\.0\.ssm_a has values over 0",
    ),
    "more layers than tensors": (
        {"metadata": {"block_count": 2**31 - 1}},
        "tensors for 2147483647 layers",
    ),
    "no decay": ({"without": "blk.0.ssm_a"}, r"tensor blk\.0\.ssm_a is missing"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_converted_is_refused(what: str, tmp_path: Path) -> None:
    arguments, message = REFUSALS[what]
    base = write_tiny_model(tmp_path / "base.gguf", "qwen35", **arguments)
    with pytest.raises(InputError, match=message):
        write_base_weights(base, tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_heads_that_do_not_divide_the_width_are_taken(tmp_path: Path) -> None:
    """As in Qwen 3.5 27B, whose 24 heads are wider than its width divided by them."""
    assert config_of(tmp_path, "qwen35", hidden=70)["hidden_size"] == 70
