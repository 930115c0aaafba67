"""Damaged files of every kind, given to the product: each is accepted or ends as a clear error, never otherwise.

    headers  50,000 tried: 5,975 accepted, 44,025 refused, 0 failed; worst 0.047 s, memory +3 MiB
    loads       500 tried: 135 answered, 54 ended llama.cpp by SIGABRT, 311 refused, 0 failed; worst 5.867 s
    texts    10,000 tried: 1,881 accepted, 8,119 refused, 0 failed; worst 0.615 s, memory +10 MiB

    python tests/benchmarks/fuzz.py [--headers 50000] [--loads 500] [--texts 25000] [--seed 0] [--keep DIR]

headers: mutations of tiny valid GGUF files (bits, lengths, cuts, copies), read by the bounded header reader; a failure
is any exception but InputError, or more than a second. loads: those that pass the header's check, answered by
`sg-local predict`, a process each; a failure is a traceback, a signal, more or less than one line of error, or two
minutes. texts: task files, test rows, rows of a run, its manifest and settings, through the commands that read them,
and adapter_config.json, through what `export-adapter` reads it with; a failure is any exception.

Exit code 1 where something failed; --keep keeps each file that did. The same seed tries the same files.
"""

import argparse
import contextlib
import copy
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import llama_cpp
from click.testing import CliRunner

from sg_local import child_process
from sg_local.cli import cli
from sg_local.errors import InputError, SgLocalError
from sg_local.gguf_header import read_header, read_model_header, require_supported
from sg_local.gguf_io.adapter import write_adapter_gguf
from sg_local.runs.begin import create_or_open_run
from sg_local.settings import Settings
from sg_local.task import load_task

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "unit"))  # the builders of tiny files

from finished_run import MODEL, TENSORS, finish_run, write_inputs, write_outputs  # noqa: E402
from gguf_bytes import TinyTensor, nested_array, tiny_gguf  # noqa: E402
from gguf_models import write_model, write_peft  # noqa: E402
from tiny_models import TOKENS, write_tiny_llama, write_tiny_model  # noqa: E402

