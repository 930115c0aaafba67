"""A fingerprint of the weights in a GGUF file, so that no adapter is put on another base by mistake.

    SmolLM2-135M-Instruct.Q4_1.gguf → "b59ddca9…", 64 hex digits; its Q8_0 or a finetuned copy → others

SHA-256 over: the architecture; all metadata of the architecture (`llama.*`: dimensions, rope, context); the
SHA-256 of the vocabulary; and for each tensor, by name, its shape, type and first 4 KiB of raw bytes. Names,
licences, chat template, other tokenizer settings and the order and offsets of tensors do not count. Bytes of every
tensor count, since samples at even steps of the file could hit the same tensor in every layer.
It finds mistakes, not forgeries: a change after the first 4 KiB of a tensor is not seen.
"""

import hashlib
import json
from pathlib import Path

from sg_local.errors import InputError
from sg_local.gguf_header import read_model_header

SAMPLE_BYTES = 4096


def fingerprint(path: Path) -> str:
    """The fingerprint of a GGUF model, 64 hexadecimal digits.

    Raises InputError if the file is no readable model.
    """
    header = read_model_header(path)
    prefix = f"{header.architecture}."
    tokens = json.dumps(header.metadata.get("tokenizer.ggml.tokens"))
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            parts: list[object] = [
                header.architecture,
                sorted((key, value) for key, value in header.metadata.items() if key.startswith(prefix)),
                hashlib.sha256(tokens.encode()).hexdigest(),
            ]
            for part in parts:
                digest.update(json.dumps(part).encode() + b"\n")
            for tensor in sorted(header.tensors, key=lambda tensor: tensor.name):
                file.seek(tensor.offset_bytes)
                sample = file.read(min(SAMPLE_BYTES, tensor.size_bytes))
                digest.update(json.dumps([tensor.name, tensor.shape, tensor.type_name]).encode() + b"\n")
                digest.update(hashlib.sha256(sample).digest())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
