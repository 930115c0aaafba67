"""The models that have a name, whether each is on this machine, and whether a run with it fits here. Only reads.

list_known_models()    [KnownModel(Model("smollm2-135m", ...), is_present=True, fit="fits"), ...]
"""

from pathlib import Path

from sg_local.errors import InputError
from sg_local.gguf_header import read_model_header
from sg_local.models import Model, find_present, list_models, list_pulled
from sg_local.plan.machine import Machine
from sg_local.plan.plan import how_it_fits, look_at_machine
from sg_local.plan.sizes import listed_sizes, model_sizes
from sg_local.report.models import KnownModel


def list_known_models() -> list[KnownModel]:
    """Those of the list, and those that were pulled by their reference."""
    machine = look_at_machine(Path("runs"), None)
    pulled = [model for model in list_pulled() if find_present(model)]
    return [_known(model, machine) for model in [*list_models(), *pulled]]


def _known(model: Model, machine: Machine) -> KnownModel:
    path = find_present(model)
    try:
        sizes = model_sizes(read_model_header(path)) if path else listed_sizes(model) if model.shape else None
    except InputError:  # `models show` says what is wrong with the file
        sizes = None
    return KnownModel(model, path is not None, how_it_fits(sizes, machine) if sizes else None)
