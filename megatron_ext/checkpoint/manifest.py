"""Checkpoints as directories: what makes one complete, which one to resume from, which ones to delete.

No torch: a launcher or a report can ask for the newest valid checkpoint.

    root/latest                   the commit point: the name of the last checkpoint whose save finished
    root/best                     the name of the best validated one, if a run keeps it (best.py)
    root/step_000010/             payload files and MANIFEST.json: size and sha256 of every one of them
    root/step_000010.replaced-x   an earlier save of the same step, until the new one is committed
    root/step_000020.tmp-x        a save (or a deletion) that was interrupted: never read, removed by the next save

A save fills a ``.tmp-`` directory, writes the manifest last, syncs, renames the directory, and replaces
``latest``. Killed at any point, it leaves what ``latest`` named untouched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megatron_ext.config.redact import redact
from megatron_ext.files import first_fault, open_regular, read_json, read_small

logger = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
TRACKER, BEST = "latest", "best"
_PUBLISHED = re.compile(r"step_([0-9]{1,18})(\.replaced-\w+)?")
_HASH_THREADS = min(8, os.cpu_count() or 1)


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or none can be trusted. The message names every file at fault."""


@dataclass(frozen=True)
class Record:
    """One file of a checkpoint."""

    sha256: str
    bytes: Annotated[int, Field(ge=0)]

    def __str__(self) -> str:
        return f"sha256 {self.sha256} ({self.bytes} bytes)"


@dataclass(frozen=True)
class Manifest:
    """What MANIFEST.json states. ``files`` are paths relative to the checkpoint, the manifest left out."""

    step: Annotated[int, Field(ge=0, lt=10**18)]
    files: dict[str, Record]
    layout: dict[str, Any]
    config: dict[str, Any]
    config_hash: str
    versions: dict[str, str]

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Found:
    """The checkpoint to resume from, and one line for each thing that was passed over on the way."""

    path: Path
    manifest: Manifest
    refused: tuple[str, ...]


Hasher = Callable[[Path, list[str]], dict[str, Record]]  # of the named files of a directory
Stamp = tuple[tuple[str, int, int], ...]  # names, sizes and times of change of a checkpoint's files


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def config_hash(config: dict[str, Any]) -> str:
    """sha256 of the configuration as canonical JSON."""
    return hashlib.sha256(_canonical(config)).hexdigest()


def differing_keys(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved value, current value) wherever two configurations differ; None where a key is absent.

    Secrets count as equal: a manifest holds none.
    """
    saved, current = redact(saved), redact(current)
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differing_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = (old, new)
    return found


# Writing


def open_partial(root: Path, step: int) -> Path:
    """Make ``root`` and an empty directory for a save of ``step``; what interrupted saves left behind is removed."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in _partials(root):
        logger.warning("%s: left by a save or a removal that was interrupted, removed", leftover)
        remove(leftover)
    partial = root / f"{step_name(step)}.tmp-{_token()}"
    partial.mkdir()
    return partial


def record_files(folder: Path, names: Iterable[str]) -> dict[str, Record]:
    """Hash the named files, streamed, in parallel threads."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return dict(pool.map(lambda name: (name, _record(folder / name)), names))


def payload_names(folder: Path) -> list[str]:
    """Every file below ``folder`` except its manifest, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name != MANIFEST)


def publish(
    partial: Path, *, step: int, files: dict[str, Record], layout: dict[str, int], config: dict[str, Any]
) -> Path:
    """Seal a filled partial directory, whose files are synced, with its manifest, name it finally and commit it.

    Returns the checkpoint's path. An OSError leaves what was committed before as it is. CheckpointError if
    ``files`` and the directory disagree, as they do when a rank writes to a disk that others do not see.
    """
    written = {name: (partial / name).stat().st_size for name in payload_names(partial)}
    astray = sorted(
        name for name in files.keys() | written if name not in files or written.get(name) != files[name].bytes
    )
    if astray:
        raise CheckpointError(
            f"{partial}: expected the files written by all ranks, but {', '.join(astray[:5])} is not among them or "
            f"belongs to none; is the directory shared by all nodes?"
        )
    shown = redact(config)
    manifest = Manifest(step, files, layout, shown, config_hash(shown), _versions())
    content = json.loads(_canonical(asdict(manifest)))
    content["digest"] = hashlib.sha256(_canonical(content)).hexdigest()
    _write(partial / MANIFEST, json.dumps(content, indent=1))
    for folder in [path for path in partial.rglob("*") if path.is_dir()] + [partial]:
        _sync(folder)
    root, final = partial.parent, partial.parent / step_name(step)
    if final.exists():  # saved before, at this very step: keep it until the new one has its name
        final.rename(root / f"{final.name}.replaced-{_token()}")
    partial.rename(final)
    _sync(root)
    commit(root, final.name)
    return final


