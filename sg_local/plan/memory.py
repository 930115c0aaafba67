"""How much memory and disk each stage of a run takes, told from the model's header, the settings and the task.

    estimate(model_sizes(header), Settings(load_in_4bit=True), task_tokens(task, settings), on_gpu=True)
    -> [..., Need("train", gpu={"weights": 3.9e9, "LoRA weights": 1.6e8, ...}, host={...}, disk={...}), ...]

Pure functions over numbers of bytes; nothing is measured or imported here. Sources: llama.cpp's own report of its
buffers (`llama_context: CPU compute buffer size`), torch's saved tensors counted on SmolLM2-135M, QLoRA (arXiv
2305.14314). Checked against the peak memory of real runs on a CPU (tests/unit/test_memory.py). Nothing was measured
on a GPU.

What grows with the size of the model: weights, LoRA and what belongs to it, key-value memory, activations. What does
not: imported libraries. What grows with the vocabulary: logits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sg_local.architectures import LINEAR
from sg_local.plan.sizes import ModelSizes, TaskTokens
from sg_local.selfguide.contenders import Contender
from sg_local.settings import Settings

GIB = 1024**3

# Resident size after the imports of a stage: SmolLM2 runs on x86_64 with Linux, torch 2.13 for the CPU.
LLAMA_PROCESS_BYTES = 70_000_000
TRAINING_PROCESS_BYTES = 570_000_000  # 560 with PEFT alone, 568 with Unsloth
PROOF_PROCESS_BYTES = 550_000_000
# With a GPU: not measured. CUDA's context and kernels on the card, its libraries in host memory.
CUDA_CONTEXT_BYTES = 600_000_000
CUDA_LIBRARIES_BYTES = 1_500_000_000

# llama/engine.py; llama.cpp makes a key-value memory of whole blocks of 256 tokens.
N_BATCH = 512
KV_BLOCK_TOKENS = 256
STATE_SEQUENCES = 8  # at least, where each sequence has a state

DELTA_RULE_CHUNK = 64  # tokens; transformers' chunk_gated_delta_rule

# NF4 (QLoRA, section 3): 4 bits; an 8-bit constant for 64 weights; a 32-bit one for 256 of these.
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# Adam keeps two numbers for a parameter; in 8 bits with a 32-bit constant for 256 (bitsandbytes).
ADAM_BYTES, ADAM_8_BIT_BYTES = 8.0, 2 * (1 + 4 / 256)

# An attention score that autograd keeps twice, capped and as a probability, in Gemma 2: saved_tensors_hooks counted it
# in float32 and in bfloat16.
SCORE_BYTES = 8

# A 16-bit copy is made for the CPU where it takes no more than this share of the memory (proof/working_copies.py).
MAX_COPY_SHARE_OF_MEMORY = 0.25
MAX_SHARD_BYTES = GIB  # gguf_io/base_weights.py
PROOF_PROMPTS = 16  # proof/parity.py
NEAR_PROMPTS, LEAST_NEAR_PROMPTS, NEAR_TOKENS = 48, 16, 8  # proof/near.py
PROOF_TOKENS_AT_ONCE = 4096  # finetune/reference.py
CHECKPOINTS = 3  # finetune/train.py keeps two, and one more while it is written

LEAST_N_CTX = 512  # below, a batch could not be filled

# Where the merged file is as large as the base; with auto, if its types are fine enough.
KEEPS_TYPES = ("auto", "base")
# Bytes of a weight in a quantized file: Llama 2 7B's published files by its 6.74 billion weights.
QUANT_BYTES = {"F16": 2.0, "Q8_0": 1.063, "Q6_K": 0.82, "Q5_K_M": 0.71, "Q4_K_M": 0.606, "Q4_0": 0.568}


@dataclass(frozen=True)
class Need:
    """What one stage takes at its peak, in bytes by part. `tokens`: that it computes, about."""

    step: str
    gpu: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    # Pages of files that were read. They count as resident, and the system takes them back where it needs room.
    cache: dict[str, int] = field(default_factory=dict)
    run_disk: dict[str, int] = field(default_factory=dict)
    store_disk: dict[str, int] = field(default_factory=dict)  # the model's 16-bit copy, one at a time
    tokens: int = 0

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def resident_bytes(self) -> int:
        """What the system reports as the process's peak: with the pages that it could take back."""
        return self.host_bytes + sum(self.cache.values())

    @property
    def disk_bytes(self) -> int:
        return sum(self.run_disk.values()) + sum(self.store_disk.values())


