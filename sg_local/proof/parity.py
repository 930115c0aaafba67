"""The proof of an export: llama.cpp with the exported files against torch with the trained adapter.

    {"max_logit_difference": 0.052, "adapter_effect": 24.8,                     adapter.gguf on the 16-bit base
     "mean_kl_nats": 0.074, "base_mean_kl_nats": 3.1, "merged_type": "Q4_1",    model.gguf
     "n_near_choices": 48, "n_near_equal": 47, "near_expected_share": 0.974}    the same, near the decision (near.py)

The adapter is compared on the 16-bit copy of the base, where both sides hold the same numbers: what differs is
rounding, and a wrong scale, a missing layer or an unpermuted matrix stands out. The merged file is compared as it
is served; its quantization is part of the difference, so its bounds depend on its type.
"""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

from sg_local.errors import SgLocalError
from sg_local.gguf_header import read_header
from sg_local.llama.asking import open_with
from sg_local.llama.library import load_model
from sg_local.llama.logits import Logits, log_softmax
from sg_local.llama.sequences import sequences_logits
from sg_local.llama.tokens import Tokenizer
from sg_local.proof.near import LEAST_KEPT_SHARE, N_TOKENS, Kept, kept_choices, rows_near_decision
from sg_local.proof.working_copies import f16_gguf, place_of
from sg_local.runs.directory import BaseModel, Run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.runs.rows import read_pairs
from sg_local.selfguide.prompts import answer_messages
from sg_local.selfguide.rows import is_kept
from sg_local.settings import Settings

N_PROMPTS = 16
LEAST_N_CTX = 512  # a batch of llama.cpp
ExportAs: TypeAlias = Callable[[str], str]  # "Q8_0" -> "sg-local export runs/inbox --quant Q8_0"
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
MAX_LOGIT_DIFFERENCE = 0.1  # of adapter.gguf on the 16-bit base
# The same as a share of what the adapter does, for one that does little. Measured on a tiny llama of two layers, with
# adapters that move the logits by 0.11 to 8.7: right files differ by 0.002 to 0.094 of that (0.01 logits of rounding,
# whatever the adapter does), files without one matrix of one layer by 0.157 and more, without a layer by 0.31 and more.
MAX_SHARE_OF_EFFECT = 0.1

