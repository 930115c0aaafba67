"""Tiny random models that llama.cpp runs: hidden 64, 2 layers, a SentencePiece vocabulary of 324 tokens, all F32.

write_tiny_llama(path) -> "<s>", "</s>", 256 bytes, and pieces such as "▁a" and "th"; BOS first, as Vicuna has it
write_tiny_model(path, "gemma3", tied=True, n_layers=6) -> blk.0.attn_q.weight (128, 64), blk.0.post_ffw_norm.weight
"""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf_bytes import FLOAT32, INT32, TinyTensor, Typed, Value, array, tiny_gguf

from sg_local.architectures import ARCHITECTURES, ATTENTION, CONV, LINEAR
from sg_local.dimensions import Dimensions

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


def write_tiny_llama(
    path: Path, seed: int = 0, scale: float = 0.3, vocabulary: Mapping[str, Value] | None = None
) -> Path:
    """A random llama, whose greedy answers are varied: its output is not tied to its embedding.

    vocabulary: keys to replace.
    """
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
        **(vocabulary or {}),
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


# Keys that llama.cpp does not load an architecture without
NEEDED: dict[str, dict[str, Value]] = {
    "granite": {"logit_scale": 0.5},
    "lfm2": {"shortconv.l_cache": 3},
    # Twice as many value heads as key heads, three of four pairs rotated
    "qwen35": {
        "attention.layer_norm_rms_epsilon": 1e-6,
        "full_attention_interval": 2,
        "rope.dimension_count": 24,
        "rope.dimension_sections": integers([4, 4, 4, 0]),
        "ssm.conv_kernel": 4,
        "ssm.state_size": 16,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 4,
        "ssm.inner_size": 64,
    },
}
WIDE_HEAD_DIM = 32  # of the architectures whose heads need not be hidden / heads wide


def write_tiny_model(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Value | None] | None = None,
    *,
    tied: bool = False,
    biases: bool = False,
    n_layers: int = LAYERS,
    hidden: int = HIDDEN,
    matrix_type: str = "F32",
    vectors: Mapping[str, Sequence[float]] | None = None,
    without: str = "",
    seed: int = 0,
) -> Path:
    """A random model of any architecture of the table, its logits some units wide.

    metadata: keys of the architecture without its name, to add, replace or (None) leave out. biases: those of
    attention where they are optional. matrix_type: one that the gguf package encodes. vectors: to add or replace.
    without: a tensor to leave out. Matrices are exact in float16, so that torch computes with the very same numbers.
    An architecture that is not supported is shaped like qwen2. Two of three layers of LFM2 are convolutions; what
    linear attention there is in Qwen 3.5, `metadata` says.
    """
    import gguf

    random = np.random.default_rng(seed)
    sizes: dict[str, Value | None] = {
        "block_count": n_layers,
        "context_length": CONTEXT,
        "embedding_length": hidden,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
    }
    entry = ARCHITECTURES.get(architecture, ARCHITECTURES["qwen2"])
    head_dim = hidden // HEADS
    if not entry.derives_heads:
        head_dim = WIDE_HEAD_DIM
        sizes |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    given = {**NEEDED.get(architecture, {}), **(metadata or {})}
    kinds: tuple[str, ...] = ()
    if CONV in entry.layer_kinds:
        kinds = tuple((CONV, ATTENTION, CONV)[layer % 3] for layer in range(n_layers))
        sizes["attention.head_count_kv"] = integers([KV_HEADS * (kind == ATTENTION) for kind in kinds])
    elif LINEAR in entry.layer_kinds:
        interval = int(str(given["full_attention_interval"] or 4))
        kinds = tuple(LINEAR if (layer + 1) % interval else ATTENTION for layer in range(n_layers))
    given = sizes | given
    keys = {f"{architecture}.{key}": value for key, value in given.items()}

    dimensions = Dimensions(
        vocab=len(TOKENS),
        hidden=hidden,
        intermediate=FEED_FORWARD,
        n_layers=n_layers,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        head_dim=head_dim,
        n_rotated=head_dim,
        layer_kinds=kinds,
        conv_tokens=int(str(given.get("shortconv.l_cache") or given.get("ssm.conv_kernel") or 3)),
        n_key_heads=int(str(given.get("ssm.group_count") or 1)),
        n_value_heads=int(str(given.get("ssm.time_step_rank") or 1)),
        linear_head_dim=int(str(given.get("ssm.state_size") or 1)),
    )
    wanted = {"", "" if tied else "lm_head", "attention_bias" if biases else ""}
    specs = {spec.gguf: spec for spec in entry.tensors}
    for layer in range(n_layers):
        of_layer = entry.tensors_of(dimensions.kinds[layer])
        specs |= {f"blk.{layer}.{spec.gguf}": spec for spec in of_layer}
    shapes = {name: dimensions.sizes(spec.shape) for name, spec in specs.items() if spec.optional in wanted}

    arrays = {}
    for name, shape in shapes.items():
        values = random.normal(size=shape)
        if name in ("token_embd.weight", "output.weight"):
            values *= 2 * hidden**-0.5
        elif len(shape) == 2:
            values *= shape[1] ** -0.5
        elif name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif specs[name].is_log:
            values = -np.exp(values)
        elif name.endswith("ssm_dt.bias"):
            values -= 3  # so that linear attention remembers some tens of tokens, as in a new model
        arrays[name] = values.astype(np.float16) if len(shape) == 2 else values
    arrays |= {name: np.array(vector) for name, vector in (vectors or {}).items()}
    tensors = []
    for name, values in arrays.items():
        is_matrix = values.ndim == 2 and not (name in specs and specs[name].is_kernel)
        kind = gguf.GGMLQuantizationType[matrix_type if is_matrix else "F32"]
        data = gguf.quants.quantize(values.astype(np.float32), kind).tobytes()
        if name != without:
            tensors.append(TinyTensor(name, values.shape[::-1], int(kind), data))
    general: dict[str, Value] = {
        "general.architecture": architecture,
        "general.name": "tiny",
        "general.file_type": 0,
    }
    own = {key: value for key, value in keys.items() if value is not None}
    path.write_bytes(tiny_gguf({**general, **own, **VOCABULARY}, tensors))
    return path