def estimate(
    model: ModelSizes, settings: Settings, tokens: TaskTokens, *, on_gpu: bool, memory_bytes: int = 0
) -> list[Need]:
    """The needs of the stages, in order. memory_bytes: the machine's, which decides about 16-bit copies; 0: any."""
    copies = (
        not on_gpu
        and model.is_quantized
        and settings.working_copy == "auto"
        and (not memory_bytes or 2 * model.n_parameters <= MAX_COPY_SHARE_OF_MEMORY * memory_bytes)
    )
    copy = {"16-bit GGUF": 2 * model.n_parameters}
    prefix = tokens.instruction + tokens.demonstrations
    scores_labels = tokens.labels > 0 and settings.label_answers == "scores"
    answers = tokens.labels if scores_labels else settings.n_samples * tokens.answer
    n_prompts = settings.n_layouts if scores_labels else 1
    n_inputs = settings.n_inputs
    makes = replace(
        _engine("generate", model, settings, on_gpu, 2 * model.n_parameters if copies else model.file_bytes),
        store_disk=copy if copies else {},
    )
    annotate = replace(
        makes,
        step="annotate",
        tokens=n_prompts * (prefix + n_inputs * (tokens.input + answers)),
        store_disk={},
    )
    if scores_labels:  # the labels' logits alone are read
        read = N_BATCH * tokens.labels // (tokens.input + tokens.labels)
        annotate = replace(annotate, host={**annotate.host, "logits": 4 * read * model.vocab})
    export = replace(_export(model, settings, tokens, on_gpu), store_disk=copy)
    return [
        replace(makes, tokens=prefix + n_inputs * tokens.input),
        annotate,
        _train(model, settings, tokens, on_gpu),
        export,
        replace(
            _engine("evaluate", model, settings, on_gpu, model.file_bytes),
            tokens=sum(contender.is_expected(with_labels=tokens.labels > 0) for contender in Contender)
            * (prefix + tokens.test_rows * (tokens.input + tokens.answer)),
        ),
    ]