# Mean KL divergence in nats from torch, by the coarsest type among the merged matrices. A quantized file differs
# from torch even without an adapter (llama.cpp also quantizes activations); a wrong merge lies far above these.
MAX_MEAN_KL_NATS = {"F32": 0.005, "F16": 0.005, "BF16": 0.01, "Q8_0": 0.05, "Q6_K": 0.05, "Q5_K": 0.1}
MAX_MEAN_KL_NATS_COARSER = 0.25
FINER_QUANTS = (
    "Q8_0",
    "F16",
)  # that are tried, in this order, where a file's type cannot hold what was trained
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
    base_logit_difference: float | None = None  # without the adapter; measured where with it too much differs
    # Of the rows near the decision; None where there are too few.
    n_near_choices: int | None = None
    n_near_equal: int | None = None
    near_expected_share: float | None = None  # of the trained model's choices
    near_mean_kl_nats: float | None = None
    near_adapter_share: float | None = (
        None  # of base + adapter.gguf; measured where model.gguf keeps too little
    )

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
        elif not self.max_logit_difference <= MAX_SHARE_OF_EFFECT * self.adapter_effect:
            found.append(
                f"adapter.gguf in llama.cpp differs from the trained adapter in torch by "
                f"{self.max_logit_difference:.3f} logits, where the adapter moves them by {self.adapter_effect:.3f} in "
                f"all; the bound is {MAX_SHARE_OF_EFFECT} of that"
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
                f"nearer than the untuned base ({self.base_mean_kl_nats:.3f})"
            )
        return found

    @property
    def adapter_differs(self) -> bool:
        """Whether adapter.gguf is not the trained adapter, as far as it does enough to be compared."""
        effect = self.adapter_effect if self.adapter_effect > MAX_LOGIT_DIFFERENCE else math.inf
        return bool(replace(self, adapter_effect=effect, mean_kl_nats=0.0).faults())

    @property
    def does_nothing(self) -> bool:
        """Whether adapter.gguf does too little to be compared: what differs there differs without it."""
        is_rounding = self.max_logit_difference <= MAX_LOGIT_DIFFERENCE and self._base_differs_too
        return (is_rounding or not self.adapter_differs) and bool(replace(self, mean_kl_nats=0.0).faults())

    @property
    def is_another_model(self) -> bool:
        """Whether llama.cpp and torch differ as much without the adapter as with it, and by more than rounding."""
        return not self.max_logit_difference <= MAX_LOGIT_DIFFERENCE and self._base_differs_too

    @property
    def _base_differs_too(self) -> bool:
        difference = self.base_logit_difference
        return difference is not None and not 2 * difference < self.max_logit_difference

    @property
    def only_merge_differs(self) -> bool:
        """Whether the one fault is that the merged file is too far from the trained model."""
        is_number = math.isfinite(self.mean_kl_nats)
        return is_number and bool(self.faults()) and not replace(self, mean_kl_nats=0.0).faults()

    @property
    def keeps_choices(self) -> bool:
        """Whether the merged file keeps enough of the trained model's choices near the decision, or nothing is known.

        Enough is LEAST_KEPT_SHARE, or what base + adapter.gguf keeps.
        """
        if self.near_expected_share is None:
            return True
        reachable = 1.0 if self.near_adapter_share is None else self.near_adapter_share
        return self.near_expected_share >= min(LEAST_KEPT_SHARE, reachable)

    @property
    def finer_quants(self) -> tuple[str, ...]:
        """What may hold what the merged file's type cannot."""
        match self.merged_type:
            case "F32" | "F16":
                return ()
            case "BF16" | "Q8_0":
                return ("F16",)
            case _:
                return FINER_QUANTS

    def in_words(self) -> str:
        """The numbers on one line."""
        return (
            f"adapter within {self.max_logit_difference:.3f} logits of torch (it moves them by "
            f"{self.adapter_effect:.1f}); model.gguf ({self.merged_type}): mean KL {self.mean_kl_nats:.4f} nats, "
            f"the base {self.base_mean_kl_nats:.1f}; same first choice at {self.argmax_equal_share:.1%} of "
            f"{self.n_positions} positions" + (f"; {near}" if (near := self.near_in_words()) else "")
        )

    def near_in_words(self) -> str:
        """What is kept near the decision; "" where too few rows are there."""
        if self.near_expected_share is None:
            return ""
        words = (
            f"near the decision {self.n_near_equal} of {self.n_near_choices} choices are kept, by the noise on all of "
            f"them {self.near_expected_share:.1%}"
        )
        if self.near_adapter_share is not None:
            words += f" (base + adapter.gguf: {self.near_adapter_share:.1%})"
        return words

    def advice(self, export_as: ExportAs) -> str | None:
        """What to do where model.gguf is within its bounds, but lost something of what was trained."""
        if self.mean_kl_nats <= NEAR_NATS:
            return None
        return (
            f"model.gguf is {self.mean_kl_nats:.3f} nats from the trained model, since {self.merged_type} is coarse "
            f"for a small change; base + adapter.gguf is nearer, and so is what `{export_as('Q8_0')}` makes"
        )

    def as_dict(self) -> dict[str, object]:
        """For the manifest."""
        return {
            key: round(value, 5) if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if value is not None
        }


