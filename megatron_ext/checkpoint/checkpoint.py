"""Save and resume a run: weights, optimizer, schedule, random states and the caller's own state.

Everything public here is collective: all ranks call it, and a fault of one rank is raised on all of them. What a
checkpoint directory is, and which one is trusted, is manifest.py's business; local_shards.py says what each rank
has of it, storage.py writes and reads the tensors. Every rank writes and reads only what its optimizer owns,
so a run resumes under another TP, PP, EP or DP and nothing is gathered; data-parallel ranks get the rest of the
weights from each other, as after an update.

A directory has beside its tensors ``state.pt`` (what the caller, the schedules and the random generators hold),
``common.pt`` and ``metadata.json`` (by which Megatron's own loader knows its format). Nothing is unpickled unseen:
see storage.py for tensors; the other two are read with ``weights_only``.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch.distributed.checkpoint.metadata import Metadata

from megatron_ext.checkpoint import best as best_checkpoint
from megatron_ext.checkpoint import local_shards, manifest
from megatron_ext.checkpoint.collectives import (
    checkpoint_fault,
    gather_on_rank_0,
    on_all_ranks,
    on_rank_0,
    true_on_all_ranks,
    with_shared_hashing,
)
from megatron_ext.checkpoint.local_shards import Piece, module_pieces, trained_pieces
from megatron_ext.checkpoint.manifest import CheckpointError, Manifest, Record
from megatron_ext.checkpoint.storage import (
    FORMAT,
    FORMAT_FILE,
    INDEX,
    Chunk,
    Extents,
    misfits,
    read_index,
    read_targets,
    write_chunks,
    write_file,
    write_index,
)
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model import parallel
from megatron_ext.model.build import Policy
from megatron_ext.model.host_memory import HostMemory
from megatron_ext.model.trainable import TrainableModel

_STATE, _COMMON = "state.pt", "common.pt"


@dataclass(frozen=True)
class LoadedState:
    """What ``load`` restored, besides models, optimizers and schedules which it filled in place.

    ``refused`` has a line for everything passed over or not restored; ``manifest`` knows layout and config.
    ``rng`` are this rank's random states, for ``set_rng``; None under another layout than the one that saved them.
    """

    step: int
    state: dict[str, Any]
    path: Path
    manifest: Manifest
    refused: tuple[str, ...]
    rng: dict[str, Any] | None


@dataclass(frozen=True)
class Written:
    """What a rank wrote of a checkpoint, once it is on the disk: its chunks, and where in its file each one lies."""

    chunks: list[Chunk]
    extents: Extents
    files: dict[str, Record]
    seconds: float


@dataclass(frozen=True)
class Published:
    """A committed checkpoint; ``seconds`` its slowest rank spent writing."""

    path: Path
    seconds: float


@dataclass(frozen=True)
class _Pending:
    step: int
    folder: Path
    written: Future[Written]
    best: int | None


class Checkpoints:
    """A run's checkpoints below ``root``: saves, publishes, resumes, keeps the ``keep`` newest valid ones.

    ``save`` gives this rank's pieces to a thread that writes them, ``publish`` commits them once all ranks are done;
    what is too old then is removed by rank 0's thread. With ``asynchronous``, ``save`` returns when the pieces are
    copied, and the host keeps room for one copy as long as this object lives: 14 bytes (bf16: weight, fp32 master, two
    moments; fp32: 16) for each parameter of the rank's pipeline and tensor shard, divided by the data- and
    context-parallel size. Without, it returns when they are written, and holds one piece at a time.

    ``trained`` is the policy, under that name, and the other models that train; the names of their tensors start with
    theirs. So do those of ``frozen`` models, whose weights alone are saved. ``config`` is JSON-like.
    """

    def __init__(
        self,
        root: Path,
        *,
        trained: Mapping[str, TrainableModel],
        config: dict[str, Any],
        layout: dict[str, Any],
        keep: int,
        asynchronous: bool,
        frozen: Mapping[str, Policy] | None = None,
    ):
        self.root, self.trained, self.config, self.keep = root, trained, config, keep
        self.frozen = frozen or {}
        self.layout: dict[str, Any] = json.loads(json.dumps(layout))  # as a manifest gives it back: no tuples
        self.step: int | None = None  # of the last save or load
        self._memory = HostMemory() if asynchronous else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._removal: Future[None] | None = None  # of the last old checkpoints, on rank 0
        self._trusted: dict[str, manifest.Stamp] = {}  # on rank 0

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint waits to be published; the same on all ranks."""
        return self._pending is not None

    def save(self, step: int, state: dict[str, Any], *, best: int | None = None) -> None:
        """Begin the checkpoint of ``step``; the one before is published first. That of step ``best`` stays.

        ``state`` holds plain Python values and tensors, the same on all ranks (rank 0's is stored). Random states are
        added here, per rank. Models and optimizers may lie in device or host memory.
        Raises CheckpointError on all ranks when any of them fails; what was committed before stays.
        """
        self.publish(wait=True)
        partial = on_rank_0(lambda: manifest.open_partial(self.root, step), checkpoint_fault("opening a checkpoint"))
        with _removed_on_failure(partial):
            with on_all_ranks("collecting model and optimizer"):
                pieces = [each for each in self._pieces() if each.stored]
            steps = {name: local_shards.steps_taken(model) for name, model in self.trained.items()}
            everyone = gather_on_rank_0((_rng(), steps))
            with on_all_ranks("copying model, optimizer and state"):
                contents = _contents(self.trained, state, everyone) if dist.get_rank() == 0 else {}
                if self._memory is not None:
                    copies = self._memory.copies([each.tensor for each in pieces])
                    pieces = [replace(each, tensor=copy) for each, copy in zip(pieces, copies, strict=True)]
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the thread has a stream of its own
        written = self._thread.submit(_write, partial, pieces, contents)
        if self._memory is None:
            wait([written])
        self._pending, self.step = _Pending(step, partial, written, best), step

    def publish(self, *, wait: bool) -> Published | None:
        """Commit the checkpoint that was saved last, and have old ones removed, if all ranks have written theirs.

        None if they have not, or if there is none; ``wait`` until they have, and until the old ones are gone. Raises
        CheckpointError on all ranks if one could not write its part, or if what is on the disk cannot be read back.
        """
        published = self._publish(wait=wait)
        if wait and self._removal is not None:
            self._removal.result()
        return published

    def _publish(self, *, wait: bool) -> Published | None:
        pending = self._pending
        if pending is None or not (wait or true_on_all_ranks(pending.written.done())):
            return None
        self._pending = None
        with _removed_on_failure(pending.folder):
            with on_all_ranks("writing the shards"):
                own = pending.written.result()
            parts = gather_on_rank_0(own)
            published = on_rank_0(lambda: self._commit(pending, parts), checkpoint_fault("publishing the checkpoint"))
        given_up = with_shared_hashing(
            "giving up old checkpoints",
            lambda hash_files: manifest.retain(
                self.root,
                step=pending.step,
                keep=self.keep,
                trusted=self._trusted,
                hash_files=hash_files,
                best=pending.best,
            ),
        )
        if dist.get_rank() == 0:
            self._removal = self._thread.submit(_remove, given_up)
        return published

    def mark_best(self, step: int | None) -> None:
        """Have ``best`` name the checkpoint of ``step``, which is committed. Raises CheckpointError on all ranks."""
        on_rank_0(lambda: best_checkpoint.mark(self.root, step), checkpoint_fault("marking the best checkpoint"))

    def load(self, *, check: Callable[[Manifest], None] = lambda _: None) -> LoadedState | None:
        """Fill models, optimizers and schedules from the newest valid checkpoint, unless ``check`` raises for it.

        None if there never was one. Raises CheckpointError on all ranks if none is valid or the newest valid one does
        not fit the models (it lists the differing tensors).
        """
        found = with_shared_hashing(
            "looking for a checkpoint", lambda hash_files: manifest.newest_valid(self.root, hash_files)
        )
        if found is None:
            return None
        check(found.manifest)
        path, refused, rng = found.path, list(found.refused), None
        with on_all_ranks(f"reading {path.name}"):
            index = read_index(path)
            payload = torch.load(path / _STATE, map_location="cpu", weights_only=True)
            common = torch.load(path / _COMMON, map_location="cpu", weights_only=True)
            _check_schedules(payload["scheduler"], self.trained)
            pieces = self._pieces()
        with on_all_ranks(f"fitting {path.name} to this model"):
            _check_fit(index, pieces, wanted=_keys_of_all(pieces))
        with on_all_ranks(f"loading {path.name}"):
            read_targets(path, index, pieces)
        with on_all_ranks(f"restoring {path.name}"):
            for name, each in self.trained.items():
                local_shards.set_steps(each, local_shards.saved_steps(common[name]["optimizer"]))
                each.scheduler.num_steps = 0  # its load_state_dict adds the saved steps to those already made
                each.scheduler.load_state_dict(payload["scheduler"][name])
        for chunk in [chunk for each in self.trained.values() for chunk in each.model.chunks]:
            chunk.start_param_sync(force_sync=True)
        defaults = ParallelConfig().model_dump(mode="json")  # of keys that are newer than the checkpoint
        if defaults | self.layout == defaults | found.manifest.layout:
            rng = payload["rng"][dist.get_rank()]
        else:
            refused.append(
                f"{path.name}: saved under {found.manifest.layout}, resumed under {self.layout}: "
                "weights and optimizer are resharded, random states start from the seed"
            )
        self.step = found.manifest.step
        if dist.get_rank() == 0:
            self._trusted[path.name] = manifest.stamp(path)
        return LoadedState(self.step, payload["state"], path, found.manifest, tuple(refused), rng)

    def _pieces(self) -> list[Piece]:
        """All that this rank has of what is saved."""
        trained = [each for name, model in self.trained.items() for each in trained_pieces(name, model)]
        frozen = [each for name, model in self.frozen.items() for each in module_pieces(model.modules, f"{name}.")]
        return trained + frozen

    def _commit(self, pending: _Pending, parts: Sequence[Written]) -> Published:
        """On rank 0: index, check and seal what all ranks wrote."""
        folder = pending.folder
        chunks = [chunk for part in parts for chunk in part.chunks]
        extents: Extents = {index: extent for part in parts for index, extent in part.extents.items()}
        files = {name: record for part in parts for name, record in part.files.items()}
        files[INDEX] = write_index(folder, chunks, extents)
        read_index(folder)  # what could not be read is not published
        path = manifest.publish(folder, step=pending.step, files=files, layout=self.layout, config=self.config)
        best_checkpoint.mark(self.root, pending.best)
        self._trusted[path.name] = manifest.stamp(path)
        return Published(path, max(part.seconds for part in parts))


