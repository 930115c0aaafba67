"""What training on a card asks for, shown where there is none: Unsloth's GPU code takes other masks and tokenizers.

Each of these was seen on Unsloth's GPU stack; on a card itself tests/gpu/run tries them.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sg_local.child_process import result_from_child
from sg_local.errors import InputError, SgLocalError
from sg_local.finetune import load
from sg_local.finetune.batches import TrainRow, tree_batch
from sg_local.finetune.environment import go_offline
from sg_local.finetune.load import card_fault, require_card, require_same_positions
from sg_local.finetune.loss import FLOAT16_LOSS_SCALE, batch_loss, check_tree, is_beyond_one_mask, tensors
from sg_local.finetune.stand_in_tokenizer import Vocabulary, write_stand_in_tokenizer
from sg_local.settings import TrainSettings

for package in ("torch", "transformers", "peft", "trl"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "c"]


@pytest.mark.parametrize(
    ("bos", "eos", "pad"), [(1, 2, -1), (1, 2, 2), (-1, 0, -1), (0, 0, 0), (1, 2, 99), (1, 2, 4)]
)
def test_the_padding_token_is_there_and_is_not_the_end_token(
    tmp_path: Path, bos: int, eos: int, pad: int
) -> None:
    go_offline()
    from transformers import AutoTokenizer

    write_stand_in_tokenizer(tmp_path, Vocabulary(TOKENS, bos, eos, pad))
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    assert tokenizer.eos_token_id == eos
    assert tokenizer.pad_token_id != eos
    assert 0 <= tokenizer.pad_token_id < len(TOKENS) == len(tokenizer)
    if pad == 4:
        assert tokenizer.pad_token_id == 4


# Gemma 2 has layers with a window among others, for which transformers takes a mask each.
WITH_WINDOWS = SimpleNamespace(sliding_window=5, layer_types=["sliding_attention", "full_attention"])


@pytest.mark.parametrize("config", [SimpleNamespace(), WITH_WINDOWS])
def test_unsloths_forward_gets_an_additive_mask_that_is_kept_and_not_cut(config: SimpleNamespace) -> None:
    go_offline()
    import torch

    seen: dict[str, Any] = {}

    class Decoder(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            seen.update(inputs)
            return SimpleNamespace(last_hidden_state=torch.zeros(*inputs["input_ids"].shape, 4))

    Decoder.forward.__module__ = "unsloth.models.llama"
    decoder, head = Decoder(), torch.nn.Linear(4, 9)
    causal = SimpleNamespace(
        base_model_prefix="model",
        model=decoder,
        get_output_embeddings=lambda: head,
        config=SimpleNamespace(_attn_implementation="sdpa", **vars(config)),
    )
    model = SimpleNamespace(get_base_model=lambda: causal)
    assert not is_beyond_one_mask(model, 5)
    assert is_beyond_one_mask(model, 6) == (config is WITH_WINDOWS)
    batch = tree_batch([TrainRow((1, 5, 6), (7, 2)), TrainRow((1, 5, 8), (3, 2))])
    batch_loss(model, tensors(batch, config))
    mask = seen["attention_mask"][0, 0]
    assert batch.visible is not None
    assert mask.dtype == torch.float32
    # As Unsloth reads it: 0 is visible, the lowest number is not.
    assert mask.eq(0).tolist() == batch.visible.tolist()
    assert set(mask[mask != 0].tolist()) == {torch.finfo(torch.float32).min}
    assert decoder._unsloth_keep_padding_mask is True
    assert decoder._unsloth_allow_packed_overlength is True


@pytest.mark.parametrize(
    ("loaded", "fault"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, None),
        ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 7.8}, "rope_type is 'linear'"),
        ({"rope_theta": 10000.0, "factor": 2.0}, "factor is 2.0"),
        ({"rope_type": "default", "rope_theta": 500000.0}, "rope_theta is 500000.0"),
    ],
)
def test_positions_that_the_trainer_stretched_are_refused(
    tmp_path: Path, loaded: dict[str, Any], fault: str | None
) -> None:
    expected = {"rope_type": "default", "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps({"rope_parameters": expected}))
    config = SimpleNamespace(rope_parameters=loaded)
    model = SimpleNamespace(get_base_model=lambda: SimpleNamespace(config=config))
    if fault is None:
        require_same_positions(model, tmp_path)
        return
    with pytest.raises(SgLocalError, match=fault):
        require_same_positions(model, tmp_path)


def test_unsloth_is_asked_for_no_more_than_the_models_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(*_: Any, **named: Any) -> tuple[str, str]:
            asked.update(named)
            return "model", "tokenizer"

        @staticmethod
        def get_peft_model(model: str, **_: Any) -> str:
            return model

    monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=FastLanguageModel))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 4096}))
    settings: Any = SimpleNamespace(
        trainer="unsloth", rank=4, alpha=4.0, lora_dropout=0.0, load_in_4bit=True, seed=0,
        uses_checkpointing=lambda has_gpu: has_gpu,
    )  # fmt: skip
    go_offline()
    load.load_with_lora(tmp_path, Vocabulary(TOKENS, 1, 2, 0), ("q_proj",), settings, 8 * 520)
    assert asked["max_seq_length"] == 4096
    load.load_with_lora(tmp_path, Vocabulary(TOKENS, 1, 2, 0), ("q_proj",), settings, 700)
    assert asked["max_seq_length"] == 700
    assert "device_map" not in asked
    # With a card nothing of the model may end up in host memory, where it would be computed many times slower.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    load.load_with_lora(tmp_path, Vocabulary(TOKENS, 1, 2, 0), ("q_proj",), settings, 700)
    assert asked["device_map"] == {"": 0}


def test_a_card_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu_in_silence() -> None:
    go_offline()
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch has a card here")
    require_card("", "peft")
    with pytest.raises(InputError, match=r"NVIDIA X.*CUDA_VISIBLE_DEVICES"):
        require_card("NVIDIA X, 24576 MiB", "peft")


def test_a_card_is_tried_and_not_only_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    go_offline()
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch has a card here")
    fault = card_fault()  # of a torch without CUDA
    assert fault.startswith("torch: ")
    assert "CUDA" in fault
    assert "\n" not in fault
    # A card that torch was not built for is there all the same, and so is one that no one asked nvidia-smi for.
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "AMD X")
    for card, named in (("NVIDIA X", "NVIDIA X"), ("", "AMD X")):
        with pytest.raises(InputError, match=rf"{named}.*CUDA_VISIBLE_DEVICES=-1"):
            require_card(card, "peft")

    def is_full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("torch.zeros", is_full)
    with pytest.raises(
        SgLocalError, match=r"the card's memory ran out.*other programs"
    ):  # no fault of the card
        require_card("NVIDIA X", "peft")


def test_where_unsloth_does_not_work_the_other_trainer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "unsloth":
                raise NotImplementedError("Unsloth does not currently work on mps.")

    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    with pytest.raises(InputError, match=r"work on mps.*--trainer peft"):
        require_card("", "unsloth")
    with pytest.raises(InputError, match=r"NVIDIA X.*work on mps.*CUDA_VISIBLE_DEVICES=-1"):
        require_card("NVIDIA X", "unsloth")


def test_small_gradients_of_float16_are_compared_too() -> None:
    go_offline()
    import torch

    model = torch.nn.Linear(4, 1, bias=False)
    model.base = torch.nn.Linear(4, 1, dtype=torch.float16).requires_grad_(False)

    def loss(_batch: object) -> Any:
        # Like a model in float16 whose loss has little to do with each weight.
        return (model.weight.half().float().sum() + 3) * 1e-8

    rows = [TrainRow((1, 5, 6), (7, 2)), TrainRow((1, 5, 8), (3, 2))]
    assert not check_tree(model, rows, loss).is_equal  # all are zero
    assert check_tree(model, rows, loss, FLOAT16_LOSS_SCALE).is_equal


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("CUDA error: out of memory"), True),  # of CUDA itself, and not torch.OutOfMemoryError
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (AttributeError("'dict' object has no attribute 'dim'"), False),
    ],
)
def test_what_no_tree_can_be_computed_with_is_padded_but_a_full_card_is_full(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_memory: bool
) -> None:
    go_offline()
    import torch

    from sg_local.finetune import train

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(train, "check_tree", fail)
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace()  # type: ignore[assignment]
    model.base_model_prefix = "base"  # type: ignore[assignment]
    model.base = torch.nn.Linear(2, 2)
    model.get_base_model = lambda: model  # type: ignore[assignment]
    trainer = SimpleNamespace(model=model, loss_of=None, args=SimpleNamespace(fp16=True))
    settings: Any = SimpleNamespace(prompt_tree=True, lora_dropout=0.0, batch_size=1)
    rows = [TrainRow((1, 5, 6), (7, 2))]
    if is_memory:
        monkeypatch.setattr(train, "_torch_has_gpu", lambda: True)
        with pytest.raises(RuntimeError, match="CUDA error"):
            train._choose_batches(trainer, rows, settings)
        with (
            pytest.raises(SgLocalError, match=r"close other programs.*--batch-size 4"),
            train.memory_error_explained(
                TrainSettings(load_in_4bit=True, batch_size=8, gradient_checkpointing="auto")
            ),
        ):
            raise error
        return
    assert train._choose_batches(trainer, rows, settings)["batches"] == "padded"


def test_memory_that_ran_out_is_told_with_what_makes_the_training_smaller() -> None:
    go_offline()
    import torch

    from sg_local.finetune.train import memory_error_explained

    settings = TrainSettings(load_in_4bit=False, batch_size=8, gradient_checkpointing="auto")
    with (
        pytest.raises(
            SgLocalError, match=r"--load-in-4bit or --batch-size 4 or --gradient-checkpointing always"
        ),
        memory_error_explained(settings),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="size of tensor a"), memory_error_explained(settings):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")


def test_the_card_is_tried_in_a_process_of_its_own() -> None:
    with pytest.raises(InputError, match=r"NVIDIA X.*CUDA_VISIBLE_DEVICES=-1"):
        result_from_child(
            "trying the card", "sg_local.finetune.load.try_card", card="NVIDIA X", trainer="peft"
        )


def test_doctor_tries_the_card_in_the_same_way() -> None:
    from sg_local.plan.doctor import TRY_TORCH

    go_offline()
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch has a card here")
    root = Path(load.__file__).parents[2]
    command = [sys.executable, "-P", "-c", TRY_TORCH, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1][:7]) == (1, "torch: ")
