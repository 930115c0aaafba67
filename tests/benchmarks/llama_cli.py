"""Does llama-cli answer as the README says? A run's files in it, greedy, beside our engine.

    model.gguf                 20 of 20 answers equal
    adapter.gguf on the base   19 of 20 answers equal
      ours 'invoice', theirs 'login': 0.011 nats apart

    python tests/benchmarks/llama_cli.py RUN LLAMA_CLI [--n-prompts 20]

RUN is a finished run; asked are its first test rows, each in a process of its own, as a person types it. LLAMA_CLI is
the program, built from llama.cpp's sources: it writes the prompt itself, with the chat template of the file. An answer
may differ where two are as likely as each other in another build; how far our engine prefers its own is shown.
"""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path

from independent import N_CTX, our_answers, preference  # beside this file

from sg_local.runs.directory import open_run


def told(llama_cli: Path, options: Sequence[str], text: str, limit: int) -> str:
    """llama-cli's answer to an input: what it prints between the echo of the input and its last word."""
    command = [str(llama_cli), *options, "--jinja", "--temp", "0", "--single-turn", "--simple-io"]
    command += ["--no-show-timings", "--ctx-size", str(N_CTX), "--predict", str(limit), "--prompt", text]
    found = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
    )
    _, echo, answer = found.stdout.decode("utf-8").partition(f"> {text}\n")
    assert echo, found.stdout[-500:]
    return answer.rpartition("Exiting...")[0].strip()


def main() -> None:
    """A line for each way, and the answers that differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("llama_cli", type=Path)
    parser.add_argument("--n-prompts", type=int, default=20)
    given = parser.parse_args()
    run = open_run(given.run)
    inputs = [row.input for row in (run.test_rows or [])[: given.n_prompts]]
    adapter = run.file("adapter.gguf")
    beside = ["--lora", str(adapter), "--chat-template-file", str(run.file("chat_template.jinja"))]
    for name, model, lora, more in (
        ("model.gguf", run.file("model.gguf"), None, []),
        ("adapter.gguf on the base", run.model.path, adapter, beside),
    ):
        prompts, limit, ours = our_answers(run, inputs, model, lora)
        options = ["--model", str(model), *more]
        theirs = [told(given.llama_cli, options, text, limit) for text in inputs]
        differing = [row for row in zip(prompts, ours, theirs, strict=True) if row[1].strip() != row[2]]
        print(f"{name:26} {len(inputs) - len(differing)} of {len(inputs)} answers equal", flush=True)
        for prompt, our, their in differing:
            apart = preference(prompt, our, their, model, lora)
            print(f"  ours {our!r}, theirs {their!r}: {apart:.3f} nats apart", flush=True)


if __name__ == "__main__":
    main()
