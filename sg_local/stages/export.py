"""Stage 5: the trained adapter as files that llama.cpp, Ollama and LM Studio run.

reads  adapter/ train.jsonl, from which the compared prompts are
writes adapter.gguf   LoRA adapter for the base GGUF
       model.gguf     base and adapter merged, in the coarsest types that keep what was trained (auto), or --quant
       Modelfile      for `ollama create`; Modelfile.adapter: the same for base and adapter.gguf
       chat_template.jinja    of model.gguf, for base and adapter.gguf: it writes the trained prompt (chat/served.py)

Nothing gets its final name before llama.cpp with these files was compared with torch (parity.py).
"""

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from sg_local.chat.modelfile import beside_base
from sg_local.errors import InputError, SgLocalError
from sg_local.files import canonical_json, own_directory, remove_tree, sha256_file, write_json, write_text
from sg_local.gguf_header import BASE_TEMPLATE_KEY, read_header
from sg_local.gguf_io.adapter import write_adapter_gguf
from sg_local.gguf_io.check_base import MIXED, finer_types, types_to_try
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.merge import merge_gguf
from sg_local.llama.chat_files import chat_files
from sg_local.llama.quantize import requantize
from sg_local.models import directory_name, find_by_path, resolve_model
from sg_local.progress import say, working
from sg_local.proof.parity import (
    ExportAs,
    Parity,
    Trained,
    require_parity,
    trained_in_run,
    trained_on_texts,
)
from sg_local.runs.begin import describe_base, read_model, require_base
from sg_local.runs.directory import BaseModel, Run, open_run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.runs.stage_files import STAGE_FILES
from sg_local.settings import STAGES, Settings

EXPORTED_FROM_ELSEWHERE = ("adapter.gguf", "model.gguf", "parity.json")
# llama.cpp drops spaces beside special tokens where a model's name has one of these (llama-vocab.cpp), and does not
# load a vocabulary of another kind under such a name.
_NAMES_FOR_TOKENS = (("phi-3", "phi3"), ("modern-bert",))
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
            chosen, tried = _write_ggufs(
                run.model,
                run.settings,
                run.file("adapter"),
                work,
                metadata,
                partial(trained_in_run, run),
                partial(_command, "export", run.path),
                _chat_templates(run, source),
            )
            details |= {"made_in": chosen.quant, "parity": chosen.parity.as_dict()}
            if len(tried) > 1:
                details["tried"] = [attempt.as_dict() for attempt in tried]
            if chosen is not tried[0]:
                details["too_coarse"] = tried[0].parity.as_dict()
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
            "general.name": _name(base, f"with {directory_name(adapter_dir)}"),
            **(_task_metadata(run) if run else {}),
            **_origin(base),
        }
        chat_templates = _chat_templates(run, _chat_files(run)[0]) if run else None
        trained = partial(trained_on_texts, base, settings, adapter_dir)
        export_as = partial(
            _command, "export-adapter", "--adapter", adapter_dir, "--model", base.path, "--out", out_dir
        )
        chosen, _ = _write_ggufs(
            base, settings, adapter_dir, work, metadata, trained, export_as, chat_templates
        )
        write_json(work / "parity.json", chosen.parity.as_dict())
        for name in EXPORTED_FROM_ELSEWHERE:
            os.replace(work / name, out_dir / name)
    finally:
        remove_tree(work)
        if is_new and out_dir.is_dir() and not any(out_dir.iterdir()):
            out_dir.rmdir()
    return chosen.parity


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


@dataclass(frozen=True)
class Attempt:
    """A type in which model.gguf was made and compared."""

    quant: str
    size_bytes: int
    parity: Parity

    @property
    def is_enough(self) -> bool:
        """Whether it is the trained model, near the decision too."""
        return not self.parity.faults() and self.parity.keeps_choices

    @property
    def is_too_coarse(self) -> bool:
        """Whether nothing but the type is at fault: a finer one may be enough."""
        return self.parity.only_merge_differs or not (self.parity.faults() or self.parity.keeps_choices)

    def as_dict(self) -> dict[str, object]:
        """For the manifest."""
        return {"quant": self.quant, "size_bytes": self.size_bytes, **self.parity.as_dict()}


