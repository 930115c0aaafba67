"""Tiny random llama models and adapters as files: hidden 64, 4 heads, 2 KV heads, 2 layers, 40 tokens.

write_model(path) → a GGUF with blk.0.attn_q.weight (64, 64) Q8_0, blk.1.attn_q.weight (64, 64) F16, ...
write_peft(directory) → adapter_config.json and adapter_model.safetensors of rank 4, alpha 6
"""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_bytes import ARRAY, INT32, STRING, TinyTensor, Value, array, string, tiny_gguf

from sg_local.errors import InputError
from sg_local.gguf_header import read_header
from sg_local.gguf_io.tensors import lora_targets

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, LAYERS, TOKENS = 64, 4, 2, 16, 96, 2, 40
RANK, ALPHA = 4, 6
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}

METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.name": "tiny",
    "general.file_type": 7,
    "general.quantization_version": 2,
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": FEED_FORWARD,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 20000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    # What is hard to write again: pieces of characters, empty and nested arrays, empty strings.
    "tokenizer.ggml.tokens": array(
        STRING, b"".join(string(b"\xff" + bytes([65 + i])) for i in range(TOKENS)), TOKENS
    ),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "tiny.empty": array(INT32, b"", 0),
    "tiny.nested": array(ARRAY, struct.pack("<IQi", INT32, 1, -5) + struct.pack("<IQ", INT32, 0), 2),
    "tiny.flag": True,
    "tiny.nothing": "",
}

HF_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def encode(values: Any, type_name: str) -> bytes:
    encoded: bytes = gguf.quants.quantize(values, gguf.GGMLQuantizationType[type_name]).tobytes()
    return encoded


def decode(data: bytes, type_name: str, shape: tuple[int, ...]) -> Any:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    raw = np.frombuffer(data, np.uint8).reshape(*shape[:-1], shape[-1] // block_elements * block_bytes)
    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])


def tensor(name: str, values: Any, type_name: str = "F32") -> TinyTensor:
    return TinyTensor(
        name, values.shape[::-1], TYPES[type_name], encode(values.astype(np.float32), type_name)
    )


def model_tensors(types: tuple[str, str] = ("Q8_0", "F16")) -> list[TinyTensor]:
    """A whole model; layer n's matrices are of types[n], but layer 0's attn_v BF16 and ffn_up F32."""
    random = np.random.default_rng(0)
    made = [tensor("token_embd.weight", random.normal(size=(TOKENS, HIDDEN)), "Q8_0")]
    for layer in range(LAYERS):
        shapes = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FEED_FORWARD, HIDDEN),
            "ffn_up": (FEED_FORWARD, HIDDEN),
            "ffn_down": (HIDDEN, FEED_FORWARD),
        }
        special = {"attn_v": "BF16", "ffn_up": "F32"} if layer == 0 else {}
        for name, shape in shapes.items():
            type_name = "F32" if len(shape) == 1 else special.get(name, types[layer])
            made.append(tensor(f"blk.{layer}.{name}.weight", random.normal(size=shape), type_name))
    return [*made, tensor("output_norm.weight", random.normal(size=(HIDDEN,)))]


def write_model(
    path: Path,
    changes: dict[str, Value | None] | None = None,
    replaced: list[TinyTensor] | None = None,
    *,
    without: str = "",
    alignment: int = 32,
) -> Path:
    """The tiny model; `changes` replace metadata (None removes), `replaced` replace tensors or are added."""
    metadata = {key: value for key, value in {**METADATA, **(changes or {})}.items() if value is not None}
    by_name = {t.name: t for t in [*model_tensors(), *(replaced or [])] if not without or t.name != without}
    path.write_bytes(tiny_gguf(metadata, list(by_name.values()), alignment=alignment))
    return path


def values_of(path: Path) -> dict[str, Any]:
    """Every tensor of a GGUF file as float32 (rows, columns)."""
    data = path.read_bytes()
    return {
        t.name: decode(data[t.offset_bytes : t.offset_bytes + t.size_bytes], t.type_name, t.shape[::-1])
        for t in read_header(path).tensors
    }


def bytes_of(path: Path, name: str) -> bytes:
    found = read_header(path).tensor(name)
    assert found is not None
    return path.read_bytes()[found.offset_bytes : found.offset_bytes + found.size_bytes]


def llama_cpp_permute(weights: Any, n_head: int) -> Any:
    """As it stands in llama.cpp's convert_hf_to_gguf.py."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def permuted(name: str, weights: Any) -> Any:
    heads = {"attn_q.weight": HEADS, "attn_k.weight": KV_HEADS}.get(name.split(".", 2)[-1])
    return llama_cpp_permute(weights, heads) if heads else weights


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def zeros(name: str, *shape: int) -> TinyTensor:
    return tensor(name, np.zeros(shape))


def adapter_arrays(seed: int = 5, scale: float = 0.3) -> dict[str, Any]:
    """PEFT's names and arrays for all seven matrices of both layers."""
    random = np.random.default_rng(seed)
    arrays = {}
    for layer in range(LAYERS):
        for name, hf_name in HF_NAMES.items():
            shape = values_shape(name)
            if len(shape) == 2:
                module = f"base_model.model.model.layers.{layer}.{hf_name.removesuffix('.weight')}"
                arrays[f"{module}.lora_A.weight"] = random.normal(size=(RANK, shape[1])) * scale
                arrays[f"{module}.lora_B.weight"] = random.normal(size=(shape[0], RANK)) * scale
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def values_shape(name: str) -> tuple[int, ...]:
    found = next(t for t in model_tensors() if t.name == f"blk.0.{name}")
    return found.shape[::-1]


def write_safetensors(path: Path, arrays: dict[str, Any], dtype: str = "F32") -> None:
    """The format by hand, so that bfloat16 can be written: length, JSON header, data."""
    header, data = {}, b""
    for name, values in arrays.items():
        if dtype == "BF16":
            raw = (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        else:
            raw = values.astype({"F32": np.float32, "F16": np.float16, "I32": np.int32}[dtype])
        header[name] = {
            "dtype": dtype,
            "shape": values.shape,
            "data_offsets": [len(data), len(data) + raw.nbytes],
        }
        data += raw.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_peft(
    directory: Path,
    config: dict[str, Any] | None = None,
    arrays: dict[str, Any] | None = None,
    dtype: str = "F32",
) -> Path:
    directory.mkdir(exist_ok=True)
    full = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": list(lora_targets("llama")),
        "use_rslora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
    }
    (directory / "adapter_config.json").write_text(json.dumps({**full, **(config or {})}))
    write_safetensors(
        directory / "adapter_model.safetensors", adapter_arrays() if arrays is None else arrays, dtype
    )
    return directory


def lora(name: str, rows: int = HIDDEN, columns: int = HIDDEN, rank: int = RANK) -> list[TinyTensor]:
    return [zeros(f"{name}.lora_a", rank, columns), zeros(f"{name}.lora_b", rows, rank)]


ADAPTER_METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.type": "adapter",
    "adapter.type": "lora",
    "adapter.lora.alpha": 8.0,
}


def refusal(path: Path) -> str:
    """The one-line message that `read_header` refuses the file with."""
    with pytest.raises(InputError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message
