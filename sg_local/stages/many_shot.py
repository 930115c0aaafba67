"""The prompt of base_many_shot: the made pairs as demonstrations (a baseline of SELF-GUIDE, arXiv 2407.12874).

reads  train.jsonl   {"id": 7, "input": "My parcel is late.", "output": "delivery", "confidence": 0.81, "drop": null}
-> Example("My parcel is late.", "delivery"), and so on; the task's own demonstrations stand last, by the question
"""

from collections.abc import Sequence

from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.records import read_rows
from sg_local.run import Run
from sg_local.selfguide.prompts import answer_messages
from sg_local.selfguide.selection import in_turns
from sg_local.stages.common import DEMONSTRATION, template_source
from sg_local.task import Example

# The longest prompt, with its answer. Evaluated once, but every answer attends to all of it: time grows with it.
MAX_TOKENS = 2048


def many_shots(run: Run, rows: Sequence[Example]) -> list[Example]:
    """Kept pairs, each label in turn, the most confident first, and after them the demonstrations.

    As many as leave room for the longest input of `rows` and an answer, in the smallest of n_ctx, the context that the
    model was trained for, and MAX_TOKENS.
    """
    made = [
        row
        for row in read_rows(run.file("train.jsonl"))
        if row["drop"] is None and not str(row["id"]).startswith(DEMONSTRATION)
    ]
    made.sort(key=lambda row: -row["confidence"])  # stable: ties keep the order of the file
    labels = [row["output"] if run.task.is_classification else "" for row in made]
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(template_source(run))

        def n_tokens(text: str, shown: Sequence[Example]) -> int:
            return len(tokenizer.encode_prompt(template, answer_messages(run.task.instruction, text, shown)))

        room = min(run.settings.n_ctx, model.n_ctx_train, MAX_TOKENS) - run.settings.max_new_tokens
        room -= max(n_tokens(row.input, run.task.examples) for row in rows)
        nothing = n_tokens("", ())
        shown: list[Example] = []
        for index in in_turns(labels):
            example = Example(made[index]["input"], made[index]["output"])
            room -= n_tokens("", (example,)) - nothing
            if room < 0:
                break
            shown.append(example)
    return [*shown, *run.task.examples]
