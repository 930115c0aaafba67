"""What memory.py tells beforehand, beside what was measured, and beside what is known of Llama 2 7B.

The recorded peaks are those of the task support-inbox on SmolLM2-135M-Instruct.Q4_1.gguf in November 2026: x86_64,
AMD EPYC, 2 processors, 24 GiB, Linux, no GPU; Python 3.11.7, torch 2.13.0+cpu, transformers 5.17.0, trl
1.15.0, peft 0.21.2, unsloth 2026.10.9, llama-cpp-python 0.3.36. `peak_memory_bytes` of manifest.json.
"""

import re
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import tiny_gguf
from gguf_models import FEED_FORWARD, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, METADATA, TOKENS, write_model
from known_sizes import LLAMA_2_7B, SMOLLM2
from messages import assert_says

from sg_local.architectures import ATTENTION, CONV
from sg_local.errors import InputError
from sg_local.finetune import reference, train
from sg_local.gguf_header import read_header
from sg_local.gguf_io import base_weights
from sg_local.llama.engine import Engine
from sg_local.llama.quantize import FILE_TYPES
from sg_local.plan import doctor, memory
from sg_local.plan.machine import Machine
from sg_local.plan.memory import (
    GIB,
    Need,
    batch_tokens,
    estimate,
    kv_cache_bytes,
    remedies,
    state_bytes,
)
from sg_local.plan.plan import USABLE_SHARE_OF_GPU, compare
from sg_local.plan.sizes import ModelSizes, TaskTokens, model_sizes, task_tokens
from sg_local.proof import near, parity
from sg_local.runs.directory import Run
from sg_local.settings import PRESETS, Settings
from sg_local.task import load_task

ROOT = Path(__file__).parents[2]
LEAST, MOST = 0.8, 1.25  # estimate / measured

# Random weights in SmolLM2's clothes, to see what grows with the size of a model.
RANDOM_321M = replace(
    SMOLLM2,
    file_bytes=643_711_680,
    embedding_bytes=100_663_296,
    hidden=1024,
    intermediate=2816,
    n_layers=24,
    n_heads=16,
    n_kv_heads=4,
    is_quantized=False,
)
QUICK = Settings(**PRESETS["quick"])
SETTINGS = {item.name: item for item in fields(Settings)}

# model, settings of the run over the preset quick, step -> peak in bytes
MEASURED: list[tuple[ModelSizes, dict[str, Any], str, int]] = [
    (SMOLLM2, {"n_inputs": 40}, "generate", 597_352_448),
    (SMOLLM2, {"n_inputs": 40}, "annotate", 509_865_984),
    (SMOLLM2, {"n_inputs": 40}, "train", 2_329_972_736),
    (SMOLLM2, {"n_inputs": 40}, "export", 780_238_848),
    (SMOLLM2, {"n_inputs": 40}, "evaluate", 443_629_568),
    (SMOLLM2, {"n_inputs": 64}, "export", 838_090_752),
    # These four in November 2026 too, on an Intel Xeon 2.80 GHz.
    (SMOLLM2, {"n_ctx": 16_384, "n_inputs": 64}, "generate", 773_160_960),
    (SMOLLM2, {"trainer": "peft"}, "train", 2_308_702_208),
    (
        SMOLLM2,
        {"trainer": "peft", "gradient_checkpointing": "always", "batch_size": 16},
        "train",
        2_038_878_208,
    ),
    (RANDOM_321M, {}, "train", 3_542_433_792),
]

# What plan/README.md assumes of a row: 256 tokens that all rows share, 256 of its own.
ROWS = TaskTokens(instruction=256, demonstrations=512, input=200, answer=56, test_rows=300)


def need(step: str, model: ModelSizes, settings: Settings, tokens: TaskTokens = ROWS, **where: Any) -> Need:
    """One step's estimate; on a GPU unless told otherwise."""
    found = estimate(model, settings, tokens, **{"on_gpu": True, **where})
    return next(item for item in found if item.step == step)


