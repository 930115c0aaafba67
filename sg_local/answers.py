"""Answers by any GGUF model, with or without an adapter, for inputs from Python or from a file.

    predict(["My parcel is late."], model="runs/support-inbox")    ["delivery"]
    serve("runs/support-inbox").answered(["My parcel is late."])    (0, "delivery", None), as soon as it is there

A tuned GGUF carries its task (`sg_local.task`), so its prompt is the one it was trained on; any other model gets the
task's demonstrations. A run's directory stands for its model.gguf, or for the base in the way that `run --fallback`
handed out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sg_local import child_process
from sg_local.chat.template import VICUNA_TEMPLATE, without_template
from sg_local.errors import InputError
from sg_local.escape import one_line
from sg_local.files import Faults
from sg_local.gguf_header import GgufHeader, read_header, read_model_header
from sg_local.inputs import Answer, AskedRow
from sg_local.models import find_by_path, resolve_model
from sg_local.progress import say
from sg_local.report.tables import counted
from sg_local.runs.directory import open_run
from sg_local.runs.given import check_task
from sg_local.selfguide.contenders import TUNED, Contender
from sg_local.settings import Settings
from sg_local.task import CarriedTask, Example, Task, carried_task, load_task
from sg_local.task_files.texts import Texts

T = TypeVar("T")
_IN_CHILD = "sg_local.llama.serving"


@dataclass(frozen=True)
class Answered:
    """What the model answers an input; text is None if it does not fit the context."""

    index: int  # of the input
    text: str | None
    label_logprobs: Mapping[str, float] | None  # in nats, where they were asked for


@dataclass(frozen=True)
class ServedModel:
    """A model and how it is asked: as the tuned GGUF says that it was trained, unless the call says otherwise."""

    model: Path
    adapter: Path | None
    task: Task
    max_new_tokens: int
    template_source: str
    settings: Settings
    temperature: float = 1.0  # at which its label probabilities are as right as they are sure
    way: Contender | None = None  # of the base, which a run hands out in place of its tuned model

    def answered(
        self, texts: Sequence[str], *, scores_labels: bool = False, shows_progress: bool = True
    ) -> Iterator[Answered]:
        """The answers, greedily, each as soon as it is there."""
        if scores_labels and not self.task.labels:
            raise InputError(
                f"the task {self.task.name} has no labels, and free answers have no probabilities: do not ask for them"
            )
        for values in child_process.values_from_child(
            "predict",
            f"{_IN_CHILD}.answers_of_engine",
            texts=_checked(texts),
            served=self.for_child(),
            scores_labels=scores_labels,
            shows_progress=shows_progress,
        ):
            yield Answered(*values)

    def for_child(self) -> dict[str, Any]:
        """The same as JSON, for the process in which llama.cpp works."""
        return {
            "model": str(self.model),
            "adapter": self.adapter and str(self.adapter),
            "settings": self.settings.as_dict(),
            "template_source": self.template_source,
            "instruction": self.task.instruction,
            "labels": self.task.labels,
            "examples": [example.as_row() for example in self.task.examples],
            "max_new_tokens": self.max_new_tokens,
            "way": self.way,
        }

    def answer(self, answered: Answered, abstain_below: float = 0.0) -> Answer:
        """An answer as it stands beside its input: with its probability, or why there is none."""
        if answered.text is None:
            return Answer(None, self.why_no_answer)
        if answered.label_logprobs is None:
            return Answer(answered.text)
        from sg_local.selfguide.calibration import at_temperature, probability_of

        probabilities = at_temperature(answered.label_logprobs, self.temperature)
        probability = probability_of(answered.text, probabilities)
        if probability < abstain_below:
            reason = f"unsure: {answered.text} has a probability of {probability:.3f}"
            return Answer(None, reason, probability, probabilities)
        return Answer(answered.text, None, probability, probabilities)

    @cached_property
    def why_no_answer(self) -> str:
        """Why an input got no answer, and what helps: more context only where the model has it."""
        header = read_model_header(self.model)
        ends_at = header.metadata.get(f"{header.architecture}.context_length")
        advice = "raise --n-ctx, or shorten the input"
        if isinstance(ends_at, int) and ends_at <= self.settings.n_ctx:
            advice = f"--n-ctx does not help, the model itself ends at {ends_at} tokens; shorten the input"
        return f"input and answer do not fit the context: {advice}"


def predict(
    inputs: Iterable[str],
    *,
    model: str | Path,
    adapter: str | Path | None = None,
    task: str | Path | Task | None = None,
    settings: Settings | None = None,
    prompt_format: str | None = None,
    max_new_tokens: int | None = None,
) -> list[str | None]:
    """The model's answers, greedily, in the order of the inputs; None for an input that does not fit the context.

    model: a run's directory, a GGUF file, or a name or reference of `sg-local models list`. adapter: a LoRA adapter
    (GGUF). task: a file, the name of a shipped one, or a Task; the task that the tuned GGUF was made for where none is
    given. settings: of the engine, n_ctx and the like. prompt_format, max_new_tokens: the tuned GGUF's where none are
    given.

    Raises InputError for a wrong model, adapter, task or input.
    """
    served = serve(
        model,
        adapter=adapter,
        task=task,
        settings=settings,
        prompt_format=prompt_format,
        max_new_tokens=max_new_tokens,
    )
    results = ((item.index, item.text) for item in served.answered([*inputs]))
    return [text for _, text in in_order(results, {})]


def in_order(results: Iterable[tuple[int, T]], waiting: dict[int, T]) -> Iterator[tuple[int, T]]:
    """Numbered results in their order, from 0, each as soon as those before it are there; until then in `waiting`."""
    first = 0
    for index, value in results:
        waiting[index] = value
        while first in waiting:
            yield first, waiting[first]
            del waiting[first]
            first += 1


def summary(task: Task, rows: Sequence[AskedRow], answers: Sequence[Answer]) -> list[str]:
    """How many rows got an answer, and how right those are whose right output is known; nothing where that is plain."""
    answered = [(row, answer) for row, answer in zip(rows, answers, strict=True) if answer.output is not None]
    known = [(row.reference, answer.output) for row, answer in answered if row.reference is not None]
    if len(answered) == len(rows) and not known:
        return []
    text = (
        f"predict: {len(answered)} of {counted(len(rows), 'row')} answered ({len(answered) / len(rows):.1%})"
    )
    if known:
        from sg_local.selfguide.metrics import metric_of

        # What was trained without examples carries none: the right outputs speak for them.
        examples = task.examples or tuple(Example("", reference) for reference, _ in known)
        metric = metric_of(replace(task, examples=examples))
        mean = sum(metric.score(str(output), reference) for reference, output in known) / len(known)
        text += f"; {metric.heading} {mean:.3f} of the {len(known)} of them whose right output is known"
    return [text]


def serve(
    model: str | Path,
    *,
    adapter: str | Path | None = None,
    task: str | Path | Task | None = None,
    settings: Settings | None = None,
    prompt_format: str | None = None,
    max_new_tokens: int | None = None,
) -> ServedModel:
    """The model and how it is asked; arguments and errors are those of `predict`."""
    settings = settings or Settings()
    if prompt_format is not None:
        settings = replace(settings, prompt_format=prompt_format)  # which checks it
    if max_new_tokens is not None:
        settings = replace(settings, max_new_tokens=max_new_tokens)
    if adapter is None and task is None and (handed_out := _handed_out(Path(model), settings)):
        header = read_model_header(handed_out.model)
        return replace(
            handed_out,
            max_new_tokens=max_new_tokens or handed_out.max_new_tokens,
            template_source=_template_source(prompt_format, header)
            if prompt_format
            else handed_out.template_source,
        )
    model_path, temperature = _model_file(model)
    adapter_path = Path(adapter) if adapter else None
    header = read_model_header(model_path)
    carrier = header if adapter_path is None else _adapter_header(adapter_path, model_path)
    asked = _asked(carrier, task, settings)
    return ServedModel(
        model_path,
        adapter_path,
        asked.task,
        max_new_tokens or asked.max_new_tokens,
        _template_source(prompt_format or asked.prompt_format, header),
        settings,
        temperature,
    )


def _model_file(model: str | Path) -> tuple[Path, float]:
    """The GGUF that is meant, of a run its model.gguf; and the temperature that the run's evaluation found for it."""
    path = Path(model)
    if not (path / "settings.toml").is_file():
        return resolve_model(str(model)), 1.0
    from sg_local.report.scores import label_temperature

    run = open_run(path)
    return run.written_file("model.gguf"), label_temperature(run, TUNED)