def verify(path: Path) -> Manifest:
    """The manifest of the checkpoint ``path``, whose files are hashed once. Raises CheckpointError on all ranks."""
    return with_shared_hashing(f"verifying {path.name}", lambda hash_files: manifest.verify(path, hash_files))


def load_model(path: Path, modules: list) -> None:
    """Fill modules alone from the checkpoint ``path``, which the caller has verified, of any layout.

    Raises CheckpointError naming every tensor of the model that the checkpoint does not hold in that shape.
    """
    with on_all_ranks(f"loading {path.name}"):
        index, pieces = read_index(path), module_pieces(modules)
        if faults := misfits(index, pieces):
            raise CheckpointError(
                "\n".join(f"{path.name} does not hold {key}: {faults[key]}" for key in sorted(faults))
            )
        read_targets(path, index, pieces)


def _keys_of_all(pieces: Sequence[Piece]) -> set[str]:
    """The keys of all ranks' pieces: a pipeline stage has only its own."""
    everyone: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, {each.chunk.key for each in pieces}, group=parallel.gloo())
    return set().union(*everyone)


def _check_fit(index: Metadata, pieces: Sequence[Piece], *, wanted: set[str]) -> None:
    found, own = index.state_dict_metadata.keys(), misfits(index, pieces)
    faults = [f"only in the checkpoint: {key}" for key in sorted(found - wanted)]
    faults += [f"only in this model: {key}" for key in sorted(wanted - found)]
    faults += [f"{key}: {own[key]}" for key in sorted(own.keys() & found)]
    if faults:
        raise CheckpointError("\n".join(faults))