def ratio(model: ModelSizes, changes: dict[str, Any], step: str, measured: int) -> float:
    """Estimate by measured peak."""
    settings = replace(QUICK, **changes)
    tokens = task_tokens(load_task("support-inbox"), settings, 100)
    return need(step, model, settings, tokens, on_gpu=False, memory_bytes=24 * GIB).resident_bytes / measured


@pytest.mark.parametrize(("model", "changes", "step", "measured"), MEASURED)
def test_the_estimate_is_near_what_was_measured(
    model: ModelSizes, changes: dict[str, Any], step: str, measured: int
) -> None:
    assert LEAST <= ratio(model, changes, step, measured) <= MOST


def test_llama_2_7b_has_its_published_numbers() -> None:
    assert LLAMA_2_7B.n_parameters == pytest.approx(6_738_415_616, rel=1e-4)  # without norms
    assert LLAMA_2_7B.lora_parameters(16, "all") == 39_976_960
    assert LLAMA_2_7B.lora_parameters(8, "q_proj,v_proj") == 4_194_304  # PEFT's own example
    # llama.cpp: "KV self size = 2048.00 MiB" at 4096 tokens; 3820.94 MiB of weights on the card, 70.31 not
    assert kv_cache_bytes(LLAMA_2_7B, 4096, 32) == 2048 * 1024**2
    made = need("generate", LLAMA_2_7B, Settings())
    assert made.gpu["weights"] == pytest.approx(3820.94 * 1024**2, rel=1e-3)
    assert made.host["weights"] == pytest.approx(70.31 * 1024**2, rel=1e-3)
    # QLoRA, figure 6: 3.7 GB of 4-bit weights and 0.5 of embeddings for 7B, give or take
    trained = need("train", LLAMA_2_7B, Settings(load_in_4bit=True))
    assert 3.7e9 <= trained.gpu["weights"] <= 4.3e9


def test_what_autograd_saves_is_what_was_counted() -> None:
    # saved_tensors_hooks, SmolLM2 with rank 16, a tree of 272 tokens: 368,696,792 bytes with logits of 24 targets
    saved = 368_696_792 - 24 * 49_152 * 4
    layers = need(
        "train",
        SMOLLM2,
        Settings(gradient_checkpointing="never"),
        TaskTokens(instruction=80, demonstrations=0, input=21, answer=3),
        on_gpu=False,
    ).host["activations"]
    one_more = layers / 31  # the estimate has one layer of gradients more
    assert layers - one_more == pytest.approx(saved, rel=0.01)


# Of Qwen 3.5, linear attention and attention: heads and their width -> bytes of a token
COUNTED_OF_QWEN35 = [
    ("linear_attention", {"n_key_heads": 2, "n_value_heads": 4, "linear_head_dim": 16}, 14_564),
    ("linear_attention", {"n_key_heads": 4, "n_value_heads": 12, "linear_head_dim": 32}, 55_505),
    ("linear_attention", {"n_key_heads": 2, "n_value_heads": 4, "linear_head_dim": 128}, 61_625),
    ("full_attention", {"n_heads": 4, "n_kv_heads": 2, "head_dim": 32}, 7_411),
    ("full_attention", {"n_heads": 8, "n_kv_heads": 4, "head_dim": 64}, 20_508),
]


@pytest.mark.parametrize(("kind", "sizes", "counted"), COUNTED_OF_QWEN35)
def test_what_autograd_saves_of_a_token_in_qwen35(kind: str, sizes: dict[str, int], counted: int) -> None:
    """saved_tensors_hooks, float32, rank 16; of several layers one more."""

    def activations(n_layers: int) -> int:
        # One layer of the other kind, so that it is known for what it is.
        kinds = ("full_attention", "linear_attention", *[kind] * n_layers)
        model = replace(
            SMOLLM2,
            architecture="qwen35",
            hidden=64,
            intermediate=96,
            n_layers=len(kinds),
            layer_kinds=kinds,
            **sizes,
        )
        tokens = TaskTokens(instruction=80, demonstrations=0, input=21, answer=3)
        settings = Settings(gradient_checkpointing="never", batch_size=1)
        return need("train", model, settings, tokens, on_gpu=False).host["activations"]

    assert (activations(3) - activations(2)) / (80 + 21 + 3) == pytest.approx(counted, rel=0.03)