MAX_HEADER_SECONDS = 1.0
MAX_LOAD_SECONDS = 120
SHOWN_FAILURES, SHOWN_LINES = 5, 6
TASK = """name = "inbox"
instruction = "Which box is this message for?"
labels = ["refund", "login"]
test = "inbox.test.jsonl"

[[examples]]
input = "I want my money back."
output = "refund"
"""
TEST_ROWS = (
    '{"input": "My password is wrong.", "output": "login"}\n{"input": "Pay me.", "output": "refund"}\n'
)
# What a length, a count, an id or an offset may wrongly be.
NUMBERS = (0, 1, 2, 7, 2**8, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
# What a JSON value may wrongly be.
VALUES = (
    *(None, True, 0, -1, 7, 10**30, 0.5, -1e300, "", "a", "login", "\x1b[31m\u202e", "x" * 5000, "../../etc"),
    *([], [1], [[]], ["a", None], {}, {"a": 1}, {"id": 0}, [{"refund": "a"}], "null", "\u2028"),
)
# What a text file may wrongly hold.
PIECES = (
    *(
        "null",
        "true",
        "-1",
        "1e999",
        "NaN",
        '""',
        '"\\ud800"',
        "[]",
        "{}",
        "[" * 2000,
        "9" * 5000,
        "0.5",
        '"x"',
    ),
    *(
        "\x00",
        "\x1b[31m",
        "\u202e",
        "\u2028",
        "é",
        '"',
        "'''",
        "\n",
        ",",
        ":",
        "=",
        "]",
        "}",
        "#",
        "\ufeff",
        "\xff",
    ),
    *(
        '"id": "a"',
        '"drop": 3',
        '"input": null',
        '"output": [1]',
        "n_inputs = 0",
        "rank = true",
        "[[examples]]",
        "[x]",
    ),
)


class Tally:
    """What became of the files of one kind."""

    def __init__(self, kind: str, keep: Path | None) -> None:
        self.kind, self.keep = kind, keep
        self.counts: Counter[str] = Counter()
        self.worst_seconds = 0.0
        self.failures: list[str] = []

    def took(self, started: float) -> float:
        """Seconds since then, kept where they are the most so far."""
        seconds = time.perf_counter() - started
        self.worst_seconds = max(self.worst_seconds, seconds)
        return seconds

    def fail(self, what: str, files: Sequence[Path]) -> None:
        """Something did not end as it should."""
        self.counts["failed"] += 1
        self.failures.append(what)
        if self.keep:
            place = self.keep / f"{self.kind}-{len(self.failures)}"
            place.mkdir(parents=True, exist_ok=True)
            (place / "what.txt").write_text(what, errors="backslashreplace")
            for file in files:
                shutil.copy(file, place / file.name)

    def print(self, more: str = "") -> None:
        """The line of the table, and the first failures."""
        counts = ", ".join(
            f"{count:,} {name}" for name, count in sorted(self.counts.items()) if name != "failed"
        )
        tried = sum(self.counts.values())
        print(
            f"{self.kind:8} {tried:6,} tried: {counts}, {self.counts['failed']} failed; "
            f"worst {self.worst_seconds:.3f} s{more}",
            flush=True,
        )
        for failure in self.failures[:SHOWN_FAILURES]:
            for line in failure.splitlines()[-SHOWN_LINES:]:
                print(f"  {line}")


def main() -> None:
    """Tries all three kinds, and prints what became of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--headers", type=int, default=50_000)
    parser.add_argument("--loads", type=int, default=500)
    parser.add_argument("--texts", type=int, default=25_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="keep the files that failed here")
    arguments = parser.parse_args()
    tallies = []
    with tempfile.TemporaryDirectory() as directory:
        os.environ["SG_LOCAL_HOME"] = str(Path(directory) / "home")
        for kind, try_files in (("headers", try_headers), ("loads", try_loads), ("texts", try_texts)):
            place = Path(directory) / kind
            place.mkdir()
            tally = Tally(kind, arguments.keep)
            tallies.append(tally)
            dice = random.Random(f"{arguments.seed} {kind}")
            try_files(tally, place, dice, getattr(arguments, kind))
    if any(tally.failures for tally in tallies):
        sys.exit(1)


# GGUF headers


def try_headers(tally: Tally, place: Path, dice: random.Random, n_files: int) -> None:
    """Mutated headers, read here."""
    more = {"a.nested": nested_array(4), "a.many": [1] * 64, "a.texts": ["a", "bc"] * 16}
    valid = [*_valid_models(place), tiny_gguf(MODEL, TENSORS), tiny_gguf({**MODEL, **more}, TENSORS)]
    path = place / "mutated.gguf"
    for data in valid:
        path.write_bytes(data)
        read_model_header(path)  # which accepts it: the mutations are what is refused
    before = _peak_mib()
    for _ in range(n_files):
        path.write_bytes(_with_mutated_header(dice.choice(valid), dice))
        started = time.perf_counter()
        try:
            read_model_header(path)
            outcome = "accepted"
        except InputError:
            outcome = "refused"
        except BaseException:
            outcome = ""
            tally.fail(traceback.format_exc(), [path])
        if tally.took(started) > MAX_HEADER_SECONDS:
            tally.fail(f"took {tally.worst_seconds:.1f} s", [path])
        elif outcome:
            tally.counts[outcome] += 1
    tally.print(f", memory +{_peak_mib() - before} MiB")


def _valid_models(place: Path) -> list[bytes]:
    path = place / "valid.gguf"
    models = [write_tiny_llama(path).read_bytes()]
    for architecture in ("qwen2", "gemma3", "phi3"):
        write_tiny_model(path, architecture)
        models.append(path.read_bytes())
    return models


def _with_mutated_header(data: bytes, dice: random.Random) -> bytes:
    end = data.rindex(b".weight") + 60
    return mutated(data[:end], dice) + (data[end:] if dice.random() < 0.95 else b"")


def mutated(data: bytes, dice: random.Random) -> bytes:
    """The bytes with a few mutations: bits, numbers in place of others, cuts, copies, insertions."""
    mutant = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        place = dice.randrange(len(mutant)) if mutant else 0
        if dice.random() < 0.5:
            place = min(place, dice.randrange(400))  # the beginning, where the counts and the first keys are
        match dice.randrange(6):
            case 0:
                mutant[place : place + 1] = bytes([dice.randrange(256)])
            case 1 if mutant:
                mutant[min(place, len(mutant) - 1)] ^= 1 << dice.randrange(8)
            case 2:
                number = struct.pack("<Q", dice.choice(NUMBERS))[: dice.choice((1, 2, 4, 8))]
                mutant[place : place + len(number)] = number
            case 3:
                del mutant[place:]
            case 4:
                start = dice.randrange(len(mutant) + 1)
                mutant[place:place] = mutant[start : start + dice.randrange(64)]
            case _:
                del mutant[place : place + dice.randrange(1, 16)]
    return bytes(mutant)


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# Files that reach llama.cpp


def try_loads(tally: Tally, place: Path, dice: random.Random, n_files: int) -> None:
    """Files that pass the header's check, through `sg-local predict`."""
    (place / "task.toml").write_text(TASK.replace('test = "inbox.test.jsonl"\n', ""))
    (place / "inputs.txt").write_text("one a\ntwo b\n")
    files = ["--task", str(place / "task.toml"), str(place / "inputs.txt")]
    for _ in range(n_files):
        faulty = _passing_files(place, dice)
        given = [str(part) for option in faulty.items() for part in option]
        started = time.perf_counter()
        options = [
            "--prompt-format=vicuna",
            "--n-ctx=512",
            "--n-parallel=2",
            "--max-new-tokens=4",
            "--n-threads=1",
        ]
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "sg_local", "predict", *given, *options, *files],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=MAX_LOAD_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            tally.fail(f"took more than {MAX_LOAD_SECONDS} s", [*faulty.values()])
            continue
        tally.took(started)
        outcome = _outcome_of_predict(done)
        if outcome:
            tally.counts[outcome] += 1
        else:
            tally.fail(
                f"exit code {done.returncode}: {done.stdout[-200:]}{done.stderr[-2000:]}", [*faulty.values()]
            )
    tally.print()


