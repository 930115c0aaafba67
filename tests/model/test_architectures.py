"""Each supported architecture gives the same logits in llama.cpp and in torch: the base, an adapter, the merged file.

    gemma3: hidden 64, 6 layers, a window of 16 tokens in five of them, random numbers
    -> torch against llama.cpp, 60 tokens: base 0.003, adapter.gguf 0.003, model.gguf 0.003; without a layer 5.8

llama.cpp computes in float32 here, its key-value memory included, so that what differs is not rounding.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import bytes_of
from safetensors.numpy import load_file
from tiny_models import HIDDEN, TOKENS, write_tiny_model

from sg_local.architectures import ARCHITECTURES, TensorSpec
from sg_local.dimensions import read_dimensions
from sg_local.finetune.reference import reference_logits
from sg_local.gguf_header import read_header
from sg_local.gguf_io.adapter import Floats, directory_for_peft, fields_for_peft, write_adapter_gguf
from sg_local.gguf_io.base_weights import BaseWeights, write_base_weights
from sg_local.gguf_io.merge import merge_gguf
from sg_local.gguf_io.tensors import lora_targets

for package in ("llama_cpp", "torch", "transformers", "peft"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

MAX_LOGIT_DIFFERENCE = (
    1e-2  # measured 1e-5, for gemma3 4e-3: llama.cpp looks its GELU up in a table of float16
)
MIN_PLANTED_ERROR = 0.1
MIN_ADAPTER_EFFECT = 1.0
ADAPTERS = ((8, 16), (16, 16))  # rank, alpha

LONG_FACTORS = {
    "rope_factors_long.weight": np.linspace(1, 40, 6),
    "rope_factors_short.weight": np.linspace(1, 3, 6),
}
GRANITE = {"embedding_scale": 3.0, "attention.scale": 0.5, "residual_scale": 0.7, "logit_scale": 0.5}
# what is given to write_tiny_model
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tied": True},
    "llama, biases": {"biases": True},
    "qwen2": {},
    "qwen2, tied": {"tied": True},
    "qwen3": {},
    "qwen3, tied, scaled": {
        "tied": True,
        "metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    },
    # caps low enough to show
    "gemma2": {
        "n_layers": 4,
        "metadata": {
            "attention.sliding_window": 16,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 4.0,
        },
    },
    "gemma2, without keys of its own": {"n_layers": 3},
    # as Gemma 3 from 4B on: five local layers, then a global one with scaled rotation
    "gemma3, tied": {
        "tied": True,
        "n_layers": 6,
        "metadata": {
            "attention.sliding_window": 16,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    },
    "gemma3, every second layer local": {
        "metadata": {
            "attention.sliding_window": 16,
            "attention.sliding_window_pattern": 2,
            "rope.freq_base_swa": 500.0,
        }
    },
    "gemma3, no window": {"tied": True},
    "phi3": {"metadata": {"attention.sliding_window": 16}},  # which llama.cpp ignores
    "phi3, tied, long factors": {
        "tied": True,
        "metadata": {
            "context_length": 4096,
            "rope.dimension_count": 12,
            "rope.scaling.original_context_length": 512,
            "rope.scaling.attn_factor": 1.2,
        },
        "vectors": LONG_FACTORS,
    },
}
VARIANTS |= {
    "granite": {"metadata": GRANITE},
    "granite, tied, biases": {"metadata": {"logit_scale": 0.5}, "tied": True, "biases": True},
    "smollm3": {"n_layers": 4},
    "smollm3, tied": {"n_layers": 9, "tied": True},
    "lfm2": {"n_layers": 4},
    "lfm2, tied": {"n_layers": 5, "tied": True, "metadata": {"shortconv.l_cache": 4, "rope.freq_base": 1e6}},
}
# Linear attention in every second layer with two values for a key, and in three of four layers with three
VARIANTS |= {
    "qwen35": {},
    "qwen35, tied": {
        "tied": True,
        "n_layers": 4,
        "metadata": {"full_attention_interval": 4, "ssm.time_step_rank": 6, "ssm.inner_size": 96},
    },
}
# A short original context, so that the prompt is longer, and frequencies on both sides of the ramp and on it
YARN = {
    "context_length": 256,
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 8.0,
    "rope.scaling.original_context_length": 32,
}
# Of these llama.cpp reads none but attn_factor for llama and Qwen, and all but ext and attn_factor's for mistral3.
YARN_KEYS = {
    "rope.scaling.attn_factor": 1.3,
    "rope.scaling.yarn_log_multiplier": 0.6,
    "rope.scaling.yarn_beta_fast": 5.0,
    "rope.scaling.yarn_beta_slow": 0.3,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_attn_factor": 0.5,
}
VARIANTS |= {
    "llama, tied, yarn": {"tied": True, "metadata": {**YARN, **YARN_KEYS}},
    "qwen2, yarn": {"metadata": YARN},
    "qwen3, yarn": {"metadata": {**YARN, **YARN_KEYS}},
    "qwen35, one value for a key, yarn": {
        "metadata": {**YARN, **YARN_KEYS, "ssm.time_step_rank": 2, "ssm.inner_size": 32}
    },
    "mistral3": {"metadata": {**YARN, **YARN_KEYS, "attention.temperature_scale": 1.0}},
    "mistral3, tied, no scaling": {"tied": True},
}
PROMPT = (1, *np.random.default_rng(1).integers(3, len(TOKENS), size=59).tolist())


@dataclass(frozen=True)
class Case:
    """A tiny model, its weights for torch, and what torch says with and without each adapter."""

    directory: Path
    base: Path
    torch_base: Floats
    torch_adapted: dict[tuple[int, int], Floats]

    @property
    def architecture(self) -> str:
        return read_header(self.base).architecture

    def adapter_dir(self, rank: int, alpha: int) -> Path:
        return self.directory / f"adapter-{rank}-{alpha}"


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    directory = tmp_path_factory.mktemp("tiny")
    architecture = request.param.split(",")[0]
    base = write_tiny_model(directory / "base.gguf", architecture, **VARIANTS[request.param])
    write_base_weights(base, directory / "weights")
    torch_base = torch_logits(directory / "weights")
    adapted = {}
    for rank, alpha in ADAPTERS:
        adapter_dir = directory / f"adapter-{rank}-{alpha}"
        adapted[rank, alpha] = _random_adapter(directory / "weights", adapter_dir, architecture, rank, alpha)
        assert _difference(adapted[rank, alpha], torch_base) > MIN_ADAPTER_EFFECT
    return Case(directory, base, torch_base, adapted)


@pytest.fixture(autouse=True)
def exact_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, values and attention in float32; the float16 of the default alone costs 0.02."""
    import llama_cpp

    default_params = llama_cpp.llama_context_default_params

    def params() -> Any:
        found = default_params()
        found.type_k = found.type_v = llama_cpp.GGML_TYPE_F32
        found.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return found

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", params)