def commit(root: Path, name: str, tracker: str = TRACKER) -> None:
    """Point ``latest`` at the checkpoint ``name``, atomically."""
    temporary = root / f"{tracker}.tmp-{_token()}"
    try:
        _write(temporary, name + "\n")
        os.replace(temporary, root / tracker)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync(root)


def stamp(path: Path) -> Stamp:
    """What changes with any write to a checkpoint's files, for no more than a look at its directory."""
    states = ((name, (path / name).stat()) for name in [*payload_names(path), MANIFEST])
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)


def retain(
    root: Path, *, step: int, keep: int, trusted: Mapping[str, Stamp], hash_files: Hasher, best: int | None = None
) -> list[Path]:
    """Give up what is older than the ``keep`` newest valid checkpoints and not ``best``; ``step`` was just committed.

    Returns what it gave up, under names that are never read; to remove it takes long. A rotten checkpoint never pushes
    out a good one: all but the one just written are hashed again, unless their files still have the stamp at which this
    run wrote or verified them. Checkpoints of later steps (of a run that was rolled back) are left alone.
    """
    kept, given_up = list[int](), list[Path]()
    for found_step, path in _published(root):
        if found_step > step or (found_step == best and len(kept) >= keep and best not in kept):
            continue
        if len(kept) >= keep or found_step in kept:
            with _warned_of(path):
                given_up.append(give_up(path))
        elif found_step == step or _is_trusted(path, trusted) or _is_valid(path, hash_files):
            kept.append(found_step)
    return given_up


def give_up(path: Path) -> Path:
    """Rename a directory to a ``.tmp-``: killed while it is removed, it is no broken checkpoint."""
    return path if _is_partial(path) else path.rename(path.with_name(f"{path.name}.tmp-{_token()}"))


def remove(path: Path) -> None:
    """Delete a file or directory such that a kill half-way leaves a ``.tmp-`` and not a broken checkpoint."""
    with _warned_of(path):
        if path.is_dir():
            shutil.rmtree(give_up(path))
        else:
            path.unlink()


@contextmanager
def _warned_of(path: Path) -> Iterator[None]:
    """A file held open elsewhere must not end a run: the next save tries again."""
    try:
        yield
    except OSError as error:
        logger.warning("%s: could not be removed: %s", path, error)


