"""The one engine that stands for llama.cpp in these tests: it computes nothing, and answers as it is told.

    engine = ScriptedEngine(answer=lambda _file, prompt: prompt.split()[-1])
    engine.replace_llama_cpp(monkeypatch)      # `open_with` serves it from now on, whatever file is asked for
    engine.opened                              # [("base.gguf", "adapter.gguf", -1)], the last the layers on the GPU
    engine.asked                               # the prompts that were answered, as text

A token is a byte, and a prompt is the contents of its messages, one a line.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import sg_local.llama.asking as asking
from sg_local.llama.engine import Counters
from sg_local.llama.generation import Completion

ROOM_TOKENS = 200  # for a prompt and its answer, unless a test says otherwise


class ScriptedTokenizer:
    """Bytes for tokens; a chat template is its source."""

    def chat_template(self, source: str) -> str:
        return source

    def encode_prompt(self, _template: str, messages: Sequence[dict[str, str]]) -> list[int]:
        return list("\n".join(message["content"] for message in messages).encode())

    def encode_begun(self, _template: str, messages: Sequence[dict[str, str]], begun: str) -> list[int]:
        return [*self.encode_prompt("", messages), *begun.encode()]

    def encode_answer(self, _template: str, _messages: Sequence[dict[str, str]], answer: str) -> list[int]:
        return list(answer.encode())

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode())


def last_word(_file: str, prompt: str) -> str:
    """An answer that shows which prompt it belongs to."""
    return prompt.split()[-1]


class ScriptedEngine:
    """Says `answer(file, prompt)`, and scores labels by `label_logprobs(prompt, labels)`.

    `file` is the name of the adapter, or of the model where there is none. An answer that ends by its length is a
    Completion.
    """

    longest_sequence = ROOM_TOKENS

    def __init__(
        self,
        answer: Callable[[str, str], str | Completion] = last_word,
        label_logprobs: Callable[[str, list[str]], list[float]] | None = None,
        room_tokens: int = ROOM_TOKENS,
    ) -> None:
        self.room_tokens = room_tokens
        self.answer = answer
        self.label_logprobs = label_logprobs
        self.tokenizer = ScriptedTokenizer()
        self.counters = Counters()
        self.file = ""
        self.opened: list[tuple[str, str | None, int]] = []
        self.asked: list[str] = []

    def replace_llama_cpp(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every `open_with` serves this engine, from now to the end of the test."""
        monkeypatch.setattr(asking, "open_engine", self._open)
        monkeypatch.setattr(asking, "completions", ScriptedEngine._completions)
        monkeypatch.setattr(asking, "label_logprobs", ScriptedEngine._label_logprobs)

    def fits(self, n_prompt_tokens: int, max_new_tokens: int) -> bool:
        return n_prompt_tokens + max_new_tokens <= self.room_tokens

    def is_over_context(self, text: str) -> bool:
        return not self.fits(len(text.encode()), 0)

    @contextmanager
    def _open(
        self, model_path: Path, *, n_gpu_layers: int, adapter_path: Path | None, **_options: Any
    ) -> Iterator["ScriptedEngine"]:
        self.file = (adapter_path or model_path).name
        self.opened.append((model_path.name, adapter_path and adapter_path.name, n_gpu_layers))
        yield self

    def _completions(self, requests: Sequence[Any]) -> Iterator[tuple[int, Completion]]:
        for index, request in enumerate(requests):
            prompt = bytes(request.prompt).decode()
            self.asked.append(prompt)
            answer = self.answer(self.file, prompt)
            yield index, answer if isinstance(answer, Completion) else Completion(answer, (1,), "end")

    def _label_logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        on_finished: Callable[[int], None],
    ) -> list[list[float]]:
        assert self.label_logprobs is not None, "this test expects that no label is scored"
        scores = []
        for index, prompt in enumerate(prompts):
            names = [bytes(label).decode() for label in labels]
            scores.append(self.label_logprobs(bytes(prompt).decode(), names))
            on_finished(index)
        return scores
