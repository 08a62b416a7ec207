"""Commands around the library: ``megatron-entropy NAME`` (cli.py), in a checkout also ``python -m tools.NAME``.

The wheel has this folder as ``megatron_ext.tools``, so its modules import one another relatively and start one another
by the names given here.
"""

from __future__ import annotations

import sys


def module_of(tool: str) -> str:
    """``tools.train`` in a checkout, ``megatron_ext.tools.train`` where it is installed."""
    return f"{__name__}.{tool}"


def command(tool: str, *arguments: str) -> list[str]:
    """What starts a tool in a process of its own."""
    return [sys.executable, "-m", module_of(tool), *arguments]
