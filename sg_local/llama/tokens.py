"""The only tokenizer: text to token ids and back, as llama.cpp does it for the served model.

    [Piece("<|im_start|>user\\n", False), Piece("hello <|im_end|>", True)]
    -> [1, 4093, 198, 28120, 2067, 108, 306, 79, ...]     the data's "<|im_end|>" stays plain text

Template text may hold special tokens, data never does (llama.cpp's `parse_special`). Between two special tokens,
template text and data are tokenized as one run, so the ids are those that llama.cpp itself gets for the whole
prompt whenever the data holds no special token's text.

llama.cpp matches user-defined tokens in every text. Most are words of their own ("<table>", four spaces), and stay
that. Those that a template writes, that end an answer, or that have the form of a control token are special here.
"""

import ctypes
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import llama_cpp

from sg_local.chat.template import ChatTemplate, Message, Piece, template_text
from sg_local.errors import SgLocalError
from sg_local.llama.library import LoadedModel

# llama.h, enum llama_token_attr
_UNKNOWN, _CONTROL, _USER_DEFINED, _LSTRIP, _RSTRIP = 1 << 0, 1 << 3, 1 << 4, 1 << 7, 1 << 8

# How models write their control tokens: <|im_end|>, [INST], <<SYS>>, </s>, <start_of_turn>, <think>.
_MARKER_FORM = re.compile(
    r"<[|\uff5c].*[|\uff5c]>|\[/?[A-Z_]+\]|<</?[A-Z]+>>"  # U+FF5C: DeepSeek's bar
    r"|<(/?s|bos|eos|pad|unk|sep|cls|mask|(start|end)_of_\w+|/?(think|tool_call|tool_response))>",
    re.DOTALL,
)
# Before the rest of a text that was cut: a SentencePiece vocabulary would put a space there. No piece goes on after it.
_ANCHOR = "\n"


