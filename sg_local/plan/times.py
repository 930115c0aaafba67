"""How long each stage of a run takes, told from what it has to compute and how fast this machine does that.

    works = stage_works(model, settings, mean_tokens(task, settings, rows), n_real_inputs=0)
    told_seconds(works["annotate"], speed)             44.0    by the measured speed alone
    told_seconds(works["annotate"], speed, [Earlier(work, speed, 51.0)])   50.2    and by what the last run took

Pure functions over numbers. What is counted are tokens: of prompts, as far as they are computed and not shared, of
answers, and of training batches. The rest (imports, loading, merging) is told in seconds. A speed is measured in half a
minute; what earlier runs took here, beside what the same formula says of them, corrects it.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import NamedTuple

from sg_local.plan.sizes import TURN_TOKENS, ModelSizes, TaskTokens
from sg_local.selfguide.contenders import Contender
from sg_local.settings import Settings, n_wanted_made

# Shares and sizes of runs of SmolLM2-135M on the shipped tasks.
KEPT_SHARE = 0.75  # of made inputs, by the filters of generate
MADE_LENGTH = 1.7  # tokens of a made input, for each of the examples'
REQUEST_TOKENS = 18  # of a request for an input that no other request shares
ROWS_PER_CALL = 64  # stages/generate.py
TRIAL_INPUTS = 3 * 32
# Of the tokens of an input's samples: those that are decoded, since samples go on as one until they part, and those
# that are scored, since many samples are equal or begin alike.
DECODED_OF_SAMPLES, SCORED_OF_SAMPLES = 0.4, 0.23
ZERO_SHOT_LENGTH = 3.0  # tokens of an answer without examples, for each of the examples'
# Forward and backward in 32 bits, for a token of a prompt in llama.cpp; with checkpoints a third more.
TRAINED_FOR_PROMPT = 2.5
STAGE_SECONDS = 2.0  # a process, and its imports without torch
TORCH_SECONDS = 12.0  # with torch
LOADED_BYTES_PER_SECOND = 4e8  # a model file, into memory
TRAINED_BYTES_PER_SECOND = 5e7  # weights to torch: dequantized, written, read again
MERGED_WEIGHTS_PER_SECOND = 2e7  # gguf_io/merge.py, and the 16-bit copy that the proof compares with
PROOF_PROMPTS = 16  # proof/parity.py
MODELS_IN_PROOF = 4  # three by llama.cpp, one by torch
CURATED_PER_SECOND = 100.0  # inputs


# What llama/speed.py measures: a prompt, and then some steps of so many answers side by side.
SAMPLE_PROMPT_TOKENS, SAMPLE_SEQUENCES, SAMPLE_STEPS = 256, 16, 8


class Speed(NamedTuple):
    """Of one model file on one machine, in tokens a second: of prompts, and of answers side by side."""

    prompt: float
    generated: float

    @property
    def sample_seconds(self) -> float:
        """Seconds for what is measured, by which two files of one model are compared."""
        return SAMPLE_PROMPT_TOKENS / self.prompt + SAMPLE_SEQUENCES * SAMPLE_STEPS / self.generated


@dataclass(frozen=True)
class Work:
    """What a stage has to compute, in tokens, and what else it does, in seconds."""

    prompt_tokens: float = 0.0
    generated_tokens: float = 0.0
    trained_tokens: float = 0.0
    other_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """For a file."""
        return {name: round(float(number), 3) for name, number in asdict(self).items()}


class Earlier(NamedTuple):
    """What a stage of an earlier run had to compute, how fast the machine was for it, and the seconds that it took."""

    work: Work
    speed: Speed
    seconds: float


def stage_works(
    model: ModelSizes, settings: Settings, tokens: TaskTokens, *, n_real_inputs: int = 0, n_labelled: int = 0
) -> dict[str, Work]:
    """The work of each stage. tokens: of texts of middle length; those that `plan` counts memory with are the longest.

    n_real_inputs: given ones, which need not all be made; n_labelled: rows that are scored and trained on beside them.
    """
    n_given = min(settings.n_inputs, n_real_inputs)
    n_made = n_wanted_made(settings, n_given, with_labels=tokens.labels > 0)
    n_asked = ROWS_PER_CALL * math.ceil(n_made / KEPT_SHARE / ROWS_PER_CALL)
    # A call is finished whole, so that more are kept than were asked for.
    n_answered = n_given + n_labelled + max(n_made, KEPT_SHARE * n_asked)
    load = STAGE_SECONDS + model.file_bytes / LOADED_BYTES_PER_SECOND
    return {
        "generate": _generate(settings, tokens, n_asked, load),
        "annotate": _annotate(settings, tokens, n_answered, load),
        "curate": Work(other_seconds=STAGE_SECONDS + n_answered / CURATED_PER_SECOND),
        "train": _train(model, settings, tokens, _n_trained(settings, tokens, n_answered, n_given)),
        "export": _export(model, settings, tokens),
        "evaluate": _evaluate(settings, tokens, n_answered, load),
    }


def seconds_by_speed(work: Work, speed: Speed) -> float:
    """Seconds of some work on a machine of that speed."""
    return (
        work.other_seconds
        + work.prompt_tokens / speed.prompt
        + work.generated_tokens / speed.generated
        + work.trained_tokens * TRAINED_FOR_PROMPT / speed.prompt
    )


def told_seconds(work: Work, speed: Speed, earlier: Sequence[Earlier] = ()) -> float:
    """Seconds that some work is likely to take: by the speed, and corrected by what earlier work of the kind took."""
    factors = [run.seconds / seconds_by_speed(run.work, run.speed) for run in earlier]
    return seconds_by_speed(work, speed) * (median(factors) if factors else 1.0)


def _generate(settings: Settings, tokens: TaskTokens, n_asked: int, load: float) -> Work:
    n_trials = TRIAL_INPUTS if settings.input_prompt == "auto" and n_asked else 0
    length = min(MADE_LENGTH * tokens.input, tokens.input_limit)
    n_scored = n_trials / 2 if tokens.labels else 0  # those trial inputs that pass
    return Work(
        prompt_tokens=tokens.instruction
        + tokens.demonstrations
        + (n_asked + n_trials) * REQUEST_TOKENS
        # The examples stand in other orders.
        + 6 * tokens.demonstrations
        + n_scored * (tokens.input + tokens.labels),
        generated_tokens=(n_asked + n_trials) * length,
        other_seconds=load,
    )


def _annotate(settings: Settings, tokens: TaskTokens, n_answered: float, load: float) -> Work:
    prefix = tokens.instruction + tokens.demonstrations
    if tokens.labels and settings.label_answers == "scores":
        per_input = tokens.input + TURN_TOKENS + tokens.labels
        return Work(settings.n_layouts * (prefix + n_answered * per_input), 0.0, 0.0, load)
    scored = 0.0
    if settings.choose_by == "information" and not tokens.labels:
        # After the input, and with nothing in its place.
        scored = 2 * SCORED_OF_SAMPLES * settings.n_samples * tokens.answer
    return Work(
        prompt_tokens=prefix + n_answered * (tokens.input + TURN_TOKENS + scored),
        generated_tokens=DECODED_OF_SAMPLES * n_answered * settings.n_samples * tokens.answer,
        other_seconds=load,
    )


def _n_trained(settings: Settings, tokens: TaskTokens, n_answered: float, n_given: int) -> float:
    """The rows that curate keeps."""
    of_given = settings.keep_confident_real if tokens.labels else settings.keep_confident
    return settings.keep_confident * (n_answered - n_given) + of_given * n_given


def _train(model: ModelSizes, settings: Settings, tokens: TaskTokens, n_rows: float) -> Work:
    steps = settings.epochs * math.ceil(n_rows / settings.batch_size)
    shared = tokens.instruction + (tokens.demonstrations if settings.train_demonstrations else 0)
    own = tokens.input + TURN_TOKENS + tokens.answer
    in_batch = shared + settings.batch_size * own
    if not model.trains_as_tree(settings):
        in_batch = settings.batch_size * (shared + own)
    return Work(
        trained_tokens=steps * in_batch,
        other_seconds=STAGE_SECONDS + TORCH_SECONDS + 2 * model.n_parameters / TRAINED_BYTES_PER_SECOND,
    )


def _export(model: ModelSizes, settings: Settings, tokens: TaskTokens) -> Work:
    shared = tokens.instruction + (tokens.demonstrations if settings.train_demonstrations else 0)
    whole = shared + tokens.input + TURN_TOKENS + tokens.answer
    return Work(
        prompt_tokens=MODELS_IN_PROOF * PROOF_PROMPTS * whole,
        other_seconds=STAGE_SECONDS + TORCH_SECONDS + model.n_parameters / MERGED_WEIGHTS_PER_SECOND,
    )


def _evaluate(settings: Settings, tokens: TaskTokens, n_answered: float, load: float) -> Work:
    has_labels = tokens.labels > 0
    # Without test rows a part of the others is held out.
    n_rows = tokens.test_rows or min(0.15 * n_answered, settings.max_test_rows)
    contenders = [contender for contender in Contender if contender.is_expected(with_labels=has_labels)]
    contenders += [Contender.MANY_SHOT] if settings.many_shot else []
    prompts = generated = 0.0
    for contender in contenders:
        shown = contender in {Contender.FEW_SHOT, Contender.LABEL_SCORING, Contender.MANY_SHOT}
        prompts += tokens.instruction + (tokens.demonstrations if shown else 0)
        prompts += n_rows * (tokens.input + TURN_TOKENS)
        if contender == Contender.LABEL_SCORING or (contender == Contender.TUNED_MERGED and has_labels):
            prompts += n_rows * tokens.labels
        if contender != Contender.LABEL_SCORING:
            length = ZERO_SHOT_LENGTH if contender == Contender.ZERO_SHOT else 1.0
            generated += n_rows * min(length * tokens.answer, settings.max_new_tokens)
    return Work(prompts, generated, 0.0, STAGE_SECONDS + len(contenders) * (load - STAGE_SECONDS + 1.0))
