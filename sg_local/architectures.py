"""What each supported architecture is called and shaped like: the one table that all other modules read.

    ARCHITECTURES["qwen2"]: class Qwen2ForCausalLM, hidden_act "silu",
    blk.0.attn_q.weight is model.layers.0.self_attn.q_proj.weight, (q_rows, hidden), ...

A new architecture is one entry here, and a model in tests/model/test_architectures.py, where llama.cpp and torch are
compared. Only what has to be computed from a model's metadata (which layers look back a window only, how a rotation is
scaled) is code: a function in gguf_io/hf_config.py.

Sources. Names, row order and values of tensors: llama.cpp's conversion (conversion/llama.py: function permute; qwen.py;
gemma.py: norm_shift; phi.py) and its src/models/*.cpp. Keys of config.json: transformers 5.17's configuration classes.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


class TensorSpec(NamedTuple):
    """One tensor of an architecture: its two names, and its shape in fields of dimensions.Dimensions."""

    gguf: str
    hf: str  # "" for what Hugging Face has in config.json
    shape: tuple[str, ...]  # (rows, columns) or (elements,): the reverse of the GGUF's own order
    heads: str = ""  # the field of Dimensions that counts the heads by which llama.cpp permutes the rows
    optional: str = ""  # all tensors of a model that have the same word here are there, or none
    plus_one: bool = False  # the GGUF has the value that is multiplied with, Hugging Face that minus one
    layers: str = ""  # of hybrid models: ATTENTION, CONV or LINEAR, the layers that have it; "": all of them
    # Of a convolution: Hugging Face has (rows, 1, columns), and LoRA does not change it.
    is_kernel: bool = False
    # "rows" or "columns" of which the last are linear attention's value heads, which llama.cpp has in another order
    value_heads: str = ""
    is_log: bool = False  # Hugging Face has the logarithm of what the GGUF has, whose sign is the other one

    @property
    def module(self) -> str:
        """The last name of Hugging Face's module that has the tensor, for example q_proj."""
        return self.hf.split(".")[-2]

    def is_in(self, layer_kind: str) -> bool:
        """Whether a layer of this kind has it."""
        return self.layers in ("", layer_kind)


@dataclass(frozen=True)
class HasTensor:
    """The value of a key of config.json: whether the model has this tensor."""

    gguf: str


@dataclass(frozen=True)
class Computed:
    """The value of a key of config.json that gguf_io/hf_config.py computes from the model's metadata."""


# What layers are called in layer_types of config.json
ATTENTION, CONV, LINEAR = "full_attention", "conv", "linear_attention"
# Those that keep a state, from which no token can be taken back, and why rows cannot share tokens there
RECURRENT = {
    CONV: "short convolutions look at the tokens before, which in a tree are those of other rows too",
    LINEAR: "linear attention sums up the tokens before, which in a tree are those of other rows too",
}

ConfigValue: TypeAlias = bool | str | HasTensor | Computed | None


@dataclass(frozen=True)
class Architecture:
    """What transformers calls it, its tensors, and its part of config.json."""

    class_name: str
    model_type: str
    tensors: tuple[TensorSpec, ...]  # outside the layers
    layer_tensors: tuple[TensorSpec, ...]  # those of layer n are called blk.n.… and model.layers.n.…
    config: dict[str, ConfigValue]  # beside the keys that every architecture has
    # What the class takes where config.json lacks the key
    default_theta: float = 10_000.0  # rope_theta
    default_tied: bool = False  # tie_word_embeddings
    derives_heads: bool = True  # num_key_value_heads and head_dim come from num_attention_heads
    renamed: dict[str, str] = field(default_factory=dict)  # keys of config.json that others call otherwise
    # Those from which the class computes a size: in an original config.json another number may stand.
    adjusted: tuple[str, ...] = ()
    # Whether files have layers behind the others that predict more than one token ahead (MTP). transformers' class has
    # none, and llama.cpp computes them for speculative decoding alone.
    has_prediction_layers: bool = False

    @property
    def layer_kinds(self) -> frozenset[str]:
        """The kinds of a hybrid model's layers; none where all layers are alike."""
        return frozenset(tensor.layers for tensor in self.layer_tensors) - {""}

    @property
    def matrices(self) -> tuple[TensorSpec, ...]:
        """The matrices of the layers: what LoRA trains."""
        return tuple(
            tensor for tensor in self.layer_tensors if len(tensor.shape) == 2 and not tensor.is_kernel
        )

    def tensors_of(self, layer_kind: str) -> tuple[TensorSpec, ...]:
        """The tensors of a layer of this kind."""
        return tuple(tensor for tensor in self.layer_tensors if tensor.is_in(layer_kind))


_COMPUTED = Computed()
_BIAS = "attention_bias"
_LONGROPE = "rope_factors"

