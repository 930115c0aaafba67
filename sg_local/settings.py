"""Every setting of a run, declared once: name, type, default, unit, bounds and help.

    Settings(n_inputs=7).seen_by("generate").n_inputs   7
    Settings(rank=8).seen_by("generate").rank           AttributeError: it is declared for train

A setting is declared in the class of the first stage that reads it. A stage gets an object of its class, which has no
later settings. So what a stage writes cannot depend on them, and a run that differs in one of them can share it.

The command line (`--n-inputs 400`), a run's settings.toml (`n_inputs = 400`) and manifest.json use the same words.
The paper's values are those of SELF-GUIDE, arXiv 2407.12874, and its reference code; the help says where a default
departs from them. A user with three examples has no data to tune settings on, so the defaults are fixed.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sg_local.errors import InputError
from sg_local.files import Faults
from sg_local.runs.stage_files import STAGE_FILES

LEAST_INPUT_LIMIT = 128  # tokens of a made input, if the limit follows from the examples

# The stages in the order of the work: names of commands, of modules in stages/, and of entries in the manifest.
STAGES = tuple(STAGE_FILES)

# Settings of earlier versions, each with the value that switched it off.
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
    """A field of the settings; `--help` shows the everyday ones, `--help-all` shows all."""
    rules = {"help": help_text, "low": low, "high": high, "choices": choices, "everyday": everyday}
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class CommonSettings:
    """The settings that every stage may read, and the methods that all settings have."""

    seed: int = _setting(
        0,
        "Seed of the run and of all its rows.",
        low=0,
        high=2**32 - 1,  # the trainer's generators take no more
        everyday=True,
    )
    prompt_format: str = _setting(
        "auto",
        "Chat format (vicuna: v1.1). auto: what models.toml says, else the GGUF.",
        choices=("auto", "gguf", "vicuna"),
        everyday=True,
    )
    n_ctx: int = _setting(4096, "Size of the KV cache in tokens, shared by all sequences.", low=256)
    n_parallel: int = _setting(32, "Sequences that llama.cpp works on side by side.", low=1, high=200)
    n_threads: int = _setting(0, "CPU threads for llama.cpp and torch; 0: one per core.", low=0)
    n_gpu_layers: int = _setting(-1, "Layers to put on the GPU; -1: all.", low=-1, everyday=True)
    working_copy: str = _setting(
        "auto",
        "Whether the data is made with a 16-bit working copy of a quantized base. auto: if that is clearly faster "
        "on this machine (CPU only). The scores are always those of the base itself.",
        choices=("auto", "never"),
    )

    def as_dict(self) -> dict[str, Any]:
        """Names to values, in the order of declaration."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def seen_by(self, stage: str) -> "Settings":
        """The settings that a stage may read.

        The type is that of all settings, so that one `Run` fits every stage; the object has no others.
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
    """The settings that `generate` may read: those above, and how inputs are made."""

    input_prompt: str = _setting(
        "auto",
        "How the base is asked for an input: with the paper's request (meta), in chat turns, or with a list to "
        "continue. auto: each way is tried on 32 inputs; the one with the most usable inputs wins.",
        choices=("auto", "meta", "turns", "list"),
    )
    n_inputs: int = _setting(
        400,
        "Inputs to make, or real ones, that pass the filters (paper: 40 x 10 before them).",
        low=1,
        everyday=True,
    )
    least_made_share: float = _setting(
        1.0,
        "In tasks with labels, make at least this share of n_inputs, however many are real: made ones have the surer "
        "labels, and teach how to judge real ones.",
        low=0,
        high=1,
    )
    input_temperature: float = _setting(0.9, "Sampling temperature of inputs (paper: 0.7).", low=0, high=5)
    input_top_k: int = _setting(40, "Sample from the k most probable tokens; 0: from all.", low=0)
    input_min_p: float = _setting(
        0.05,
        "Leave out tokens with less than this share of the highest probability (paper: 0).",
        low=0,
        high=1,
    )
    max_input_tokens: int = _setting(
        0,
        "Longest input in tokens; an input that is cut off there is dropped (paper: 500). "
        "0: 1.5 times the longest example, at least 128.",
        low=0,
    )
    near_duplicate_rouge_l: float = _setting(
        0.7,
        "Drop an input if its ROUGE-L with an earlier one reaches this value; 1: drop exact duplicates only.",
        low=0.1,
        high=1,
    )
    length_filter: bool = _setting(
        True,
        "Drop inputs that are far longer or shorter than your examples', and answers in tasks without labels.",
    )
    form_filter: bool = _setting(
        True,
        "Drop inputs whose form is not that of your examples: marks such as colons and question marks, repeated "
        "words. If no trial input has that form, all forms pass. In tasks without labels, answers are held to it too. "
        "Answers that copy the input are dropped, unless your examples do so too; so are answers that share too few "
        "words with the input, and, where your examples are JSON of one shape, those of another (paper: no).",
    )


@dataclass(frozen=True)
class AnnotateSettings(GenerateSettings):
    """The settings that `annotate` may read: those above, and how inputs are answered."""

    label_answers: str = _setting(
        "scores",
        "How the base chooses a label. scores: by the exact probability of each label; "
        "samples: by a vote among sampled answers (paper).",
        choices=("scores", "samples"),
    )
    n_layouts: int = _setting(
        3,
        "Prompts that each label is scored with; the mean counts. They put the instruction in different places "
        "and your examples in different orders (paper: 1).",
        low=1,
        high=9,
    )
    n_samples: int = _setting(10, "Answers sampled for each input, if labels are not scored.", low=1)
    choose_by: str = _setting(
        "information",
        "How one of the samples is chosen in tasks without labels. information: the one whose probability the input "
        "raises most; where many samples say the same, one of these; consensus: the one most like the others in "
        "ROUGE-L; votes: the most frequent (paper).",
        choices=("information", "consensus", "votes"),
    )
    output_temperature: float = _setting(0.7, "Sampling temperature of answers (paper: 0.2).", low=0, high=5)
    output_top_k: int = _setting(
        40, "Sample from the k most probable tokens; 0: from all (paper: 10).", low=0
    )
    max_new_tokens: int = _setting(
        128, "Longest answer in tokens, in the data and in the evaluation (paper: 500).", low=1, everyday=True
    )


@dataclass(frozen=True)
class CurateSettings(AnnotateSettings):
    """The settings that `curate` may read: those above, and which pairs are trained on."""

    min_share: float = _setting(
        0.3,
        "Drop an input if fewer than this share of its samples agree.",
        low=0,
        high=1,
    )
    calibrate: bool = _setting(
        True, "Remove the base's bias from its label scores by batch calibration (paper: no)."
    )
    train_rows: str = _setting(
        "made",
        "Rows to train on. made: the made pairs and your examples; demonstrations: for comparison, your examples "
        "alone, repeated to the same number of rows.",
        choices=("made", "demonstrations"),
    )
    label_targets: str = _setting(
        "hard",
        "What a row teaches in tasks with labels. hard: its label; soft: the calibrated probabilities of all labels.",
        choices=("hard", "soft"),
    )
    soft_temperature: float = _setting(
        0.5,
        "Temperature of soft targets; under 1 they are sharper than the probabilities.",
        low=0.05,
        high=20,
    )
    keep_confident: float = _setting(
        0.8,
        "Share of the rows to keep, for each label if there are labels; the most confident stay (paper: all).",
        low=0.05,
        high=1,
    )
    keep_confident_real: float = _setting(
        0.5,
        "The same of real inputs in tasks with labels: no made-for label is evidence for their answers.",
        low=0.05,
        high=1,
    )
    agreement: str = _setting(
        "evidence",
        "How to use the label that an input was made for. evidence: it is prior evidence, weighted by how often it is "
        "the scored label. always: drop rows with another label; auto: drop them only if the base clearly follows "
        "labels. never: ignore it (paper).",
        choices=("evidence", "auto", "always", "never"),
    )
    max_copies: int = _setting(
        8, "Most copies of a row in training; copies make all labels equally frequent (paper: 1).", low=1
    )


@dataclass(frozen=True)
class TrainSettings(CurateSettings):
    """The settings that `train` may read: those above, and how the adapter is trained."""

    trainer: str = _setting(
        "unsloth",
        "Train with Unsloth, or with PEFT alone, which runs wherever torch does.",
        choices=("unsloth", "peft"),
        everyday=True,
    )
    base_weights: str = _setting(
        "",
        "Directory of the GGUF's original 16-bit weights: checked, then trained on.",
        everyday=True,
    )
    rank: int = _setting(16, "LoRA rank r; higher takes memory.", low=1, high=512, everyday=True)
    alpha: float = _setting(16.0, "LoRA alpha; the adapter is scaled by alpha / r.", low=0.001, high=65536)
    lora_dropout: float = _setting(
        0.0,
        "LoRA dropout; over 0, rows are padded and not packed as a prompt tree.",
        low=0,
        high=0.9,
    )
    target_modules: str = _setting(
        "all", "Matrices of each layer that get LoRA: all, or names separated by commas (q_proj,v_proj)."
    )
    learning_rate: float = _setting(5e-4, "Peak for AdamW; linear decay.", low=1e-8, high=1, everyday=True)
    epochs: int = _setting(3, "Passes over the training rows.", low=1, everyday=True)
    batch_size: int = _setting(8, "Rows per optimizer step.", low=1, everyday=True)
    load_in_4bit: bool = _setting(False, "QLoRA: hold the base in 4 bits.", everyday=True)
    gradient_checkpointing: str = _setting(
        "auto",
        "Compute activations again in the backward pass: less memory, a third more time. auto: on GPUs only.",
        choices=("auto", "always", "never"),
    )
    prompt_tree: bool = _setting(
        True, "Compute once what the rows of a batch share. The first batch is checked against padded rows."
    )
    checkpoint_seconds: int = _setting(
        60,
        "Seconds between checkpoints; a training that was killed goes on from the last one.",
        low=0,
    )
    train_demonstrations: bool = _setting(
        False,
        "Put your examples into the prompt of the tuned model, in training and when it is served (paper: yes).",
    )

    def uses_checkpointing(self, has_gpu: bool) -> bool:
        """Whether activations are computed again in the backward pass. A CPU is rarely short of memory."""
        return self.gradient_checkpointing == "always" or (self.gradient_checkpointing == "auto" and has_gpu)


@dataclass(frozen=True)
class ExportSettings(TrainSettings):
    """The settings that `export` may read: those above, and the type of the merged model."""

    quant: str = _setting(
        "auto",
        "Type of model.gguf. base: each tensor keeps its own. auto: the coarsest that keeps what was trained, up to "
        "Q8_0.",
        choices=("auto", "base", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"),
        everyday=True,
    )


@dataclass(frozen=True)
class Settings(ExportSettings):
    """All settings of a run. `evaluate` may read them all: those above, and what is scored.

    Raises InputError with every value that is out of bounds, one a line.
    """

    many_shot: bool = _setting(False, "Score the base also with made pairs in its prompt, as many as fit.")
    max_test_rows: int = _setting(
        300, "Test rows to score at most, from the start of the file.", low=1, everyday=True
    )

    def __post_init__(self) -> None:
        faults = Faults()
        _check(self.as_dict(), faults)
        faults.raise_any()


# Stage -> the settings that it may read. A stage that is not here may read the same as the stage before it.
_DECLARED_FOR: dict[str, type[CommonSettings]] = {
    "generate": GenerateSettings,
    "annotate": AnnotateSettings,
    "curate": CurateSettings,
    "train": TrainSettings,
    "export": ExportSettings,
    "evaluate": Settings,
}


def declared_for(name: str) -> str | None:
    """The first stage that may read a setting; None if every stage may read it, and for unknown names."""
    if name in _names(CommonSettings):
        return None
    return next((stage for stage, kind in _DECLARED_FOR.items() if name in _names(kind)), None)


def unreached(names: Iterable[str]) -> tuple[str, ...]:
    """The stages before the first that may read one of these settings; all stages for no names."""
    first = min((STAGES.index(declared_for(name) or STAGES[0]) for name in names), default=len(STAGES))
    return STAGES[:first]


def _settings_of(stage: str) -> type[CommonSettings]:
    stages = STAGES[: STAGES.index(stage) + 1]
    return next(_DECLARED_FOR[earlier] for earlier in reversed(stages) if earlier in _DECLARED_FOR)


def _names(kind: type[CommonSettings]) -> list[str]:
    return [item.name for item in fields(kind)]


# What a preset changes; `default` is the declarations above. `paper` uses SELF-GUIDE's own settings. Three things
# differ from the paper: the 400 inputs are counted after the filters, duplicates are dropped, and training is LoRA.
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
        "keep_confident_real": 1.0,
        "agreement": "never",
        "form_filter": False,
        "max_copies": 1,
        "train_demonstrations": True,
    },
}


def n_wanted_made(settings: GenerateSettings, n_real: int, *, with_labels: bool) -> int:
    """How many inputs are to be made beside real ones: what n_inputs lacks, and with labels at least a share of it."""
    least = math.ceil(settings.least_made_share * settings.n_inputs) if with_labels else 0
    return max(settings.n_inputs - n_real, least)


def resolve_settings(preset: str, given: dict[str, Any]) -> Settings:
    """The settings of a preset, changed by the given ones.

    Raises InputError for an unknown preset, or with every unknown name and bad value, one a line.
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

    Raises InputError if one of these was in use, since this version cannot go on with such a run.
    """
    for name, off_value in REMOVED.items():
        if values.get(name, off_value) != off_value:
            raise InputError(
                f"{path}: {name} = {values[name]!r} is a setting that this version no longer has: "
                "go on with the version that began this, or begin anew elsewhere: run --run DIR, bench --out DIR"
            )
    return {name: value for name, value in values.items() if name not in REMOVED}


def input_limit(max_input_tokens: int, n_tokens: Sequence[int]) -> int:
    """Tokens that a made input may have; n_tokens: of the examples' inputs.

    0 means 1.5 times the longest example, at least LEAST_INPUT_LIMIT. A longer one is mostly caught in a loop.
    """
    return max_input_tokens or max(LEAST_INPUT_LIMIT, max(n_tokens) * 3 // 2)


def as_flag(name: str, value: Any) -> str:
    """A setting as an option of the command line: ("n_ctx", 2048) is --n-ctx 2048."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value}"


def _check(values: dict[str, Any], faults: Faults) -> None:
    """Adds a fault for each value that is wrong."""
    n_faults_before = faults.count
    for item in fields(Settings):
        value, rule = values[item.name], item.metadata
        stated = f"{item.name} = {value!r}"
        if type(value) is not item.type and not (item.type is float and type(value) is int):
            expected = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            faults.add(f"{stated} should be {expected[item.type]}")  # type: ignore[index]
        elif rule["choices"] and value not in rule["choices"]:
            faults.add(f"{stated} should be one of {', '.join(rule['choices'])}")
        elif type(value) is float and not math.isfinite(value):
            faults.add(f"{stated} should be a finite number")
        elif rule["low"] is not None and value < rule["low"]:
            faults.add(f"{stated} should be at least {rule['low']}")
        elif rule["high"] is not None and value > rule["high"]:
            faults.add(f"{stated} should be at most {rule['high']}")
    if faults.count > n_faults_before:
        return
    for name in ("max_input_tokens", "max_new_tokens"):
        if values[name] >= values["n_ctx"]:
            faults.add(
                f"{name} = {values[name]} leaves no room for a prompt: n_ctx is {values['n_ctx']} tokens"
            )
