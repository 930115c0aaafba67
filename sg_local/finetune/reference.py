"""What torch says: logits of the trained model, as the reference that an exported file is compared with.

    reference_logits(weights_dir, adapter_dir, [((1, 9690, ...), 45)])  -> [array (n_tokens - 45, n_vocab)]

Plain transformers and PEFT in float32 on the CPU, without Unsloth: a second implementation reads the adapter back
from disk.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sg_local.finetune.process import go_offline


def reference_logits(
    weights_dir: Path, adapter_dir: Path | None, sequences: Sequence[tuple[tuple[int, ...], int]]
) -> list["np.ndarray[Any, np.dtype[np.float32]]"]:
    """Logits from a first position on, for each (token ids, first position); adapter_dir None is the base alone."""
    go_offline()
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(weights_dir), dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    if adapter_dir is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter_dir), local_files_only=True)
    model.eval()
    found = []
    with torch.no_grad():
        for tokens, first in sequences:
            # A view of all positions' logits would hold them: 0.5 GB a sequence with a vocabulary of 128,256.
            output = model(input_ids=torch.tensor([tokens]), logits_to_keep=len(tokens) - first)
            found.append(output.logits[0].float().numpy())
    return found
