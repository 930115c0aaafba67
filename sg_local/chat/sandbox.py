"""Renders one chat template in a separate process, where it cannot hang, exhaust the machine or touch it.

reads  standard input    {"source": "{% for message in messages %}…", "bos_token": "<s>", "eos_token": "</s>",
                          "messages": [{"role": "user", "content": "…"}], "add_generation_prompt": true,
                          "max_characters": 69632, "sys_path": ["…"]}
writes standard output   {"text": "USER: … ASSISTANT:"}   or   {"error": "UndefinedError: 'tool' is undefined"}

template.py starts this file as a script. Jinja's sandbox keeps a template away from Python's internals. If the system
has limits, they hold even for a template that escapes: CPU time, memory, and no file or socket can be opened.

Source: the environment and variables of transformers' utils/chat_template_utils.py. Two things differ: the date is
fixed, so that the prompts of a run never change, and thinking is off, since the answers are short.
"""

import contextlib
import datetime
import json
import sys
from typing import Any

MAX_CPU_SECONDS = 2
MAX_MEMORY_BYTES = 512 * 1024 * 1024
# The default date of Llama 3's template.
DATE = datetime.date(2024, 7, 26)


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)
    sys.path[:] = request.pop("sys_path")
    try:
        answer = {"text": _render(**request)}
    except MemoryError:
        answer = {"error": f"it needs over {MAX_MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template may raise anything; the caller blames the template
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    json.dump(answer, sys.stdout)


def _render(
    source: str,
    bos_token: str,
    eos_token: str,
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
    max_characters: int,
) -> str:
    import jinja2
    import jinja2.debug  # Jinja would import it at the first error, when no file can be opened
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for training; here its body is rendered as usual."""

        tags = {"generation"}  # noqa: RUF012 (Jinja reads it from the class)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = DATE.strftime
    environment.from_string(
        "{{ 'loads' }}"
    ).render()  # what Jinja and its codecs import when they are first used
    _limit_process()
    parts: list[str] = []
    length = 0
    for part in environment.from_string(source).generate(
        messages=messages,
        tools=None,
        documents=None,
        bos_token=bos_token,
        eos_token=eos_token,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
    ):
        parts.append(part)
        length += len(part)
        if length > max_characters:
            raise ValueError(f"it wrote over {max_characters} characters around {len(messages)} messages")
    text = "".join(parts)
    text.encode()  # fails for half of a surrogate pair
    return text


def _limit_process() -> None:
    try:
        import resource
    except ImportError:  # Windows: only the caller's time-out is a bound
        return
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, MAX_CPU_SECONDS, MAX_CPU_SECONDS + 1),  # the soft one ends it with SIGXCPU
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES, MAX_MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS refuses RLIMIT_AS
            resource.setrlimit(limit, (soft, hard))


if __name__ == "__main__":
    main()
