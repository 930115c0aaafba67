"""Models as lines to read: those that have a name, and what one file says about itself.

smollm2-135m         0.10 GB  here        fits
    SmolLM2 135M Instruct, Q4_1: for a first try, also on a CPU (Apache-2.0)
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from sg_local.escape import json_text, one_line
from sg_local.models import Model

MAX_FACT_CHARACTERS = 400


class KnownModel(NamedTuple):
    """A model that has a name: whether it is on this machine, and whether a run fits that; None where nobody knows."""

    model: Model
    is_present: bool
    fit: str | None


def model_lines(known: Sequence[KnownModel]) -> Iterator[str]:
    """Two lines for each: what this machine has and is fit for, and what the model is and is good for.

    A reference to the hub stands at the end, and says itself what it is.
    """
    width = max((len(item.fit or "") for item in known), default=0)
    for model, is_present, fit in known:
        state = "here" if is_present else "not pulled"
        facts = f"{model.size_bytes / 1e9:6.2f} GB  {state:10}  {fit or '':{width}}"
        if model.is_by_reference:
            yield f"{facts}  {model.licence}  {model.name}"
        else:
            yield f"{model.name:18} {facts}".rstrip()
            yield f"    {model.description} ({model.licence})"


def fact_lines(facts: Mapping[str, object]) -> Iterator[str]:
    """The facts of a file, one a line; long ones are cut."""
    for name, fact in facts.items():
        text = fact if isinstance(fact, str) else json_text(fact)
        yield f"{name:18} {one_line(text[:MAX_FACT_CHARACTERS])}"