def set_rng(states: dict[str, Any]) -> None:
    """Go on with the random states of a ``LoadedState``; after everything else that a start draws for."""
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    name, keys, *position = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *position))
    torch.set_rng_state(states["torch"])
    if ("cuda" in states) == torch.cuda.is_available():  # states of the other device's generator do not fit
        tracker.set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _remove(folders: Sequence[Path]) -> None:
    """In the thread: delete old checkpoints."""
    for folder in folders:
        manifest.remove(folder)


def _write(folder: Path, pieces: Sequence[Piece], contents: dict[str, bytes]) -> Written:
    """In the thread: this rank's tensors and, on rank 0, the small files. No collective."""
    start = time.perf_counter()
    name = f"__{dist.get_rank()}_0.distcp"
    record, extents = write_chunks(folder / name, ((each.chunk, each.tensor) for each in pieces))
    files = {name: record}
    for small, content in contents.items():
        files[small] = write_file(folder / small, lambda file, content=content: file.write(content))
    return Written([each.chunk for each in pieces], extents, files, time.perf_counter() - start)


def _contents(trained: Mapping[str, TrainableModel], state: dict[str, Any], everyone: list[Any]) -> dict[str, bytes]:
    """The files beside the tensors. ``everyone``: each rank's random states and the steps of its optimizers."""
    rng = [states for states, _ in everyone]
    common = {
        name: {"optimizer": local_shards.groups_state(each, max(steps[name] for _, steps in everyone))}
        for name, each in trained.items()
    }
    return {
        _STATE: _safe_bytes({"state": state, "scheduler": _schedules(trained), "rng": rng}),
        _COMMON: _safe_bytes(common),
        FORMAT_FILE: FORMAT,
    }


