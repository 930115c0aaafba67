"""`sg-local export-adapter`: any PEFT LoRA adapter as GGUF files."""

from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import JSON_OPTION, SettingsCommand, complete_model, given
from sg_local.cli.output import echo_json


@click.command(cls=SettingsCommand, settings=("quant", "n_ctx", "n_threads", "n_gpu_layers"))
@click.option(
    "--adapter",
    "adapter_dir",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory of a PEFT adapter: adapter_config.json and adapter_model.safetensors.",
)
@click.option(
    "--model",
    required=True,
    shell_complete=complete_model,
    help="The adapter's base: a GGUF file, or a name of `sg-local models list`.",
)
@click.option(
    "--out",
    "out_dir",
    type=click.Path(path_type=Path),
    help="Directory to write to.  [default: ADAPTER-gguf, beside the adapter]",
)
@JSON_OPTION
def export_adapter(
    adapter_dir: Path, model: str, out_dir: Path | None, as_json: bool, **settings: Any
) -> None:
    """\b
    sg-local export-adapter --adapter ./my-lora --model ./base.Q4_K_M.gguf --quant Q8_0

    Turns a plain LoRA adapter, saved by PEFT or Unsloth, into adapter.gguf and model.gguf, and proves that both are
    the trained model, as `sg-local export` does for a run.
    """
    from sg_local import child_process
    from sg_local.escape import json_text, printable
    from sg_local.models import directory_name
    from sg_local.settings import resolve_settings

    place = out_dir or adapter_dir.parent / f"{directory_name(adapter_dir)}-gguf"
    parity = child_process.result_from_child(
        "export-adapter",
        "sg_local.stages.export.export_adapter_in_child",
        adapter_dir=str(adapter_dir),
        model_source=model,
        out_dir=str(place),
        settings=resolve_settings("default", given(settings)).as_dict(),
    )
    if as_json:
        echo_json(json_text(parity))
    else:
        click.echo(printable(f"{place / 'adapter.gguf'}  (llama.cpp, beside the base: --lora)"))
        click.echo(printable(f"{place / 'model.gguf'}  (llama.cpp, LM Studio, Ollama)"))
