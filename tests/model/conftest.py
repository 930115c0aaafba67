"""The real small model that these tests run: SmolLM2-135M-Instruct, Q4_1, from its PyPI wheel."""

from pathlib import Path

import pytest

from sg_local.errors import InputError
from sg_local.finetune.environment import go_offline
from sg_local.models import resolve_model

go_offline()  # before any test imports transformers, as each stage does


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model's file; `make install` brings it."""
    try:
        return resolve_model("smollm2-135m")
    except InputError as error:
        pytest.skip(str(error))