# Reading


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint directory ``path``; CheckpointError if it is absent or damaged."""
    try:
        content = read_json(path / MANIFEST)
        digest = content.pop("digest")
        actual = hashlib.sha256(_canonical(content)).hexdigest()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name}: {MANIFEST} cannot be read as JSON: {error}") from None
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path.name}: {MANIFEST} cannot be read: it is no object with a digest") from None
    if actual != digest:
        raise CheckpointError(f"{path.name}: {MANIFEST}: expected sha256 {str(digest)[:100]}, found {actual}")
    try:
        return _MANIFEST.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{path.name}: {MANIFEST} cannot be read: {first_fault(error)}") from None


def verify(path: Path, hash_files: Hasher = record_files) -> Manifest:
    """Hash the checkpoint ``path`` against its manifest; CheckpointError with a line for each file that differs."""
    manifest = read_manifest(path)
    match = _PUBLISHED.fullmatch(path.name)
    faults = []
    if match and int(match[1]) != manifest.step:
        faults.append(f"{MANIFEST} is of step {manifest.step}")
    present = set(payload_names(path))
    try:
        sizes = {name: (path / name).stat().st_size for name in present}
        complete = [name for name, record in manifest.files.items() if sizes.get(name) == record.bytes]
        actual = hash_files(path, sorted(complete))  # the others are refused unread, whatever they are
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error}") from None
    for name, expected in sorted(manifest.files.items()):
        if name not in present:
            faults.append(f"{name} is missing, expected {expected}")
        elif name not in actual:
            faults.append(f"{name}: expected {expected}, found {sizes[name]} bytes")
        elif actual[name] != expected:
            faults.append(f"{name}: expected {expected}, found {actual[name]}")
    faults += [f"{name} is not listed in {MANIFEST}" for name in sorted(present - manifest.files.keys())]
    if faults:
        raise CheckpointError("\n".join(f"{path.name}: {fault}" for fault in faults))
    return manifest


def newest_valid(root: Path, hash_files: Hasher = record_files) -> Found | None:
    """The checkpoint to resume from: the one ``latest`` names or, should it be damaged, the next older one.

    Checkpoints newer than ``latest`` were never committed; they serve only if nothing else is valid.
    Without a usable ``latest`` the newest valid one is taken. Everything passed over is reported, in the
    log and in the result. None if ``root`` never held a checkpoint; CheckpointError if it does hold some
    and not one is valid, because starting over would silently lose the run.
    """
    lines = [f"{path.name}: a save or a removal that was interrupted, ignored" for path in _partials(root)]
    candidates, ever = _published(root), (root / TRACKER).exists()
    if not candidates and not ever:
        _warn(lines)
        return None
    tracked = None
    try:
        tracked = _tracked_step(root)
    except CheckpointError as error:
        lines.append(f"{error}: looking through all checkpoints")
    newer = [] if tracked is None else [found for found in candidates if found[0] > tracked]
    lines += [
        f"{path.name}: newer than {step_name(tracked or 0)}, which {TRACKER} names: never committed, ignored"
        for _, path in newer
    ]
    for _, path in [found for found in candidates if found not in newer] + newer:
        try:
            manifest = verify(path, hash_files)
        except CheckpointError as error:
            lines += str(error).splitlines()
        else:
            _warn(lines)
            return Found(path, manifest, tuple(lines))
    raise CheckpointError(
        f"{root} holds no valid checkpoint:\n  " + "\n  ".join(lines) + "\n"
        "Restore one from a copy, or start anew in an empty directory; the run does not restart at step 0 by itself."
    )


def _tracked_step(root: Path) -> int:
    """The step of the checkpoint that ``latest`` names; CheckpointError where that is of no use."""
    try:
        text = read_small(root / TRACKER, max_bytes=1000).decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{TRACKER}: cannot be read: {error}") from None
    match = _PUBLISHED.fullmatch(text)
    if match is None:
        raise CheckpointError(f"{TRACKER}: expected the name of a checkpoint, found {text[:80]!r}")
    if not (root / text).is_dir():
        raise CheckpointError(f"{TRACKER}: names {text}, which does not exist")
    return int(match[1])


def _published(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint with a final name, newest first, replaced ones after their successor."""
    if not root.is_dir():
        return []
    named = [(match, path) for path in root.iterdir() if (match := _PUBLISHED.fullmatch(path.name)) and path.is_dir()]
    named.sort(key=lambda found: (int(found[0][1]), found[0][2] is None, found[1].stat().st_mtime_ns), reverse=True)
    return [(int(match[1]), path) for match, path in named]


def _partials(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if _is_partial(path)) if root.is_dir() else []


def _is_partial(path: Path) -> bool:
    return ".tmp-" in path.name and path.name.startswith(("step_", TRACKER, BEST))


def _is_trusted(path: Path, trusted: Mapping[str, Stamp]) -> bool:
    try:
        return path.name in trusted and trusted[path.name] == stamp(path)
    except OSError:  # a file is gone: hashing will say which
        return False


def _is_valid(path: Path, hash_files: Hasher) -> bool:
    try:
        verify(path, hash_files)
    except CheckpointError as error:
        _warn(str(error).splitlines())
        return False
    return True


def _warn(lines: list[str]) -> None:
    for line in lines:
        logger.warning("checkpoint: %s", line)


def _record(path: Path) -> Record:
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Record(digest, file.tell())


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(content: Any) -> bytes:
    plain = json.loads(json.dumps(content, default=str))  # keys become text before they are sorted
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


def _token() -> str:
    return secrets.token_hex(4)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "megatron-core", "megatron-entropy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
