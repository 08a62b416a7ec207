"""Small files that anybody may have written: read whole, but never more than they should have.

A device, a pipe or a file of many gigabytes in the place of a configuration is refused before it is read; JSON is
refused as one kind of error, whatever is wrong with it. No torch: the schema imports it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_BYTES = 32 * 2**20


def read_small(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file. Raises OSError where there is none, or one of more than ``max_bytes``."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # no waiting for a pipe's writer
    except ValueError as error:  # NUL in its name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"Larger than {max_bytes} bytes", str(path))
    return content


def read_json(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON of a small file in UTF-8. Raises OSError as ``read_small``, ValueError as ``parse_json``."""
    return parse_json(read_small(path, max_bytes=max_bytes))


def parse_json(text: bytes) -> Any:
    """Raises ValueError for what is not JSON in UTF-8, numbers and nesting beyond what Python reads included."""
    try:
        return json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
