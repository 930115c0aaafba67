"""`sg-local models list|pull|show`: models by name."""

from typing import TYPE_CHECKING

import click

from sg_local.cli.group import Group
from sg_local.cli.options import JSON_OPTION, complete_model
from sg_local.cli.output import echo_json

if TYPE_CHECKING:
    from sg_local.gguf_header import GgufHeader


@click.group(cls=Group)
def models() -> None:
    """\b
    sg-local models pull smollm2-135m

    Models that have a name: list, pull, show.
    """


@models.command("list", short_help="List the models that have a name.")
@JSON_OPTION
def list_command(as_json: bool) -> None:
    """\b
    sg-local models list

    Lists the models that have a name, and those that were pulled from Hugging Face by their reference; and says which
    fit this machine, as `sg-local plan` finds it for a small task.
    """
    from dataclasses import asdict

    from sg_local.escape import json_text, printable
    from sg_local.plan.model_list import list_known_models
    from sg_local.report.models import model_lines

    known = list_known_models()
    if as_json:
        rows = [{**asdict(model), "is_present": is_present, "fit": fit} for model, is_present, fit in known]
        echo_json(json_text(rows, indent=1))
        return
    for line in model_lines(known):
        click.echo(printable(line))


@models.command("pull", short_help="Download a model. No other command does.")
@click.argument("name", shell_complete=complete_model)
def pull_command(name: str) -> None:
    """\b
    sg-local models pull smollm2-135m
    sg-local models pull hf:OWNER/REPOSITORY:FILE.gguf

    Fetches a model into the store: one of `sg-local models list`, or a GGUF file on Hugging Face, whose header is read
    first and which is refused if it cannot be tuned. No other command downloads anything.
    """
    from sg_local.escape import printable
    from sg_local.progress import say
    from sg_local.pull import pull_model

    click.echo(printable(str(pull_model(name, say))))


@models.command("show", short_help="Show what a model file says about itself.")
@click.argument("model", shell_complete=complete_model)
@JSON_OPTION
def show_command(model: str, as_json: bool) -> None:
    """\b
    sg-local models show smollm2-135m

    Shows what a GGUF file says about itself. MODEL is a path, or a name or reference of `sg-local models list`.
    """
    import math
    from collections import Counter

    from sg_local.escape import json_text, printable
    from sg_local.gguf_header import read_header
    from sg_local.models import find_by_path, resolve_model
    from sg_local.report.models import fact_lines

    path = resolve_model(model)
    header = read_header(path)
    listed = find_by_path(path)
    types = Counter(tensor.type_name for tensor in header.tensors)
    facts = {
        "path": str(path),
        "kind": header.kind,
        "name": header.metadata.get("general.name"),
        "architecture": header.architecture,
        "size_bytes": header.size_bytes,
        "n_parameters": sum(math.prod(tensor.shape) for tensor in header.tensors),
        "tensor_types": dict(types.most_common()),
        "context_tokens": header.metadata.get(f"{header.architecture}.context_length"),
        "has_chat_template": header.chat_template is not None,
        "licence": listed.licence if listed else header.metadata.get("general.license"),
        "tuned_for": _task_name(header),
    }
    if as_json:
        echo_json(json_text(facts, indent=1))
        return
    for line in fact_lines(facts):
        click.echo(printable(line))


def _task_name(header: "GgufHeader") -> str | None:
    """The name of the task that a tuned GGUF carries; None where there is none, or none that can be used."""
    from sg_local.errors import InputError
    from sg_local.task import carried_task

    told = header.metadata.get("sg_local.task")
    try:
        return carried_task(told, header.path).task.name if isinstance(told, str) else None
    except InputError:
        return None
