"""Vicuna's own shape through the whole loop: a SentencePiece vocabulary, BOS, and no chat template in the file.

Its weights are not at hand, so the model is tiny and random: it says nothing, but is trained, exported and proved.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest
from tiny_models import write_tiny_llama

from sg_local.chat.template import VICUNA_TEMPLATE
from sg_local.files import read_rows, write_rows
from sg_local.gguf_header import read_header
from sg_local.gguf_io.base_weights import write_base_weights
from sg_local.llama.library import load_model
from sg_local.llama.tokens import Tokenizer
from sg_local.selfguide.prompts import answer_messages
from sg_local.task import Example

# FastChat's conversation.py, "vicuna_v1.1", as its README shows it.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TASK = """
name = "tiny"
instruction = "Say a or b."
labels = ["a", "b"]
test = "tiny.test.jsonl"
examples = [{input = "the cat sings", output = "a"}, {input = "an ape sings", output = "b"}]
"""
SMALL = [
    "--n-inputs=12", "--max-input-tokens=96", "--n-ctx=512", "--n-parallel=8", "--batch-size=4",
    "--n-threads=1", "--trainer=peft", "--prompt-format=vicuna",
]  # fmt: skip


def published(tokenizer: Tokenizer, model: llama_cpp.llama_vocab_p, text: str) -> list[int]:
    """The ids of a whole prompt string, BOS first, as a server makes them that knows no segments."""
    data = text.encode()
    ids = (llama_cpp.llama_token * 1024)()
    count = llama_cpp.llama_tokenize(model, data, len(data), ids, len(ids), True, True)
    assert 0 < count <= len(ids)
    return list(ids[:count])


def test_prompts_have_the_ids_of_the_published_format(tmp_path: Path) -> None:
    shown = [Example("the cat sings", "a"), Example("an ape sings", "b")]
    cases = {
        f"{SYSTEM} USER: Say a or b.\n\nthe bird ASSISTANT:": answer_messages("Say a or b.", "the bird"),
        f"{SYSTEM} USER: Say a or b.\n\nthe cat sings ASSISTANT: a</s>USER: an ape sings ASSISTANT: b</s>"
        "USER: the bird ASSISTANT:": answer_messages("Say a or b.", "the bird", shown),
    }
    with load_model(write_tiny_llama(tmp_path / "tiny.gguf"), vocab_only=True) as model:
        tokenizer = Tokenizer(model)
        template = tokenizer.chat_template(VICUNA_TEMPLATE)
        for text, messages in cases.items():
            prompt = tokenizer.encode_prompt(template, messages)
            assert prompt == published(tokenizer, model.vocab, text)
            assert prompt[0] == tokenizer.bos
            assert prompt.count(tokenizer.bos) == 1
            answer = tokenizer.encode_answer(template, messages, "b")
            assert prompt + answer == published(tokenizer, model.vocab, f"{text} b</s>")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("vicuna")
    write_tiny_llama(home / "tiny.gguf")
    (home / "tiny.toml").write_text(TASK)
    write_rows(
        home / "tiny.test.jsonl", [{"input": f"the bird {n}", "output": "ab"[n % 2]} for n in range(6)]
    )
    return home


def sg_local(home: Path, *arguments: str, exit_code: int = 0) -> "subprocess.CompletedProcess[str]":
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "SG_LOCAL_HOME": str(home / "store"),
    }
    command = [sys.executable, "-m", "sg_local", *arguments]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        cwd=home,
        timeout=600,
    )
    assert done.returncode == exit_code, done.stderr
    return done


def test_the_whole_loop(home: Path) -> None:
    done = sg_local(home, "run", "tiny.toml", "--model=tiny.gguf", "--run=run", *SMALL)
    assert "tuned_merged" in done.stdout
    manifest = json.loads((home / "run" / "manifest.json").read_text())
    assert manifest["stages"]["train"]["training"]["batches"] == "tree"
    parity = manifest["stages"]["export"]["parity"]
    assert parity["max_logit_difference"] < 0.1 < parity["adapter_effect"]
    assert parity["merged_type"] == "F32"
    assert parity["argmax_equal_share"] == 1
    assert not (home / "run" / "checkpoints").exists()
    assert "A chat between a curious user" in (home / "run" / "Modelfile").read_text()
    # The format that it was trained in, and a template for other programs, which writes the instruction.
    header = read_header(home / "run" / "model.gguf")
    assert header.chat_template == VICUNA_TEMPLATE
    served_template = str(header.metadata["tokenizer.chat_template"])
    assert served_template.endswith(VICUNA_TEMPLATE)
    assert "Say a or b." in served_template

    inputs = read_rows(home / "tiny.test.jsonl")
    lines = sg_local(home, "predict", "--model=run/model.gguf", "tiny.test.jsonl").stdout.splitlines()
    served = [json.loads(line)["output"] for line in lines]
    scored = [row["prediction"] for row in read_rows(home / "run" / "predictions" / "tuned_merged.jsonl")]
    assert served == scored
    assert len(served) == len(inputs)


def test_16_bit_weights_given_beside_the_gguf_are_trained_on(home: Path) -> None:
    write_base_weights(home / "tiny.gguf", home / "hf")
    begin = ["run", "tiny.toml", "--model=tiny.gguf", *SMALL, "--load-in-4bit", "--until=train"]
    done = sg_local(home, *begin, "--run=given", "--base-weights=hf")
    assert f"comparing {home / 'hf'} with tiny.gguf, tensor by tensor" in done.stderr
    assert (home / "given" / "adapter" / "adapter_model.safetensors").exists()
    assert not (home / "given" / ".work").exists()
    training = json.loads((home / "given" / "manifest.json").read_text())["stages"]["train"]["training"]
    assert training["batches"] == "tree"  # under 4-bit weights too

    # Another model's weights are refused before anything is made.
    write_base_weights(write_tiny_llama(home / "other.gguf", seed=1), home / "other")
    done = sg_local(home, *begin, "--run=refused", "--base-weights=other", exit_code=2)
    assert "model.embed_tokens.weight differs from token_embd.weight of tiny.gguf" in done.stderr
    assert not (home / "refused" / "inputs.jsonl").exists()
