"""The operators and the methods need torch alone: nothing else is imported, and without numpy the bits are the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

IMPORTED = """
import sys
import torch, torch.distributed

def packages():
    return {name.partition(".")[0] for name in sys.modules}

of_torch = packages()
import megatron_ext.methods, megatron_ext.ops
print(*sorted(packages() - of_torch - {"megatron_ext", "numpy"} - sys.stdlib_module_names))
"""

COMPUTED = """
import sys
if "without numpy" in sys.argv:
    sys.modules["numpy"] = None  # whoever imports it finds none
import torch
from megatron_ext.ops import policy_stats, sorting

assert (sorting.numpy is None) == ("without numpy" in sys.argv)
names = ("logprob", "entropy", "nucleus_entropy", "nucleus_logprob")
g = torch.Generator().manual_seed(0)
logits = torch.randn(6, 9001, generator=g) * torch.linspace(0.1, 6, 6)[:, None]
targets = logits.argmax(-1)
for dtype in (torch.bfloat16, torch.float32, torch.float64):
    leaf = logits.detach().to(dtype).requires_grad_()
    out = policy_stats(leaf, targets, top_p=0.8, want=names, grad=names)
    assert 0 < out["num_fallback"] < 6
    torch.stack([out[name].where(out[name] > -torch.inf, 0).sum() for name in names]).sum().backward()
    print([out[name].tolist() for name in names], leaf.grad.flatten().tolist())
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_importing_operators_and_methods_brings_nothing_of_third_parties() -> None:
    assert run(IMPORTED).split() == []


def test_without_numpy_the_bits_are_the_same() -> None:
    assert run(COMPUTED) == run(COMPUTED, "without numpy")