def _handed_out(run_dir: Path, settings: Settings) -> ServedModel | None:
    """How the base answers in place of a run's tuned model; None where that model is the one to ask."""
    if not (run_dir / "settings.toml").is_file():
        return None
    from sg_local.report.fallback import in_words
    from sg_local.report.scores import label_temperature
    from sg_local.runs.handed_out import read_fallback

    run = open_run(run_dir)
    fallback = read_fallback(run)
    if fallback is None:
        return None
    say(f"{in_words(fallback)}; give {run.file('model.gguf')} to ask the tuned model all the same")
    base = serve_base(run_dir, settings)
    # These have one prompt, so the same probabilities of labels. Of the others' none are recorded.
    of_one_prompt = (Contender.FEW_SHOT, Contender.FIRST_LINE, Contender.LABEL_SCORING)
    is_scored = fallback.way in of_one_prompt and run.task.is_classification
    return replace(
        base,
        task=replace(base.task, examples=fallback.examples),
        temperature=label_temperature(run, Contender.LABEL_SCORING) if is_scored else 1.0,
        way=fallback.way,
    )


def serve_base(run_dir: Path, settings: Settings) -> ServedModel:
    """The base of a run as it is without tuning: with the task's examples in its prompt."""
    run = open_run(run_dir)
    run.check_model()
    limit = run.settings.max_new_tokens
    return serve(
        run.model.path,
        task=replace(run.task, test=None),
        settings=settings,
        prompt_format=run.model.prompt_format,
        max_new_tokens=limit,
    )


