"""What tests/gpu/run measures, each in a process of its own: `work.py scores MODEL ...` prints one line of JSON.

    work.py speed v7b.gguf 96 -1     {"tokens_per_second": 2310.4, "wall_over_decode": 1.06, ...}
    work.py train ...                {"batches": "tree", "tree_check": {...}, "rope": {...}, "peak_mib": 6100.2}

A process each, because a fault of native code ends it, and because memory is given back when it ends.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

N_SEQUENCES = 32


def tokens(draw: random.Random, count: int, n_vocab: int) -> tuple[int, ...]:
    """Random ids that are no special token."""
    return tuple(draw.randrange(300, n_vocab) for _ in range(count))


def scores(model: str, n_gpu_layers: str) -> dict[str, Any]:
    """log p of four labels after 16 prompts that share 40 tokens."""
    from sg_local.llama.engine import open_engine
    from sg_local.llama.scoring import label_logprobs

    draw = random.Random(0)
    with open_engine(Path(model), n_ctx=2048, n_parallel=8, n_gpu_layers=int(n_gpu_layers)) as engine:
        n_vocab = engine.tokenizer.n_vocab
        shared = tokens(draw, 40, n_vocab)
        prompts = [(1, *shared, *tokens(draw, 20, n_vocab)) for _ in range(16)]
        labels = [(*tokens(draw, 2, n_vocab), 2) for _ in range(4)]
        return {"scores": label_logprobs(engine, prompts, labels)}


def answers(model: str, n_gpu_layers: str) -> dict[str, Any]:
    """Greedy answers of 24 tokens to 16 prompts, and how far the chosen token is ahead of the second at each place."""
    import numpy as np

    from sg_local.llama.engine import open_engine
    from sg_local.llama.generation import Request, generate
    from sg_local.llama.scoring import sequence_logits

    draw = random.Random(1)
    with open_engine(Path(model), n_ctx=2048, n_parallel=16, n_gpu_layers=int(n_gpu_layers)) as engine:
        n_vocab = engine.tokenizer.n_vocab
        prompts = [(1, *tokens(draw, 30, n_vocab)) for _ in range(16)]
        given = [answer.token_ids for answer in generate(engine, [Request(prompt, 24) for prompt in prompts])]
        leads = []
        for prompt, answer in zip(prompts, given, strict=True):
            best = np.sort(sequence_logits(engine, (*prompt, *answer[:-1]), len(prompt) - 1), axis=-1)
            leads.append([float(row[-1] - row[-2]) for row in best])
    return {"answers": given, "leads": leads}


def sixteen_bit_copy(model: str, copy: str) -> dict[str, Any]:
    """The same weights in 16 bits, with which llama.cpp does not quantize activations."""
    from sg_local.llama.quantize import requantize

    requantize(Path(model), Path(copy), "F16")
    return {"bytes": Path(copy).stat().st_size}


def answering_speed(engine: Any, name: str, requests: list[Any]) -> dict[str, float]:
    """Tokens a second of these requests, and their time as a multiple of llama_decode's."""
    from sg_local.llama.generation import generate

    counters = engine.counters
    before = counters.seconds, counters.decode_seconds, counters.generated_tokens
    generate(engine, requests)
    wall, decode = counters.seconds - before[0], counters.decode_seconds - before[1]
    return {
        f"{name}_tokens_per_second": round((counters.generated_tokens - before[2]) / wall, 1),
        f"{name}_wall_over_decode": round(wall / decode, 3),
    }


def highest_logits(model: str, n_steps: str, n_gpu_layers: str, n_ctx: str) -> dict[str, Any]:
    """Generation and evaluation with the highest logits found in numpy, and by llama.cpp's backend samplers."""
    from sg_local.llama.engine import open_engine
    from sg_local.llama.generation import Request, generate

    found: dict[str, Any] = {}
    for place, is_on in (("numpy", False), ("backend", True)):
        draw = random.Random(0)
        with open_engine(
            Path(model),
            n_ctx=int(n_ctx),
            n_parallel=N_SEQUENCES,
            n_gpu_layers=int(n_gpu_layers),
            has_backend_top_k=is_on,
        ) as engine:
            prompts = [(1, *tokens(draw, 100, engine.tokenizer.n_vocab)) for _ in range(N_SEQUENCES)]
            for name, sampled in (
                ("generate", {"temperature": 0.9, "top_k": 40, "min_p": 0.05}),
                ("evaluate", {}),
            ):
                requests = [
                    Request(prompt, int(n_steps), seed=seed, **sampled)  # type: ignore[arg-type]
                    for seed, prompt in enumerate(prompts)
                ]
                generate(engine, [Request(prompt, 4, **sampled) for prompt in prompts])  # type: ignore[arg-type]
                found.update(answering_speed(engine, f"{name}_{place}", requests))
                found[f"{name}_{place}_top_k"] = engine.backend_top_k
    return found


