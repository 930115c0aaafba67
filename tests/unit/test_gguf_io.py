"""Base weights, adapters and fingerprints of GGUF files, on the tiny models of gguf_models.py."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_bytes import TinyTensor, Value, tiny_gguf
from gguf_models import (
    ADAPTER_METADATA,
    ALPHA,
    FEED_FORWARD,
    HEAD_DIM,
    HEADS,
    HF_NAMES,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    METADATA,
    RANK,
    TOKENS,
    TYPES,
    adapter_arrays,
    bytes_of,
    lora,
    model_tensors,
    names_in,
    permuted,
    tensor,
    values_of,
    write_model,
    write_peft,
    write_safetensors,
    zeros,
)

from sg_local.errors import InputError
from sg_local.gguf_header import read_header
from sg_local.gguf_io import base_weights, tensors
from sg_local.gguf_io.adapter import read_adapter_gguf, write_adapter_gguf
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.merge import merge_gguf

pytest.importorskip("safetensors")  # comes with the extra "train"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf")


# Base weights


def load_checkpoint(directory: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    index = json.loads((directory / "model.safetensors.index.json").read_text())
    shards = {name: load_file(directory / name) for name in set(index["weight_map"].values())}
    loaded = {name: shards[shard][name] for name, shard in index["weight_map"].items()}
    assert sum(len(shard) for shard in shards.values()) == len(loaded)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in loaded.values())
    return loaded


def test_checkpoint_holds_the_dequantized_weights_in_hugging_face_order(base: Path, tmp_path: Path) -> None:
    write_base_weights(base, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    expected = values_of(base)
    assert len(loaded) == len(expected)
    for layer in range(LAYERS):
        for name, hf_name in HF_NAMES.items():
            got = loaded[f"model.layers.{layer}.{hf_name}"]
            wanted = expected[f"blk.{layer}.{name}"]
            in_gguf_order = permuted(f"blk.{layer}.{name}", got)
            if got.dtype == np.float32:
                assert np.array_equal(in_gguf_order, wanted), hf_name
            else:
                assert np.array_equal(in_gguf_order, wanted.astype(np.float16)), hf_name
    embedding = expected["token_embd.weight"].astype(np.float16)
    assert np.array_equal(loaded["model.embed_tokens.weight"], embedding)
    assert np.array_equal(loaded["model.norm.weight"], expected["output_norm.weight"])
    assert {array.dtype for name, array in loaded.items() if "proj" in name} == {np.dtype("float16")}
    assert names_in(tmp_path / "out") == {
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    }
    assert names_in(tmp_path) == {"base.gguf", "out"}


def test_config_says_what_the_metadata_says(base: Path, tmp_path: Path) -> None:
    write_base_weights(base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float16",
        "vocab_size": TOKENS,
        "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }


def test_output_matrix_unties_and_per_layer_numbers_that_agree_are_one(tmp_path: Path) -> None:
    output = np.random.default_rng(3).normal(size=(TOKENS, HIDDEN))
    base = write_model(
        tmp_path / "base.gguf",
        {"llama.attention.head_count_kv": [KV_HEADS] * LAYERS, "llama.rope.scaling.factor": 4.0},
        [tensor("output.weight", output, "F16")],
    )
    write_base_weights(base, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["num_key_value_heads"] == KV_HEADS
    # llama.cpp scales linearly where the file gives a factor and no type.
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
    assert np.array_equal(load_checkpoint(tmp_path / "out")["lm_head.weight"], output.astype(np.float16))


def test_shards_keep_to_their_size(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base_weights(base, tmp_path / "one")
    limit = 40_000
    monkeypatch.setattr(base_weights, "MAX_SHARD_BYTES", limit)
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 5 * HIDDEN)
    write_base_weights(base, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert [path.name for path in shards] == [
        f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)
    ]
    header_bytes = 4096
    assert all(path.stat().st_size <= limit + header_bytes for path in shards)
    one, many = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)


@pytest.mark.parametrize(
    ("type_name", "value", "dtype"),
    [
        ("F32", 65504.0, "float16"),
        ("F32", 65520.0, "float32"),
        ("F16", 1e-6, "float16"),
        ("BF16", 2.0**-14, "float16"),
        ("BF16", 2.0**-20, "float32"),
    ],
)
def test_float32_where_float16_would_lose_values(
    type_name: str, value: float, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(4).choice([-0.25, 0.5, 3.0], size=(HIDDEN, FEED_FORWARD))
    values[-1, -1] = value
    base = write_model(tmp_path / "base.gguf", replaced=[tensor("blk.1.ffn_down.weight", values, type_name)])
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 7 * FEED_FORWARD)  # found in the last block of rows
    write_base_weights(base, tmp_path / "out")
    got = load_checkpoint(tmp_path / "out")["model.layers.1.mlp.down_proj.weight"]
    assert got.dtype == np.dtype(dtype)
    assert np.array_equal(got, values_of(base)["blk.1.ffn_down.weight"].astype(dtype))


BASE_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "missing tensor": ({"without": "blk.1.ffn_up.weight"}, r"tensor blk\.1\.ffn_up\.weight is missing"),
    "no embedding": ({"without": "token_embd.weight"}, r"token_embd\.weight is missing"),
    "unknown tensor": ({"replaced": [zeros("blk.0.ssm_a", 4)]}, r"'blk\.0\.ssm_a' has no place"),
    "wrong shape": (
        {"replaced": [zeros("blk.0.attn_k.weight", 48, HIDDEN)]},
        r"attn_k\.weight has the shape \(48, 64\), and the metadata says \(32, 64\)",
    ),
    "half of the biases": (
        {"replaced": [zeros("blk.0.attn_q.bias", HIDDEN)]},
        r"blk\.1\.attn_output\.bias is missing",
    ),
    "experts": ({"changes": {"llama.expert_count": 8}}, "mixture of 8 experts"),
    "longrope": ({"changes": {"llama.rope.scaling.type": "longrope"}}, r"rope\.scaling\.type is 'longrope'"),
    "partial rotation": ({"changes": {"llama.rope.dimension_count": 8}}, "rotates 8 of 16 dimensions"),
    "rope_freqs": (
        {"replaced": [tensor("rope_freqs.weight", np.linspace(1, 3, HEAD_DIM // 2))]},
        r"rope_freqs\.weight does not follow the rule of Llama 3\.1",
    ),
    "layers differ": (
        {"changes": {"llama.attention.head_count_kv": [2, 1]}},
        "head_count_kv differs between layers",
    ),
    "values of another length": (
        {"changes": {"llama.attention.value_length": 8}},
        "keys and values differ in length",
    ),
    "no heads": (
        {"changes": {"llama.attention.head_count": 0}},
        "head_count is 0, not a positive integer",
    ),
    "heads that do not divide": (
        {"changes": {"llama.attention.head_count_kv": 3}},
        "4 attention heads are not a multiple of 3",
    ),
    "layers without end": ({"changes": {"llama.block_count": 2**31}}, "tensors for 2147483648 layers"),
    "no context": ({"changes": {"llama.context_length": None}}, "context_length is None"),
    "epsilon as text": (
        {"changes": {"llama.attention.layer_norm_rms_epsilon": "small"}},
        "rms_epsilon is 'small'",
    ),
    "rope base": ({"changes": {"llama.rope.freq_base": -1.0}}, r"freq_base is -1\.0"),
    "architecture": ({"changes": {"general.architecture": "mamba"}}, "'mamba'"),
    "adapter": ({"changes": {"general.type": "adapter"}}, "is a LoRA adapter, not a model"),
    "NaN": (
        {"replaced": [tensor("output_norm.weight", np.full(HIDDEN, np.nan))]},
        r"NaN or infinite values in tensor output_norm\.weight",
    ),
}


@pytest.mark.parametrize("what", BASE_REFUSALS)
def test_base_that_llama_cannot_express_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_weights, "MAX_SHARD_BYTES", 40_000)  # some shards are written before the NaN
    arguments, message = BASE_REFUSALS[what]
    base = write_model(tmp_path / "base.gguf", **arguments)
    with pytest.raises(InputError, match=message) as caught:
        write_base_weights(base, tmp_path / "out")
    assert str(base) in str(caught.value)
    assert names_in(tmp_path) == {"base.gguf"}


def test_all_faults_of_a_base_are_named_at_once(tmp_path: Path) -> None:
    base = write_model(
        tmp_path / "base.gguf",
        {"llama.rope.scaling.type": "longrope", "llama.context_length": 0},
        [zeros("extra", 2)],
        without="output_norm.weight",
    )
    with pytest.raises(InputError) as caught:
        write_base_weights(base, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{base}: ") for line in lines)


def test_a_directory_that_is_there_stays_and_a_killed_one_is_replaced(base: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "0.safetensors").write_text("left by a killed process")
    write_base_weights(base, tmp_path / "out")
    assert names_in(tmp_path) == {"base.gguf", "out"}
    assert "0.safetensors" not in names_in(tmp_path / "out")
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    with pytest.raises(InputError, match="exists already"):
        write_base_weights(base, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before


# Adapters


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.gguf"
    write_adapter_gguf(write_peft(tmp_path / "peft"), base, path, {})
    return path


def test_adapter_is_what_llama_cpp_reads(base: Path, tmp_path: Path) -> None:
    metadata = {"general.name": "polite", "general.license": "apache-2.0", "sg_local.note": ""}
    write_adapter_gguf(write_peft(tmp_path / "peft"), base, tmp_path / "adapter.gguf", metadata)
    header = read_header(tmp_path / "adapter.gguf")
    assert header.metadata == {
        **metadata,
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(ALPHA),
    }
    assert len(header.tensors) == 2 * 7 * LAYERS
    assert {t.type_name for t in header.tensors} == {"F32"}
    for t in header.tensors:
        base_name, half = t.name.rsplit(".lora_", 1)
        wanted = read_header(base).tensor(base_name)
        assert wanted is not None
        columns, rows = wanted.shape
        assert t.shape == ((columns, RANK) if half == "a" else (RANK, rows))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_adapter_reads_back_with_permuted_rows(dtype: str, base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft", dtype=dtype)
    write_adapter_gguf(peft, base, tmp_path / "adapter.gguf", {})
    got = read_adapter_gguf(tmp_path / "adapter.gguf")
    assert {got.scale_of(name) for name in got.tensors} == {ALPHA / RANK}
    arrays = adapter_arrays()
    if dtype == "F16":
        arrays = {name: values.astype(np.float16) for name, values in arrays.items()}
    if dtype == "BF16":
        arrays = {name: (v.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, v in arrays.items()}
    for layer in range(LAYERS):
        for name, hf_name in HF_NAMES.items():
            if "norm" in name:
                continue
            a, b = got.tensors[f"blk.{layer}.{name}"]
            module = f"base_model.model.model.layers.{layer}.{hf_name.removesuffix('.weight')}"
            assert np.array_equal(a, arrays[f"{module}.lora_A.weight"])
            assert np.array_equal(b, permuted(f"blk.{layer}.{name}", arrays[f"{module}.lora_B.weight"]))
    b = got.tensors["blk.0.attn_q.weight"][1]
    unpermuted = arrays["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    assert not np.array_equal(b, unpermuted)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("peft_type", "IA3", "peft_type is 'IA3'"),
        ("use_rslora", True, "use_rslora is True"),
        ("use_dora", True, "use_dora is True"),
        ("lora_bias", True, "lora_bias is True"),
        ("bias", "all", "bias is 'all'"),
        ("modules_to_save", ["lm_head"], r"modules_to_save is \['lm_head'\]"),
        ("rank_pattern", {"q_proj": 2}, r"at rank 2 \(rank_pattern\)"),
        ("alpha_pattern", {"q_proj": 0}, r"alpha_pattern\['q_proj'\] is 0, not a number over 0"),
        ("trainable_token_indices", [1], "trainable_token_indices is"),
        ("layer_replication", [[0, 1]], "layer_replication is"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("lora_alpha", 0, "lora_alpha is 0, not a number over 0"),
        ("lora_alpha", "16", "lora_alpha is '16'"),
        ("r", 0, "r is 0, not a positive integer"),
    ],
)
def test_adapter_that_is_more_than_plain_lora_is_refused(
    key: str, value: object, message: str, base: Path, tmp_path: Path
) -> None:
    peft = write_peft(tmp_path / "peft", {key: value})
    with pytest.raises(InputError, match=message):
        write_adapter_gguf(peft, base, tmp_path / "adapter.gguf", {})
    assert names_in(tmp_path) == {"base.gguf", "peft"}


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {Q_A: np.zeros((RANK, 48))},
            r"q_proj\.lora_A\.weight has the shape \(4, 48\), and blk\.0\.attn_q\.weight of base\.gguf, "
            r"\(64, 64\), needs \(4, 64\) at rank 4",
        ),
        ({Q_B: np.zeros((HIDDEN, 8))}, r"has the shape \(64, 8\), .* needs \(64, 4\)"),
        ({Q_B: np.full((HIDDEN, RANK), np.nan)}, "has NaN or infinite values"),
        ({Q_A: np.full((RANK, HIDDEN), np.inf)}, "has NaN or infinite values"),
        ({Q_A: None}, "q_proj.weight has only one half"),
        (
            {"base_model.model.lm_head.lora_A.weight": np.zeros((RANK, HIDDEN))},
            "changes the vocabulary's weights",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((RANK, TOKENS))},
            "changes the vocabulary's weights",
        ),
        ({"base_model.model.lm_head.weight": np.zeros((TOKENS, HIDDEN))}, "changes the vocabulary's weights"),
        (
            {"base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": np.zeros((RANK, HIDDEN))},
            "has no place in base.gguf",
        ),
        (
            {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.zeros(64)},
            "has no place in base.gguf",
        ),
        (
            {"base_model.model.model.layers.0.input_layernorm.lora_A.weight": np.zeros((RANK, HIDDEN))},
            "has no place in base.gguf",
        ),
    ],
)
def test_adapter_tensors_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    arrays = {name: values for name, values in {**adapter_arrays(), **changes}.items() if values is not None}
    peft = write_peft(tmp_path / "peft", arrays=arrays)
    with pytest.raises(InputError, match=message):
        write_adapter_gguf(peft, base, tmp_path / "adapter.gguf", {})
    assert names_in(tmp_path) == {"base.gguf", "peft"}


def test_all_faults_of_an_adapter_are_named_at_once(base: Path, tmp_path: Path) -> None:
    arrays = {Q_A: np.zeros((RANK, 48)), Q_B: np.full((HIDDEN, RANK), np.nan), "strange": np.zeros(1)}
    peft = write_peft(tmp_path / "peft", {"use_dora": True, "bias": "all"}, arrays)
    with pytest.raises(InputError) as caught:
        write_adapter_gguf(peft, base, tmp_path / "adapter.gguf", {})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    for word in ("use_dora", "bias", "(4, 48)", "NaN", "'strange'"):
        assert sum(word in line for line in lines) == 1, word


def test_base_whose_metadata_contradict_its_matrices_is_refused(adapter: Path, tmp_path: Path) -> None:
    damaged = write_model(tmp_path / "damaged.gguf", replaced=[zeros("blk.0.ffn_up.weight", 80, HIDDEN)])
    message = r"damaged\.gguf: tensor blk\.0\.ffn_up\.weight has the shape \(80, 64\)"
    with pytest.raises(InputError, match=message):
        write_adapter_gguf(tmp_path / "peft", damaged, tmp_path / "again.gguf", {})
    with pytest.raises(InputError, match=message):
        merge_gguf(damaged, adapter, tmp_path / "merged.gguf", metadata={})


def test_tensor_that_cannot_be_dequantized_is_refused(tmp_path: Path) -> None:
    integers = TinyTensor("blk.0.ffn_up.weight", (HIDDEN, FEED_FORWARD), 26)  # I32
    base = write_model(tmp_path / "base.gguf", replaced=[integers])
    with pytest.raises(InputError, match="in the type I32, which cannot be dequantized"):
        write_base_weights(base, tmp_path / "out")
    assert names_in(tmp_path) == {"base.gguf"}


def test_adapter_without_tensors_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the adapter has no tensors"):
        write_adapter_gguf(write_peft(tmp_path / "peft", arrays={}), base, tmp_path / "adapter.gguf", {})


def test_pickled_damaged_and_missing_adapter_files_are_refused(base: Path, tmp_path: Path) -> None:
    peft = write_peft(tmp_path / "peft")
    weights = peft / "adapter_model.safetensors"

    def refused(message: str) -> None:
        with pytest.raises(InputError, match=message):
            write_adapter_gguf(peft, base, tmp_path / "adapter.gguf", {})

    weights.write_bytes(weights.read_bytes()[:-1])
    refused("is not a safetensors file")
    write_safetensors(weights, {Q_A: np.zeros((RANK, HIDDEN))}, "I32")
    refused("is of type I32")
    weights.unlink()
    refused("is missing")
    (peft / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refused(r"adapter_model\.bin is a pickle")
    (peft / "adapter_config.json").write_text("[]")
    refused("is not a JSON object")
    (peft / "adapter_config.json").unlink()
    refused("is missing")
    assert names_in(tmp_path) == {"base.gguf", "peft"}


@pytest.mark.parametrize(
    ("changes", "tensors_", "message"),
    [
        ({"general.type": "model"}, lora("x"), "is not a LoRA adapter"),
        ({"adapter.type": "control"}, lora("x"), "is not a LoRA adapter"),
        ({"adapter.lora.alpha": 0.0}, lora("x"), r"adapter\.lora\.alpha is 0\.0"),
        ({"adapter.lora.alpha": float("inf")}, lora("x"), r"adapter\.lora\.alpha is inf"),
        ({"adapter.lora.alpha": "8"}, lora("x"), r"adapter\.lora\.alpha is '8'"),
        ({}, lora("x")[:1], "'x' has only one half"),
        ({}, [*lora("x")[:1], *lora("x", rank=2)[1:]], r"'x' has the ranks 4 and 2, which differ"),
        ({}, lora("x", rank=0), r"'x' has the rank 0|damaged|shape"),
        ({}, [*lora("x"), zeros("x.weight", 2, 2)], r"'x\.weight' is not half of a LoRA pair"),
        ({}, [], "the adapter has no tensors"),
        (
            {},
            [tensor("x.lora_a", np.full((RANK, 4), np.nan)), zeros("x.lora_b", 4, RANK)],
            "NaN or infinite values",
        ),
    ],
)
def test_gguf_that_is_no_sound_adapter_is_refused(
    changes: dict[str, Value], tensors_: list[TinyTensor], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter.gguf"
    path.write_bytes(tiny_gguf({**ADAPTER_METADATA, **changes}, tensors_))
    with pytest.raises(InputError, match=message):
        read_adapter_gguf(path)


# Fingerprints


def test_fingerprint_stays_for_names_templates_and_order(base: Path, tmp_path: Path) -> None:
    own = fingerprint(base)
    assert re.fullmatch("[0-9a-f]{64}", own)
    metadata = {**METADATA, "general.name": "another", "tokenizer.chat_template": "{{ other }}"}
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_gguf(metadata, model_tensors()[::-1]))
    assert fingerprint(other) == own


@pytest.mark.parametrize(
    "arguments",
    [
        {"changes": {"llama.rope.freq_base": 10000.0}},
        {"changes": {"tokenizer.ggml.tokens": ["a"] * TOKENS}},
        {"replaced": [tensor("blk.1.ffn_norm.weight", np.ones(HIDDEN))]},
        {"replaced": [zeros("output.weight", TOKENS, HIDDEN)]},
        {"without": "blk.1.ffn_up.weight"},
    ],
)
def test_fingerprint_changes_with_the_model(arguments: dict[str, Any], base: Path, tmp_path: Path) -> None:
    assert fingerprint(write_model(tmp_path / "other.gguf", **arguments)) != fingerprint(base)


def test_fingerprint_changes_with_merging_and_requantizing(base: Path, adapter: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged.gguf"
    merge_gguf(base, adapter, merged, metadata={})
    requantized = tmp_path / "requantized.gguf"
    requantized.write_bytes(tiny_gguf(METADATA, model_tensors(("Q4_0", "F16"))))
    assert len({fingerprint(base), fingerprint(merged), fingerprint(requantized)}) == 3


def test_fingerprint_changes_with_the_type_of_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """Half-precision tensors of both kinds have two bytes a value."""
    found = next(t for t in model_tensors() if t.name == "blk.1.ffn_up.weight")
    other = write_model(tmp_path / "other.gguf", replaced=[found._replace(tensor_type=TYPES["BF16"])])
    assert bytes_of(base, found.name) == bytes_of(other, found.name)
    assert fingerprint(base) != fingerprint(other)


def test_fingerprint_is_of_models_only(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a LoRA adapter"):
        fingerprint(adapter)
    with pytest.raises(InputError, match="does not exist"):
        fingerprint(tmp_path / "nothing.gguf")
