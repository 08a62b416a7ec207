"""Checkpoints on disk: whatever is done to their files, a reader ends with the checkpoint before or with a message.

The checkpoints are real ones of the tiny model, read by the commands that read them. Damage alone must always be
noticed; of files whose hashes were made to fit again only a message or a result is asked, in bounded time and memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.checkpoint.manifest import CheckpointError, Found, newest_valid
from tests import gloo
from tests.properties.oddities import SPOILERS, damaged, limits, mutated, to_bytes, to_json
from tests.tiny import hf_model
from tests.train.tiny_run import Trainer
from tools import convert

EXPENSIVE = max(5, settings().max_examples // 10)
PAYLOAD = ("__0_0.distcp", ".metadata", "common.pt", "state.pt", "metadata.json")


def _two_saves(rank: int, world: int, root: Path) -> None:
    run = Trainer(world).fill(1)
    torch.manual_seed(0)
    for step in (1, 2):
        run.train(1).save(root, step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("saved") / "checkpoints"
    gloo.run(_two_saves, 1, root)
    return root


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a tiny Hugging Face model as a checkpoint."""
    root = tmp_path_factory.mktemp("converted") / "checkpoints"
    assert to_code("from-hf", hf_model()[1], root) == 0
    return root


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(root, Path(folder) / "checkpoints"))


def newest(root: Path) -> Found | None:
    """What a run would go on from; None where it would refuse, with a message."""
    with limits():
        try:
            return newest_valid(root)
        except CheckpointError as error:
            assert len(str(error)) > 20
            return None


def to_code(*arguments: object) -> int:
    """The exit code of a conversion, which says why where it is not 0."""
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err), limits():
        code = convert.main([str(each) for each in arguments])
    assert code == 0 or (code == 2 and len(err.getvalue()) > 20)
    return code


def reseal(step: Path, content: Any = None) -> None:
    """Make sizes and hashes of the manifest, or of ``content`` in its place, fit: what an attacker can do."""
    if content is None:
        content = json.loads((step / "MANIFEST.json").read_text())
        for name in content["files"]:
            raw = (step / name).read_bytes()
            content["files"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    if isinstance(content, dict):
        content.pop("digest", None)
        try:
            plain = json.dumps(json.loads(to_json(content)), sort_keys=True, separators=(",", ":"))
            content["digest"] = hashlib.sha256(plain.encode()).hexdigest()
        except (ValueError, RecursionError):
            pass  # no JSON: nothing that could be sealed
    (step / "MANIFEST.json").write_bytes(to_bytes(to_json(content)))


@given(data=st.data())
def test_any_change_of_a_manifest_is_noticed(data: st.DataObject, saved: Path) -> None:
    manifest = (saved / "step_000002" / "MANIFEST.json").read_bytes()
    content = json.loads(manifest)
    new = data.draw(mutated(content).map(to_json).map(to_bytes) | damaged(manifest))
    try:
        same = json.loads(new) == content and b"true" not in new  # 1 == True
    except (ValueError, RecursionError):
        same = False
    with copied(saved) as root:
        (root / "step_000002" / "MANIFEST.json").write_bytes(new)
        found = newest(root)
        assert found is not None and found.manifest.step == (2 if same else 1)
        assert same or any("step_000002: " in line for line in found.refused)


@given(data=st.data())
def test_a_manifest_that_was_sealed_again_is_a_checkpoint_or_a_message(data: st.DataObject, saved: Path) -> None:
    content = json.loads((saved / "step_000002" / "MANIFEST.json").read_text())
    content.pop("digest")
    with copied(saved) as root:
        reseal(root / "step_000002", data.draw(mutated(content)))
        found = newest(root)
        assert found is not None and found.manifest.step in (1, 2)
        if found.manifest.step == 2:
            assert set(found.manifest.files) == set(PAYLOAD)
            assert isinstance(found.manifest.config, dict) and isinstance(found.manifest.layout, dict)


@given(
    text=st.binary(max_size=30)
    | st.sampled_from([b"step_000001", b"step_000009", b"step_" + b"9" * 5000, b"../..", b""])
)
def test_a_tracker_of_any_text(text: bytes, saved: Path) -> None:
    with copied(saved) as root:
        (root / "latest").write_bytes(text)
        found = newest(root)
        assert found is not None and found.manifest.step == (1 if text.strip() == b"step_000001" else 2)


@pytest.mark.parametrize("how", SPOILERS)
@pytest.mark.parametrize("name", [*PAYLOAD, "MANIFEST.json", "latest", "step_000002"])
def test_what_is_no_file(how: str, name: str, saved: Path) -> None:
    with copied(saved) as root:
        if name in ("latest", "step_000002"):
            if name != "latest" and how == "10 GB of zeros":
                return
            SPOILERS[how](root / name)
        else:
            SPOILERS[how](root / "step_000002" / name)
        found = newest(root)
        assert found is not None and found.manifest.step == (2 if name == "latest" else 1) and found.refused


@settings(max_examples=EXPENSIVE)
@given(data=st.data())
def test_an_export_of_files_that_were_sealed_again(data: st.DataObject, converted: Path) -> None:
    """The index is a pickle and the shards are torch's: nothing of them may run, and none may end in a traceback."""
    with copied(converted) as root:
        step = root / "step_000000"
        name = data.draw(st.sampled_from([".metadata", "__0_0.distcp", "common.pt", "metadata.json"]))
        (step / name).write_bytes(data.draw(damaged((step / name).read_bytes())))
        reseal(step)
        to_code("to-hf", step, root / "hf", "--model", hf_model()[1])


@settings(max_examples=EXPENSIVE)
@given(data=st.data())
def test_an_export_of_a_manifest_that_was_sealed_again(data: st.DataObject, converted: Path) -> None:
    with copied(converted) as root:
        step = root / "step_000000"
        content = json.loads((step / "MANIFEST.json").read_text())
        content.pop("digest")
        content["config"] = data.draw(mutated(content["config"]))
        reseal(step, content)
        to_code("to-hf", step, root / "hf")


def _load_each(rank: int, world: int, roots: list[Path]) -> list[str]:
    """What loading each of them ended in: a step or a message."""
    outcomes, run = [], Trainer(world).fill(3)
    for root in roots:
        try:
            with limits():
                outcomes.append(str(run.load(root).step))
        except CheckpointError as error:
            outcomes.append(str(error))
    return outcomes


@settings(max_examples=max(1, EXPENSIVE // 5))
@given(data=st.data())
def test_a_resume_from_files_that_were_sealed_again(data: st.DataObject, saved: Path) -> None:
    """Many at once, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        roots = []
        for number in range(8):
            roots.append(Path(shutil.copytree(saved, Path(folder) / str(number))))
            step = roots[-1] / "step_000002"
            name = data.draw(st.sampled_from(PAYLOAD))
            (step / name).write_bytes(data.draw(damaged((step / name).read_bytes())))
            reseal(step)
        outcomes = gloo.run(_load_each, 1, roots, timeout=300)[0]
        assert len(outcomes) == 8 and all(outcome in ("1", "2") or len(outcome) > 10 for outcome in outcomes)
