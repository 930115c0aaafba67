"""A tokenizer for libraries that cannot do without one. No row is tokenized with it.

    write_stand_in_tokenizer(dir, Vocabulary(["<unk>", "<s>", ...], bos=1, eos=2, pad=2))

Rows are tokenized by llama.cpp. Unsloth and TRL only look up special tokens, so a word list with each token at its id
in the GGUF is enough.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens, each at its id, and the ids of special tokens; an id under 0: the model has no such token."""

    tokens: Sequence[str]
    bos: int
    eos: int
    pad: int


def write_stand_in_tokenizer(directory: Path, vocabulary: Vocabulary) -> None:
    """Writes tokenizer.json and tokenizer_config.json. Imports transformers, so Unsloth has to be imported before."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    ids: dict[str, int] = {}
    for index, token in enumerate(vocabulary.tokens):
        # If two ids have the same text, the second gets a suffix, or it would replace the first.
        ids[token if token not in ids else f"{token}\ue000{index}"] = index
    tokens_by_id = {index: token for token, index in ids.items()}
    # No row is padded with this token. But on GPUs Unsloth enlarges the vocabulary if there is no padding token, or if
    # it is EOS; so any other token is taken.
    special = (vocabulary.bos, vocabulary.eos)
    pad = vocabulary.pad
    if pad not in tokens_by_id or pad == vocabulary.eos:
        pad = next((index for index in tokens_by_id if index not in special), vocabulary.eos)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(ids, unk_token=tokens_by_id[vocabulary.eos])),
        bos_token=tokens_by_id.get(vocabulary.bos),
        eos_token=tokens_by_id[vocabulary.eos],
        unk_token=tokens_by_id[vocabulary.eos],
        pad_token=tokens_by_id[pad],
    )
    tokenizer.save_pretrained(str(directory))
