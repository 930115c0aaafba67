"""Answers of a model that is served, in the process where llama.cpp works: of many inputs, or one after another.

    answers_of_engine(["My parcel is late."], {"model": "model.gguf", "way": None, ...})   (0, "delivery", None)

What is served is a `ServedModel` (answers.py) as JSON. way: of the base, which a run hands out in place of its tuned
model; then the answer is what that way makes of it, the likeliest label or the first line.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from sg_local import child_process
from sg_local.chat.template import ChatTemplate
from sg_local.llama.asking import (
    INPUTS_PER_CALL,
    QUESTIONS_PER_CALL,
    answer_inputs,
    finished_answers,
    has_room,
    likeliest,
    longest_answer,
    open_with,
    score_labels,
    speed,
)
from sg_local.llama.engine import Engine
from sg_local.llama.generation import Completion
from sg_local.progress import progress
from sg_local.selfguide.contenders import Contender
from sg_local.settings import Settings
from sg_local.task import Example, Task


class _Served(NamedTuple):
    """A model that is open, and how it is asked."""

    engine: Engine
    template: ChatTemplate
    asked: Task  # its instruction, labels and the examples in its prompt
    max_new_tokens: int
    way: str | None

    def text_of(self, completion: Completion | None) -> str | None:
        """The answer that counts of what was generated."""
        if completion is None:
            return None
        text = completion.text.strip()
        return text.partition("\n")[0].strip() if self.way == Contender.FIRST_LINE else text

    def label_logprobs(self, inputs: Sequence[str]) -> list[dict[str, float] | None]:
        """log p of each label after each input; None for an input that does not fit the context."""
        scores: list[dict[str, float] | None] = []
        for start in range(0, len(inputs), QUESTIONS_PER_CALL):
            part = inputs[start : start + QUESTIONS_PER_CALL]
            scores += score_labels(self.engine, self.template, self.asked, part, lambda _n_inputs: None)
        return scores


@contextmanager
def _opened(
    model: str,
    adapter: str | None,
    settings: dict[str, Any],
    template_source: str,
    instruction: str,
    labels: list[str],
    examples: list[dict[str, Any]],
    max_new_tokens: int,
    way: str | None,
) -> Iterator[_Served]:
    with open_with(Settings(**settings), Path(model), Path(adapter) if adapter else None) as engine:
        shown = tuple(Example(**example) for example in examples)
        yield _Served(
            engine,
            engine.tokenizer.chat_template(template_source),
            Task("task", instruction, shown, tuple(labels)),
            longest_answer(engine.tokenizer, labels, max_new_tokens),
            way,
        )


def answers_one_by_one(served: dict[str, Any]) -> Iterator[str | None]:
    """Answers of what is received, each as if it were the first; first "" when the model is loaded."""
    with _opened(**served) as model:
        yield ""
        for text in child_process.received_values():
            if model.way == Contender.LABEL_SCORING:
                [scores] = model.label_logprobs([text])
                yield likeliest(scores) if scores else None
                continue
            [completion] = answer_inputs(
                model.engine,
                model.template,
                model.asked.instruction,
                [text],
                demonstrations=model.asked.examples,
                max_new_tokens=model.max_new_tokens,
                on_finished=lambda _n_inputs: None,
            )
            yield model.text_of(completion)


def answers_of_engine(
    texts: list[str], served: dict[str, Any], *, scores_labels: bool, shows_progress: bool
) -> Iterator[tuple[int, str | None, dict[str, float] | None]]:
    """The fields of `Answered` for each text, as soon as it is answered."""
    with _opened(**served) as model:
        instruction, examples = model.asked.instruction, model.asked.examples
        if not has_room(model.engine, model.template, instruction, examples):
            # and no tokens are made of any of them
            yield from ((index, None, None) for index in range(len(texts)))
            return
        bar = progress("predict", len(texts), "inputs", detail=lambda: speed(model.engine))
        with bar if shows_progress else nullcontext(lambda _n_inputs: None) as advance:
            for start in range(0, len(texts), INPUTS_PER_CALL):
                part = texts[start : start + INPUTS_PER_CALL]
                scores: list[dict[str, float] | None] = [None] * len(part)
                if scores_labels or model.way == Contender.LABEL_SCORING:
                    scores = model.label_logprobs(part)
                if model.way == Contender.LABEL_SCORING:
                    advance(len(part))
                    for index, row in enumerate(scores):
                        yield start + index, likeliest(row) if row else None, row if scores_labels else None
                    continue
                for index, completion in finished_answers(
                    model.engine,
                    model.template,
                    instruction,
                    part,
                    demonstrations=examples,
                    max_new_tokens=model.max_new_tokens,
                ):
                    advance(1)
                    yield start + index, model.text_of(completion), scores[index]
