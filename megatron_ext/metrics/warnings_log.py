"""Warnings of the libraries (Megatron, torch, transformers) go to a file of the run's folder, not to the terminal.

Each rank writes ``warnings/rank_N.log``. They are held in memory until the folder is this run's, so a run that is
refused writes nothing. What this project logs is meant for the user and stays on stderr; so do errors. No torch is
imported.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import warnings
from pathlib import Path

FOLDER = "warnings"
OURS = __name__.partition(".")[0]
_MOST = 10_000  # records; a run has some dozens before its first step
_held = logging.handlers.MemoryHandler(_MOST, flushLevel=sys.maxsize, flushOnClose=False)


def hold() -> None:
    """Keep every warning from now on. Before the libraries are imported, which warn at once."""
    logging.captureWarnings(True)
    for category in (UserWarning, FutureWarning):
        warnings.simplefilter("default", category)  # once for each place; the launcher has them ignored elsewhere
    shown = logging.StreamHandler()
    shown.addFilter(lambda record: record.levelno >= logging.ERROR or record.name.startswith(OURS))
    for handler in (_held, shown):
        logging.getLogger().addHandler(handler)


def write_to(run_dir: Path) -> Path | None:
    """Write what is held, and what is still to come, below the run's folder; returns where. None if nothing is held."""
    root = logging.getLogger()
    if _held not in root.handlers:
        return None
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    file = logging.FileHandler(folder / f"rank_{os.environ.get('RANK', '0')}.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    root.addHandler(file)
    root.removeHandler(_held)
    _held.setTarget(file)
    _held.flush()
    from transformers.utils import logging as transformers_logging  # it has a handler of its own, for stderr

    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    return folder
