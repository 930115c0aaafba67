"""Stage 5: the trained adapter as files that llama.cpp, Ollama and LM Studio run.

reads  adapter/ train.jsonl, from which the compared prompts are
writes adapter.gguf   LoRA adapter for the base GGUF
       model.gguf     base and adapter merged, in the base's own types, Q8_0 where these cannot hold it, or --quant
       Modelfile      for `ollama create`; Modelfile.adapter: the same for base and adapter.gguf
       chat_template.jinja    of model.gguf, for base and adapter.gguf: it writes the trained prompt (chat/served.py)

Nothing gets its final name before llama.cpp with these files was compared with torch (parity.py).
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sg_local.chat.modelfile import beside_base, modelfile
from sg_local.chat.served import require_served
from sg_local.errors import InputError, SgLocalError
from sg_local.files import canonical_json, own_directory, remove_tree, sha256_file, write_json, write_text
from sg_local.gguf_header import BASE_TEMPLATE_KEY, read_header
from sg_local.gguf_io.adapter import write_adapter_gguf
from sg_local.gguf_io.check_base import FINER, type_to_merge_in
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.merge import merge_gguf
from sg_local.llama.asking import longest_answer
from sg_local.llama.library import load_model
from sg_local.llama.quantize import requantize
from sg_local.llama.tokens import Tokenizer
from sg_local.models import directory_name, find_by_path, resolve_model
from sg_local.progress import say, working
from sg_local.proof.parity import ExportAs, Parity, measure_on_texts, measure_run, require_parity
from sg_local.runs.begin import describe_base, read_model, require_base
from sg_local.runs.directory import BaseModel, Run, open_run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.runs.stage_files import STAGE_FILES
from sg_local.selfguide.prompts import answer_messages
from sg_local.settings import STAGES, Settings

EXPORTED_FROM_ELSEWHERE = ("adapter.gguf", "model.gguf", "parity.json")
_WORK = ".sg-local-export"  # in the directory of an export from elsewhere, while it is made
_WORK_FILES = (*EXPORTED_FROM_ELSEWHERE, "base.gguf")


def run_export(run: Run) -> None:
    """Writes the adapter, the merged model and the Modelfile, and proves that they are the trained model."""
    from sg_local.finetune.environment import require_training_packages

    require_training_packages(("torch", "transformers", "peft"))
    with run.stage("export") as details:
        work = run.file(".work")
        remove_tree(work)
        own_directory(work)
        try:
            metadata = _metadata(run)
            source, text = _chat_files(run)
            write_text(work / "chat_template.jinja", source)
            write_text(work / "Modelfile", text)
            write_text(work / "Modelfile.adapter", beside_base(text, run.model.path))
            parity, too_coarse = _write_ggufs(
                run.model,
                run.settings,
                run.file("adapter"),
                work,
                metadata,
                partial(measure_run, run),
                partial(_command, "export", run.path),
                _chat_templates(run, source),
            )
            details["parity"] = parity.as_dict()
            if too_coarse:
                details["too_coarse"] = too_coarse.as_dict()
            for name in STAGE_FILES["export"].writes:
                os.replace(work / name, run.file(name))
        finally:
            remove_tree(work)


def export_adapter(adapter_dir: Path, model_source: str, out_dir: Path, settings: Settings) -> Parity:
    """Writes adapter.gguf and model.gguf of a PEFT adapter from elsewhere into out_dir, with the same proof.

    Of the settings it reads quant and those of the engine. Raises InputError where the adapter or the model cannot be
    exported or out_dir has such files, and SgLocalError where the proof fails; then nothing is left behind.
    """
    from sg_local.finetune.environment import require_training_packages

    require_training_packages(("torch", "transformers", "peft"))
    model = read_model(resolve_model(model_source))
    require_base(model, settings)
    base = describe_base(model, settings)
    if there := [name for name in EXPORTED_FROM_ELSEWHERE if os.path.lexists(out_dir / name)]:
        raise InputError(f"{out_dir / there[0]} exists already: move it away, or give another --out")
    is_new = not out_dir.exists()
    work = out_dir / _WORK
    _remove_killed_work(work)
    try:
        own_directory(work)
        run = _run_of(adapter_dir)
        metadata = {
            "general.name": f"{base.path.stem} with {directory_name(adapter_dir)}",
            **(_task_metadata(run) if run else {}),
            **_origin(base),
        }
        chat_templates = _chat_templates(run, _chat_files(run)[0]) if run else None
        measured = partial(measure_on_texts, base, settings, adapter_dir)
        export_as = partial(
            _command, "export-adapter", "--adapter", adapter_dir, "--model", base.path, "--out", out_dir
        )
        parity, _ = _write_ggufs(
            base, settings, adapter_dir, work, metadata, measured, export_as, chat_templates
        )
        write_json(work / "parity.json", parity.as_dict())
        for name in EXPORTED_FROM_ELSEWHERE:
            os.replace(work / name, out_dir / name)
    finally:
        remove_tree(work)
        if is_new and out_dir.is_dir() and not any(out_dir.iterdir()):
            out_dir.rmdir()
    return parity


def _remove_killed_work(work: Path) -> None:
    """Removes what a killed call left. Raises InputError where it holds anything that no call of ours writes."""
    if not os.path.lexists(work):
        return
    is_ours = work.is_dir() and not work.is_symlink()
    if not is_ours or any(
        not path.is_file() or not path.name.strip(".").startswith(_WORK_FILES) for path in work.iterdir()
    ):
        raise InputError(f"{work} is in the way, and not ours alone: move it away, or give another --out")
    remove_tree(work)


def export_adapter_in_child(
    adapter_dir: str, model_source: str, out_dir: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """`export_adapter` in a process that was made for it; what it measured as JSON."""
    return export_adapter(Path(adapter_dir), model_source, Path(out_dir), Settings(**settings)).as_dict()


def _command(*words: object) -> str:
    """The command that exports the same in the type that is its last word."""
    return shlex.join(["sg-local", *map(str, words[:-1]), "--quant", str(words[-1])])


def _write_ggufs(
    base: BaseModel,
    settings: Settings,
    adapter_dir: Path,
    work: Path,
    metadata: dict[str, str],
    measured: Callable[[Path, Path], Parity],
    export_as: ExportAs,
    chat_templates: Mapping[str, str] | None = None,
) -> tuple[Parity, Parity | None]:
    """Writes work/adapter.gguf and work/model.gguf; returns how near they are to the trained model, as measured.

    chat_templates: metadata of model.gguf alone.

    Where the base's types were too coarse for that, it returns what was measured of them too. Raises SgLocalError with
    a diagnosis where the files are not the trained model.
    """
    adapter, merged = work / "adapter.gguf", work / "model.gguf"
    with working("export: adapter.gguf"):
        write_adapter_gguf(adapter_dir, base.path, adapter, metadata)

    def write_and_measure(quant: str) -> Parity:
        with working(f"export: model.gguf ({'the types of the base' if quant == 'base' else quant})"):
            merged.unlink(missing_ok=True)  # of another type; there may be no room for both
            _write_merged(base, settings, adapter, merged, quant, {**metadata, **(chat_templates or {})})
        with working("export: comparing llama.cpp with torch"):
            parity = measured(adapter, merged)
        say(f"export: {parity.in_words()}")
        return parity

    changed = {tensor.name.rpartition(".lora_")[0] for tensor in read_header(adapter).tensors}
    quant = type_to_merge_in(read_header(base.path), settings, changed)
    parity, too_coarse = write_and_measure(quant), None
    if settings.quant == "auto" and quant == "base" and parity.is_too_coarse:
        say(f"export: {parity.merged_type} is too coarse for what was trained, model.gguf is made in {FINER}")
        parity, too_coarse = write_and_measure(FINER), parity
    finer: dict[str, Parity] = {}
    for other in parity.finer_quants if parity.only_merge_differs else ():
        say(f"export: {parity.merged_type} is too coarse for what was trained, trying {other}")
        try:
            finer[other] = write_and_measure(other)
        except SgLocalError as error:
            say(f"export: {other} could not be tried: {error}")
            continue
        if not finer[other].faults():
            break
    require_parity(parity, base, export_as, finer)
    if advice := parity.advice(export_as):
        say(f"export: {advice}")
    return parity, too_coarse


def _write_merged(
    base: BaseModel, settings: Settings, adapter: Path, merged: Path, quant: str, metadata: dict[str, str]
) -> None:
    """Base and adapter as one file.

    Another quantization is made of the base, and the adapter added on its grid. Quantizing after the merge would be
    shorter, but rounds the adapter away wherever a matrix keeps its type.
    """
    merge = partial(merge_gguf, metadata=metadata, n_threads=settings.n_threads)
    if quant == "F16":
        merge(base.path, adapter, merged, matrix_type="F16")
    elif quant == "base":
        merge(base.path, adapter, merged)
    else:
        requantized = merged.with_name("base.gguf")
        requantize(base.path, requantized, quant, settings.n_threads)
        merge(requantized, adapter, merged, force=True)
        requantized.unlink()


def _run_of(adapter_dir: Path) -> Run | None:
    """The run that trained an adapter, whose task both files then carry; None for any other adapter."""
    run_dir = Path(os.path.abspath(adapter_dir)).parent
    if directory_name(adapter_dir) != "adapter" or not (run_dir / "settings.toml").is_file():
        return None
    run = open_run(run_dir)
    for name in STAGE_FILES["train"].writes:
        run.written_file(name)
    say(f"export-adapter: the adapter of {run_dir}: both files carry its task, {run.task.name}")
    return run


def _chat_templates(run: Run, source: str) -> dict[str, str]:
    """The chat templates of model.gguf: for other programs, and the base's."""
    return {"tokenizer.chat_template": source, BASE_TEMPLATE_KEY: template_source(run)}


