"""Who does what when: the phases of all ranks, and where they wait for one another.

A rank's clock is its host's. It starts anew with every step, when all ranks have just met (loop.py asks them all
whether to stop), so the ranks of several hosts agree to a message's time.

Ranks meet (``meet``) after their responses are scored, after the passes before the first update, after a pass of the
policy that has moved, and where each has its gradients. What follows each of these needs all of them anyway. Waits
within a pass, for other stages of a pipeline or for tokens that travel to experts, count as work.
"""

from __future__ import annotations

import os
import socket
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_ext.metrics.display import Phase, Watch
from megatron_ext.metrics.spans import Span
from megatron_ext.model import parallel
from megatron_ext.plan.memory import Roles


class Clock(Protocol):
    """What times phases and waits: the run's Watch, or one for another thread."""

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Phase]: ...

    def waiting(self) -> AbstractContextManager[None]: ...


def meet(watch: Clock) -> None:
    """Wait until every rank is here. How long this one waits is in the timeline."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # its work is this rank's own; other streams may wait for others
    with watch.waiting():
        dist.barrier(group=parallel.gloo())


def gather(watch: Watch) -> list[list[Span]] | None:
    """What every rank has done since the step began, on rank 0; None on the others."""
    group = parallel.gloo()
    ranks: list[Any] | None = [None] * group.size() if dist.get_rank() == 0 else None
    dist.gather_object(watch.take_spans(), ranks, dst=0, group=group)
    return ranks


def describe_run(roles: Roles, *, first_step: int) -> dict[str, Any]:
    """What the planner has to know of a run besides its configuration: on what it runs from ``first_step`` on, rank by
    rank, and which models and passes its method asks for."""
    own: dict[str, Any] = {"host": socket.gethostname()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        own |= {"device": properties.name, "memory": properties.total_memory}
    else:
        own |= {"device": "cpu", "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own, group=parallel.gloo())
    return {"first_step": first_step, "torch": torch.__version__, "roles": asdict(roles), "ranks": ranks}
