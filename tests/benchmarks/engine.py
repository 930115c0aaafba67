"""Generation side by side: the engine, llama-cpp-python's loop, xllamacpp's server, Hugging Face, llama_decode alone.

    annotate            median s   min - max      ratio   tokens evaluated
    sg_local               1.58    1.55 - 1.62     1.00   825
    loop                  14.30   14.1  - 14.6     9.05

    python tests/benchmarks/engine.py [--repetitions 5] [--only annotate,evaluate] [--model FILE.gguf]
                                      [--llama-server FILE] [--wide] [--no-transformers]

--llama-server: llama.cpp's own server, built by hand, as one more contender, over HTTP. --wide: the same token ids on a
model of random weights with a vocabulary of 151,936 tokens (0.6 billion weights), in place of the real one.

All contenders answer the same token ids with the same file, alternately in one run. Answers have the same lengths:
those that the engine's requests came to, with the end token forbidden for the others. Ratios are of medians. `limit`
is llama_decode fed with as many tokens as the engine evaluated, in the best of several batch sizes: no engine that
evaluates these tokens can be faster. transformers answers every fifth request, and its time is taken five times. The
rows are a shipped example's test rows, each in three wordings.
"""

import argparse
import concurrent.futures
import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp

from sg_local.chat.template import ChatTemplate
from sg_local.gguf_header import read_model_header
from sg_local.llama.engine import BatchToken, Engine, open_engine
from sg_local.llama.generation import Completion, Request, generate
from sg_local.llama.library import usable_cores
from sg_local.llama.quantize import requantize
from sg_local.llama.scoring import label_logprobs
from sg_local.models import resolve_model
from sg_local.selfguide.prompts import answer_messages, list_request
from sg_local.task import load_task
from sg_local.task_files.rows import load_test_rows

sys.path[:0] = [str(Path(__file__).parents[1] / "gpu")]

from random_model import Shape, write_random_llama  # noqa: E402

# As wide as Qwen 2.5 0.5B and nearly as deep; K quants need multiples of 256.
WIDE = Shape(n_layers=24, hidden=1024, feed_forward=2816, n_heads=16, n_vocab=151936)
N_CTX = 4096
N_PARALLEL = 32  # the default of --n-parallel
HUGGING_FACE_STRIDE = 5
SLOTS = (1, 4, 16)
WORDINGS = ("{}", "Hello, {}", "{} Please help.")
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """Requests for the contenders, and the goals: how many times as fast as each of them the engine should be."""

    name: str
    requests: list[Request]
    goals: dict[str, float]
    labels: list[Tokens] | None = None  # scored by the engine in place of being sampled


