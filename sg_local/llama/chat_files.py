"""The files with which chat programs write the prompt of a task: a chat template, and a Modelfile for Ollama.

    chat_files(run, ())                  ("{%- set enable_thinking = false -%}...", "FROM ./model.gguf\nSYSTEM ...")
    chat_files(run, run.task.examples)   the same with the task's examples before what the user writes

How they are written: chat/served.py, chat/modelfile.py. Here the tokenizer says what begins and ends an answer.
"""

from collections.abc import Sequence

from sg_local.chat.modelfile import modelfile
from sg_local.chat.served import require_served
from sg_local.llama.asking import longest_answer
from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.runs.directory import Run
from sg_local.runs.prompt import template_source
from sg_local.selfguide.prompts import answer_messages
from sg_local.task import Example


def chat_files(run: Run, shown: Sequence[Example], more_stops: Sequence[str] = ()) -> tuple[str, str]:
    """The chat template and the Modelfile. shown: the examples in the prompt; more_stops: texts that end an answer."""
    shown = tuple(shown)
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(template_source(run))
        messages = answer_messages(run.task.instruction, run.task.examples[0].input, shown)
        begins_with = template.render(messages, add_generation_prompt=True)[0]
        writes_bos = tokenizer.adds_bos and (
            begins_with.is_data or not begins_with.text.startswith(template.bos_token)
        )
        source = require_served(template, run.task.instruction, shown, writes_bos=writes_bos)
        end = tokenizer.encode_answer(template, messages, run.task.examples[0].output)[-1]
        stops = sorted({tokenizer.text_of(end), template.eos_token, *more_stops} - {""})
        text = modelfile(
            template,
            run.task.instruction,
            shown,
            stops=stops,
            licence=run.model.licence,
            max_new_tokens=longest_answer(tokenizer, run.task.labels, run.settings.max_new_tokens),
            adds_bos=tokenizer.adds_bos,
        )
        return source, text