def test_every_supported_architecture_is_here() -> None:
    assert {name.split(",")[0] for name in VARIANTS} == set(ARCHITECTURES)


def test_base_gives_the_same_logits(case: Case) -> None:
    difference = _difference(llama_logits(case.base), case.torch_base)
    print(f"base {difference:.6f}")
    assert difference <= MAX_LOGIT_DIFFERENCE
    assert 3 < np.abs(case.torch_base).max() < 30  # so that the bound says something


def test_the_exports_reference_is_what_float32_gives(case: Case) -> None:
    """It holds the weights of a layer at a time, and computes several prompts at once."""
    adapter = ADAPTERS[0]
    sequences = [(PROMPT, 0), (PROMPT[:20], 5), (PROMPT, len(PROMPT) - 3)]
    for adapter_dir, expected in (
        (None, case.torch_base),
        (case.adapter_dir(*adapter), case.torch_adapted[adapter]),
    ):
        found = reference_logits(BaseWeights(case.base), adapter_dir, sequences)
        for logits, (tokens, first) in zip(found, sequences, strict=True):
            np.testing.assert_allclose(logits, expected[first : len(tokens)], atol=1e-4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_and_merged_file_give_the_logits_of_peft(
    case: Case, adapter: tuple[int, int], tmp_path: Path
) -> None:
    hot, merged = _differences(case, adapter, case.adapter_dir(*adapter), tmp_path)
    print(f"hot {hot:.6f}, merged {merged:.6f}")
    assert hot <= MAX_LOGIT_DIFFERENCE
    assert merged <= MAX_LOGIT_DIFFERENCE

    header = read_header(tmp_path / "adapter.gguf")
    trained = load_file(case.adapter_dir(*adapter) / "adapter_model.safetensors")
    assert len(header.tensors) == len(trained)
    changed = {tensor.name.removesuffix(".lora_a") for tensor in header.tensors}
    assert read_header(tmp_path / "merged.gguf").metadata == read_header(case.base).metadata
    for tensor in read_header(case.base).tensors:
        same = bytes_of(tmp_path / "merged.gguf", tensor.name) == bytes_of(case.base, tensor.name)
        assert same != (tensor.name in changed), tensor.name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_planted_errors_show(
    case: Case, adapter: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(name: str, change: Callable[[Path], None]) -> None:
        directory = tmp_path / name
        shutil.copytree(case.adapter_dir(*adapter), directory / "peft")
        change(directory / "peft")
        hot, merged = _differences(case, adapter, directory / "peft", directory)
        print(f"{name}: hot {hot:.3f}, merged {merged:.3f}")
        assert hot > MIN_PLANTED_ERROR, name
        assert merged > MIN_PLANTED_ERROR, name

    planted("alpha doubled", lambda peft: _change_alpha(peft, 2 * adapter[1]))
    planted("a layer dropped", _drop_layer)
    # permuted where they are not, and not where they are
    right = ARCHITECTURES[case.architecture]
    wrong = replace(right, layer_tensors=tuple(_wrong_order(spec) for spec in right.layer_tensors))
    monkeypatch.setitem(ARCHITECTURES, case.architecture, wrong)
    planted("rows of q and k in the wrong order", lambda peft: None)
    dimensions = read_dimensions(read_header(case.base))
    if dimensions.n_value_heads != dimensions.n_key_heads:
        for axis in ("rows", "columns"):
            changed = tuple(
                spec._replace(value_heads="" if spec.value_heads == axis else spec.value_heads)
                for spec in right.layer_tensors
            )
            monkeypatch.setitem(ARCHITECTURES, case.architecture, replace(right, layer_tensors=changed))
            planted(f"{axis} of value heads in the wrong order", lambda peft: None)


@pytest.mark.parametrize(
    ("variant", "keys", "value"),
    [
        ("gemma3, tied", ("sliding_window",), 17),
        ("gemma3, tied", ("layer_types",), ["full_attention"] * 6),
        ("gemma3, tied", ("query_pre_attn_scalar",), 16),
        ("gemma3, tied", ("rope_parameters", "sliding_attention", "rope_theta"), 1e6),
        ("gemma3, tied", ("rope_parameters", "full_attention", "rope_theta"), 1e4),
        ("gemma3, tied", ("rope_parameters", "full_attention", "factor"), 1.0),
        ("gemma3, every second layer local", ("layer_types",), ["full_attention", "sliding_attention"]),
        ("gemma2", ("attn_logit_softcapping",), 50.0),
        ("gemma2", ("final_logit_softcapping",), 30.0),
        ("gemma2", ("sliding_window",), 17),
        ("gemma2", ("layer_types",), ["full_attention", "sliding_attention"] * 2),
        ("gemma2", ("query_pre_attn_scalar",), 16),
        ("gemma2", ("attn_implementation",), "sdpa"),
        ("qwen3, tied, scaled", ("rope_parameters", "factor"), 1.0),
        ("qwen2, yarn", ("rope_parameters", "factor"), 16.0),
        ("qwen2, yarn", ("rope_parameters", "attention_factor"), 1.0),
        ("qwen2, yarn", ("rope_parameters", "original_max_position_embeddings"), 256),
        ("qwen2, yarn", ("rope_parameters", "beta_slow"), 0.1),
        ("llama, tied, yarn", ("rope_parameters", "attention_factor"), 1.2079441541679836),
        ("mistral3", ("rope_parameters", "attention_factor"), 1.2079441541679836),
        ("mistral3", ("rope_parameters", "beta_fast"), 1.0),
        ("mistral3", ("rope_parameters", "beta_slow"), 0.1),
        ("mistral3", ("rope_parameters", "llama_4_scaling_beta"), 0.0),
        ("qwen3, tied, scaled", ("rms_norm_eps",), 1e-1),
        ("phi3", ("sliding_window",), 16),
        ("granite", ("embedding_multiplier",), 1.0),
        ("granite", ("attention_multiplier",), 0.25),
        ("granite", ("residual_multiplier",), 1.0),
        ("granite", ("logits_scaling",), 1.0),
        ("granite, tied, biases", ("attention_multiplier",), 1.0),
        ("smollm3", ("no_rope_layers",), [1, 1, 1, 1]),
        ("lfm2", ("layer_types",), ["conv", "full_attention", "full_attention", "conv"]),
        ("lfm2", ("norm_eps",), 1e-1),
        ("lfm2", ("rope_parameters", "rope_theta"), 100.0),
        ("qwen35", ("rope_parameters", "rope_theta"), 100.0),
        ("qwen35", ("rope_parameters", "partial_rotary_factor"), 0.25),
        ("qwen35", ("rms_norm_eps",), 1e-1),
        ("qwen35, one value for a key, yarn", ("rope_parameters", "attention_factor"), 1.0),
        ("qwen35, one value for a key, yarn", ("rope_parameters", "factor"), 16.0),
        ("phi3, tied, long factors", ("rope_parameters", "attention_factor"), 1.0),
        ("phi3, tied, long factors", ("rope_parameters", "partial_rotary_factor"), 1.0),
        (
            "phi3, tied, long factors",
            ("rope_parameters", "short_factor"),
            LONG_FACTORS["rope_factors_long.weight"].tolist(),
        ),
    ],
)
def test_the_comparison_sees_each_setting(
    variant: str, keys: tuple[str, ...], value: object, tmp_path: Path
) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", variant.split(",")[0], **VARIANTS[variant])
    write_base_weights(base, tmp_path / "weights")
    config_path = tmp_path / "weights" / "config.json"
    config = json.loads(config_path.read_text())
    place = config
    for key in keys[:-1]:
        place = place[key]
    assert place[keys[-1]] != value
    place[keys[-1]] = value
    if keys[-1] == "partial_rotary_factor" and "long_factor" in place:
        for name in ("long_factor", "short_factor"):
            place[name] = [*place[name], 1.0, 1.0]
    config_path.write_text(json.dumps(config))
    difference = _difference(torch_logits(tmp_path / "weights"), llama_logits(base))
    print(f"{keys[-1]}: {difference:.3f}")
    assert difference > MIN_PLANTED_ERROR


def test_the_layers_of_gemma3_27b_have_their_own_scale(tmp_path: Path) -> None:
    # A small share of the MLPs, so that the errors of llama.cpp's GELU do not add up over 62 layers.
    vectors = {f"blk.{layer}.post_ffw_norm.weight": [0.1] * HIDDEN for layer in range(62)}
    base = write_tiny_model(tmp_path / "base.gguf", "gemma3", tied=True, n_layers=62, vectors=vectors)
    write_base_weights(base, tmp_path / "weights")
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert (config["query_pre_attn_scalar"], config["head_dim"]) == (16, 32)
    wanted = llama_logits(base)
    difference = _difference(torch_logits(tmp_path / "weights"), wanted)
    print(f"62 layers: {difference:.6f}")
    assert difference <= MAX_LOGIT_DIFFERENCE
    (tmp_path / "weights" / "config.json").write_text(json.dumps({**config, "query_pre_attn_scalar": 32}))
    assert _difference(torch_logits(tmp_path / "weights"), wanted) > MIN_PLANTED_ERROR


def test_an_adapter_of_the_multimodal_class_is_taken_for_its_text_part(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "gemma3", tied=True)
    write_base_weights(base, tmp_path / "weights")
    _random_adapter(tmp_path / "weights", tmp_path / "peft", "gemma3", 8, 16)
    write_adapter_gguf(tmp_path / "peft", base, tmp_path / "right.gguf", {})
    _change_names(tmp_path / "peft", lambda name: name.replace(".layers.", ".language_model.layers."))
    write_adapter_gguf(tmp_path / "peft", base, tmp_path / "adapter.gguf", {})
    assert (tmp_path / "adapter.gguf").read_bytes() == (tmp_path / "right.gguf").read_bytes()


def test_patterns_of_rank_and_alpha_and_strange_names_are_what_peft_makes_of_them(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "llama")
    write_base_weights(base, tmp_path / "weights")
    patterns = {
        "rank_pattern": {"q_proj": 4, "model.layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 24, "v_proj": 1.5},
    }
    wanted = _random_adapter(tmp_path / "weights", tmp_path / "peft", "llama", 8, 16, **patterns)
    _change_names(
        tmp_path / "peft",
        lambda name: "base_model.model._orig_mod." + name.replace(".weight", ".default.weight"),
    )
    write_adapter_gguf(tmp_path / "peft", base, tmp_path / "adapter.gguf", {})
    merge_gguf(base, tmp_path / "adapter.gguf", tmp_path / "merged.gguf", metadata={})
    (tmp_path / "clean").mkdir()
    (in_proof,) = reference_logits(
        BaseWeights(base),
        directory_for_peft(tmp_path / "peft", tmp_path / "clean"),
        [(PROMPT, 0)],
        fields_for_peft(tmp_path / "peft"),
    )
    for found in (
        llama_logits(base, tmp_path / "adapter.gguf"),
        llama_logits(tmp_path / "merged.gguf"),
        in_proof,
    ):
        assert _difference(found, wanted) <= MAX_LOGIT_DIFFERENCE
    config_path = tmp_path / "peft" / "adapter_config.json"
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "alpha_pattern": {}}))
    write_adapter_gguf(tmp_path / "peft", base, tmp_path / "other.gguf", {})
    assert _difference(llama_logits(base, tmp_path / "other.gguf"), wanted) > MIN_PLANTED_ERROR