def kv_cache_bytes(model: ModelSizes, n_ctx: int, n_sequences: int) -> int:
    """llama.cpp's key-value memory in 16 bits: keys and values of all layers, n_ctx tokens (engine.py caps them)."""
    n_tokens = min(n_ctx, model.context_length * n_sequences)
    n_tokens = math.ceil(n_tokens / KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS
    return n_tokens * model.n_attention_layers * 2 * model.n_kv_heads * model.head_dim * 2


def state_bytes(model: ModelSizes, n_sequences: int) -> int:
    """llama.cpp's states in 32 bits: one for each sequence, which engine.py makes, and for what all begin with."""
    return 4 * model.state_numbers * (max(n_sequences, STATE_SEQUENCES) + 1)


def batch_tokens(model: ModelSizes, settings: Settings, tokens: TaskTokens) -> int:
    """Tokens of a training batch: in a tree what rows share stands once (finetune/batches.py), else in each row."""
    shared = _trained_prompt(settings, tokens)
    own = tokens.input + tokens.answer
    if model.trains_as_tree(settings):
        return shared + settings.batch_size * own
    return settings.batch_size * (shared + own)


def _trained_prompt(settings: Settings, tokens: TaskTokens) -> int:
    """What all rows that are trained on, and compared after it, begin with."""
    return tokens.instruction + (tokens.demonstrations if settings.train_demonstrations else 0)


def _engine(
    step: str,
    model: ModelSizes,
    settings: Settings,
    on_gpu: bool,
    weights_bytes: int,
    n_outputs: int = N_BATCH,
) -> Need:
    """llama.cpp with one context: weights, key-value memory, and buffers for a batch of 512 tokens.

    n_outputs: tokens of a batch whose logits are read. In host memory, pages of a buffer that nothing was written to do
    not count.
    """
    kv = kv_cache_bytes(model, settings.n_ctx, settings.n_parallel)
    state = {"states of sequences": state_bytes(model, settings.n_parallel)} if model.has_state else {}
    # Its largest node is the logits of a whole batch: 98.3 MiB reported for a vocabulary of 49,152, of which 96 are
    # these. Attention scores are never whole in memory: flash attention is on by itself.
    written = N_BATCH if on_gpu else n_outputs
    compute = 4 * (written * model.vocab + N_BATCH * model.hidden)
    # The logits that are read, in host memory on any device; grown to what a batch asked for.
    outputs = {"logits": 4 * n_outputs * model.vocab}
    host = {"process": LLAMA_PROCESS_BYTES}
    n_offloaded = model.n_layers + 1 if settings.n_gpu_layers < 0 else settings.n_gpu_layers
    share = min(1.0, n_offloaded / (model.n_layers + 1)) if on_gpu else 0.0
    if not share:
        return Need(
            step,
            {},
            {
                **host,
                "weights": weights_bytes,
                "KV cache": kv,
                **state,
                "compute buffers": compute,
                **outputs,
            },
        )
    # The token embedding stays in host memory; where it is the output matrix too, the card gets a copy.
    on_card = weights_bytes - (0 if model.is_tied else model.embedding_bytes)
    gpu = {
        "weights": int(share * on_card),
        "KV cache": int(share * kv),
        **{part: int(share * n_bytes) for part, n_bytes in state.items()},
        "compute buffers": compute,
        "CUDA": CUDA_CONTEXT_BYTES,
    }
    host |= {
        "CUDA libraries": CUDA_LIBRARIES_BYTES,
        "weights": int((1 - share) * on_card) + model.embedding_bytes,
        "KV cache": int((1 - share) * kv),
        **{part: int((1 - share) * n_bytes) for part, n_bytes in state.items()},
        **outputs,
    }
    return Need(step, gpu, host, {"file pages": int(share * on_card)})


def _train(model: ModelSizes, settings: Settings, tokens: TaskTokens, on_gpu: bool) -> Need:
    """Torch with the base weights frozen and LoRA on them."""
    lora = model.lora_parameters(settings.rank, settings.target_modules)
    adam = int((ADAM_8_BIT_BYTES if on_gpu else ADAM_BYTES) * lora)
    n_tokens = batch_tokens(model, settings, tokens)
    width = 2 if on_gpu else 4  # bytes of a number in a forward pass: 16 bits on a GPU, 32 on a CPU
    parts = {
        "weights": _training_weights(model, settings, width),
        # 32 bits also on a GPU: PEFT and Unsloth keep an adapter in float32.
        "LoRA weights": 4 * lora,
        "gradients": 4 * lora,
        # Before the first step there is in its place the gradient that a tree's is compared with.
        "optimizer": max(adam, 4 * lora),
        **_activations(model, settings, n_tokens, on_gpu),
        # Read only where a token of an answer is predicted (finetune/loss.py): logits, their softmax, its gradient.
        "logits": 3 * 4 * settings.batch_size * tokens.answer * model.vocab,
    }
    host = {"process": TRAINING_PROCESS_BYTES}
    gpu = {}
    if on_gpu:
        gpu = {**parts, "CUDA": CUDA_CONTEXT_BYTES}
        host |= {"CUDA libraries": CUDA_LIBRARIES_BYTES, "a shard while loading": _shard_bytes(model)}
    else:
        # What glibc keeps of freed blocks: measured 0.8 to 1.1 times the activations of all layers, with
        # checkpointing as well as without, at 272, 396 and 528 tokens in a batch of SmolLM2.
        host |= parts | {"kept by the allocator": n_tokens * _all_layers_bytes(model, settings, 4)}
    rows = math.ceil(settings.n_inputs / settings.batch_size)
    return Need(
        "train",
        gpu,
        host,
        {"file pages": 2 * model.n_parameters},
        run_disk={"adapter": 4 * lora, "checkpoints": CHECKPOINTS * (4 * lora + adam)},
        store_disk={"16-bit safetensors": 2 * model.n_parameters},
        tokens=settings.epochs * rows * n_tokens,
    )


def _training_weights(model: ModelSizes, settings: Settings, width: int) -> int:
    if not settings.load_in_4bit:
        return width * model.n_parameters
    # PEFT's prepare_model_for_kbit_training makes what is not in 4 bits float32: embedding, output matrix, norms.
    embedding_width = 4 if settings.trainer == "peft" else width
    # One matrix at a time is back in full width while it is multiplied.
    largest = width * max(math.prod(shape) for _, shape, _ in model.matrices)
    return int(NF4_BYTES * model.layer_parameters) + embedding_width * model.embedding_parameters + largest


def _all_layers_bytes(model: ModelSizes, settings: Settings, width: int) -> int:
    """What autograd saves of one token in all layers."""
    return sum(_layer_bytes(model, settings, width, kind) for kind in model.kinds)


def _layer_bytes(model: ModelSizes, settings: Settings, width: int, kind: str) -> int:
    """What autograd saves of one token in one layer with LoRA on its matrices.

    float32: the two norms' inputs. In the width of the pass: the norms' outputs, queries, keys and values with keys and
    values repeated for all heads, attention's output, gate, its SiLU, up, their product, and the rank's numbers for 7
    matrices. For SmolLM2 43,456 bytes; saved_tensors_hooks counted 43,517.

    Linear attention, as torch computes it without a kernel of its own, is counted for eight sizes of it in float32: 6
    and 21 numbers for each of the keys and values, 342 for each head (pairs within a chunk of 64), and a state for each
    chunk. Its neighbours with gated attention keep 8.5 numbers where others keep 4.
    """
    common = 4 * 2 * model.hidden + width * (2 * model.hidden + 4 * model.intermediate + 7 * settings.rank)
    if kind == LINEAR:
        keys = model.n_key_heads * model.linear_head_dim
        states = model.value_rows * model.linear_head_dim // DELTA_RULE_CHUNK
        return common + 4 * (6 * keys + 21 * model.value_rows + 342 * model.n_value_heads + states)
    q = model.n_heads * model.head_dim
    return common + width * (17 * q // 2 if LINEAR in model.kinds else 4 * q)


def _activations(model: ModelSizes, settings: Settings, n_tokens: int, on_gpu: bool) -> dict[str, int]:
    width = 2 if on_gpu else 4
    layers = n_tokens * _all_layers_bytes(model, settings, width)
    layer = n_tokens * max(_layer_bytes(model, settings, width, kind) for kind in set(model.kinds))
    # A tree's mask is added to the attention scores as numbers, in each layer anew.
    is_tree = model.trains_as_tree(settings)
    mask = width * n_tokens**2 if is_tree else 0
    if model.keeps_scores:
        mask += SCORE_BYTES * model.n_heads * n_tokens**2 // (1 if is_tree else settings.batch_size)
    if settings.uses_checkpointing(on_gpu):
        # The input of every layer, and all of the one that is computed again, with its gradients.
        return {"activations": n_tokens * model.hidden * model.n_layers * width + 2 * (layer + mask)}
    return {"activations": layers + model.n_layers * mask + layer}


def _export(model: ModelSizes, settings: Settings, tokens: TaskTokens, on_gpu: bool) -> Need:
    """The proof is the peak: torch on the CPU, or before it llama.cpp with the 16-bit copy or model.gguf.

    Merging goes by blocks of 256 thousand numbers, and holds the adapter.
    """
    lora = model.lora_parameters(settings.rank, settings.target_modules)
    merged = model.file_bytes
    if settings.quant not in KEEPS_TYPES:
        merged = int(QUANT_BYTES[settings.quant] * model.n_parameters)
    longest = _trained_prompt(settings, tokens) + tokens.input + tokens.answer
    # One process does all of it, and has CUDA's libraries once a model was on the card.
    process = {"process": PROOF_PROCESS_BYTES, **({"CUDA libraries": CUDA_LIBRARIES_BYTES} if on_gpu else {})}
    # For each token of an answer, and one prompt's in the making: of torch and llama.cpp with and without the adapter,
    # and one more where the base is looked at alone; then, near the decision too, of torch and one file.
    n_near = _near_prompts(settings)
    near = n_near * (min(tokens.answer, NEAR_TOKENS) + 1)
    rows = PROOF_PROMPTS * tokens.answer
    logits = 4 * model.vocab * (max(4 * rows, 3 * rows + near, 2 * (rows + near)) + longest)
    n_prompts = PROOF_PROMPTS + n_near
    at_once = max(longest, min(n_prompts * longest, PROOF_TOKENS_AT_ONCE))
    torch_host = {
        **process,
        **_reference(model, at_once, longest),
        "LoRA weights": 2 * 4 * lora,
        "logits": logits,
    }
    needed = replace(settings, n_parallel=1, n_ctx=max(LEAST_N_CTX, longest))
    # Those of answers alone are read, of many prompts behind what they share.
    n_outputs = max(1, N_BATCH * tokens.answer // (tokens.input + tokens.answer))
    served = _engine("export", model, needed, on_gpu, merged, n_outputs)
    in_16_bit = _engine("export", model, needed, False, 2 * model.n_parameters, n_outputs)
    hosts, resident = [torch_host], [sum(torch_host.values())]
    for engine in (served, in_16_bit):
        parts = {**engine.host, **process}
        if not engine.gpu:  # nothing is repacked there, so all weights are pages of the file
            parts.pop("weights")
        hosts.append(parts)
        resident.append(sum(process.values()) + engine.resident_bytes - engine.host["process"])
    host = max(hosts, key=lambda parts: sum(parts.values()))
    is_made_of_another = settings.quant not in (*KEEPS_TYPES, "F16", "Q8_0")
    between = {"one while another is written": merged} if is_made_of_another else {}
    return Need(
        "export",
        served.gpu,
        host,
        {"file pages": max(resident) - sum(host.values())},
        run_disk={"adapter.gguf": 4 * lora, "model.gguf": merged, **between},
        tokens=(PROOF_PROMPTS * 4 + n_near * 2) * longest,
    )


def _near_prompts(settings: Settings) -> int:
    """How many rows near the decision are compared: of those that curate drops as unsure; none of too few."""
    n_unsure = settings.n_inputs - math.ceil(settings.keep_confident * settings.n_inputs)
    return min(n_unsure, NEAR_PROMPTS) if n_unsure >= LEAST_NEAR_PROMPTS else 0


def _reference(model: ModelSizes, at_once: int, longest: int) -> dict[str, int]:
    """What torch holds of weights and activations where that is most: in a layer, or at the output matrix.

    Each is read when it computes (finetune/reference.py): in 16 bits, and then in 32. There are no gradients, so one
    layer's activations at a time, for as many prompts as are computed at once.
    """
    q = model.n_heads * model.head_dim
    scores = 3 * model.n_heads * longest if model.keeps_scores else 0
    in_a_layer = 4 * model.hidden + 4 * q + 3 * model.intermediate + scores
    moments = [
        (model.layer_parameters // model.n_layers, in_a_layer),
        (model.vocab * model.hidden, 2 * model.hidden),
    ]
    part, numbers = max(moments, key=lambda moment: (2 + 4) * moment[0] + 4 * at_once * moment[1])
    return {"a part of the weights": (2 + 4) * part, "activations": 4 * at_once * numbers}


def finer_disk_bytes(model: ModelSizes) -> int:
    """Disk for model.gguf in Q8_0, the finest that `auto` makes where the base's types prove too coarse."""
    return int(QUANT_BYTES["Q8_0"] * model.n_parameters)


def _shard_bytes(model: ModelSizes) -> int:
    return min(2 * model.n_parameters, MAX_SHARD_BYTES)


# What may be changed where training does not fit: settings and their values, the least painful first.
_TRAINING_REMEDIES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("gradient_checkpointing", ("always",)),
    ("load_in_4bit", (True,)),
    ("batch_size", (4, 2, 1)),
)


def remedies(
    step: str, model: ModelSizes, settings: Settings, tokens: TaskTokens, *, on_gpu: bool
) -> Iterator[Settings]:
    """Settings under which the stage takes less and less memory, the least painful first."""
    if step == "train":
        for name, values in _TRAINING_REMEDIES:
            if name == "gradient_checkpointing" and settings.uses_checkpointing(on_gpu):
                continue
            for value in values:
                if name != "batch_size" or value < settings.batch_size:
                    settings = _changed(settings, name, value)
                    yield settings
        return
    if model.has_state:
        for n_parallel in (16, STATE_SEQUENCES):
            if n_parallel < settings.n_parallel:
                settings = replace(settings, n_parallel=n_parallel)
                yield settings
    # A sequence has to fit: a prompt with its answer.
    least = tokens.instruction + tokens.demonstrations + tokens.input
    least += max(tokens.input_limit, settings.max_new_tokens)
    while settings.n_ctx // 2 >= max(least, LEAST_N_CTX):
        settings = replace(settings, n_ctx=settings.n_ctx // 2)
        yield settings
    if on_gpu and settings.n_gpu_layers < 0:
        for n_layers in range(model.n_layers, -1, -1):
            yield replace(settings, n_gpu_layers=n_layers)


def _changed(settings: Settings, name: str, value: Any) -> Settings:
    changes: dict[str, Any] = {name: value}
    return replace(settings, **changes)
