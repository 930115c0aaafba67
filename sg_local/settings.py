"""Every setting of a run, declared once: name, type, default, unit, bounds and help.

    Settings(n_inputs=7).seen_by("generate").n_inputs   7
    Settings(rank=8).seen_by("generate").rank           AttributeError: it is declared for train

A setting is declared in the class of the first stage that reads it. A stage gets an object of its class, which has no
later settings. So what a stage writes cannot depend on them, and a run that differs in one of them can share it.

The command line (`--n-inputs 400`), a run's settings.toml (`n_inputs = 400`) and manifest.json use the same words.
The paper's values are those of SELF-GUIDE, arXiv 2407.12874, and its reference code; the help says where a default
departs from them. A user with three demonstrations has no validation data, so defaults are fixed beforehand.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sg_local.errors import InputError
from sg_local.files import Faults
from sg_local.runs.stage_files import STAGE_FILES

LEAST_INPUT_LIMIT = 128  # tokens of a made input, where the examples say how long it may be

# The stages in the order of the work: names of commands, of modules in stages/, and of entries in the manifest.
STAGES = tuple(STAGE_FILES)

# Settings of earlier versions, with the value that left them unused.
REMOVED = {"prior_weight": 0.0, "confidence_weights": False, "drop_ifd_share": 0.0}


def _setting(
    default: Any,
    help_text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    everyday: bool = False,
) -> Any:
    """A field; `--help` shows an everyday one, `--help-all` shows all."""
    rules = {"help": help_text, "low": low, "high": high, "choices": choices, "everyday": everyday}
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class CommonSettings:
    """What every stage may read, and what the settings of every stage can do."""

    seed: int = _setting(
        0,
        "Seed; each row gets one of its own from it.",
        low=0,
        high=2**32 - 1,  # the trainer's generators take no more
        everyday=True,
    )
    prompt_format: str = _setting(
        "auto",
        "Chat format: the GGUF's own template, or Vicuna v1.1; auto: what models.toml says, else the GGUF.",
        choices=("auto", "gguf", "vicuna"),
        everyday=True,
    )
    n_ctx: int = _setting(4096, "Key-value memory in tokens, shared by all sequences.", low=256)
    n_parallel: int = _setting(32, "Sequences that run side by side.", low=1, high=200)
    n_threads: int = _setting(0, "CPU threads for llama.cpp and torch; 0: a thread for each core.", low=0)
    n_gpu_layers: int = _setting(-1, "Layers that llama.cpp puts on a GPU; -1: all.", low=-1, everyday=True)
    working_copy: str = _setting(
        "auto",
        "Make data with a 16-bit copy of a quantized model where that is clearly faster here (CPU only); "
        "scores are of the file itself.",
        choices=("auto", "never"),
    )

    def as_dict(self) -> dict[str, Any]:
        """Names to values, in the order of declaration."""
        return asdict(self)

    def seen_by(self, stage: str) -> "Settings":
        """What a stage may read of these settings.

        The type is that of all settings, so that one `Run` fits every stage; the object has the stage's own alone.
        """
        kind = _settings_of(stage)
        return cast("Settings", kind(**{item.name: getattr(self, item.name) for item in fields(kind)}))

    if not TYPE_CHECKING:  # mypy would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            reason = "there is no such setting"
            if stage := declared_for(name):
                reason = f"it is declared for {stage}: declare it in settings.py for the stage that reads it"
            raise AttributeError(f"{type(self).__name__} has no {name}: {reason}")


@dataclass(frozen=True)
class GenerateSettings(CommonSettings):
    """What generate may read: the above, and how inputs are made."""

    input_prompt: str = _setting(
        "auto",
        "How the student is asked for an input: in the paper's words (meta), in chat turns, or as a list to continue; "
        "auto: whichever gives it the best trial inputs.",
        choices=("auto", "meta", "turns", "list"),
    )
    n_inputs: int = _setting(
        400,
        "Inputs to make, counted after this stage's filters (paper: 40 x 10 before).",
        low=1,
        everyday=True,
    )
    input_temperature: float = _setting(
        0.9, "Sampling temperature of made inputs (paper: 0.7).", low=0, high=5
    )
    input_top_k: int = _setting(40, "Sample from the k likeliest tokens; 0 from all.", low=0)
    input_min_p: float = _setting(
        0.05,
        "Leave out tokens under this share of the likeliest one's probability.",
        low=0,
        high=1,
    )
    max_input_tokens: int = _setting(
        0,
        "Longest made input in tokens; one that is cut off there is dropped. 0: 1.5 times the longest example, "
        "at least 128.",
        low=0,
    )
    near_duplicate_rouge_l: float = _setting(
        0.7,
        "Drop an input whose ROUGE-L with an earlier one reaches this; 1 keeps all but exact duplicates.",
        low=0.1,
        high=1,
    )
    length_filter: bool = _setting(
        True,
        "Drop inputs, and answers without labels, far longer or shorter than the demonstrations'.",
    )
    form_filter: bool = _setting(
        True,
        "Drop inputs and answers whose form departs from the demonstrations': marks such as colons and question "
        "marks, repeated words, and for free answers words taken from the input or copies of it (paper: no). "
        "Where no trial input has the form, inputs of any form pass.",
    )


@dataclass(frozen=True)
class AnnotateSettings(GenerateSettings):
    """What annotate may read: the above, and how inputs are answered."""

    label_answers: str = _setting(
        "scores",
        "How labels are chosen: by their exact probabilities, or by a vote among sampled answers (paper).",
        choices=("scores", "samples"),
    )
    n_layouts: int = _setting(
        3,
        "Prompts that labels are scored with, of which the mean counts: the instruction in other places, "
        "the demonstrations in other orders (paper: 1).",
        low=1,
        high=9,
    )
    n_samples: int = _setting(10, "Answers sampled for each input, where none is scored.", low=1)
    choose_by: str = _setting(
        "information",
        "Which sampled answer counts where there are no labels: the one that the input makes likelier most, "
        "the one most like the others in ROUGE-L (consensus), or the commonest (votes, paper).",
        choices=("information", "consensus", "votes"),
    )
    output_temperature: float = _setting(0.7, "Sampling temperature of answers (paper: 0.2).", low=0, high=5)
    output_top_k: int = _setting(40, "Sample from the k likeliest tokens; 0 from all (paper: 10).", low=0)
    max_new_tokens: int = _setting(
        128, "Longest answer in tokens, here and in the evaluation.", low=1, everyday=True
    )


@dataclass(frozen=True)
class CurateSettings(AnnotateSettings):
    """What curate may read: the above, and which pairs are trained on."""

    min_share: float = _setting(
        0.3,
        "Drop an input if fewer than this share of its samples agree.",
        low=0,
        high=1,
    )
    calibrate: bool = _setting(
        True, "Take the student's label bias out of its label scores (batch calibration)."
    )
    train_rows: str = _setting(
        "made",
        "What is trained on: the made pairs with the demonstrations, or, for comparison, the demonstrations alone, "
        "repeated as often as there would have been rows.",
        choices=("made", "demonstrations"),
    )
    label_targets: str = _setting(
        "hard",
        "What a row of a task with labels teaches: its label alone, or the calibrated probabilities of all labels.",
        choices=("hard", "soft"),
    )
    soft_temperature: float = _setting(
        0.5,
        "Temperature of soft targets: under 1 sharper than the probabilities.",
        low=0.05,
        high=20,
    )
    keep_confident: float = _setting(
        0.8,
        "Share of each label's rows to keep, the most confident first (paper: all).",
        low=0.05,
        high=1,
    )
    agreement: str = _setting(
        "evidence",
        "How to use the label that an input was generated for: as prior evidence, weighted by how often generated "
        "and scored labels agree; or drop rows with another label: always, or auto, only where the student follows "
        "labels (paper: never).",
        choices=("evidence", "auto", "always", "never"),
    )
    max_copies: int = _setting(8, "How often a row may be repeated to give every label equal numbers.", low=1)


@dataclass(frozen=True)
class TrainSettings(CurateSettings):
    """What train may read: the above, and how the adapter is trained."""

    trainer: str = _setting(
        "unsloth",
        "Train through Unsloth, or through PEFT alone, which runs wherever torch does.",
        choices=("unsloth", "peft"),
        everyday=True,
    )
    base_weights: str = _setting(
        "",
        "Train on the 16-bit safetensors that the GGUF was made from, in this directory; they are checked against "
        "it. By default, the GGUF's own weights are dequantized.",
        everyday=True,
    )
    rank: int = _setting(
        16, "LoRA rank r; higher learns more and needs more memory.", low=1, high=512, everyday=True
    )
    alpha: float = _setting(16.0, "LoRA alpha; the adapter is scaled by alpha / r.", low=0.001, high=65536)
    lora_dropout: float = _setting(
        0.0,
        "LoRA dropout; over 0, rows are padded instead of sharing their prompts.",
        low=0,
        high=0.9,
    )
    target_modules: str = _setting(
        "all", "Matrices of a layer that get LoRA: all, or names with commas (q_proj,v_proj)."
    )
    learning_rate: float = _setting(
        5e-4, "Peak learning rate (AdamW, linear decay).", low=1e-8, high=1, everyday=True
    )
    epochs: int = _setting(3, "Passes over the training rows.", low=1, everyday=True)
    batch_size: int = _setting(8, "Rows of one optimizer step.", low=1, everyday=True)
    load_in_4bit: bool = _setting(
        False, "QLoRA: hold the base weights in 4 bit while training (less GPU memory).", everyday=True
    )
    gradient_checkpointing: str = _setting(
        "auto",
        "Compute activations again in the backward pass (less memory, a third more time); auto: on GPUs.",
        choices=("auto", "always", "never"),
    )
    prompt_tree: bool = _setting(
        True, "Compute what the rows of a batch share once; checked against padded rows first."
    )
    checkpoint_seconds: int = _setting(
        60,
        "Save a checkpoint of the training after so many seconds; a killed one goes on there.",
        low=0,
    )
    train_demonstrations: bool = _setting(
        False,
        "Train, and serve the tuned model, with the demonstrations in the prompt (paper: yes).",
    )

    def uses_checkpointing(self, has_gpu: bool) -> bool:
        """Whether activations are computed again in the backward pass; on a CPU memory is rarely what is short."""
        return self.gradient_checkpointing == "always" or (self.gradient_checkpointing == "auto" and has_gpu)


@dataclass(frozen=True)
class ExportSettings(TrainSettings):
    """What export may read: the above, and of which type the merged file is."""

    quant: str = _setting(
        "auto",
        "Type of model.gguf; base: every tensor keeps its type; auto: the same, or Q8_0 where that is measured to be "
        "too coarse for what was trained.",
        choices=("auto", "base", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"),
        everyday=True,
    )


@dataclass(frozen=True)
class Settings(ExportSettings):
    """All settings of a run, which evaluate may read: the above, and what is scored.

    Raises InputError with every value that is out of bounds, one a line.
    """

    many_shot: bool = _setting(
        False, "Score the base also with as many of the made pairs in its prompt as fit."
    )
    max_test_rows: int = _setting(
        300, "Test rows to score at most, from the file's start.", low=1, everyday=True
    )

    def __post_init__(self) -> None:
        faults = Faults()
        _check(asdict(self), faults)
        faults.raise_any()


# Stage -> what it may read, in the order of the work; a stage that is not here may read what the one before it may.
_DECLARED_FOR: dict[str, type[CommonSettings]] = {
    "generate": GenerateSettings,
    "annotate": AnnotateSettings,
    "curate": CurateSettings,
    "train": TrainSettings,
    "export": ExportSettings,
    "evaluate": Settings,
}


def declared_for(name: str) -> str | None:
    """The first stage that may read a setting; None for a setting that every stage may read, and for other names."""
    if name in _names(CommonSettings):
        return None
    return next((stage for stage, kind in _DECLARED_FOR.items() if name in _names(kind)), None)


def _settings_of(stage: str) -> type[CommonSettings]:
    stages = STAGES[: STAGES.index(stage) + 1]
    return next(_DECLARED_FOR[earlier] for earlier in reversed(stages) if earlier in _DECLARED_FOR)


def _names(kind: type[CommonSettings]) -> list[str]:
    return [item.name for item in fields(kind)]


# What a preset changes; `default` is the declarations above. `paper` is SELF-GUIDE's own way, with our filters: its
# 400 inputs are counted after them, labels are made equal by dropping rows, and training is LoRA.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"n_inputs": 160, "max_new_tokens": 64, "max_test_rows": 100},
    "default": {},
    "paper": {
        "input_prompt": "meta",
        "input_temperature": 0.7,
        "input_min_p": 0.0,
        "max_input_tokens": 500,
        "near_duplicate_rouge_l": 1.0,
        "label_answers": "samples",
        "choose_by": "votes",
        "output_temperature": 0.2,
        "output_top_k": 10,
        "max_new_tokens": 500,
        "calibrate": False,
        "keep_confident": 1.0,
        "agreement": "never",
        "form_filter": False,
        "max_copies": 1,
        "train_demonstrations": True,
    },
}


def resolve_settings(preset: str, given: dict[str, Any]) -> Settings:
    """A preset's settings with the given ones over them.

    Raises InputError for an unknown preset, and else with every unknown name and bad value, one a line.
    """
    faults = Faults()
    if preset not in PRESETS:
        faults.add(f"there is no preset {preset!r}: choose {' or '.join(PRESETS)}")
        faults.raise_any()
    known = _names(Settings)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"the settings are {', '.join(known)}"
            faults.add(f"there is no setting {name}: {hint}")
    values = {**PRESETS[preset], **{name: value for name, value in given.items() if name in known}}
    _check({**{item.name: item.default for item in fields(Settings)}, **values}, faults)
    faults.raise_any()
    return Settings(**values)


def without_removed(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Settings that an earlier version recorded in a file, without those that this version no longer has.

    Raises InputError where one of these was in use: the run is not one that this version can go on with.
    """
    for name, unused in REMOVED.items():
        if values.get(name, unused) != unused:
            raise InputError(
                f"{path}: {name} = {values[name]!r} is a setting that this version no longer has: "
                "go on with the version that began this, or begin anew elsewhere: run --run DIR, bench --out DIR"
            )
    return {name: value for name, value in values.items() if name not in REMOVED}


