"""The only tokenizer: text to token ids and back, as llama.cpp does it for the served model.

    [Piece("<|im_start|>user\\n", False), Piece("hello <|im_end|>", True)]
    -> [1, 4093, 198, 28120, 2067, 108, 306, 79, ...]     the data's "<|im_end|>" stays plain text

Template text may hold special tokens, data never does (llama.cpp's `parse_special`). Between two special tokens,
template text and data are tokenized together. So the ids are those of llama.cpp for the whole prompt, unless the data
holds the text of a special token.
"""

import ctypes
import re
from functools import cached_property
from typing import Any

import llama_cpp

from sg_local.chat.template import ChatTemplate, Message, Piece
from sg_local.errors import SgLocalError
from sg_local.llama.library import LoadedModel

# llama.h, enum llama_token_attr
_UNKNOWN, _CONTROL, _LSTRIP, _RSTRIP = 1 << 0, 1 << 3, 1 << 7, 1 << 8


class Tokenizer:
    """Token ids for one loaded model."""

    def __init__(self, model: LoadedModel) -> None:
        self._vocab = model.vocab
        self.n_vocab = model.n_vocab
        self.bos: int = llama_cpp.llama_vocab_bos(model.vocab)
        self.eos: int = llama_cpp.llama_vocab_eos(model.vocab)
        self.pad: int = llama_cpp.llama_vocab_pad(model.vocab)
        self.adds_bos: bool = llama_cpp.llama_vocab_get_add_bos(model.vocab)

    @property
    def beginning(self) -> tuple[int, ...]:
        """The tokens of an empty prompt, since a model needs at least one: BOS, or EOS if it has no BOS."""
        return (self.bos if self.bos >= 0 else self.eos,)

    def text_of(self, token: int) -> str:
        """A token's text in the vocabulary, e.g. "<|im_end|>"; "" if the model has no such token."""
        if token < 0:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return text.decode("utf-8", "replace")

    def is_end(self, token: int) -> bool:
        """Whether a token ends generation (end of text or of turn)."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of data. Here the text of a special token is plain text, and no BOS is added."""
        data = text.encode()
        size = len(data) + 8
        buffer = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, False, False)
        if count < 0:
            raise SgLocalError(f"llama.cpp needs {-count} tokens for {len(data)} bytes of text")
        return list(buffer[:count])

    def encode(self, pieces: list[Piece]) -> list[int]:
        """Token ids of a rendered prompt, with exactly one BOS where the model wants one."""
        ids: list[int] = [self.bos] if self.adds_bos else []
        run = ""
        strip_next = False
        for piece in pieces:
            parts = [piece.text] if piece.is_data else self._special_pattern.split(piece.text)
            for index, part in enumerate(parts):
                if index % 2 == 0:  # plain text; the texts of special tokens have odd indices
                    run += part.lstrip() if strip_next and not run else part
                    strip_next = strip_next and not run
                    continue
                token, attributes = self._special_tokens[part]
                ids += self.encode_plain(run.rstrip() if attributes & _LSTRIP else run) if run else []
                run, strip_next = "", bool(attributes & _RSTRIP)
                if not (token == self.bos and ids == [self.bos]):
                    ids.append(token)
        return ids + (self.encode_plain(run) if run else [])

    def piece_bytes(self, token: int) -> bytes:
        """The bytes of a token in generated text; none for control tokens."""
        cached = self._piece_cache.get(token)
        if cached is None:
            buffer = ctypes.create_string_buffer(256)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, 256, 0, False)
            if count < 0:
                buffer = ctypes.create_string_buffer(-count)
                count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, -count, 0, False)
            cached = self._piece_cache[token] = buffer.raw[:count]
        return cached

    def chat_template(self, source: str) -> ChatTemplate:
        """A template with this model's BOS and EOS texts."""
        return ChatTemplate(source, bos_token=self.text_of(self.bos), eos_token=self.text_of(self.eos))

    def encode_prompt(self, template: ChatTemplate, messages: list[Message]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins."""
        return self.encode(template.render(messages, add_generation_prompt=True))

    def encode_begun(self, template: ChatTemplate, messages: list[Message], begun: str) -> list[int]:
        """Token ids of a conversation in which the assistant's next turn begins with these words."""
        return self.encode(_until_answer_ends(template, messages, begun)[0])

    def encode_answer(self, template: ChatTemplate, messages: list[Message], answer: str) -> list[int]:
        """Token ids of an answer after `encode_prompt(messages)`, with the token that ends it.

        The end token is the one that the template writes after an assistant's turn, or the model's EOS.
        """
        until, after = _until_answer_ends(template, messages, answer)
        prompt = self.encode_prompt(template, messages)
        ids = self.encode(until)
        # The prompt's ids are no prefix if tokens merge across the border, or if the template writes a finished turn
        # differently. Then the answer is tokenized alone: a model can generate these tokens after the prompt.
        answer_ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else self.encode_plain(answer)
        end = next((token for token in self.encode(after) if self.is_end(token)), self.eos)
        return [*answer_ids, end]

    @cached_property
    def _piece_cache(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _special_tokens(self) -> dict[str, tuple[int, int]]:
        """Texts of control tokens -> (id, attributes)."""
        special_tokens: dict[str, tuple[int, int]] = {}
        get_attribute: Any = llama_cpp.llama_vocab_get_attr
        for token in range(self.n_vocab):
            attributes = get_attribute(self._vocab, token)
            if attributes & (_CONTROL | _UNKNOWN) and (text := self.text_of(token)):
                special_tokens[text] = (token, attributes)
        return special_tokens

    @cached_property
    def _special_pattern(self) -> "re.Pattern[str]":
        texts = sorted(self._special_tokens, key=lambda text: (-len(text), text))
        return re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else re.compile("((?!))")


def _until_answer_ends(
    template: ChatTemplate, messages: list[Message], answer: str
) -> tuple[list[Piece], list[Piece]]:
    """The pieces up to the end of the assistant's words, and what the template writes after them."""
    turn: Message = {"role": "assistant", "content": answer}
    pieces = template.render([*messages, turn], add_generation_prompt=False)
    end = 1 + max(index for index, piece in enumerate(pieces) if piece.is_data)
    return pieces[:end], pieces[end:]
