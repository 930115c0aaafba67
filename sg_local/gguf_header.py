"""Read the header of a GGUF file within bounds, before anything else opens the file.

    SmolLM2-135M-Instruct.Q4_1.gguf, 98362432 bytes → GgufHeader(version=3, data_offset_bytes=1785664,
    metadata={"general.architecture": "llama", ...}, 33 keys,
    tensors=(TensorInfo("token_embd.weight", (576, 49152), "Q8_0", 1785664, 30081024), ...), 272 of them)

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian. What
llama.cpp refuses (ggml/src/gguf.cpp) is refused here too, with a reason a person understands. A file may be
hostile: every count is checked against a limit, and every value is read within bounds (gguf_values.py).
Not done here: reading tensor data, and judging whether the metadata makes a working model.
"""

import math
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sg_local.architectures import ARCHITECTURES
from sg_local.errors import InputError
from sg_local.gguf_values import (
    KEY_BYTES,
    KEY_WORK,
    TENSOR_BYTES,
    TENSOR_WORK,
    UINT32,
    BoundedReader,
    EndsEarly,
    MetadataValue,
)

MAX_METADATA_KEYS = 65_536
MAX_KEY_BYTES = 65_535  # the specification's own limit
MAX_TENSORS = 65_536
MAX_TENSOR_NAME_BYTES = 63  # GGML_MAX_NAME with its terminating zero is 64
MAX_TENSOR_DIMS = 4  # GGML_MAX_DIMS
MAX_ALIGNMENT_BYTES = 1024**2
DEFAULT_ALIGNMENT_BYTES = 32

# Texts that decide what is computed have to be UTF-8. Others may be anything: paths of somebody's files, names.
_READ_AS_TEXT = frozenset(
    {
        "general.architecture",
        "general.type",
        "tokenizer.chat_template",
        "tokenizer.chat_template.base",
        "tokenizer.ggml.model",
        "tokenizer.ggml.pre",
        "adapter.type",
        "sg_local.task",
        "sg_local.base_fingerprint",
        "sg_local.base_sha256",
    }
)

# In a tuned model the chat template of its base, beside that for other programs.
BASE_TEMPLATE_KEY = "tokenizer.chat_template.base"

_MAGIC = b"GGUF"
_INT64_MAX = 2**63 - 1
_MAX_SHOWN_FAULTS = 8

# tensor type → name, elements per block, bytes per block: the types that the gguf package knows.
# 4, 5, 31 to 33 and 36 to 38 were removed from ggml; its Q2_0 (42) is unknown to gguf 0.19.
_TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}

