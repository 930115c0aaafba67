"""The mean of adapters: the nearest of the same rank to the mean of what they change. torch, and no model."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sg_local.finetune.average import CONFIG, WEIGHTS, average_adapters

RANK = 4
SHAPES = {"q_proj": (24, 16), "v_proj": (3, 16)}  # the second has fewer outputs than the rank


def write_adapter(directory: Path, seed: int, scale: float = 1.0) -> dict[str, "np.ndarray"]:
    """An adapter of random numbers; returns what it changes."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (n_out, n_in) in SHAPES.items():
        tensors[f"m.{name}.lora_A.weight"] = rng.normal(size=(RANK, n_in)).astype("float32")
        tensors[f"m.{name}.lora_B.weight"] = scale * rng.normal(size=(n_out, RANK)).astype("float32")
    directory.mkdir()
    save_file(tensors, directory / WEIGHTS)
    (directory / CONFIG).write_text('{"r": 4}')
    return products(directory)


def products(directory: Path) -> dict[str, "np.ndarray"]:
    tensors = load_file(directory / WEIGHTS)
    return {name: tensors[f"m.{name}.lora_B.weight"] @ tensors[f"m.{name}.lora_A.weight"] for name in SHAPES}


def test_the_mean_of_equal_adapters_is_the_same_adapter(tmp_path: Path) -> None:
    expected = write_adapter(tmp_path / "a", 1)
    write_adapter(tmp_path / "b", 1)
    assert average_adapters([tmp_path / "a", tmp_path / "b"], tmp_path / "mean") == pytest.approx(1.0)
    for name, found in products(tmp_path / "mean").items():
        np.testing.assert_allclose(found, expected[name], atol=1e-5)
    assert (tmp_path / "mean" / CONFIG).read_text() == '{"r": 4}'
    shapes = {name: array.shape for name, array in load_file(tmp_path / "a" / WEIGHTS).items()}
    assert {name: array.shape for name, array in load_file(tmp_path / "mean" / WEIGHTS).items()} == shapes


def test_the_mean_of_others_is_the_nearest_of_their_rank(tmp_path: Path) -> None:
    changes = [write_adapter(tmp_path / str(seed), seed, scale=seed) for seed in (1, 2, 3)]
    kept = average_adapters([tmp_path / str(seed) for seed in (1, 2, 3)], tmp_path / "mean")
    energies = np.zeros(2)
    for name, found in products(tmp_path / "mean").items():
        u, values, v = np.linalg.svd(
            np.mean([change[name] for change in changes], axis=0), full_matrices=False
        )
        np.testing.assert_allclose(found, (u[:, :RANK] * values[:RANK]) @ v[:RANK], atol=1e-4)
        energies += [np.sum(values[:RANK] ** 2), np.sum(values**2)]
    assert kept == pytest.approx(energies[0] / energies[1], abs=1e-4)
    assert kept < 0.95


def test_adapters_that_change_nothing_have_a_mean(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", 1, scale=0.0)
    assert average_adapters([tmp_path / "a", tmp_path / "a"], tmp_path / "mean") == 1.0
    assert all(np.all(change == 0) for change in products(tmp_path / "mean").values())
