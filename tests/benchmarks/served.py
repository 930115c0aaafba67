"""Do the programs that people serve the files with give the answers that were scored? `verify --server` on each.

    run            program       serves                 prompt        equal      score  recorded  worst tie
    support-inbox  llama-server  model.gguf             the trained   99 of 100  0.700  0.710     0.010 nats
    support-inbox  llama-server  base and adapter.gguf  the trained   98 of 100  0.700  0.710     0.020 nats

    $ python -m venv servers
    $ servers/bin/pip install xllamacpp 'llama-cpp-python[server]'
    $ mkdir node && cd node && npm install node-llama-cpp
    $ python tests/benchmarks/served.py RUN [RUN ...] --llama-server FILE --servers servers/bin/python --node node

RUN is a finished run with recorded answers. Each program that is named is started on a free port of this machine, as
the manual says, and gets the recorded rows by HTTP, temperature 0. node-llama-cpp has no server of its own: the script
below puts its chat session behind the same address, with the file's template and the instruction as system prompt,
since it would take a chat format of its own. Where an answer differs, our engine tells how far apart in
probability the two tokens are at which they part. Exits with 1 where that is no tie: NEAR_NATS or more.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from sg_local.errors import SgLocalError
from sg_local.llama.asking import open_with
from sg_local.llama.scoring import label_logprobs
from sg_local.proof.chat_server import ChatServer
from sg_local.proof.server_check import check_server
from sg_local.runs.directory import Run, open_run
from sg_local.runs.prompt import demonstrations, template_source
from sg_local.selfguide.contenders import Contender
from sg_local.selfguide.prompts import answer_messages
from sg_local.selfguide.served import Comparison

NEAR_NATS = 0.25  # what other kernels make of one quantized file: logits differ by some tenths
N_CTX = 2048
START_SECONDS = 120.0
XLLAMACPP = """
import sys, time, xllamacpp

port, model, *adapter = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port, parameters.n_ctx, parameters.n_parallel = model, int(port), 2048, 1
if adapter:
    parameters.chat_template = open(adapter[1]).read()
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = adapter[0], 1.0
    parameters.lora_adapters = [lora]
server = xllamacpp.Server(parameters)
time.sleep(36000)
"""
NODE = """
import http from "node:http";
import {getLlama, LlamaChatSession, JinjaTemplateChatWrapper} from "node-llama-cpp";

const [port, modelPath, instruction] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never"});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({contextSize: 2048, threads: 1}); // more would spin
const contextSequence = context.getSequence();
const chatWrapper = new JinjaTemplateChatWrapper({template: model.fileInfo.metadata.tokenizer.chat_template});

async function answer({messages, max_tokens}) {
    await contextSequence.clearHistory();
    const systemPrompt = messages.find(({role}) => role === "system")?.content ?? instruction;
    const session = new LlamaChatSession({contextSequence, chatWrapper, systemPrompt});
    const question = messages.find(({role}) => role === "user").content;
    const content = await session.prompt(question, {temperature: 0, maxTokens: max_tokens});
    session.dispose({disposeSequence: false});
    return {choices: [{index: 0, message: {role: "assistant", content}}]};
}

let last = Promise.resolve();
http.createServer((request, response) => {
    let body = "";
    request.on("data", (chunk) => { body += chunk; });
    request.on("end", () => {
        const send = (status, value) => {
            response.writeHead(status, {"Content-Type": "application/json"});
            response.end(JSON.stringify(value));
        };
        if (request.url === "/v1/models")
            send(200, {data: [{id: "model"}]});
        else if (request.url === "/v1/chat/completions")
            last = last.then(() => answer(JSON.parse(body))).then(
                (value) => send(200, value), (error) => send(500, {error: {message: String(error)}}));
        else
            send(404, {error: {message: "no such address"}});
    });
}).listen(Number(port), "127.0.0.1");
"""


class Server(NamedTuple):
    """A program, what it serves, and the command that starts it."""

    program: str
    has_adapter: bool
    port: int
    command: tuple[str, ...]

    @property
    def serves(self) -> str:
        """The files, in words."""
        return "base and adapter.gguf" if self.has_adapter else "model.gguf"


def main() -> None:
    """Prints the table, a line as each server is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's own server, built")
    parser.add_argument("--servers", type=Path, help="a Python that has xllamacpp and llama_cpp.server")
    parser.add_argument("--node", type=Path, help="a directory in which npm installed node-llama-cpp")
    arguments = parser.parse_args()
    row = "{:16} {:20} {:22} {:12} {:>10} {:>6} {:>8}  {}"
    print(row.format("run", "program", "serves", "prompt", "equal", "score", "recorded", "worst tie"))
    is_right = True
    for path in arguments.runs:
        run = open_run(path)
        for server in servers(run, free_port(), arguments):
            with started(server) as url:
                check = check_server(run, ChatServer(url, 120), None, 100)
            found = check.comparison
            apart = ties(run, found)
            is_right &= all(nats < NEAR_NATS for nats in apart)
            prompt = {True: "the trained", False: "ANOTHER", None: "not known"}[check.prompt.is_trained]
            equal = f"{found.equal[found.tuned]} of {len(found.rows)}"
            scores = (f"{found.score:.3f}", f"{found.recorded_score:.3f}")
            worst = f"{max(apart):.3f} nats" if apart else "no difference"
            print(row.format(run.task.name, server.program, server.serves, prompt, equal, *scores, worst))
            sys.stdout.flush()
    sys.exit(0 if is_right else 1)