def test_each_sequence_has_a_state_in_qwen35() -> None:
    tiny = replace(
        SMOLLM2,
        architecture="qwen35",
        n_layers=2,
        layer_kinds=("linear_attention", "full_attention"),
        conv_tokens=4,
        n_key_heads=2,
        n_value_heads=4,
        linear_head_dim=16,
    )
    # llama.cpp: "RS buffer size = 0.35 MiB", "65 cells", R 0.10 MiB and S 0.25 MiB
    assert state_bytes(tiny, 64) == pytest.approx(0.35 * 1024**2, rel=0.02)
    assert state_bytes(tiny, 64) == 5 * state_bytes(tiny, 12) == pytest.approx(65 / 9 * state_bytes(tiny, 1))
    assert state_bytes(SMOLLM2, 64) == 0
    for on_gpu in (False, True):
        made = need("generate", tiny, Settings(), on_gpu=on_gpu)
        parts = made.gpu if on_gpu else made.host
        assert parts["states of sequences"] == state_bytes(tiny, Settings().n_parallel)
        assert "states of sequences" not in need("generate", SMOLLM2, Settings(), on_gpu=on_gpu).host
    # Rows do not share tokens there.
    assert batch_tokens(tiny, Settings(), ROWS) == batch_tokens(SMOLLM2, Settings(prompt_tree=False), ROWS)
    # What helps where they do not fit
    assert next(remedies("generate", tiny, Settings(), ROWS, on_gpu=False)).n_parallel < Settings().n_parallel


def test_the_attention_scores_of_gemma_2_are_in_memory() -> None:
    """saved_tensors_hooks: 8 bytes for each score of each head and layer, in float32 and in bfloat16."""
    tokens = TaskTokens(instruction=80, demonstrations=0, input=21, answer=3)
    settings = Settings(gradient_checkpointing="never", batch_size=8)
    gemma3, gemma2 = (replace(SMOLLM2, architecture=name) for name in ("gemma3", "gemma2"))
    for changes, n_scores in (({}, (80 + 8 * 24) ** 2), ({"prompt_tree": False}, 8 * (80 + 24) ** 2)):
        used = [
            need("train", model, replace(settings, **changes), tokens, on_gpu=False).host["activations"]
            for model in (gemma3, gemma2)
        ]
        assert used[1] - used[0] == 8 * n_scores * SMOLLM2.n_heads * SMOLLM2.n_layers


@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize(
    ("step", "name", "values"),
    [
        ("train", "rank", (4, 16, 64)),
        ("train", "batch_size", (1, 2, 8, 64)),
        ("generate", "n_ctx", (512, 2048, 4096, 16_384)),
        ("evaluate", "n_ctx", (512, 2048, 4096, 16_384)),
    ],
)
def test_more_needs_more(on_gpu: bool, step: str, name: str, values: tuple[int, ...]) -> None:
    for model in (SMOLLM2, RANDOM_321M, LLAMA_2_7B):
        found = []
        for value in values:
            changes: dict[str, Any] = {name: value, "max_input_tokens": 64, "max_new_tokens": 64}
            item = need(step, model, replace(Settings(), **changes), on_gpu=on_gpu)
            found.append(item.gpu_bytes if on_gpu else item.host_bytes)
        assert found == sorted(set(found))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_larger_model_needs_more_of_everything_that_grows(on_gpu: bool) -> None:
    models = (SMOLLM2, RANDOM_321M, LLAMA_2_7B)
    for step in ("train", "export"):
        found = [need(step, model, Settings(), on_gpu=on_gpu) for model in models]
        assert [item.host_bytes for item in found] == sorted(item.host_bytes for item in found)
        assert [item.disk_bytes for item in found] == sorted(item.disk_bytes for item in found)


def test_four_bits_and_checkpointing_need_less() -> None:
    for model in (SMOLLM2, LLAMA_2_7B):
        plain = need("train", model, Settings(gradient_checkpointing="never")).gpu_bytes
        checkpointed = need("train", model, Settings()).gpu_bytes
        both = need("train", model, Settings(load_in_4bit=True)).gpu_bytes
        assert both < checkpointed < plain
    # Embedding and output matrix are float32 there.
    assert need("train", LLAMA_2_7B, Settings(load_in_4bit=True, trainer="peft")).gpu_bytes > both


