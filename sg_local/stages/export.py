"""Stage 5: the trained adapter as files that llama.cpp, Ollama and LM Studio run.

reads  adapter/ train.jsonl, from which the compared prompts are
writes adapter.gguf   LoRA adapter for the base GGUF
       model.gguf     base and adapter merged, in the base's own types, Q8_0 where these are too coarse, or --quant
       Modelfile      for `ollama create`

Nothing gets its final name before llama.cpp with these files was compared with torch (parity.py).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sg_local.chat.modelfile import modelfile
from sg_local.errors import InputError
from sg_local.files import canonical_json, sha256_file, write_json, write_text
from sg_local.gguf_io.adapter import write_adapter_gguf
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.merge import merge_gguf
from sg_local.llama.library import load_model
from sg_local.llama.quantize import requantize
from sg_local.llama.tokens import Tokenizer
from sg_local.models import directory_name, resolve_model
from sg_local.progress import say
from sg_local.proof.parity import Parity, measure_on_texts, measure_run, require_parity
from sg_local.runs.begin import describe_base, read_model
from sg_local.runs.directory import BaseModel, Run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.runs.stage_files import STAGE_FILES
from sg_local.selfguide.prompts import answer_messages
from sg_local.settings import STAGES, Settings

EXPORTED_FROM_ELSEWHERE = ("adapter.gguf", "model.gguf", "parity.json")
FINER = "Q8_0"  # of model.gguf, where the base's own types are too coarse


def run_export(run: Run) -> None:
    """Writes the adapter, the merged model and the Modelfile, and proves that they are the trained model."""
    from sg_local.finetune.environment import require_training_packages

    require_training_packages(("torch", "transformers", "peft"))
    with run.stage("export") as details:
        work = run.file(".work") / "export"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        metadata = _metadata(run)
        write_text(work / "Modelfile", _modelfile(run))
        parity, too_coarse = _write_ggufs(
            run.model, run.settings, run.file("adapter"), work, metadata, partial(measure_run, run)
        )
        details["parity"] = parity.as_dict()
        if too_coarse:
            details["too_coarse"] = too_coarse.as_dict()
        _require_and_tell(parity, run.file("adapter"), run.model)
        for name in STAGE_FILES["export"].writes:
            os.replace(work / name, run.file(name))
        shutil.rmtree(run.file(".work"), ignore_errors=True)


def export_adapter(adapter_dir: Path, model_source: str, out_dir: Path, settings: Settings) -> Parity:
    """Writes adapter.gguf and model.gguf of a PEFT adapter from elsewhere into out_dir, with the same proof.

    Of the settings it reads quant and those of the engine. Raises InputError where the adapter or the model cannot be
    exported or out_dir has such files, and SgLocalError where the proof fails; then nothing is left behind.
    """
    from sg_local.finetune.environment import require_training_packages

    require_training_packages(("torch", "transformers", "peft"))
    base = describe_base(read_model(resolve_model(model_source)), settings)
    if there := [name for name in EXPORTED_FROM_ELSEWHERE if (out_dir / name).exists()]:
        raise InputError(f"{out_dir / there[0]} exists already: move it away, or give another --out")
    is_new = not out_dir.exists()
    work = out_dir / ".work"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        metadata = {
            "general.name": f"{base.path.stem} with {directory_name(adapter_dir)}",
            **_origin(base),
        }
        measured = partial(measure_on_texts, base, settings, adapter_dir)
        parity, _ = _write_ggufs(base, settings, adapter_dir, work, metadata, measured)
        _require_and_tell(parity, adapter_dir, base)
        write_json(work / "parity.json", parity.as_dict())
        for name in EXPORTED_FROM_ELSEWHERE:
            os.replace(work / name, out_dir / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if is_new and out_dir.is_dir() and not any(out_dir.iterdir()):
            out_dir.rmdir()
    return parity


def export_adapter_in_child(
    adapter_dir: str, model_source: str, out_dir: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """`export_adapter` in a process that was made for it; what it measured as JSON."""
    return export_adapter(Path(adapter_dir), model_source, Path(out_dir), Settings(**settings)).as_dict()


def _require_and_tell(parity: Parity, adapter_dir: Path, base: BaseModel) -> None:
    require_parity(parity, adapter_dir, base.path)
    if parity.advice:
        say(f"export: {parity.advice}")


def _write_ggufs(
    base: BaseModel,
    settings: Settings,
    adapter_dir: Path,
    work: Path,
    metadata: dict[str, str],
    measured: Callable[[Path, Path], Parity],
) -> tuple[Parity, Parity | None]:
    """Writes work/adapter.gguf and work/model.gguf; returns how near they are to the trained model, as measured.

    Where the base's types were too coarse for that, it returns what was measured of them too.
    """
    adapter, merged = work / "adapter.gguf", work / "model.gguf"
    say("export: adapter.gguf")
    write_adapter_gguf(adapter_dir, base.path, adapter, metadata)

    def write_and_measure(quant: str) -> Parity:
        say(f"export: model.gguf ({'the types of the base' if quant == 'base' else quant})")
        _write_merged(base, settings, adapter, merged, quant, metadata)
        say("export: comparing llama.cpp with torch")
        parity = measured(adapter, merged)
        say(f"export: {parity.in_words()}")
        return parity

    if settings.quant != "auto":
        return write_and_measure(settings.quant), None
    parity = write_and_measure("base")
    if not parity.is_too_coarse:
        return parity, None
    say(f"export: {parity.merged_type} is too coarse for what was trained, model.gguf is made in {FINER}")
    return write_and_measure(FINER), parity


def _write_merged(
    base: BaseModel, settings: Settings, adapter: Path, merged: Path, quant: str, metadata: dict[str, str]
) -> None:
    """Base and adapter as one file.

    Another quantization is made of the base, and the adapter added on its grid. Quantizing after the merge would be
    shorter, but rounds the adapter away wherever a matrix keeps its type.
    """
    if quant == "F16":
        merge_gguf(base.path, adapter, merged, metadata=metadata, matrix_type="F16")
    elif quant == "base":
        merge_gguf(base.path, adapter, merged, metadata=metadata)
    else:
        requantized = merged.with_name("base.gguf")
        requantize(base.path, requantized, quant, settings.n_threads)
        merge_gguf(requantized, adapter, merged, metadata=metadata, force=True)
        requantized.unlink()


def _metadata(run: Run) -> dict[str, str]:
    """What the exported files say about themselves; `predict` reads sg_local.task."""
    task = {
        "name": run.task.name,
        "instruction": run.task.instruction,
        "labels": list(run.task.labels),
        "examples": [{"input": example.input, "output": example.output} for example in demonstrations(run)],
        "max_new_tokens": run.settings.max_new_tokens,
        "prompt_format": run.model.prompt_format,
    }
    return {
        "general.name": f"{run.model.path.stem} tuned for {run.task.name}",
        "sg_local.task": json.dumps(task, ensure_ascii=False),
        "sg_local.train_sha256": sha256_file(run.file("train.jsonl")),
        "sg_local.manifest_sha256": _manifest_sha256(run),
        **_origin(run.model),
    }


def _origin(base: BaseModel) -> dict[str, str]:
    """Which model the files were made from, and its licence."""
    return {
        "general.license": base.licence,
        "sg_local.base_fingerprint": fingerprint(base.path),
        "sg_local.base_sha256": base.sha256,
    }


def _manifest_sha256(run: Run) -> str:
    """A hash of what the stages so far read and wrote, and of their settings: not of times and versions."""
    stages = run.manifest()["stages"]
    kept = {
        stage: {key: stages[stage][key] for key in ("reads", "writes", "settings")}
        for stage in STAGES[: STAGES.index("export")]
    }
    return hashlib.sha256(canonical_json(kept).encode()).hexdigest()


def _modelfile(run: Run) -> str:
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(template_source(run))
        messages = answer_messages(run.task.instruction, run.task.examples[0].input)
        end = tokenizer.encode_answer(template, messages, run.task.examples[0].output)[-1]
        stops = sorted({tokenizer.text_of(end), template.eos_token} - {""})
        return modelfile(
            template,
            run.task.instruction,
            demonstrations(run),
            stops=stops,
            licence=run.model.licence,
            adds_bos=tokenizer.adds_bos,
        )
