"""Several trainings that are averaged: seeds, what is gone on with, and what is told. Nothing is trained."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import replace_training

import sg_local.finetune.several as several
from sg_local.finetune.batches import TrainRow
from sg_local.finetune.several import seed_of_training, train_several
from sg_local.runs.directory import Run
from sg_local.settings import Settings, TrainSettings
from sg_local.stages.train import run_train

ROWS = [TrainRow((1, 2), (3,)), TrainRow((1, 4), (5,))]


class Trainer:
    """Writes the seed that it was given; dies in the training whose number is `dies_in`."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.is_last: list[bool] = []
        self.dies_in: int | None = None

    def __call__(
        self, settings: TrainSettings, adapter_dir: Path, checkpoints_dir: Path, *, is_last: bool
    ) -> dict[str, object]:
        self.seeds.append(settings.seed)
        self.is_last.append(is_last)
        (checkpoints_dir / "checkpoint-1").mkdir(exist_ok=True)
        adapter_dir.mkdir()
        (adapter_dir / "adapter_model.safetensors").write_text(str(settings.seed))
        if self.dies_in == len(self.seeds) - 1:
            raise KeyboardInterrupt
        n = len(self.seeds)
        return {"steps": 2, "losses": [n, n / 2], "first_loss": n, "last_loss": n / 2, "computed_tokens": 10}


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    def average(adapters: Sequence[Path], out_dir: Path) -> float:
        out_dir.mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):  # what the stage writes
            (out_dir / name).write_text("{}")
        (out_dir / "of").write_text(
            " ".join((path / "adapter_model.safetensors").read_text() for path in adapters)
        )
        return 0.9

    monkeypatch.setattr(several, "average_adapters", average)
    return Trainer()


def train(
    place: Path, trainer: Trainer, rows: Sequence[TrainRow] = ROWS, **settings: Any
) -> tuple[dict[str, Any], int]:
    """What is told, and how many trainings were there already."""
    (place / "checkpoints").mkdir(exist_ok=True)
    kept: list[None] = []
    chosen = Settings(**{"n_trainings": 3, "seed": 5, **settings}).seen_by("train")
    told = train_several(
        rows, "base", chosen, place / "adapter", place / "checkpoints", trainer, lambda: kept.append(None)
    )
    return told, len(kept)


def test_each_training_has_a_seed_of_its_own_and_the_first_has_the_runs(
    tmp_path: Path, trainer: Trainer
) -> None:
    told, n_kept = train(tmp_path, trainer)
    assert trainer.seeds == [5, seed_of_training(5, 1), seed_of_training(5, 2)]
    assert len(set(trainer.seeds)) == 3
    assert trainer.is_last == [False, False, True]  # until then the weights are needed
    assert (tmp_path / "adapter/of").read_text().split() == [str(seed) for seed in trainer.seeds]
    assert (told["steps"], told["losses"], told["first_loss"], told["last_loss"]) == (
        6,
        [1, 0.5, 2, 1, 3, 1.5],
        1,
        1.5,
    )
    assert (told["computed_tokens"], told["n_trainings"], told["rank_keeps"], n_kept) == (30, 3, 0.9, 0)
    assert not [*tmp_path.glob("checkpoints/*/checkpoint-*")]


def test_a_killed_call_goes_on_with_the_training_that_it_was_at(tmp_path: Path, trainer: Trainer) -> None:
    trainer.dies_in = 1
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, trainer)
    killed = [*trainer.seeds]
    trainer.dies_in = None
    _, n_kept = train(tmp_path, trainer)
    assert n_kept == 1
    assert trainer.seeds[len(killed) :] == [seed_of_training(5, 1), seed_of_training(5, 2)]
    assert (tmp_path / "adapter/of").read_text().split() == [str(seed_of_training(5, n)) for n in range(3)]


def test_the_stage_trains_as_often_as_it_is_told(
    finished_run: Run, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_training(monkeypatch)
    chosen = replace(finished_run, settings=replace(finished_run.settings, n_trainings=3).seen_by("train"))
    with contextlib.chdir(finished_run.path):  # the trainer changes to another directory
        run_train(chosen)
    told = finished_run.manifest()["stages"]["train"]["training"]
    assert (told["n_trainings"], told["steps"], told["losses"]) == (3, 3, [2.5] * 3)
    assert not finished_run.file("checkpoints").exists()


@pytest.mark.parametrize("change", ["rows", "epochs", "file"])
def test_a_training_of_other_rows_or_settings_is_not_gone_on_with(
    tmp_path: Path, trainer: Trainer, change: str
) -> None:
    trainer.dies_in = 1
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, trainer)
    trainer.dies_in = None
    if change == "file":
        (tmp_path / "checkpoints/training-0/adapter/adapter_model.safetensors").write_text("damaged")
    _, n_kept = train(
        tmp_path,
        trainer,
        ROWS[:1] if change == "rows" else ROWS,
        **({"epochs": 7} if change == "epochs" else {}),
    )
    assert n_kept == 0