class _Special(NamedTuple):
    """Which tokens are special in one prompt: their texts, how to find them, and in data those that have to be cut."""

    tokens: dict[str, tuple[int, int]]  # text -> (id, attributes)
    pattern: "re.Pattern[str]"
    in_data: tuple[str, ...]


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

    @cached_property
    def longest_token_bytes(self) -> int:
        """No token stands for more bytes of text: so many times as many need at least so many tokens."""
        return max(len(llama_cpp.llama_vocab_get_text(self._vocab, token)) for token in range(self.n_vocab))

    def is_end(self, token: int) -> bool:
        """Whether a token ends generation (end of text or of turn)."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of data: special tokens' texts are plain text here, and no BOS is added."""
        return self._encode_run(text, self._special(""))

    def encode(self, pieces: list[Piece], template: ChatTemplate | None = None) -> list[int]:
        """Token ids of a rendered prompt, with exactly one BOS where the model wants one.

        template: the one that rendered it, for what it writes in other prompts.
        """
        written = "\0".join(piece.text for piece in pieces if not piece.is_data)
        special = self._special(f"{written}\0{template_text(template)}" if template else written)
        ids: list[int] = [self.bos] if self.adds_bos else []
        run = ""
        strip_next = False
        for piece in pieces:
            parts = [piece.text] if piece.is_data else special.pattern.split(piece.text)
            for index, part in enumerate(parts):
                if index % 2 == 0:  # plain text; special tokens' texts stand at the odd places
                    run += part.lstrip() if strip_next and not run else part
                    strip_next = strip_next and not run
                    continue
                token, attributes = special.tokens[part]
                ids += self._encode_run(run.rstrip() if attributes & _LSTRIP else run, special)
                run, strip_next = "", bool(attributes & _RSTRIP)
                if not (token == self.bos and ids == [self.bos]):
                    ids.append(token)
        return ids + self._encode_run(run, special)

    def _encode_run(self, text: str, special: _Special) -> list[int]:
        """Token ids of a text between special tokens, in which there is none."""
        ids = self._encode_cut(text, special.in_data)
        if any(token in self._control_ids for token in ids):  # put together out of smaller ones
            ids = self._encode_cut(text, tuple(special.tokens))
        return ids

    def _encode_cut(self, text: str, markers: tuple[str, ...]) -> list[int]:
        """Token ids of a text that is cut within each of the markers, so that llama.cpp cannot match it."""
        cuts = {
            place + self._best_cut(marker)
            for marker in markers
            if len(marker) > 1 and marker in text
            for place in _places(marker, text)
        }
        ids: list[int] = []
        start = 0
        for end in [*sorted(cuts), len(text)]:
            part = text[start:end]
            ids += self._tokenize_rest(part) if start else self._tokenize(part)
            start = end
        return ids

    def _best_cut(self, marker: str) -> int:
        """Where the two parts of a marker have the fewest tokens: nearest to what its plain text would have."""
        if marker not in self._cuts:
            self._cuts[marker] = min(
                range(1, len(marker)),
                key=lambda cut: len(self._tokenize(marker[:cut]) + self._tokenize_rest(marker[cut:])),
            )
        return self._cuts[marker]

    def _tokenize_rest(self, text: str) -> list[int]:
        """Token ids of a text that goes on with another."""
        if llama_cpp.llama_vocab_type(self._vocab) != llama_cpp.LLAMA_VOCAB_TYPE_SPM:
            return self._tokenize(text)
        anchor, ids = self._tokenize(_ANCHOR), self._tokenize(_ANCHOR + text)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        """llama.cpp's own ids, in which user-defined tokens count and control tokens do not."""
        if not text:
            return []
        data = text.encode()
        size = len(data) + 8
        buffer = (llama_cpp.llama_token * size)()
        count = llama_cpp.llama_tokenize(self._vocab, data, len(data), buffer, size, False, False)
        if count < 0:
            raise SgLocalError(f"llama.cpp needs {-count} tokens for {len(data)} bytes of text")
        return list(buffer[:count])

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
        """Token ids of a conversation up to the place where the assistant's answer begins."""
        return self.encode(template.render(messages, add_generation_prompt=True), template)

    def encode_begun(self, template: ChatTemplate, messages: list[Message], begun: str) -> list[int]:
        """Token ids of a conversation whose next turn the assistant has begun with these words."""
        return self.encode(_until_answer_ends(template, messages, begun)[0], template)

    def encode_answer(self, template: ChatTemplate, messages: list[Message], answer: str) -> list[int]:
        """Token ids of an answer after `encode_prompt(messages)`, with the token that ends it.

        The end token is the one that the template writes after an assistant's turn, or the model's EOS.
        """
        until, after = _until_answer_ends(template, messages, answer)
        prompt = self.encode_prompt(template, messages)
        ids = self.encode(until, template)
        # The prompt's ids are no prefix if tokens merge across the border, or if the template writes a finished turn
        # differently. Then the answer is tokenized on its own, which is what a model can generate here.
        if ids[: len(prompt)] == prompt:
            answer_ids = ids[len(prompt) :]
        else:
            answer_ids = self._encode_run(answer, self._special(template_text(template)))
        end = next((token for token in self.encode(after, template) if self.is_end(token)), self.eos)
        return [*answer_ids, end]

    @cached_property
    def _piece_cache(self) -> dict[int, bytes]:
        return {}

    @cached_property
    def _cuts(self) -> dict[str, int]:
        return {}

    def _special(self, written: str) -> _Special:
        """The special tokens of a prompt in which the template writes this."""
        if written not in self._specials:  # the same for every row
            by_template = {text: found for text, found in self._user_defined.items() if text in written}
            tokens = self._special_tokens | by_template
            ordered = sorted(tokens, key=lambda text: (-len(text), text))
            pattern = "(" + "|".join(map(re.escape, ordered)) + ")" if ordered else "((?!))"
            in_data = tuple(text for text in ordered if tokens[text][1] & _USER_DEFINED)
            self._specials[written] = _Special(tokens, re.compile(pattern), in_data)
        return self._specials[written]

    @cached_property
    def _specials(self) -> dict[str, _Special]:
        return {}

    @cached_property
    def _special_tokens(self) -> dict[str, tuple[int, int]]:
        """Texts of the tokens that are special whatever a template writes -> (id, attributes)."""
        return {
            text: (token, attributes)
            for text, (token, attributes) in self._added_tokens.items()
            if attributes & (_CONTROL | _UNKNOWN) or _MARKER_FORM.fullmatch(text) or self.is_end(token)
        }

    @cached_property
    def _user_defined(self) -> dict[str, tuple[int, int]]:
        """The other ones, which are special where a template writes them: no single characters, no spaces."""
        return {
            text: found
            for text, found in self._added_tokens.items()
            if text not in self._special_tokens and len(text) > 1 and text.strip(" \t\r\n▁")
        }

    @cached_property
    def _control_ids(self) -> set[int]:
        return {token for token, attributes in self._added_tokens.values() if attributes & _CONTROL}

    @cached_property
    def _added_tokens(self) -> dict[str, tuple[int, int]]:
        """Texts of control and user-defined tokens -> (id, attributes)."""
        found: dict[str, tuple[int, int]] = {}
        get_attribute: Any = llama_cpp.llama_vocab_get_attr
        for token in range(self.n_vocab):
            attributes = get_attribute(self._vocab, token)
            if attributes & (_CONTROL | _UNKNOWN | _USER_DEFINED) and (text := self.text_of(token)):
                found[text] = (token, attributes)
        return found


def _places(marker: str, text: str) -> Iterator[int]:
    """Where a marker begins in a text, also within itself."""
    place = text.find(marker)
    while place >= 0:
        yield place
        place = text.find(marker, place + 1)


def _until_answer_ends(
    template: ChatTemplate, messages: list[Message], answer: str
) -> tuple[list[Piece], list[Piece]]:
    """The pieces up to the end of the assistant's words, and what the template writes after them."""
    turn: Message = {"role": "assistant", "content": answer}
    pieces = template.render([*messages, turn], add_generation_prompt=False)
    end = 1 + max(index for index, piece in enumerate(pieces) if piece.is_data)
    return pieces[:end], pieces[end:]