def llama_logits(model: Path, adapter: Path | None = None) -> Floats:
    from sg_local.llama.engine import open_engine
    from sg_local.llama.scoring import sequence_logits

    with open_engine(model, n_ctx=256, n_parallel=1, n_threads=1, adapter_path=adapter) as engine:
        logits: Floats = sequence_logits(engine, PROMPT, 0)
    return logits


def torch_logits(weights_dir: Path) -> Floats:
    return _logits_of(_torch_model(weights_dir))


def _torch_model(weights_dir: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(weights_dir, dtype=torch.float32, local_files_only=True)


def _logits_of(model: Any) -> Floats:
    import torch

    with torch.no_grad():
        logits: Floats = model(torch.tensor([PROMPT])).logits[0].numpy()
    return logits


def _random_adapter(
    weights_dir: Path, out_dir: Path, architecture: str, rank: int, alpha: int, **fields: Any
) -> Floats:
    """Saves a random adapter on all matrices of the layers, a tenth as large as they are, and says its logits."""
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(lora_targets(architecture)), **fields)
    model = get_peft_model(_torch_model(weights_dir), config)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                scale = weight.shape[1] ** -0.5 if "lora_A" in name else 0.1
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    logits = _logits_of(model)
    model.save_pretrained(out_dir)
    return logits


