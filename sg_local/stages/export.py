"""Stage 5: the trained adapter as files that llama.cpp, Ollama and LM Studio run.

reads  adapter/
writes adapter.gguf   LoRA adapter for the base GGUF
       model.gguf     base and adapter merged, in the base's own types or --quant
       Modelfile      for `ollama create`

Nothing gets its final name before llama.cpp with these files was compared with torch (parity.py).
"""

import json
import os
import shutil
from pathlib import Path

from sg_local.gguf_io.adapter import write_adapter_gguf
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.merge import merge_gguf
from sg_local.llama.library import load_model
from sg_local.llama.quantize import requantize
from sg_local.llama.tokens import Tokenizer
from sg_local.progress import say
from sg_local.records import sha256_file, write_text
from sg_local.run import Run
from sg_local.selfguide.modelfile import modelfile
from sg_local.selfguide.prompts import answer_messages
from sg_local.stages.common import demonstrations, template_source
from sg_local.stages.parity import measure, require_parity
from sg_local.stages.train import ADAPTER_FILES

EXPORTED = ("adapter.gguf", "model.gguf", "Modelfile")


def run_export(run: Run) -> None:
    """Writes the adapter, the merged model and the Modelfile, and proves that they are the trained model."""
    from sg_local.finetune.process import require_training_packages

    run.require("export")
    require_training_packages(("torch", "transformers", "peft"))
    with run.stage("export", reads=list(ADAPTER_FILES), writes=list(EXPORTED)) as details:
        work = run.file(".work") / "export"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        metadata = _metadata(run)
        say("export: adapter.gguf")
        write_adapter_gguf(run.file("adapter"), run.model.path, work / "adapter.gguf", metadata)
        say(f"export: model.gguf ({'the base' if run.settings.quant == 'base' else run.settings.quant})")
        _merge(run, work, metadata)
        write_text(work / "Modelfile", _modelfile(run))
        say("export: comparing llama.cpp with torch")
        parity = measure(run, work / "adapter.gguf", work / "model.gguf")
        details["parity"] = parity.as_dict()
        say(
            f"export: adapter within {parity.max_logit_difference:.3f} logits of torch (it moves them by "
            f"{parity.adapter_effect:.1f}); model.gguf ({parity.merged_type}): mean KL {parity.mean_kl_nats:.4f} nats, "
            f"the base {parity.base_mean_kl_nats:.1f}; same first choice at {parity.argmax_equal_share:.1%} of "
            f"{parity.n_positions} positions"
        )
        require_parity(parity)
        for name in EXPORTED:
            os.replace(work / name, run.file(name))
        shutil.rmtree(run.file(".work"), ignore_errors=True)


def _merge(run: Run, work: Path, metadata: dict[str, str]) -> None:
    """Writes work/model.gguf. Another quantization is made of the base, and the adapter added on its grid.

    Quantizing after the merge would be shorter, but rounds the adapter away wherever a matrix keeps its type.
    """
    base, adapter, merged = run.model.path, work / "adapter.gguf", work / "model.gguf"
    if run.settings.quant == "F16":
        merge_gguf(base, adapter, merged, metadata=metadata, matrix_type="F16")
    elif run.settings.quant == "base":
        merge_gguf(base, adapter, merged, metadata=metadata)
    else:
        requantize(base, work / "base.gguf", run.settings.quant, run.settings.n_threads)
        merge_gguf(work / "base.gguf", adapter, merged, metadata=metadata, force=True)
        (work / "base.gguf").unlink()


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
        "general.license": run.model.licence,
        "sg_local.task": json.dumps(task, ensure_ascii=False),
        "sg_local.base_fingerprint": fingerprint(run.model.path),
        "sg_local.base_sha256": run.model.sha256,
        "sg_local.train_sha256": sha256_file(run.file("train.jsonl")),
    }


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