def test_what_rows_share_is_counted_once_in_a_tree() -> None:
    assert batch_tokens(SMOLLM2, Settings(), ROWS) == 256 + 8 * 256
    assert batch_tokens(SMOLLM2, Settings(prompt_tree=False), ROWS) == batch_tokens(
        SMOLLM2, Settings(lora_dropout=0.1), ROWS
    )
    assert batch_tokens(SMOLLM2, Settings(prompt_tree=False), ROWS) == 8 * 512
    assert batch_tokens(SMOLLM2, Settings(train_demonstrations=True), ROWS) == 256 + 512 + 8 * 256
    # A convolution looks at the tokens before, which in a tree are those of other rows too.
    hybrid = replace(SMOLLM2, architecture="lfm2", layer_kinds=(CONV, CONV, ATTENTION) * 10, conv_tokens=3)
    assert batch_tokens(hybrid, Settings(), ROWS) == 8 * 512


def test_annotating_costs_each_prompt_or_each_sample() -> None:
    labelled = replace(ROWS, labels=12)

    def tokens(rows: TaskTokens, **changes: Any) -> int:
        return need("annotate", SMOLLM2, Settings(n_inputs=10, **changes), rows).tokens

    assert tokens(labelled, n_layouts=1) == 768 + 10 * (200 + 12)
    assert tokens(labelled, n_layouts=3) == 3 * tokens(labelled, n_layouts=1)
    assert tokens(ROWS, n_samples=4) == 768 + 10 * (200 + 4 * 56)
    assert tokens(labelled, label_answers="samples") == tokens(ROWS)


def test_parts_add_up_and_a_machine_without_a_gpu_needs_none() -> None:
    for item in estimate(LLAMA_2_7B, Settings(), ROWS, on_gpu=False):
        assert item.gpu_bytes == 0
        assert item.host_bytes == sum(item.host.values())
        assert item.resident_bytes == item.host_bytes + sum(item.cache.values())
        assert all(n_bytes >= 0 for parts in (item.host, item.cache) for n_bytes in parts.values())
    whole = need("generate", LLAMA_2_7B, Settings())
    half = need("generate", LLAMA_2_7B, Settings(n_gpu_layers=16))
    assert half.gpu["weights"] + half.host["weights"] == pytest.approx(LLAMA_2_7B.file_bytes, abs=2)
    assert half.gpu_bytes < whole.gpu_bytes
    assert need("generate", LLAMA_2_7B, Settings(n_gpu_layers=0)).gpu_bytes == 0


def test_a_16_bit_copy_is_counted_where_one_is_made() -> None:
    def weights(**where: Any) -> int:
        return need("generate", SMOLLM2, Settings(), **where).host["weights"]

    assert weights(on_gpu=False) == 2 * SMOLLM2.n_parameters
    assert weights(on_gpu=False, memory_bytes=1 * GIB) == SMOLLM2.file_bytes
    never = need("generate", SMOLLM2, Settings(working_copy="never"), on_gpu=False)
    assert never.host["weights"] == SMOLLM2.file_bytes
    for settings in (Settings(), Settings(working_copy="never")):  # export makes it at the latest
        found = estimate(SMOLLM2, settings, ROWS, on_gpu=False)
        assert max(item.store_disk.get("16-bit GGUF", 0) for item in found) == 2 * SMOLLM2.n_parameters
        assert "16-bit GGUF" in found[3].store_disk  # the training made room for its own


def test_the_copies_are_there_one_at_a_time_and_the_disk_of_one_is_enough() -> None:
    needs = estimate(LLAMA_2_7B, Settings(), ROWS, on_gpu=True)
    in_run = sum(sum(item.run_disk.values()) for item in needs)
    machine = Machine("a card", 24 * GIB, 64 * GIB, in_run, int(1.01 * 2 * LLAMA_2_7B.n_parameters), False)
    assert compare(LLAMA_2_7B, Settings(), ROWS, machine)[1] == []
    assert (
        0.9 < (in_run + machine.store_disk_bytes) / doctor.NEEDED_BYTES < 1
    )  # what `doctor` tells of a 7B model
    _, faults = compare(LLAMA_2_7B, Settings(), ROWS, replace(machine, store_disk_bytes=13 * 10**9))
    assert_says(faults[0], "a 16-bit copy of the model", "SG_LOCAL_HOME")