def _outcome_of_predict(done: "subprocess.CompletedProcess[str]") -> str:
    """What became of a file in words; "" where that is none of what may become of it."""
    told = [line for line in done.stderr.splitlines() if not re.match(r"llama\.cpp: on |predict: \d+", line)]
    if done.returncode == 0:
        return "" if told else "answered"
    if done.returncode not in (1, 2) or len(told) != 1 or not told[0].startswith("Error: "):
        return ""
    death = re.search(r"was ended by (SIG\w+)", told[0])
    return f"ended llama.cpp by {death[1]}" if death else "refused"


def _passing_files(place: Path, dice: random.Random) -> dict[str, Path]:
    """A model with a fault that the header's check cannot see, or a sound one and such an adapter, by their options."""
    model, adapter = place / "model.gguf", place / "adapter.gguf"
    is_of_adapter = dice.random() < 0.2
    while True:
        if is_of_adapter:
            write_tiny_llama(model)
            _write_faulty_adapter(adapter, dice)
        else:
            _write_faulty(model, dice)
        with contextlib.suppress(SgLocalError):
            require_supported(read_model_header(model))
            if not is_of_adapter:
                return {"--model": model}
            if read_header(adapter).kind == "adapter":
                return {"--model": model, "--adapter": adapter}


def _write_faulty_adapter(path: Path, dice: random.Random) -> None:
    def size(right: int) -> int:
        return right if dice.random() < 0.93 else dice.choice((1, 4, 32, 64, 128, 4096))

    tensors = []
    for name, rows in (("attn_q", 64), ("ffn_up", 96), (dice.choice(("attn_v", "attn_v", "nothing")), 32)):
        more = () if dice.random() < 0.93 else (2,)
        kind = 0 if dice.random() < 0.9 else dice.choice((1, 8))
        tensors.append(TinyTensor(f"blk.0.{name}.weight.lora_a", (size(64), size(4), *more), kind))
        if dice.random() < 0.95:
            tensors.append(TinyTensor(f"blk.0.{name}.weight.lora_b", (size(4), size(rows)), 0))
    metadata = {
        "general.architecture": "llama" if dice.random() < 0.9 else dice.choice(("qwen2", "x")),
        "general.type": "adapter",
        "adapter.type": "lora" if dice.random() < 0.95 else "x",
        "adapter.lora.alpha": dice.choice((4.0, 0.0, float("nan"), 1e38)),
    }
    data = tiny_gguf(
        metadata, [tensor for tensor in tensors if tensor.shape[0] % 32 == 0 or tensor.tensor_type != 8]
    )
    path.write_bytes(data if dice.random() < 0.7 else mutated(data, dice))