def _differences(
    case: Case, adapter: tuple[int, int], adapter_dir: Path, out_dir: Path
) -> tuple[float, float]:
    """Largest logit difference from PEFT of llama.cpp with the exported adapter, and of the merged file."""
    hot, merged = out_dir / "adapter.gguf", out_dir / "merged.gguf"
    write_adapter_gguf(adapter_dir, case.base, hot, {})
    merge_gguf(case.base, hot, merged, metadata={})
    wanted = case.torch_adapted[adapter]
    return _difference(llama_logits(case.base, hot), wanted), _difference(llama_logits(merged), wanted)


def _difference(left: Floats, right: Floats) -> float:
    assert left.shape == right.shape == (len(PROMPT), len(TOKENS))
    return float(np.abs(left - right).max())


def _wrong_order(spec: TensorSpec) -> TensorSpec:
    heads = {"attn_q.weight": "n_heads", "attn_k.weight": "n_kv_heads", "attn_qkv.weight": "n_heads"}
    return spec._replace(heads="" if spec.heads else heads.get(spec.gguf, ""))


def _change_alpha(peft: Path, alpha: int) -> None:
    path = peft / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": alpha}))


def _drop_layer(peft: Path) -> None:
    _change_names(peft, lambda name: "" if ".layers.1." in name else name)


def _change_names(peft: Path, renamed: Callable[[str], str]) -> None:
    """Renames the adapter's tensors, and leaves out those that become nameless."""
    from safetensors.numpy import save_file

    path = peft / "adapter_model.safetensors"
    arrays = {renamed(name): array for name, array in load_file(path).items()}
    save_file({name: array for name, array in arrays.items() if name}, path)
