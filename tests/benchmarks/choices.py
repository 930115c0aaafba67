"""Which of the sampled answers is the right one? Told by demonstrations that are left out: no test row is read.

    python tests/benchmarks/choices.py SAMPLES.jsonl tests/benchmarks/tasks/*.toml [BENCHMARK/tasks/task036.json ...]
    python tests/benchmarks/choices.py SAMPLES.jsonl

    left out         task036  task039 ...   mean  right  overruled
    information        0.431    0.203 ...  0.504  0.310       9/41

The first form samples answers and keeps them in SAMPLES: for each demonstration of a task, with the others shown, and
for tasks of short_answers.py also for rows that are drawn with another seed than the test rows. The second form reads
what is kept. Information chooses among samples that pass the filters of answers. Columns: mean ROUGE-L with the right
answer by task; mean over the tasks; share of right ones, JSON by its fields; and of the inputs where at least 4 of 10
samples say the same, those that are given another answer. The last line is what `curate` does: most said in tasks
whose samples repeat, else agreed first.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from short_answers import TASKS, rows  # beside this file

from sg_local.chat.template import ChatTemplate
from sg_local.files import append_rows, read_rows, row_seed
from sg_local.gguf_header import read_model_header
from sg_local.llama.asking import open_with, prompts_of
from sg_local.llama.engine import Engine
from sg_local.llama.generation import Request, generate
from sg_local.llama.scoring import answer_logprobs
from sg_local.models import resolve_model
from sg_local.selfguide.exact_answers import all_fields_right, parsed
from sg_local.selfguide.filters import answer_fault, rules_of
from sg_local.selfguide.metrics import exact_match, rouge_l
from sg_local.selfguide.prompts import answer_messages
from sg_local.selfguide.selection import REPEATED_SHARE, agreed, consensus, most_said, same_share, vote
from sg_local.settings import Settings
from sg_local.task import Example, Task, load_task
from sg_local.task_files.importing import import_task

AGREED = 0.4  # share of the samples
N_SAMPLES, N_DRAWS = 10, 2
DRAWN_SEED = 1


class Sampled(TypedDict):
    """A row of SAMPLES: the samples for an input, and what the input adds to each different one, in nats per token."""

    task: str
    kind: str  # "left out" or "drawn"
    input: str
    answer: str
    samples: list[str]
    information: dict[str, float]
    passing: list[str]  # different samples that pass the filters of answers; all where none does


def sampled(
    engine: Engine, template: ChatTemplate, task: Task, kind: str, asked: Sequence[Example], n_draws: int
) -> list[Sampled]:
    """n_draws times N_SAMPLES samples for each input, with the examples of the task shown."""
    settings, rules = Settings(), rules_of(task)
    one_line = not any("\n" in example.output for example in task.examples)
    conversations = [answer_messages(task.instruction, row.input, task.examples) for row in asked]
    nothing = answer_messages(task.instruction, "", task.examples)
    alone = tuple(engine.tokenizer.encode_prompt(template, nothing))
    prompts = [
        prompt for prompt in prompts_of(engine, template, conversations, settings.max_new_tokens) if prompt
    ]
    requests = [
        Request(
            prompt,
            settings.max_new_tokens,
            temperature=settings.output_temperature,
            top_k=settings.output_top_k,
            seed=row_seed(0, "choices", f"{row.input}/{number}"),
            stop=("\n",) if one_line else (),
        )
        for prompt, row in zip(prompts, asked, strict=True)
        for number in range(n_draws * N_SAMPLES)
    ]
    texts = [
        "" if found.finish_reason == "length" else found.text.strip() for found in generate(engine, requests)
    ]
    found: list[Sampled] = []
    for place, (prompt, row) in enumerate(zip(prompts, asked, strict=True)):
        for draw in range(n_draws):
            start = (place * n_draws + draw) * N_SAMPLES
            samples = texts[start : start + N_SAMPLES]
            distinct = [*dict.fromkeys(filter(None, samples))]
            answers = [tuple(engine.tokenizer.encode_answer(template, nothing, text)) for text in distinct]
            with_input = answer_logprobs(engine, [(prompt, answer) for answer in answers])
            without = answer_logprobs(engine, [(alone, answer) for answer in answers])
            information = {
                text: (one - other) / len(answer)
                for text, answer, one, other in zip(distinct, answers, with_input, without, strict=True)
            }
            found.append(
                Sampled(
                    task=task.name,
                    kind=kind,
                    input=row.input,
                    answer=row.output,
                    samples=samples,
                    information=information,
                    passing=[
                        text for text in distinct if answer_fault(settings, rules, row.input, text) is None
                    ]
                    or distinct,
                )
            )
    return found


def sample_tasks(paths: Sequence[Path], model: str, kept: Path, n_drawn: int) -> None:
    """Samples for all tasks, each task's as soon as they are there."""
    if not paths:
        return
    file, settings = resolve_model(model), Settings(n_threads=1)
    with open_with(settings, file) as engine:
        template = engine.tokenizer.chat_template(str(read_model_header(file).chat_template))
        for path in paths:
            task = import_task(path)[0] if path.suffix == ".json" else load_task(path)
            for place, example in enumerate(task.examples):
                others = replace(task, examples=task.examples[:place] + task.examples[place + 1 :])
                append_rows(kept, sampled(engine, template, others, "left out", [example], N_DRAWS))
            if task.name in TASKS and n_drawn:
                drawn = [Example(row["input"], row["output"]) for row in rows(task.name, DRAWN_SEED, n_drawn)]
                append_rows(kept, sampled(engine, template, task, "drawn", drawn, 1))
            print(task.name, flush=True)


