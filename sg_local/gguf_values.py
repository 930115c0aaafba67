"""The values in the header of a GGUF file, read in their order and within bounds: numbers, strings, arrays.

    05 00 00 00 00 00 00 00 6c 6c 61 6d 61 → BoundedReader.value(STRING, "metadata key 'general.architecture'")
    → "llama"

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, little endian. A file may be hostile: every count and
length is checked against a limit and against the bytes that are left before anything is allocated for it. What a header
may take in all is bounded too: a second of time, by the work in it, and 200 MB of memory.
Not done here: what the values stand for. gguf_header.py knows the order in which a header has them.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from sys import getsizeof
from typing import BinaryIO, TypeAlias

from sg_local.errors import InputError

MetadataValue: TypeAlias = "bool | int | float | str | list[MetadataValue]"

MAX_HEADER_BYTES = 128 * 1024**2
MAX_STRING_BYTES = 10_000_000
MAX_ARRAY_ELEMENTS = 1_048_576
# Over all arrays. The largest vocabularies need 1.4 million elements.
MAX_ARRAY_ELEMENTS_TOTAL = 4_194_304
# Over the whole header, in Python objects: one can take 30 times the bytes that it has in the file. The largest
# vocabularies (201,000 tokens, 446,000 merges) take 70 MB. While the largest string is decoded 50 MB more are in use.
MAX_MEMORY_BYTES = 100_000_000
# Over the whole header, in the time that a string of an array takes: 0.5 µs on two cores of 2.6 GHz. The largest
# vocabularies need 0.7 million.
MAX_WORK = 1_200_000
KEY_WORK, ARRAY_WORK, TENSOR_WORK = 8, 5, 18
NUMBERS_A_WORK = 8
KEY_BYTES, TENSOR_BYTES = 300, 600  # beside the name: of an entry, of its key and its lists
MAX_ARRAY_DEPTH = 4

# Value types
UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
# value type → struct format of one number
_NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
# value type → bytes of one value, where all have the same
VALUE_BYTES = {**{code: struct.calcsize(f"<{letter}") for code, letter in _NUMBER_FORMATS.items()}, BOOL: 1}
# value type → bytes of one element of a list in Python; of 256 small integers and two booleans there is one each
_LIST_BYTES = {**dict.fromkeys(_NUMBER_FORMATS, 40), 0: 8, BOOL: 8, 10: 56, 11: 56, STRING: 8, ARRAY: 96}
# value type → fewest bytes of one element (a string has its length, an array its element type and length)
_MIN_ELEMENT_BYTES = {**VALUE_BYTES, STRING: 8, ARRAY: 12}


class EndsEarly(InputError):
    """The file on this disk ends before what it should hold."""


@dataclass
class BoundedReader:
    """Takes values off the file in order, never past its end nor over the limit of the header.

    `what` names in each call what is read, for the error: its methods raise InputError where the file is at fault.
    """

    path: Path
    file: BinaryIO
    size_bytes: int
    position: int = 0
    n_array_elements: int = 0
    work: int = 0
    memory_bytes: int = 0

    def fault(self, reason: str) -> InputError:
        """The error of this file, to be raised."""
        return InputError(f"{self.path} {reason}")

    def spend(self, work: int, memory_bytes: int, what: str) -> None:
        """Counts what comes next; raises where the header takes more time or memory than one needs."""
        self.work += work
        self.memory_bytes += memory_bytes
        if self.work > MAX_WORK:
            raise self.fault(
                f"has more keys, strings, arrays and tensors in its header than can be read in a second, "
                f"the limit, reached in {what}; get a usual conversion of the model"
            )
        if self.memory_bytes > MAX_MEMORY_BYTES:
            raise self.fault(
                f"has a header that takes over {MAX_MEMORY_BYTES} bytes of memory, the limit, reached in {what}; "
                "get a usual conversion of the model"
            )

    def require(self, n_bytes: int, what: str) -> None:
        """Raise unless `n_bytes` more bytes can be read."""
        end = self.position + n_bytes
        if end > self.size_bytes:
            raise self.fault(
                f"is truncated or damaged in its header: {what} needs {n_bytes} bytes at byte "
                f"{self.position}, and the file has {self.size_bytes}; download it again"
            )
        if end > MAX_HEADER_BYTES:
            raise self.fault(f"has a header over the limit of {MAX_HEADER_BYTES} bytes, reached in {what}")

    def take(self, n_bytes: int, what: str) -> bytes:
        """The next bytes."""
        self.require(n_bytes, what)
        data = self.file.read(n_bytes)
        if len(data) != n_bytes:
            raise EndsEarly(f"{self.path} became shorter while it was read, in {what}")
        self.position += n_bytes
        return data

    def uint32(self, what: str) -> int:
        """The next four bytes as a number."""
        return int.from_bytes(self.take(4, what), "little")

    def uint64(self, what: str) -> int:
        """The next eight bytes as a number."""
        return int.from_bytes(self.take(8, what), "little")

    def string_bytes(self, what: str, max_bytes: int = MAX_STRING_BYTES) -> bytes:
        """A string as it stands in the file."""
        n_bytes = self.uint64(what)
        if n_bytes > max_bytes:
            raise self.fault(f"has a string of {n_bytes} bytes, over the limit of {max_bytes}, in {what}")
        return self.take(n_bytes, what)

    def string(self, what: str, max_bytes: int = MAX_STRING_BYTES, *, is_strict: bool = True) -> str:
        """A string; is_strict: it has to be UTF-8, else what is not becomes U+FFFD."""
        data = self.string_bytes(what, max_bytes)
        try:
            text = data.decode(errors="strict" if is_strict else "replace")
        except UnicodeDecodeError as error:
            raise self.fault(f"is damaged: {what} is not UTF-8 at its byte {error.start}") from error
        self.spend(0, getsizeof(text), what)
        return text

    def strings(self, count: int, what: str) -> list[MetadataValue]:
        """An array's strings. A vocabulary has half a million, so the checks of `string_bytes` are made in one loop."""
        read, end_bytes = self.file.read, min(self.size_bytes, MAX_HEADER_BYTES)
        texts: list[MetadataValue] = []
        memory_bytes = self.memory_bytes
        for _ in range(count):
            length = read(8)
            n_bytes = int.from_bytes(length, "little")
            end = self.position + 8 + n_bytes
            fits = len(length) == 8 and n_bytes <= MAX_STRING_BYTES and end <= end_bytes
            data = read(n_bytes) if fits else b""
            if not fits or len(data) != n_bytes:
                self.file.seek(self.position)
                data = self.string_bytes(what)  # which says what is wrong
            else:
                self.position = end
            # A byte-level vocabulary may hold pieces of characters.
            text = data.decode(errors="replace")
            memory_bytes += getsizeof(text)
            if memory_bytes > MAX_MEMORY_BYTES:
                break
            texts.append(text)
        self.spend(0, memory_bytes - self.memory_bytes, what)
        return texts

    def value(self, value_type: int, what: str, *, is_strict: bool = True) -> MetadataValue:
        """A value of any type; is_strict: as in `string`."""
        if value_type == ARRAY:
            return self.array(what, depth=1)
        if value_type == STRING:
            return self.string(what, is_strict=is_strict)
        return self.scalars(value_type, 1, what)[0]

    def scalars(self, value_type: int, count: int, what: str) -> list[MetadataValue]:
        """Numbers or booleans of one type."""
        if value_type == BOOL:
            data = self.take(count, what)
            # The specification: any other byte makes the file invalid.
            if data.translate(None, b"\x00\x01"):
                raise self.fault(f"is damaged: {what} has a boolean that is neither 0 nor 1")
            return [byte == 1 for byte in data]
        if value_type not in _NUMBER_FORMATS:
            raise self.fault(f"is damaged or too new: {what} has the unknown value type {value_type}")
        layout = struct.Struct(f"<{count}{_NUMBER_FORMATS[value_type]}")
        return list(layout.unpack(self.take(layout.size, what)))

    def array(self, what: str, depth: int) -> list[MetadataValue]:
        """An array; its element type and length stand before its elements."""
        if depth > MAX_ARRAY_DEPTH:
            raise self.fault(f"has arrays nested over the limit of {MAX_ARRAY_DEPTH} levels in {what}")
        element_type = self.uint32(what)
        count = self.uint64(what)
        if element_type not in _MIN_ELEMENT_BYTES:
            raise self.fault(
                f"is damaged or too new: {what} has elements of the unknown value type {element_type}"
            )
        if count > MAX_ARRAY_ELEMENTS:
            raise self.fault(
                f"has an array of {count} elements, over the limit of {MAX_ARRAY_ELEMENTS}, in {what}"
            )
        self.n_array_elements += count
        if self.n_array_elements > MAX_ARRAY_ELEMENTS_TOTAL:
            raise self.fault(
                f"has over {MAX_ARRAY_ELEMENTS_TOTAL} array elements in all, the limit, reached in {what}"
            )
        self.require(count * _MIN_ELEMENT_BYTES[element_type], what)
        work = count if element_type == STRING else count // NUMBERS_A_WORK
        self.spend(ARRAY_WORK + work, count * _LIST_BYTES[element_type], what)
        if element_type == ARRAY:
            return [self.array(what, depth + 1) for _ in range(count)]
        if element_type == STRING:
            return self.strings(count, what)
        return self.scalars(element_type, count, what)
