"""`sg-local export`: stage 5 of a run, or any PEFT LoRA adapter as GGUF files."""

from pathlib import Path
from typing import Any

import click

from sg_local.cli.options import JSON_OPTION, given, setting_options
from sg_local.cli.stages import REDO_OPTION, run_one


@click.command()
@click.argument("run_dir", metavar="[RUN]", required=False, type=click.Path(path_type=Path))
@REDO_OPTION
@click.option(
    "--adapter",
    "adapter_dir",
    type=click.Path(path_type=Path),
    help="A directory with adapter_config.json and adapter_model.safetensors, as PEFT saves it.",
)
@click.option("--model", help="The base of --adapter: a GGUF file, or a name of `sg-local models list`.")
@click.option(
    "--out",
    "out_dir",
    type=click.Path(path_type=Path),
    help="Where the files of --adapter go.  [default: ADAPTER-gguf, beside the adapter]",
)
@JSON_OPTION
@setting_options("quant", "n_ctx", "n_threads", "n_gpu_layers")
def export(
    run_dir: Path | None,
    redo: bool,
    adapter_dir: Path | None,
    model: str | None,
    out_dir: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """\b
    sg-local export runs/support-inbox
    sg-local export --adapter ./my-lora --model ./base.Q4_K_M.gguf --quant Q8_0

    Writes the GGUF files, and proves that they are the trained model.

    For a run: adapter.gguf, model.gguf and Modelfile, with the settings that the run was begun with. For any plain
    LoRA adapter that PEFT or Unsloth saved: adapter.gguf and model.gguf, with the same comparison of llama.cpp with
    torch.
    """  # fmt: skip
    from sg_local.errors import InputError

    chosen = given(settings)
    if run_dir is not None:
        others = [
            name for name, value in (("adapter", adapter_dir), ("model", model), ("out", out_dir)) if value
        ]
        if others or chosen or as_json:
            named = ", ".join(
                "--" + name.replace("_", "-") for name in [*others, *chosen, *["json"] * as_json]
            )
            raise InputError(f"{named} is for an adapter without a run: leave it out, or leave {run_dir} out")
        run_one("export", run_dir, redo)
        return
    if adapter_dir is None or model is None:
        raise InputError("give a RUN, or --adapter DIR with --model BASE.gguf")
    if redo:
        raise InputError("--redo is for a run: give another --out, or move the files there away")
    import json

    from sg_local.settings import resolve_settings
    from sg_local.stages.export import export_adapter

    place = out_dir or adapter_dir.with_name(f"{adapter_dir.resolve().name}-gguf")
    parity = export_adapter(adapter_dir, model, place, resolve_settings("default", chosen))
    if as_json:
        click.echo(json.dumps(parity.as_dict()))
    else:
        click.echo(f"{place / 'adapter.gguf'}  (llama.cpp, beside the base: --lora)")
        click.echo(f"{place / 'model.gguf'}  (llama.cpp, LM Studio, Ollama)")
