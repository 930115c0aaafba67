"""What each stage reads and writes, declared once, in the order of the work.

    STAGE_FILES["annotate"]    reads task.toml inputs.jsonl, writes outputs.jsonl, piece by piece

The manifest, resuming, `verify` and ablations follow from it. Settings are not among the files: which of them a stage
may read is declared in settings.py.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class StageFiles:
    """Paths in the run's directory; in `writes` and `pieces`, * stands for any name. A piece may be a directory."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    pieces: tuple[str, ...] = ()  # what it writes little by little, and goes on with when it is called again
    looks_for: tuple[str, ...] = ()  # what matters by being there or not, whatever is in it
    editable: tuple[
        str, ...
    ] = ()  # of what it writes: a person may edit it, anything else has to stay as written


# What no stage writes: the task and its rows, as the run was begun with them.
BEGUN_WITH = ("task.toml", "test.jsonl", "given.jsonl", "labelled.jsonl")
REVIEW = "review.jsonl"  # what a person said of rows: no stage writes it, `review` appends to it at any time

STAGE_FILES = {
    "generate": StageFiles(
        reads=("task.toml", "given.jsonl", "labelled.jsonl"),
        writes=("inputs.jsonl",),
        looks_for=("given.jsonl", "labelled.jsonl"),
        pieces=("inputs.jsonl", ".probe.jsonl", ".generate.json"),
        editable=("inputs.jsonl",),
    ),
    "annotate": StageFiles(
        reads=("task.toml", "inputs.jsonl"),
        writes=("outputs.jsonl",),
        pieces=("outputs.jsonl", ".kept_outputs.jsonl"),
        editable=("outputs.jsonl",),
    ),
    "curate": StageFiles(
        reads=("task.toml", "inputs.jsonl", "outputs.jsonl", "labelled.jsonl", REVIEW),
        writes=("train.jsonl",),
        editable=("train.jsonl",),
        # Without test rows, a part of the others is held out.
        looks_for=("test.jsonl", "labelled.jsonl", REVIEW),
    ),
    "train": StageFiles(
        reads=("task.toml", "train.jsonl"),
        writes=("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        pieces=("checkpoints",),
    ),
    "export": StageFiles(
        reads=(
            "task.toml",
            "train.jsonl",
            "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors",
        ),
        writes=("adapter.gguf", "model.gguf", "chat_template.jinja", "Modelfile", "Modelfile.adapter"),
        editable=("Modelfile", "Modelfile.adapter"),
    ),
    "evaluate": StageFiles(
        reads=("task.toml", "test.jsonl", "train.jsonl", "adapter.gguf", "model.gguf"),
        writes=("evaluation.json", "predictions/*.jsonl"),
        pieces=("predictions/*.jsonl", "predictions/.*.json"),
        looks_for=("test.jsonl",),
    ),
}
