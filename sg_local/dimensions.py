"""The sizes of a model that its header states: layers, heads, widths. Shapes and memory are told from them.

    llama.embedding_length 576, llama.attention.head_count 9, ... → Dimensions(hidden=576, n_heads=9, head_dim=64, ...)

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; defaults as in llama.cpp's src/llama-model.cpp.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sg_local.architectures import ARCHITECTURES, ATTENTION, CONV, LINEAR, RECURRENT
from sg_local.files import Faults
from sg_local.gguf_header import GgufHeader
from sg_local.gguf_values import MetadataValue

_OTHER_MODEL = "give another model"  # where the model is so, and no conversion would change it


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model, from its metadata and its token embedding."""

    vocab: int  # rows of the token embedding
    hidden: int
    intermediate: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_rotated: int  # the first so many dimensions of a head are rotated by position
    # Of a hybrid model; (): all layers are alike.
    layer_kinds: tuple[str, ...] = field(default=(), kw_only=True)
    conv_tokens: int = field(default=0, kw_only=True)  # that a short convolution looks at
    # Of linear attention; queries have as many heads as keys, and all heads are of one size.
    n_key_heads: int = field(default=0, kw_only=True)
    n_value_heads: int = field(default=0, kw_only=True)
    linear_head_dim: int = field(default=0, kw_only=True)
    # Behind the n_layers, which nothing but speculative decoding computes
    n_prediction_layers: int = field(default=0, kw_only=True)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each layer, as architectures.py calls them; "" where all are alike."""
        return self.layer_kinds or ("",) * self.n_layers

    @property
    def n_attention_layers(self) -> int:
        return sum(kind not in RECURRENT for kind in self.kinds)

    @property
    def has_state(self) -> bool:
        """Whether llama.cpp keeps a state for each sequence, from which no token can be taken back."""
        return any(kind in RECURRENT for kind in self.kinds)

    @property
    def state_numbers(self) -> int:
        """The numbers of a sequence's state: what convolutions look back to, and the matrices of linear attention."""
        of_conv = (self.conv_tokens - 1) * self.hidden
        of_linear = (self.conv_tokens - 1) * self.linear_qkv_rows + self.value_rows * self.linear_head_dim
        return self.kinds.count(CONV) * of_conv + self.kinds.count(LINEAR) * of_linear

    @property
    def conv_rows(self) -> int:
        return 3 * self.hidden

    @property
    def value_rows(self) -> int:
        return self.n_value_heads * self.linear_head_dim

    @property
    def linear_qkv_rows(self) -> int:
        return 2 * self.n_key_heads * self.linear_head_dim + self.value_rows

    @property
    def gated_q_rows(self) -> int:
        return 2 * self.q_rows

    @property
    def q_rows(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        return self.q_rows + 2 * self.kv_rows

    @property
    def gate_up_rows(self) -> int:
        return 2 * self.intermediate

    @property
    def rope_pairs(self) -> int:
        return self.n_rotated // 2

    def sizes(self, fields: Sequence[str]) -> tuple[int, ...]:
        """The values of these fields: architectures.py states shapes in them."""
        return tuple(getattr(self, field) for field in fields)


def read_dimensions(header: GgufHeader) -> Dimensions:
    """The dimensions of a model of a supported architecture.

    Raises InputError, with all faults: a key is missing or no positive integer, or layers differ in size. Where all
    sizes are there: keys and values differ in length, or the numbers contradict each other.
    """
    faults = Faults()
    embedding = header.tensor("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        faults.add(_fault(header, "the matrix token_embd.weight is missing"))
    hidden = read_size(header, "embedding_length", faults)
    n_heads = read_size(header, "attention.head_count", faults)
    head_dim = read_size(header, "attention.key_length", faults, max(1, hidden // n_heads))
    n_layers = read_size(header, "block_count", faults)
    architecture = ARCHITECTURES[header.architecture]
    own: dict[str, int] = {}
    if architecture.has_prediction_layers:
        n_layers, own["n_prediction_layers"] = _without_prediction_layers(header, n_layers, faults)
    kinds: tuple[str, ...] = ()
    n_kv_heads = 0
    if CONV in architecture.layer_kinds:
        kinds, n_kv_heads = _layers_with_kv_heads(header, n_layers, faults)
        own["conv_tokens"] = read_size(header, "shortconv.l_cache", faults)
    if LINEAR in architecture.layer_kinds:
        kinds = _layers_with_linear_attention(header, n_layers, own["n_prediction_layers"], faults)
        own |= _linear_attention(header, faults)
    dimensions = Dimensions(
        vocab=embedding.shape[-1] if embedding else 1,
        hidden=hidden,
        intermediate=read_size(header, "feed_forward_length", faults),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or read_size(header, "attention.head_count_kv", faults, n_heads),
        head_dim=head_dim,
        n_rotated=read_size(header, "rope.dimension_count", faults, head_dim),
        layer_kinds=kinds,
        **own,
    )
    value_dim = read_size(header, "attention.value_length", faults, head_dim)
    faults.raise_any()
    if value_dim != head_dim:
        reason = "its attention keys and values differ in length, which transformers cannot express"
        faults.add(_fault(header, reason, _OTHER_MODEL))
    if n_heads % dimensions.n_kv_heads:
        reason = f"{n_heads} attention heads are not a multiple of {dimensions.n_kv_heads} KV heads"
        faults.add(_fault(header, reason))
    if head_dim % 2:
        faults.add(_fault(header, f"its attention heads have the odd size {head_dim}", _OTHER_MODEL))
    # Each layer has tensors; this bounds the loops over layers.
    if dimensions.n_layers > len(header.tensors):
        reason = f"it has {len(header.tensors)} tensors for {dimensions.n_layers} layers"
        faults.add(_fault(header, reason))
    faults.raise_any()
    return dimensions


def read_size(header: GgufHeader, key: str, faults: Faults, default: int | None = None) -> int:
    """The positive integer of a key of the architecture; 1, and a fault, where it is none."""
    name = f"{header.architecture}.{key}"
    value: MetadataValue | None = header.metadata.get(name, default)
    # Some converters write a number for each layer where one would do.
    if isinstance(value, list) and value and all(element == value[0] for element in value):
        value = value[0]
    if isinstance(value, list):
        reason = f"{name} differs between layers, which transformers cannot express"
        faults.add(_fault(header, reason, _OTHER_MODEL))
    elif value is None:
        faults.add(_fault(header, f"{name} is missing"))
    elif isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        faults.add(_fault(header, f"{name} is {value!r:.40}, not a positive integer"))
    else:
        return value
    return 1


def _layers_with_kv_heads(header: GgufHeader, n_layers: int, faults: Faults) -> tuple[tuple[str, ...], int]:
    """ATTENTION or CONV for each layer, and how many KV heads those with attention have; the others have 0."""
    name = f"{header.architecture}.attention.head_count_kv"
    value = header.metadata.get(name)
    heads: list[int] = []
    if isinstance(value, list) and len(value) == n_layers:
        heads = [number for number in value if isinstance(number, int) and not isinstance(number, bool)]
    if len(heads) != n_layers or min(heads) < 0 or len({*heads} - {0}) != 1:
        reason = f"{name} is {value!r:.40}, not a number for each of {n_layers} layers, the same or 0"
        faults.add(_fault(header, reason))
        return (), 1
    return tuple(ATTENTION if number else CONV for number in heads), max(heads)


def _without_prediction_layers(header: GgufHeader, n_blocks: int, faults: Faults) -> tuple[int, int]:
    """The model's own layers, and those behind them that predict more than one token ahead."""
    name = f"{header.architecture}.nextn_predict_layers"
    n_prediction = header.metadata.get(name, 0)
    if (
        isinstance(n_prediction, bool)
        or not isinstance(n_prediction, int)
        or not 0 <= n_prediction < n_blocks
    ):
        reason = f"{name} is {n_prediction!r:.40}, not a number below that of all layers, {n_blocks}"
        faults.add(_fault(header, reason))
        return n_blocks, 0
    return n_blocks - n_prediction, n_prediction


def _layers_with_linear_attention(
    header: GgufHeader, n_layers: int, n_prediction_layers: int, faults: Faults
) -> tuple[str, ...]:
    """LINEAR or ATTENTION for each layer: as a list says, or attention in every n-th."""
    name = f"{header.architecture}.attention.recurrent_layers"
    n_blocks = n_layers + n_prediction_layers
    is_linear = header.metadata.get(name)
    if n_layers > len(header.tensors):  # a fault that is told with those of the other sizes
        return ()
    if is_linear is None:
        interval = read_size(header, "full_attention_interval", faults, 4)
        return tuple(LINEAR if (layer + 1) % interval else ATTENTION for layer in range(n_layers))
    if not isinstance(is_linear, list) or len(is_linear) != n_blocks:
        faults.add(_fault(header, f"{name} is {is_linear!r:.40}, not a list of {n_blocks} layers"))
        return ()
    return tuple(LINEAR if linear else ATTENTION for linear in is_linear[:n_layers])


def _linear_attention(header: GgufHeader, faults: Faults) -> dict[str, int]:
    """The sizes of linear attention; llama.cpp's names for them are those of state space models."""
    sizes = {
        name: read_size(header, f"ssm.{key}", faults)
        for name, key in (
            ("conv_tokens", "conv_kernel"),
            ("n_key_heads", "group_count"),
            ("n_value_heads", "time_step_rank"),
            ("linear_head_dim", "state_size"),
        )
    }
    n_keys, n_values, head_dim = sizes["n_key_heads"], sizes["n_value_heads"], sizes["linear_head_dim"]
    if n_values % n_keys:
        reason = f"{n_values} value heads of linear attention are not a multiple of {n_keys} key heads"
        faults.add(_fault(header, reason))
    if (width := read_size(header, "ssm.inner_size", faults)) != n_values * head_dim:
        reason = f"{header.architecture}.ssm.inner_size is {width}, not {n_values} value heads of {head_dim}"
        faults.add(_fault(header, reason))
    return sizes


def _fault(header: GgufHeader, reason: str, advice: str = "give another conversion of the model") -> str:
    return f"{header.path}: {reason}; {advice}"
