"""Reads and writes the parts of a GGUF file as bytes: raw metadata, the table of tensors, padding.

    "general.file_type" → 04 00 00 00 01 00 00 00: type uint32, value 1

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3. The gguf package is not used here. Its
reader needs seconds and hundreds of MB for a large vocabulary. Its writer cannot write empty arrays or arrays of
arrays, and may miss that the disk is full, since it writes with numpy's `tofile`.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

from sg_local.gguf_header import GgufHeader
from sg_local.gguf_io.tensors import quantization, read_bytes
from sg_local.gguf_values import ARRAY, FLOAT32, STRING, UINT32, VALUE_BYTES


class OutputTensor(NamedTuple):
    """A tensor to be written. `shape` is in GGUF order: the contiguous dimension comes first."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    size_bytes: int


def uint32_value(number: int) -> bytes:
    """The raw metadata value of a uint32."""
    return struct.pack("<II", UINT32, number)


def float32_value(number: float) -> bytes:
    """The raw metadata value of a float32."""
    return struct.pack("<If", FLOAT32, number)


def string_value(text: str) -> bytes:
    """The raw metadata value of a string."""
    data = text.encode()
    return struct.pack("<IQ", STRING, len(data)) + data


def raw_metadata(header: GgufHeader) -> dict[str, bytes]:
    """Metadata key → value type and value, as bytes, in the order of the file.

    The bytes are not checked here: read_header has checked them.
    """
    data = read_bytes(header, 0, header.data_offset_bytes).tobytes()
    values: dict[str, bytes] = {}
    position = 24  # after magic, version, number of tensors, number of keys
    for _ in header.metadata:
        (key_bytes,) = struct.unpack_from("<Q", data, position)
        start = position + 8 + key_bytes
        (value_type,) = struct.unpack_from("<I", data, start)
        key = data[position + 8 : start].decode()
        position = _value_end(data, start + 4, value_type)
        values[key] = data[start:position]
    return values


def _value_end(data: bytes, position: int, value_type: int) -> int:
    if value_type == STRING:
        return position + 8 + int.from_bytes(data[position : position + 8], "little")
    if value_type == ARRAY:
        element_type, count = struct.unpack_from("<IQ", data, position)
        position += 12
        if element_type in VALUE_BYTES:
            return position + int(count) * VALUE_BYTES[element_type]
        for _ in range(count):
            position = _value_end(data, position, element_type)
        return position
    return position + VALUE_BYTES[value_type]


def write_header(
    file: BinaryIO, values: Mapping[str, bytes], tensors: Sequence[OutputTensor], alignment_bytes: int
) -> None:
    """Writes all that comes before the tensor data: raw metadata, then the table of tensors.

    The caller writes the data of the tensors in the same order, and calls `pad` after each.
    """
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values)))
    for key, value in values.items():
        name = key.encode()
        file.write(struct.pack("<Q", len(name)) + name + value)
    offset_bytes = 0
    for name_text, shape, type_name, size_bytes in tensors:
        name = name_text.encode()
        file.write(struct.pack("<Q", len(name)) + name)
        file.write(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        file.write(struct.pack("<IQ", int(quantization(type_name)), offset_bytes))
        offset_bytes += -(-size_bytes // alignment_bytes) * alignment_bytes
    pad(file, alignment_bytes)


def pad(file: BinaryIO, alignment_bytes: int) -> None:
    """Writes zeros up to the alignment."""
    file.write(bytes(-file.tell() % alignment_bytes))
