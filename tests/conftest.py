"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before torch is imported, and inherited by every process a test starts.  Test processes run
# side by side; with a pool of threads each, they wait for each other's cores, spinning, and
# need several times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine must not fail a property; and what CI finds must be found again there.
settings.register_profile(
    "cg_optim",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("cg_optim")
