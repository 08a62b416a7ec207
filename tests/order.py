"""In which order pytest's workers run the files: the longest first, so that none of them is begun at the end."""

from __future__ import annotations

import os

import pytest

SECONDS = {  # of files that take long, on two slow cores; the others take less
    "tests/soak/test_soak.py": 220,
    "tests/tools/test_hanging.py": 210,
    "tests/slurm/test_cluster.py": 200,
    "tests/ops/test_kernels.py": 130,
    "tests/train/test_run.py": 120,
    "tests/test_gpu_rehearsal.py": 120,
    "tests/train/test_validation.py": 70,
    "tests/recipes/test_papers.py": 70,
    "tests/metrics/test_trackers.py": 70,
    "tests/tools/lab/test_command.py": 60,
    "tests/test_install.py": 60,
    "tests/docs/test_tutorial.py": 50,
    "tests/tools/test_ranks.py": 50,
    "tests/tools/test_dry_run.py": 50,
    "tests/test_gpu_libraries.py": 50,
    "tests/properties/test_problem_files.py": 40,
    "tests/train/test_deterministic.py": 40,
    "tests/metrics/test_warnings_log.py": 30,
}


def longest_first(items: list[pytest.Item]) -> list[pytest.Item]:
    """``items`` in the order in which pytest-xdist's worksteal gives each worker an equal number, one after the other:
    the long files are dealt to the workers and come first in each one's share. Without workers nothing changes."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1:
        return items
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    long = sorted(SECONDS.keys() & files.keys(), key=lambda file: (-SECONDS[file], file))
    shares: list[list[str]] = [[] for _ in range(workers)]
    for file in long:
        min(shares, key=lambda share: sum(SECONDS[each] for each in share)).append(file)
    rest = [item for file, own in files.items() if file not in SECONDS for item in own]
    ordered: list[pytest.Item] = []
    for number, share in enumerate(shares):
        size = (len(items) - len(ordered)) // (workers - number)
        ordered += [item for file in share for item in files[file]]
        taken = max(0, size - sum(len(files[file]) for file in share))
        ordered += rest[:taken]
        rest = rest[taken:]
    return ordered + rest
