"""The proof of an export: llama.cpp with the exported files against torch with the trained adapter.

    {"max_logit_difference": 0.052, "adapter_effect": 24.8,                     adapter.gguf on the 16-bit base
     "mean_kl_nats": 0.074, "base_mean_kl_nats": 3.1, "merged_type": "Q4_1"}    model.gguf

The adapter is compared on the 16-bit copy of the base, where both sides hold the same numbers: what differs is
rounding, and a wrong scale, a missing layer or an unpermuted matrix stands out. The merged file is compared as it
is served; its quantization is part of the difference, so its bounds depend on its type.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeAlias

from sg_local.errors import SgLocalError
from sg_local.files import read_rows
from sg_local.gguf_header import read_header
from sg_local.llama.asking import open_with
from sg_local.llama.engine import Logits
from sg_local.llama.library import load_model
from sg_local.llama.scoring import log_softmax, sequence_logits
from sg_local.llama.tokens import Tokenizer
from sg_local.proof.working_copies import f16_gguf, torch_weights
from sg_local.runs.directory import BaseModel, Run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.selfguide.prompts import answer_messages
from sg_local.selfguide.rows import PairRow, is_kept
from sg_local.settings import Settings

N_PROMPTS = 16
TokensFrom: TypeAlias = tuple[tuple[int, ...], int]  # token ids, and the first position that is compared
# One of a text's first tokens takes the attention that goes nowhere else; its activations are hundreds of times as
# large, and float16 rounds them coarsely: SmolLM2 without any adapter differs by 0.27 logits there, by 0.05 elsewhere.
N_UNCOMPARED = 6
TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Question: How many legs do three spiders have?\nAnswer: Three spiders have 24 legs.",
    "Dear Ms. Ortega, thank you for your order. It left our warehouse on Tuesday and should be with you by Friday.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    '{"name": "lamp", "price": 39.5, "in_stock": true, "tags": ["home", "light"]}',
    "Ich habe gestern ein Buch gekauft, aber noch keine Zeit gefunden, es zu lesen.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface.",
    "Sentiment: the room was clean and the staff kind, but the breakfast was cold. -> mixed",
)
MAX_LOGIT_DIFFERENCE = 0.1  # hot adapter on the 16-bit base

# Mean KL divergence in nats from torch, by the coarsest type among the merged matrices. A quantized file differs
# from torch even without an adapter (llama.cpp also quantizes activations); a wrong merge lies far above these.
MAX_MEAN_KL_NATS = {"F32": 0.005, "F16": 0.005, "BF16": 0.01, "Q8_0": 0.05, "Q6_K": 0.05, "Q5_K": 0.1}
MAX_MEAN_KL_NATS_COARSER = 0.25
FINE_TYPES = ("F32", "F16", "BF16", "Q8_0")  # what rounds so little that it is no reason for a difference
NEAR_NATS = 0.05  # nearer than this to the trained model is near, also where the adapter itself does little


@dataclass(frozen=True)
class Parity:
    """The numbers of one comparison; see the module's first lines."""

    max_logit_difference: float
    adapter_effect: float
    mean_kl_nats: float
    base_mean_kl_nats: float
    argmax_equal_share: float
    merged_type: str
    n_prompts: int
    n_positions: int

    def faults(self) -> list[str]:
        """What is out of bounds, in words with both numbers."""
        bound = MAX_MEAN_KL_NATS.get(self.merged_type, MAX_MEAN_KL_NATS_COARSER)
        found = []
        if not self.max_logit_difference <= MAX_LOGIT_DIFFERENCE:
            found.append(
                f"adapter.gguf in llama.cpp differs from the trained adapter in torch by "
                f"{self.max_logit_difference:.3f} logits, the bound is {MAX_LOGIT_DIFFERENCE}"
            )
        if not self.adapter_effect > MAX_LOGIT_DIFFERENCE:
            found.append(
                f"adapter.gguf moves the logits by {self.adapter_effect:.3f} only, less than the comparison can see"
            )
        if not self.mean_kl_nats <= bound:
            found.append(
                f"model.gguf ({self.merged_type}) differs from the trained model in torch by "
                f"{self.mean_kl_nats:.3f} nats of mean KL divergence, the bound is {bound}"
            )
        # A merge that lost the adapter is as far from the trained model as the base is.
        if not self.mean_kl_nats <= max(NEAR_NATS, self.base_mean_kl_nats / 2):
            found.append(
                f"model.gguf ({self.merged_type}) is {self.mean_kl_nats:.3f} nats from the trained model, hardly "
                f"nearer than the untuned base ({self.base_mean_kl_nats:.3f}): serve base and adapter.gguf, or "
                "export with --quant Q8_0"
            )
        return found

    @property
    def is_too_coarse(self) -> bool:
        """Whether the one fault is that the merged file's type cannot hold what was trained."""
        is_rounding = math.isfinite(self.mean_kl_nats) and self.merged_type not in FINE_TYPES
        return is_rounding and bool(self.faults()) and not replace(self, mean_kl_nats=0.0).faults()

    def in_words(self) -> str:
        """The numbers on one line."""
        return (
            f"adapter within {self.max_logit_difference:.3f} logits of torch (it moves them by "
            f"{self.adapter_effect:.1f}); model.gguf ({self.merged_type}): mean KL {self.mean_kl_nats:.4f} nats, "
            f"the base {self.base_mean_kl_nats:.1f}; same first choice at {self.argmax_equal_share:.1%} of "
            f"{self.n_positions} positions"
        )

    @property
    def advice(self) -> str | None:
        """What to do where model.gguf is within its bounds, but lost something of what was trained."""
        if self.mean_kl_nats <= NEAR_NATS:
            return None
        return (
            f"model.gguf is {self.mean_kl_nats:.3f} nats from the trained model, since {self.merged_type} is coarse "
            "for a small change; base + adapter.gguf is nearer, and so is --quant Q8_0 in a new run"
        )

    def as_dict(self) -> dict[str, object]:
        """For the manifest."""
        return {
            key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(self).items()
        }


