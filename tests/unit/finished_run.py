"""The one writer of what the stages write: a run with its files, without a model, through the same `Run.stage`.

write_inputs(run, [{"id": 0, "input": "Log me in."}])     # generate; write_outputs, write_train_rows: the next two
write_stage(run, "export")                                # any stage, with rows and files of its own
finish_run(run)                                           # all of them: tuned +0.5 over the base
rewrite(run, "evaluation.json", "{}")                     # a file of evaluate, as if the stage had written this
ScriptedStages()(run, "export")                           # in place of a stage's process
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf_bytes import TinyTensor, Value, tiny_gguf

from sg_local.files import read_rows, write_rows
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.runs.directory import Run
from sg_local.runs.stage_files import STAGE_FILES
from sg_local.selfguide.contenders import BASELINE, TUNED, Contender
from sg_local.selfguide.evaluation import prediction_row, predictions_file
from sg_local.selfguide.metrics import Metric, metric_of
from sg_local.selfguide.review import input_sha256
from sg_local.settings import STAGES

Rows = Sequence[Mapping[str, Any]]

# A llama of one layer, whole, so that a run can begin with it; all zeros.
HEADER: dict[str, Value] = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.block_count": 1,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 2,
    "llama.attention.head_count": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
TENSORS = [
    TinyTensor("token_embd.weight", (32, 2)),
    TinyTensor("output_norm.weight", (32,)),
    *(TinyTensor(f"blk.0.{name}.weight", (32,)) for name in ("attn_norm", "ffn_norm")),
    *(TinyTensor(f"blk.0.attn_{name}.weight", (32, 32)) for name in ("q", "k", "v", "output")),
    *(TinyTensor(f"blk.0.ffn_{name}.weight", (32, 2)) for name in ("gate", "up")),
    TinyTensor("blk.0.ffn_down.weight", (2, 32)),
]
MODEL_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MODEL: dict[str, Value] = {
    **HEADER,
    "general.name": "tiny",
    "tokenizer.chat_template": MODEL_TEMPLATE,
}
N_ROWS = 2
MESSAGE = "Log me in."
GAIN = {"of": TUNED, "mean": 0.5, "interval_95": [0.2, 0.8], "p": 0.001, "verdict": "better"}


def write_inputs(run: Run, rows: Rows) -> None:
    """What generate writes; a row says what is special about it."""
    with run.stage("generate"):
        defaults = {"label": None, "prompt": "turns", "drop": None, "seed": 0}
        write_rows(run.file("inputs.jsonl"), [defaults | row for row in rows])


def write_outputs(run: Run, rows: Rows) -> None:
    """What annotate writes."""
    with run.stage("annotate"):
        write_rows(run.file("outputs.jsonl"), [{"drop": None, **row} for row in rows])


def write_train_rows(run: Run, rows: Rows) -> None:
    """What curate writes."""
    with run.stage("curate"):
        defaults = {"confidence": None, "targets": None, "copies": 1, "drop": None}
        write_rows(run.file("train.jsonl"), [defaults | row for row in rows])


def review_row(
    row_id: int | str, text: str, word: str, output: str | None = None, **model: Any
) -> dict[str, Any]:
    """A row of review.jsonl. model: model_output, model_confidence, model_drop, as far as it matters."""
    defaults = {"model_output": output or "login", "model_confidence": 0.5, "model_drop": None}
    row = {"id": row_id, "input_sha256": input_sha256(text), "word": word, "output": output}
    return row | defaults | model


def write_stage(
    run: Run, stage: str, message: str = MESSAGE, right: Mapping[str, int] | None = None, n_rows: int = N_ROWS
) -> None:
    """What a stage writes. `message` is in all its files; `right` says how many rows who has right, of n_rows."""
    if stage == "generate":
        write_inputs(run, [{"id": 0, "input": message, "label": "login"}])
    elif stage == "annotate":
        write_outputs(run, [{"id": 0, "output": "login", "samples": [message]}])
    elif stage == "curate":
        write_train_rows(run, [{"id": 0, "input": message, "output": "login"}])
    elif stage == "train":
        with run.stage("train"):
            run.file("adapter").mkdir(exist_ok=True)
            for name in STAGE_FILES["train"].writes:
                run.file(name).write_text(json.dumps({"message": message}))
    elif stage == "export":
        with run.stage("export"):
            _write_export(run, message)
    else:
        _write_evaluation(run, message, right or {}, n_rows)


def finish_run(run: Run) -> None:
    """Every stage, one after the other."""
    for stage in STAGES:
        write_stage(run, stage)


def rewrite(run: Run, name: str, text: str) -> None:
    """Another text in a file of evaluate, as if the stage had written it."""
    with run.stage("evaluate"):
        run.file(name).write_text(text)


class ScriptedStages:
    """In place of a stage's process: it writes what the stage would, or ends with 1 where the run is to fail.

    The tuned model has right 30 rows of 40, in a run of an ablation as many as `right_if_ablated` says.
    """

    def __init__(self) -> None:
        self.ran: list[tuple[str, str]] = []  # (run, stage)
        self.failing: set[str] = set()  # runs
        self.right_if_ablated = 20
        self.baselines_there: dict[str, str | None] = {}  # run -> whose few-shot answers evaluate came upon

    def __call__(self, run: Run, stage: str) -> int:
        name = self.name_of(run)
        if name in self.failing:
            return 1
        self.ran.append((name, stage))
        if stage == "evaluate":
            answers = run.file(predictions_file(BASELINE))
            self.baselines_there[name] = read_rows(answers)[0]["input"] if answers.exists() else None
        right = self.right_if_ablated if "ablations" in name else 30
        write_stage(run, stage, name, {TUNED: right, Contender.MANY_SHOT: 10}, n_rows=40)
        return 0

    @staticmethod
    def name_of(run: Run) -> str:
        """The run's path in the directory of its bench: inbox, ablations/rank=8/inbox."""
        parts = Path(run.path).parts
        return "/".join(parts[-3:] if "ablations" in parts else parts[-1:])


