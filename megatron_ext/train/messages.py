"""What a run tells its user: lines, printed once for all ranks, and faults of the user's own files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_ext.config.errors import ConfigError


def tell(message: str) -> None:
    """Print a line, on rank 0 alone."""
    if dist.get_rank() == 0:
        print(message, flush=True)


def file_fault(error: Exception) -> ConfigError | None:
    """The ConfigError that an error of reading or writing the user's files stands for; None for a defect of ours."""
    return ConfigError(str(error)) if isinstance(error, (ValueError, OSError)) else None


@contextmanager
def users_files() -> Iterator[None]:
    """Make what is wrong with the user's files, read inside, a ConfigError."""
    try:
        yield
    except Exception as error:
        if (fault := file_fault(error)) is None:
            raise
        raise fault from error