def measure(
    base: BaseModel,
    settings: Settings,
    adapter_dir: Path,
    adapter_gguf: Path,
    model_gguf: Path,
    sequences: Sequence[TokensFrom],
) -> Parity:
    """Compares both exported files with torch at every position from a sequence's first one on."""
    import numpy as np

    from sg_local.finetune.reference import reference_logits

    f16 = f16_gguf(base, settings.n_threads)
    # On the CPU, as torch below: the 16-bit copy of a 7B model does not fit the card that serves it in 4 bits.
    on_cpu = replace(settings, n_gpu_layers=0)

    def served(where: Settings, model_path: Path, adapter_path: Path | None = None) -> list[Logits]:
        with open_with(where, model_path, adapter_path, n_parallel=1) as engine:
            return [sequence_logits(engine, *sequence) for sequence in sequences]

    untuned, hot = served(on_cpu, f16), served(on_cpu, f16, adapter_gguf)
    merged = served(settings, model_gguf)
    trained = reference_logits(torch_weights(base), adapter_dir, sequences)

    equal = [a.argmax(axis=-1) == b.argmax(axis=-1) for a, b in zip(merged, trained, strict=True)]
    return Parity(
        max_logit_difference=max(float(np.abs(a - b).max()) for a, b in zip(hot, trained, strict=True)),
        adapter_effect=max(float(np.abs(a - b).max()) for a, b in zip(hot, untuned, strict=True)),
        mean_kl_nats=_mean_kl_nats(trained, merged),
        base_mean_kl_nats=_mean_kl_nats(trained, untuned),
        argmax_equal_share=float(np.concatenate(equal).mean()),
        merged_type=_merged_type(model_gguf),
        n_prompts=len(sequences),
        n_positions=sum(map(len, trained)),
    )


def _mean_kl_nats(reference: list[Logits], served: list[Logits]) -> float:
    """Mean over all positions of KL(reference || served), in nats."""
    import numpy as np

    found = []
    for logits, other in zip(reference, served, strict=True):
        log_p, log_q = log_softmax(logits), log_softmax(other)
        found.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
    return float(np.concatenate(found).mean())


def require_parity(parity: Parity, adapter: Path, base: Path) -> None:
    """Raises SgLocalError with the numbers where the exported files are not the trained model, and what to do."""
    if not (faults := parity.faults()):
        return
    if not parity.is_too_coarse:
        reason = (
            "this is a defect of sg-local or of the llama.cpp in use, please report it with these numbers"
        )
    else:
        command = shlex.join(
            ["sg-local", "export-adapter", "--adapter", str(adapter), "--model", str(base), "--quant", "Q8_0"]
        )
        reason = (
            f"the adapter is as it was trained, {parity.merged_type} is too coarse to hold it. `{command}` "
            "makes adapter.gguf and a finer model.gguf of it, with the same proof; a new run takes --quant Q8_0 too"
        )
    raise SgLocalError("; ".join(faults) + f". Nothing was exported; {reason}")


def measure_run(run: Run, adapter_gguf: Path, model_gguf: Path) -> Parity:
    """`measure` on rows of the run, wherever a token of the answer is chosen."""
    with load_model(run.model.path, vocab_only=True) as model:
        sequences = _sequences(run, Tokenizer(model))
    return measure(run.model, run.settings, run.file("adapter"), adapter_gguf, model_gguf, sequences)


def measure_on_texts(
    base: BaseModel, settings: Settings, adapter_dir: Path, adapter_gguf: Path, model_gguf: Path
) -> Parity:
    """`measure` where nothing is known of the adapter's task: on plain texts, after their first tokens."""
    with load_model(base.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        sequences = [((*tokenizer.beginning, *tokenizer.encode_plain(text)), N_UNCOMPARED) for text in TEXTS]
    return measure(base, settings, adapter_dir, adapter_gguf, model_gguf, sequences)


def _sequences(run: Run, tokenizer: Tokenizer) -> list[TokensFrom]:
    """Prompt and answer, from the prompt's last token on, of rows spread over the training rows."""
    template = tokenizer.chat_template(template_source(run))
    rows = [row for row in read_rows(run.file("train.jsonl"), PairRow) if is_kept(row)]
    found = []
    for row in rows[:: max(1, len(rows) // N_PROMPTS)][:N_PROMPTS]:
        messages = answer_messages(run.task.instruction, row["input"], demonstrations(run))
        prompt = tokenizer.encode_prompt(template, messages)
        answer = tokenizer.encode_answer(template, messages, row["output"])
        found.append(((*prompt, *answer), len(prompt) - 1))
    return found


def _merged_type(path: Path) -> str:
    """The type with the fewest bytes a value among the matrices of the layers."""
    matrices = [
        tensor for tensor in read_header(path).tensors if len(tensor.shape) == 2 and ".attn_" in tensor.name
    ]
    return min(matrices, key=lambda tensor: tensor.size_bytes / (tensor.shape[0] * tensor.shape[1])).type_name
