"""`sg-local plan`: what a run needs, and a machine that is too small."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import Call, Contents, one_line
from finished_run import MODEL, TENSORS
from gguf_bytes import tiny_gguf
from gguf_models import write_model
from known_sizes import LLAMA_2_7B, SMOLLM2
from messages import assert_says

from sg_local.models import Model, list_models
from sg_local.plan.sizes import ModelSizes, listed_sizes


def test_plan_says_what_a_run_needs_and_writes_nothing(
    sg: Call, task: Path, nvidia: Path, tmp_path: Path, contents: Contents
) -> None:
    model = write_model(tmp_path / "model.gguf")
    before = contents(tmp_path)
    result = sg("plan", task, "--model", model, "--n-inputs", 7)
    assert (result.exit_code, result.stderr) == (0, "")
    title, _, head, *rows = result.stdout.partition("\n\nhost memory")[0].splitlines()
    assert_says(title, "inbox", "model.gguf", "CPU")
    assert head.split() == ["GPU", "memory", "host", "memory", "disk", "tokens"]
    assert [row.split()[0] for row in rows] == [
        *(set_of_steps := ["generate", "annotate", "train", "export", "evaluate"]),
        "this",
    ]
    assert re.search(r"train: process 0\.5 GiB, .*gradients", result.stdout)
    assert contents(tmp_path) == before
    assert os.listdir() == []
    result = sg("plan", task, "--model", model, "--n-inputs", 7, "--json")
    facts = json.loads(result.stdout)
    assert [step["step"] for step in facts["steps"]] == set_of_steps
    assert (facts["fits"], facts["faults"], facts["machine"]["gpu_bytes"]) == (True, [], 0)
    for step in facts["steps"]:
        assert step["gpu"] == {}
        assert step["host_bytes"] == sum(step["host"].values())
        assert step["disk_bytes"] == sum(step["disk"].values())


def test_plan_refuses_with_numbers_and_what_to_change(
    sg: Call, task: Path, nvidia: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sg_local.plan.plan.model_sizes", lambda _header: LLAMA_2_7B)
    monkeypatch.setattr("sg_local.plan.plan.total_memory_bytes", lambda: 64 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10**12))
    result = sg("plan", task, "--model", model, "--gpu-memory", 6)
    assert result.exit_code == 1
    assert re.search(
        r"^this machine +6\.0 GiB +64\.0 GiB", result.stdout, re.MULTILINE
    )  # the table all the same
    makes, trains = result.stderr.removeprefix("Error: ").splitlines()
    assert makes.startswith("generate, annotate, evaluate: ")
    assert_says(makes, "6.4 GiB of GPU memory", "5.5 GiB of 6.0 GiB")
    assert makes.endswith(" --n-ctx 2048")
    assert trains.endswith(" --load-in-4bit")
    result = sg("plan", task, "--model", model, "--gpu-memory", 6, "--n-ctx", 2048, "--load-in-4bit")
    assert (result.exit_code, result.stderr) == (0, "")
    monkeypatch.setattr("sg_local.plan.plan.total_memory_bytes", lambda: 4 << 30)
    result = sg("plan", task, "--model", model, "--gpu-memory", 8, "--load-in-4bit", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["faults"] == result.stderr.removeprefix("Error: ").splitlines()
    assert_says(result.stderr, "no setting", "smaller model")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10**9))
    assert_says(sg("plan", task, "--model", model).stderr, "disk", "0.9 GiB")


def test_plan_counts_with_the_longest_real_input_that_fits(
    sg: Call, task: Path, nvidia: Path, model: Path
) -> None:
    """Of 3 bytes a token; what is dropped because it does not fit counts for nothing."""
    model.write_bytes(tiny_gguf({**MODEL, "llama.context_length": 4096}, TENSORS))

    def batch_tokens(**files: str) -> int:
        for key, text in files.items():
            (task.parent / f"{key}.jsonl").write_text(text)
        keys = "".join(f'{key} = "{key}.jsonl"\n' for key in files)
        brought = task.with_name("brought.toml")
        brought.write_text(task.read_text().replace("[[examples]]", f"{keys}\n[[examples]]", 1))
        result = sg("plan", brought, "--model", model, "--n-ctx", 2048, "--batch-size", 1, "--json")
        assert result.exit_code == 0, result.stderr
        tokens: int = json.loads(result.stdout)["batch_tokens"]
        return tokens

    def row(n_words: int) -> str:
        return json.dumps({"input": "to " * n_words + ".", "output": "login"}) + "\n"

    least = batch_tokens()
    longest = batch_tokens(inputs=row(1) + row(700) + row(500) + row(30_000))
    assert 700 - 40 <= longest - least <= 700
    assert batch_tokens(inputs=row(1), labelled=row(700)) == longest
    assert batch_tokens(inputs=row(30_000)) == least
    # One that may fit takes no more than there is room for.
    assert longest < batch_tokens(inputs=row(2500)) <= 2048 + 128


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_plan_is_for_the_gpu_that_is_here(sg: Call, task: Path, nvidia: Path, tmp_path: Path) -> None:
    nvidia.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3060, 12288 MiB'\necho 'NVIDIA A2, 1 MiB'\n")
    nvidia.chmod(0o755)
    model = write_model(tmp_path / "model.gguf")
    result = sg("plan", task, "--model", model)
    assert "NVIDIA GeForce RTX 3060" in result.stdout.splitlines()[0]
    assert re.search(r"^this machine +12\.0 GiB", result.stdout, re.MULTILINE)
    assert "on the CPU" in sg("plan", task, "--model", model, "--gpu-memory", 0).stdout


def test_plan_checks_task_and_model(sg: Call, task: Path, model: Path) -> None:
    model.write_bytes(tiny_gguf({**MODEL, "llama.block_count": 0}, TENSORS))
    assert "llama.block_count is 0" in one_line(sg("plan", task, "--model", model), 2)
    assert "missing.gguf" in one_line(sg("plan", task, "--model", "missing.gguf"), 2)
    assert "mising" in one_line(sg("plan", "mising"), 2)


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{{ messages }}", "does not show each"),
        ("{{ raise_exception('no') }}", "no"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_plan_judges_the_chat_template(
    sg: Call, task: Path, tmp_path: Path, template: str, fault: str
) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(tiny_gguf({**MODEL, "tokenizer.chat_template": template}, TENSORS))
    result = sg("plan", task, "--model", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert_says(result.stderr, path, "chat template", fault, "use a GGUF with another template")
    assert "vicuna" not in result.stderr
    path.write_bytes(
        tiny_gguf({**MODEL, "general.name": "Vicuna", "tokenizer.chat_template": template}, TENSORS)
    )
    assert_says(sg("plan", task, "--model", path).stderr, fault, "--prompt-format vicuna")


def test_a_listed_model_is_planned_with_before_it_is_pulled(
    sg: Call, task: Path, nvidia: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sg_local.plan.plan.total_memory_bytes", lambda: 64 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10**12))
    result = sg("plan", task, "--model", "vicuna-7b-v1.5", "--load-in-4bit", "--n-inputs", 7)
    assert (result.exit_code, result.stderr) == (0, "")
    assert_says(result.stdout, "vicuna-7b-v1.5.Q4_K_M.gguf", "models pull vicuna-7b-v1.5", "3.8 GiB")
    assert "time" not in result.stdout.splitlines()[2]
    # Without its sizes nothing can be said.
    monkeypatch.setattr("sg_local.plan.plan.find_absent", lambda _source: None)
    assert "models pull vicuna-7b-v1.5" in one_line(sg("plan", task, "--model", "vicuna-7b-v1.5"), 2)


@pytest.mark.parametrize(("name", "known"), [("smollm2-135m", SMOLLM2), ("vicuna-7b-v1.5", LLAMA_2_7B)])
def test_the_list_has_the_sizes_that_the_headers_have(name: str, known: ModelSizes) -> None:
    model = next(model for model in list_models() if model.name == name)
    listed = listed_sizes(model)
    assert abs(listed.file_bytes / known.file_bytes - 1) < 0.01
    same = {"file_bytes": known.file_bytes, "embedding_bytes": known.embedding_bytes}
    assert replace(listed, **same) == known


# Of the published weights, as their makers or transformers count them: norms count too, in ours they do not.
PUBLISHED_PARAMETERS = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_099_328,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "granite-3.3-2b": 2_533_539_840,
    "granite-4.0-micro": 3_402_836_480,
    "phi-4-mini": 3_836_021_760,
    "ministral-3-3b": 3_429_006_336,
    "ministral-3-8b": 8_489_553_920,
    "lfm2-350m": 354_483_968,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    "vicuna-7b-v1.5": 6_738_415_616,
}
# Bits of a weight in the whole file: Q4_K_M keeps some tensors finer, the larger a share they are the more.
BITS_PER_WEIGHT = {"Q4_1": (4.9, 6.0), "Q4_K_M": (4.7, 5.3), "Q8_0": (8.5, 8.8)}
# Rows of 1152 weights are no whole number of K-quants' blocks of 256: they are in Q5_0 and Q8_0.
BITS_OF_ODD_ROWS = (6.0, 6.6)


@pytest.mark.parametrize("model", list_models(), ids=lambda model: model.name)
def test_each_listed_model_can_be_planned_with_unpulled(
    model: Model, sg: Call, task: Path, nvidia: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its sizes are those of the published model: the same parameters, and the bytes that the file's type takes."""
    sizes = listed_sizes(model)
    assert sizes.n_parameters == pytest.approx(PUBLISHED_PARAMETERS[model.name], rel=5e-4)
    quant = next(quant for quant in BITS_PER_WEIGHT if f"{quant}:" in model.description)
    assert quant.lower() in model.source.lower()
    low, high = BITS_PER_WEIGHT[quant] if sizes.hidden != 1152 else BITS_OF_ODD_ROWS
    assert low <= 8 * model.size_bytes / sizes.n_parameters <= high

    monkeypatch.setattr("sg_local.models.find_present", lambda _model: None)
    monkeypatch.setattr("sg_local.plan.plan.total_memory_bytes", lambda: 256 << 30)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10**12))
    result = sg("plan", task, "--model", model.name, "--gpu-memory", 80, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    generate = next(need for need in told["steps"] if need["step"] == "generate")
    assert generate["gpu"]["weights"] == pytest.approx(model.size_bytes, rel=0.15)
    n_layers = sizes.n_attention_layers
    per_token = 2 * 2 * sizes.n_kv_heads * sizes.head_dim * n_layers
    assert generate["gpu"]["KV cache"] == 4096 * per_token


@pytest.mark.parametrize(("gib", "words"), [(64, "fits"), (24, "fits with --load-in-4bit"), (4, "too large")])
def test_the_list_says_which_models_fit_this_machine(
    sg: Call, nvidia: Path, monkeypatch: pytest.MonkeyPatch, gib: int, words: str
) -> None:
    monkeypatch.setattr("sg_local.plan.plan.total_memory_bytes", lambda: gib << 30)
    usage = SimpleNamespace(free=10**12)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    rows = json.loads(sg("models", "list", "--json").stdout)
    assert {row["name"]: row["fit"] for row in rows}["vicuna-7b-v1.5"] == words
    line = next(line for line in sg("models", "list").stdout.splitlines() if line.startswith("vicuna"))
    assert line.endswith(f"not pulled  {words}")
    usage.free = 10**9
    rows = json.loads(sg("models", "list", "--json").stdout)
    fit = {row["name"]: row["fit"] for row in rows}["vicuna-7b-v1.5"]
    assert fit == ("too large" if gib == 4 else "too little disk")
