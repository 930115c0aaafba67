"""Does everything that needs a card, on random models, and prints a line for each check and a table at the end.

    PASS 7B: generate beside llama_decode   tokens_per_second 2310, wall_over_decode 1.06
    FAIL 7B: training in 24 GiB             error CUDA out of memory ...

Every check is of two things side by side in one run: the card and the processor, the product and llama_decode alone,
what was used and what `plan` says. Bounds are those of the project; none is of this script alone. Exit code 1 where a
check fails. The numbers are also written to acceptance.json, into $OUT where that is set.
"""

import argparse
import json
import lzma
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).parent))
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MIB = 2**20

NEEDED_THERE = (
    "trl",
    "peft",
    "datasets",
    "bitsandbytes",
    "unsloth",
    "scipy",
    "rich",
    "filelock",
    "absl",
    "rouge_score",
)
MAX_WALL_OVER_DECODE = 1.10
MIN_SHARE_OF_LLAMA_DECODE = 0.8
MIN_SHARE_OF_BACKEND = 0.97  # of generation with backend samplers, that with numpy
MAX_TIE_LOGITS = 0.2  # two tokens that are nearer than this may change places
MAX_BUILD_SECONDS = 420
MAX_MIB_LEFT = 64  # on the card when a process has ended
SMALL_CARD_GIB = 7.36  # what programs can have of a card of 8 GB with a screen


# batches, kind, GiB of the card, tokens of a row, of these shared, id of the padding token, the model, the trainer
Case: TypeAlias = tuple[str, str, float, int, int, int, Path, str]


class Results:
    """The checks so far."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def check(self, name: str, is_good: bool, **numbers: Any) -> None:
        self.rows.append({"name": name, "ok": bool(is_good), **numbers})
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in numbers.items()
        )
        print(f"{'PASS' if is_good else 'FAIL'} {name}   {text}", flush=True)


class Card:
    """The most that the card held while the body ran, above what it held before, in MiB."""

    def __enter__(self) -> "Card":
        self.before = self.peak = used_mib()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peak = max(self.peak, used_mib())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        time.sleep(0.5)
        self.left_mib = used_mib() - self.before
        self.mib = self.peak - self.before


def used_mib() -> int:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])
    except (OSError, subprocess.SubprocessError):
        return 0


def planned_training_mib(model: Path, kind: str, n_tokens: int, n_shared: int) -> int:
    """What `plan` says that the training takes of the card, without CUDA's own part, which torch does not count."""
    from sg_local.gguf_header import read_model_header
    from sg_local.plan.memory import estimate
    from sg_local.plan.sizes import TaskTokens, model_sizes
    from sg_local.settings import Settings

    tokens = TaskTokens(instruction=n_shared, demonstrations=0, input=n_tokens - n_shared - 2, answer=2)
    settings = Settings(load_in_4bit=kind == "4 bit", rank=16, batch_size=8)
    needs = estimate(model_sizes(read_model_header(model)), settings, tokens, on_gpu=True)
    parts = next(need.gpu for need in needs if need.step == "train")
    return round((sum(parts.values()) - parts["CUDA"]) / MIB)


