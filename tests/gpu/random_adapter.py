"""A PEFT adapter with random values that fits a model: what an export is tried on.

write_random_adapter(Path("adapter"), Path("v2.gguf"))   -> adapter_config.json, adapter_model.safetensors
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

RANK = 16


def write_random_adapter(directory: Path, model: Path, *, scale: float = 0.002, seed: int = 1) -> None:
    """LoRA on all seven matrices of each layer; B is `scale` wide, so that logits move by a few units."""
    from sg_local.gguf_header import read_model_header

    header = read_model_header(model)

    def size(key: str) -> int:
        return int(str(header.metadata[f"llama.{key}"]))

    hidden, feed_forward = size("embedding_length"), size("feed_forward_length")
    shapes = {f"self_attn.{letter}_proj": (hidden, hidden) for letter in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (feed_forward, hidden) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, feed_forward)
    random = np.random.default_rng(seed)
    arrays = {}
    for layer in range(size("block_count")):
        for name, (rows, columns) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            a = random.uniform(-1, 1, (RANK, columns)) * (3 / columns) ** 0.5
            arrays[f"{key}.lora_A.weight"] = a.astype(np.float32)
            arrays[f"{key}.lora_B.weight"] = (random.normal(size=(rows, RANK)) * scale).astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(arrays, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.split(".")[1] for name in shapes],
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
