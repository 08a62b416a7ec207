"""A checkpoint whose manifest has configuration keys of before: its run goes on under today's names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_ext.checkpoint import manifest
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.train.resume import check_resume
from tests.train import whole_run

RECIPE = "siren/siren-tiny-cpu.toml"
OLD = {"tensor_parallel_size": "tensor", "gpu_memory_utilization": "memory_share", "enforce_eager": "eager"}


def canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def give_old_keys(path: Path) -> None:
    """Seal the checkpoint ``path`` again as it was before [rollout] and the nucleus had vLLM's and our new names."""
    content = json.loads((path / "MANIFEST.json").read_text())
    del content["digest"]
    rollout, method = content["config"]["rollout"], content["config"]["method"]
    for new, old in OLD.items():
        rollout[old] = rollout.pop(new)
    assert method["nucleus"] == "inclusive"
    method["nucleus"] = "reach"
    content["config_hash"] = hashlib.sha256(canonical(content["config"])).hexdigest()
    content["digest"] = hashlib.sha256(canonical(content)).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(content))


def test_a_checkpoint_with_old_keys_resumes_with_the_same_bits(tmp_path: Path) -> None:
    options = ('method.nucleus="inclusive"', "rollout.gpu_memory_utilization=0.4")
    assert whole_run.train(tmp_path, RECIPE, *options) == 0
    expected = whole_run.metrics(tmp_path), whole_run.contents(tmp_path, 2)
    checkpoints = tmp_path / "run" / "checkpoints"
    give_old_keys(checkpoints / "step_000001")
    (checkpoints / "step_000002" / "MANIFEST.json").unlink()
    assert manifest.verify(checkpoints / "step_000001").config["rollout"]["memory_share"] == 0.4
    assert whole_run.train(tmp_path, RECIPE, *options) == 0
    assert (whole_run.metrics(tmp_path), whole_run.contents(tmp_path, 2)) == expected

    saved = manifest.verify(checkpoints / "step_000001").config
    other = load_config(whole_run.RECIPES / RECIPE, ['method.nucleus="exclusive"'])
    with pytest.raises(ConfigError, match="method.nucleus: checkpoint 'inclusive', now 'exclusive'"):
        check_resume(saved, other.model_dump())
