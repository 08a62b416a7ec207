"""The best checkpoint of a run: ``root/best`` holds its name, as ``root/latest`` that of the newest. No torch."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.checkpoint.manifest import BEST, CheckpointError, commit, step_name
from megatron_ext.files import read_small


def mark(root: Path, step: int | None) -> None:
    """Point ``best`` at the checkpoint of ``step``, atomically; without such a checkpoint there is no ``best``."""
    name = None if step is None else step_name(step)
    if name is None or not (root / name).is_dir():
        (root / BEST).unlink(missing_ok=True)
    elif _read(root) != name:
        commit(root, name, tracker=BEST)


def best_of(root: Path) -> Path:
    """The directory that ``best`` names. Raises CheckpointError where it names none."""
    name = _read(root)
    if name is None:
        raise CheckpointError(
            f"{root} holds no best checkpoint: the run was not validated yet, or has validation.every = 0 or "
            "validation.keep_best = false; take one of its step_* directories"
        )
    if not name.startswith("step_") or not (root / name).is_dir():
        raise CheckpointError(f"{root / BEST}: names {name[:80]!r}, which is no checkpoint there; take another step_*")
    return root / name


def _read(root: Path) -> str | None:
    try:
        return read_small(root / BEST, max_bytes=1000).decode(errors="replace").strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{root / BEST}: cannot be read: {error}") from None
