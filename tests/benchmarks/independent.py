"""Do exported files answer the same in another build of llama.cpp? xllamacpp's server beside our engine, greedy.

    adapter.gguf on the base   20 of 20 answers equal
    model.gguf                 19 of 20 answers equal
      ours 'invoice', theirs 'login': 0.011 nats apart

    python tests/benchmarks/independent.py RUN [--n-prompts 20]

RUN is a finished run. Both get the same token ids of the run's first test rows. The other build computes
quantized products with other instructions, so an answer may differ where two are as likely as each other; by how much
our engine prefers its own is shown. Exits with 1 where an answer differs by more than that.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from sg_local.llama.asking import longest_answer
from sg_local.llama.engine import open_engine
from sg_local.llama.generation import Request, generate
from sg_local.llama.scoring import label_logprobs
from sg_local.runs.directory import Run, open_run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.selfguide.prompts import answer_messages

N_CTX = 2048
NEAR_NATS = 0.25  # what other kernels make of one quantized file: logits differ by some tenths


def main() -> None:
    """Compares both exported files of a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--n-prompts", type=int, default=20)
    arguments = parser.parse_args()
    run = open_run(arguments.run)
    rows = (run.test_rows or [])[: arguments.n_prompts]
    pairs = {
        "adapter.gguf on the base": (run.model.path, run.file("adapter.gguf")),
        "model.gguf": (run.file("model.gguf"), None),
    }
    is_right = True
    for name, (model, adapter) in pairs.items():
        prompts, limit, ours = our_answers(run, [row.input for row in rows], model, adapter)
        theirs = their_answers(prompts, limit, model, adapter)
        equal = [a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True)]
        print(f"{name:26} {sum(equal)} of {len(equal)} answers equal")
        for prompt, a, b, same in zip(prompts, ours, theirs, equal, strict=True):
            if not same:
                apart = preference(prompt, a, b, model, adapter)
                print(f"  ours {a!r}, theirs {b!r}: {apart:.3f} nats apart")
                is_right &= apart < NEAR_NATS
    sys.exit(0 if is_right else 1)


def our_answers(
    run: Run, inputs: list[str], model: Path, adapter: Path | None
) -> tuple[list[list[int]], int, list[str]]:
    """Prompts as token ids, the longest answer in tokens, and the engine's answers."""
    with open_engine(
        model, n_ctx=N_CTX, n_parallel=4, n_threads=0, n_gpu_layers=0, adapter_path=adapter
    ) as engine:
        template = engine.tokenizer.chat_template(template_source(run))
        prompts = [
            engine.tokenizer.encode_prompt(
                template, answer_messages(run.task.instruction, text, demonstrations(run))
            )
            for text in inputs
        ]
        limit = longest_answer(engine.tokenizer, run.task.labels, run.settings.max_new_tokens)
        found = generate(engine, [Request(tuple(prompt), limit) for prompt in prompts])
    return prompts, limit, [completion.text for completion in found]


def preference(prompt: list[int], a: str, b: str, model: Path, adapter: Path | None) -> float:
    """log p(a) - log p(b) after the prompt by our engine: 0 where the answers are equally likely."""
    with open_engine(
        model, n_ctx=N_CTX, n_parallel=2, n_threads=0, n_gpu_layers=0, adapter_path=adapter
    ) as engine:
        labels = [tuple(engine.tokenizer.encode_plain(text.strip())) for text in (a, b)]
        [[of_a, of_b]] = label_logprobs(engine, [tuple(prompt)], labels)
    return of_a - of_b


def their_answers(prompts: list[list[int]], limit: int, model: Path, adapter: Path | None) -> list[str]:
    """The same from xllamacpp's build."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx = N_CTX
    params.n_parallel = 1
    params.verbosity = -1
    if adapter:
        lora: Any = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    answers = []
    for prompt in prompts:
        found = server.handle_completions(
            {"prompt": prompt, "n_predict": limit, "max_tokens": limit, "temperature": 0.0, "top_k": 1}
        )
        assert "error" not in found, found
        answers.append(found.get("content", "") or found["choices"][0]["text"])
    del server
    return answers


if __name__ == "__main__":
    main()