def test_what_the_proof_needs_and_what_it_may_use_are_told_apart() -> None:
    """Measured on random weights in the shape of Llama 2 7B: see tests/benchmarks/RESULTS.md."""
    item = need("export", LLAMA_2_7B, Settings(), on_gpu=False)
    assert item.host_bytes < 4.5 * GIB
    assert item.resident_bytes > 2 * LLAMA_2_7B.n_parameters
    short = need("export", LLAMA_2_7B, Settings(), TaskTokens(16, 0, 8, 4), on_gpu=False)
    assert short.host_bytes < 3 * GIB


def test_rows_near_the_decision_are_told_where_there_will_be_some() -> None:
    """Of a 7B model 1.87 GiB were measured without them: fewer than 16 rows of the made ones are dropped as unsure."""
    tokens = TaskTokens(instruction=24, demonstrations=300, input=21, answer=3, labels=12)
    told = {
        n_inputs: need("export", LLAMA_2_7B, Settings(n_inputs=n_inputs), tokens, on_gpu=False).host_bytes
        / GIB
        for n_inputs in (4, 79, 80, 160, 240, 400)
    }
    assert 1.87 * LEAST <= told[4] <= 1.87 * MOST
    assert told[4] == told[79] < told[80] < told[160] < told[240] == told[400]
    # Examples stand in the compared prompts where they stand in the trained ones.
    shown = need("export", LLAMA_2_7B, Settings(n_inputs=4, train_demonstrations=True), tokens, on_gpu=False)
    assert shown.host_bytes / GIB > told[4] + 0.2


