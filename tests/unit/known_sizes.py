"""The sizes of two models whose files are not here: what memory is told from.

SMOLLM2, 98 MB in Q4_1, and LLAMA_2_7B, 4.1 GB in Q4_K_M, which is what vicuna-7b-v1.5 is.
"""

from sg_local.plan.sizes import ModelSizes

SMOLLM2 = ModelSizes(
    architecture="llama",
    file_bytes=98_362_432,
    embedding_bytes=30_081_024,
    vocab=49_152,
    hidden=576,
    intermediate=1536,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    n_rotated=64,
    context_length=8192,
    is_tied=True,
    is_quantized=True,
)
LLAMA_2_7B = ModelSizes(
    architecture="llama",
    file_bytes=4_081_004_224,
    embedding_bytes=73_728_000,
    vocab=32_000,
    hidden=4096,
    intermediate=11_008,
    n_layers=32,
    n_heads=32,
    n_kv_heads=32,
    head_dim=128,
    n_rotated=128,
    context_length=4096,
    is_tied=False,
    is_quantized=True,
)
