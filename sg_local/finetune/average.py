"""Averages LoRA adapters of several trainings into one of the same rank.

    average_adapters([Path("training-0"), Path("training-1")], Path("adapter"))
    0.94    the share of the mean change's energy that the rank keeps

The mean of the products B A, and not of the factors: two trainings that learned the same may hold it in other factors.
The mean of n products is one of rank n r; its singular value decomposition gives the nearest of rank r (Eckart and
Young 1936). The products themselves, as large as the model, are never made: QR of the stacked factors leaves a square
of n r to decompose.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_A, _B = ".lora_A.weight", ".lora_B.weight"


def average_adapters(adapter_dirs: Sequence[Path], out_dir: Path) -> float:
    """Writes the mean of adapters that differ in nothing but their numbers; returns the energy that its rank keeps.

    The energy of a change is the sum of its squares, over all matrices.
    """
    from safetensors.torch import load_file, save_file

    loaded = [load_file(directory / WEIGHTS) for directory in adapter_dirs]
    averaged: dict[str, Any] = {}
    kept = total = 0.0
    for name_a in (name for name in loaded[0] if name.endswith(_A)):
        name_b = name_a.removesuffix(_A) + _B
        products = [(tensors[name_b], tensors[name_a]) for tensors in loaded]
        averaged[name_b], averaged[name_a], energies = mean_product(products)
        rank = averaged[name_a].shape[0]
        kept += float(energies[:rank].sum())
        total += float(energies.sum())
    out_dir.mkdir(exist_ok=True)
    save_file(averaged, out_dir / WEIGHTS, metadata={"format": "pt"})
    shutil.copyfile(adapter_dirs[0] / CONFIG, out_dir / CONFIG)
    return kept / total if total else 1.0


def mean_product(products: Sequence[tuple[Any, Any]]) -> tuple[Any, Any, Any]:
    """(B, A, energies), tensors, for pairs (B, A): the nearest product of the same rank to the mean of theirs.

    energies: the squared singular values of that mean, falling; those beyond the rank are lost. B and A get equal
    shares of each singular value, so that both have numbers of about the same size.
    """
    import torch

    rank, dtype = products[0][1].shape[0], products[0][1].dtype
    stacked_b = torch.cat([b.double() for b, _ in products], dim=1) / len(products)
    stacked_a = torch.cat([a.double() for _, a in products], dim=0)
    q_b, r_b = torch.linalg.qr(stacked_b)
    q_a, r_a = torch.linalg.qr(stacked_a.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    roots = values[:rank].sqrt()
    b = q_b @ (u[:, :rank] * roots)
    a = (v[:rank] * roots[:, None]) @ q_a.T
    if (missing := rank - a.shape[0]) > 0:  # a matrix smaller than the rank has fewer singular values
        b = torch.nn.functional.pad(b, (0, missing))
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
    return b.to(dtype).contiguous(), a.to(dtype).contiguous(), values.square()
