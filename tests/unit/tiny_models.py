"""Tiny random models that llama.cpp runs: hidden 64, 2 layers, a SentencePiece vocabulary of 324 tokens, all F32.

write_tiny_llama(path) -> "<s>", "</s>", 256 bytes, and pieces such as "▁a" and "th"; BOS first, as Vicuna has it
"""

import struct
from pathlib import Path

import numpy as np
from gguf_bytes import FLOAT32, INT32, TinyTensor, Typed, Value, array, tiny_gguf

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS, CONTEXT = 64, 4, 2, 96, 2, 512
HEAD_DIM = HIDDEN // HEADS

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [
    "▁",
    *(f"▁{letter}" for letter in _LETTERS),
    *_LETTERS,
    "th",
    "an",
    "é",
    "日",
    "\n",
    ".",
    ",",
    ":",
    "A",
    "S",
    "U",
    "ing",
]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
_UNKNOWN, _CONTROL, _NORMAL, _BYTE = 2, 3, 1, 6
_TYPES = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * len(PIECES)


def floats(values: list[float]) -> Typed:
    return array(FLOAT32, struct.pack(f"<{len(values)}f", *values), len(values))


def integers(values: list[int]) -> Typed:
    return array(INT32, struct.pack(f"<{len(values)}i", *values), len(values))


VOCABULARY: dict[str, Value] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": floats([0.0] * 259 + [float(len(piece)) for piece in PIECES]),
    "tokenizer.ggml.token_type": integers(_TYPES),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
}


def write_tiny_llama(path: Path, seed: int = 0, scale: float = 0.3) -> Path:
    """A random llama, whose greedy answers are varied: its output is not tied to its embedding."""
    random = np.random.default_rng(seed)
    metadata: dict[str, Value] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 0,
        "llama.block_count": LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": HEAD_DIM,
        **VOCABULARY,
    }
    kv_rows = KV_HEADS * HEAD_DIM
    shapes = {
        "token_embd.weight": (len(TOKENS), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "output.weight": (len(TOKENS), HIDDEN),
    }
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (HIDDEN,),
            f"blk.{layer}.attn_q.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k.weight": (kv_rows, HIDDEN),
            f"blk.{layer}.attn_v.weight": (kv_rows, HIDDEN),
            f"blk.{layer}.attn_output.weight": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm.weight": (HIDDEN,),
            f"blk.{layer}.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_up.weight": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_down.weight": (HIDDEN, FEED_FORWARD),
        }
    tensors = [
        TinyTensor(
            name,
            shape[::-1],
            0,
            (random.normal(size=shape) * (scale if len(shape) == 2 else 0.2) + (len(shape) == 1))
            .astype(np.float32)
            .tobytes(),
        )
        for name, shape in shapes.items()
    ]
    path.write_bytes(tiny_gguf(metadata, tensors))
    return path