_MODEL = (
    TensorSpec("token_embd.weight", "model.embed_tokens.weight", ("vocab", "hidden")),
    TensorSpec("output_norm.weight", "model.norm.weight", ("hidden",)),
    TensorSpec("output.weight", "lm_head.weight", ("vocab", "hidden"), optional="lm_head"),
)
_NORMS = (
    TensorSpec("attn_norm.weight", "input_layernorm.weight", ("hidden",)),
    TensorSpec("ffn_norm.weight", "post_attention_layernorm.weight", ("hidden",)),
)
_FOUR_NORMS = (
    TensorSpec("attn_norm.weight", "input_layernorm.weight", ("hidden",)),
    # Llama's norm of that name comes before the MLP, this one before the residual is added.
    TensorSpec("post_attention_norm.weight", "post_attention_layernorm.weight", ("hidden",)),
    TensorSpec("ffn_norm.weight", "pre_feedforward_layernorm.weight", ("hidden",)),
    TensorSpec("post_ffw_norm.weight", "post_feedforward_layernorm.weight", ("hidden",)),
)
_ATTENTION = (
    TensorSpec("attn_q.weight", "self_attn.q_proj.weight", ("q_rows", "hidden")),
    TensorSpec("attn_k.weight", "self_attn.k_proj.weight", ("kv_rows", "hidden")),
    TensorSpec("attn_v.weight", "self_attn.v_proj.weight", ("kv_rows", "hidden")),
    TensorSpec("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "q_rows")),
)
_PERMUTED_ATTENTION = (
    TensorSpec("attn_q.weight", "self_attn.q_proj.weight", ("q_rows", "hidden"), "n_heads"),
    TensorSpec("attn_k.weight", "self_attn.k_proj.weight", ("kv_rows", "hidden"), "n_kv_heads"),
    *_ATTENTION[2:],
)
_HEAD_NORMS = (
    TensorSpec("attn_q_norm.weight", "self_attn.q_norm.weight", ("head_dim",)),
    TensorSpec("attn_k_norm.weight", "self_attn.k_norm.weight", ("head_dim",)),
)
# Optional: a model has all four or none.
_PERMUTED_BIASES = (
    TensorSpec("attn_q.bias", "self_attn.q_proj.bias", ("q_rows",), "n_heads", _BIAS),
    TensorSpec("attn_k.bias", "self_attn.k_proj.bias", ("kv_rows",), "n_kv_heads", _BIAS),
    TensorSpec("attn_v.bias", "self_attn.v_proj.bias", ("kv_rows",), optional=_BIAS),
    TensorSpec("attn_output.bias", "self_attn.o_proj.bias", ("hidden",), optional=_BIAS),
)
_MLP = (
    TensorSpec("ffn_gate.weight", "mlp.gate_proj.weight", ("intermediate", "hidden")),
    TensorSpec("ffn_up.weight", "mlp.up_proj.weight", ("intermediate", "hidden")),
    TensorSpec("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "intermediate")),
)
# Linear attention of Qwen 3.5 (Gated DeltaNet, arXiv 2412.06464)
_GATED_DELTA_NET = (
    *(
        tensor._replace(value_heads="rows")
        for tensor in (
            TensorSpec("attn_qkv.weight", "linear_attn.in_proj_qkv.weight", ("linear_qkv_rows", "hidden")),
            TensorSpec("attn_gate.weight", "linear_attn.in_proj_z.weight", ("value_rows", "hidden")),
            TensorSpec("ssm_alpha.weight", "linear_attn.in_proj_a.weight", ("n_value_heads", "hidden")),
            TensorSpec("ssm_beta.weight", "linear_attn.in_proj_b.weight", ("n_value_heads", "hidden")),
            TensorSpec(
                "ssm_conv1d.weight",
                "linear_attn.conv1d.weight",
                ("linear_qkv_rows", "conv_tokens"),
                is_kernel=True,
            ),
            TensorSpec("ssm_a", "linear_attn.A_log", ("n_value_heads",), is_log=True),
            TensorSpec("ssm_dt.bias", "linear_attn.dt_bias", ("n_value_heads",)),
        )
    ),
    TensorSpec("ssm_norm.weight", "linear_attn.norm.weight", ("linear_head_dim",)),
    TensorSpec(
        "ssm_out.weight", "linear_attn.out_proj.weight", ("hidden", "value_rows"), value_heads="columns"
    ),
)


def _plus_one(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The same, with one added to all norms."""
    return tuple(tensor._replace(plus_one=len(tensor.shape) == 1) for tensor in tensors)


def _in_layers(kind: str, *tensors: TensorSpec) -> tuple[TensorSpec, ...]:
    """The same, of this kind of layers alone."""
    return tuple(tensor._replace(layers=kind) for tensor in tensors)


# general.architecture → what it stands for
ARCHITECTURES = {
    "llama": Architecture(
        class_name="LlamaForCausalLM",
        model_type="llama",
        tensors=(*_MODEL, TensorSpec("rope_freqs.weight", "", ("rope_pairs",), optional="rope_freqs")),
        layer_tensors=(*_NORMS, *_PERMUTED_ATTENTION, *_PERMUTED_BIASES, *_MLP),
        config={
            "hidden_act": "silu",
            "attention_bias": HasTensor("blk.0.attn_q.bias"),
            "mlp_bias": False,
            "rope_parameters": _COMPUTED,
        },
    ),
    "qwen2": Architecture(
        class_name="Qwen2ForCausalLM",
        model_type="qwen2",
        tensors=_MODEL,
        layer_tensors=(
            *_NORMS,
            *_ATTENTION,
            TensorSpec("attn_q.bias", "self_attn.q_proj.bias", ("q_rows",)),
            TensorSpec("attn_k.bias", "self_attn.k_proj.bias", ("kv_rows",)),
            TensorSpec("attn_v.bias", "self_attn.v_proj.bias", ("kv_rows",)),
            *_MLP,
        ),
        config={
            "hidden_act": "silu",
            "use_sliding_window": False,  # llama.cpp has none for it
            "rope_parameters": _COMPUTED,
        },
    ),
    "qwen3": Architecture(
        class_name="Qwen3ForCausalLM",
        model_type="qwen3",
        tensors=_MODEL,
        layer_tensors=(*_NORMS, *_ATTENTION, *_HEAD_NORMS, *_MLP),
        config={
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_parameters": _COMPUTED,
            "attention_bias": False,
        },
        derives_heads=False,
    ),
    "gemma2": Architecture(
        class_name="Gemma2ForCausalLM",
        model_type="gemma2",
        tensors=_plus_one(_MODEL[:2]),  # llama.cpp takes the embedding for the output matrix
        layer_tensors=_plus_one((*_FOUR_NORMS, *_ATTENTION, *_MLP)),
        config={
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "query_pre_attn_scalar": _COMPUTED,
            "sliding_window": _COMPUTED,
            "layer_types": _COMPUTED,
            "rope_parameters": _COMPUTED,
            "final_logit_softcapping": _COMPUTED,
            "attn_logit_softcapping": _COMPUTED,
            "use_bidirectional_attention": False,
            "attn_implementation": "eager",  # transformers' sdpa leaves out the caps of attention
        },
        default_tied=True,
        derives_heads=False,
    ),
    "gemma3": Architecture(
        class_name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        tensors=_plus_one(_MODEL),
        layer_tensors=_plus_one((*_FOUR_NORMS, *_ATTENTION, *_HEAD_NORMS, *_MLP)),
        config={
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "query_pre_attn_scalar": _COMPUTED,
            "sliding_window": _COMPUTED,
            "layer_types": _COMPUTED,
            "rope_parameters": _COMPUTED,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        default_theta=1_000_000.0,
        default_tied=True,
        derives_heads=False,
    ),
    "phi3": Architecture(
        class_name="Phi3ForCausalLM",
        model_type="phi3",
        tensors=(
            *_MODEL,
            TensorSpec("rope_factors_long.weight", "", ("rope_pairs",), optional=_LONGROPE),
            TensorSpec("rope_factors_short.weight", "", ("rope_pairs",), optional=_LONGROPE),
        ),
        layer_tensors=(
            *_NORMS,
            TensorSpec("attn_qkv.weight", "self_attn.qkv_proj.weight", ("qkv_rows", "hidden")),
            TensorSpec("attn_output.weight", "self_attn.o_proj.weight", ("hidden", "q_rows")),
            TensorSpec("ffn_up.weight", "mlp.gate_up_proj.weight", ("gate_up_rows", "hidden")),
            TensorSpec("ffn_down.weight", "mlp.down_proj.weight", ("hidden", "intermediate")),
        ),
        config={
            "hidden_act": "silu",
            # llama.cpp ignores Phi 3's window (https://github.com/ggml-org/llama.cpp/pull/13676)
            "sliding_window": None,
            "original_max_position_embeddings": _COMPUTED,
            "rope_parameters": _COMPUTED,
        },
    ),
    "granite": Architecture(
        class_name="GraniteForCausalLM",
        model_type="granite",
        tensors=_MODEL,
        layer_tensors=(*_NORMS, *_PERMUTED_ATTENTION, *_PERMUTED_BIASES, *_MLP),
        config={
            "hidden_act": "silu",
            "attention_bias": HasTensor("blk.0.attn_q.bias"),
            "mlp_bias": False,
            "embedding_multiplier": _COMPUTED,
            "attention_multiplier": _COMPUTED,
            "residual_multiplier": _COMPUTED,
            "logits_scaling": _COMPUTED,
            "rope_parameters": _COMPUTED,
        },
    ),
    "smollm3": Architecture(
        class_name="SmolLM3ForCausalLM",
        model_type="smollm3",
        tensors=_MODEL,
        layer_tensors=(*_NORMS, *_PERMUTED_ATTENTION, *_MLP),
        config={
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "use_sliding_window": False,
            "no_rope_layers": _COMPUTED,
            "rope_parameters": _COMPUTED,
        },
        default_theta=2_000_000.0,
        default_tied=True,
    ),
    "mistral3": Architecture(
        class_name="Ministral3ForCausalLM",
        model_type="ministral3",
        tensors=_MODEL,
        layer_tensors=(*_NORMS, *_PERMUTED_ATTENTION, *_MLP),
        config={
            "hidden_act": "silu",
            "sliding_window": None,
            "rope_parameters": _COMPUTED,
        },
        default_theta=1_000_000.0,
        derives_heads=False,
    ),
    "lfm2": Architecture(
        class_name="Lfm2ForCausalLM",
        model_type="lfm2",
        tensors=(
            _MODEL[0],
            # llama.cpp's name of the last norm is that of others' norm of the embedding.
            TensorSpec("token_embd_norm.weight", "model.embedding_norm.weight", ("hidden",)),
            _MODEL[2],
        ),
        layer_tensors=(
            TensorSpec("attn_norm.weight", "operator_norm.weight", ("hidden",)),
            TensorSpec("ffn_norm.weight", "ffn_norm.weight", ("hidden",)),
            *_in_layers(ATTENTION, *_ATTENTION[:3]),
            TensorSpec(
                "attn_output.weight", "self_attn.out_proj.weight", ("hidden", "q_rows"), layers=ATTENTION
            ),
            TensorSpec("attn_q_norm.weight", "self_attn.q_layernorm.weight", ("head_dim",), layers=ATTENTION),
            TensorSpec("attn_k_norm.weight", "self_attn.k_layernorm.weight", ("head_dim",), layers=ATTENTION),
            TensorSpec(
                "shortconv.conv.weight",
                "conv.conv.weight",
                ("hidden", "conv_tokens"),
                layers=CONV,
                is_kernel=True,
            ),
            TensorSpec(
                "shortconv.in_proj.weight", "conv.in_proj.weight", ("conv_rows", "hidden"), layers=CONV
            ),
            TensorSpec(
                "shortconv.out_proj.weight", "conv.out_proj.weight", ("hidden", "hidden"), layers=CONV
            ),
            TensorSpec("ffn_gate.weight", "feed_forward.w1.weight", ("intermediate", "hidden")),
            TensorSpec("ffn_up.weight", "feed_forward.w3.weight", ("intermediate", "hidden")),
            TensorSpec("ffn_down.weight", "feed_forward.w2.weight", ("hidden", "intermediate")),
        ),
        config={
            "layer_types": _COMPUTED,
            "conv_L_cache": _COMPUTED,
            "conv_bias": False,
            "block_auto_adjust_ff_dim": False,  # intermediate_size is what it is
            "rope_parameters": _COMPUTED,
        },
        default_theta=1_000_000.0,
        default_tied=True,
        renamed={"rms_norm_eps": "norm_eps"},
        adjusted=("intermediate_size",),
    ),
    "qwen35": Architecture(
        class_name="Qwen3_5ForCausalLM",
        model_type="qwen3_5_text",
        tensors=_plus_one(_MODEL),
        layer_tensors=(
            *_plus_one(
                (
                    _NORMS[0],
                    TensorSpec("post_attention_norm.weight", "post_attention_layernorm.weight", ("hidden",)),
                    *_in_layers(
                        ATTENTION,
                        # of each head the rows of the query, then those of its gate
                        TensorSpec("attn_q.weight", "self_attn.q_proj.weight", ("gated_q_rows", "hidden")),
                        *_ATTENTION[1:],
                        *_HEAD_NORMS,
                    ),
                )
            ),
            *_in_layers(LINEAR, *_GATED_DELTA_NET),
            *_MLP,
        ),
        config={
            "hidden_act": "silu",
            "attention_bias": False,
            "layer_types": _COMPUTED,
            "linear_conv_kernel_dim": _COMPUTED,
            "linear_key_head_dim": _COMPUTED,
            "linear_value_head_dim": _COMPUTED,
            "linear_num_key_heads": _COMPUTED,
            "linear_num_value_heads": _COMPUTED,
            "rope_parameters": _COMPUTED,
        },
        derives_heads=False,
        has_prediction_layers=True,
    ),
}
