"""16-bit weights beside a GGUF: those it was made from pass, all others are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import write_safetensors
from tiny_models import write_tiny_model

from sg_local.architectures import ARCHITECTURES
from sg_local.errors import InputError
from sg_local.gguf_io import tensors
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.check_weights import RELATIVE_ERRORS, check_base_weights
from sg_local.gguf_io.tensors import rope_row_order

pytest.importorskip("safetensors")  # comes with the extra "train"

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def weights_of(directory: Path, architecture: str, **arguments: Any) -> Path:
    """The 16-bit weights of a tiny model as Hugging Face has them, made from its float32 GGUF."""
    path = directory / "weights"
    write_base_weights(write_tiny_model(directory / "f32.gguf", architecture, **arguments), path)
    return path


def arrays_in(weights: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return {name: array for path in weights.glob("*.safetensors") for name, array in load_file(path).items()}


def rewrite(
    weights: Path, change: Callable[[dict[str, Any]], None] = lambda arrays: None, dtype: str = "F16"
) -> None:
    """Changes the arrays, and writes them as one file without an index."""
    arrays = arrays_in(weights)
    change(arrays)
    for path in weights.glob("model*"):
        path.unlink()
    write_safetensors(weights / "model.safetensors", arrays, dtype)


def change_config(weights: Path, **changes: Any) -> None:
    path = weights / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def set_value(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arrays: arrays.__setitem__(name, value(arrays[name]))


@pytest.mark.parametrize(
    ("architecture", "matrix_type"),
    [
        *((architecture, "Q4_0") for architecture in ARCHITECTURES),
        *(("llama", matrix_type) for matrix_type in ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1")),
    ],
)
def test_weights_that_the_gguf_was_made_from_pass(
    architecture: str, matrix_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(tmp_path, architecture)
    base = write_tiny_model(tmp_path / "base.gguf", architecture, matrix_type=matrix_type)
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 7 * 64)  # several blocks, which end within a head
    check_base_weights(base, weights)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_each_precision_and_one_file_without_an_index_pass(dtype: str, tmp_path: Path) -> None:
    weights = weights_of(tmp_path, "gemma3", tied=True)
    rewrite(weights, dtype=dtype)
    for matrix_type in ("F32", "Q8_0"):
        check_base_weights(
            write_tiny_model(tmp_path / "base.gguf", "gemma3", tied=True, matrix_type=matrix_type), weights
        )


def test_configs_as_they_were_written_before_pass(tmp_path: Path) -> None:
    weights = weights_of(tmp_path, "llama", tied=True)
    change_config(weights, rope_parameters=None, rope_theta=10000.0, head_dim=None)
    check_base_weights(tmp_path / "f32.gguf", weights)
    change_config(weights, rope_theta=None)
    check_base_weights(tmp_path / "f32.gguf", weights)


def test_copies_that_transformers_does_not_read_pass(tmp_path: Path) -> None:
    weights = weights_of(tmp_path, "llama", tied=True)

    def add(arrays: dict[str, Any]) -> None:
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8)

    rewrite(weights, add)
    check_base_weights(tmp_path / "f32.gguf", weights)


def test_an_output_matrix_that_is_the_embedding_again_passes(tmp_path: Path) -> None:
    weights = weights_of(tmp_path, "llama", tied=True)
    embedding = arrays_in(weights)["model.embed_tokens.weight"]
    base = write_tiny_model(
        tmp_path / "base.gguf", "llama", tied=True, vectors={"output.weight": embedding.tolist()}
    )
    check_base_weights(base, weights)
    with pytest.raises(InputError, match=r"embed_tokens\.weight differs from output\.weight"):
        check_base_weights(write_tiny_model(tmp_path / "other.gguf", "llama"), weights)


@pytest.mark.parametrize(
    ("architecture", "matrix_type"),
    [("llama", "F16"), *((architecture, "Q4_0") for architecture in ARCHITECTURES)],
)
def test_another_model_of_the_same_shapes_is_refused(
    architecture: str, matrix_type: str, tmp_path: Path
) -> None:
    weights = weights_of(tmp_path, architecture)
    other = write_tiny_model(tmp_path / "other.gguf", architecture, matrix_type=matrix_type, seed=1)
    with pytest.raises(InputError) as caught:
        check_base_weights(other, weights)
    *lines, last = str(caught.value).splitlines()
    assert len(lines) == 10
    assert all("differs from" in line and str(weights) in line for line in lines)
    assert last.startswith("… and ")


WRONG_TENSORS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "one tensor changed": (
        "llama",
        set_value("model.layers.0.mlp.up_proj.weight", lambda w: w + 0.05 * np.std(w)),
        r"mlp\.up_proj\.weight differs from blk\.0\.ffn_up\.weight of base\.gguf by 0\.0.* Q8_0 explains 0\.014",
    ),
    "q in llama.cpp's row order": (
        "llama",
        set_value(Q_PROJ, lambda w: w[rope_row_order(len(w), 4)]),
        r"layers\.1\.self_attn\.q_proj\.weight differs from blk\.1\.attn_q\.weight",
    ),
    "q permuted where it is not": (
        "qwen2",
        set_value(Q_PROJ, lambda w: w[rope_row_order(len(w), 4)]),
        r"layers\.1\.self_attn\.q_proj\.weight differs from blk\.1\.attn_q\.weight",
    ),
    "gemma3's norms with the one": (
        "gemma3",
        set_value("model.norm.weight", lambda w: w + 1),
        r"model\.norm\.weight differs from output_norm\.weight",
    ),
    "two layers swapped": (
        "qwen3",
        lambda arrays: arrays.update(
            {
                name: arrays[name.replace(".0.", ".1.")]
                for name in arrays
                if "layers.0.self_attn.k_norm" in name
            }
        ),
        r"layers\.0\.self_attn\.k_norm\.weight differs from blk\.0\.attn_k_norm\.weight",
    ),
    "not a number": (
        "phi3",
        set_value("model.layers.0.self_attn.qkv_proj.weight", lambda w: w * np.nan),
        r"qkv_proj\.weight differs from blk\.0\.attn_qkv\.weight of base\.gguf by nan",
    ),
    "zeros": (
        "llama",
        set_value("model.layers.0.self_attn.o_proj.weight", np.zeros_like),
        r"o_proj\.weight differs from .* by inf",
    ),
    "one tensor missing": (
        "llama",
        lambda arrays: arrays.__delitem__("model.layers.1.mlp.down_proj.weight"),
        r"model\.layers\.1\.mlp\.down_proj\.weight is missing",
    ),
    "another shape": (
        "llama",
        set_value("model.layers.1.mlp.down_proj.weight", lambda w: w[:, :-32]),
        r"down_proj\.weight has the shape \(64, 64\), and blk\.1\.ffn_down\.weight of the GGUF has \(64, 96\)",
    ),
    "a bias that the GGUF has not": (
        "llama",
        lambda arrays: arrays.__setitem__("model.layers.0.self_attn.q_proj.bias", np.zeros(64)),
        r"'model\.layers\.0\.self_attn\.q_proj\.bias' has no counterpart in base\.gguf",
    ),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused(what: str, tmp_path: Path) -> None:
    architecture, change, message = WRONG_TENSORS[what]
    weights = weights_of(tmp_path, architecture)
    base = write_tiny_model(tmp_path / "base.gguf", architecture, matrix_type="Q8_0")
    rewrite(weights, change)
    with pytest.raises(InputError, match=message) as caught:
        check_base_weights(base, weights)
    assert len(str(caught.value).splitlines()) == 1


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"model_type": "mistral"}, r"model_type is 'mistral', and f32\.gguf needs 'llama'"),
    "remote code": ({"auto_map": {"AutoModel": "m.Model"}}, "has auto_map: the model brings code of its own"),
    "quantized": ({"quantization_config": {"bits": 4}}, "has quantization_config"),
    "hidden": ({"hidden_size": 128}, r"hidden_size is 128, and f32\.gguf has 64"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and .* has 2"),
    "heads": ({"num_attention_heads": 8, "head_dim": 8}, "num_attention_heads is 8, and .* has 4"),
    "KV heads left out": ({"num_key_value_heads": None}, "num_key_value_heads is 4, and .* has 2"),
    "epsilon": ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, and .* has 1e-05"),
    "no epsilon": ({"rms_norm_eps": None}, "rms_norm_eps is None"),
    "rotation": (
        {"rope_parameters": {"rope_theta": 5e5}},
        r"rope_theta is 500000\.0, and f32\.gguf has 10000\.0",
    ),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_config_of_another_model_is_refused(what: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[what]
    weights = weights_of(tmp_path, "llama", tied=True)
    change_config(weights, **changes)
    with pytest.raises(InputError, match=message) as caught:
        check_base_weights(tmp_path / "f32.gguf", weights)
    assert str(weights) in str(caught.value)


def test_directories_without_safetensors_are_refused(tmp_path: Path) -> None:
    weights = weights_of(tmp_path, "llama")

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            check_base_weights(tmp_path / "f32.gguf", weights)

    shard = weights / "model-00001-of-00001.safetensors"
    index = weights / "model.safetensors.index.json"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused("is not a safetensors file")
    shard.write_bytes(whole)
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": dict.fromkeys(listed["weight_map"], "../f32.gguf")}))
    refused(r"names '\.\./f32\.gguf', no safetensors file of this directory")
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], "more": shard.name}}))
    refused("names tensor 'more', which its file does not have")
    index.write_text("{}")
    refused("has no weight_map")
    index.write_text(json.dumps(listed))
    shard.unlink()
    refused(r"00001\.safetensors is missing")
    index.unlink()
    refused(r"has neither model\.safetensors nor")
    (weights / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(r"has pytorch_model\.bin, a pickle")
    (weights / "config.json").write_text("[]")
    refused("is not a JSON object")
    shutil.rmtree(weights)
    refused("is no directory")


def test_a_gguf_with_strange_tensors_is_refused(tmp_path: Path) -> None:
    weights = weights_of(tmp_path, "llama")
    base = write_tiny_model(tmp_path / "base.gguf", "llama", vectors={"mm.bias": [0.0]})
    with pytest.raises(InputError, match=r"base\.gguf: tensor 'mm\.bias' has no place in a llama model"):
        check_base_weights(base, weights)


def test_shards_are_read(tmp_path: Path) -> None:
    weights = weights_of(tmp_path, "qwen2")
    arrays = arrays_in(weights)
    for path in weights.glob("model*"):
        path.unlink()
    names = sorted(arrays)
    weight_map = {}
    for number in (0, 1):
        shard = names[number::2]
        write_safetensors(
            weights / f"part-{number}.safetensors", {name: arrays[name] for name in shard}, "F32"
        )
        weight_map |= dict.fromkeys(shard, f"part-{number}.safetensors")
    (weights / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_base_weights(tmp_path / "f32.gguf", weights)


def test_a_type_that_says_nothing_about_its_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(tmp_path, "llama")
    base = write_tiny_model(tmp_path / "base.gguf", "llama", matrix_type="Q4_0")
    monkeypatch.delitem(RELATIVE_ERRORS, "Q4_0")  # as TQ1_0, which loses 80 %
    with pytest.raises(
        InputError, match=r"blk\.0\.attn_q\.weight is of type Q4_0, with which no weights can be"
    ):
        check_base_weights(base, weights)
