"""`sg-local doctor`: what this machine can do, and what is missing."""

import click

from sg_local.cli.options import JSON_OPTION


@click.command()
@JSON_OPTION
def doctor(as_json: bool) -> None:
    """\b
    sg-local doctor

    Looks at packages, processor, memory, disk, GPU and models, and says what to do where something is missing.

    Exit code 0: all that is needed is there; 1: something is missing.
    """
    from sg_local.errors import SgLocalError
    from sg_local.escape import json_text, printable
    from sg_local.plan.doctor import examine, missing
    from sg_local.report.checks import finding_lines

    findings = examine()
    if as_json:
        click.echo(json_text(findings, indent=1))
    else:
        for finding in findings:
            click.echo(printable("\n".join(finding_lines(finding))))
    if lacks := missing(findings):
        raise SgLocalError(f"missing: {', '.join(lacks)}; what to do is said beside each")
