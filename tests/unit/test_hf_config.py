"""config.json and tensors of each architecture from its GGUF, and what is refused, on the models of tiny_models.py.

That llama.cpp and torch compute the same with them is tested in tests/model/test_architectures.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import values_of, write_peft
from tiny_models import (
    CONTEXT,
    FEED_FORWARD,
    HEADS,
    HIDDEN,
    KV_HEADS,
    TOKENS,
    WIDE_HEAD_DIM,
    integers,
    write_tiny_model,
)

from sg_local.architectures import ARCHITECTURES, RECURRENT
from sg_local.errors import InputError
from sg_local.gguf_io.adapter import write_adapter_gguf
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.merge import merge_gguf

pytest.importorskip("safetensors")  # comes with the extra "train"

COMMON = {
    "dtype": "float16",
    "vocab_size": len(TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": FEED_FORWARD,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FACTORS = {"rope_factors_long.weight": [2.0] * 6, "rope_factors_short.weight": [1.1] * 6}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
}
PARTIAL = {"rope.dimension_count": 12}


def config_of(directory: Path, architecture: str, metadata: Any = None, **arguments: Any) -> dict[str, Any]:
    base = write_tiny_model(directory / "base.gguf", architecture, metadata, **arguments)
    write_base_weights(base, directory / "weights")
    config: dict[str, Any] = json.loads((directory / "weights" / "config.json").read_text())
    return config


def test_config_of_qwen2(tmp_path: Path) -> None:
    assert config_of(tmp_path, "qwen2") == {
        **COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "head_dim": 16,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "rope_parameters": PLAIN_ROPE,
    }


def test_config_of_qwen3(tmp_path: Path) -> None:
    assert config_of(tmp_path, "qwen3", {"rope.scaling.factor": 2.0}, tied=True) == {
        **COMMON,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": WIDE_HEAD_DIM,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    }


def test_config_of_gemma2(tmp_path: Path) -> None:
    metadata = {
        "attention.sliding_window": 16,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 12.5,
        "rope.freq_base_swa": 10000.0,
    }
    assert config_of(tmp_path, "gemma2", metadata, n_layers=3) == {
        **COMMON,
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "head_dim": WIDE_HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attn_implementation": "eager",
        "query_pre_attn_scalar": WIDE_HEAD_DIM,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
        "rope_parameters": PLAIN_ROPE,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 12.5,
        "use_bidirectional_attention": False,
    }


def test_gemma2_without_keys_has_the_numbers_of_llama_cpp(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gemma2", n_layers=46)
    assert config["sliding_window"] == 4096
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)
    assert config["query_pre_attn_scalar"] == HIDDEN // HEADS  # as in the 27B


def test_config_of_gemma3(tmp_path: Path) -> None:
    metadata = {"attention.sliding_window": 16, "rope.freq_base": 1e6, "rope.scaling.factor": 8.0}
    assert config_of(tmp_path, "gemma3", metadata, tied=True, n_layers=7) == {
        **COMMON,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "head_dim": WIDE_HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": WIDE_HEAD_DIM,
        "sliding_window": 16,
        "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": PLAIN_ROPE,
        },
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


@pytest.mark.parametrize(
    ("window", "pattern", "is_local"),
    [
        (16, 2, [True, False, True]),
        (16, 0, [True, True, True]),
        (16, 1, [False, False, False]),
        (16, [True, True, False], [True, True, False]),
        (0, 2, [False, False, False]),
        (None, None, [False, False, False]),
    ],
)
def test_local_layers_of_gemma3(window: Any, pattern: Any, is_local: list[bool], tmp_path: Path) -> None:
    metadata = {"attention.sliding_window": window, "attention.sliding_window_pattern": pattern}
    config = config_of(tmp_path, "gemma3", metadata, n_layers=3)
    assert [kind == "sliding_attention" for kind in config["layer_types"]] == is_local
    assert config["sliding_window"] == (window or CONTEXT)


def test_config_of_phi3(tmp_path: Path) -> None:
    metadata = {
        **PARTIAL,
        "attention.sliding_window": 8,
        "rope.scaling.original_context_length": 128,
        "rope.scaling.attn_factor": 1.25,
    }
    assert config_of(tmp_path, "phi3", metadata, vectors=FACTORS) == {
        **COMMON,
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "head_dim": 16,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "long_factor": [2.0] * 6,
            "short_factor": [1.1] * 6,
            "original_max_position_embeddings": 128,
            "attention_factor": 1.25,
            "factor": CONTEXT / 128,
        },
    }


def test_config_of_granite(tmp_path: Path) -> None:
    scales = {
        "embedding_scale": 12.0,
        "attention.scale": 0.0078125,
        "residual_scale": 0.25,
        "logit_scale": 8.0,
    }
    config = config_of(tmp_path, "granite", scales)
    expected = {
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.0078125,
        "residual_multiplier": 0.25,
        "logits_scaling": 8.0,
    }
    assert {key: config[key] for key in expected} == expected
    assert config["rope_parameters"] == PLAIN_ROPE
    # 0 and nothing say that llama.cpp does not scale
    (tmp_path / "plain").mkdir()
    plain = config_of(tmp_path / "plain", "granite", {"logit_scale": 8.0, "residual_scale": 0.0})
    assert (plain["residual_multiplier"], plain["attention_multiplier"]) == (1.0, 0.25)


YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": pytest.approx(0.1 * np.log(4) + 1),
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "granite", "smollm3"])
def test_yarn_is_that_of_llama_cpp(architecture: str, tmp_path: Path) -> None:
    not_read = {"rope.scaling.yarn_beta_fast": 7.0, "rope.scaling.yarn_log_multiplier": 1.0}
    assert config_of(tmp_path, architecture, {**YARN, **not_read})["rope_parameters"] == YARN_ROPE


def test_yarn_without_a_factor_is_no_scaling(tmp_path: Path) -> None:
    assert config_of(tmp_path, "qwen3", {"rope.scaling.type": "yarn"})["rope_parameters"] == PLAIN_ROPE


def test_config_of_mistral3(tmp_path: Path) -> None:
    metadata = {
        **YARN,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 0.5,
        "rope.scaling.yarn_log_multiplier": 1.0,
        "attention.temperature_scale": 0.1,
    }
    assert config_of(tmp_path, "mistral3", metadata) == {
        **COMMON,
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "head_dim": WIDE_HEAD_DIM,
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "rope_parameters": {
            **YARN_ROPE,
            "beta_fast": 16.0,
            "beta_slow": 0.5,
            "attention_factor": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    }


def test_mistral3_without_scaling(tmp_path: Path) -> None:
    """Mistral Small 3: transformers asks for both numbers where nothing is scaled."""
    assert config_of(tmp_path, "mistral3")["rope_parameters"] == {
        **PLAIN_ROPE,
        "original_max_position_embeddings": CONTEXT,
        "llama_4_scaling_beta": 0.0,
    }


def test_smollm3_does_not_rotate_every_fourth_layer(tmp_path: Path) -> None:
    config = config_of(tmp_path, "smollm3", n_layers=9)
    assert config["no_rope_layers"] == [1, 1, 1, 0, 1, 1, 1, 0, 1]


def test_phi3_without_factors_has_plain_rotation(tmp_path: Path) -> None:
    config = config_of(tmp_path, "phi3")
    assert config["rope_parameters"] == {**PLAIN_ROPE, "partial_rotary_factor": 1.0}
    assert config["original_max_position_embeddings"] == CONTEXT


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpoint_has_every_tensor_of_the_file(architecture: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    base = write_tiny_model(tmp_path / "base.gguf", architecture)
    write_base_weights(base, tmp_path / "weights")
    loaded = load_file(tmp_path / "weights" / "model-00001-of-00001.safetensors")
    values = values_of(base)
    assert len(loaded) == len(values)
    has_one = "gemma" in architecture or architecture == "qwen35"
    for spec in ARCHITECTURES[architecture].layer_tensors:
        if not spec.optional and not spec.heads and not spec.value_heads:
            layer = 0 if spec.layers in RECURRENT else 1
            got = loaded[f"model.layers.{layer}.{spec.hf}"]
            norm_shift = 1 if has_one and "norm" in spec.gguf and spec.gguf != "ssm_norm.weight" else 0
            wanted = values[f"blk.{layer}.{spec.gguf}"] - np.float32(norm_shift)
            assert np.array_equal(got.reshape(wanted.shape), wanted), spec.gguf
            assert got.ndim == wanted.ndim + spec.is_kernel
    last_norm = ARCHITECTURES[architecture].tensors[1]
    shift = np.float32(has_one)
    assert np.array_equal(loaded[last_norm.hf], values[last_norm.gguf] - shift)
    if architecture != "gemma2":  # which has none
        assert np.array_equal(loaded["lm_head.weight"], values["output.weight"])


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "lfm2 whose layers are all alike": (
        "lfm2",
        {"metadata": {"attention.head_count_kv": 2}},
        r"lfm2\.attention\.head_count_kv is 2, not a number for each of 2 layers",
    ),
    "lfm2 with another number of layers": (
        "lfm2",
        {"metadata": {"attention.head_count_kv": integers([0, 2, 0])}},
        r"head_count_kv is \[0, 2, 0\], not a number for each of 2 layers",
    ),
    "lfm2 without attention": (
        "lfm2",
        {"metadata": {"attention.head_count_kv": integers([0, 0])}},
        "not a number for each of 2 layers, the same or 0",
    ),
    "lfm2 with attention of several widths": (
        "lfm2",
        {"n_layers": 3, "metadata": {"attention.head_count_kv": integers([0, 2, 4])}},
        "not a number for each of 3 layers, the same or 0",
    ),
    "lfm2 that does not say how far it looks": (
        "lfm2",
        {"metadata": {"shortconv.l_cache": None}},
        r"lfm2\.shortconv\.l_cache is missing",
    ),
    "lfm2 with a window": (
        "lfm2",
        {"metadata": {"attention.sliding_window": 8}},
        "sliding_window is 8, which transformers cannot express",
    ),
    "lfm2 with attention where a convolution should be": (
        "lfm2",
        {"without": "blk.0.shortconv.in_proj.weight"},
        r"blk\.0\.shortconv\.in_proj\.weight is missing",
    ),
    "qwen2 without biases": ("qwen2", {"without": "blk.1.attn_k.bias"}, r"blk\.1\.attn_k\.bias is missing"),
    "qwen2 with a bias of the output": (
        "qwen2",
        {"vectors": {"output.bias": [0.0] * len(TOKENS)}},
        r"'output\.bias' has no place in a qwen2 model",
    ),
    "qwen2 with Llama's divisors": (
        "qwen2",
        {"vectors": {"rope_freqs.weight": [1.0] * 8}},
        r"'rope_freqs\.weight' has no place in a qwen2 model",
    ),
    "qwen2 with longrope": (
        "qwen2",
        {"metadata": {"rope.scaling.type": "longrope"}},
        r"qwen2\.rope\.scaling\.type is 'longrope', which cannot be converted",
    ),
    "qwen2 with yarn for a context that shrinks": (
        "qwen2",
        {"metadata": {**YARN, "rope.scaling.factor": 0.5}},
        r"rope\.scaling\.factor is 0\.5, and YaRN is for contexts that grow",
    ),
    "qwen2 with yarn from no context": (
        "qwen2",
        {"metadata": {**YARN, "rope.scaling.original_context_length": 0}},
        r"original_context_length is 0, not a positive integer",
    ),
    "qwen3 with yarn of which the two make different things": (
        "qwen3",
        {"metadata": {**YARN, "rope.scaling.original_context_length": 1}},
        r"type is yarn with an original context of 1 tokens.* compute differently",
    ),
    "gemma2 with yarn": ("gemma2", {"metadata": YARN}, r"gemma2\.rope\.scaling\.type is 'yarn'"),
    "gemma3 with yarn": ("gemma3", {"metadata": YARN}, r"gemma3\.rope\.scaling\.type is 'yarn'"),
    "lfm2 with yarn": ("lfm2", {"metadata": YARN}, r"lfm2\.rope\.scaling\.type is 'yarn'"),
    "phi3 with yarn": ("phi3", {"metadata": YARN}, r"phi3\.rope\.scaling\.type is 'yarn'"),
    "llama with yarn and Llama 3.1's divisors": (
        "llama",
        {"metadata": YARN, "vectors": {"rope_freqs.weight": [*[1.0] * 6, 4.0, 8.0]}},
        r"rope_freqs\.weight does not follow the rule of Llama 3\.1",
    ),
    "mistral3 with strange numbers": (
        "mistral3",
        {
            "metadata": {
                "rope.scaling.yarn_beta_fast": 0.0,
                "rope.scaling.yarn_log_multiplier": -1.0,
                "attention.temperature_scale": float("nan"),
            }
        },
        r"yarn_beta_fast is 0\.0[^\n]*\n.*yarn_log_multiplier is -1\.0[^\n]*\n.*temperature_scale is nan, not a number",
    ),
    "qwen2, partly rotated": (
        "qwen2",
        {"metadata": PARTIAL},
        "rotates 12 of 16 dimensions of a head, which Qwen2ForCausalLM cannot express",
    ),
    "qwen3 without a norm": (
        "qwen3",
        {"without": "blk.0.attn_k_norm.weight"},
        r"attn_k_norm\.weight is missing",
    ),
    "qwen3 with biases": (
        "qwen3",
        {"vectors": {"blk.0.attn_q.bias": [0.0] * HEADS * WIDE_HEAD_DIM}},
        r"'blk\.0\.attn_q\.bias' has no place",
    ),
    "qwen3 with another head": (
        "qwen3",
        {"n_layers": 1, "metadata": {"attention.key_length": 16, "attention.value_length": 16}},
        r"attn_q_norm\.weight has the shape \(32,\), and the metadata says \(16,\)",
    ),
    "llama with an attention factor": (
        "llama",
        {"metadata": {"rope.scaling.attn_factor": 1.19}},
        r"attn_factor is 1\.19.*, which transformers cannot express",
    ),
    "gemma2 without caps": (
        "gemma2",
        {"metadata": {"attn_logit_softcapping": 0.0, "final_logit_softcapping": -30.0}},
        r"attn_logit_softcapping is 0\.0, not a number that caps[^\n]*\n.*final_logit_softcapping is -30\.0",
    ),
    "gemma2 with an output matrix": (
        "gemma2",
        {"vectors": {"output.weight": [[0.0] * HIDDEN] * len(TOKENS)}},
        r"'output\.weight' has no place in a gemma2 model",
    ),
    "gemma2 without a window": (
        "gemma2",
        {"metadata": {"attention.sliding_window": 0}},
        r"sliding_window is 0, with which no token would see one",
    ),
    "gemma2 with another base in its local layers": (
        "gemma2",
        {"metadata": {"rope.freq_base_swa": 500.0}},
        r"freq_base_swa is 500\.0, and Gemma 2 in transformers has one base alone",
    ),
    "gemma3 without a norm": (
        "gemma3",
        {"without": "blk.1.post_ffw_norm.weight"},
        r"post_ffw_norm\.weight is missing",
    ),
    "gemma3 with its vision part": (
        "gemma3",
        {"vectors": {"v.patch_embd.bias": [0.0], "mm.soft_emb_norm.weight": [0.0]}},
        r"'v\.patch_embd\.bias' has no place in a gemma3 model of text",
    ),
    "gemma3 with capped logits": (
        "gemma3",
        {"metadata": {"final_logit_softcapping": 30.0}},
        r"final_logit_softcapping is 30\.0",
    ),
    "gemma3 with an odd window": (
        "gemma3",
        {"metadata": {"attention.sliding_window": 0.5}},
        r"sliding_window is 0\.5",
    ),
    "gemma3 with a pattern for other layers": (
        "gemma3",
        {
            "metadata": {
                "attention.sliding_window": 8,
                "attention.sliding_window_pattern": [True, False, True],
            }
        },
        r"sliding_window_pattern is \[True, False, True\], neither a number nor a list of 2 layers",
    ),
    "gemma3 with a strange base": (
        "gemma3",
        {"metadata": {"rope.freq_base_swa": 0.5}},
        "freq_base_swa is 0.5",
    ),
    "granite that rotates nothing": (
        "granite",
        {"metadata": {"logit_scale": 8.0, "rope.scaling.finetuned": False}},
        r"granite\.rope\.scaling\.finetuned is false",
    ),
    "granite without a scale of its logits": (
        "granite",
        {"metadata": {"logit_scale": None}},
        r"granite\.logit_scale is missing",
    ),
    "granite with a strange scale": (
        "granite",
        {"metadata": {"logit_scale": 8.0, "residual_scale": -1.0}},
        r"granite\.residual_scale is -1\.0, not a number that scales",
    ),
    "phi3 with short factors alone": (
        "phi3",
        {"metadata": PARTIAL, "vectors": {"rope_factors_short.weight": [1.0] * 6}},
        r"rope_factors_long\.weight is missing",
    ),
    "phi3 with factors for another rotation": (
        "phi3",
        {"vectors": FACTORS},
        r"rope_factors_long\.weight has the shape \(6,\), and the metadata says \(8,\)",
    ),
    "phi3 scaled linearly": (
        "phi3",
        {"metadata": {"rope.scaling.factor": 4.0}},
        r"phi3\.rope\.scaling\.factor is given, which Phi 3 in transformers cannot express",
    ),
    "phi3 rotated too far": (
        "phi3",
        {"metadata": {"rope.dimension_count": 18}},
        "rotates 18 of 16 dimensions",
    ),
    "phi3, an odd rotation": (
        "phi3",
        {"metadata": {"rope.dimension_count": 11}},
        "rotates 11 of 16 dimensions",
    ),
    "phi3 with an attention factor alone": (
        "phi3",
        {"metadata": {"rope.scaling.attn_factor": 1.19}},
        "cannot express without long and short factors",
    ),
    "phi3 without an original context": (
        "phi3",
        {"metadata": {"rope.scaling.original_context_length": 0}},
        "original_context_length is 0, not a positive integer",
    ),
    "phi3 in three matrices": (
        "phi3",
        {"vectors": {"blk.0.attn_q.weight": [[0.0]]}},
        r"'blk\.0\.attn_q\.weight' has no place in a phi3 model",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_model_that_transformers_cannot_express_is_refused(what: str, tmp_path: Path) -> None:
    architecture, arguments, message = REFUSALS[what]
    base = write_tiny_model(tmp_path / "base.gguf", architecture, **arguments)
    with pytest.raises(InputError, match=message) as caught:
        write_base_weights(base, tmp_path / "weights")
    assert all(line.startswith(f"{base}: ") for line in str(caught.value).splitlines())
    assert [path.name for path in tmp_path.iterdir()] == ["base.gguf"]


def test_other_architectures_are_refused_by_name_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_tiny_model(tmp_path / "base.gguf", "qwen2moe")
    peft = write_peft(tmp_path / "peft")

    def fail(*_args: Any, **_more: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(np, "fromfile", fail)
    message = (
        r"the architecture 'qwen2moe', which is not supported; give a model of one of: llama, qwen2, qwen3,"
    )
    with pytest.raises(InputError, match=message):
        write_base_weights(base, tmp_path / "weights")
    with pytest.raises(InputError, match=message):
        write_adapter_gguf(peft, base, tmp_path / "adapter.gguf", {})
    with pytest.raises(InputError, match=message):
        merge_gguf(base, tmp_path / "adapter.gguf", tmp_path / "merged.gguf", metadata={})
