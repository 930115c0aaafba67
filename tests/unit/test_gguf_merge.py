"""Merging adapters into the tiny models of gguf_models.py: what changes, by how much, and what does not."""

import re
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_bytes import TinyTensor, Value, tiny_gguf
from gguf_models import (
    ADAPTER_METADATA,
    ALPHA,
    FEED_FORWARD,
    HF_NAMES,
    HIDDEN,
    METADATA,
    RANK,
    TOKENS,
    adapter_arrays,
    bytes_of,
    decode,
    encode,
    lora,
    names_in,
    permuted,
    tensor,
    values_of,
    write_model,
    write_peft,
)

from sg_local.errors import InputError, SgLocalError
from sg_local.gguf_header import read_header
from sg_local.gguf_io import merge, tensors
from sg_local.gguf_io.adapter import write_adapter_gguf
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.merge import merge_gguf

pytest.importorskip("safetensors")  # comes with the extra "train"

Q8_0_BLOCK_BYTES, IQ4_XS, IQ4_XS_BLOCK_BYTES = 34, 23, 136


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base.gguf")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    path = tmp_path / "adapter.gguf"
    write_adapter_gguf(write_peft(tmp_path / "peft"), base, path, {})
    return path


def write_adapter(directory: Path, base: Path, scale: float) -> Path:
    """An adapter whose halves are `scale` times standard normal numbers."""
    path = directory / f"adapter-{scale}.gguf"
    arrays = adapter_arrays(scale=scale)
    write_adapter_gguf(write_peft(directory / "peft", arrays=arrays), base, path, {})
    return path


def q8_0_steps(path: Path, name: str, shape: tuple[int, ...]) -> Any:
    """The step of each value of a Q8_0 tensor."""
    blocks = np.frombuffer(bytes_of(path, name), np.uint8).reshape(-1, Q8_0_BLOCK_BYTES)
    return np.repeat(blocks[:, :2].copy().view(np.float16).astype(np.float32), 32, axis=1).reshape(shape)


def expected_change(name: str, scale: float) -> Any:
    """alpha/rank · B · A of `write_adapter`, q and k rows permuted, computed from PEFT's own arrays."""
    module = f"base_model.model.model.layers.{name[4]}.{HF_NAMES[name[6:]].removesuffix('.weight')}"
    arrays = adapter_arrays(scale=scale)
    product = arrays[f"{module}.lora_B.weight"] @ arrays[f"{module}.lora_A.weight"]
    return permuted(name, product) * (ALPHA / RANK)


def expected_merge(base: Path) -> dict[str, Any]:
    """Base values and what the fixture's adapter adds."""
    return {
        name: values + expected_change(name, 0.3) if name.startswith("blk.") and values.ndim == 2 else values
        for name, values in values_of(base).items()
    }


