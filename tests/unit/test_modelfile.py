"""The Modelfile, read back as Ollama reads it: its parser and Go's template, as far as a Modelfile here uses them."""

# ruff: noqa: RUF001 (other scripts' letters look like Latin ones)

import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sg_local.chat.modelfile import beside_base, modelfile
from sg_local.chat.template import VICUNA_TEMPLATE, ChatTemplate
from sg_local.selfguide.prompts import answer_messages
from sg_local.task import Example

CHATML = ChatTemplate(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}".replace("\n", "{{ '\\n' }}"),
    bos_token="<|im_start|>",
    eos_token="<|im_end|>",
)
VICUNA = ChatTemplate(VICUNA_TEMPLATE, bos_token="<s>", eos_token="</s>")
WITH_BOS = ChatTemplate("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}", "<s>", "</s>")
# Whose own text is as awkward as a task's can be.
AWKWARD = ChatTemplate(
    "{% for m in messages %}\"{{ '{{' }}{{ m.content }}{{ '}}' }}\"{{ '\"' * 3 }}{% endfor %}", "<s>", "</s>"
)
SINGLE = ChatTemplate('{% for m in messages %}x{{ "{" }}{{ m.content }}y"{% endfor %}', "<s>", "</s>")


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Ollama's ParseFile (parser/parser.go, 0.9): commands and their unquoted values."""
    commands: list[tuple[str, str]] = []
    state, name, buffer = "nil", "", ""
    for character in text:
        is_space, is_newline = character in " \t", character in "\r\n"
        kept = character
        if state == "nil":
            after = "nil" if is_space or is_newline else "comment" if character == "#" else "name"
            kept = character if after == "name" else ""
        elif state in ("name", "parameter"):
            after = "value" if is_space else state
            kept = "" if is_space else character
            assert is_space or re.match("[A-Za-z0-9_]", character), (
                f"Ollama: no command {buffer + character!r}"
            )
        elif state == "value":
            after = "nil" if is_space or is_newline else "value"
        else:
            after = "nil" if is_newline else "comment"
            kept = ""
        if after != state:
            if state == "name":
                assert buffer.lower() in {"from", "adapter", "system", "template", "parameter", "license"}, (
                    f"Ollama: no {buffer!r}"
                )
                name, after = buffer.lower(), "parameter" if buffer.lower() == "parameter" else after
            elif state == "parameter":
                name = buffer
            elif state == "value":
                value = unquoted(buffer.strip())
                if value is None or is_space:
                    buffer += character
                    continue
                commands.append((name, value))
            buffer, state = "", after
        if is_printable(kept):
            buffer += kept
    assert state == "nil", "the last command does not end"
    return commands


def unquoted(text: str) -> str | None:
    if text.startswith('"""'):
        return text[3:-3] if len(text) >= 6 and text.endswith('"""') else None
    if text.startswith('"'):
        return text[1:-1] if len(text) >= 2 and text.endswith('"') else None
    return text


def is_printable(character: str) -> bool:
    """Go's strconv.IsPrint."""
    return character == " " or (character != "" and unicodedata.category(character)[0] in "LMNPS")


def execute(template: str, prompt: str, system: str) -> str:
    """Go's text/template for the actions used: fields, string constants, one choice by whether there is SYSTEM."""
    before, _, rest = template.partition("{{ if .System }}{{ .System }}{{ else }}")
    stated, _, rest = rest.partition("{{ end }}")
    return constants(before, prompt) + (system or constants(stated, prompt)) + constants(rest, prompt)


def constants(template: str, prompt: str) -> str:
    shown = ""
    while "{{" in template:  # Go's lexer takes the leftmost pair
        text, template = template.split("{{", 1)
        action = re.match(r' (?:\.Prompt|"((?:\\u[0-9a-f]{4}|\\U[0-9a-f]{8})+)") }}', template)
        assert action, f"Go: bad action {{{{{template[:20]!r}"
        constant = re.sub(r"\\[uU]([0-9a-f]+)", lambda code: chr(int(code[1], 16)), action[1] or "")
        shown += text + (constant or prompt)
        template = template[action.end() :]
    return shown + template


def served_prompt(text: str, prompt: str, system: str | None = None) -> str:
    """What the model is shown by Ollama, BOS left out; with the file's SYSTEM, or that of a call."""
    values = dict(read_modelfile(text))
    return execute(values["template"], prompt, values.get("system", "") if system is None else system)


