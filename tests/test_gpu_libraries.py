"""Without a GPU, installed Transformer Engine and apex change nothing: torch's AdamW takes every step. Megatron-Core
compiles nothing there and loads no logger, which others still find."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = """
import torch


def refuse(*arguments, **options):
    raise RuntimeError("expected a CUDA tensor")


class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, adam_w_mode=True, **options):
        super().__init__(params, **options)

    step = refuse


class FusedSGD(FusedAdam):
    pass


multi_tensor_applier = multi_tensor_scale = multi_tensor_l2norm = refuse
"""
INSTALLED = {  # files of each case: kernels that take tensors on a GPU only, and an import that wants its driver
    "Transformer Engine": {
        "transformer_engine/__init__.py": '__version__ = "2.11.0"\nfrom transformer_engine import pytorch\n',
        "transformer_engine/pytorch/__init__.py": "",
        "transformer_engine/pytorch/optimizers.py": KERNELS,
    },
    "apex": {
        "apex/__init__.py": "",
        "apex/optimizers.py": KERNELS,
        "apex/multi_tensor_apply.py": "from apex.optimizers import multi_tensor_applier\n",
        "amp_C.py": "from apex.optimizers import multi_tensor_scale, multi_tensor_l2norm\n",
    },
    "no driver": {"transformer_engine/__init__.py": 'raise OSError("libcuda.so.1: cannot open shared object file")\n'},
}
COMMANDS = """
import importlib.util, pathlib, sys
from megatron_ext.gpu_libraries import LOGGERS
from tests.train import whole_run
from tools import train
recipe = "siren/siren-tiny-cpu.toml"
assert any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex"))
from megatron.core import jit
assert jit.jit_fuser(len) is len and not {"wandb", "tensorboard"} & set(sys.modules)
assert all(type(importlib.util.find_spec(name).loader).__module__ != "megatron_ext.gpu_libraries" for name in LOGGERS)
assert train.main([f"recipes/{recipe}", "--dry-run"]) == 0
assert whole_run.train(pathlib.Path(sys.argv[1]), recipe, "train.steps=1") == 0
"""


HALF_INSTALLED = """
import torch
torch.cuda.is_available = lambda: True
import megatron_ext
try:
    import transformer_engine
except ImportError as error:
    print(error)
"""


def test_a_library_whose_import_fails_on_a_gpu_is_as_good_as_missing(tmp_path: Path) -> None:
    """As Transformer Engine without its compiled parts, whose error Megatron-Core would not expect."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text('raise RuntimeError("Found empty meta package")\n')
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", HALF_INSTALLED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "transformer_engine: RuntimeError: Found empty meta package\n", done.stderr


@pytest.mark.parametrize("case", INSTALLED)
def test_the_dry_run_and_a_step_are_torchs(case: str, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    for name, text in INSTALLED[case].items():
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{installed}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(tmp_path / "runs")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_only_what_is_installed_is_hidden() -> None:
    """A missing package stays missing, and others are none of its business."""
    assert importlib.util.find_spec("transformer_engine") is None
    with pytest.raises(ModuleNotFoundError, match="No module named 'transformer_engine'"):
        importlib.import_module("transformer_engine")
