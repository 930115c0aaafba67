"""A tokenizer beside the dequantized weights, for libraries that insist on one.

    write_stand_in_tokenizer(dir, ["<unk>", "<s>", ...], bos=1, eos=2, pad=2)

Unsloth and TRL want to see the model's special tokens; no row is ever tokenized with it (that is llama.cpp's work),
so a plain word list with every vocabulary entry at its own id is enough, and the ids they read are the GGUF's own.
"""

from collections.abc import Sequence
from pathlib import Path


def write_stand_in_tokenizer(directory: Path, tokens: Sequence[str], *, bos: int, eos: int, pad: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json. Ids under 0 mean that the model has no such token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary: dict[str, int] = {}
    for index, token in enumerate(tokens):
        # Equal texts at two ids are told apart, or the later one would push out the earlier.
        vocabulary[token if token not in vocabulary else f"{token}\ue000{index}"] = index
    names = {index: token for token, index in vocabulary.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=names[eos])),
        bos_token=names.get(bos),
        eos_token=names[eos],
        unk_token=names[eos],
        pad_token=names.get(pad, names[eos]),
    )
    tokenizer.save_pretrained(str(directory))