def _write_ggufs(
    base: BaseModel,
    settings: Settings,
    adapter_dir: Path,
    work: Path,
    metadata: dict[str, str],
    trained_with: Callable[[Path], Trained],
    export_as: ExportAs,
    chat_templates: Mapping[str, str] | None = None,
) -> tuple[Attempt, list[Attempt]]:
    """Writes work/adapter.gguf and work/model.gguf; returns how model.gguf was made, and all that was tried.

    trained_with: gives the trained model, to compare with, beside adapter.gguf. chat_templates: metadata of model.gguf
    alone.

    Raises SgLocalError with a diagnosis where the files are not the trained model.
    """
    adapter, merged = work / "adapter.gguf", work / "model.gguf"
    with working("export: adapter.gguf"):
        write_adapter_gguf(adapter_dir, base.path, adapter, metadata)

    on_disk = ""

    @cache
    def trained() -> Trained:
        return trained_with(adapter)

    def write(quant: str) -> None:
        nonlocal on_disk
        merged.unlink(missing_ok=True)  # of another type; there may be no room for both
        _write_merged(base, settings, adapter, merged, quant, {**metadata, **(chat_templates or {})})
        on_disk = quant

    def write_and_measure(quant: str) -> Attempt:
        with working(f"export: model.gguf ({_in_words(quant)})"):
            write(quant)
        with working("export: comparing llama.cpp with torch"):
            attempt = Attempt(quant, merged.stat().st_size, trained().compare(merged))
        # In MiB however large: the types that are tried differ by a fifth.
        say(f"export: {attempt.size_bytes / 1024**2:.0f} MiB; {attempt.parity.in_words()}")
        return attempt

    first, *others = types_to_try(read_header(base.path), settings, _changed(adapter))
    tried = [write_and_measure(first)]
    for quant in others:
        if not tried[-1].is_too_coarse:
            break
        say(
            f"export: {_in_words(tried[-1].quant)}: too coarse for what was trained, trying {_in_words(quant)}"
        )
        try:
            tried.append(write_and_measure(quant))
        except SgLocalError as error:
            say(f"export: {quant} could not be tried: {error}")
            break
    chosen = _best(tried)
    finer: dict[str, Parity] = {}
    for other in chosen.parity.finer_quants if chosen.parity.only_merge_differs else ():
        say(f"export: {chosen.parity.merged_type} is too coarse for what was trained, trying {other}")
        try:
            finer[other] = write_and_measure(other).parity
        except SgLocalError as error:
            say(f"export: {other} could not be tried: {error}")
            continue
        if not finer[other].faults():
            break
    require_parity(chosen.parity, base, export_as, finer)
    if on_disk != chosen.quant:
        write(chosen.quant)
    if not chosen.is_enough:
        say(f"export: model.gguf is made in {_in_words(chosen.quant)}; {chosen.parity.near_in_words()}")
    if advice := chosen.parity.advice(export_as):
        say(f"export: {advice}")
    return chosen, tried


def _changed(adapter: Path) -> set[str]:
    """The names of the tensors that an adapter changes."""
    return {tensor.name.rpartition(".lora_")[0] for tensor in read_header(adapter).tensors}


def _best(tried: Sequence[Attempt]) -> Attempt:
    """The last one where it is enough or all are wrong; else the one that keeps most, of equal ones the coarsest."""
    right = [attempt for attempt in tried if not attempt.parity.faults()]
    if tried[-1].is_enough or not right:
        return tried[-1]
    return max(right, key=lambda attempt: attempt.parity.near_expected_share or 0.0)


def _in_words(quant: str) -> str:
    """A type of model.gguf."""
    words = {
        "base": "the types of the base",
        MIXED: "the types of the base, Q8_0 for the attention and ffn_down",
    }
    return words.get(quant, quant)


def _write_merged(
    base: BaseModel, settings: Settings, adapter: Path, merged: Path, quant: str, metadata: dict[str, str]
) -> None:
    """Base and adapter as one file.

    In a finer type that is made here, each sum of base and adapter is rounded once. llama.cpp's other quantizations are
    made of the base, and the adapter is added on their grids: quantizing the sum rounds the adapter away wherever a
    matrix keeps its type.
    """
    merge = partial(merge_gguf, metadata=metadata, n_threads=settings.n_threads)
    if quant in ("F16", "Q8_0"):
        merge(base.path, adapter, merged, matrix_type=quant)
    elif quant == "base":
        merge(base.path, adapter, merged)
    elif quant == MIXED:
        merge(base.path, adapter, merged, types=finer_types(read_header(base.path), _changed(adapter)))
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
        "general.name": _name(run.model, f"tuned for {run.task.name}"),
        **_task_metadata(run),
        "sg_local.train_sha256": sha256_file(run.file("train.jsonl")),
        "sg_local.manifest_sha256": _manifest_sha256(run),
        **_origin(run.model),
    }


def _name(base: BaseModel, what: str) -> str:
    """What the exported files are called: after the base's file, unless llama.cpp would tokenize otherwise for that."""
    own = str(read_header(base.path).metadata.get("general.name", ""))
    name = f"{base.path.stem} {what}"
    return name if _tokenized_by_name(name) == _tokenized_by_name(own) else own or "tuned"


def _tokenized_by_name(name: str) -> list[bool]:
    return [any(part in name.lower() for part in parts) for parts in _NAMES_FOR_TOKENS]


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
    """The chat template for other programs, and the Modelfile, with what the tuned model is shown."""
    return chat_files(run, demonstrations(run))