def input_limit(max_input_tokens: int, n_tokens: Sequence[int]) -> int:
    """Tokens that a made input may have; n_tokens: of the demonstrations' inputs.

    0 stands for half as many again as the longest has: one that goes on is mostly caught in a loop.
    """
    return max_input_tokens or max(LEAST_INPUT_LIMIT, max(n_tokens) * 3 // 2)


def as_flag(name: str, value: Any) -> str:
    """A setting as it is written on the command line: ("n_ctx", 2048) is --n-ctx 2048."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _check(values: dict[str, Any], faults: Faults) -> None:
    """Notes what is wrong with the values of all settings."""
    before = faults.count
    for item in fields(Settings):
        value, rule = values[item.name], item.metadata
        shown = f"{item.name} = {value!r}"
        if type(value) is not item.type and not (item.type is float and type(value) is int):
            expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            faults.add(f"{shown} should be {expected[item.type]}")  # type: ignore[index]
        elif rule["choices"] and value not in rule["choices"]:
            faults.add(f"{shown} should be one of {', '.join(rule['choices'])}")
        elif type(value) is float and not math.isfinite(value):
            faults.add(f"{shown} should be a finite number")
        elif rule["low"] is not None and value < rule["low"]:
            faults.add(f"{shown} should be at least {rule['low']}")
        elif rule["high"] is not None and value > rule["high"]:
            faults.add(f"{shown} should be at most {rule['high']}")
    if faults.count > before:
        return
    for name in ("max_input_tokens", "max_new_tokens"):
        if values[name] >= values["n_ctx"]:
            faults.add(
                f"{name} = {values[name]} leaves no room for a prompt: n_ctx is {values['n_ctx']} tokens"
            )