def servers(run: Run, port: int, arguments: argparse.Namespace) -> Iterator[Server]:
    """The programs that the command line names, with model.gguf, and with base and adapter where they take one."""
    base, merged = str(run.model.path), str(run.file("model.gguf"))
    adapter, template = str(run.file("adapter.gguf")), str(run.file("chat_template.jinja"))
    if arguments.llama_server:
        llama_server = (
            *(str(arguments.llama_server), "--port", str(port), "--jinja", "--temp", "0"),
            *("-c", str(N_CTX), "-np", "1", "--no-webui"),
        )
        yield Server("llama-server", False, port, (*llama_server, "-m", merged))
        yield Server(
            "llama-server",
            True,
            port,
            (*llama_server, "-m", base, "--lora", adapter, "--chat-template-file", template),
        )
    if arguments.servers:
        python = str(arguments.servers)
        yield Server("xllamacpp", False, port, (python, "-c", XLLAMACPP, str(port), merged))
        yield Server("xllamacpp", True, port, (python, "-c", XLLAMACPP, str(port), base, adapter, template))
        yield Server(
            "llama_cpp.server",
            False,
            port,
            (python, "-m", "llama_cpp.server", "--model", merged, "--port", str(port), "--n_ctx", str(N_CTX)),
        )
    if arguments.node:
        script = arguments.node / "served.mjs"
        script.write_text(NODE)
        yield Server(
            "node-llama-cpp", False, port, ("node", str(script), str(port), merged, run.task.instruction)
        )


@contextmanager
def started(server: Server) -> Iterator[str]:
    """The address of a server that answers; the server ends with the block."""
    url = f"http://127.0.0.1:{server.port}"
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with subprocess.Popen(
        server.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        try:
            until = time.monotonic() + START_SECONDS
            while True:
                try:
                    ChatServer(url, 5).only_model()
                    break
                except SgLocalError:
                    if time.monotonic() > until or process.poll() is not None:
                        raise
                    time.sleep(0.5)
            yield url
        finally:
            process.kill()


def ties(run: Run, found: Comparison) -> list[float]:
    """Of each served answer that differs from the recorded one: how far apart the tokens at which they part are, nats.

    By our engine, which computes this prompt alone here: it, too, may prefer the server's token by as little.
    """
    if not found.differing:
        return []
    is_merged = found.tuned is Contender.TUNED_MERGED
    model, adapter = (
        (run.file("model.gguf"), None) if is_merged else (run.model.path, run.file("adapter.gguf"))
    )
    settings = run.settings
    parted = []
    with open_with(settings, model, adapter) as engine:
        template = engine.tokenizer.chat_template(template_source(run))
        for place in found.differing:
            row, recorded = found.rows[place], found.recorded[place]
            messages = answer_messages(run.task.instruction, row["input"], demonstrations(run))
            prompt = engine.tokenizer.encode_prompt(template, messages)
            ours, theirs = (
                engine.tokenizer.encode_answer(template, messages, answer["prediction"])
                for answer in (recorded, row)
            )
            shared = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            nexts = [tuple(ours[shared : shared + 1]), tuple(theirs[shared : shared + 1])]
            [[of_ours, of_theirs]] = label_logprobs(engine, [(*prompt, *ours[:shared])], nexts)
            parted.append(abs(of_ours - of_theirs))
    return parted


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    main()