def most_informed(row: Sampled, among: Sequence[str]) -> str:
    """The answer to which the input adds most for each token."""
    return max(among, key=lambda answer: row["information"][answer])


WAYS: dict[str, Callable[[Sampled], str]] = {
    "votes": lambda row: vote([*filter(None, row["samples"])])[0],
    "consensus": lambda row: consensus([*filter(None, row["samples"])])[0],
    "information": lambda row: most_informed(row, row["passing"]),
    "agreed first": lambda row: most_informed(row, agreed(passing_samples(row))),
    "most said": lambda row: most_said(passing_samples(row)),
}


def passing_samples(row: Sampled) -> list[str]:
    """The samples that pass the filters, each as often as it was drawn."""
    return [text for text in row["samples"] if text in row["passing"]]


def repeats(rows: Sequence[Sampled]) -> bool:
    """Whether `curate` chooses a task's answers by how many samples say them."""
    return (
        statistics.median(same_share(WAYS["most said"](row), row["samples"]) for row in rows)
        >= REPEATED_SHARE
    )


def is_right(answer: str, reference: str) -> float:
    """Whether an answer is right: JSON by its fields, any other by Exact Match."""
    return (exact_match if parsed(reference) is None else all_fields_right)(answer, reference)


def table(found: Sequence[Sampled], kind: str) -> None:
    """A line for each way of choosing."""
    part = [row for row in found if row["kind"] == kind and row["information"]]
    tasks = [*dict.fromkeys(row["task"] for row in part)]
    print(
        f"\n{kind:14}"
        + "".join(f"{task:>14}" for task in tasks)
        + f"{'mean':>9}{'right':>8}{'overruled':>11}"
    )
    repeating = {task for task in tasks if repeats([row for row in part if row["task"] == task])}
    ways = {
        **WAYS,
        "as curate": lambda row: WAYS["most said" if row["task"] in repeating else "agreed first"](row),
    }
    for way, choose in ways.items():
        by_task: dict[str, list[float]] = {task: [] for task in tasks}
        right: dict[str, list[float]] = {task: [] for task in tasks}
        overruled: list[bool] = []
        for row in part:
            answer = choose(row)
            by_task[row["task"]].append(rouge_l(answer, row["answer"]))
            right[row["task"]].append(is_right(answer, row["answer"]))
            if max(same_share(other, row["samples"]) for other in row["passing"]) >= AGREED:
                overruled.append(same_share(answer, row["samples"]) < AGREED)
        means = [statistics.fmean(scores) for scores in by_task.values()]
        n_right = statistics.fmean(map(statistics.fmean, right.values()))
        print(
            f"{way:14}"
            + "".join(f"{mean:14.3f}" for mean in means)
            + f"{statistics.fmean(means):9.3f}{n_right:8.3f}{f'{sum(overruled)}/{len(overruled)}':>11}"
        )


def main() -> None:
    """Samples where tasks are named, and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", type=Path)
    parser.add_argument("tasks", type=Path, nargs="*")
    parser.add_argument("--n-drawn", type=int, default=30, help="of each task of short_answers.py")
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    sample_tasks(arguments.tasks, arguments.model, arguments.samples, arguments.n_drawn)
    found = read_rows(arguments.samples, Sampled)
    for kind in dict.fromkeys(row["kind"] for row in found):
        table(found, kind)


if __name__ == "__main__":
    main()
