"""Renders one chat template in a separate process, where it cannot hang, exhaust the machine or touch it.

reads  standard input    {"source": "{% for message in messages %}…", "bos_token": "<s>", "eos_token": "</s>",
                          "calls": [{"messages": [{"role": "user", "content": "…"}], "program": "sg-local",
                                     "add_generation_prompt": true, "max_characters": 69632}], "sys_path": ["…"]}
writes standard output   [{"text": "USER: … ASSISTANT:"}]   or   [{"error": "UndefinedError: 'tool' is undefined"}]

template.py starts this file as a script. Jinja's sandbox keeps a template away from Python's internals. If the system
has limits, they hold even for a template that escapes: CPU time, memory, and no file or socket can be opened.

Source: the environment and variables of transformers' utils/chat_template_utils.py. Two things differ: the date is
fixed, so that the prompts of a run never change, and thinking is off, since the answers are short. PROGRAMS has what
other programs set, so that a template can be tried as they would call it.
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
OTHER_DATE = datetime.date(1999, 1, 3)  # differs in year, month, day and day of the week

DATE_TEXTS = {"date_string": "%d %b %Y", "datetime": "%b %d %Y"}  # variables that llama.cpp sets to today's

# The variables that a template finds beside messages, tokens and add_generation_prompt. llama.cpp: common/chat.cpp;
# llama-cpp-python: Jinja2ChatFormatter. "plain" is a program that knows no tools, no thinking and no date.
PROGRAMS: dict[str, dict[str, object]] = {
    "sg-local": {
        "tools": None,
        "documents": None,
        "enable_thinking": False,
        "strftime_now": DATE.strftime,
        **{name: DATE.strftime(form) for name, form in DATE_TEXTS.items()},
    },
    "transformers": {"tools": None, "documents": None, "strftime_now": OTHER_DATE.strftime},
    "llama.cpp": {
        "enable_thinking": True,
        "strftime_now": OTHER_DATE.strftime,
        **{name: OTHER_DATE.strftime(form) for name, form in DATE_TEXTS.items()},
    },
    "llama-cpp-python": {
        **dict.fromkeys(("functions", "function_call", "tools", "tool_choice")),
        "strftime_now": OTHER_DATE.strftime,
    },
    "plain": {},
}


def main() -> None:
    """Answers the request on standard input."""
    request = json.load(sys.stdin)
    sys.path[:] = request["sys_path"]
    environment = jinja_environment()
    _limit_process()
    json.dump(answers(environment, request), sys.stdout)


def answers(environment: Any, request: dict[str, Any]) -> list[dict[str, str]]:
    """What the template writes for each call, or its error; it is compiled once."""
    try:
        template = environment.from_string(request["source"])
    except Exception as error:
        return [_error(error)] * len(request["calls"])
    found = []
    for call in request["calls"]:
        try:
            found.append({"text": _render(template, request, call)})
        except Exception as error:  # a template may raise anything; the caller blames the template
            found.append(_error(error))
    return found


def _error(error: Exception) -> dict[str, str]:
    if isinstance(error, MemoryError):
        return {"error": f"it needs over {MAX_MEMORY_BYTES >> 20} MiB of memory"}
    return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def jinja_environment() -> Any:
    """Jinja as transformers sets it up, with all that is imported at the first use, when no file can be opened."""
    import jinja2
    import jinja2.debug
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
    environment.from_string("{{ 'loads' }}").render()
    return environment


def _render(template: Any, request: dict[str, Any], call: dict[str, Any]) -> str:
    parts: list[str] = []
    length = 0
    for part in template.generate(
        messages=call["messages"],
        add_generation_prompt=call["add_generation_prompt"],
        bos_token=request["bos_token"],
        eos_token=request["eos_token"],
        **PROGRAMS[call["program"]],
    ):
        parts.append(part)
        length += len(part)
        if length > call["max_characters"]:
            raise ValueError(
                f"it wrote over {call['max_characters']} characters around {len(call['messages'])} messages"
            )
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