def mapped_cuda_libraries() -> list[str]:
    """What llama.cpp and torch share in a process: of two builds with one name, the first to be loaded serves both."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    return sorted(path for path in paths if re.search(r"/lib(cudart|cublas|cublasLt|nvJitLink)\.so", path))


class Acceptance:
    """The parts; each is one of --only."""

    def __init__(self, work: Path, on_cpu: bool) -> None:
        from random_model import TINY, TWO_LAYERS, VICUNA_7B, write_random_llama

        self.work, self.on_cpu, self.results = work, on_cpu, Results()
        self.n_children = 0
        self.layers = "0" if on_cpu else "-1"
        self.small, self.large = work / "small.gguf", work / "large.gguf"
        started = time.time()
        for path, shape in (
            (self.small, TINY if on_cpu else TWO_LAYERS),
            (self.large, TINY if on_cpu else VICUNA_7B),
        ):
            if not path.exists():
                write_random_llama(path, shape)
        print(f"models ready after {time.time() - started:.0f} s", flush=True)

    def _child(self, name: str, *arguments: object, timeout: int = 180) -> dict[str, Any]:
        """A function of work.py; {"error": ...} where it failed."""
        started = time.time()
        # A fault of native code tells where in Python it was.
        command = [
            sys.executable,
            "-u",
            "-X",
            "faulthandler",
            str(HERE / "work.py"),
            name,
            *map(str, arguments),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"no end after {timeout} s"}
        self.n_children += 1
        (self.work / f"{self.n_children:02}-{name}.log").write_text(done.stderr + done.stdout)
        if done.returncode:
            return {"error": f"exit code {done.returncode}: " + " | ".join(done.stderr.splitlines()[-8:])}
        return {**json.loads(done.stdout.splitlines()[-1]), "seconds": round(time.time() - started, 1)}

    def _sg_local(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        environment = {**os.environ, "SG_LOCAL_HOME": str(self.work / "home"), "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, "-m", "sg_local", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=self.work, check=False
        )
        self.n_children += 1
        (self.work / f"{self.n_children:02}-sg-local-{arguments[0]}.log").write_text(
            done.stderr + done.stdout
        )
        return done

    def _planned_mib(self, step: str, gpu_gib: float, *flags: str) -> float:
        """What `plan` says that a step of the 7B takes of the card."""
        told = self._sg_local(
            "plan", "support-inbox", "--model", self.large, "--json", "--gpu-memory", gpu_gib, *flags
        )
        steps = json.loads(told.stdout)["steps"]
        return float(next(item["gpu_bytes"] for item in steps if item["step"] == step)) / MIB

    def wait_for_llama(self) -> None:
        """Until llama.cpp is built, where that is done meanwhile; what its build said, where it failed."""
        started, mark = time.time(), os.environ.pop("SG_LOCAL_LLAMA_ENDED", "")
        if not mark:
            return
        while not Path(mark).exists() and time.time() - started < MAX_BUILD_SECONDS:
            time.sleep(1)
        log = Path(mark).with_suffix(".log")
        place = find_spec("llama_cpp")
        assert place
        assert place.origin
        self.results.check(
            "llama.cpp is built",
            (Path(place.origin).parent / "lib/libllama.so").exists(),
            waited_seconds=round(time.time() - started),
            said=" | ".join(log.read_text(errors="replace").splitlines()[-3:])[-500:] if log.exists() else "",
        )

    def environment(self) -> None:
        """Which versions, and that llama.cpp and torch see the card."""
        import llama_cpp
        import torch

        missing = [name for name in NEEDED_THERE if find_spec(name) is None]
        offers = bool(llama_cpp.llama_supports_gpu_offload())
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        self.results.check(
            "llama.cpp and torch see the card",
            not missing and (self.on_cpu or (offers and torch.cuda.is_available())),
            missing=missing,
            card=card,
            torch=torch.__version__,
            llama_cpp=llama_cpp.__version__,
            cuda_libraries=mapped_cuda_libraries(),
            offers_gpu=offers,
        )

    def agreement(self) -> None:
        """With 16-bit weights the card gives the processor's label scores; greedy answers are the same but for ties.

        Quantized weights meet quantized activations, which llama.cpp rounds differently on a card: these distances are
        told, and bound what the 16-bit ones may be.
        """
        copy = self.work / "small-f16.gguf"
        places = {
            "exact": (copy, "0"),
            "processor": (self.small, "0"),
            "card_16_bit": (copy, self.layers),
            "card": (self.small, self.layers),
        }
        made = self._child("sixteen_bit_copy", self.small, copy)
        scored = {name: self._child("scores", *place) for name, place in places.items()}
        if faults := {name: one["error"] for name, one in scored.items() if "error" in one}:
            self.results.check("label scores on card and processor", False, **faults, copy=made)
        else:
            flat = {name: [s for row in one["scores"] for s in row] for name, one in scored.items()}
            exact = flat.pop("exact")
            rms = {
                f"{name}_rms_nats": (
                    sum((a - b) ** 2 for a, b in zip(other, exact, strict=True)) / len(exact)
                )
                ** 0.5
                for name, other in flat.items()
            }
            self.results.check(
                "label scores with 16-bit weights: card and processor",
                rms["card_16_bit_rms_nats"] <= rms["processor_rms_nats"],
                **rms,
                mean_score=sum(exact) / len(exact),
                seconds=[one["seconds"] for one in scored.values()],
            )
        off = self._child("answers", self.small, "0")
        for layers, where in (
            (self.layers, "card"),
            *([] if self.on_cpu else [("2", "a card with one layer of two")]),
        ):
            self._same_answers(where, self._child("answers", self.small, layers), off)

    def _same_answers(self, where: str, on: dict[str, Any], off: dict[str, Any]) -> None:
        if "error" in on or "error" in off:
            self.results.check(f"greedy answers on {where} and processor", False, card=on, processor=off)
            return
        parted = []
        for one, other, leads in zip(on["answers"], off["answers"], off["leads"], strict=True):
            place = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
            if place is not None:
                parted.append(leads[place])
        self.results.check(
            f"greedy answers on {where} and processor, but for ties",
            all(lead <= MAX_TIE_LOGITS for lead in parted),
            answers=len(on["answers"]),
            parted_by_logits=[round(lead, 3) for lead in parted],
        )

    def speed(self) -> None:
        """Generation, annotation, evaluation and scoring of a 7B beside llama_decode alone; memory beside plan."""
        with Card() as card:
            found = self._child("speed", self.large, 8 if self.on_cpu else 96, self.layers, 8192)
        if "error" in found:
            self.results.check("7B: 32 sequences", False, **found)
            return
        alone = found["llama_decode_tokens_per_second"]
        for name in ("generate", "annotate", "evaluate"):
            rate, ratio = found[f"{name}_tokens_per_second"], found[f"{name}_wall_over_decode"]
            self.results.check(
                f"7B: {name}: wall over decode",
                self.on_cpu or ratio <= MAX_WALL_OVER_DECODE,
                tokens_per_second=rate,
                llama_decode_alone=alone,
                wall_over_decode=ratio,
            )
        self.results.check(
            "7B: label scoring",
            found["scored_prompts_per_second"] > 0,
            prompts_per_second=found["scored_prompts_per_second"],
            wall_over_decode=found["score_wall_over_decode"],
        )
        self.results.check(
            "7B: generate as fast as llama_decode alone",
            self.on_cpu or found["generate_tokens_per_second"] >= MIN_SHARE_OF_LLAMA_DECODE * alone,
            share=found["generate_tokens_per_second"] / alone,
        )
        found = self._child("highest_logits", self.large, 8 if self.on_cpu else 96, self.layers, 8192)
        self.results.check(
            "7B: the highest logits are found where it is faster (open_engine's has_backend_top_k)",
            found.get("generate_backend_top_k") == 40
            and (
                self.on_cpu
                or found["generate_numpy_tokens_per_second"]
                >= MIN_SHARE_OF_BACKEND * found["generate_backend_tokens_per_second"]
            ),
            **found,
        )
        planned = self._planned_mib("generate", 24, "--n-ctx", "8192")
        self.results.check(
            "7B: generate within its plan, and the card as it was",
            self.on_cpu or (card.mib <= planned and card.left_mib <= MAX_MIB_LEFT),
            used_mib=card.mib,
            planned_mib=round(planned),
            left_mib=card.left_mib,
        )

    def small_card(self) -> None:
        """Generating with a 7B where another process holds all but 7.4 GiB of the card."""
        if self.on_cpu:
            return
        ballast = (
            "import torch, time, sys\n"
            "n = torch.cuda.mem_get_info()[0] - int(float(sys.argv[1]) * 2**30)\n"
            "x = torch.empty(n, dtype=torch.uint8, device='cuda')\n"
            "print('held', flush=True)\n"
            "time.sleep(600)\n"
        )
        command = [sys.executable, "-c", ballast, str(SMALL_CARD_GIB)]
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout
            holder.stdout.readline()
            # The largest context that `plan` lets into such a card.
            fitting = (
                (n_ctx, self._planned_mib("generate", SMALL_CARD_GIB, "--n-ctx", str(n_ctx)))
                for n_ctx in (8192, 6144, 4096, 2048, 1024)
            )
            n_ctx, planned = next(item for item in fitting if item[1] <= SMALL_CARD_GIB * 1024)
            with Card() as card:
                found = self._child("speed", self.large, 8, "-1", n_ctx)
            self.results.check(
                "7B: 32 sequences in a card of 8 GB",
                "error" not in found and card.mib <= planned,
                **{"n_ctx": n_ctx, "planned_mib": round(planned), "used_mib": card.mib, **found},
            )
        finally:
            holder.kill()
            holder.wait()

    def training(self) -> None:
        """Unsloth in 4 and in 16 bit, rows as a tree and padded, in cards of 24 and of 8 GB."""
        cases: list[Case] = [
            ("tree", "16 bit", 0, 64, 32, 2, self.small, "unsloth"),
            ("padded", "16 bit", 0, 64, 32, -1, self.small, "unsloth"),
            ("tree", "4 bit", 22, 520, 256, 0, self.large, "unsloth"),
            ("tree", "4 bit", SMALL_CARD_GIB, 128, 64, 2, self.large, "unsloth"),
        ]
        self._train(cases[:2] if self.on_cpu else cases)

    def other_training(self) -> None:
        """A card without bfloat16, and PEFT alone."""
        if not self.on_cpu:
            self._train(
                [
                    ("tree", "float16", 0, 64, 32, 0, self.small, "unsloth"),
                    ("tree", "4 bit", 0, 64, 32, 0, self.small, "peft"),
                ]
            )

    def _train(self, cases: "list[Case]") -> None:
        for batches, kind, gpu_gib, n_tokens, n_shared, pad, model, trainer in cases:
            weights = self.work / f"weights-{model.stem}"
            if not weights.exists():
                made = self._child("weights", model, weights)
                if "error" in made:
                    self.results.check(f"weights of {model.stem}", False, **made)
                    continue
            with Card() as card:
                place = self.work / f"train-{self.n_children}"
                found = self._child(
                    "train", place, weights, gpu_gib, batches, kind, n_tokens, n_shared, pad, trainer
                )
            planned = planned_training_mib(model, kind, n_tokens, n_shared)
            name = f"training {model.stem}, {trainer}, {kind}, {batches}, rows of {n_tokens}, pad {pad}" + (
                f", {gpu_gib} GiB" if gpu_gib else ""
            )
            if "error" in found:
                self.results.check(name, False, **found)
                continue
            rope = found.get("rope") or {}
            n_linear = found["n_linear_4bit"]
            is_good = (
                found["batches"] == batches
                and rope.get("rope_type", "default") == "default"
                and found["rope_difference"] < 1e-3  # of the module itself, whatever its configuration says
                and (n_linear > 0) == (kind == "4 bit")
                and (kind != "float16" or found["dtype"] == "torch.float16")
                and found["first_loss"] is not None
                and card.left_mib <= MAX_MIB_LEFT
                # Of a model of two layers most is what does not grow with it.
                and (model != self.large or found.get("peak_allocated_mib", 0) <= planned)
                and (self.on_cpu or found["n_checkpointing"] > 0)
            )
            self.results.check(
                name,
                is_good,
                **{
                    key: found[key]
                    for key in (
                        *(
                            "batches",
                            "padded_because",
                            "tree_check",
                            "rope",
                            "rope_difference",
                            "dtype",
                            "attention",
                            "forward",
                        ),
                        *("device", "n_linear_4bit", "first_loss", "last_loss", "step_seconds", "loaded_mib"),
                        *("n_checkpointing", "peak_mib", "peak_allocated_mib", "seconds"),
                    )
                    if key in found
                },
                planned_mib=planned,
                card_mib=card.mib,
                left_mib=card.left_mib,
            )

    def proof(self) -> None:
        """A random adapter on the small model: exported, merged, and compared with torch."""
        from random_adapter import write_random_adapter

        adapter = self.work / "adapter"
        write_random_adapter(adapter, self.small)
        with Card() as card:
            done = self._sg_local(
                "export-adapter", "--adapter", adapter, "--model", self.small, "--out", self.work / "exported"
            )
        said = " ".join(line for line in done.stderr.splitlines() if "logits" in line or "Error" in line)
        self.results.check("the export is proved", done.returncode == 0, said=said[-500:], card_mib=card.mib)

    def loop(self) -> None:
        """The whole loop on the real small model, with the settings of a card: made, trained, exported, scored."""
        parts = sorted((ROOT / "build/gpu").glob("smollm2.part*"))
        model = self.work / "smollm2.gguf"
        if len(parts) == 2 and not model.exists():
            model.write_bytes(lzma.decompress(b"".join(part.read_bytes() for part in parts)))
        if not model.exists() and not self.on_cpu:
            print(
                "     the loop needs both parts of SmolLM2 in build/gpu: bring them, and use --only loop",
                flush=True,
            )
            return
        source: object = model if model.exists() else "smollm2-135m"
        size = ["--preset", "quick", *(["--n-inputs", "24", "--epochs", "1"] if self.on_cpu else [])]
        started = time.time()
        with Card() as card:
            done = self._sg_local(
                "run", "support-inbox", "--model", source, *size, "--load-in-4bit", "--run", self.work / "run"
            )
        manifest_file = self.work / "run/manifest.json"
        stages = json.loads(manifest_file.read_text())["stages"] if manifest_file.exists() else {}
        training = stages.get("train", {}).get("training", {})
        scored = self.work / "run/evaluation.json"
        means = {}
        if scored.exists():
            contenders = json.loads(scored.read_text())["contenders"]
            means = {name: entry["exact_match"]["mean"] for name, entry in contenders.items()}
        self.results.check(
            "the whole loop",
            done.returncode == 0
            and training.get("batches") == "tree"
            and (self.on_cpu or training.get("device") != "cpu"),
            seconds={name: entry["seconds"] for name, entry in stages.items()},
            all_seconds=round(time.time() - started),
            training={key: value for key, value in training.items() if key != "loss"},
            exact_match=means,
            card_mib=card.mib,
            said="" if done.returncode == 0 else done.stderr[-800:],
        )


PARTS: dict[str, Callable[[Acceptance], None]] = {
    "training": Acceptance.training,  # first: it does without llama.cpp, which may still be built meanwhile
    "environment": Acceptance.environment,
    "agreement": Acceptance.agreement,
    "speed": Acceptance.speed,
    "proof": Acceptance.proof,
    "loop": Acceptance.loop,
    "small_card": Acceptance.small_card,
    "other_training": Acceptance.other_training,
}


WITHOUT_LLAMA_CPP = ("training", "other_training")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpu", action="store_true", help="tiny models, without a card")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/sg-local-gpu/work"), help="where models are made"
    )
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    acceptance = Acceptance(given.work, given.cpu)
    for name in given.only:
        started = time.time()
        try:
            if name not in WITHOUT_LLAMA_CPP:
                acceptance.wait_for_llama()
            PARTS[name](acceptance)
        except Exception as error:  # the other parts still run
            acceptance.results.check(name, False, error=f"{type(error).__name__}: {error}"[:500])
        print(f"     {name} took {time.time() - started:.0f} s", flush=True)
    rows = acceptance.results.rows
    place = Path(os.environ.get("OUT", given.work)) / "acceptance.json"
    place.write_text(json.dumps(rows, indent=1, default=str) + "\n")
    failed = [row["name"] for row in rows if not row["ok"]]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} checks passed"
        + "".join(f"\n  FAIL {name}" for name in failed)
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
