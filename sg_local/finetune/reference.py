"""Logits of the trained model in torch, with which an exported file is compared.

    reference_logits(weights_dir, adapter_dir, [((1, 9690, ...), 45)])  -> [array (n_tokens - 45, n_vocab)]

Transformers and PEFT compute them on the CPU, without Unsloth: a second implementation, which reads the adapter from
disk. Weights stay in 16 bits, as on disk; those of a layer are float32 only while it computes. So a 7B model needs
14 GB and not 28.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sg_local.finetune.environment import go_offline
from sg_local.finetune.loss import head_logits

MAX_TOKENS_AT_ONCE = 4096  # in a batch; each layer is converted to float32 once per batch


def reference_logits(
    weights_dir: Path,
    adapter_dir: Path | None,
    sequences: Sequence[tuple[tuple[int, ...], int]],
    lora_fields: Mapping[str, Any] | None = None,
) -> list["np.ndarray[Any, np.dtype[np.float32]]"]:
    """Logits of each (token ids, first position) from that position on; adapter_dir None: of the base.

    lora_fields: of peft.LoraConfig. With them adapter_config.json is not read, which may be a stranger's.
    """
    go_offline()
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(weights_dir), dtype=torch.float16, local_files_only=True, use_safetensors=True
    )
    _restore_float32(model, weights_dir)
    _compute_in_float32(model)
    causal = model
    if adapter_dir is not None:
        from peft import LoraConfig, PeftModel

        config = LoraConfig(**lora_fields) if lora_fields else None
        model = PeftModel.from_pretrained(model, str(adapter_dir), config=config, local_files_only=True)
    model.eval()
    decoder = getattr(causal, causal.base_model_prefix)
    logits = []
    with torch.no_grad():
        for part in _parts(sequences):
            longest = max(len(tokens) for tokens, _ in part)
            # Padded at the end, where no token of the row sees it.
            ids = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens, _ in part])
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            for row, (tokens, first) in zip(hidden, part, strict=True):
                logits.append(head_logits(causal, row[first : len(tokens)]).numpy())
    return logits


def _parts(
    sequences: Sequence[tuple[tuple[int, ...], int]],
) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """The sequences in their order, in parts of up to MAX_TOKENS_AT_ONCE tokens."""
    part: list[tuple[tuple[int, ...], int]] = []
    for sequence in sequences:
        longest = max(len(tokens) for tokens, _ in [*part, sequence])
        if part and longest * (len(part) + 1) > MAX_TOKENS_AT_ONCE:
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part


def _restore_float32(model: Any, weights_dir: Path) -> None:
    """Loads in float32 what the files hold in float32: norms, biases, and matrices that float16 cannot hold."""
    from safetensors import safe_open

    parameters = dict(model.named_parameters())
    for path in sorted(weights_dir.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if file.get_slice(name).get_dtype() == "F32":
                    parameters[name].data = file.get_tensor(name)


def _compute_in_float32(model: Any) -> None:
    """Makes layers, embedding and output matrix compute in float32: each is converted only while it is called."""
    narrow: dict[Any, Any] = {}

    def widen(module: Any, *_: Any) -> None:
        for parameter in module.parameters():
            narrow[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def restore(module: Any, *_: Any) -> None:
        for parameter in module.parameters():
            parameter.data = narrow.pop(parameter)

    decoder = getattr(model, model.base_model_prefix)
    for module in (*decoder.layers, model.get_input_embeddings(), model.get_output_embeddings()):
        module.register_forward_pre_hook(widen)
        module.register_forward_hook(restore)
