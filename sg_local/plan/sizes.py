"""The sizes that memory and time are told from: the model's, from its header, and the task's, in tokens.

model_sizes(header) → ModelSizes(architecture="llama", hidden=576, n_layers=30, ..., file_bytes=98362432)
task_tokens(task, settings, 200) → TaskTokens(instruction=80, demonstrations=210, input=40, answer=3, ...)
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from sg_local.architectures import ARCHITECTURES, ATTENTION, CONV
from sg_local.dimensions import Dimensions, read_dimensions, read_size
from sg_local.files import Faults
from sg_local.gguf_header import GgufHeader
from sg_local.models import SHAPE_OF_HYBRID, Model
from sg_local.settings import LEAST_INPUT_LIMIT, Settings, input_limit
from sg_local.task import Task

# Bytes of text in a token. English has 4 and more; Llama 2's vocabulary goes down to 2 or 3 in other languages.
BYTES_PER_TOKEN = 3
MOST_BYTES_PER_TOKEN = 6  # of a whole text: what has more of them for each token of room does not fit
LEAST_BYTES_IN_16_BITS = 1.8  # of a weight: Q8_0 has 1.06, and a published size is rounded
ENGLISH_BYTES_PER_TOKEN = 4
TURN_TOKENS = 8  # what a chat format puts around a turn


@dataclass(frozen=True)
class ModelSizes(Dimensions):
    """What of a model the estimates depend on: its dimensions, and how its file holds them."""

    architecture: str
    context_length: int
    file_bytes: int
    embedding_bytes: int  # of token_embd as the file has it
    is_tied: bool  # the output matrix is the token embedding
    is_quantized: bool

    @property
    def matrices(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Matrices of the layers: target_modules' name for them, (rows, columns), and how many layers have them."""
        return [
            (spec.module, self.sizes(spec.shape), sum(map(spec.is_in, self.kinds)))
            for spec in ARCHITECTURES[self.architecture].matrices
        ]

    @property
    def keeps_scores(self) -> bool:
        """Whether torch computes its attention without a kernel, so that all scores are in memory."""
        return ARCHITECTURES[self.architecture].config.get("attn_implementation") == "eager"

    def trains_as_tree(self, settings: Settings) -> bool:
        """Whether what rows of a batch share stands in it once (finetune/train.py): each layer has to be attention."""
        return settings.prompt_tree and not settings.lora_dropout and not self.has_state

    @property
    def layer_parameters(self) -> int:
        """Weights in the matrices of all layers: what QLoRA holds in 4 bits."""
        return sum(n_layers * math.prod(shape) for _, shape, n_layers in self.matrices)

    @property
    def embedding_parameters(self) -> int:
        """Token embedding and output matrix; norms are too few to count."""
        return self.vocab * self.hidden * (1 if self.is_tied else 2)

    @property
    def n_parameters(self) -> int:
        return self.layer_parameters + self.embedding_parameters

    def lora_parameters(self, rank: int, target_modules: str) -> int:
        """An adapter's weights: rank · (rows + columns) for each matrix that it changes."""
        modules = {name.strip() for name in target_modules.split(",")}
        return rank * sum(
            n_layers * sum(shape)
            for name, shape, n_layers in self.matrices
            if "all" in modules or name in modules
        )


@dataclass(frozen=True)
class TaskTokens:
    """About how many tokens the texts of a task have; `task_tokens` counts them."""

    instruction: int
    demonstrations: int
    input: int
    answer: int
    input_limit: int = LEAST_INPUT_LIMIT  # of a made input
    labels: int = 0  # all of them together; 0 where answers are free
    test_rows: int = 0


def model_sizes(header: GgufHeader) -> ModelSizes:
    """Reads the sizes of a model of a supported architecture.

    Raises InputError, a line for each size that is missing, no size, or contradicts another.
    """
    dimensions = read_dimensions(header)
    faults = Faults()
    context_length = read_size(header, "context_length", faults)
    faults.raise_any()
    embedding = header.tensor("token_embd.weight")
    return ModelSizes(
        **asdict(dimensions),
        architecture=header.architecture,
        context_length=context_length,
        file_bytes=header.size_bytes,
        embedding_bytes=embedding.size_bytes if embedding else 0,
        is_tied=header.tensor("output.weight") is None,
        is_quantized=any(tensor.type_name not in ("F32", "F16", "BF16") for tensor in header.tensors),
    )


