"""Several trainings on the same rows, each with a seed of its own, whose adapters are averaged into one.

    checkpoints/training-0/adapter/        finished: its files, training.json and a mark (checkpoints.py)
    checkpoints/training-1/checkpoint-40/  being trained
    -> {"steps": 126, "losses": [...], "n_trainings": 2, "rank_keeps": 0.94}

A seed decides the order of the rows, the first numbers of the adapter and what dropout leaves out. Killed, and called
again, it goes on with the training that it was at.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from sg_local.files import own_directory, read_json, remove_tree, row_seed, write_json
from sg_local.finetune.average import average_adapters
from sg_local.finetune.batches import TrainRow
from sg_local.finetune.checkpoints import is_complete, mark_complete, remove_incomplete, training_key
from sg_local.settings import TrainSettings

FACTS = "training.json"
MAX_FACTS_BYTES = 16 << 20


class TrainOne(Protocol):
    """Trains once, and says what it did: `train_adapter`, of which the rest is given."""

    def __call__(
        self, settings: TrainSettings, adapter_dir: Path, checkpoints_dir: Path, *, is_last: bool
    ) -> dict[str, object]: ...


def seed_of_training(seed: int, number: int) -> int:
    """The seed of one of several trainings; the first has the run's, as a single one."""
    return row_seed(seed, "train", number) if number else seed


def train_several(
    rows: Sequence[TrainRow],
    base: str,
    settings: TrainSettings,
    adapter_dir: Path,
    checkpoints_dir: Path,
    train_one: TrainOne,
    on_kept: Callable[[], None],
) -> dict[str, object]:
    """Trains `n_trainings` times and writes the mean in adapter_dir; returns what the trainings did.

    base: the base's hash. on_kept: called for each training that an earlier call finished.
    """
    found: list[dict[str, Any]] = []
    adapters: list[Path] = []
    for number in range(settings.n_trainings):
        own = replace(settings, seed=seed_of_training(settings.seed, number))
        key = training_key({"base": base, "rows": [asdict(row) for row in rows], **own.as_dict()})
        place = checkpoints_dir / f"training-{number}"
        adapter = place / "adapter"
        if is_complete(adapter, key):
            on_kept()
        else:
            own_directory(place)
            remove_tree(adapter)
            remove_incomplete(place)
            facts = train_one(own, adapter, place, is_last=number == settings.n_trainings - 1)
            write_json(adapter / FACTS, facts)
            mark_complete(adapter, key)
            for checkpoint in place.glob("checkpoint-*"):
                remove_tree(checkpoint)
            gc.collect()  # of the model, before the next is loaded
        found.append(read_json(adapter / FACTS, MAX_FACTS_BYTES))
        adapters.append(adapter)
    kept = average_adapters(adapters, adapter_dir)
    return {**_together(found), "n_trainings": len(found), "rank_keeps": round(kept, 4)}


def _together(found: Sequence[dict[str, Any]]) -> dict[str, object]:
    """What several trainings did, as if they were one: numbers of work add up, losses follow each other."""
    first, last = found[0], found[-1]
    return {
        **first,
        "steps": sum(facts["steps"] for facts in found),
        "last_loss": last["last_loss"],
        "losses": [loss for facts in found for loss in facts["losses"]],
        "computed_tokens": sum(facts["computed_tokens"] for facts in found),
    }
