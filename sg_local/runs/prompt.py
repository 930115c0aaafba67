"""The prompt of a run: its chat template, and the demonstrations that the tuned model is shown.

template_source(run)    "{% for message in messages %}<|im_start|>..."    the GGUF's own, or Vicuna v1.1's
"""

from sg_local.chat.template import VICUNA_TEMPLATE
from sg_local.runs.directory import Run
from sg_local.settings import Settings
from sg_local.task import Example, Task


def template_source(run: Run) -> str:
    """The Jinja text of the run's chat format."""
    if run.model.prompt_format == "vicuna":
        return VICUNA_TEMPLATE
    return run.base_header.chat_template or VICUNA_TEMPLATE


def demonstrations(run: Run) -> tuple[Example, ...]:
    """What the tuned model sees in its prompt, in training and when it is served."""
    return demonstrations_of(run.task, run.settings)


def demonstrations_of(task: Task, settings: Settings) -> tuple[Example, ...]:
    """The same, before there is a run."""
    return task.examples if settings.train_demonstrations else ()
