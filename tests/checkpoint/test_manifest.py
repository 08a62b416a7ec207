"""A checkpoint directory survives kills, full disks and damaged files; nothing damaged is ever trusted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.manifest import CheckpointError, newest_valid, read_manifest, verify
from tests.checkpoint import faults

SHARDS = {"__0_0.distcp": b"weights" * 100, ".metadata": b"where", "deep/common.pt": b"state"}


def save(root: Path, step: int, keep: int = 2, trusted: dict[str, manifest.Stamp] | None = None) -> Path:
    partial = manifest.open_partial(root, step)
    for name, content in SHARDS.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content + b"%d" % step)
    files = manifest.record_files(partial, manifest.payload_names(partial))
    for name in files:
        with (partial / name).open() as file:
            os.fsync(file.fileno())
    path = manifest.publish(partial, step=step, files=files, layout={"tensor": 2}, config={"a": {"b": 1e-6}})
    remove_old(root, step, keep, trusted=trusted)
    return path


def remove_old(
    root: Path, step: int, keep: int, *, trusted: dict[str, manifest.Stamp] | None = None, best: int | None = None
) -> None:
    """As Checkpoints does it, but at once."""
    hashing = manifest.record_files
    for path in manifest.retain(root, step=step, keep=keep, trusted=trusted or {}, hash_files=hashing, best=best):
        manifest.remove(path)


def steps(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def resumed(root: Path) -> int:
    found = newest_valid(root)
    assert found is not None
    return found.manifest.step


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_checkpoint_states_the_true_hash_of_every_file(tmp_path):
    path = save(tmp_path, 10)
    content = json.loads((path / "MANIFEST.json").read_text())
    assert path.name == "step_000010" and (tmp_path / "latest").read_text() == "step_000010\n"
    assert set(content["files"]) == set(SHARDS)
    for name, record in content["files"].items():
        raw = (path / name).read_bytes()
        assert record == {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    assert content["step"] == 10 and content["layout"] == {"tensor": 2} and content["config"] == {"a": {"b": 1e-6}}
    assert content["config_hash"] == manifest.config_hash({"a": {"b": 1e-6}})
    assert content["versions"]["torch"].startswith("2.") and "megatron-core" in content["versions"]
    found = newest_valid(tmp_path)
    assert found and found.path == path and found.refused == () and found.manifest == read_manifest(path)


def test_nothing_is_renamed_before_it_is_on_the_disk(tmp_path):
    def action() -> None:
        log: list[str] = []
        rename, fsync = os.rename, os.fsync

        def noted_rename(source, target):
            log.append(f"rename {Path(target).name}")
            rename(source, target)

        def noted_replace(source, target):
            log.append(f"replace {Path(target).name}")
            rename(source, target)

        def noted_fsync(descriptor):
            log.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            fsync(descriptor)

        os.rename, os.replace, os.fsync = noted_rename, noted_replace, noted_fsync
        save(tmp_path, 10)
        log = ["step.tmp" if entry.startswith("step_000010.tmp-") else entry for entry in log]
        first = log.index("MANIFEST.json")
        assert sorted(log[:first]) == sorted(Path(name).name for name in SHARDS)
        assert sorted(log[first + 1 : first + 3]) == ["deep", "step.tmp"]
        assert log[first + 3 : first + 5] == ["rename step_000010", tmp_path.name]
        assert log[first + 5].startswith("latest.tmp-") and log[first + 6 :] == ["replace latest", tmp_path.name]

    assert faults.child(action) == 0


@pytest.mark.parametrize("again", [False, True], ids=["next-step", "same-step-again"])
def test_a_save_killed_anywhere_leaves_what_was_committed(tmp_path, again):
    root, step = tmp_path / "root", 10 if again else 20

    def prepare() -> None:
        shutil.rmtree(root, ignore_errors=True)
        save(root, 10, keep=1)

    points = 0
    for point in faults.killed_everywhere(root, prepare, lambda: save(root, step, keep=1)):
        points += 1
        committed = (root / "latest").read_text().strip()
        found = newest_valid(root)
        assert found is not None, point
        assert found.manifest.step == int(committed.removeprefix("step_")), point
        passed_over = [name for name in steps(root) if ".tmp-" in name or "step_000010" == committed < name[:11]]
        passed_over = [name for name in passed_over if name != found.path.name and "replaced" not in name]
        assert all(any(line.startswith(name) for line in found.refused) for name in passed_over), point
        save(root, step, keep=1)
        assert steps(root) == ["latest", manifest.step_name(step)], point
    assert points > 15


def test_a_save_killed_before_its_commit_resumes_from_the_older_step_and_names_both(tmp_path):
    save(tmp_path, 10)
    newer = save(tmp_path, 20)
    manifest.commit(tmp_path, "step_000010")
    found = newest_valid(tmp_path)
    assert found and found.manifest.step == 10
    assert [line for line in found.refused if "step_000020" in line and "step_000010" in line]
    flip(tmp_path / "step_000010" / ".metadata", 3)
    assert resumed(tmp_path) == 20, "a valid checkpoint is better than none"
    flip(newer / ".metadata", 3)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        newest_valid(tmp_path)


@pytest.mark.parametrize("point", range(1, 21))  # the 20th replaces the tracker
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, point):
    save(tmp_path, 10)

    def action() -> None:
        faults.full_at(tmp_path, point)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 20)

    assert faults.child(action) == 0
    assert resumed(tmp_path) == 10
    assert not [name for name in steps(tmp_path) if name.startswith("latest.tmp")]


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("damage", ["bit", "truncate", "empty", "delete", "other step", "directory"])
def test_damage_to_a_file_is_refused_by_name_and_hash(tmp_path, name, damage):
    save(tmp_path, 10)
    path = save(tmp_path, 20) / name
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    if damage == "bit":
        flip(path, 13)
    elif damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other step":
        shutil.copy(tmp_path / "step_000010" / name, path)
    else:
        path.unlink()
        if damage == "directory":
            path.mkdir()
    found = newest_valid(tmp_path)
    assert found and found.manifest.step == 10
    (line,) = found.refused
    assert line.startswith(f"step_000020: {name}") and good in line
    if path.is_file():  # one of another size is refused unread
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        assert actual in line or (damage in ("truncate", "empty") and f"found {path.stat().st_size} bytes" in line)
    with pytest.raises(CheckpointError, match="step_000020"):
        verify(tmp_path / "step_000020")


def test_a_flipped_bit_of_the_manifest_is_seen(tmp_path):
    path = save(tmp_path, 10)
    file = path / "MANIFEST.json"
    good = file.read_bytes()
    for bit in range(0, 8 * len(good), 13):  # 13 and 8 are coprime: every bit position
        flip(file, bit)
        with pytest.raises(CheckpointError, match=r"step_000010: .*MANIFEST.json"):
            read_manifest(path)
        file.write_bytes(good)
    for content in (b"", b"[]", b"{}", b"null", good[:-1], b"[" * 100_000, b"\xff\xfe"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="MANIFEST.json"):
            read_manifest(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="MANIFEST.json is missing"):
        newest_valid(tmp_path)


def test_a_file_written_where_this_rank_cannot_see_it_fails_the_save(tmp_path):
    partial = manifest.open_partial(tmp_path, 10)
    (partial / "__0_0.distcp").write_bytes(b"here")
    files = manifest.record_files(partial, ["__0_0.distcp"])
    elsewhere = {"__1_0.distcp": manifest.Record("0" * 64, 4)}
    with pytest.raises(CheckpointError, match="__1_0.distcp.*shared by all nodes"):
        manifest.publish(partial, step=10, files=files | elsewhere, layout={}, config={})
    assert newest_valid(tmp_path) is None


def test_mixed_steps_and_foreign_files_are_refused(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    shutil.copytree(tmp_path / "step_000010", tmp_path / "step_000030")
    manifest.commit(tmp_path, "step_000030")
    (tmp_path / "step_000020" / "extra.pt").write_bytes(b"payload")
    found = newest_valid(tmp_path)
    assert found and found.path.name == "step_000010"
    assert found.refused == (
        "step_000030: MANIFEST.json is of step 10",
        "step_000020: extra.pt is not listed in MANIFEST.json",
    )


@pytest.mark.parametrize("tracker", [b"", b"\x00\xff garbage", b"step_000099\n", b"../../etc", b"20", None])
def test_a_useless_tracker_leads_to_a_scan(tmp_path, tracker):
    save(tmp_path, 10)
    save(tmp_path, 20)
    if tracker is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(tracker)
    found = newest_valid(tmp_path)
    assert found and found.manifest.step == 20
    (line,) = found.refused
    assert line.startswith("latest: ") and "looking through all" in line


def test_a_run_that_had_checkpoints_never_starts_over(tmp_path):
    assert newest_valid(tmp_path / "absent") is None and newest_valid(tmp_path) is None
    manifest.open_partial(tmp_path, 10)
    assert newest_valid(tmp_path) is None, "the very first save was interrupted: there is nothing to lose"
    save(tmp_path, 10)
    shutil.rmtree(tmp_path / "step_000010")
    with pytest.raises(CheckpointError, match="names step_000010, which does not exist"):
        newest_valid(tmp_path)


def test_retention_keeps_the_newest_valid_ones(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    assert steps(tmp_path) == ["latest", "step_000010", "step_000015"]
    flip(tmp_path / "step_000015" / "__0_0.distcp", 77)
    save(tmp_path, 20)
    assert steps(tmp_path) == ["latest", "step_000010", "step_000015", "step_000020"], "15 is rotten: 10 must stay"
    flip(tmp_path / "step_000020" / "__0_0.distcp", 77)
    assert resumed(tmp_path) == 10
    save(tmp_path, 20)
    assert steps(tmp_path) == ["latest", "step_000010", "step_000015", "step_000020"]
    save(tmp_path, 25)
    assert steps(tmp_path) == ["latest", "step_000020", "step_000025"]


def test_retention_after_a_roll_back_spares_the_step_just_saved(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step, keep=3)
    manifest.commit(tmp_path, "step_000005")
    assert resumed(tmp_path) == 5
    save(tmp_path, 7, keep=1)
    assert resumed(tmp_path) == 7
    assert steps(tmp_path) == ["latest", "step_000007", "step_000010", "step_000015"]


def test_a_file_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    for step in (5, 10):
        save(tmp_path, step)

    def busy(*_, **__):
        raise OSError("Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        save(tmp_path, 15)
    assert "could not be removed" in caplog.text and resumed(tmp_path) == 15
    save(tmp_path, 20)
    assert steps(tmp_path) == ["latest", "step_000015", "step_000020"]


def test_differing_keys_name_both_values():
    saved = {"model": {"path": "a", "dtype": "float32"}, "steps": 3, "old": 1}
    current = {"model": {"path": "b", "dtype": "float32"}, "steps": 3, "new": {"x": 1}}
    assert manifest.differing_keys(saved, current) == {
        "model.path": ("a", "b"),
        "new": (None, {"x": 1}),
        "old": (1, None),
    }
    assert manifest.differing_keys(saved, saved) == {}


def test_no_torch_is_needed():
    code = "import sys, megatron_ext.checkpoint.manifest; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