def _write_faulty(path: Path, dice: random.Random) -> None:
    def number() -> int:
        return dice.choice((0, 1, 2, 3, 7, 63, 65, 255, 4096, 2**20, 2**31 - 1, 2**32 - 1))

    match dice.randrange(4):
        case 0:  # a vocabulary that does not fit its kind
            tokens = [dice.choice((token, token, token, "", token * 2, "<0xZZ>")) for token in TOKENS]
            vocabulary = {
                "tokenizer.ggml.model": dice.choice(("llama", "gpt2", "bert", "t5", "rwkv", "none", "x")),
                "tokenizer.ggml.tokens": tokens[: dice.choice((1, 3, 300, len(tokens)))]
                if dice.random() < 0.5
                else TOKENS,
                "tokenizer.ggml.merges": ["a b", "a", " ", "th e"][: dice.randrange(1, 5)],
                "tokenizer.ggml.pre": dice.choice(("default", "llama-bpe", "x", "")),
                "tokenizer.ggml.bos_token_id": number(),
                "tokenizer.ggml.unknown_token_id": number(),
            }
            names = dice.sample(sorted(vocabulary), dice.randrange(1, 4))
            write_tiny_llama(path, vocabulary={name: vocabulary[name] for name in names})
        case 1:  # sizes that do not fit the tensors
            sizes = (
                "block_count",
                "context_length",
                "embedding_length",
                "feed_forward_length",
                "attention.head_count",
            )
            sizes += ("attention.head_count_kv", "rope.dimension_count", "attention.key_length", "vocab_size")
            keys = {f"llama.{name}": number() for name in dice.sample(sizes, dice.randrange(1, 3))}
            write_tiny_llama(path, vocabulary=keys)
        case 2:  # another architecture, its own sizes wrong, or a tensor gone
            architecture = dice.choice(("qwen2", "qwen3", "gemma3", "phi3"))
            size = dice.choice(
                ("block_count", "attention.sliding_window", "attention.key_length", "rope.dimension_count")
            )
            without = dice.choice(
                ("", "", "output_norm.weight", "blk.1.ffn_down.weight", "token_embd.weight")
            )
            write_tiny_model(path, architecture, {size: number()}, without=without)
        case _:  # any bits
            write_tiny_llama(path)
            path.write_bytes(_with_mutated_header(path.read_bytes(), dice))


# Texts


def try_texts(tally: Tally, place: Path, dice: random.Random, n_files: int) -> None:
    """Damaged task files, rows, manifests, settings and adapter configurations, through what reads them."""
    readers = _readers_of_texts(place)
    with _in_this_process(), contextlib.chdir(place), open(os.devnull, "w") as nowhere:
        with contextlib.redirect_stderr(nowhere):
            for path, read in readers:
                assert read(), f"{path.name} is refused as it is"
        before = _peak_mib()
        right = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for _ in range(n_files):
            path, read = dice.choice(readers)
            path.write_bytes(mutated_text(right[path], dice))
            started = time.perf_counter()
            try:
                with contextlib.redirect_stderr(nowhere):
                    accepted = read()
                tally.counts["accepted" if accepted else "refused"] += 1
            except BaseException:
                tally.fail(f"{path.name}: {traceback.format_exc()}", [path])
            tally.took(started)
            _restore(place, right)
    tally.print(f", memory +{_peak_mib() - before} MiB")
    kinds = Counter(failure.strip().splitlines()[-1] for failure in tally.failures)
    for kind, count in kinds.most_common(20):
        print(f"  {count:5,} {kind[:150]}")


