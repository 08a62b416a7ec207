"""What a struck run has written against an uninterrupted one's, read without the project's own readers.

Files are hashed here, tensors are read by torch's own checkpoint reader. tools.compare_runs has its say as well, as the
command that a user would run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megatron_ext.metrics.glossary import CLOCK
from tests.soak.watched_run import ROOT, WatchedRun

INDEX = ".metadata"  # torch's index: holds a random identifier; its tensors are compared instead


def faults_so_far(run: WatchedRun, reference: WatchedRun) -> list[str]:
    """What is wrong after a life, whatever ended it: every step on the disk is the reference's, and the checkpoint that
    ``latest`` names is whole."""
    own, expected = _steps(run.path / "metrics.jsonl"), _steps(reference.path / "metrics.jsonl")
    found = [_first_difference(*pair) for pair in zip(own, expected, strict=False) if pair[0] != pair[1]][:1]
    if not (latest := run.checkpoints / "latest").exists():
        return found
    name = latest.read_text().strip()
    return found + _damage(run.checkpoints / name) if name else [*found, "latest is empty"]


def differences(run: WatchedRun, reference: WatchedRun) -> list[str]:
    """Everything in which a finished run differs from the reference, in words."""
    found = []
    for name in ("metrics.jsonl", "samples.jsonl"):
        own, expected = _steps(run.path / name), _steps(reference.path / name)
        if own != expected:
            lines = [_first_difference(*pair) for pair in zip(own, expected, strict=False) if pair[0] != pair[1]]
            found.append(f"{name}: {len(own)} lines, expected {len(expected)}; {(lines or ['the rest is equal'])[0]}")
    if (run.path / "config.json").read_text() != (reference.path / "config.json").read_text():
        found.append("config.json differs")
    command = [sys.executable, "-m", "tools.compare_runs", str(run.path), str(reference.path), "--bitwise"]
    compared = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if compared.returncode != 0:
        found.append(f"tools.compare_runs --bitwise: {compared.stdout or compared.stderr}".strip())
    last = f"step_{run.recipe.steps:06d}"
    if run.steps_saved() != run.recipe.steps:
        return [*found, f"the last checkpoint is of step {run.steps_saved()}, expected {run.recipe.steps}"]
    return found + _checkpoint_differences(run.checkpoints / last, reference.checkpoints / last)


def _checkpoint_differences(own: Path, expected: Path) -> list[str]:
    if damage := _damage(own):
        return damage
    found = [f"{own.name}/{name} differs" for name in sorted(_unequal(_hashes(own), _hashes(expected)))]
    return found + _tensor_differences(own, expected) + _state_differences(own, expected)


def _tensor_differences(own: Path, expected: Path) -> list[str]:
    reference = _tensors(expected)
    assert reference, f"{expected} holds no tensors"
    try:
        tensors = _tensors(own)
    except CheckpointException as error:
        return [f"{own.name}: torch cannot read it: {str(error).splitlines()[-1]}"]
    unequal = sorted(_unequal(tensors, reference))
    return [f"{own.name}: {len(unequal)} of {len(reference)} tensors differ, the first {unequal[0]}"] if unequal else []


def _state_differences(own: Path, expected: Path) -> list[str]:
    states = (_flat(torch.load(folder / "state.pt", weights_only=True)) for folder in (own, expected))
    return [f"{own.name}/state.pt: {key} differs" for key in sorted(_unequal(*states))]


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Weights and optimizer, whole, by name."""
    tensors: dict[str, Any] = {}
    _load_state_dict(
        tensors, storage_reader=FileSystemReader(checkpoint), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return _flat(tensors)


def _damage(checkpoint: Path) -> list[str]:
    """What of a checkpoint does not agree with its manifest."""
    try:
        manifest = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
        own = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "MANIFEST.json"}
    except (OSError, ValueError, KeyError) as error:
        return [f"{checkpoint.name}, which latest names, is damaged: {error!r}"]
    sealed = {name: (record["sha256"], record["bytes"]) for name, record in manifest.items()}
    found = {name: (hashlib.sha256(content).hexdigest(), len(content)) for name, content in own.items()}
    return [f"{checkpoint.name}/{name} is not what the manifest says" for name in sorted(_unequal(found, sealed))]


def _hashes(checkpoint: Path) -> dict[str, str]:
    """Of every file that two equal runs have in common."""
    names = (path for path in checkpoint.iterdir() if path.name not in ("MANIFEST.json", INDEX))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


def _steps(file: Path) -> list[dict[str, Any]]:
    """The complete lines, without clock readings; numbers as they are written."""
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    records = (json.loads(line, parse_float=str, parse_int=str) for line in lines)
    return [{key: value for key, value in record.items() if not key.startswith(CLOCK)} for record in records]


def _first_difference(own: dict[str, Any], expected: dict[str, Any]) -> str:
    key = min(_unequal(own, expected))
    return f"step {own.get('step')}: {key} is {own.get(key)}, expected {expected.get(key)}"


def _unequal(own: dict[str, Any], expected: dict[str, Any]) -> set[str]:
    return {key for key in own.keys() | expected.keys() if not _equal(own.get(key), expected.get(key))}


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return torch.equal(one, two)
    return type(one) is type(two) and one == two


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dictionaries and lists by dotted name."""
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, (list, tuple)) and any(isinstance(each, (dict, list, tuple, Tensor)) for each in content):
        items = enumerate(content)
    else:
        return {name: content}
    return {leaf: value for key, each in items for leaf, value in _flat(each, f"{name}.{key}".lstrip(".")).items()}
