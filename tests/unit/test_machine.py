"""Which card is used where there are several, or some are hidden: one, the same for plan, llama.cpp and torch."""

import os
from pathlib import Path

import pytest
from command_line import Call
from messages import assert_says

from sg_local.plan import machine
from sg_local.plan.machine import card_bytes_in_use, card_in_use, use_one_card

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")

SMALL, LARGE = "NVIDIA GeForce GT 1030, 2048 MiB", "NVIDIA GeForce RTX 3090, 24576 MiB"
TWO_CARDS = f"""#!/bin/sh
card=; what=
while [ $# -gt 0 ]; do
    case $1 in -i) card=$2; shift;; --query-gpu=*) what=$1;; esac
    shift
done
used() {{ if [ "$what" = --query-gpu=memory.used ]; then echo "$1 MiB"; else echo "$2"; fi; }}
case $card in
    "") used 100 '{SMALL}'; used 9000 '{LARGE}';;
    0) used 100 '{SMALL}';;
    1|GPU-5b) used 9000 '{LARGE}';;
    *) echo 'No devices were found'; exit 6;;
esac
"""


@pytest.fixture
def two_cards(nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small card for the screen in the first place, and the one to compute with."""
    nvidia.write_text(TWO_CARDS)
    nvidia.chmod(0o755)
    # Set first, so that they are as before in the end, whatever the test's subject sets.
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return nvidia


@pytest.mark.parametrize(
    ("shown", "used", "for_cuda"),
    [
        (None, LARGE, "1"),
        ("0", SMALL, "0"),
        ("1", LARGE, "1"),
        ("1,0", LARGE, "1"),  # a trainer would spread the batch over both
        (" 0 , 1", SMALL, "0"),
        ("GPU-5b", LARGE, "GPU-5b"),
        ("", "", "-1"),
        ("-1", "", "-1"),
        ("NoDevFiles", "", "-1"),
        ("7", "", "7"),
        ("MIG-77e6", "", "MIG-77e6"),  # a part of a card, of which nvidia-smi says nothing in this way
    ],
)
def test_one_card_is_used_and_it_is_the_one_that_is_told(
    two_cards: Path, monkeypatch: pytest.MonkeyPatch, shown: str | None, used: str, for_cuda: str
) -> None:
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert card_in_use() == used
    use_one_card()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == for_cuda
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"  # as nvidia-smi counts
    assert card_in_use() == used


def test_the_order_of_cards_is_the_users_own(two_cards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    use_one_card()
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_without_a_card_cuda_is_shown_the_first(nvidia: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    use_one_card()  # a card of AMD, which hears to the same variable
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert (card_in_use(), card_bytes_in_use()) == ("", 0)


def test_linux_in_windows_has_its_driver_in_a_place_of_its_own(
    two_cards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card_in_use() == ""
    monkeypatch.setattr(machine, "_NVIDIA_SMI_OF_WSL", str(two_cards))
    assert card_in_use() == LARGE


def test_plan_and_doctor_look_at_the_card_that_is_used(
    sg: Call, two_cards: Path, task: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sg_local.plan.doctor.TRY_TORCH", "")
    assert_says(sg("doctor").stdout, SMALL, LARGE, f"used: {LARGE}")
    result = sg("plan", task, "--model", model)
    assert "NVIDIA GeForce RTX 3090" in result.stdout.splitlines()[0]
    assert_says(result.stdout, "other programs hold 8.8 GiB", "close them")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    result = sg("plan", task, "--model", model)
    assert "NVIDIA GeForce GT 1030" in result.stdout.splitlines()[0]
    assert "other programs" not in result.stdout  # 5 % of the card: a desktop
    assert "other programs" not in sg("plan", task, "--model", model, "--gpu-memory", 24).stdout
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "on the CPU" in sg("plan", task, "--model", model).stdout.splitlines()[0]
    assert_says(sg("doctor").stdout, "CUDA_VISIBLE_DEVICES=-1 is none of them")
