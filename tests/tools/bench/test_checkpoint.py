"""What a save costs is told of checkpoints that are right alone."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import cpu_compat
from megatron_ext.config.errors import ConfigError
from megatron_ext.model import parallel
from tests import gloo, warm
from tools.bench import checkpoint

SMALL = {"model": "recipes/tiny/base", "layers": 2}


def test_a_save_is_timed_both_ways(tmp_path: Path) -> None:
    asked = ["--model", SMALL["model"], "--layers", "2", "--repeat", "2", "--out", str(tmp_path)]
    done = warm.run([sys.executable, "-m", "tools.bench", "checkpoint", *asked], timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "checkpoint.json").read_text())
    assert 14 <= found["bytes"] / found["parameters"] < 14.1  # with the padding of the optimizer's buffer
    assert found["ratio"] == pytest.approx(found["background_s"] / found["at_once_s"])
    assert min(found[name] for name in ("at_once_s", "copy_s", "write_s", "publish_s")) > 0
    assert f"{found['ratio']:.1%} of what it costs at once" in done.stdout
    assert not (tmp_path / "checkpoint").exists()


def measured_wrong(rank: int, world: int, folder: Path) -> str:
    module: Any = checkpoint
    cpu_compat.enter()
    parallel.initialize(checkpoint.ONE)
    model = checkpoint.build(argparse.Namespace(**SMALL))
    numbers = itertools.count()
    module.content_of = lambda *_: str(next(numbers))
    with pytest.raises(SystemExit) as refused:
        checkpoint.measure(model, folder, 1)
    return str(refused.value)


def test_of_checkpoints_that_differ_nothing_is_told(tmp_path: Path) -> None:
    [said] = gloo.run(measured_wrong, 1, tmp_path)
    assert said == "bench: 3 different contents of one state, restored: True; nothing is reported"


def too_large(rank: int, world: int) -> str:
    with pytest.raises(ConfigError) as refused:
        checkpoint.build(argparse.Namespace(model="recipes/models/qwen2.5-7b", layers=2000))
    return str(refused.value)


def test_a_model_that_does_not_fit_is_refused_before_it_is_built() -> None:
    [said] = gloo.run(too_large, 1)
    assert said.startswith("--layers: 2000 layers are ") and "ask for fewer" in said
