"""Training: a tree of rows gives the padded batch's gradients, and a killed training ends as an unbroken one.

Tiny random models, made here: the arithmetic is the same as in large ones. The real model is trained in test_loop.py.
"""

import importlib.util
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TOKENS, write_tiny_llama, write_tiny_model

from sg_local.finetune import loss as loss_module
from sg_local.finetune.batches import Batch, TrainRow, padded_batch, tree_batch
from sg_local.finetune.environment import go_offline
from sg_local.finetune.loss import batch_loss, check_tree, tensors
from sg_local.gguf_io.base_weights import BaseWeights, write_base_weights

for package in ("torch", "transformers", "peft", "trl"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

VOCABULARY, WINDOW = 97, 8
MAX_GRADIENT_DIFFERENCE = 1e-4


def rows(n: int = 6, *, weighted: bool = False, seed: int = 0) -> list[TrainRow]:
    """Rows behind one prefix of 12 tokens; one is there twice, one prompt has two answers, one row a soft target."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(low, high)))

    prefix = tokens(12, 12)
    found = [
        TrainRow(
            prefix + tokens(3, 14), (*tokens(1, 4), 2), draw.choice([0.25, 1.0, 3.0]) if weighted else 1.0
        )
        for _ in range(n)
    ]
    soft = TrainRow(prefix + tokens(3, 5), (*tokens(1, 2), 2), 0.7, (((*tokens(2, 3), 2), 0.3),))
    return [*found, found[-1], TrainRow(found[0].prompt, (*tokens(2, 3), 2)), soft]


WINDOWS = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 12,
}
# Positions are scaled from the ninth on, so that a tree's have to restart.
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
# what is given to the configurations of transformers' model types
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {
        **WINDOWS,
        "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 0.5,
        "attn_implementation": "eager",
    },
    "gemma3_text": WINDOWS,
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 0.5},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5}},
}
# Those with a state, in which rows cannot share tokens
WITH_STATE: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
}


def tiny_model(architecture: str) -> Any:
    """A PEFT model in float32 whose adapter already does something, so that gradients reach both of its halves."""
    go_offline()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING[architecture](**sizes, **{**OWN, **WITH_STATE}.get(architecture, {}))
    base = AutoModelForCausalLM.from_config(config)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model.train()


def gradient(model: Any, batch: Batch) -> tuple[float, Any]:
    import torch

    model.zero_grad()
    loss = batch_loss(model, tensors(batch, model.config))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("architecture", ["llama", *OWN])
def test_a_tree_gives_the_gradients_of_the_padded_batch(architecture: str, weighted: bool) -> None:
    model = tiny_model(architecture)
    batch = rows(weighted=weighted)
    assert max(row.n_tokens for row in batch) > 2 * WINDOW
    loss, expected = gradient(model, padded_batch(batch))
    tree_loss, found = gradient(model, tree_batch(batch))
    assert tree_loss == pytest.approx(loss, rel=1e-5)
    assert float((found - expected).norm() / expected.norm()) <= MAX_GRADIENT_DIFFERENCE


@pytest.mark.parametrize(
    ("architecture", "to_batch"),
    [
        *((architecture, tree_batch) for architecture in ("llama", "gemma2", "granite")),
        *((architecture, padded_batch) for architecture in WITH_STATE),
    ],
)
def test_the_loss_is_the_weighted_mean_over_the_tokens_of_answers(
    architecture: str, to_batch: Callable[[Sequence[TrainRow]], Batch]
) -> None:
    import torch

    model = tiny_model(architecture)
    batch = rows(weighted=True)
    nlls, weights = [], []
    with torch.no_grad():
        for row in batch:
            for answer, weight in row.answers:
                logits = model(input_ids=torch.tensor([[*row.prompt, *answer]])).logits[0]
                log_probabilities = logits.log_softmax(-1)[len(row.prompt) - 1 : -1]
                nlls += [-log_probabilities[i, token].item() * weight for i, token in enumerate(answer)]
                weights += [weight] * len(answer)
    loss, _ = gradient(model, to_batch(batch))
    assert loss == pytest.approx(sum(nlls) / sum(weights), rel=1e-5)


def check(model: Any, batch: Sequence[TrainRow]) -> loss_module.TreeCheck:
    return check_tree(model, batch, lambda it: batch_loss(model, tensors(it, model.config)))


def test_the_check_of_the_first_batch_passes_a_right_tree() -> None:
    found = check(tiny_model("gemma3_text"), rows())
    assert found.is_equal
    assert found.gradient_difference < MAX_GRADIENT_DIFFERENCE


def test_a_tree_is_another_batch_where_a_state_is_kept() -> None:
    assert not check(tiny_model("qwen3_5_text"), rows()).is_equal


def test_the_check_of_the_first_batch_finds_a_leak_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an attention kernel that ignores the mask has it: every token sees all before it."""

    def leaking(batch: Sequence[TrainRow]) -> Batch:
        right = tree_batch(batch)
        return right._replace(visible=np.tri(right.input_ids.size, dtype=np.bool_))

    monkeypatch.setattr(loss_module, "tree_batch", leaking)
    assert not check(tiny_model("llama"), rows()).is_equal


def test_the_check_of_the_first_batch_finds_one_token_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(batch: Sequence[TrainRow]) -> Batch:
        right = tree_batch(batch)
        visible = right.visible.copy()  # type: ignore[union-attr]
        last = right.sources[-1]
        visible[last, np.flatnonzero(~visible[last, :last])[-1]] = True  # a word of the row before it
        return right._replace(visible=visible)

    monkeypatch.setattr(loss_module, "tree_batch", leaking)
    assert not check(tiny_model("llama"), rows()).is_equal


def test_the_check_of_the_first_batch_finds_a_lost_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "within_window", lambda batch, _window: batch.visible)
    assert not check(tiny_model("gemma3_text"), rows()).is_equal


