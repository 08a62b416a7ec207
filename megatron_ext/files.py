"""Files: read whole, but never more than they should have, and written whole or not at all.

A device, a pipe or a file of many gigabytes in the place of a configuration is refused before it is read; JSON is
refused as one kind of error, whatever is wrong with it. No torch: the schema imports it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import ValidationError

MAX_BYTES = 32 * 2**20
LARGE_BYTES = 512 * 2**20  # of what grows with the data: an evaluation of a million problems
MAX_DEPTH = 50  # of nested values: what walks through them recursively has room for it


def read_small(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file. Raises OSError where there is none, or one of more than ``max_bytes``."""
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(errno.EFBIG, f"Larger than {max_bytes} bytes", str(path))
    return content


def read_lines(path: str | Path) -> Iterator[bytes]:
    """The lines of a regular file of any size, streamed. Raises OSError for a line of more than ``MAX_BYTES``."""
    number = 1
    with open_regular(path) as file:
        while line := file.readline(MAX_BYTES + 1):
            if len(line) > MAX_BYTES:
                raise OSError(errno.EFBIG, f"Line {number} is larger than {MAX_BYTES} bytes", str(path))
            yield line
            number += 1


def read_json(path: str | Path, *, max_bytes: int = MAX_BYTES) -> Any:
    """The JSON of a small file. Raises OSError as ``read_small``, ValueError as ``parse_json``."""
    return parse_json(read_small(path, max_bytes=max_bytes))


def parse_json(text: bytes) -> Any:
    """Raises ValueError for what is not JSON in UTF-8, also for nesting beyond ``MAX_DEPTH`` and endless numbers."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        parts = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [child for part in parts for child in part]
    if level:
        raise ValueError("its values are nested too deeply")
    return value


def sha256(path: str | Path) -> str:
    """Of a regular file's bytes, streamed. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """All of it or nothing, in the place of what is there: on the disk before its name. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")  # of one writer: what a kill leaves, the next one takes
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def first_fault(error: ValidationError) -> str:
    """Where and what it is, in a few words without the value, which may be of any size."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:300]


def open_regular(path: str | Path) -> BufferedReader:
    """Raises OSError for what is no regular file, without waiting for the other end of a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # NUL in its name
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "Not a regular file", str(path))