def _restore(place: Path, right: dict[Path, bytes]) -> None:
    """Makes every file what it was: what is read may be written too."""
    for path in place.rglob("*"):
        if path.is_file() and path not in right:
            path.unlink()
    for path, data in right.items():
        if not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def _readers_of_texts(place: Path) -> list[tuple[Path, Callable[[], bool]]]:
    """Each file, and what reads it: True where it takes the file, False where it refuses it in words."""
    (place / "inbox.toml").write_text(TASK)
    (place / "inbox.test.jsonl").write_text(TEST_ROWS)
    (place / "tiny.gguf").write_bytes(tiny_gguf(MODEL, TENSORS))
    run, _ = create_or_open_run(
        place / "run", load_task(str(place / "inbox.toml")), place / "tiny.gguf", Settings(n_inputs=7)
    )
    finish_run(run)
    curated, _ = create_or_open_run(
        place / "curated", load_task(str(place / "inbox.toml")), place / "tiny.gguf", Settings(n_inputs=7)
    )
    texts = (
        "Pay me back, please.",
        "My password is wrong again.",
        "The bill is too high.",
        "I cannot log in.",
    )
    scores = [{"refund": -0.1, "login": -2.5}, {"refund": -3.0, "login": -0.2}]
    rows = [{"id": number, "input": text, "label": "login"} for number, text in enumerate(texts)]
    write_inputs(curated, rows)
    write_outputs(curated, [{"id": row["id"], "label_logprobs": scores, "output": "login"} for row in rows])
    base = write_model(place / "base.gguf")
    adapter = place / "adapter"
    write_peft(adapter)

    def command(*arguments: str) -> Callable[[], bool]:
        def call() -> bool:
            result = CliRunner().invoke(cli, arguments)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            assert result.exit_code in (0, 1, 2, 3), result.exit_code
            assert "Traceback" not in result.output, result.output
            assert result.exit_code == 0 or "Error: " in result.stderr, result.output
            return result.exit_code == 0

        return call

    def export() -> bool:
        try:
            write_adapter_gguf(adapter, base, place / "out.gguf", {})
        except SgLocalError:
            return False
        return True

    explain, table = command("explain", str(run.path), "0"), command("evaluate", str(run.path))
    curate = command("curate", str(curated.path), "--redo")
    check = command("task", "check", str(place / "inbox.toml"))
    verify = command("verify", str(run.path), "--no-parity")

    def curate_recorded() -> bool:
        """The same, where the manifest says that the stages before wrote the file like this."""
        damaged = {name: curated.file(name).read_bytes() for name in ("inputs.jsonl", "outputs.jsonl")}
        for stage, name in zip(("generate", "annotate"), damaged, strict=True):
            with curated.stage(stage):
                curated.file(name).write_bytes(damaged[name])
        return curate()

    return [
        (place / "inbox.toml", check),
        (place / "inbox.test.jsonl", check),
        *(
            (run.file(name), explain)
            for name in ("inputs.jsonl", "outputs.jsonl", "train.jsonl", "manifest.json")
        ),
        *((run.file(name), explain) for name in ("settings.toml", "task.toml")),
        *(
            (run.file(name), table)
            for name in ("evaluation.json", "manifest.json", "settings.toml", "test.jsonl")
        ),
        *(
            (curated.file(name), curate)
            for name in ("inputs.jsonl", "outputs.jsonl", "manifest.json", "task.toml")
        ),
        *((curated.file(name), curate_recorded) for name in ("inputs.jsonl", "outputs.jsonl", "task.toml")),
        (run.file("manifest.json"), verify),
        (adapter / "adapter_config.json", export),
    ]


@contextlib.contextmanager
def _in_this_process() -> Iterator[None]:
    """No child process, which would take a second each, and no model: what reads texts comes before or after it."""

    def call_here(_work: str, function: str, **arguments: Any) -> Iterator[Any]:
        yield from child_process.call(function, arguments)

    with (
        mock.patch.object(child_process, "values_from_child", call_here),
        mock.patch.object(llama_cpp, "llama_model_load_from_file", return_value=None),
    ):
        yield


def mutated_text(data: bytes, dice: random.Random) -> bytes:
    """The text with a few mutations. Most of them leave its syntax whole: those come furthest."""
    text = data.decode()
    if text.startswith("{") and dice.random() < 0.7:
        return _mutated_json(text, dice).encode("utf-8", "surrogatepass")
    for _ in range(dice.choice((1, 1, 2, 4))):
        values = [*re.finditer(r'"(?:[^"\\]|\\.)*"|-?\d+\.?\d*|true|false|null|\[\]|\{\}', text)]
        place = dice.randrange(len(text) + 1)
        match dice.randrange(6):
            case 0 | 1 | 2 if values:  # another value in place of one
                value = dice.choice(values)
                text = text[: value.start()] + dice.choice(PIECES) + text[value.end() :]
            case 3:
                text = text[:place] + dice.choice(PIECES) + text[place:]
            case 4:
                text = text[:place] + text[place + dice.randrange(1, 40) :]
            case _:
                lines = text.splitlines(keepends=True)
                if lines:
                    del lines[dice.randrange(len(lines))]
                text = "".join(lines)
    mutant = text.encode("utf-8", "surrogatepass")
    if dice.random() < 0.1:
        return mutated(mutant, dice)
    return mutant


def _mutated_json(text: str, dice: random.Random) -> str:
    """Right JSON of another form: a value replaced, taken away or added, in one value or in one of many lines."""
    try:
        values = [json.loads(text)]
    except ValueError:
        values = [json.loads(line) for line in text.splitlines()]
    for _ in range(dice.choice((1, 1, 2))):
        places = [*_places(dice.choice(values))]
        if not places:
            continue
        holder, key = dice.choice(places)
        match dice.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[dice.choice(("id", "drop", "", "x" * 300, "\x1b[31m"))] = holder[key]
            case 1:
                holder.append(holder[key])
            case _:
                holder[key] = copy.deepcopy(dice.choice(VALUES))
    return "\n".join(json.dumps(value) for value in values) + "\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


if __name__ == "__main__":
    main()