def speed(model: str, n_steps: str, n_gpu_layers: str, n_ctx: str) -> dict[str, Any]:
    """Tokens a second of what the stages ask for, beside the same number of steps of llama_decode alone."""
    import llama_cpp

    from sg_local.llama.engine import BatchToken, open_engine
    from sg_local.llama.generation import Request, generate
    from sg_local.llama.scoring import label_logprobs

    draw, count = random.Random(0), int(n_steps)
    found: dict[str, Any] = {"offers_gpu": bool(llama_cpp.llama_supports_gpu_offload())}
    with open_engine(
        Path(model), n_ctx=int(n_ctx), n_parallel=N_SEQUENCES, n_gpu_layers=int(n_gpu_layers)
    ) as engine:
        n_vocab = engine.tokenizer.n_vocab
        shared = (1, *tokens(draw, 200, n_vocab))
        prompts = [(*shared, *tokens(draw, 30, n_vocab)) for _ in range(N_SEQUENCES)]
        sampled: dict[str, Any] = {"temperature": 0.9, "top_k": 40, "min_p": 0.05}
        counters = engine.counters

        def timed(name: str, requests: list[Request]) -> None:
            found.update(answering_speed(engine, name, requests))

        generate(engine, [Request(prompt, 4, seed=1, **sampled) for prompt in prompts])  # the first is slower
        timed("generate", [Request(prompt, count, seed=i, **sampled) for i, prompt in enumerate(prompts)])
        timed("annotate", [Request(prompts[i // 10], count, seed=i, **sampled) for i in range(160)])
        timed("evaluate", [Request(prompt, count) for prompt in prompts])
        labels = [(*tokens(draw, 2, n_vocab), 2) for _ in range(4)]
        before_score = counters.seconds, counters.decode_seconds
        label_logprobs(engine, prompts, labels)
        found["scored_prompts_per_second"] = round(N_SEQUENCES / (counters.seconds - before_score[0]), 1)
        found["score_wall_over_decode"] = round(
            (counters.seconds - before_score[0]) / (counters.decode_seconds - before_score[1]), 3
        )

        # The batches of `generate`, through llama_decode alone.
        engine.clear()
        engine.hold_prefix(shared)
        for number in range(1, N_SEQUENCES + 1):
            engine.fork(0, number, len(shared))
        for step in range(count + 4):
            if step == 4:
                started = time.perf_counter()
            engine.decode(
                [BatchToken(500 + i, len(shared) + step, [i], True) for i in range(1, N_SEQUENCES + 1)]
            )
        found["llama_decode_tokens_per_second"] = round(
            N_SEQUENCES * count / (time.perf_counter() - started), 1
        )
    return found


def weights(model: str, directory: str) -> dict[str, Any]:
    """16-bit random weights of the model's shape, for torch: dequantizing 7 billion of them takes minutes."""
    import torch
    from safetensors.torch import save_file

    from sg_local.dimensions import read_dimensions
    from sg_local.gguf_header import read_model_header
    from sg_local.gguf_io.hf_config import hf_config
    from sg_local.gguf_io.tensors import model_tensors

    header = read_model_header(Path(model))
    dimensions, place = read_dimensions(header), Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(hf_config(header, dimensions, print)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index: dict[str, str] = {}
    shard: dict[str, Any] = {}

    def flush() -> None:
        name = f"model-{len(set(index.values())):05}.safetensors"
        save_file(shard, place / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in model_tensors(header, dimensions).items():
        if not tensor.hf or (tensor.optional and header.tensor(name) is None):
            continue
        deviation = 0.0025 if "o_proj" in tensor.hf or "down_proj" in tensor.hf else 0.02
        values = torch.ones(tensor.shape)
        if len(tensor.shape) == 2:
            values = (torch.randn(tensor.shape, device=device) * deviation).half().cpu()
        shard[tensor.hf] = values
        if sum(part.numel() for part in shard.values()) > 2**29:
            flush()
    if shard:
        flush()
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return {"shards": len(set(index.values()))}


def only_float16() -> None:
    """Has the training do as on a card without bfloat16 (GTX 16, RTX 20, T4)."""
    import torch
    import unsloth

    import sg_local.finetune.train as training

    load = unsloth.FastLanguageModel.from_pretrained

    def in_float16(*arguments: Any, **named: Any) -> Any:
        return load(*arguments, **{**named, "dtype": torch.float16})

    unsloth.FastLanguageModel.from_pretrained = staticmethod(in_float16)
    training.has_bfloat16 = lambda: False


def train(
    work: str,
    weights_dir: str,
    gpu_gib: str,
    batches: str,
    kind: str,
    n_tokens: str,
    n_shared: str,
    pad: str,
    trainer: str,
) -> dict[str, Any]:
    """Six steps of `train_adapter` on random rows, in a share of the card; what was loaded, and what it took.

    kind: "4 bit", "16 bit", or "float16": 16 bit without bfloat16.
    """
    from sg_local.finetune.environment import prepare_process

    place = Path(work).resolve()
    source = Path(weights_dir).resolve()
    prepare_process(place)
    if trainer == "unsloth":
        import unsloth  # noqa: F401 - before torch

    # isort: split
    import torch

    import sg_local.finetune.train as training
    from sg_local.finetune.batches import TrainRow
    from sg_local.finetune.stand_in_tokenizer import Vocabulary
    from sg_local.settings import TrainSettings

    has_gpu = torch.cuda.is_available()
    if kind == "float16":
        only_float16()
    if has_gpu and float(gpu_gib):
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, float(gpu_gib) * 2**30 / total))
    n_vocab = json.loads((source / "config.json").read_text())["vocab_size"]
    draw = random.Random(0)
    prefix = (1, *tokens(draw, int(n_shared), n_vocab))
    rows = [
        TrainRow((*prefix, *tokens(draw, int(n_tokens) - len(prefix) - 2, n_vocab)), (300 + i, 2))
        for i in range(48)
    ]
    seen: dict[str, Any] = {}
    load = training.load_with_lora

    def look(*arguments: Any, **named: Any) -> Any:
        model, tokenizer = load(*arguments, **named)
        causal = model.get_base_model()
        expected = (getattr(causal.config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        frequencies = getattr(causal, causal.base_model_prefix).rotary_emb.inv_freq.float().cpu()
        exponents = torch.arange(len(frequencies)) / len(frequencies)
        seen.update(
            rope_difference=float((frequencies * expected**exponents - 1).abs().max()),
            modules=list(model.modules()),
            rope=getattr(causal.config, "rope_parameters", None)
            or getattr(causal.config, "rope_scaling", None),
            dtype=str(causal.config.dtype),
            attention=getattr(causal.config, "_attn_implementation", None),
            forward=type(getattr(causal, causal.base_model_prefix)).forward.__module__,
            n_linear_4bit=sum(type(module).__name__ == "Linear4bit" for module in model.modules()),
            n_vocab=causal.get_input_embeddings().weight.shape[0],
            loaded_mib=torch.cuda.max_memory_reserved() / 2**20 if has_gpu else 0,
        )
        return model, tokenizer

    training.load_with_lora = look  # type: ignore[assignment]
    times: list[float] = []

    def on_step(_n_steps: int) -> None:
        times.append(time.perf_counter())
        seen["n_checkpointing"] = sum(
            bool(getattr(module, "gradient_checkpointing", False)) for module in seen["modules"]
        )

    settings = TrainSettings(
        trainer=trainer,
        rank=16,
        alpha=16.0,
        lora_dropout=0.0,
        learning_rate=1e-4,
        epochs=1,
        batch_size=8,
        load_in_4bit=kind == "4 bit",
        gradient_checkpointing="auto",
        prompt_tree=batches == "tree",
        checkpoint_seconds=3600,
        n_threads=0,
        seed=0,
    )
    vocabulary = Vocabulary(
        ["<unk>", "<s>", "</s>", *(f"t{index}" for index in range(n_vocab - 3))], 1, 2, int(pad)
    )
    result = training.train_adapter(
        source,
        vocabulary,
        rows,
        place / "adapter",
        place / "checkpoints",
        "random",
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        settings,
        on_step,
    )
    del seen["modules"]
    if has_gpu:
        seen["peak_mib"] = torch.cuda.max_memory_reserved() / 2**20
        seen["peak_allocated_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return {**result, **seen, "step_seconds": (times[-1] - times[-4]) / 3}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(globals()[name](*arguments), default=str))