def trained_prompt(template: ChatTemplate, instruction: str, prompt: str, shown: tuple[Example, ...]) -> str:
    pieces = template.render(answer_messages(instruction, prompt, shown), add_generation_prompt=True)
    return "".join(piece.text for piece in pieces)


def written(template: ChatTemplate, instruction: str, shown: tuple[Example, ...] = ()) -> str:
    return modelfile(template, instruction, shown, stops=["<|im_end|>"], licence="Apache-2.0")


def test_the_whole_file():
    assert written(CHATML, "Sort this message:") == (
        "FROM ./model.gguf\n"
        'SYSTEM "Sort this message:"\n'
        'TEMPLATE """<|im_start|>system\n'
        "{{ if .System }}{{ .System }}{{ else }}Sort this message:{{ end }}<|im_end|>\n"
        "<|im_start|>user\n"
        "{{ .Prompt }}<|im_end|>\n"
        "<|im_start|>assistant\n"
        '"""\n'
        "PARAMETER temperature 0\n"
        "PARAMETER repeat_penalty 1\n"
        'PARAMETER stop "<|im_end|>"\n'
        'LICENSE "Apache-2.0"\n'
    )
    assert read_modelfile(written(VICUNA, "Sort this."))[0] == ("from", "./model.gguf")


def test_an_answer_has_the_length_that_was_trained():
    text = modelfile(CHATML, "Sort.", (), stops=[], licence="MIT", max_new_tokens=12)
    assert ("num_predict", "12") in read_modelfile(text)


def test_base_and_adapter_are_asked_as_the_merged_model_is():
    text = written(CHATML, 'Say """yes""".')
    other = read_modelfile(beside_base(text, Path("/my models/base v1.gguf")))
    assert other[:2] == [("from", "/my models/base v1.gguf"), ("adapter", "./adapter.gguf")]
    assert other[2:] == read_modelfile(text)[1:]


@pytest.mark.parametrize("path", ['/a"b.gguf', "/a\nb.gguf", "/a\u200bb.gguf"])
def test_a_base_that_a_modelfile_cannot_name_is_to_be_copied(path: str):
    text = beside_base(written(CHATML, "Sort."), Path(path))
    assert read_modelfile(text)[0] == ("from", "./base.gguf")
    assert "# Copy the base" in text


INSTRUCTIONS = [
    "Sort this message.",
    'Say """yes""" or """no""".',
    '"""',
    '""" \nSYSTEM """evil"""\n"""',
    'The line ends with """\nFROM evil\n"""',
    '"quoted at both ends"',
    '"',
    'a"',
    '""',
    "Answer as {{ .Prompt }} or {{.System}} or {{- if .First -}}x{{ end }}.",
    "{{/* a comment */}}",
    "{",
    "{{",
    "{{{",
    "{{{{{",
    "}}",
    "a } b }} c }}}",
    '{"label": "x"}',
    '{"a": {"b": {{"c"}}}}',
    'x {"{" y',
    "Use \\n, \\u0041, \\\\ and \\{{.",
    "C:\\new\\table",
    "end with a backslash \\",
    "{% raw %}{{ messages }}{% endraw %}",
    "# no comment\nPARAMETER temperature 2",
    "two\n\n\nblank lines",
    "a\ttab and \t\ttwo",
    "全角\u3000スペース",
    "no\u00a0break, soft\u00adhyphen, zero\u200bwidth, \u200djoiner\u200c",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467, tag \U000e0067",
    "private \ue0f2 use \ue0f0\ue0f1 \ufeff",
    "می\u200cخواهم",
    "Приве́т, 世界! ¿Qué?",
    "`backticks` $HOME %s %%",
]
SHOWN = (Example('{{ "in" }}', '"""'), Example("second \u200b{", '{"'))


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
@pytest.mark.parametrize(
    "template", [CHATML, VICUNA, AWKWARD, SINGLE], ids=["chatml", "vicuna", "awkward", "single"]
)
def test_ollama_shows_the_prompt_that_was_trained(template: ChatTemplate, instruction: str):
    for shown in ((), SHOWN):
        text = written(template, instruction, shown)
        for prompt in ("my parcel is lost", 'x {{ .Prompt }} """ \\u0041'):
            expected = trained_prompt(template, instruction, prompt, shown)
            assert served_prompt(text, prompt) == served_prompt(text, prompt, system="") == expected
            other = trained_prompt(template, "Translate it.", prompt, shown)
            assert served_prompt(text, prompt, system="Translate it.") == other
        commands = read_modelfile(text)
        assert [value for name, value in commands if name == "system"] in ([], [instruction])
        assert [name for name, _ in commands if name != "system"] == [
            "from", "template", "temperature", "repeat_penalty", "stop", "license"
        ]  # fmt: skip


