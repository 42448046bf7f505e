"""How long to fuzz: a short form within all tests, a long one for `make fuzz` (MELL_FUZZ_FACTOR=N: N times as much)."""

import os

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("MELL_FUZZ_FACTOR", "1"))


def examples(count: int) -> settings:
    """Return settings for so many examples, times the factor."""
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    return settings(max_examples=count * FACTOR, deadline=None, suppress_health_check=checks)