_PROGRAM = """
import json, os, shutil, signal, sys
from pathlib import Path
from sg_local.finetune.environment import prepare_process
given = json.loads(sys.argv[1])
prepare_process(Path(given["work"]))
from sg_local.finetune.batches import TrainRow
from sg_local.finetune.stand_in_tokenizer import Vocabulary
from sg_local.finetune.train import train_adapter
from sg_local.settings import TrainSettings
steps = 0
def on_step(n):
    global steps
    steps += n
    if steps == given["kill_at"]:
        os.kill(os.getpid(), signal.SIGKILL)
rows = [
    TrainRow(tuple(prompt), tuple(answer), weight, tuple((tuple(other), share) for other, share in others))
    for prompt, answer, weight, others in given["rows"]
]
print(json.dumps(train_adapter(
    Path(given["weights"]), Vocabulary([f"t{i}" for i in range(given["n_vocab"])], 1, 2, 2), rows,
    Path(given["adapter"]), Path(given["checkpoints"]), "base",
    ("q_proj", "v_proj", "down_proj"), TrainSettings(**given["settings"]), on_step,
    on_loaded=lambda: given["is_removed"] and shutil.rmtree(given["weights"]))))
"""

SETTINGS = {
    "trainer": "peft",
    "rank": 4,
    "alpha": 8.0,
    "lora_dropout": 0.0,
    "learning_rate": 1e-3,
    "epochs": 3,
    "batch_size": 2,
    "load_in_4bit": False,
    "gradient_checkpointing": "never",
    "prompt_tree": True,
    "checkpoint_seconds": 0,
    "n_threads": 1,
    "seed": 7,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("training")
    write_base_weights(write_tiny_llama(directory / "tiny.gguf"), directory / "weights")
    return directory / "weights"


def train(
    weights: Path,
    place: Path,
    *,
    kill_at: int = 0,
    scale: float = 1.0,
    is_removed: bool = False,
    **changes: Any,
) -> subprocess.CompletedProcess[str]:
    given = {
        "weights": str(weights),
        "work": str(place / "work"),
        "adapter": str(place / "adapter"),
        "checkpoints": str(place / "checkpoints"),
        "kill_at": kill_at,
        "is_removed": is_removed,
        "n_vocab": len(TOKENS),
        "rows": [
            [row.prompt, row.answer, scale * row.weight, row.other_answers] for row in rows(7, weighted=True)
        ],
        "settings": {**SETTINGS, **changes},
    }
    command = [sys.executable, "-c", _PROGRAM, json.dumps(given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def adapter_weights(place: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(place / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("batches", ["tree", "padded"])
def test_a_killed_training_ends_with_the_adapter_of_an_unbroken_one(
    weights: Path, tmp_path: Path, batches: str
) -> None:
    changes = {"prompt_tree": batches == "tree"}
    whole = train(weights, tmp_path / "whole", **changes)
    assert whole.returncode == 0, whole.stderr
    told = json.loads(whole.stdout)
    assert (told["steps"], told["batches"]) == (15, batches)
    assert (told["computed_tokens"] < told["rows_tokens"] * SETTINGS["epochs"]) == (batches == "tree")

    killed = train(weights, tmp_path / "killed", kill_at=9, **changes)
    assert killed.returncode == -signal.SIGKILL
    checkpoints = (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")
    newest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
    damaged = newest / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])  # as if power had gone before it was on disk

    again = train(weights, tmp_path / "killed", **changes)
    assert again.returncode == 0, again.stderr
    assert f"going on from checkpoint-{int(newest.name.rpartition('-')[2]) - 1}" in again.stderr
    assert json.loads(again.stdout)["steps"] == 15
    expected, found = adapter_weights(tmp_path / "whole"), adapter_weights(tmp_path / "killed")
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6, err_msg=name)


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(weights: Path, tmp_path: Path) -> None:
    assert train(weights, tmp_path, kill_at=4).returncode == -signal.SIGKILL
    again = train(weights, tmp_path, learning_rate=2e-3)
    assert again.returncode == 0, again.stderr
    assert "going on from" not in again.stderr


def test_weights_that_are_gone_once_they_are_loaded_are_not_missed(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights, tmp_path / "weights")
    trained = train(tmp_path / "weights", tmp_path, is_removed=True)
    assert trained.returncode == 0, trained.stderr
    assert not (tmp_path / "weights").exists()
    assert "UserWarning" not in trained.stderr
    assert (
        json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    )


def test_dropout_trains_padded_and_says_so(weights: Path, tmp_path: Path) -> None:
    trained = train(weights, tmp_path, lora_dropout=0.1, gradient_checkpointing="always")
    assert trained.returncode == 0, trained.stderr
    assert "train: rows padded and grouped by length: --lora-dropout 0.1" in trained.stderr
    assert json.loads(trained.stdout)["batches"] == "padded"


def test_linear_attention_is_trained_on_padded_rows(tmp_path: Path) -> None:
    write_base_weights(write_tiny_model(tmp_path / "tiny.gguf", "qwen35"), tmp_path / "weights")
    trained = train(tmp_path / "weights", tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "train: rows padded and grouped by length: linear attention sums up the tokens" in trained.stderr
    told = json.loads(trained.stdout)
    assert told["batches"] == "padded"
    assert told["last_loss"] < told["first_loss"]


def test_a_training_that_diverges_says_what_to_do(weights: Path, tmp_path: Path) -> None:
    trained = train(weights, tmp_path, scale=1e39)
    assert trained.returncode != 0
    assert "InputError: the training diverged" in trained.stderr
    assert "lower --learning-rate 0.001" in trained.stderr
    assert not (tmp_path / "adapter").exists()


def test_the_reference_holds_only_the_logits_that_are_compared(tmp_path: Path) -> None:
    from sg_local.finetune.reference import reference_logits

    weights = BaseWeights(write_tiny_llama(tmp_path / "tiny.gguf"))
    tokens = (1, *range(3, 40))
    (whole,), (end,) = (reference_logits(weights, None, [(tokens, first)]) for first in (0, len(tokens) - 2))
    assert whole.shape == (len(tokens), len(TOKENS))
    np.testing.assert_allclose(end, whole[-2:], rtol=1e-5, atol=1e-5)
    # A view of all logits held 336 MB in the export of a quick run, and would hold gigabytes with long rows.
    assert end.base is not None
    assert end.base.untyped_storage().nbytes() == end.nbytes


def test_the_reference_has_the_weights_of_one_layer_at_a_time(tmp_path: Path) -> None:
    """All of a 7B model in 16 bits took 13 GiB of the memory of an export."""
    from sg_local.finetune.reference import reference_logits

    weights = BaseWeights(write_tiny_llama(tmp_path / "tiny.gguf"))
    asked: list[list[str]] = []

    class Watched:
        config = weights.config

        def read(self, names: Iterable[str]) -> Any:
            asked.append(list(names))
            return weights.read(asked[-1])

    reference_logits(Watched(), None, [((1, 5, 9), 0), ((1, 7), 1)])
    layers = [{name.split(".")[2] for name in names if ".layers." in name} for names in asked]
    assert [sorted(found) for found in layers if found] == [[str(n)] for n in range(len(layers) - 3)]
    everything = sorted(name for names in asked for name in names)
    assert everything == sorted(weights.largest_bytes())
