"""`sg-local export-adapter`: any PEFT LoRA adapter as GGUF files."""

from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import JSON_OPTION, SettingsCommand, given


@click.command(cls=SettingsCommand, settings=("quant", "n_ctx", "n_threads", "n_gpu_layers"))
@click.option(
    "--adapter",
    "adapter_dir",
    required=True,
    type=click.Path(path_type=Path),
    help="A directory with adapter_config.json and adapter_model.safetensors, as PEFT saves it.",
)
@click.option("--model", required=True, help="Its base: a GGUF file, or a name of `sg-local models list`.")
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

    Writes any plain LoRA adapter that PEFT or Unsloth saved as adapter.gguf and model.gguf, and proves that they are
    the trained model, as `sg-local export` does it for a run.
    """
    import json

    from sg_local.models import directory_name
    from sg_local.settings import resolve_settings
    from sg_local.stages.export import export_adapter as write_ggufs

    place = out_dir or adapter_dir.parent / f"{directory_name(adapter_dir)}-gguf"
    parity = write_ggufs(adapter_dir, model, place, resolve_settings("default", given(settings)))
    if as_json:
        click.echo(json.dumps(parity.as_dict()))
    else:
        click.echo(f"{place / 'adapter.gguf'}  (llama.cpp, beside the base: --lora)")
        click.echo(f"{place / 'model.gguf'}  (llama.cpp, LM Studio, Ollama)")