def _schedules(trained: Mapping[str, TrainableModel]) -> dict[str, Any]:
    return {name: each.scheduler.state_dict() for name, each in trained.items()}


def _check_schedules(saved: dict[str, Any], trained: Mapping[str, TrainableModel]) -> None:
    """Megatron's scheduler would silently go on with the saved rates, whatever this run's recipe says."""
    lines = []
    for name, each in trained.items():
        differing = manifest.differing_keys(saved[name], each.scheduler.state_dict())
        differing.pop("num_steps", None)
        end = differing.pop("lr_decay_steps", None)
        lines += [
            f"{each.section}: {key}: saved with {old}, this run has {new}" for key, (old, new) in differing.items()
        ]
        if end is not None and not differing:
            old, new = (steps - 1 for steps in end)
            lines.append(
                f"{each.section}.decay_steps: this run's learning rate falls over {old} {each.options.counted}, now it "
                f"would over {new} (it follows train.steps where it is 0); set {each.section}.decay_steps={old}: "
                "further steps are done at min_lr"
            )
    if lines:
        raise CheckpointError("\n".join(["schedule", *lines, "resume with the saved values, or start a new run"]))


def _safe_bytes(content: dict[str, Any]) -> bytes:
    """``torch.save``, refusing now what ``weights_only`` would refuse at the resume."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"state: expected plain Python values and tensors only: {error}") from None
    return buffer.getvalue()


def _rng() -> dict[str, Any]:
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    name, keys, *position = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *position),  # pyright: ignore[reportAttributeAccessIssue]
        "torch": torch.get_rng_state(),
        "tracker": tracker.get_states(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        if dist.get_rank() == 0 and partial.exists():
            manifest.remove(partial)
        raise