# What people give instead of a GGUF, by its first four bytes.
_OTHER_FILES = {
    b"vers": "it looks like a Git LFS pointer: fetch the file itself with git lfs pull",
    b"<!do": "it looks like a web page: download the file itself",
    b"<htm": "it looks like a web page: download the file itself",
    b"PK\x03\x04": "it looks like a PyTorch checkpoint: convert it with llama.cpp's convert_hf_to_gguf.py",
    b"tjgg": "it is in llama.cpp's format before GGUF: get a current conversion of the model",
    b"lmgg": "it is in llama.cpp's format before GGUF: get a current conversion of the model",
    b"fmgg": "it is in llama.cpp's format before GGUF: get a current conversion of the model",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file. `shape` is in GGUF order: the contiguous dimension comes first."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset_bytes: int  # from the start of the file
    size_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header: every tensor lies aligned inside the file, none overlaps another.

    `size_bytes` is the size of the file, `data_offset_bytes` is where its tensor data begins.
    """

    path: Path
    version: int
    metadata: dict[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    data_offset_bytes: int
    size_bytes: int

    @property
    def architecture(self) -> str:
        """`general.architecture`, for example "llama"."""
        return str(self.metadata["general.architecture"])

    @property
    def kind(self) -> str:
        """`general.type`: "model" where the file does not say, "adapter" for a LoRA adapter."""
        return str(self.metadata.get("general.type", "model"))

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, which is data from the file and may be hostile.

        Of a tuned model it is the base's: the one for other programs writes the instruction itself.
        """
        template = self.metadata.get("tokenizer.chat_template")
        if "sg_local.task" in self.metadata:
            template = self.metadata.get(BASE_TEMPLATE_KEY, template)
        return template if isinstance(template, str) else None

    def tensor(self, name: str) -> TensorInfo | None:
        """Return the tensor of this name, or None."""
        return next((tensor for tensor in self.tensors if tensor.name == name), None)


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of any GGUF file: model, adapter or vocabulary.

    Only the header is read, never tensor data.

    Raises:
        InputError: the file cannot be read, is no GGUF of version 2 or 3, is truncated, damaged, over a
            limit, or one part of a split model. The message names the file and the reason; faults that leave
            the rest readable are reported together, a line each.
    """
    if "\0" in str(path):
        raise InputError(f"{str(path)!r} cannot be a path: it has a zero byte; give the path of a GGUF file")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path} is a directory: give the path of a GGUF file")
        # Opening a named pipe would wait for a writer.
        if not stat.S_ISREG(mode):
            raise InputError(f"{path} is not a regular file: give the path of a GGUF file")
        with path.open("rb") as file:
            return _read(path, file, size_bytes=os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: check the path") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def read_model_header(path: Path) -> GgufHeader:
    """Read the header of a file that has to be a whole model.

    Raises:
        InputError: as `read_header`, or the file is an adapter or another companion file, or has no weights.
    """
    header = read_header(path)
    require_model(header)
    return header


def read_arrived_header(path: Path, size_bytes: int, named: Path) -> GgufHeader | None:
    """Read the header of a file of which a part has arrived; None until that has all of the header.

    `size_bytes` is the size of the whole file, `named` is what errors call it.

    Raises:
        InputError: as `read_header`, as soon as what has arrived shows it.
    """
    with path.open("rb") as file:
        try:
            return _read(named, file, size_bytes)
        except EndsEarly:
            return None


def require_model(header: GgufHeader) -> None:
    """Check that the file is a whole model.

    Raises:
        InputError: it is an adapter or another companion file, or has no weights.
    """
    path = header.path
    if header.kind == "adapter":
        raise InputError(
            f"{path} is a LoRA adapter, not a model; "
            "give the base model with --model; `sg-local predict` takes this file with --adapter"
        )
    if header.kind != "model":
        raise InputError(
            f"{path} is not a model (general.type is {_shown(header.kind)}); give a model with --model"
        )
    if not header.tensors:
        raise InputError(
            f"{path} holds a vocabulary only, no tensors; give the GGUF file that has the model's weights"
        )


def require_supported(header: GgufHeader) -> None:
    """Check that the model is of an architecture that can be finetuned and exported here.

    Raises:
        InputError: it is not; the message names its architecture and the supported ones.
    """
    if header.architecture not in ARCHITECTURES:
        raise InputError(
            f"{header.path} has the architecture {_shown(header.architecture)}, which is not supported; "
            f"give a model of one of: {', '.join(ARCHITECTURES)}"
        )


def _read(path: Path, file: BinaryIO, size_bytes: int) -> GgufHeader:
    reader = BoundedReader(path, file, size_bytes)
    version = _read_version(reader)
    n_tensors = reader.uint64("the number of tensors")
    n_keys = reader.uint64("the number of metadata keys")
    if n_tensors > MAX_TENSORS:
        raise reader.fault(f"has {n_tensors} tensors, over the limit of {MAX_TENSORS}")
    if n_keys > MAX_METADATA_KEYS:
        raise reader.fault(f"has {n_keys} metadata keys, over the limit of {MAX_METADATA_KEYS}")

    metadata = _read_metadata(reader, n_keys)
    n_parts = metadata.get("split.count", 1)
    if isinstance(n_parts, int) and n_parts > 1:
        raise reader.fault(
            f"is one of {n_parts} parts of a split model; "
            "merge them with llama-gguf-split --merge FIRST_PART OUTPUT and give the merged file"
        )
    alignment_bytes = _alignment_bytes(reader, metadata)
    faults = _metadata_faults(metadata)

    # Offsets in the table count from the start of the tensor data, which is known after the table.
    table = [_read_tensor(reader, index) for index in range(n_tensors)]
    data_offset_bytes = _padded(reader.position, alignment_bytes) if table else reader.position
    tensors = tuple(
        TensorInfo(name, shape, type_name, data_offset_bytes + offset_bytes, n_bytes)
        for name, shape, type_name, offset_bytes, n_bytes in table
    )
    faults += _layout_faults(tensors, data_offset_bytes, alignment_bytes, size_bytes)
    if faults:
        shown = faults[:_MAX_SHOWN_FAULTS]
        if len(faults) > len(shown):
            shown.append(f"has {len(faults) - len(shown)} more faults")
        raise InputError("\n".join(f"{path} {fault}" for fault in shown))
    return GgufHeader(path, version, metadata, tensors, data_offset_bytes, size_bytes)


def _read_version(reader: BoundedReader) -> int:
    if reader.size_bytes == 0:
        raise reader.fault("is empty; download it again")
    magic = reader.take(min(len(_MAGIC), reader.size_bytes), "the magic number")
    if magic != _MAGIC:
        hint = _OTHER_FILES.get(magic.lower() if magic[:1] == b"<" else magic, "give a model in GGUF format")
        raise reader.fault(f"is not a GGUF file: it begins with {repr(magic)[1:]} instead of 'GGUF'; {hint}")
    version = reader.uint32("the version")
    if version == 1:
        raise reader.fault(
            "is GGUF version 1, which llama.cpp no longer reads; get a current conversion of the model"
        )
    if version and version & 0xFFFF == 0:
        raise reader.fault(
            "is a big-endian GGUF; get the little-endian file, or convert it with gguf-convert-endian"
        )
    if version not in (2, 3):
        raise reader.fault(f"is GGUF version {version}; versions 2 and 3 can be read")
    return version


def _read_metadata(reader: BoundedReader, n_keys: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(n_keys):
        key = reader.string(f"the name of metadata key {index + 1} of {n_keys}", MAX_KEY_BYTES)
        what = f"metadata key {_shown(key)}"
        if not key:
            raise reader.fault(f"is damaged: metadata key {index + 1} of {n_keys} has no name")
        if key in metadata:
            raise reader.fault(f"is damaged: {what} occurs twice")
        value_type = reader.uint32(what)
        if key == "general.alignment" and value_type != UINT32:
            raise reader.fault(f"is damaged: {what} has the value type {value_type}, not uint32 ({UINT32})")
        reader.spend(KEY_WORK, KEY_BYTES, what)
        metadata[key] = reader.value(value_type, what, is_strict=key in _READ_AS_TEXT)
    return metadata


def _alignment_bytes(reader: BoundedReader, metadata: dict[str, MetadataValue]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT_BYTES)
    if not isinstance(alignment, int) or alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT_BYTES:
        raise reader.fault(
            f"is damaged: general.alignment is {alignment}, "
            f"not a power of two from 1 to {MAX_ALIGNMENT_BYTES}"
        )
    return alignment


def _metadata_faults(metadata: dict[str, MetadataValue]) -> list[str]:
    faults = []
    if not metadata.get("general.architecture"):
        kind = metadata.get("general.type")
        also = f" (general.type is {_shown(kind)})" if isinstance(kind, str) else ""
        faults.append(f"has no general.architecture, so it is no model and no adapter{also}")
    for key in ("general.architecture", "general.type", "tokenizer.chat_template"):
        if not isinstance(metadata.get(key, ""), str):
            faults.append(f"is damaged: {key} is not a string")
    if not isinstance(metadata.get("split.count", 1), int):
        faults.append("is damaged: split.count is not an integer")
    return faults


def _read_tensor(reader: BoundedReader, index: int) -> tuple[str, tuple[int, ...], str, int, int]:
    """One entry of the tensor table: name, shape, type name, offset in the tensor data, size in bytes."""
    name = reader.string(f"the name of tensor {index + 1}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {_shown(name)}"
    reader.spend(TENSOR_WORK, TENSOR_BYTES, what)
    n_dims = reader.uint32(what)
    if n_dims > MAX_TENSOR_DIMS:
        raise reader.fault(f"is damaged: {what} has {n_dims} dimensions, over the limit of {MAX_TENSOR_DIMS}")
    # One number may stand without dimensions: llama.cpp fills them up with ones.
    shape = struct.unpack(f"<{n_dims}Q", reader.take(8 * n_dims, what)) or (1,)
    tensor_type = reader.uint32(what)
    offset_bytes = reader.uint64(what)
    if tensor_type not in _TENSOR_TYPES:
        raise reader.fault(
            f"has the tensor type {tensor_type} in {what}, which is unknown here or was removed from "
            "llama.cpp; get another quantization of the model"
        )
    type_name, block_elements, block_bytes = _TENSOR_TYPES[tensor_type]
    # llama.cpp counts elements in int64; a dimension of 0 must not hide what the others come to.
    if math.prod(max(dim, 1) for dim in shape) > _INT64_MAX:
        raise reader.fault(f"is damaged: {what} has the impossible shape {list(shape)}")
    if shape[0] % block_elements:
        raise reader.fault(
            f"is damaged: {what} has rows of {shape[0]} elements, "
            f"not a multiple of the {block_elements} in a block of {type_name}"
        )
    return name, shape, type_name, offset_bytes, math.prod(shape) // block_elements * block_bytes


def _layout_faults(
    tensors: Sequence[TensorInfo], data_offset_bytes: int, alignment_bytes: int, size_bytes: int
) -> list[str]:
    """llama.cpp wants the tensors one after another in the table's order, each padded to the alignment."""
    faults = []
    seen: set[str] = set()
    expected = data_offset_bytes
    for tensor in tensors:
        what = f"tensor {_shown(tensor.name)}"
        if tensor.name in seen:
            faults.append(f"is damaged: {what} occurs twice")
        seen.add(tensor.name)
        offset = tensor.offset_bytes
        if offset % alignment_bytes:
            faults.append(
                f"is damaged: {what} begins at byte {offset}, which is not aligned to {alignment_bytes}"
            )
        elif offset != expected and offset + tensor.size_bytes > size_bytes:
            faults.append(
                f"is damaged: {what} takes bytes {offset} to {offset + tensor.size_bytes}, outside the file, "
                f"which has {size_bytes}"
            )
        elif offset < expected:
            faults.append(
                f"is damaged: {what} begins at byte {offset} and overlaps or precedes the one before it, "
                f"which ends at byte {expected}"
            )
        elif offset > expected:
            faults.append(
                f"is damaged: {what} begins at byte {offset}, "
                f"not at byte {expected} where the one before it ends"
            )
        expected = offset + _padded(tensor.size_bytes, alignment_bytes)
    # The padding after the last tensor may be missing: nothing reads it.
    needed = max((tensor.offset_bytes + tensor.size_bytes for tensor in tensors), default=0)
    if needed > size_bytes and not faults:
        faults.append(
            f"is truncated: its tensors need {needed} bytes, and the file has {size_bytes}; download it again"
        )
    return faults


def _padded(n_bytes: int, alignment_bytes: int) -> int:
    return -(-n_bytes // alignment_bytes) * alignment_bytes


def _shown(text: str) -> str:
    """Text from the file as it may stand in a message: on one line, no control characters, not too long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
