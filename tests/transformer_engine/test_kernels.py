"""The kernels of a run are known before its weights are loaded; Transformer Engine's own choice decides."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.transformer_engine.running import ROOT, inside

FUSED, NONE = "NVTE_F16_arbitrary_seqlen", "NVTE_No_Backend"  # what cuDNN's part answers
GPUS: dict[str, dict[str, Any]] = {
    "H100": {"capability": [9, 0], "cudnn": FUSED, "flash": None},
    "A800 without flash-attn": {"capability": [8, 0], "cudnn": NONE, "flash": None},
    "A800 with flash-attn": {"capability": [8, 0], "cudnn": NONE, "flash": "2.8.3"},
    "A800 in fp32": {"capability": [8, 0], "cudnn": NONE, "flash": "2.8.3", "dtype": "float32"},
    "V100": {"capability": [7, 0], "cudnn": NONE, "flash": "2.8.3"},
}


@functools.cache
def said(context: int = 1) -> dict[str, str]:
    gpus = [{"name": name, "dtype": "bfloat16", **gpu} for name, gpu in GPUS.items()]
    [lines] = inside("attention", gpus=gpus, options={"tensor": 2, "context": context, "longest": 8192})
    return dict(zip(GPUS, lines, strict=True))


@pytest.mark.parametrize(
    ("gpu", "attention"),
    [
        ("H100", "cuDNN (NVTE_F16_arbitrary_seqlen)"),
        ("A800 with flash-attn", "flash-attn 2.8.3"),
        ("A800 in fp32", "unfused, there is no other in fp32"),
    ],
)
def test_a_run_says_what_it_runs_on(gpu: str, attention: str) -> None:
    line = f"attention: {attention}; fusions: rope, bias_activation, gradient_accumulation"
    tf32 = "; fp32 products in TF32 (NVIDIA_TF32_OVERRIDE=0 makes them exact)" if "fp32" in gpu else ""
    assert said()[gpu] == f"Transformer Engine's layers; {line}{tf32}"


def test_unfused_attention_stops_a_run_and_says_what_to_install() -> None:
    error = said()["A800 without flash-attn"]
    assert error.startswith("refused: attention: Transformer Engine would take its unfused kernel")
    assert "8192 tokens, on A800 without flash-attn (compute capability 8.0)" in error
    assert "at least 2.1.1 and at most 2.8.3" in error and "flash-attn==2.8.3" in error
    assert "Disabling FusedAttention as no backend supports the provided input" in error
    assert "Disabling FlashAttention 2 for compute capability < sm80" in said()["V100"]


def test_sequences_that_are_cut_need_a_fused_attention() -> None:
    found = said(2)
    assert "attention: cuDNN (NVTE_F16_arbitrary_seqlen);" in found["H100"]
    assert "attention: flash-attn 2.8.3;" in found["A800 with flash-attn"]
    none = "refused: attention: Transformer Engine has none"
    assert found["A800 in fp32"].startswith(f"{none} in fp32 for sequences that are cut, parallel.context = 2;")
    without = found["A800 without flash-attn"]
    assert without.startswith(f"{none} for sequences that are cut, parallel.context = 2, on A800 without flash-attn")


def test_megatron_passes_only_what_transformer_engine_takes() -> None:
    assert inside("packed_call") == [[]]


def test_sequences_that_are_cut_go_round_their_ranks() -> None:
    """Lengths are those of whole sequences, and their padding is no gap: then no kernel but cuDNN's would do."""
    starts = [0, 8, 12]
    expected = ["p2p", [0, 1], "padding_causal", 8, [starts] * 4]
    assert inside("cut_attention", world=2, path=str(tiny.hf_model()[1])) == [[expected] * 4] * 2


def test_a_transformer_engine_that_cannot_be_imported_is_an_error_on_a_gpu(tmp_path: Path) -> None:
    """Megatron-Core goes on without one whose own dependencies are missing; other faults stop its import."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("import nothing_of_this_name\n")
    code = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from megatron_ext.model import kernels, layers\n"
        "from megatron_ext.model.megatron_config import Fusions\n"
        "from tests.train.tiny_run import TINY\n"
        "assert not layers.have_transformer_engine()\n"
        "try: kernels.describe(TINY, tensor=1, dtype=torch.bfloat16, longest=64, fusions=Fusions())\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "Transformer Engine is installed and cannot be imported: ModuleNotFoundError: No module named "
        "'nothing_of_this_name'; build it for this torch and CUDA, or uninstall it"
    )
