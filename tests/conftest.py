"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:  # as many test processes as cores: a second thread in one is in the way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Shared machines pause for longer than hypothesis' deadline; time is measured in reports/bench, never in a test.
settings.register_profile("planner", deadline=None)
settings.load_profile("planner")