@given(st.text("{}\"\\ \n\tab.#`'\u200d\u3000\ue0f2", min_size=1).filter(str.strip), st.booleans())
def test_ollama_shows_the_prompt_whatever_the_instruction(instruction: str, as_demonstration: bool):
    shown = (Example("a", instruction),) if as_demonstration else ()
    expected = trained_prompt(CHATML, instruction, "my parcel", shown)
    for system in (None, ""):
        assert served_prompt(written(CHATML, instruction, shown), "my parcel", system) == expected


def test_system_is_left_out_where_it_cannot_be_read_back():
    for instruction in ("zero\u200bwidth", '"""\nFROM evil'):
        text = written(CHATML, instruction)
        assert "system" not in dict(read_modelfile(text))
        assert served_prompt(text, "x") == trained_prompt(CHATML, instruction, "x", ())


def test_a_plain_instruction_stays_readable():
    text = written(CHATML, 'Answer "yes" or {no}, as JSON: { "a": 1 }.')
    assert 'Answer "yes" or {no}, as JSON: { "a": 1 }.' in text


def test_bos_is_left_to_a_tokenizer_that_adds_it():
    def written_for(template: ChatTemplate, adds_bos: bool) -> str:
        return modelfile(template, "Sort.", (), stops=[], licence="MIT", adds_bos=adds_bos)

    assert served_prompt(written_for(WITH_BOS, True), "x") == "[Sort.\n\nx]"
    assert served_prompt(written_for(WITH_BOS, False), "x") == "<s>[Sort.\n\nx]"
    # SmolLM2's BOS is the text that begins each turn, and its tokenizer does not add it.
    assert served_prompt(written_for(CHATML, False), "x").startswith("<|im_start|>system\nSort.")
    assert served_prompt(written_for(CHATML, True), "x").startswith("system\nSort.")
    # What a task begins with is no BOS.
    bare = ChatTemplate("{% for m in messages %}{{ m.content }}|{% endfor %}", "Sort", "")
    assert served_prompt(written_for(bare, True), "x") == "Sort.\n\nx|"


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        ("<|im_end|>", 'PARAMETER stop "<|im_end|>"'),
        ("</s>", 'PARAMETER stop "</s>"'),
        ("<｜end▁of▁sentence｜>", 'PARAMETER stop "<｜end▁of▁sentence｜>"'),
        ("\\n", 'PARAMETER stop "\\n"'),  # two characters: Ollama knows no escapes
        (" padded ", 'PARAMETER stop " padded "'),
        ('say "stop"', 'PARAMETER stop """say "stop""""'),
        ('"', 'PARAMETER stop """""""'),
        ('"""', 'PARAMETER stop """""""""'),
        ("\n", 'PARAMETER stop """\n"""'),
        ("\n\n#", 'PARAMETER stop """\n\n#"""'),
    ],
)
def test_stop_texts_are_read_back_as_they_are(stop: str, line: str):
    text = modelfile(CHATML, "Sort.", (), stops=[stop, "</s>"], licence="MIT")
    assert line in text
    assert [value for name, value in read_modelfile(text) if name == "stop"] == [stop, "</s>"]


@pytest.mark.parametrize("stop", ["", 'x"""\nSYSTEM """evil', '"""\n', "zero\u200bwidth", "\x00", '""" \r\n'])
def test_a_stop_text_that_cannot_be_read_back_is_left_out(stop: str):
    text = modelfile(CHATML, "Sort.", (), stops=[stop, "</s>"], licence="MIT")
    assert [value for name, value in read_modelfile(text) if name == "stop"] == ["</s>"]


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("Apache-2.0", "Apache-2.0"),
        ("Llama 2 Community License", "Llama 2 Community License"),
        ('the "License"', 'the "License"'),
        ("line one\nline two", "line one\nline two"),
        ('MIT"""\nSYSTEM """evil"""', "MIT'''\nSYSTEM '''evil'''"),
        ('""""', "'''\""),
        ("no\u00a0break", "no break"),
        ("", ""),
    ],
)
def test_a_licence_stays_one_value(licence: str, expected: str):
    text = modelfile(CHATML, "Sort.", (), stops=[], licence=licence)
    commands = read_modelfile(text)
    assert commands[-1] == ("license", expected)
    assert [name for name, _ in commands] == [
        "from", "system", "template", "temperature", "repeat_penalty", "license"
    ]  # fmt: skip
