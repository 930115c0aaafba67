"""An adapter from elsewhere becomes GGUF files that llama.cpp runs as torch does, or nothing is left behind."""

import importlib.util
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_models import adapter_arrays, names_in, write_peft
from tiny_models import write_tiny_llama

import sg_local.proof.parity as parity_module
import sg_local.stages.export as export_module
from sg_local.errors import InputError, SgLocalError
from sg_local.gguf_header import read_header
from sg_local.gguf_io.adapter import read_adapter_gguf
from sg_local.gguf_io.fingerprint import fingerprint
from sg_local.gguf_io.tensors import lora_targets
from sg_local.llama.quantize import requantize
from sg_local.settings import Settings
from sg_local.stages.export import export_adapter

for package in ("torch", "transformers", "peft"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

SETTINGS = Settings(n_ctx=512, n_threads=1)
SMALL = adapter_arrays(scale=0.1)  # as adapters are: far less than the weights
ALL = {"target_modules": list(lora_targets("llama"))}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SG_LOCAL_HOME", str(tmp_path / "store"))
    return write_tiny_llama(tmp_path / "tiny.gguf", scale=0.15)


def test_an_adapter_from_elsewhere_is_exported_and_proved(base: Path, tmp_path: Path) -> None:
    adapter_dir = write_peft(tmp_path / "my-lora", {"lora_alpha": 8, **ALL}, SMALL)
    parity = export_adapter(adapter_dir, str(base), tmp_path / "out", SETTINGS)
    assert parity.max_logit_difference < 0.1 < 1 < parity.adapter_effect
    assert names_in(tmp_path / "out") == {"adapter.gguf", "model.gguf", "parity.json"}
    assert json.loads((tmp_path / "out" / "parity.json").read_text()) == parity.as_dict()
    assert read_adapter_gguf(tmp_path / "out" / "adapter.gguf").alpha == 8
    for name in ("adapter.gguf", "model.gguf"):
        metadata = read_header(tmp_path / "out" / name).metadata
        assert metadata["general.name"] == "tiny with my-lora"
        assert metadata["general.license"] == "unknown"
        assert metadata["sg_local.base_fingerprint"] == fingerprint(base)

    before = (tmp_path / "out" / "model.gguf").read_bytes()
    with pytest.raises(
        InputError, match=r"adapter\.gguf exists already: move it away, or give another --out"
    ):
        export_adapter(adapter_dir, str(base), tmp_path / "out", SETTINGS)
    assert (tmp_path / "out" / "model.gguf").read_bytes() == before


def test_another_quantization_is_proved_too(base: Path, tmp_path: Path) -> None:
    settings = Settings(n_ctx=512, n_threads=1, quant="Q8_0")
    parity = export_adapter(write_peft(tmp_path / "lora", ALL, SMALL), str(base), tmp_path / "out", settings)
    assert parity.merged_type == "Q8_0"


def test_where_the_types_of_the_base_are_too_coarse_the_merged_file_is_finer(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coarse = tmp_path / "tiny.Q4_0.gguf"
    requantize(base, coarse, "Q4_0", 1)
    adapter_dir = write_peft(tmp_path / "lora", ALL, SMALL)
    parity = export_adapter(adapter_dir, str(coarse), tmp_path / "fits", SETTINGS)
    assert parity.merged_type == "Q4_0"

    monkeypatch.setattr(parity_module, "MAX_MEAN_KL_NATS_COARSER", parity.mean_kl_nats / 100)
    capsys.readouterr()
    finer = export_adapter(adapter_dir, str(coarse), tmp_path / "finer", SETTINGS)
    assert finer.merged_type == "Q8_0"
    assert finer.mean_kl_nats < parity.mean_kl_nats
    told = capsys.readouterr().err
    assert "model.gguf (the types of the base, Q8_0 for the attention and ffn_down)" in told
    assert "too coarse for what was trained, trying Q8_0" in told
    assert names_in(tmp_path / "finer") == {"adapter.gguf", "model.gguf", "parity.json"}
    types = {tensor.type_name for tensor in read_header(tmp_path / "finer" / "model.gguf").tensors}
    assert "Q4_0" not in types

    # Types that were asked for are not left by themselves.
    for quant in ("base", "Q4_0"):
        with pytest.raises(SgLocalError, match=r"Q4_0 is too coarse .*--quant Q8_0"):
            export_adapter(adapter_dir, str(coarse), tmp_path / quant, replace(SETTINGS, quant=quant))
        assert not (tmp_path / quant).exists()


def test_an_export_that_is_not_the_trained_model_leaves_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that forgets to look at alpha, the commonest fault of its kind."""
    adapter_dir = write_peft(tmp_path / "lora", {"lora_alpha": 8, **ALL}, SMALL)
    wrong_dir = write_peft(tmp_path / "wrong", {"lora_alpha": 4})
    right = export_module.write_adapter_gguf
    monkeypatch.setattr(export_module, "write_adapter_gguf", lambda _dir, *rest: right(wrong_dir, *rest))
    with pytest.raises(
        SgLocalError, match=r"differs from the trained adapter in torch by \d.* Nothing was exported"
    ):
        export_adapter(adapter_dir, str(base), tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


_KILLED_IN_THE_MERGE = """
import os, signal, sys
from pathlib import Path
import sg_local.gguf_io.merge as merge
from sg_local.settings import Settings
from sg_local.stages.export import export_adapter
calls = 0
def tensor_data(*arguments, right=merge._tensor_data):
    global calls
    calls += 1
    if calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*arguments)
merge._tensor_data = tensor_data
export_adapter(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Settings(n_ctx=512, n_threads=1))
"""


def test_a_killed_merge_leaves_nothing_finished_and_the_next_call_ends_it(base: Path, tmp_path: Path) -> None:
    adapter_dir = write_peft(tmp_path / "lora", ALL, SMALL)
    command = [sys.executable, "-c", _KILLED_IN_THE_MERGE, str(adapter_dir), str(base), str(tmp_path / "out")]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert names_in(tmp_path / "out") == {".sg-local-export"}
    assert "model.gguf" not in names_in(tmp_path / "out" / ".sg-local-export")
    export_adapter(adapter_dir, str(base), tmp_path / "out", SETTINGS)
    assert names_in(tmp_path / "out") == {"adapter.gguf", "model.gguf", "parity.json"}


def test_what_is_no_whole_adapter_is_refused_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    arrays = adapter_arrays()
    truncated = write_peft(tmp_path / "truncated")
    weights = truncated / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    name = sorted(arrays)[3]
    arrays[name][0, 0] = np.nan
    cases = {
        truncated: "is not a safetensors file",
        write_peft(tmp_path / "nan", arrays=arrays): "has NaN or infinite values",
        write_peft(tmp_path / "dora", {"use_dora": True}): "use_dora is True",
        write_peft(tmp_path / "rslora", {"use_rslora": True}): "use_rslora is True",
        tmp_path / "missing": "adapter_config.json",
    }
    for adapter_dir, reason in cases.items():
        with pytest.raises(InputError, match=reason):
            export_adapter(adapter_dir, str(base), tmp_path / "out", SETTINGS)
        assert not (tmp_path / "out").exists()
