"""Build small GGUF files, sound or broken, byte by byte.

    tiny_gguf({"general.architecture": "llama"}, [TinyTensor("a", (2,))]) → b"GGUF\\x03\\x00\\x00\\x00..."

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Independent of the reader under test.
"""

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)

# tensor type → elements per block, bytes per block
BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 14: (256, 210)}


class Typed(NamedTuple):
    """A metadata value of a stated type, its bytes as they stand in the file."""

    value_type: int
    payload: bytes


class TinyTensor(NamedTuple):
    """A tensor; without `data` it is zeros, without `offset` it follows the one before it, aligned."""

    name: str | bytes
    shape: tuple[int, ...]
    tensor_type: int = 0
    data: bytes | None = None
    offset: int | None = None


Value: TypeAlias = bool | int | float | str | Sequence[bool | int | float | str] | Typed
Write: TypeAlias = Callable[[bytes], Path]  # what the fixture `write` gives


def string(text: str | bytes) -> bytes:
    """A GGUF string: length in 64 bits, then the text."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def array(element_type: int, elements: bytes, count: int) -> Typed:
    """An array whose stated element type and count need not fit its elements."""
    return Typed(ARRAY, struct.pack("<IQ", element_type, count) + elements)


def nested_array(depth: int) -> Typed:
    """An array of arrays, so many levels deep, with the number 7 in the innermost."""
    heads = struct.pack("<IQ", ARRAY, 1) * (depth - 1)
    return Typed(ARRAY, heads + struct.pack("<IQI", UINT32, 1, 7))


def typed(value: Value) -> Typed:
    """The type that converters write for this value: int as uint32, float as float32."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, bool):
        return Typed(BOOL, struct.pack("<B", value))
    if isinstance(value, int):
        return Typed(UINT32, struct.pack("<I", value))
    if isinstance(value, float):
        return Typed(FLOAT32, struct.pack("<f", value))
    if isinstance(value, str):
        return Typed(STRING, string(value))
    elements = [typed(element) for element in value]
    element_type = elements[0].value_type if elements else UINT32
    return array(element_type, b"".join(element.payload for element in elements), len(elements))


def tiny_gguf(
    metadata: Mapping[str, Value] | Iterable[tuple[str | bytes, Value]],
    tensors: Sequence[TinyTensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """The bytes of a GGUF file.

    `metadata` may be pairs, to repeat a key. `alignment` pads the tensors; it is not written as
    general.alignment. `n_keys` and `n_tensors` are stated in place of the true counts.
    """
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    keys = b""
    for key, value in pairs:
        value_type, payload = typed(value)
        keys += string(key) + struct.pack("<I", value_type) + payload
    table, data = b"", b""
    for tensor in tensors:
        n_elements = 1
        for dim in tensor.shape:
            n_elements *= dim
        block_elements, block_bytes = BLOCKS.get(tensor.tensor_type, (1, 4))
        offset = len(data) if tensor.offset is None else tensor.offset
        table += string(tensor.name) + struct.pack("<I", len(tensor.shape))
        table += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        table += struct.pack("<IQ", tensor.tensor_type, offset)
        data += bytes(n_elements // block_elements * block_bytes) if tensor.data is None else tensor.data
        data += bytes(-len(data) % alignment)
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(pairs) if n_keys is None else n_keys,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + keys + table
    padding = bytes(-len(header) % alignment) if tensors else b""
    return header + padding + data