@contextmanager
def conversation(served: ServedModel) -> Iterator[Callable[[str], str | None]]:
    """A function that answers one input after another, each as if it were the first; None for one that is too long."""
    values = child_process.values_from_child(
        "chat", f"{_IN_CHILD}.answers_one_by_one", served=served.for_child()
    )
    with closing(values):
        next(values)  # the model is loaded
        yield values.send


def _checked(inputs: Iterable[str]) -> list[str]:
    """The inputs as they are asked. Raises InputError with the numbers of those that are no text."""
    faults = Faults()
    texts = Texts(faults, "")
    checked = [
        texts.check(item, f"input {number}", check_controls=False) for number, item in enumerate(inputs, 1)
    ]
    faults.raise_any()
    return checked


class _Asked(NamedTuple):
    task: Task
    max_new_tokens: int
    prompt_format: str


def _asked(carrier: GgufHeader, task_source: str | Path | Task | None, settings: Settings) -> _Asked:
    """How the model is asked: as it was tuned, for the given task."""
    told, reason = carrier.metadata.get("sg_local.task"), ""
    tuned: CarriedTask | None = None
    if isinstance(told, str):
        try:
            tuned = carried_task(told, carrier.path)
        except InputError as error:  # a stranger's file may say anything
            reason = "; ".join(str(error).splitlines())
    if task_source is None:
        if tuned is None:
            words = f" in a form that can be used ({reason})" if reason else ""
            raise InputError(
                f"{carrier.path} does not say what it was tuned for{words}: give the task with --task"
            )
        return _Asked(tuned.task, tuned.max_new_tokens, tuned.prompt_format)
    task = load_task(task_source)
    if not task.examples:
        task, _ = check_task(task)
    if tuned is None:
        return _Asked(task, settings.max_new_tokens, "auto")
    if task.name != tuned.task.name:
        say(f"predict: {carrier.path} was tuned for {tuned.task.name}, and is asked for {task.name}")
    if not tuned.task.examples:  # what was trained without demonstrations is served without
        task = replace(task, examples=())
    return _Asked(task, tuned.max_new_tokens, tuned.prompt_format)


def _adapter_header(path: Path, model_path: Path) -> GgufHeader:
    from sg_local.gguf_io.fingerprint import fingerprint

    header = read_header(path)
    if header.kind != "adapter":
        if header.kind == "model":
            raise InputError(f"{path} is a model, not a LoRA adapter: give it with --model")
        raise InputError(
            f"{path} is a {header.kind!r:.40}, not a LoRA adapter: give a file that `sg-local export` wrote"
        )
    expected = header.metadata.get("sg_local.base_fingerprint")
    if expected is not None and expected != fingerprint(model_path):
        base = header.metadata.get("sg_local.base_sha256")
        raise InputError(
            f"{path} was made for another base than {model_path}: give the one it was tuned on"
            + (f", whose sha256 begins with {one_line(base[:16])}" if isinstance(base, str) else "")
        )
    return header


def _template_source(prompt_format: str, header: GgufHeader) -> str:
    if prompt_format == "auto":
        listed = find_by_path(header.path)
        prompt_format = listed.prompt_format if listed else "gguf"
    source = VICUNA_TEMPLATE if prompt_format == "vicuna" else header.chat_template
    if not source:
        raise InputError(f"{header.path} carries no chat template: {without_template(header)}")
    return source
