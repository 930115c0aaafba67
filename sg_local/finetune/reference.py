"""Logits of the trained model in torch, with which an exported file is compared.

    reference_logits(weights, adapter_dir, [((1, 9690, ...), 45)])  -> [array (n_tokens - 45, n_vocab)]

Transformers and PEFT compute them on the CPU, without Unsloth: a second implementation, which reads the adapter from
disk. The model is made without weights; those of a layer are read when it computes and forgotten after it. So a 7B
model needs about 2 GiB. They are rounded to 16 bits, as in the 16-bit GGUF, and computed with in float32.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sg_local.finetune.environment import go_offline
from sg_local.finetune.loss import head_logits

MAX_TOKENS_AT_ONCE = 4096  # in a batch; each layer is read once per batch


class Weights(Protocol):
    """Where the base's weights are: gguf_io.base_weights.BaseWeights."""

    config: dict[str, object]

    def read(self, names: Iterable[str]) -> Mapping[str, "np.ndarray[Any, Any]"]:
        """The values by their names in transformers' model."""


def reference_logits(
    weights: Weights,
    adapter_dir: Path | None,
    sequences: Sequence[tuple[tuple[int, ...], int]],
    lora_fields: Mapping[str, Any] | None = None,
) -> list["np.ndarray[Any, np.dtype[np.float32]]"]:
    """Logits of each (token ids, first position) from that position on; adapter_dir None: of the base.

    lora_fields: of peft.LoraConfig. With them adapter_config.json is not read, which may be a stranger's.
    """
    go_offline()
    import torch

    model = _model_without_weights(weights.config)
    _read_when_called(model, weights)
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
            rows = [row[first : len(tokens)] for row, (tokens, first) in zip(hidden, part, strict=True)]
            of_all = head_logits(causal, torch.cat(rows))
            logits += [values.numpy() for values in of_all.split([len(row) for row in rows])]
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


def _model_without_weights(config: dict[str, object]) -> Any:
    """Transformers' model with a single number in the place of each weight, and its buffers as they should be."""
    import torch
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    nothing = torch.zeros((), dtype=torch.float32)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.nn.Parameter(nothing.expand(parameter.shape), requires_grad=False)
            setattr(module, name, empty)
    model.tie_weights()
    return model


def _read_when_called(model: Any, weights: Weights) -> None:
    """Gives layers, embedding and output matrix their weights while they are called; the few others have them now."""
    import torch

    names = {parameter: name for name, parameter in model.named_parameters()}
    without: dict[Any, Any] = {}

    def read(parameters: Iterable[Any]) -> None:
        wanted = {names[parameter]: parameter for parameter in parameters if parameter in names}
        for name, values in weights.read(wanted).items():
            without[wanted[name]] = wanted[name].data
            wanted[name].data = torch.from_numpy(values).float()

    def forget(module: Any, *_: Any) -> None:
        for parameter in module.parameters():
            if parameter in without:
                parameter.data = without.pop(parameter)

    decoder = getattr(model, model.base_model_prefix)
    modules = (*decoder.layers, model.get_input_embeddings(), model.get_output_embeddings())
    for module in modules:
        module.register_forward_pre_hook(lambda module, *_: read(module.parameters()))
        module.register_forward_hook(forget)
    of_modules = {parameter for module in modules for parameter in module.parameters()}
    read(parameter for parameter in names if parameter not in of_modules)
