"""A Llama with random weights in the types of a Q4_K_M file, as large as is asked for: what speed and memory depend on.

    write_random_llama(Path("v7b.gguf"), VICUNA_7B)     4.1 GB, 32 layers, 4096 wide, a vocabulary of 32,000 tokens

Quantized blocks are random bits with fixed scales, so nothing is computed and the file is written as fast as the disk
takes it. Sources: ggml-common.h (block_q4_K, block_q6_K), llama-quant.cpp (which layers get Q6_K in Q4_K_M).
"""

from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

Q4_K, Q6_K = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
SCALE_OF_SIX_BITS = 32  # all sub-block scales alike


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    n_layers: int
    hidden: int
    feed_forward: int
    n_heads: int
    n_vocab: int = 32000
    n_ctx: int = 4096


VICUNA_7B = Shape(n_layers=32, hidden=4096, feed_forward=11008, n_heads=32)
TWO_LAYERS = replace(VICUNA_7B, n_layers=2)
TINY = Shape(n_layers=2, hidden=256, feed_forward=512, n_heads=4, n_vocab=2048, n_ctx=1024)


def vocabulary(n_vocab: int) -> tuple[list[bytes], list[float], list[int]]:
    """Texts, scores and types of a SentencePiece vocabulary: special tokens, bytes, characters, and longer pieces."""
    letters = "▁abcdefghijklmnopqrstuvwxyz"
    other = [chr(code) for code in range(33, 127) if chr(code) not in letters]
    longer = ("".join(pair) for length in (2, 3, 4) for pair in product(letters, repeat=length))
    pieces = [*letters, *other]
    pieces += islice(longer, n_vocab - 259 - len(pieces))
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    # Earlier merges first, as in a trained vocabulary; llama.cpp merges the pair with the highest score.
    scores = [0.0] * 259 + [-float(index) for index in range(len(pieces))]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]  # unknown, control, byte, normal
    return [text.encode() for text in texts], scores, types


def write_random_llama(path: Path, shape: Shape, *, pad: int | None = None, seed: int = 0) -> Path:
    """Writes the model; pad: the id of its padding token, None for a file that names none."""
    random = np.random.default_rng(seed)
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("random")
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.n_heads)
    writer.add_file_type(15)  # Q4_K_M
    writer.add_vocab_size(shape.n_vocab)
    texts, scores, types = vocabulary(shape.n_vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
    if pad is not None:
        writer.add_pad_token_id(pad)

    tensors = list(_tensors(shape))
    for name, rows, columns, kind in tensors:
        if kind is None:
            writer.add_tensor_info(name, (rows,), np.dtype(np.float32), rows * 4)
        else:
            n_weights, n_bytes = GGML_QUANT_SIZES[kind]
            row_bytes = columns // n_weights * n_bytes
            writer.add_tensor_info(
                name, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, rows, columns, kind in tensors:
        if kind is None:
            writer.write_tensor_data(np.ones(rows, np.float32))
            continue
        deviation = 0.02
        if "attn_output" in name or "ffn_down" in name:  # else the sum over layers would grow
            deviation /= (2 * max(shape.n_layers, 8)) ** 0.5
        blocks = _q4_k if kind == Q4_K else _q6_k
        writer.write_tensor_data(blocks(random, rows, columns, deviation))
    writer.close()
    return path


def _tensors(shape: Shape) -> Any:
    """(name, rows, columns, type) of every tensor; no type is a vector in float32."""
    hidden, n_layers = shape.hidden, shape.n_layers
    yield "token_embd.weight", shape.n_vocab, hidden, Q4_K
    yield "output_norm.weight", hidden, 0, None
    yield "output.weight", shape.n_vocab, hidden, Q6_K
    for layer in range(n_layers):
        eighth = n_layers // 8
        is_finer = layer < eighth or layer >= n_layers - eighth or (layer - eighth) % 3 == 2
        finer = Q6_K if is_finer else Q4_K
        yield f"blk.{layer}.attn_norm.weight", hidden, 0, None
        yield f"blk.{layer}.ffn_norm.weight", hidden, 0, None
        yield f"blk.{layer}.attn_q.weight", hidden, hidden, Q4_K
        yield f"blk.{layer}.attn_k.weight", hidden, hidden, Q4_K
        yield f"blk.{layer}.attn_v.weight", hidden, hidden, finer
        yield f"blk.{layer}.attn_output.weight", hidden, hidden, Q4_K
        yield f"blk.{layer}.ffn_gate.weight", shape.feed_forward, hidden, Q4_K
        yield f"blk.{layer}.ffn_up.weight", shape.feed_forward, hidden, Q4_K
        yield f"blk.{layer}.ffn_down.weight", hidden, shape.feed_forward, finer


def _half(value: float) -> Any:
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def _q4_k(random: np.random.Generator, rows: int, columns: int, deviation: float) -> Any:
    """Blocks of 256 weights: two halves d and dmin, 12 bytes of 6-bit scales and mins, 128 bytes of 4-bit numbers."""
    n_blocks = rows * columns // 256
    blocks = np.frombuffer(random.bytes(n_blocks * 144), np.uint8).reshape(n_blocks, 144).copy()
    d = (
        deviation / 4.61 / SCALE_OF_SIX_BITS
    )  # numbers 0..15 have a standard deviation of 4.61 and a mean of 7.5
    blocks[:, 0:2], blocks[:, 2:4] = _half(d), _half(7.5 * d)
    # Scales and mins of the first four sub-blocks, with the high bits of the last four, whose low bits come after.
    blocks[:, 4:12] = SCALE_OF_SIX_BITS | SCALE_OF_SIX_BITS >> 4 << 6
    blocks[:, 12:16] = 0
    return blocks.reshape(rows, -1)


def _q6_k(random: np.random.Generator, rows: int, columns: int, deviation: float) -> Any:
    """Blocks of 256 weights: 192 bytes of 6-bit numbers, 16 scales, a half d."""
    n_blocks = rows * columns // 256
    blocks = np.frombuffer(random.bytes(n_blocks * 210), np.uint8).reshape(n_blocks, 210).copy()
    blocks[:, 192:208] = 16
    blocks[:, 208:210] = _half(deviation / 18.5 / 16)
    return blocks.reshape(rows, -1)
