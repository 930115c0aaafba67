"""A tokenizer beside the dequantized weights, for libraries that insist on one.

    write_stand_in_tokenizer(dir, Vocabulary(["<unk>", "<s>", ...], bos=1, eos=2, pad=2))

Unsloth and TRL want to see the model's special tokens; no row is ever tokenized with it (that is llama.cpp's work),
so a plain word list with every vocabulary entry at its own id is enough, and the ids they read are the GGUF's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens, each at its id, and its special ids; an id under 0 means that it has no such token."""

    tokens: Sequence[str]
    bos: int
    eos: int
    pad: int


def write_stand_in_tokenizer(directory: Path, vocabulary: Vocabulary) -> None:
    """Writes tokenizer.json and tokenizer_config.json. Imports transformers, so Unsloth comes before."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    ids: dict[str, int] = {}
    for index, token in enumerate(vocabulary.tokens):
        # Equal texts at two ids are told apart, or the later one would push out the earlier.
        ids[token if token not in ids else f"{token}\ue000{index}"] = index
    names = {index: token for token, index in ids.items()}
    # No row is padded with it, but on GPUs Unsloth enlarges the vocabulary where it finds no padding token, or EOS in
    # its place; so any other token has to do.
    special = (vocabulary.bos, vocabulary.eos)
    pad = vocabulary.pad
    if pad not in names or pad == vocabulary.eos:
        pad = next((index for index in names if index not in special), vocabulary.eos)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(ids, unk_token=names[vocabulary.eos])),
        bos_token=names.get(vocabulary.bos),
        eos_token=names[vocabulary.eos],
        unk_token=names[vocabulary.eos],
        pad_token=names[pad],
    )
    tokenizer.save_pretrained(str(directory))