class Trained:
    """The trained model's choices and what adapter.gguf makes of them: computed once for all files that are compared.

    rows: what is compared with every file. near: rows near the decision. by_row: whether an answer there is one choice.
    """

    def __init__(
        self,
        base: BaseModel,
        settings: Settings,
        adapter_dir: Path,
        adapter_gguf: Path,
        rows: Sequence[TokensFrom],
        near: Sequence[TokensFrom] = (),
        *,
        by_row: bool = True,
    ):
        from sg_local.finetune.reference import reference_logits
        from sg_local.gguf_io.adapter import directory_for_peft, fields_for_peft
        from sg_local.gguf_io.base_weights import BaseWeights

        self._base, self._adapter_gguf = base, adapter_gguf
        self._rows, self._near, self._by_row = list(rows), list(near), by_row
        # No more key-value memory than a sequence or a batch needs.
        longest = max(len(tokens) for tokens, _ in [*rows, *near])
        self._settings = replace(settings, n_ctx=max(LEAST_N_CTX, longest))
        # On the CPU, as torch below: the 16-bit copy of a 7B model does not fit the card that serves it in 4 bits.
        on_cpu = replace(self._settings, n_gpu_layers=0)
        f16 = f16_gguf(base, settings.n_threads)
        untuned = _served(on_cpu, self._rows, f16)
        with_adapter = _served(on_cpu, self._rows, f16, adapter_gguf)
        weights = BaseWeights(base.path)
        with tempfile.TemporaryDirectory() as clean:
            peft_dir = directory_for_peft(adapter_dir, Path(clean))
            sequences = [*self._rows, *self._near]
            logits = reference_logits(weights, peft_dir, sequences, fields_for_peft(adapter_dir))
        self._logits, self._near_logits = logits[: len(rows)], logits[len(rows) :]
        self._alone = Parity(
            max_logit_difference=_max_difference(with_adapter, self._logits),
            adapter_effect=_max_difference(with_adapter, untuned),
            mean_kl_nats=0.0,
            base_mean_kl_nats=_mean_kl_nats(self._logits, untuned),
            argmax_equal_share=1.0,
            merged_type="",
            n_prompts=len(rows),
            n_positions=sum(map(len, self._logits)),
        )
        if self._alone.adapter_differs:
            in_torch = reference_logits(weights, None, self._rows)
            self._alone = replace(self._alone, base_logit_difference=_max_difference(untuned, in_torch))

    def compare(self, model_gguf: Path) -> Parity:
        """How near a merged file is to the trained model, at every position from a sequence's first one on."""
        import numpy as np

        served = _served(self._settings, [*self._rows, *self._near], model_gguf)
        merged, near = served[: len(self._rows)], served[len(self._rows) :]
        equal = [a.argmax(axis=-1) == b.argmax(axis=-1) for a, b in zip(merged, self._logits, strict=True)]
        parity = replace(
            self._alone,
            mean_kl_nats=_mean_kl_nats(self._logits, merged),
            argmax_equal_share=float(np.concatenate(equal).mean()),
            merged_type=_merged_type(model_gguf),
        )
        if near:
            kept = self._kept(near)
            parity = replace(
                parity,
                n_near_choices=kept.n_choices,
                n_near_equal=kept.n_equal,
                near_expected_share=kept.expected_share,
                near_mean_kl_nats=kept.mean_kl_nats,
            )
        if not parity.keeps_choices:
            parity = replace(parity, near_adapter_share=self._adapter_share)
        return parity

    @cached_property
    def _adapter_share(self) -> float:
        """What base + adapter.gguf keeps near the decision, as it is served."""
        served = _served(self._settings, self._near, self._base.path, self._adapter_gguf)
        return self._kept(served).expected_share

    def _kept(self, served: Sequence[Logits]) -> Kept:
        return kept_choices(self._near, self._near_logits, served, by_row=self._by_row)


def _served(
    settings: Settings, rows: Sequence[TokensFrom], model: Path, adapter: Path | None = None
) -> list[Logits]:
    with open_with(settings, model, adapter, n_parallel=1, is_repacked=False) as engine:
        return sequences_logits(engine, rows)


def _max_difference(logits: list[Logits], others: list[Logits]) -> float:
    import numpy as np

    return max(float(np.abs(a - b).max()) for a, b in zip(logits, others, strict=True))


def _mean_kl_nats(reference: list[Logits], served: list[Logits]) -> float:
    """Mean over all positions of KL(reference || served), in nats."""
    import numpy as np

    found = []
    for logits, other in zip(reference, served, strict=True):
        log_p, log_q = log_softmax(logits), log_softmax(other)
        found.append((np.exp(log_p) * (log_p - log_q)).sum(axis=-1))
    return float(np.concatenate(found).mean())