def main() -> None:
    """Runs what was asked for and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default="", help="workloads, separated by commas")
    parser.add_argument("--model", type=Path, help="a GGUF file; SmolLM2-135M-Instruct in F16 if not given")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, as one more contender")
    parser.add_argument("--no-transformers", action="store_true", help="leave out the slowest contender")
    parser.add_argument("--wide", action="store_true", help="random weights, a vocabulary of 151,936 tokens")
    parser.add_argument("--memory", action="store_true", help="measure this process' memory alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or Path(directory) / "SmolLM2-135M-Instruct.F16.gguf"
        if not model.exists():
            requantize(resolve_model("smollm2-135m"), model, "F16")
        if arguments.memory:
            return measure_memory(model)
        versions = [
            f"{name} {importlib.metadata.version(name)}" for name in ("llama-cpp-python", "xllamacpp")
        ]
        print(f"{model.name}, {os.cpu_count()} processors ({platform.machine()}), {', '.join(versions)}")
        print(f"{arguments.repetitions} repetitions, contenders alternately; ratios of medians\n")
        chosen = [
            workload
            for workload in workloads(model)
            if not arguments.only or workload.name in arguments.only.split(",")
        ]
        if arguments.wide:
            wide = write_random_llama(Path(directory) / "wide.Q4_K_M.gguf", WIDE)
            print(
                f"{wide.name}: random weights, {WIDE.n_vocab:,} tokens, {wide.stat().st_size / 1e6:.0f} MB\n"
            )
        for workload in chosen:
            servers: dict[str, ServerOfSlots] = {}
            if "xllamacpp" in workload.goals:
                servers["xllamacpp"] = Server
            if arguments.llama_server and not workload.labels:
                servers["llama-server"] = partial(LlamaServer, arguments.llama_server)
            if arguments.wide:
                workload = replace(workload, goals={}, requests=workload.requests[:100])
            run_workload(
                wide if arguments.wide else model,
                workload,
                servers,
                arguments.repetitions,
                has_transformers=not (arguments.wide or arguments.no_transformers),
            )
        if arguments.wide:
            return
        command = [sys.executable, __file__, "--memory", "--model", str(model)]
        subprocess.run(command, check=True)


def workloads(model: Path) -> list[Workload]:
    """The work that a run consists of, as token ids."""
    found = []
    with open_engine(model, n_ctx=N_CTX, n_parallel=N_PARALLEL) as engine:
        source = read_model_header(model).chat_template
        assert source
        template = engine.tokenizer.chat_template(source)

        def prompts(name: str, n_rows: int) -> list[Tokens]:
            task = load_task(name)
            texts = [wording.format(row.input) for wording in WORDINGS for row in load_test_rows(task)]
            return [
                tuple(
                    engine.tokenizer.encode_prompt(
                        template, answer_messages(task.instruction, text, task.examples)
                    )
                )
                for text in texts[:n_rows]
            ]

        def samples(rows: list[Tokens], max_new_tokens: int) -> list[Request]:
            return [
                Request(prompt, max_new_tokens, temperature=0.2, top_k=10, seed=number * 10 + sample)
                for number, prompt in enumerate(rows)
                for sample in range(10)
            ]

        inbox = load_task("support-inbox")
        rows = prompts("support-inbox", 300)
        goals = {"loop": 3.5, "xllamacpp": 4.0}
        found.append(Workload("annotate", samples(rows[:24], 10), goals))
        found.append(Workload("annotate-text", samples(prompts("polite-request", 24), 64), goals))
        found.append(Workload("generate", made_inputs(engine, template), {"loop": 2.0, "xllamacpp": 1.5}))
        found.append(Workload("evaluate", [Request(prompt, 10) for prompt in rows], {"loop": 3.0}))
        messages = answer_messages(inbox.instruction, "a message")
        labels = [
            tuple(engine.tokenizer.encode_answer(template, messages, label)) for label in inbox.labels[:3]
        ]
        found.append(Workload("score", samples(rows, 10), {"loop": 5.0}, labels))
    return found


def made_inputs(engine: Engine, template: ChatTemplate) -> list[Request]:
    """96 inputs of the list prompting of `generate`, sampled, up to 96 new tokens, no stop string."""
    task = load_task("support-inbox")
    requests = []
    for number in range(96):
        messages, begun = list_request(task, task.labels[number % len(task.labels)], random.Random(number))
        prompt = tuple(engine.tokenizer.encode_begun(template, messages, begun))
        requests.append(Request(prompt, 96, temperature=0.9, top_k=40, min_p=0.05, seed=number, stop=("\n",)))
    return requests


def run_workload(
    model: Path,
    workload: Workload,
    servers: dict[str, "ServerOfSlots"],
    repetitions: int,
    has_transformers: bool,
) -> None:
    """Times all contenders on one workload and prints its table."""
    with open_engine(model, n_ctx=N_CTX, n_parallel=N_PARALLEL) as engine:
        generate(engine, [Request(workload.requests[0].prompt, 2)])  # the first call is slower
        completions = generate(engine, workload.requests)
        lengths = [len(completion.token_ids) for completion in completions]
        evaluated, overhead = 0, []

        def ours() -> None:
            nonlocal evaluated
            counters = engine.counters
            before = counters.evaluated_tokens, counters.decode_seconds
            engine.clear()
            started = time.perf_counter()
            if workload.labels:
                label_logprobs(
                    engine, sorted({request.prompt for request in workload.requests}), workload.labels
                )
            else:
                generate(engine, workload.requests)
            wall = time.perf_counter() - started
            evaluated = counters.evaluated_tokens - before[0]
            overhead.append(wall / (counters.decode_seconds - before[1]))

        times: dict[str, list[float]] = {}

        def timed(name: str, work: Callable[[], object], times_as_long: int = 1) -> None:
            started = time.perf_counter()
            work()
            times.setdefault(name, []).append((time.perf_counter() - started) * times_as_long)

        slots = {
            name: best_slots(partial(server, model), workload, lengths) for name, server in servers.items()
        }
        for _ in range(repetitions):
            timed("sg_local", ours)
            with Limit(engine, evaluated) as limit:
                timed("limit", limit.run)
            with Loop(model) as loop:
                timed("loop", partial(loop.answer, workload.requests, lengths))
            for name, server_of in servers.items():
                with server_of(model, slots[name]) as server:
                    timed(name, partial(server.answer, workload.requests, lengths))
            if has_transformers and not workload.labels:
                part = workload.requests[::HUGGING_FACE_STRIDE], lengths[::HUGGING_FACE_STRIDE]
                with HuggingFace(model) as hugging_face:
                    timed("transformers", partial(hugging_face.answer, *part), HUGGING_FACE_STRIDE)
    n_distinct = len({request.prompt for request in workload.requests})
    print(
        f"{workload.name}: {len(workload.requests)} requests, {n_distinct} prompts, {sum(lengths)} tokens of answers, "
        f"{evaluated} tokens evaluated" + "".join(f", {name} with {n} slots" for name, n in slots.items())
    )
    print(f"  {'contender':14}{'median s':>9}  {'min - max':16}{'ratio':>6}  spread        goal")
    ours_median = statistics.median(times["sg_local"])
    for name, found in times.items():
        ratios = sorted(other / own for other, own in zip(found, times["sg_local"], strict=True))
        median = statistics.median(found)
        goal = workload.goals.get(name)
        verdict = "" if goal is None else f"{goal} {'reached' if median / ours_median >= goal else 'MISSED'}"
        print(
            f"  {name:14}{median:9.2f}  {f'{min(found):.2f} - {max(found):.2f}':16}{median / ours_median:6.2f}  "
            f"{f'{ratios[0]:.2f} - {ratios[-1]:.2f}':14}{verdict}"
        )
    print(f"  wall time / time in llama_decode: {statistics.median(overhead):.3f}  (goal 1.10)\n", flush=True)


class Limit:
    """llama_decode alone: as many tokens as the engine evaluated, in batches of the best size."""

    def __init__(self, engine: Engine, n_tokens: int) -> None:
        self.engine, self.n_tokens = engine, n_tokens
        seconds = {}
        for size in (64, 256, 512):
            started = time.perf_counter()
            self._decode(size, 1024)
            seconds[size] = time.perf_counter() - started
        self.size = min(seconds, key=lambda size: seconds[size])

    def __enter__(self) -> "Limit":
        return self

    def __exit__(self, *_error: object) -> None:
        self.engine.clear()

    def run(self) -> None:
        """Evaluates the tokens."""
        self._decode(self.size, self.n_tokens)

    def _decode(self, size: int, n_tokens: int) -> None:
        # Each batch is a text of its own: one long text would attend to all of itself.
        for start in range(0, n_tokens, size):
            self.engine.clear()
            count = min(size, n_tokens - start)
            self.engine.decode(
                [BatchToken(100 + place, place, [0], place == count - 1) for place in range(count)]
            )


class Loop:
    """`llama_cpp.Llama.create_completion`, one request after the other; it keeps the last prompt's cache."""

    def __init__(self, model: Path) -> None:
        cores = usable_cores()  # its own default is half of them where tokens come one by one
        self.llama = llama_cpp.Llama(
            str(model), n_ctx=N_CTX, n_batch=512, n_threads=cores, n_threads_batch=cores, verbose=False
        )

    def __enter__(self) -> "Loop":
        return self

    def __exit__(self, *_error: object) -> None:
        self.llama.close()

    def answer(self, requests: list[Request], lengths: list[int]) -> None:
        """Answers of the given lengths."""
        forbidden = {self.llama.token_eos(): -100.0}
        for request, length in zip(requests, lengths, strict=True):
            self.llama.create_completion(
                list(request.prompt),
                max_tokens=length,
                temperature=request.temperature,
                top_k=request.top_k or 1,
                top_p=1.0,
                min_p=request.min_p,
                repeat_penalty=1.0,
                seed=request.seed,
                logit_bias=forbidden,
            )


