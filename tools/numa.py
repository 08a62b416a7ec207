"""Which CPUs are near which GPU: the launcher binds every rank to those of its GPU's NUMA node.

``nvidia-smi`` names the GPUs' PCI addresses and the kernel each address's CPUs; no CUDA is started. Ranks of one NUMA
node share its CPUs. Memory follows: a page lies where it is touched first.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

PCI_DEVICES = Path("/sys/bus/pci/devices")
QUERY = ("nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader")


class NoBinding(RuntimeError):
    """Why ranks cannot be bound on this machine."""


def cpus_of_ranks(num_ranks: int) -> list[set[int]]:
    """The CPUs that each rank of this node may use: local rank r uses the r-th visible GPU. Raises NoBinding."""
    addresses, allowed = _addresses(), os.sched_getaffinity(0)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(name for name in addresses if name.isdigit())).split(",")
    if len(visible) < num_ranks:
        raise NoBinding(f"{num_ranks} ranks, but {len(visible)} visible GPUs")
    return [_near(_address(name.strip(), addresses)) & allowed or allowed for name in visible[:num_ranks]]


def _addresses() -> dict[str, str]:
    """PCI address of every GPU of this node, by its index and by its UUID."""
    try:
        listed = subprocess.run(QUERY, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoBinding(f"nvidia-smi does not list the GPUs: {error}") from None
    rows = [[field.strip() for field in line.split(",")] for line in listed.splitlines() if line.strip()]
    return {name: address for index, uuid, address in rows for name in (index, uuid)}


def _address(name: str, addresses: dict[str, str]) -> str:
    """Of the GPU with that index, UUID or beginning of a UUID, as the kernel writes it: 0000:1b:00.0."""
    found = {address for key, address in addresses.items() if key == name or ("-" in name and key.startswith(name))}
    if len(found) != 1:
        raise NoBinding(f"CUDA_VISIBLE_DEVICES names {name!r}, which nvidia-smi does not list")
    return found.pop().lower()[-len("0000:00:00.0") :]


def _near(address: str) -> set[int]:
    file = PCI_DEVICES / address / "local_cpulist"
    try:
        spans = [span.split("-") for span in file.read_text().strip().split(",")]
    except OSError as error:
        raise NoBinding(f"the kernel does not say which CPUs are near {address}: {error}") from None
    return {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}