def test_merged_values_are_base_plus_scaled_product(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    merge_gguf(base, adapter, out, metadata={})
    before, got = values_of(base), values_of(out)
    kinds = {t.name: t.type_name for t in read_header(base).tensors}
    assert kinds == {t.name: t.type_name for t in read_header(out).tensors}
    for name, wanted in expected_merge(base).items():
        if kinds[name] == "Q8_0" and name != "token_embd.weight":
            # Within a step of the sum, or at the end of what the block's scale can express.
            steps = q8_0_steps(base, name, wanted.shape)
            assert np.array_equal(steps, q8_0_steps(out, name, wanted.shape))
            wanted, tolerance = np.clip(wanted, -128 * steps, 127 * steps), 1.001 * steps
        else:
            # Rounded to the nearest, but BF16 to either side: a step on values up to 8.
            tolerance = {"F32": 1e-5, "F16": 2**-9, "BF16": 2**-5, "Q8_0": 0}[kinds[name]]
        assert (np.abs(got[name] - wanted) <= tolerance).all(), name
        if "norm" not in name and name != "token_embd.weight":
            assert np.abs(got[name] - before[name]).max() > 0.1, name
    assert names_in(tmp_path) == {"base.gguf", "peft", "adapter.gguf", "merged.gguf"}


def kept_share(change: Any, got: Any) -> float:
    """The part of a change that arrived: 1 where it did on average, 0 where nothing or only noise did."""
    return float((got * change).sum() / (change * change).sum())


@pytest.mark.parametrize("name", ["blk.0.ffn_gate.weight", "blk.0.ffn_down.weight", "blk.0.attn_v.weight"])
def test_a_change_of_a_fraction_of_a_step_is_kept(name: str, base: Path, tmp_path: Path) -> None:
    """Merged by nearest rounding, a Q8_0 model answered as its base did. attn_v is BF16, the others Q8_0."""
    out, scale = tmp_path / "merged.gguf", 0.02
    merge_gguf(base, write_adapter(tmp_path, base, scale), out, metadata={})
    before, change = values_of(base)[name], expected_change(name, scale)
    if name != "blk.0.attn_v.weight":
        nearest = decode(encode(before + change, "Q8_0"), "Q8_0", before.shape)
        assert kept_share(change, nearest - before) < 0.2
    # Over 200 seeds the share was 1 with a standard deviation of 0.05; six of it are a false alarm in 500 million.
    assert 0.7 < kept_share(change, values_of(out)[name] - before) < 1.3


def test_the_same_arguments_give_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    merge_gguf(base, adapter, one, metadata={"general.name": "polite"})
    merge_gguf(base, adapter, two, metadata={"general.name": "polite"})
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("matrix_type", [None, "F16"])
def test_the_bytes_do_not_depend_on_the_number_of_threads(
    base: Path, adapter: Path, tmp_path: Path, matrix_type: str | None
) -> None:
    written = []
    for n_threads in (1, 2, 5):
        out = tmp_path / f"{n_threads}.gguf"
        merge_gguf(base, adapter, out, metadata={}, matrix_type=matrix_type, n_threads=n_threads)
        written.append(out.read_bytes())
    assert written == [written[0]] * 3


def test_all_but_the_merged_matrices_is_byte_equal(base: Path, tmp_path: Path) -> None:
    module = "base_model.model.model.layers.1.mlp.gate_proj"
    arrays = {name: values for name, values in adapter_arrays().items() if name.startswith(module)}
    write_adapter_gguf(write_peft(tmp_path / "peft", arrays=arrays), base, tmp_path / "adapter.gguf", {})
    out = tmp_path / "merged.gguf"
    merge_gguf(base, tmp_path / "adapter.gguf", out, metadata={})
    header = read_header(base)
    before, after = base.read_bytes(), out.read_bytes()
    assert len(before) == len(after)
    assert before[: header.data_offset_bytes] == after[: header.data_offset_bytes]
    changed = [t.name for t in header.tensors if bytes_of(base, t.name) != bytes_of(out, t.name)]
    assert changed == ["blk.1.ffn_gate.weight"]


def test_metadata_is_added_and_replaced_and_the_rest_kept(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    added = {"general.name": "tiny, polite", "sg_local.task": "polite-request", "sg_local.empty": ""}
    merge_gguf(base, adapter, out, metadata=added)
    old, new = read_header(base), read_header(out)
    assert new.metadata == {**old.metadata, **added}
    assert list(new.metadata)[: len(old.metadata)] == list(old.metadata)
    assert bytes([*struct.pack("<Q", 2), 0xFF, 65]) in out.read_bytes()  # a token that is not UTF-8
    assert new.metadata["tiny.nested"] == [[-5], []]
    with pytest.raises(InputError, match=r"general\.file_type is not a string"):
        merge_gguf(base, adapter, out, metadata={"general.file_type": "7"})


def test_matrix_type_f16_writes_every_matrix_so(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"general.alignment": 512}, alignment=512)
    adapter, out = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    write_adapter_gguf(write_peft(tmp_path / "peft"), base, adapter, {})
    merge_gguf(base, adapter, out, metadata={}, matrix_type="F16")
    header = read_header(out)
    assert header.metadata == {**read_header(base).metadata, "general.file_type": 1}
    assert all(t.offset_bytes % 512 == 0 for t in header.tensors)
    got, wanted = values_of(out), expected_merge(base)
    for t in header.tensors:
        assert t.type_name == ("F16" if len(t.shape) == 2 else "F32")
        if len(t.shape) == 1:
            assert bytes_of(base, t.name) == bytes_of(out, t.name)
        assert np.abs(got[t.name] - wanted[t.name]).max() <= 5 * 2**-11


@pytest.mark.parametrize("base_type", ["Q4_0", "Q4_1"])
def test_a_finer_type_is_rounded_once_and_keeps_the_change(base_type: str, tmp_path: Path) -> None:
    """--quant Q8_0 of a coarser base: half a step of error, and no base in between."""
    name = "blk.0.ffn_gate.weight"
    normal = np.random.default_rng(1).normal(size=(FEED_FORWARD, HIDDEN))
    base, out = tmp_path / "base.gguf", tmp_path / "merged.gguf"
    write_model(base, {"general.file_type": 2}, replaced=[tensor(name, normal, base_type)])
    adapter = write_adapter(tmp_path, base, 0.02)
    merge_gguf(base, adapter, out, metadata={}, matrix_type="Q8_0")
    header = read_header(out)
    assert header.metadata["general.file_type"] == 7
    # A row of 2 or of 48 values is no whole number of blocks.
    assert {t.type_name for t in header.tensors if len(t.shape) == 2} <= {"Q8_0", "F16"}
    assert all((t.shape[0] % 32 == 0) == (t.type_name == "Q8_0") for t in header.tensors if len(t.shape) == 2)
    before, got, change = values_of(base)[name], values_of(out)[name], expected_change(name, 0.02)
    largest = np.abs(before + change).reshape(-1, 32).max(axis=1).repeat(32).reshape(before.shape)
    assert (np.abs(got - before - change) <= 0.51 * largest / 127 + 1e-3).all()
    assert 0.7 < kept_share(change, got - before) < 1.3
    # Single tensors: all others keep their types, and without LoRA their bytes.
    merge_gguf(base, adapter, tmp_path / "mixed.gguf", metadata={}, types={name: "Q8_0"})
    mixed = read_header(tmp_path / "mixed.gguf")
    assert mixed.metadata["general.file_type"] == 2
    types = {t.name: t.type_name for t in read_header(base).tensors}
    assert {t.name: t.type_name for t in mixed.tensors} == {**types, name: "Q8_0"}
    assert bytes_of(tmp_path / "mixed.gguf", name) == bytes_of(out, name)
    assert bytes_of(tmp_path / "mixed.gguf", "token_embd.weight") == bytes_of(base, "token_embd.weight")
    with pytest.raises(InputError, match="cannot be written as 'Q4_K'"):
        merge_gguf(base, adapter, out, metadata={}, types={name: "Q4_K"})


def test_blocks_of_rows_make_no_difference(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, blocks = tmp_path / "whole.gguf", tmp_path / "blocks.gguf"
    merge_gguf(base, adapter, whole, metadata={})
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 7 * HIDDEN)
    calls = []

    def recording(rows: Any, *arguments: Any) -> Any:
        calls.append(rows.shape)
        return merge_add_on_grid(rows, *arguments)

    merge_add_on_grid = merge.add_on_grid
    monkeypatch.setattr(merge, "add_on_grid", recording)
    merge_gguf(base, adapter, blocks, metadata={})
    assert len(calls) > 20
    # Matrix products of fewer rows may round otherwise in the last place, and so take a step elsewhere.
    a, b = values_of(whole), values_of(blocks)
    assert all(np.allclose(a[name], b[name], atol=0.05) for name in a)
    assert np.mean([np.isclose(a[name], b[name], atol=1e-5).mean() for name in a]) > 0.999
    assert bytes_of(whole, "token_embd.weight") == bytes_of(blocks, "token_embd.weight")


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0"])
def test_merging_holds_a_block_not_the_model(
    type_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = 512
    random = np.random.default_rng(0)
    big = [tensor(f"blk.{n}.ffn_up.weight", random.normal(size=(2048, hidden)), type_name) for n in range(8)]
    embedding = tensor("token_embd.weight", random.normal(size=(TOKENS, hidden)))
    sizes: dict[str, Value] = {
        "llama.block_count": 8,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": 2048,
    }
    base, adapter, out = tmp_path / "base.gguf", tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    base.write_bytes(tiny_gguf({**METADATA, **sizes}, [embedding, *big]))
    pairs = [half for n in range(4) for half in lora(f"blk.{n}.ffn_up.weight", 2048, hidden)]
    adapter.write_bytes(tiny_gguf(ADAPTER_METADATA, pairs))
    monkeypatch.setattr(tensors, "BLOCK_ELEMENTS", 64 * 1024)
    del big
    tracemalloc.start()
    try:
        merge_gguf(base, adapter, out, metadata={}, n_threads=1)  # each thread holds a block
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert base.stat().st_size > 8e6
    assert peak_bytes < 4e6
    assert bytes_of(base, "blk.7.ffn_up.weight") == bytes_of(out, "blk.7.ffn_up.weight")


def test_adapter_of_another_base_is_refused_unless_forced(base: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    other = write_model(tmp_path / "other.gguf", replaced=[tensor("output_norm.weight", np.ones(HIDDEN))])
    metadata = {"sg_local.base_fingerprint": fingerprint(other)}
    write_adapter_gguf(write_peft(tmp_path / "peft"), base, adapter, metadata)
    with pytest.raises(InputError, match="trained on another base"):
        merge_gguf(base, adapter, out, metadata={})
    assert not out.exists()
    merge_gguf(other, adapter, out, metadata={})
    out.unlink()
    merge_gguf(base, adapter, out, metadata={}, force=True)
    assert out.exists()


def test_all_misfits_of_an_adapter_are_named(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter.gguf"
    pairs = [
        *lora("blk.0.attn_q.weight", rows=48),
        *lora("blk.9.attn_q.weight"),
        *lora("token_embd.weight", rows=TOKENS),
        *lora("blk.1.attn_q.weight"),
    ]
    path.write_bytes(tiny_gguf({**ADAPTER_METADATA, "general.architecture": "gemma3"}, pairs))
    with pytest.raises(InputError) as caught:
        merge_gguf(base, path, tmp_path / "merged.gguf", metadata={})
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for word in ("'gemma3'", "(48, 64)", "blk.9.attn_q.weight", "token_embd.weight"):
        assert sum(word in line for line in lines) == 1, word
    assert names_in(tmp_path) == {"base.gguf", "adapter.gguf"}


def write_wide_model(path: Path) -> Path:
    """Hidden 256, one layer: ffn_up in IQ4_XS, which has 256 values in a block, ffn_gate in Q8_0."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (FEED_FORWARD, IQ4_XS_BLOCK_BYTES), dtype=np.uint8)
    blocks[:, :2] = np.array([2.0**-9], np.float16).view(np.uint8)
    made = [
        tensor("token_embd.weight", random.normal(size=(TOKENS, 256))),
        TinyTensor("blk.0.ffn_up.weight", (256, FEED_FORWARD), IQ4_XS, blocks.tobytes()),
        tensor("blk.0.ffn_gate.weight", random.normal(size=(FEED_FORWARD, 256)), "Q8_0"),
    ]
    sizes: dict[str, Value] = {"llama.block_count": 1, "llama.embedding_length": 256}
    path.write_bytes(tiny_gguf({**METADATA, **sizes}, made))
    return path


def small_adapter(path: Path, *names: str) -> Path:
    """An adapter for matrices (96, 256) whose products are 1/8 everywhere, with alpha/rank 2: it adds 1/4."""
    made = []
    for name in names:
        made.append(tensor(f"{name}.lora_a", np.full((RANK, 256), 1 / 4)))
        made.append(tensor(f"{name}.lora_b", np.full((FEED_FORWARD, RANK), 1 / 8)))
    path.write_bytes(tiny_gguf(ADAPTER_METADATA, made))
    return path


def test_a_type_without_an_even_grid_is_refused_with_a_way_out(tmp_path: Path) -> None:
    base, out = write_wide_model(tmp_path / "wide.gguf"), tmp_path / "merged.gguf"
    adapter = small_adapter(tmp_path / "adapter.gguf", "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight")
    with pytest.raises(InputError, match=r"wide\.gguf has matrices of the type IQ4_XS, .* --quant Q8_0$"):
        merge_gguf(base, adapter, out, metadata={})
    assert not out.exists()
    # The way out works: the type can be read, and other types written.
    merge_gguf(base, adapter, out, metadata={}, matrix_type="F16")
    difference = values_of(out)["blk.0.ffn_up.weight"] - values_of(base)["blk.0.ffn_up.weight"]
    assert np.abs(difference - 0.25).max() <= 2**-9  # half a step of F16 under 4
    # Where the adapter leaves its matrices alone, the type does not matter.
    other = small_adapter(tmp_path / "other.gguf", "blk.0.ffn_gate.weight")
    merge_gguf(base, other, out, metadata={})
    assert bytes_of(base, "blk.0.ffn_up.weight") == bytes_of(out, "blk.0.ffn_up.weight")
    assert bytes_of(base, "blk.0.ffn_gate.weight") != bytes_of(out, "blk.0.ffn_gate.weight")


def test_a_damaged_scale_is_refused_and_leaves_the_old_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    good = tensor("blk.1.ffn_up.weight", random.normal(size=(FEED_FORWARD, HIDDEN)), "Q8_0")
    assert good.data is not None
    nan = np.array([np.nan], np.float16).tobytes()
    damaged = good._replace(data=good.data[:-Q8_0_BLOCK_BYTES] + nan + good.data[2 - Q8_0_BLOCK_BYTES :])
    base = write_model(tmp_path / "base.gguf", replaced=[damaged])
    adapter, out = write_adapter(tmp_path, base, 0.02), tmp_path / "merged.gguf"
    out.write_text("an older file")
    before = names_in(tmp_path)
    with pytest.raises(InputError, match=r"NaN or infinite values in tensor blk\.1\.ffn_up\.weight"):
        merge_gguf(base, adapter, out, metadata={})
    assert out.read_text() == "an older file"
    assert names_in(tmp_path) == before


def test_values_over_the_range_of_f16_are_refused(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged.gguf"
    adapter = write_adapter(tmp_path, base, 300)
    with pytest.raises(SgLocalError, match="which F16 cannot hold: train with a lower learning rate"):
        merge_gguf(base, adapter, out, metadata={}, matrix_type="F16")
    large = write_model(
        tmp_path / "large.gguf", replaced=[tensor("output.weight", np.full((TOKENS, HIDDEN), 7e4))]
    )
    with pytest.raises(SgLocalError, match=r"output\.weight .* reaches 70000, which F16 .* --quant base"):
        merge_gguf(large, write_adapter(tmp_path, base, 0.02), out, metadata={}, matrix_type="F16")
    assert not out.exists()


@pytest.mark.parametrize("type_name", ["Q8_0", "F16", "F32", "BF16"])
def test_an_adapter_without_measure_is_refused(type_name: str, tmp_path: Path) -> None:
    matrix = tensor("blk.0.attn_q.weight", np.ones((HIDDEN, HIDDEN)), type_name)
    base = write_model(tmp_path / "base.gguf", replaced=[matrix])
    adapter, out = tmp_path / "adapter.gguf", tmp_path / "merged.gguf"
    halves = [
        tensor("blk.0.attn_q.weight.lora_a", np.full((RANK, HIDDEN), 1e20)),
        tensor("blk.0.attn_q.weight.lora_b", np.full((HIDDEN, RANK), 1e20)),
    ]
    adapter.write_bytes(tiny_gguf(ADAPTER_METADATA, halves))
    with pytest.raises(SgLocalError, match=r"adds to tensor blk\.0\.attn_q\.weight is too large for float32"):
        merge_gguf(base, adapter, out, metadata={})
    assert not out.exists()


def test_merge_does_not_overwrite_its_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = base.read_bytes()
    with pytest.raises(InputError, match="is the base model itself"):
        merge_gguf(base, adapter, tmp_path / "peft" / ".." / "base.gguf", metadata={})
    with pytest.raises(InputError, match="cannot be written as 'Q4_K'"):
        merge_gguf(base, adapter, tmp_path / "m.gguf", metadata={}, matrix_type="Q4_K")
    assert base.read_bytes() == before


def test_full_disk_is_an_error_with_a_remedy_and_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource")  # where there are no such limits, the disk cannot be filled
    before = names_in(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    messages = []
    try:
        for write in (
            lambda: write_base_weights(base, tmp_path / "out"),
            lambda: write_adapter_gguf(tmp_path / "peft", base, tmp_path / "again.gguf", {}),
            lambda: merge_gguf(base, adapter, tmp_path / "merged.gguf", metadata={}),
        ):
            with pytest.raises(SgLocalError) as caught:
                write()
            assert not isinstance(caught.value, InputError)
            messages.append(str(caught.value))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_in(tmp_path) == before
    assert all(re.search("could not be written: .*free some space", message) for message in messages), (
        messages
    )


def test_a_tensor_without_dimensions_is_copied(adapter: Path, tmp_path: Path) -> None:
    number = np.array([1.5], np.float32).tobytes()
    base = write_model(tmp_path / "scalar.gguf", replaced=[TinyTensor("a.scale", (), 0, number)])
    merge_gguf(base, adapter, tmp_path / "merged.gguf", metadata={}, force=True)
    assert bytes_of(tmp_path / "merged.gguf", "a.scale") == number
