"""Does a server that the user runs give the answers that were scored: its prompt, its answers, their score.

    check_server(run, ChatServer("http://127.0.0.1:8080", 60), model=None, n_rows=100)
    -> ServerCheck(sends="the input alone", prompt=PromptCheck(True, "as /apply-template shows it"), comparison=...)

The recorded rows are sent as a user would send them: the input alone where model.gguf's own chat template makes the
trained prompt of that, else with the instruction as the system message. What the server makes of it can be seen where
it has /apply-template (llama.cpp's), and counted where it tells how many tokens a prompt had.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sg_local import child_process
from sg_local.chat.template import Message
from sg_local.errors import InputError
from sg_local.gguf_header import read_model_header
from sg_local.progress import progress
from sg_local.proof.chat_server import ChatServer, ServerAnswer
from sg_local.report.scores import read_evaluation, read_predictions
from sg_local.runs.directory import Run, open_run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.selfguide.contenders import TUNED, Contender
from sg_local.selfguide.prompts import INSTRUCTION_PLACES, answer_messages
from sg_local.selfguide.served import PromptCheck, ServerCheck, compare


class TrainedPrompt(NamedTuple):
    """A row's prompt as it was trained."""

    text: str
    n_tokens: int


def check_server(run: Run, server: ChatServer, model: str | None, n_rows: int) -> ServerCheck:
    """Asks the server the first n_rows of the recorded rows, and compares.

    Raises InputError where the run has no recorded answers, and SgLocalError where the server gives none.
    """
    scored = read_evaluation(run)["contenders"]
    recorded = {contender: read_predictions(run, contender) for contender in Contender if contender in scored}
    rows = recorded[TUNED][:n_rows]
    if not rows:
        raise InputError(
            f"{run.path} has no recorded answers: `sg-local evaluate {run.path} --redo` makes them"
        )
    run.written_file("model.gguf")
    prompts = child_process.result_from_child(
        "verify",
        f"{__name__}.trained_prompts",
        run_dir=str(run.path),
        inputs=[row["input"] for row in rows],
    )
    trained = [TrainedPrompt(*prompt) for prompt in prompts["trained"]]
    place, max_new_tokens = prompts["place"], prompts["max_new_tokens"]
    conversations = [_messages(run, row["input"], place) for row in rows]
    name = model or server.only_model()
    rendered = server.rendered(conversations[0])
    answers: list[ServerAnswer] = []
    with progress("verify", len(rows), "rows") as advance:
        for messages in conversations:
            answers.append(server.answer(messages, model=name, max_new_tokens=max_new_tokens))
            advance(1)
    return ServerCheck(
        server.url,
        name,
        "the input alone" if place is None else "instruction and input",
        _prompt_check(rendered, trained, answers, prompts["bos"]),
        sum(answer.thinks for answer in answers),
        compare(run.task, recorded, [answer.text for answer in answers]),
    )


def trained_prompts(run_dir: str, inputs: list[str]) -> dict[str, Any]:
    """The trained prompts of inputs, and how a user gets them: the place of the instruction, None for the input alone.

    In a process where llama.cpp reads the vocabulary.
    """
    from sg_local.llama.asking import longest_answer
    from sg_local.llama.library import load_model
    from sg_local.llama.tokens import Tokenizer

    run = open_run(Path(run_dir))
    own_source = read_model_header(run.file("model.gguf")).metadata.get("tokenizer.chat_template")
    with load_model(run.file("model.gguf"), vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        bos = tokenizer.text_of(tokenizer.bos) if tokenizer.adds_bos else ""
        template = tokenizer.chat_template(template_source(run))
        trained = []
        for text in inputs:
            messages = answer_messages(run.task.instruction, text, demonstrations(run))
            pieces = template.render(messages, add_generation_prompt=True)
            trained.append(
                ("".join(piece.text for piece in pieces), len(tokenizer.encode_prompt(template, messages)))
            )

        def makes_the_trained_prompt(place: str | None) -> bool:
            if not isinstance(own_source, str):
                return False
            messages = _messages(run, inputs[0], place)
            try:
                pieces = tokenizer.chat_template(own_source).render(messages, add_generation_prompt=True)
            except InputError:  # it refuses these roles
                return False
            text = "".join(piece.text for piece in pieces)
            return text.removeprefix(bos) == trained[0][0].removeprefix(bos)

        places = filter(makes_the_trained_prompt, (None, *INSTRUCTION_PLACES))
        return {
            "trained": trained,
            "place": next(places, INSTRUCTION_PLACES[0]),
            "max_new_tokens": longest_answer(tokenizer, run.task.labels, run.settings.max_new_tokens),
            "bos": bos,
        }


def _messages(run: Run, text: str, place: str | None) -> list[Message]:
    """What a user sends."""
    if place is None:
        return [{"role": "user", "content": text}]
    return answer_messages(run.task.instruction, text, demonstrations(run), place)


def _prompt_check(
    rendered: str | None, trained: Sequence[TrainedPrompt], answers: Sequence[ServerAnswer], bos: str
) -> PromptCheck:
    if rendered is not None:
        ours, theirs = (text.removeprefix(bos) for text in (trained[0].text, rendered))
        if ours == theirs:
            return PromptCheck(True, "as /apply-template shows it")
        start = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        return PromptCheck(
            False,
            f"/apply-template shows {_excerpt(theirs, start)} where {_excerpt(ours, start)} was trained",
        )
    told = [
        (prompt.n_tokens, answer.n_prompt_tokens)
        for prompt, answer in zip(trained, answers, strict=True)
        if answer.n_prompt_tokens is not None
    ]
    if not told:
        return PromptCheck(None, "the server neither shows its prompts nor tells their tokens")
    different = [(ours, theirs) for ours, theirs in told if ours != theirs]
    if not different:
        return PromptCheck(True, f"it has as many tokens as the trained one in all of {len(told)} rows")
    n_trained, n_served = different[0]
    return PromptCheck(
        False,
        f"it has {n_served} tokens where {n_trained} were trained; so in {len(different)} of {len(told)} rows",
    )


def _excerpt(text: str, start: int) -> str:
    """A part of a text from just before a place, in quotation marks and on one line."""
    return repr(text[max(0, start - 10) : start + 40])