def _write_export(run: Run, message: str) -> None:
    carried_task = {
        "name": run.task.name,
        "instruction": run.task.instruction,
        "labels": list(run.task.labels),
        "examples": [],
        "max_new_tokens": 9,
        "prompt_format": "gguf",
    }
    tuned = {
        **MODEL,
        "general.description": message,
        "sg_local.base_fingerprint": fingerprint(run.model.path),
        "sg_local.task": json.dumps(carried_task),
    }
    run.file("adapter.gguf").write_bytes(tiny_gguf({**tuned, "general.type": "adapter"}, TENSORS[:1]))
    run.file("model.gguf").write_bytes(tiny_gguf(tuned, TENSORS[:1]))
    run.file("chat_template.jinja").write_text(MODEL_TEMPLATE)
    for name in ("Modelfile", "Modelfile.adapter"):
        run.file(name).write_text(f"FROM ./model.gguf\n# {message}\n")


def _write_evaluation(run: Run, message: str, right: Mapping[str, int], n_rows: int) -> None:
    scores = {"mean": 0.5, "interval_95": [0.1, 0.9]}
    judge = metric_of(run.task)
    entry: dict[str, Any] = dict.fromkeys(
        [str(metric) for metric in Metric if judge.needs_json or not metric.needs_json], scores
    )
    contenders = [
        contender
        for contender in Contender
        if contender.is_expected(with_labels=run.task.is_classification)
        or (contender == Contender.MANY_SHOT and run.settings.many_shot)
    ]
    gains = {"gain": {**GAIN, "over": BASELINE}}
    if run.task.is_classification:
        entry |= {"no_label_share": 0.0, "label_distance": 0.1}
        gains["gain_over_label_scoring"] = {**GAIN, "over": Contender.LABEL_SCORING, "mean": 0.25}
    gains["gain_over_best"] = gains.get("gain_over_label_scoring", gains["gain"])
    evaluation = {
        "task": run.task.name,
        "metric": judge,
        "n_rows": n_rows,
        "rows_from": "the task's test file",
        "contenders": {
            contender: {**entry, "demonstrations": 9 if contender == Contender.MANY_SHOT else 1}
            for contender in contenders
        },
        **gains,
    }
    with run.stage("evaluate"):
        run.file("predictions").mkdir(exist_ok=True)
        for contender in contenders:
            n_right = right.get(contender, n_rows // 2)
            write_rows(
                run.file(predictions_file(contender)),
                [
                    prediction_row(
                        f"{message} {row}", "login" if row < n_right else "refund", "login", judge=judge
                    )
                    for row in range(n_rows)
                ],
            )
        run.file("evaluation.json").write_text(json.dumps(evaluation))