def _metadata(run: Run) -> dict[str, str]:
    """What the exported files say about themselves; `predict` reads sg_local.task."""
    return {
        "general.name": f"{run.model.path.stem} tuned for {run.task.name}",
        **_task_metadata(run),
        "sg_local.train_sha256": sha256_file(run.file("train.jsonl")),
        "sg_local.manifest_sha256": _manifest_sha256(run),
        **_origin(run.model),
    }


def _task_metadata(run: Run) -> dict[str, str]:
    task = {
        "name": run.task.name,
        "instruction": run.task.instruction,
        "labels": list(run.task.labels),
        "examples": [{"input": example.input, "output": example.output} for example in demonstrations(run)],
        "max_new_tokens": run.settings.max_new_tokens,
        "prompt_format": run.model.prompt_format,
    }
    return {"sg_local.task": json.dumps(task, ensure_ascii=False)}


def _origin(base: BaseModel) -> dict[str, str]:
    """Which model the files were made from, and its licence."""
    listed = find_by_path(base.path)
    return {
        "general.license": base.licence,
        "sg_local.base_fingerprint": fingerprint(base.path),
        "sg_local.base_sha256": base.sha256,
        **({"sg_local.base_source": listed.source} if listed else {}),
    }


def _manifest_sha256(run: Run) -> str:
    """A hash of what the stages so far read and wrote, and of their settings: not of times and versions."""
    stages = run.manifest()["stages"]
    kept = {
        stage: {key: stages[stage][key] for key in ("reads", "writes", "settings")}
        for stage in STAGES[: STAGES.index("export")]
    }
    return hashlib.sha256(canonical_json(kept).encode()).hexdigest()


def _chat_files(run: Run) -> tuple[str, str]:
    """The chat template for other programs, and the Modelfile."""
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(template_source(run))
        messages = answer_messages(run.task.instruction, run.task.examples[0].input, demonstrations(run))
        begins_with = template.render(messages, add_generation_prompt=True)[0]
        writes_bos = tokenizer.adds_bos and (
            begins_with.is_data or not begins_with.text.startswith(template.bos_token)
        )
        source = require_served(template, run.task.instruction, demonstrations(run), writes_bos=writes_bos)
        end = tokenizer.encode_answer(template, messages, run.task.examples[0].output)[-1]
        stops = sorted({tokenizer.text_of(end), template.eos_token} - {""})
        text = modelfile(
            template,
            run.task.instruction,
            demonstrations(run),
            stops=stops,
            licence=run.model.licence,
            max_new_tokens=longest_answer(tokenizer, run.task.labels, run.settings.max_new_tokens),
            adds_bos=tokenizer.adds_bos,
        )
        return source, text