def test_sizes_are_those_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(path)
    found = model_sizes(read_header(path))
    assert (found.hidden, found.intermediate, found.n_layers) == (HIDDEN, FEED_FORWARD, LAYERS)
    assert (found.n_heads, found.n_kv_heads, found.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (found.vocab, found.context_length) == (TOKENS, 128)
    assert found.file_bytes == path.stat().st_size
    path.write_bytes(tiny_gguf({**METADATA, "llama.block_count": 0, "llama.embedding_length": "wide"}))
    with pytest.raises(InputError) as caught:
        model_sizes(read_header(path))
    assert [re.findall(r"llama\.\w+|token_embd", line)[0] for line in str(caught.value).splitlines()] == [
        "token_embd",
        "llama.embedding_length",
        "llama.block_count",
    ]


def test_what_is_advised_fits() -> None:
    for gib in (4, 6, 8, 12, 16, 24):
        machine = Machine("a card", gib * GIB, 64 * GIB, 10**12, 10**12, is_one_disk=False)
        for step in ("generate", "train", "export"):
            first = need(step, LLAMA_2_7B, Settings())
            tried = [first, *(need(step, LLAMA_2_7B, item) for item in _remedies(step))]
            sizes = [item.gpu_bytes for item in tried]
            assert sizes == sorted(sizes, reverse=True)
        _, faults = compare(LLAMA_2_7B, Settings(), ROWS, machine)
        assert all(": add --" in fault for fault in faults) or gib < 6
    _, faults = compare(LLAMA_2_7B, Settings(), ROWS, replace(machine, gpu_bytes=6 * GIB))
    assert [fault.partition(":")[0] for fault in faults] == ["generate, annotate, evaluate", "train"]
    assert_says(faults[0], "6.4 GiB of GPU memory", "5.5 GiB of 6.0 GiB")
    assert faults[0].endswith(" --n-ctx 2048")
    assert faults[1].endswith(" --batch-size 4 --load-in-4bit")
    _, faults = compare(LLAMA_2_7B, Settings(), ROWS, replace(machine, host_bytes=8 * GIB))
    assert not faults
    _, faults = compare(LLAMA_2_7B, Settings(), ROWS, replace(machine, host_bytes=4 * GIB))
    fault = faults[-1]
    assert fault.startswith("export: ")
    assert_says(fault, "4.8 GiB of host memory", "3.6 GiB of 4.0 GiB", "no setting", "smaller model")
    _, faults = compare(LLAMA_2_7B, Settings(), ROWS, replace(machine, store_disk_bytes=GIB))
    assert "SG_LOCAL_HOME" in faults[0]
    _, faults = compare(LLAMA_2_7B, Settings(), ROWS, replace(machine, run_disk_bytes=GIB))
    assert "--run" in faults[0]


def _remedies(step: str) -> list[Settings]:
    return list(remedies(step, LLAMA_2_7B, Settings(), ROWS, on_gpu=True))


def test_its_numbers_are_those_of_the_code_that_it_tells_about(finished_run: Run) -> None:
    assert signature(Engine.__init__).parameters["n_batch"].default == memory.N_BATCH
    assert base_weights.MAX_SHARD_BYTES == memory.MAX_SHARD_BYTES
    assert parity.N_PROMPTS == memory.PROOF_PROMPTS
    assert (near.N_ROWS, near.N_TOKENS) == (memory.NEAR_PROMPTS, memory.NEAR_TOKENS)
    assert near.LEAST_ROWS == memory.LEAST_NEAR_PROMPTS
    assert parity.LEAST_N_CTX == memory.LEAST_N_CTX
    assert reference.MAX_TOKENS_AT_ONCE == memory.PROOF_TOKENS_AT_ONCE
    assert train.N_CHECKPOINTS + 1 == memory.CHECKPOINTS
    choices = {*SETTINGS["quant"].metadata["choices"]}
    assert set(memory.QUANT_BYTES) == {*FILE_TYPES} == choices - {*memory.KEEPS_TYPES}


# The manual

MANUAL = (ROOT / "sg_local" / "plan" / "README.md").read_text("utf-8")


def table(first_cell: str) -> list[list[str]]:
    """The rows of the manual's table whose head begins so."""
    lines = MANUAL[MANUAL.index(f"| {first_cell} |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def largest(name: str, values: range | tuple[int, ...], step: str, gib: int, settings: Settings) -> str:
    """The largest of the values with which a step fits a card, as the manual has it."""
    found = [
        value
        for value in values
        if need(step, LLAMA_2_7B, replace(settings, **{name: value})).gpu_bytes  # type: ignore[arg-type]
        <= USABLE_SHARE_OF_GPU * gib * GIB
    ]
    return str(max(found)) if found else "none"


def test_the_manual_has_the_stages_of_a_7b_model() -> None:
    assert "Estimated" in MANUAL
    settings = Settings(load_in_4bit=True)
    for row, step in zip(table("stage"), ("generate", "train", "export"), strict=True):
        item = need(step, LLAMA_2_7B, settings)
        expected = [f"{n_bytes / GIB:.1f} GiB" for n_bytes in (item.gpu_bytes, item.host_bytes)]
        assert [cell.partition(":")[0] for cell in row[1:3]] == expected, step
        if item.disk_bytes:
            assert row[3].startswith(f"{item.disk_bytes / GIB:.1f} GiB"), step


def test_the_manual_says_what_fits_which_card() -> None:
    contexts = range(1024, 131_072, 1024)
    batches = (1, 2, 4, 8, 16, 32, 64)
    in_4_bit = Settings(load_in_4bit=True)
    expected = [
        [
            f"{gib} GB",
            largest("n_ctx", contexts, "generate", gib, in_4_bit),
            largest("batch_size", batches, "train", gib, in_4_bit),
            largest("batch_size", batches, "train", gib, replace(in_4_bit, gradient_checkpointing="never")),
            largest("batch_size", batches, "train", gib, Settings()),
        ]
        for gib in (8, 12, 16, 24)
    ]
    assert table("card") == expected, expected


def test_the_manual_says_how_near_the_estimates_are() -> None:
    found = re.search(r"they\s+are\s+([\d.]+)\s+to\s+([\d.]+)\s+times", MANUAL)
    assert found
    ratios = [ratio(*item) for item in MEASURED]
    assert found.groups() == (f"{min(ratios):.1f}", f"{max(ratios):.1f}")
