"""What a cluster is checked for before a bench places a run on it, without Ray: nodes as Ray lists them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Call
from messages import assert_says

from sg_local.bench.cluster import ClusterOptions, Node, Share, compared, is_public, require_able, share_of
from sg_local.bench.node import Needs, NodeFacts
from sg_local.errors import InputError

GIB = 1024**3
VERSIONS = {
    "torch": "2.13.0",
    "llama-cpp-python": "0.3.36",
    "unsloth": "2026.10.9",
    "sg-local": "9f2c41d07ab35e66",
}
CARDS = ["NVIDIA GeForce RTX 3060, 12288 MiB"]
NEEDS = Needs(
    bench="/home/me/benches/everyday",
    bench_id="5d1c",
    probe=".probe",
    model="/home/me/tiny.gguf",
    model_sha256="00",
    model_bytes=7,
    trainer="unsloth",
    base_weights="",
    disk_bytes=9,
    versions=VERSIONS,
    on_node_disk=False,
    keep_remote=False,
)
FACTS = NodeFacts(VERSIONS, 64 * GIB, CARDS, shares_bench=False, model="missing", faults=[])


def node(name: str, cpus: float = 16, gpus: float = 0, memory_bytes: int = 64 * GIB) -> Node:
    return Node(name, name, cpus, gpus, memory_bytes)


def refusal(facts: dict[str, NodeFacts], needs: Needs = NEEDS, gpu_bytes: int = 0) -> list[str]:
    with pytest.raises(InputError) as caught:
        compared(needs, [node(name) for name in facts], facts, {}, gpu_bytes)
    return str(caught.value).splitlines()


def test_a_run_gets_a_gpu_and_its_part_of_the_processors() -> None:
    nodes = [node("head", cpus=4), node("a", 32, gpus=4), node("b", 16, gpus=1)]
    share = share_of(ClusterOptions("auto"), nodes)
    assert (share.gpus, share.cpus) == (1, 8)
    assert [share.slots(one) for one in nodes] == [0, 4, 1]
    assert share_of(ClusterOptions("auto", gpus_per_run=0), nodes) == Share(4, 0, 0)
    assert share_of(ClusterOptions("auto", cpus_per_run=2), nodes).cpus == 2
    assert share_of(ClusterOptions("auto"), nodes[:1]) == Share(4, 0, 0)


def test_what_no_node_can_ever_hold_is_refused() -> None:
    nodes = [node("a", 32, gpus=1, memory_bytes=8 * GIB), node("b", 4, memory_bytes=64 * GIB)]
    assert require_able(nodes, Share(8, 1, 8 * GIB)) == nodes[:1]
    for share in (Share(8, 1, 9 * GIB), Share(33, 0, 1), Share(1, 2, 1)):
        with pytest.raises(InputError) as caught:
            require_able(nodes, share)
        assert_says(str(caught.value), f"{share.cpus} CPUs", "a: 32 CPUs, 1 GPUs, 8.0 GiB", "b: 4 CPUs")


def test_other_versions_are_refused_all_at_once() -> None:
    lines = refusal(
        {
            "a": replace(FACTS, versions={**VERSIONS, "torch": "2.12.0"}),
            "b": FACTS,
            "c": replace(FACTS, versions={**VERSIONS, "sg-local": "0000", "llama-cpp-python": "0.3.35"}),
        }
    )
    assert len(lines) == 2
    assert_says(lines[0], "a has torch 2.12.0 (here 2.13.0)", "would not compare")
    assert_says(lines[1], "c has", "llama-cpp-python 0.3.35 (here 0.3.36)", "sg-local 0000")


def test_a_machine_without_torch_compares_what_the_nodes_have() -> None:
    here = replace(NEEDS, versions={"sg-local": VERSIONS["sg-local"]})
    other = replace(FACTS, versions={**VERSIONS, "torch": "2.12.0"})
    assert compared(here, [node("a")], {"a": FACTS}, {}, 0)[0].versions == VERSIONS
    (line,) = refusal({"a": FACTS, "b": other}, here)
    assert_says(line, "b has torch 2.12.0")


def test_unsloth_may_differ_where_it_does_not_train() -> None:
    other = replace(FACTS, versions={**VERSIONS, "unsloth": "2026.9.1"})
    assert refusal({"a": FACTS, "b": other})
    assert compared(replace(NEEDS, trainer="peft"), [node("a"), node("b")], {"a": FACTS, "b": other}, {}, 0)


def test_a_node_that_lacks_something_is_left_out_with_the_reason() -> None:
    full = replace(FACTS, faults=["nothing of disk is free"])
    small = replace(FACTS, gpus=["NVIDIA T4, 4096 MiB"])
    nodes = [node("a"), node("b"), node("c"), node("d")]
    faults = {"d": "sg_local cannot work there"}
    _, left_out = compared(NEEDS, nodes, {"a": FACTS, "b": full, "c": small}, faults, 6 * GIB)
    assert list(left_out) == ["d", "b", "c"]
    assert_says(left_out["c"], "4.0 GiB", "6.0 GiB")
    (first, second) = refusal({"b": full, "c": small}, gpu_bytes=6 * GIB)
    assert_says(first, "b: nothing of disk is free")
    assert_says(second, "c: a card has 4.0 GiB")


@pytest.mark.parametrize(
    ("address", "is_outside"),
    [
        ("127.0.0.1", False),
        ("10.0.0.7", False),
        ("192.168.1.4", False),
        ("fe80::1", False),
        ("8.8.8.8", True),
    ],
)
def test_addresses_outside_of_private_networks(address: str, is_outside: bool) -> None:
    assert is_public(address) == is_outside


# The command


def test_without_ray_the_command_says_how_to_get_it(
    sg: Call, task: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (task.parent / "tasks").mkdir()
    for path in (task, task.with_name("inbox.test.jsonl")):
        path.rename(task.parent / "tasks" / path.name)
    result = sg("bench", task.parent / "tasks", "--model", model, "--ray", "auto")
    assert result.exit_code == 2
    assert_says(result.stderr, "pip install 'sg-local[cluster]'")


def test_what_cannot_go_together_is_refused(sg: Call, task: Path, model: Path) -> None:
    arguments = ("bench", task.parent, "--model", model)
    for options, told in (
        (["--keep-remote"], "--ray auto"),
        (["--gpus-per-run", "0"], "--ray auto"),
        (["--ray", "ray://10.0.0.7:10001"], "--ray auto"),
        (["--ray", "auto", "--keep-remote", "--ablate", "quant=Q8_0"], "quant=Q8_0"),
    ):
        result = sg(*arguments, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert_says(result.stderr.splitlines()[-1], told)
