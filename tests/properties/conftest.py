"""How long the property tests search: bounded and the same every time, or long and at random.

python -m pytest tests/properties                                 a few minutes of a slow machine at most
python -m pytest tests/properties --hypothesis-profile=deep       another search each time; failures are kept
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large)  # these measure the machine

settings.register_profile(
    "bounded", max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=CHECKS
)
settings.register_profile("deep", max_examples=5000, deadline=None, print_blob=True, suppress_health_check=CHECKS)
settings.load_profile("bounded")