def listed_sizes(model: Model) -> ModelSizes:
    """The sizes of a listed model that has a shape, without its file. What its types are is told from its size."""
    shape = model.shape or {}
    n_attention = shape.get(SHAPE_OF_HYBRID, 0)
    # Which layers have attention changes no estimate, and a convolution's kernel is too small to count.
    kinds = (ATTENTION,) * n_attention + (CONV,) * (shape["n_layers"] - n_attention) if n_attention else ()
    sizes = ModelSizes(
        vocab=shape["vocab"],
        hidden=shape["hidden"],
        intermediate=shape["intermediate"],
        n_layers=shape["n_layers"],
        n_heads=shape["n_heads"],
        n_kv_heads=shape["n_kv_heads"],
        head_dim=shape["head_dim"],
        n_rotated=shape["head_dim"],
        architecture=model.architecture,
        context_length=shape["context_length"],
        file_bytes=model.size_bytes,
        embedding_bytes=0,
        is_tied=bool(shape["is_tied"]),
        is_quantized=True,
        layer_kinds=kinds,
    )
    bytes_per_weight = model.size_bytes / sizes.n_parameters
    return replace(
        sizes,
        embedding_bytes=int(bytes_per_weight * sizes.vocab * sizes.hidden),
        is_quantized=bytes_per_weight < LEAST_BYTES_IN_16_BITS,
    )


def task_tokens(
    task: Task,
    settings: Settings,
    test_rows: int,
    context_tokens: int = 0,
    real_inputs: Iterable[str] = (),
) -> TaskTokens:
    """Tokens of a task's texts by their length in bytes, on the large side.

    Rows are like the longest example, or the longest of the real inputs that fit context_tokens: others are dropped.
    """
    inputs = [_tokens(example.input) for example in task.examples]
    outputs = [_tokens(example.output) + 1 for example in task.examples]
    labels = [_tokens(label) + 1 for label in task.labels]
    limit = input_limit(settings.max_input_tokens, inputs)
    instruction = _tokens(task.instruction) + TURN_TOKENS
    demonstrations = sum(inputs) + sum(outputs) + 2 * TURN_TOKENS * len(inputs)
    room = context_tokens - instruction - demonstrations - TURN_TOKENS
    longest_real = max((_tokens(text) for text in real_inputs if _may_fit(text, room)), default=0)
    return TaskTokens(
        instruction=instruction,
        demonstrations=demonstrations,
        input=max(min(max(inputs), limit), min(longest_real, room)) + TURN_TOKENS,
        input_limit=limit,
        answer=min(max(labels or outputs), settings.max_new_tokens),
        labels=sum(labels),
        test_rows=min(test_rows, settings.max_test_rows),
    )


def mean_tokens(
    task: Task, settings: Settings, test_inputs: Sequence[str], real_inputs: Sequence[str] = ()
) -> TaskTokens:
    """The same for texts of middle length, and of a token as long as English has it: what time is told from.

    Made inputs are as long as the examples', unless there are real ones; test rows too where there are some.
    """
    texts = [*real_inputs, *test_inputs] or [example.input for example in task.examples]
    answers = task.labels or [example.output for example in task.examples]
    shown = [text for example in task.examples for text in (example.input, example.output)]
    return TaskTokens(
        instruction=_mean_tokens([task.instruction]) + TURN_TOKENS,
        demonstrations=len(shown) * (_mean_tokens(shown) + TURN_TOKENS),
        input=_mean_tokens(texts),
        input_limit=input_limit(
            settings.max_input_tokens, [_mean_tokens([example.input]) for example in task.examples]
        ),
        answer=min(_mean_tokens(answers) + 1, settings.max_new_tokens),
        labels=sum(_mean_tokens([label]) + 1 for label in task.labels),
        test_rows=min(len(test_inputs), settings.max_test_rows),
    )


def _mean_tokens(texts: Sequence[str]) -> int:
    n_bytes = sum(len(text.encode()) for text in texts) / max(1, len(texts))
    return math.ceil(n_bytes / ENGLISH_BYTES_PER_TOKEN)


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode()) / BYTES_PER_TOKEN)


def _may_fit(text: str, room: int) -> bool:
    return len(text.encode()) <= MOST_BYTES_PER_TOKEN * room
