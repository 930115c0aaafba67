"""`run --fallback`: where the tuned model is not better than the base at its best, the base's way is handed out.

    hand_out(run)    True: runs/inbox/fallback/ is there, and says what answers; False: model.gguf it is

What is decided: selfguide/fallback.py. What it holds: handed_out.py. The tuned files stay as they are.
"""

from collections.abc import Sequence
from pathlib import Path

from sg_local import child_process
from sg_local.chat.modelfile import of_base
from sg_local.files import own_directory, place_directory, remove_tree, sha256_file, write_json, write_text
from sg_local.progress import say
from sg_local.report.scores import read_evaluation
from sg_local.runs.directory import Run, open_run
from sg_local.runs.handed_out import CHAT_TEMPLATE, DIRECTORY, MODELFILE, WAY_FILE, Way
from sg_local.runs.lock import lock_run
from sg_local.selfguide.contenders import TUNED, Contender
from sg_local.selfguide.evaluation import is_accuracy
from sg_local.selfguide.fallback import FallbackChoice, choice_of, mean
from sg_local.task import Example

_WORK = ".fallback"


def hand_out(run: Run) -> bool:
    """Writes fallback/ where the base at its best scored as high as the tuned model or higher, else removes it."""
    evaluation = read_evaluation(run)
    choice = choice_of(evaluation)
    if choice is not None:
        child_process.result_from_child("fallback", f"{__name__}.write_fallback", run_dir=str(run.path))
        return True
    with lock_run(run.path):
        remove_tree(run.file(DIRECTORY))
    why = "the tuned model scored higher than the base at its best"
    if not is_accuracy(evaluation):
        why = (
            "nothing tells whether the base is right more often: what counts as right are its own answers. Test rows "
            "or 40 labelled rows would"
        )
    say(f"fallback: model.gguf stays what to use: {why}")
    return False


def write_fallback(run_dir: str) -> None:
    """The same in the process where llama.cpp works: the files, and what decided."""
    run = open_run(Path(run_dir))
    evaluation = read_evaluation(run)
    choice = choice_of(evaluation)
    assert choice is not None, "asked for where there is nothing to hand out"
    run.check_model()
    with lock_run(run.path):
        work = run.file(_WORK)
        remove_tree(work)
        own_directory(work)
        try:
            in_chat_score = mean(evaluation, choice.in_chat) if choice.in_chat else None
            told: Way = {
                "way": choice.way,
                "in_chat": choice.in_chat,
                "score": mean(evaluation, choice.way),
                "in_chat_score": in_chat_score,
                "tuned_score": mean(evaluation, TUNED),
                "metric": evaluation["metric"],
                "rows_from": evaluation["rows_from"],
                "examples": [
                    {"input": example.input, "output": example.output} for example in _shown(run, choice.way)
                ],
                "evaluation_sha256": sha256_file(run.file("evaluation.json")),
                "sha256": _write_chat_files(run, choice, work),
            }
            write_json(work / Path(WAY_FILE).name, told)
            place_directory(work, run.file(DIRECTORY))
        finally:
            remove_tree(work)


def _write_chat_files(run: Run, choice: FallbackChoice, work: Path) -> dict[str, str]:
    """The files for chat programs, and their hashes; none where such a program does better with model.gguf."""
    if choice.in_chat is None:
        return {}
    from sg_local.llama.chat_files import chat_files

    stops = ("\n",) if choice.in_chat == Contender.FIRST_LINE else ()
    template, modelfile = chat_files(run, _shown(run, choice.in_chat), stops)
    texts = {CHAT_TEMPLATE: template, MODELFILE: of_base(modelfile, run.model.path)}
    for name, text in texts.items():
        write_text(work / Path(name).name, text)
    return {name: sha256_file(work / Path(name).name) for name in texts}


def _shown(run: Run, contender: Contender) -> Sequence[Example]:
    """The examples in a contender's prompt."""
    from sg_local.stages.evaluate import ways_to_answer

    return ways_to_answer(run)[
        Contender.FEW_SHOT if contender == Contender.FIRST_LINE else contender
    ].demonstrations