class Server:
    """xllamacpp's build of llama.cpp's server, called without HTTP by as many threads as it has slots."""

    def __init__(self, model: Path, n_slots: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = max(N_CTX, 512 * n_slots)
        params.n_parallel = n_slots
        params.n_batch = params.n_ubatch = 512
        params.cpuparams.n_threads = os.cpu_count() or 1
        params.verbosity = -1
        self.n_slots = n_slots
        self.server = xllamacpp.Server(params)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_error: object) -> None:
        del self.server

    def answer(self, requests: list[Request], lengths: list[int]) -> None:
        """Answers of the given lengths."""

        def one(item: tuple[Request, int]) -> Any:
            found = self.server.handle_completions(completion_request(*item))
            assert "error" not in found, found
            return found

        with concurrent.futures.ThreadPoolExecutor(self.n_slots) as pool:
            list(pool.map(one, zip(requests, lengths, strict=True)))


class LlamaServer:
    """llama.cpp's server in a process of its own, called over HTTP on as many connections as it has slots."""

    def __init__(self, program: Path, model: Path, n_slots: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        threads = str(os.cpu_count() or 1)
        self.n_slots = n_slots
        self.process = subprocess.Popen(
            [
                *(str(program), "--model", str(model), "--host", "127.0.0.1", "--port", str(self.port)),
                *("--ctx-size", str(max(N_CTX, 512 * n_slots)), "--parallel", str(n_slots)),
                *(
                    "--batch-size",
                    "512",
                    "--ubatch-size",
                    "512",
                    "--threads",
                    threads,
                    "--threads-batch",
                    threads,
                ),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> "LlamaServer":
        for _ in range(600):
            assert self.process.poll() is None, f"llama-server ended with {self.process.returncode}"
            with contextlib.suppress(OSError), contextlib.closing(self._connection()) as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return self
            time.sleep(0.1)
        raise RuntimeError("llama-server does not answer")

    def __exit__(self, *_error: object) -> None:
        self.process.terminate()
        self.process.wait()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def answer(self, requests: list[Request], lengths: list[int]) -> None:
        """Answers of the given lengths."""
        items = list(zip(requests, lengths, strict=True))

        def some(first: int) -> None:
            with contextlib.closing(self._connection()) as connection:
                for request, length in items[first :: self.n_slots]:
                    body = json.dumps(completion_request(request, length))
                    connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
                    reply = connection.getresponse()
                    found = json.loads(reply.read())
                    assert reply.status == 200, found
                    assert found["tokens_predicted"] == length, found

        with concurrent.futures.ThreadPoolExecutor(self.n_slots) as pool:
            list(pool.map(some, range(self.n_slots)))


ServerOfSlots = Callable[[Path, int], Server | LlamaServer]


def completion_request(request: Request, length: int) -> dict[str, Any]:
    """A request as llama.cpp's server takes it, for an answer of a given length."""
    return {
        "prompt": list(request.prompt),
        "n_predict": length,
        "max_tokens": length,
        "temperature": request.temperature,
        "top_k": request.top_k or 1,
        "top_p": 1.0,
        "min_p": request.min_p,
        "repeat_penalty": 1.0,
        "seed": request.seed,
        "ignore_eos": True,
        "cache_prompt": True,
    }


def best_slots(
    server_of: Callable[[int], Server | LlamaServer], workload: Workload, lengths: list[int]
) -> int:
    """The number of slots that answers a part of the workload fastest."""
    seconds = {}
    part = slice(0, 48)
    for n_slots in SLOTS:
        with server_of(n_slots) as server:
            started = time.perf_counter()
            server.answer(workload.requests[part], lengths[part])
            seconds[n_slots] = time.perf_counter() - started
    return min(seconds, key=lambda n_slots: seconds[n_slots])


class HuggingFace:
    """`transformers` generate on the same weights in float32, batches of 16, padded on the left."""

    def __init__(self, model: Path) -> None:
        from sg_local.gguf_io.base_weights import write_base_weights

        self.directory = tempfile.TemporaryDirectory()
        weights = Path(self.directory.name) / "hf"
        write_base_weights(model, weights)
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(str(weights), dtype=torch.float32)

    def __enter__(self) -> "HuggingFace":
        return self

    def __exit__(self, *_error: object) -> None:
        self.directory.cleanup()

    def answer(self, requests: list[Request], lengths: list[int]) -> None:
        """Answers that are as long as the longest of their batch; rows are sorted by length, which helps it."""
        order = sorted(range(len(requests)), key=lambda index: lengths[index])
        for start in range(0, len(order), 16):
            part = order[start : start + 16]
            width = max(len(requests[index].prompt) for index in part)
            pads = [width - len(requests[index].prompt) for index in part]
            ids = [[2] * pad + list(requests[index].prompt) for pad, index in zip(pads, part, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in pads]
            new = max(lengths[index] for index in part)
            request = requests[part[0]]
            sampling: dict[str, Any] = (
                {"do_sample": True, "temperature": request.temperature, "top_k": request.top_k}
                if request.temperature
                else {"do_sample": False}
            )
            with self.torch.no_grad():
                self.model.generate(
                    input_ids=self.torch.tensor(ids),
                    attention_mask=self.torch.tensor(mask),
                    min_new_tokens=new,
                    max_new_tokens=new,
                    pad_token_id=2,
                    **sampling,
                )


def measure_memory(model: Path) -> None:
    """Peak memory of a process that answers 5,000 requests, and whether it grows."""

    def memory(name: str) -> int:
        # Not getrusage: its peak is inherited from the process that started this one.
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{name}:")[1].split()[0]) * 1024

    requests = next(workload for workload in workloads(model) if workload.name == "evaluate").requests
    with open_engine(model, n_ctx=N_CTX, n_parallel=N_PARALLEL) as engine:
        sizes = []
        completions: list[Completion] = []
        many = [
            Request((*request.prompt[:-1], 1000 + number), 3)
            for number in range(-(-5000 // len(requests)))
            for request in requests
        ][:5000]
        for start in range(0, 5000, 1000):
            completions += generate(engine, many[start : start + 1000])
            sizes.append(memory("VmRSS"))
        header = read_model_header(model).metadata
        layers, kv_heads = header["llama.block_count"], header["llama.attention.head_count_kv"]
        hidden, heads = header["llama.embedding_length"], header["llama.attention.head_count"]
        layers, kv_heads, hidden, heads = (int(str(number)) for number in (layers, kv_heads, hidden, heads))
        key_values = 2 * 2 * layers * kv_heads * (hidden // heads) * N_CTX  # keys and values, two bytes each
    peak = memory("VmHWM")
    print(
        f"memory, 5,000 requests: peak {peak / 1e6:.0f} MB = model {model.stat().st_size / 1e6:.0f} + key-value memory "
        f"{key_values / 1e6:.0f} + {(peak - model.stat().st_size - key_values) / 1e6:.0f} MB (goal 200); "
        f"after each 1,000: {', '.join(f'{size / 1e6:.0f}' for size in sizes)} MB"
    )


if __name__ == "__main__":
    main()
