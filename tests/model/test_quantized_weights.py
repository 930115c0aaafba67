"""What llama.cpp's quantization loses is what check_weights.py says, and its files pass beside their 16-bit weights.

Q4_K: 0.0716 of normal random numbers, 0.094 of numbers with long tails, at most 0.18 allowed
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from ggml import dequantize, quantize
from tiny_models import write_tiny_model

from sg_local.errors import InputError
from sg_local.gguf_header import read_header
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.check_weights import MARGIN, RELATIVE_ERRORS, check_base_weights
from sg_local.gguf_io.tensors import Floats

for package in ("llama_cpp", "safetensors"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)


def relative_error(values: Floats, type_name: str) -> float:
    difference = dequantize(quantize(values, type_name), type_name) - values
    return float(np.sqrt(np.square(difference).sum() / np.square(values).sum()))


@pytest.mark.parametrize("type_name", [name for name in RELATIVE_ERRORS if name != "F32"])
def test_the_rounding_of_each_type_is_what_the_table_says(type_name: str) -> None:
    random = np.random.default_rng(0)
    normal = random.normal(size=(64, 1024)).astype(np.float32) * 0.02
    long_tails = random.standard_t(3, size=(64, 1024)).astype(np.float32) * 0.02
    measured, with_tails = relative_error(normal, type_name), relative_error(long_tails, type_name)
    print(f"{type_name}: {measured:.5f}, long tails {with_tails:.5f}")
    assert measured == pytest.approx(RELATIVE_ERRORS[type_name], rel=0.05)
    assert with_tails < MARGIN * RELATIVE_ERRORS[type_name] < 1  # another model differs by 1.4


@pytest.mark.parametrize("type_name", ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"])
def test_files_that_llama_cpp_quantizes_pass(type_name: str, tmp_path: Path) -> None:
    from sg_local.llama.quantize import requantize

    base = write_tiny_model(tmp_path / "base.gguf", "llama", hidden=256)
    write_base_weights(base, tmp_path / "weights")
    requantize(base, tmp_path / "quantized.gguf", type_name, 1)
    check_base_weights(tmp_path / "quantized.gguf", tmp_path / "weights")
    types = {tensor.type_name for tensor in read_header(tmp_path / "quantized.gguf").tensors}
    assert type_name.removesuffix("_M") in types

    other = write_tiny_model(tmp_path / "other.gguf", "llama", hidden=256, seed=1)
    write_base_weights(other, tmp_path / "others")
    with pytest.raises(InputError, match=r"differs from token_embd\.weight of quantized\.gguf by 1\.4"):
        check_base_weights(tmp_path / "quantized.gguf", tmp_path / "others")