def require_parity(parity: Parity, base: BaseModel, export_as: ExportAs, finer: Mapping[str, Parity]) -> None:
    """Raises SgLocalError with the numbers where the exported files are not the trained model, why, and what to do.

    finer: what other types gave that were tried, where the merged file alone was at fault. export_as: the command that
    exports the adapter in a type.
    """
    if faults := parity.faults():
        reason = diagnosis(parity, base, export_as, finer)
        raise SgLocalError("; ".join(faults) + f". Nothing was exported; {reason}")


def diagnosis(parity: Parity, base: BaseModel, export_as: ExportAs, finer: Mapping[str, Parity]) -> str:
    """Why a proof failed, and what to do: the adapter, the type of the merged file, the base, or a defect here."""
    if parity.does_nothing:
        state = "does nothing" if parity.adapter_effect == 0 else "does next to nothing"
        return (
            f"the adapter {state}: it was hardly trained, or its matrices B are still zero. Train it with more rows, "
            "more epochs or a higher learning rate, and give what was saved after the training"
        )
    if parity.is_another_model:
        return (
            f"without the adapter llama.cpp and torch differ by {parity.base_logit_difference:.3f} logits already: "
            f"they do not compute the same model. Delete {place_of(base)}, the working copies of {base.path.name}, and "
            "call again; if the difference stays, this llama.cpp or this transformers computes the model otherwise: "
            "please report it with these numbers"
        )
    for quant, other in finer.items():
        if parity.only_merge_differs and not other.faults():
            return (
                f"the adapter is as it was trained, {parity.merged_type} is too coarse to hold it. {quant} passes "
                f"({other.mean_kl_nats:.4f} nats): `{export_as(quant)}`"
            )
    tried = "".join(f"; {quant}: {other.mean_kl_nats:.3f} nats" for quant, other in finer.items())
    return (
        "this is a defect of sg-local or of the llama.cpp in use, please report it with these numbers" + tried
    )


def trained_in_run(run: Run, adapter_gguf: Path) -> Trained:
    """The trained model on rows of the run, wherever a token of the answer is chosen."""
    with load_model(run.model.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        pairs = read_pairs(run)
        kept = [(row["input"], str(row["output"])) for row in pairs if is_kept(row)]
        rows = _sequences(run, tokenizer, kept[:: max(1, len(kept) // N_PROMPTS)][:N_PROMPTS])
        near = _sequences(run, tokenizer, rows_near_decision(pairs, run.settings.seed), N_TOKENS)
    return Trained(
        run.model,
        run.settings,
        run.file("adapter"),
        adapter_gguf,
        rows,
        near,
        by_row=run.task.is_classification,
    )


def trained_on_texts(base: BaseModel, settings: Settings, adapter_dir: Path, adapter_gguf: Path) -> Trained:
    """The same where nothing is known of the adapter's task: on plain texts, after their first tokens."""
    with load_model(base.path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        rows = [((*tokenizer.beginning, *tokenizer.encode_plain(text)), N_UNCOMPARED) for text in TEXTS]
    return Trained(base, settings, adapter_dir, adapter_gguf, rows)


def _sequences(
    run: Run, tokenizer: Tokenizer, rows: Sequence[tuple[str, str]], n_tokens: int | None = None
) -> list[TokensFrom]:
    """Prompt and answer of each row, from the prompt's last token on; of the answer n_tokens at most."""
    template = tokenizer.chat_template(template_source(run))
    found = []
    for text, output in rows:
        messages = answer_messages(run.task.instruction, text, demonstrations(run))
        prompt = tokenizer.encode_prompt(template, messages)
        answer = tokenizer.encode_answer(template, messages, output)[:n_tokens]
        found.append(((*prompt, *answer), len(prompt) - 1))
    return found


def _merged_type(path: Path) -> str:
    """The type with the fewest bytes a value among the matrices of the layers."""
    tensors = read_header(path).tensors
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2 and tensor.name.startswith("blk.")]
    return min(matrices, key=lambda tensor: tensor.size_bytes / (tensor.shape[0] * tensor.shape[1])).type_name
