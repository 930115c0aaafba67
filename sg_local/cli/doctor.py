"""`sg-local doctor`: what this machine can do, and what is missing."""

import click

from sg_local.cli.options import JSON_OPTION
from sg_local.cli.output import echo_json


@click.command()
@JSON_OPTION
def doctor(as_json: bool) -> None:
    """\b
    sg-local doctor

    Checks packages, processor, memory, disk, GPU and models. If something is missing, the fix stands beside it.

    Exit code 1: something that is needed is missing.
    """
    from sg_local.errors import SgLocalError
    from sg_local.escape import json_text, printable
    from sg_local.plan.doctor import examine, missing
    from sg_local.report.checks import finding_lines

    findings = examine()
    if as_json:
        echo_json(json_text(findings, indent=1))
    else:
        for finding in findings:
            click.echo(printable("\n".join(finding_lines(finding))))
    if missing_names := missing(findings):
        raise SgLocalError(f"missing: {', '.join(missing_names)}; what to do is said beside each")
